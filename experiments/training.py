"""One training loop for every experiment: deterministic by seed, resumable, never lost to a NaN.

What is trained, on which samples in which order, and with which random numbers follows from the
model, the data, the :class:`Recipe` and the seed alone. A training that diverges ends with a
result that says so: it is an outcome to report, not an error.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from experiments.errors import ExperimentError
from experiments.store import fingerprint

Loss = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, torch.Generator], Tensor]


class TrainingError(ExperimentError, ValueError):
    """A recipe, data or a checkpoint that no training can be made of."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stochastic gradient descent with a piecewise constant learning rate.

    Parameters
    ----------
    num_steps : int
        Optimizer steps.
    batch_size : int
        Samples in a step. Each epoch visits the samples in a new order, and leaves out the few
        at its end that do not fill a batch.
    lr, momentum, nesterov, weight_decay
        As ``torch.optim.SGD`` takes them.
    milestones : sequence of float
        Shares of ``num_steps`` at which the learning rate is multiplied by ``factor``.
    factor : float
        That factor.
    divergence : float
        A loss above this ends the training as diverged, as one that is not finite always does.
    """

    num_steps: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    divergence: float = math.inf

    def __post_init__(self) -> None:
        """Reject what could not be meant."""
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.num_steps < 0 or self.batch_size < 1:
            msg = (
                "a recipe needs num_steps >= 0 and batch_size >= 1, got "
                f"{self.num_steps} and {self.batch_size}"
            )
            raise TrainingError(msg)
        if not (math.isfinite(self.lr) and self.lr >= 0):
            msg = f"lr must be a finite number >= 0, got {self.lr}"
            raise TrainingError(msg)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        passed = sum(step >= share * self.num_steps for share in self.milestones)
        return self.lr * self.factor**passed


@dataclass(frozen=True)
class Step:
    """What a callback is told after an optimizer step."""

    index: int
    """Counted from 0."""
    epoch: int
    """Counted from 0."""
    loss: float
    """Of the batch, before the step."""
    lr: float


Callback = Callable[["Trainer", Step], None]


class Stateful(Protocol):
    """What can be part of a checkpoint: its state is made of tensors and plain Python values."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state over."""


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    Parameters
    ----------
    status : {"finished", "diverged"}
        A diverged model is left as the last step made it.
    num_steps : int
        Steps done.
    losses : tuple of float
        Of the batches, each before its step. The last one of a diverged training is what ended
        it, unless the parameters themselves stopped being finite.
    message : str
        Where and how a training diverged; empty if it did not.
    """

    status: Literal["finished", "diverged"]
    num_steps: int
    losses: tuple[float, ...]
    message: str = ""


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
        Takes outputs and targets; mean cross-entropy by default.
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
    ) -> None:
        if len(inputs) != len(targets) or len(inputs) < recipe.batch_size:
            msg = (
                f"got {len(inputs)} inputs and {len(targets)} targets for batches of "
                f"{recipe.batch_size}: as many of both, and at least one batch, are needed"
            )
            raise TrainingError(msg)
        self.model, self.recipe, self.loss, self.seed = model, recipe, loss, seed
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.inputs, self.targets = inputs.to(self.device), targets.to(self.device)
        self.transform = transform
        self.callbacks, self.stateful = tuple(callbacks), tuple(stateful)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        self.steps_per_epoch = len(inputs) // recipe.batch_size
        self.num_steps = 0
        self.losses: list[float] = []
        self.message = ""
        self._generator = torch.Generator().manual_seed(_mixed(seed, "transform"))
        self._random: list[Tensor] = []

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
        if checkpoint is not None and Path(checkpoint).exists():
            self.load(checkpoint)
        mode = self.model.training
        self.model.train()
        try:
            with self._global_randomness() as states:
                while self.num_steps < end and not self.message:
                    self._step()
                    if checkpoint is not None and self.num_steps % every == 0:
                        self._random = states()
                        self.save(checkpoint)
                self._random = states()
        finally:
            self.model.train(mode)
        parameters = self.model.parameters()
        if not self.message and not all(bool(torch.isfinite(p).all()) for p in parameters):
            self.message = f"parameters are not finite after step {self.num_steps - 1}"
        status: Literal["finished", "diverged"] = "diverged" if self.message else "finished"
        return TrainingResult(status, self.num_steps, tuple(self.losses), self.message)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Samples of a step before ``transform``: a function of the seed and the step alone."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(_mixed(self.seed, "order", epoch))
        order = torch.randperm(len(self.inputs), generator=generator)
        size = self.recipe.batch_size
        chosen = order[place * size : (place + 1) * size].to(self.device)
        return self.inputs[chosen], self.targets[chosen]

    def _step(self) -> None:
        index = self.num_steps
        inputs, targets = self.batch(index)
        if self.transform is not None:
            inputs = self.transform(inputs, self._generator)
        lr = self.recipe.lr_at(index)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(inputs), targets)
        value = float(loss.detach())
        self.losses.append(value)
        if not math.isfinite(value) or value > self.recipe.divergence:
            self.message = f"loss {value:.3g} at step {index}"
            return
        loss.backward()
        self.optimizer.step()
        self.num_steps += 1
        step = Step(index, index // self.steps_per_epoch, value, lr)
        for callback in self.callbacks:
            callback(self, step)

    @contextlib.contextmanager
    def _global_randomness(self) -> Iterator[Callable[[], list[Tensor]]]:
        """Give torch's global generators this training's states, and the caller's back after."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            if self._random:
                torch.set_rng_state(self._random[0])
                for one, state in zip(cuda, self._random[1:], strict=True):
                    torch.cuda.set_rng_state(state, one)
            else:
                # torch.manual_seed would reseed every GPU, and only this one is put back.
                torch.default_generator.manual_seed(_mixed(self.seed, "model"))
                for one in cuda:
                    with torch.cuda.device(one):
                        torch.cuda.manual_seed(_mixed(self.seed, "model"))
            yield lambda: [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]

    # -- checkpoints ----------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        shapes = [(name, tuple(p.shape)) for name, p in self.model.named_parameters()]
        kept = [type(one).__name__ for one in self.stateful]
        recipe = sorted(asdict(self.recipe).items())
        return repr((recipe, self.seed, tuple(self.inputs.shape), shapes, kept))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued training needs to be the same to the last bit."""
        return {
            "made_for": self._fingerprint(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_steps": self.num_steps,
            "losses": list(self.losses),
            "message": self.message,
            "generator": self._generator.get_state(),
            "random": self._random,
            "stateful": [one.state_dict() for one in self.stateful],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model, data, recipe, seed and stateful objects."""
        if state["made_for"] != self._fingerprint():
            msg = (
                "the checkpoint was made with another recipe, seed, model, number of samples, or "
                "other stateful objects: remove it, or continue with what it was made with"
            )
            raise TrainingError(msg)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_steps, self.message = state["num_steps"], state["message"]
        self.losses = list(state["losses"])
        self._generator.set_state(state["generator"].cpu())
        self._random = [t.cpu() for t in state["random"]]
        for one, kept in zip(self.stateful, state["stateful"], strict=True):
            one.load_state_dict(kept)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint; a run that is killed meanwhile leaves the former one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        torch.save(self.state_dict(), partial)
        os.replace(partial, path)

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            msg = (
                f"{path} is no checkpoint that can be read ({type(error).__name__}): remove it "
                "to start anew"
            )
            raise TrainingError(msg) from error
        self.load_state_dict(state)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = nn.functional.cross_entropy,
    batch_size: int = 512,
) -> tuple[float, float]:
    """Mean loss and share of right answers, in evaluation mode, which is left as it was.

    ``loss`` is a mean over the samples of a batch.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mode = model.training
    model.eval()
    try:
        total, right = 0.0, 0
        for first in range(0, len(inputs), batch_size):
            x = inputs[first : first + batch_size].to(device)
            y = targets[first : first + batch_size].to(device)
            outputs = model(x)
            total += float(loss(outputs, y)) * len(x)
            right += int((outputs.argmax(1) == y).sum())
    finally:
        model.train(mode)
    return total / len(inputs), right / len(inputs)


def _mixed(seed: int, *purpose: str | int) -> int:
    """A seed of its own for each use, so that no two of them draw the same numbers."""
    return int(fingerprint([seed, *purpose])[:15], 16)
