"""The loop itself, its checkpoints, and its work in step with other ranks."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.ranks import RankFailedError, Ranks, current, gather, on_first
from experiments.store import fingerprint
from experiments.training.evaluate import sums
from experiments.training.recipe import (
    Loss,
    Recipe,
    TrainingError,
    Transform,
    casting,
    checked_groups,
)
from experiments.training.results import Evaluation, Step, TrainingResult

Callback = Callable[["Trainer", Step], None]


class Stateful(Protocol):
    """What can be part of a checkpoint: its state is made of tensors and plain Python values."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state over."""


class Trainer:
    """Trains a model on samples that fit into memory.

    Parameters
    ----------
    model : nn.Module
        Trained in place, on the device where it is.
    inputs, targets : Tensor
        Samples first; moved to the model's device.
    recipe : Recipe
        What is done.
    loss : callable
        Takes outputs and targets; mean cross-entropy by default. It has to be a mean over the
        samples where there are several ranks or evaluations.
    seed : int
        Of the order of the samples, of ``transform``, and of torch's global generators while
        the model runs (dropout). The caller's global state is left as it was found.
    transform : callable, optional
        Applied to each batch of inputs, with a generator to draw from: augmentation.
    callbacks : sequence of callable
        Called as ``callback(trainer, step)`` after each optimizer step. What must run before
        the step is a hook of ``trainer.optimizer``.
    stateful : sequence
        Objects with ``state_dict`` and ``load_state_dict`` whose state belongs into checkpoints,
        such as :class:`conditioning.GradientNorms`.
    evaluation : (Tensor, Tensor), optional
        Inputs and targets to evaluate on during the training, in evaluation mode and in the
        precision of the recipe. The training goes on as if that had not happened.
    evaluate_every : int, optional
        After how many steps; once in an epoch by default. The last step is always followed by
        an evaluation.
    ranks : {"auto", None}
        ``"auto"`` shares the work with the ranks of the default process group, if there is one;
        None keeps to this process. See Notes.
    sync_every : int
        After how many steps losses are read from the device. More than 1 spares a GPU the
        waiting; then a training that diverges may go on for up to so many steps, less one,
        before that is seen: the model has made them, while the result ends at the step that
        diverged. Callbacks are told losses, so with any of them each one is read.
    parameters : iterable of dict, optional
        Groups of parameters of the model, with an ``lr_factor`` that multiplies the learning rate
        of the recipe; all of them in one group by default.

    Attributes
    ----------
    optimizer : torch.optim.SGD
        Over the parameters of ``model`` itself.
    scaler : torch.amp.GradScaler or None
        Of the loss, with ``precision="float16"``.

    Raises
    ------
    TrainingError
        The data do not fit together or to the batch size, the batch size is no multiple of the
        number of ranks, or an option is out of range.

    Notes
    -----
    On several ranks each takes its contiguous part of every batch, after ``transform`` has drawn
    for the whole batch, and the gradients are averaged by ``DistributedDataParallel``. So the
    training is that of one process up to rounding, with two exceptions: batch normalisation
    normalises each rank's part by itself (the first rank's running statistics are everyone's),
    and dropout draws differ between ranks. Losses are averaged, so all ranks end together. All
    ranks have to call :meth:`run`, :meth:`save` and :meth:`load` together; files are the first
    one's. A resumed training is the same to the last bit with one or two ranks; with more, the
    order in which gradients are summed may differ in the first step after it.

    Examples
    --------
    >>> x = torch.randn(64, 3)
    >>> recipe = Recipe(num_steps=10, batch_size=16, lr=0.1, momentum=0.9)
    >>> Trainer(nn.Linear(3, 2), x, (x[:, 0] > 0).long(), recipe).run().status
    'finished'
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        recipe: Recipe,
        *,
        loss: Loss = nn.functional.cross_entropy,
        seed: int = 0,
        transform: Transform | None = None,
        callbacks: Sequence[Callback] = (),
        stateful: Sequence[Stateful] = (),
        evaluation: tuple[Tensor, Tensor] | None = None,
        evaluate_every: int | None = None,
        ranks: Literal["auto"] | None = "auto",
        sync_every: int = 1,
        parameters: Iterable[dict[str, Any]] | None = None,
    ) -> None:
        self.ranks = _checked_ranks(ranks, recipe)
        groups = checked_groups(model, parameters)
        _check(inputs, targets, recipe, evaluation, evaluate_every, sync_every)
        self.model, self.recipe, self.loss, self.seed = model, recipe, loss, seed
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.inputs, self.targets = inputs.to(self.device), targets.to(self.device)
        self.transform = transform
        self.callbacks, self.stateful = tuple(callbacks), tuple(stateful)
        self.optimizer = torch.optim.SGD(
            groups,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        self.scaler = (
            torch.amp.GradScaler(self.device.type) if recipe.precision == "float16" else None
        )
        self.steps_per_epoch = len(inputs) // recipe.batch_size
        self.evaluation = (
            None if evaluation is None else tuple(part.to(self.device) for part in evaluation)
        )
        self.evaluate_every = evaluate_every or self.steps_per_epoch
        self.sync_every = sync_every
        self.num_steps = 0
        self.num_skipped = 0
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.message = ""
        self._generator = torch.Generator().manual_seed(_mixed(seed, "transform"))
        self._random: list[Tensor] = []
        self._order: tuple[int, Tensor] | None = None
        self._unread: list[Tensor] = []
        # What is called in a step: the model, or what averages its gradients over ranks.
        self._parallel: nn.Module = model

    def run(
        self,
        until: int | None = None,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
    ) -> TrainingResult:
        """Go on until a step, or to the end of the recipe.

        Parameters
        ----------
        until : int, optional
            Steps done when this returns.
        checkpoint : path, optional
            Continue from this file if it is there, and keep it up to date.
        checkpoint_every : int, optional
            After how many steps it is written; once in an epoch by default.

        Returns
        -------
        TrainingResult
            The result so far.
        """
        end = self.recipe.num_steps if until is None else min(until, self.recipe.num_steps)
        every = checkpoint_every or self.steps_per_epoch
        if checkpoint is not None and _on_first(self.ranks, Path(checkpoint).exists):
            self.load(checkpoint)
        if self.ranks.size > 1 and self._parallel is self.model:
            self._parallel = nn.parallel.DistributedDataParallel(self.model)
        mode = self.model.training
        self.model.train()
        try:
            with self._global_randomness() as states:
                while self.num_steps < end and not self.message:
                    self._step()
                    if self._evaluation_is_due():
                        self._evaluate()
                    if checkpoint is not None and self.num_steps % every == 0:
                        self._random = states()
                        self.save(checkpoint)
                self._read_losses()
                self._random = states()
        finally:
            self.model.train(mode)
        self._share_buffers()
        parameters = self.model.parameters()
        if not self.message and not all(bool(torch.isfinite(p).all()) for p in parameters):
            self.message = f"parameters are not finite after step {self.num_steps - 1}"
        return TrainingResult(
            "diverged" if self.message else "finished",
            self.num_steps,
            tuple(self.losses),
            self.message,
            tuple(self.evaluations),
            self.num_skipped,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Samples of a step before ``transform``: a function of the seed and the step alone.

        On several ranks it is the batch of all of them.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self.seed, "order", epoch))
            order = torch.randperm(len(self.inputs), generator=generator)
            self._order = (epoch, order.to(self.device))
        size = self.recipe.batch_size
        chosen = self._order[1][place * size : (place + 1) * size]
        return self.inputs[chosen], self.targets[chosen]

    def _step(self) -> None:
        index = self.num_steps
        inputs, targets = self.batch(index)
        if self.transform is not None:
            inputs = self.transform(inputs, self._generator)
        mine = self.ranks.share(self.recipe.batch_size)
        lr = self.recipe.lr_at(index)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        with casting(self.recipe.precision, self.device):
            loss = self.loss(self._parallel(inputs[mine]), targets[mine])
        self._unread.append(loss.detach())
        if self.callbacks or len(self._unread) >= self.sync_every:
            self._read_losses()
            if self.message:
                return
        skipped = self._update(loss)
        self.num_steps += 1
        self.num_skipped += skipped
        for callback in self.callbacks:
            epoch = index // self.steps_per_epoch
            callback(self, Step(index, epoch, self.losses[-1], lr, skipped))

    def _update(self, loss: Tensor) -> bool:
        """Change the parameters, and say whether that was left out because of an overflow."""
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
            return False
        self.scaler.scale(loss).backward()
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return bool(self.scaler.get_scale() < before)

    def _read_losses(self) -> None:
        """Take over the losses that are still on the device, and look for divergence."""
        if not self._unread:
            return
        values = torch.stack(self._unread).double()
        self._unread.clear()
        if self.ranks.size > 1:
            dist.all_reduce(values)
            values /= self.ranks.size
        for value in values.tolist():
            index = len(self.losses)
            self.losses.append(value)
            if not math.isfinite(value) or value > self.recipe.divergence:
                self.message = f"loss {value:.3g} at step {index}"
                self.num_steps = index
                return

    # -- evaluation -----------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        if self.evaluation is None:
            return False
        done = self.num_steps
        if done % self.evaluate_every != 0 and done != self.recipe.num_steps:
            return False
        # A model that has diverged is not worth it, and it may not have been seen yet.
        self._read_losses()
        return not self.message

    def _evaluate(self) -> None:
        assert self.evaluation is not None
        inputs, targets = self.evaluation
        self._share_buffers()
        mine = self.ranks.share(len(inputs))
        with torch.random.fork_rng(devices=self._gpus):
            found = sums(
                self.model,
                inputs[mine],
                targets[mine],
                loss=self.loss,
                precision=self.recipe.precision,
            )
        if self.ranks.size > 1:
            dist.all_reduce(found)
        loss, right = found.tolist()
        count, step = len(inputs), self.num_steps
        epoch = step // self.steps_per_epoch
        self.evaluations.append(Evaluation(step, epoch, loss / count, (count - right) / count))

    def _share_buffers(self) -> None:
        """Give every rank the first one's running statistics, as its next forward pass would."""
        if self.ranks.size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    # -- random numbers -------------------------------------------------------------------------

    @property
    def _gpus(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    @contextlib.contextmanager
    def _global_randomness(self) -> Iterator[Callable[[], list[Tensor]]]:
        """Give torch's global generators this training's states, and the caller's back after."""
        cuda = self._gpus
        purpose: list[str | int] = ["model", self.ranks.rank] if self.ranks.rank else ["model"]
        with torch.random.fork_rng(devices=cuda):
            if self._random:
                torch.set_rng_state(self._random[0])
                for one, state in zip(cuda, self._random[1:], strict=True):
                    torch.cuda.set_rng_state(state, one)
            else:
                # torch.manual_seed would reseed every GPU, and only this one is put back.
                torch.default_generator.manual_seed(_mixed(self.seed, *purpose))
                for one in cuda:
                    with torch.cuda.device(one):
                        torch.cuda.manual_seed(_mixed(self.seed, *purpose))
            yield lambda: [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]

    # -- checkpoints ----------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        shapes = [(name, tuple(p.shape)) for name, p in self.model.named_parameters()]
        kept = [type(one).__name__ for one in self.stateful]
        recipe = sorted(asdict(self.recipe).items())
        data = [tuple(part.shape) for part in (self.inputs, *(self.evaluation or ()))]
        how = (self.evaluate_every, self.ranks.size)
        factors = [
            (len(group["params"]), group.get("lr_factor", 1.0))
            for group in self.optimizer.param_groups
        ]
        return repr((recipe, self.seed, data, shapes, kept, how, factors))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued training needs to be the same to the last bit."""
        self._read_losses()
        own = {"random": self._random, "stateful": [one.state_dict() for one in self.stateful]}
        return {
            "made_for": self._fingerprint(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "losses": list(self.losses),
            "evaluations": [astuple(one) for one in self.evaluations],
            "message": self.message,
            "generator": self._generator.get_state(),
            "ranks": gather(own) if self.ranks.size > 1 else [own],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model, data, recipe, seed and stateful objects."""
        if state["made_for"] != self._fingerprint():
            msg = (
                "the checkpoint was made with another recipe, seed, model, number of samples, "
                "evaluation, number of ranks, or other stateful objects: remove it, or continue "
                "with what it was made with"
            )
            raise TrainingError(msg)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.num_steps, self.message = state["num_steps"], state["message"]
        self.num_skipped, self.losses = state["num_skipped"], list(state["losses"])
        self.evaluations = [Evaluation(*one) for one in state["evaluations"]]
        self._unread.clear()
        self._generator.set_state(state["generator"].cpu())
        own = state["ranks"][self.ranks.rank]
        self._random = [t.cpu() for t in own["random"]]
        for one, kept in zip(self.stateful, own["stateful"], strict=True):
            one.load_state_dict(kept)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint; a run that is killed meanwhile leaves the former one."""
        state, path = self.state_dict(), Path(path)

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            torch.save(state, partial)
            os.replace(partial, path)

        _on_first(self.ranks, write)

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint."""
        try:
            # The first rank's file, not one of this rank's machine.
            content = io.BytesIO(_on_first(self.ranks, Path(path).read_bytes))
            state = torch.load(content, map_location=self.device, weights_only=True)
        except RankFailedError:
            raise
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            msg = (
                f"{path} is no checkpoint that can be read ({type(error).__name__}): remove it "
                "to start anew"
            )
            raise TrainingError(msg) from error
        self.load_state_dict(state)


def _on_first(ranks: Ranks, function: Callable[[], Any]) -> Any:
    """Let the first rank do it, where a training has several."""
    return on_first(function) if ranks.size > 1 else function()


def _checked_ranks(ranks: str | None, recipe: Recipe) -> Ranks:
    if ranks not in ("auto", None):
        msg = f"ranks must be 'auto' or None, got {ranks!r}"
        raise TrainingError(msg)
    here = current() if ranks == "auto" else Ranks()
    if recipe.batch_size % here.size:
        msg = (
            f"batches of {recipe.batch_size} cannot be shared equally by {here.size} ranks: "
            f"choose a batch size that is a multiple of {here.size}, or another number of ranks"
        )
        raise TrainingError(msg)
    return here


def _check(
    inputs: Tensor,
    targets: Tensor,
    recipe: Recipe,
    evaluation: tuple[Tensor, Tensor] | None,
    evaluate_every: int | None,
    sync_every: int,
) -> None:
    if len(inputs) != len(targets) or len(inputs) < recipe.batch_size:
        msg = (
            f"got {len(inputs)} inputs and {len(targets)} targets for batches of "
            f"{recipe.batch_size}: as many of both, and at least one batch, are needed"
        )
        raise TrainingError(msg)
    if evaluation is not None and not len(evaluation[0]) == len(evaluation[1]) > 0:
        msg = (
            f"got {len(evaluation[0])} inputs and {len(evaluation[1])} targets to evaluate on: "
            "as many of both, and at least one, are needed"
        )
        raise TrainingError(msg)
    if sync_every < 1 or (evaluate_every is not None and evaluate_every < 1):
        msg = (
            "sync_every and evaluate_every count steps, so they must be at least 1, got "
            f"{sync_every} and {evaluate_every}"
        )
        raise TrainingError(msg)


def _mixed(seed: int, *purpose: str | int) -> int:
    """A seed of its own for each use, so that no two of them draw the same numbers."""
    return int(fingerprint([seed, *purpose])[:15], 16)
