"""``GradientNorms``: norms of gradients and activations, block by block, while a model trains."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from conditioning.blocks import Blocks, select_blocks
from conditioning.distributed import is_parallel
from conditioning.errors import (
    BlockNotSeenWarning,
    HooksNotFiredError,
    InvalidArgumentError,
    NoBackwardError,
    NonFiniteGradientWarning,
    TrackerActiveError,
)
from conditioning.norms import history
from conditioning.norms.history import BlockLabel, NonFinite, NormVerdict, Point, StepRecord
from conditioning.norms.nesting import ancestors, containers
from conditioning.norms.printing import step_table
from conditioning.norms.readings import Wanted
from conditioning.norms.reasons import (
    folded_message,
    is_compiled,
    why_no_gradient,
    why_nothing_fired,
    why_unseen,
)
from conditioning.norms.recorder import Recorder, Slot, weakly
from conditioning.norms.steps import has_gradient, measure
from conditioning.operators.modules import join_names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from torch.utils.hooks import RemovableHandle


class GradientNorms:
    r"""Track gradient and activation norms at the borders of blocks of any module.

    The ratio of a block is :math:`\|\partial E / \partial x_l\| / \|\partial E / \partial
    x_{l+1}\|`, the gradient norm at its input over the one at its output: 1 where the block
    preserves the norm, below 1 where the gradient shrinks on its way back.

    Parameters
    ----------
    model : nn.Module
        Its code is not touched. Wrapped in ``DistributedDataParallel``, fully sharded or compiled
        is fine, compiled only if tracking begins before the first forward pass.
    blocks : optional
        What to track: names, globs, modules, or what :func:`find_blocks` returns. Default: the
        blocks that :func:`find_blocks` finds.
    activations : bool
        Also track norms of activations.
    every : int
        Sample each ``every``-th step, from step 0. Between samples a hook costs a function call.
    statistic : {"batch", "sample"}
        ``batch``: Frobenius norms over the whole batch. ``sample``: also mean, standard
        deviation, least and largest over samples of each norm and of the ratio.
    batch_dim : int
        The axis of the samples, for ``statistic="sample"``.
    shares : bool
        Also the share of entries that are zero, and that are not finite.
    tensors : {"first", "all"}
        What counts where a block takes or returns several tensors: the residual stream, that
        is the one that :func:`find_blocks` measured with ``inputs``, else the first that needs a
        gradient; or all of them together.
    scaler : GradScaler, optional
        Gradient norms are divided by its scale. Ratios need no scaler.
    inputs : optional
        A sample batch for :func:`find_blocks`: tensor, tuple or dict. It is run once, without
        gradients, and tells identity skips from transitions.
    keep : int, optional
        Forget all but so many of the last sampled steps. A step takes about 70 bytes a block.
    process_group : "auto", ProcessGroup or None
        Ranks to combine, so that each has the norms over the whole batch: ``"auto"`` combines
        all ranks if the model is wrapped in DDP or fully sharded; then every rank must track.
        ``None`` keeps each rank to itself.

    Raises
    ------
    BlockSelectionError
        If ``blocks`` match nothing, or none can be found.
    InvalidArgumentError
        If an option is out of range.

    Warns
    -----
    NonFiniteGradientWarning
        Once, when a norm is not finite: says in which block first. Not with a ``scaler``, for
        which overflows are routine.
    BlockNotSeenWarning
        After the first step, for blocks that took no part in it; and when a thousand forward
        passes were recorded but no step has ended.

    Notes
    -----
    A step ends when an optimizer that owns a parameter of a tracked block has stepped (of the
    model, if all tracked blocks are frozen), or when :meth:`step` is called. Everything recorded
    in between belongs to it: several forward passes (gradient accumulation), shared blocks, and
    second backward passes are calls 0, 1, ... of a block. In a GAN put the generator's step, whose
    gradients pass through the discriminator, under :meth:`pause` of the discriminator's tracker.
    Norms stay on the device until the step ends; then there is one transfer.

    With a ``scaler``, a step that the optimizer skips because of an overflow is told from
    gradient accumulation by the scale, which falls.

    The gradient at the input of a block is the gradient of the loss by that tensor, through all
    its uses. In a chain of blocks that is what comes back through the block; a tensor that is used
    again elsewhere (the long skips of a U-Net) receives both.

    Hessian-vector products of this package are not recorded. Around others use :meth:`pause`: each
    backward pass through a recorded graph counts as a call.

    Layers between tracked blocks change the gradient too: printing a tracker names such gaps. One
    thread at a time may run the model. Compiled models are
    cut into graphs at the borders of blocks (``fullgraph=True`` is not possible).

    Copies and pickles of the model carry no hooks of the tracker that do anything.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with GradientNorms(model, ["1", "2"]) as norms:
    ...     for _ in range(5):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(8, 4)).square().mean().backward()
    ...         optimizer.step()
    >>> norms.ratios().shape    # steps, blocks
    (5, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Any = None,
        *,
        activations: bool = True,
        every: int = 1,
        statistic: Literal["batch", "sample"] = "batch",
        batch_dim: int = 0,
        shares: bool = False,
        tensors: Literal["first", "all"] = "first",
        scaler: Any = None,
        inputs: Any = None,
        keep: int | None = None,
        process_group: Any = "auto",
    ) -> None:
        if not isinstance(every, int) or every < 1:
            msg = f"every must be a positive integer, got {every!r}."
            raise InvalidArgumentError(msg)
        if keep is not None and (not isinstance(keep, int) or keep < 1):
            msg = f"keep must be a positive integer or None, got {keep!r}."
            raise InvalidArgumentError(msg)
        for name, value, known in (
            ("statistic", statistic, ("batch", "sample")),
            ("tensors", tensors, ("first", "all")),
        ):
            if value not in known:
                msg = f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}."
                raise InvalidArgumentError(msg)
        self._model = model
        self.blocks: Blocks = select_blocks(model, blocks, inputs)
        self._every = every
        self._scaler = scaler
        self._keep = keep
        self._group = process_group
        self._containers = containers(self.blocks)
        self._recorder = Recorder(
            self.blocks,
            ancestors(model, self.blocks),
            Wanted(statistic == "sample", batch_dim, shares),
            activations=activations,
            every_tensor=tensors == "all",
            scaler=scaler,
        )
        self._optimizer_handle: RemovableHandle | None = None
        self._owned: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = (
            weakref.WeakKeyDictionary()
        )
        self._records: list[StepRecord] = []
        self._shapes: dict[int, Any] = {}
        self._idle: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._warned: set[str] = set()
        self.num_steps = 0

    # -- life -----------------------------------------------------------------------------------

    def attach(self) -> GradientNorms:
        """Begin to track; the same as entering the context. Tracking may be resumed later.

        Raises
        ------
        TrackerActiveError
            If it is tracking already.
        """
        if self._optimizer_handle is not None:
            msg = (
                "This tracker is running already. End its `with` block (or call detach()) before "
                "it is started again, or make a second GradientNorms."
            )
            raise TrackerActiveError(msg)
        self._recorder.clear()
        self._recorder.attach()
        self._recorder.listening = self.num_steps % self._every == 0
        handle = register_optimizer_step_post_hook(weakly(self._after_optimizer))
        self._optimizer_handle = handle
        # A tracker that is dropped, as by running a notebook cell again, stops by itself.
        self._finalizer = weakref.finalize(self, _stop, handle, self._recorder)
        return self

    def detach(self) -> None:
        """Stop tracking and remove every hook; what was recorded stays."""
        if self._optimizer_handle is not None:
            self._finalizer()
            self._optimizer_handle = None

    def __enter__(self) -> GradientNorms:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            pending = any(has_gradient(slot) for slot in self._recorder.slots)
            if kind is None and (pending or not self.num_steps):
                folded = len({slot.pass_id for slot in self._recorder.slots})
                alone = not self.num_steps
                self.step()
                if alone and folded > 1:
                    self._warn_once("folded", folded_message(folded), BlockNotSeenWarning)
        finally:
            self.detach()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing meanwhile: for evaluations, and backward passes that are not training."""
        self._recorder.paused += 1
        try:
            yield
        finally:
            self._recorder.paused -= 1

    # -- steps ----------------------------------------------------------------------------------

    def step(self) -> None:
        """End a step. Only needed where no ``torch.optim.Optimizer`` steps.

        Raises
        ------
        HooksNotFiredError
            If no tracked block ran.
        NoBackwardError
            If no gradient came back to any of them.
        """
        if not self._recorder.seen:
            raise HooksNotFiredError(why_nothing_fired(self._model, self.blocks.names))
        self._close()

    def _after_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._owns(optimizer):
            return
        if self._recorder.seen:
            self._idle.clear()
            self._close()
            return
        # A second optimizer of the same step sees nothing either: only one that comes again
        # tells that the hooks do not run.
        if optimizer in self._idle or (not self.num_steps and is_compiled(self._model)):
            raise HooksNotFiredError(why_nothing_fired(self._model, self.blocks.names))
        self._idle.add(optimizer)

    def _owns(self, optimizer: Optimizer) -> bool:
        """Whether it moves the tracked blocks, or other parts if those are frozen."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        # Groups may be added later, when layers are unfrozen.
        known = self._owned.get(optimizer)
        if known is None or known[0] != len(held):
            tracked = [p for b in self.blocks for part in b.parts for p in part.parameters()]
            frozen = not any(p.requires_grad for p in tracked)
            mine = {id(p) for p in (self._model.parameters() if frozen else tracked)}
            known = self._owned[optimizer] = (len(held), any(id(p) in mine for p in held))
        return known[1]

    def _close(self) -> None:
        recorder = self._recorder
        slots, scales, listening = recorder.slots, dict(recorder.scales), recorder.listening
        if not listening:
            recorder.clear()
            self._advance(1)
            return
        # Every rank measures, also one without gradients: the others would wait for it.
        steps, wide = measure(slots, scales, recorder.outer, self._resolved_group())
        recorder.wide |= wide
        recorder.clear()
        if not steps:
            raise NoBackwardError(why_no_gradient(slots))
        self._shapes = dict(recorder.shapes)
        for offset, calls in enumerate(steps):
            self._records.append(StepRecord.pack(self.num_steps + offset, calls))
        if self._keep is not None:
            del self._records[: -self._keep]
        self._advance(len(steps))
        self._warn(slots)

    def _advance(self, count: int) -> None:
        self.num_steps += count
        self._recorder.listening = self.num_steps % self._every == 0

    def _resolved_group(self) -> Any:
        if self._group != "auto":
            return self._group
        if not (self._recorder.inside_ddp or is_parallel(self._model)):
            return None
        return torch.distributed.group.WORLD

    def _warn(self, slots: list[Slot]) -> None:
        seen = {call.block for call in self._records[-1].calls}
        unseen = [index for index in range(len(self.blocks)) if index not in seen]
        if unseen and "unseen" not in self._warned:
            ran = {slot.block for slot in slots}
            never = [self.blocks[index].label for index in unseen if index not in ran]
            if never and is_compiled(self._model):
                raise HooksNotFiredError(why_nothing_fired(self._model, never))
            names = {index: self.blocks[index].label for index in unseen}
            self._warn_once("unseen", why_unseen(names, slots), BlockNotSeenWarning)
        if self._scaler is None and "nonfinite" not in self._warned:
            found = history.first_nonfinite(self._records[-1:], self._labels())
            if found is not None:
                self._warn_once("nonfinite", f"{found.message[0].upper()}{found.message[1:]}.",
                                NonFiniteGradientWarning)  # fmt: skip

    def _warn_once(self, key: str, message: str, category: type[Warning]) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, category, stacklevel=2)

    # -- what was recorded ----------------------------------------------------------------------

    def _labels(self) -> list[BlockLabel]:
        labels = []
        for index, block in enumerate(self.blocks):
            kind, shapes = block.kind, self._shapes.get(index)
            # A single layer that changes the width is no transition between residual blocks.
            composite = next(block.module.children(), None) is not None
            if kind == "unknown" and composite and shapes and shapes[1] and shapes[0] != shapes[1]:
                kind = "transition"
            labels.append(BlockLabel(block.label, kind, self._containers[index]))
        return labels

    def _recorded(self) -> list[StepRecord]:
        if not self._records:
            msg = (
                "Nothing was recorded yet: no step has ended. A step ends when an optimizer that "
                "owns a parameter of the model steps, or when norms.step() is called."
            )
            raise NoBackwardError(msg)
        return self._records

    def to_frame(self) -> pd.DataFrame:
        """Everything, one number in a row.

        Returns
        -------
        DataFrame
            Columns ``step``, ``block``, ``call``, ``quantity``, ``value``, ``kind`` (of the
            block) and ``depth`` (place of the block in the order of execution). Quantities are
            ``grad_in``, ``grad_out``, ``act_in``, ``act_out``, ``ratio``, and ``product``: the
            gradient norm at the block's input over that at the output of the last block, in one
            pass, among blocks that are nested equally deep. In a chain without gaps it is the
            product of the ratios from there to the end; layers between the blocks count.
        """
        return history.tidy_frame(self._records, self._labels())

    def ratios(self) -> pd.DataFrame:
        """Ratios, a row for each sampled step and a column for each block in order.

        Several forward passes of a step are combined; a block that is called several times in
        one pass has the columns ``block``, ``block#1``, ...
        """
        return history.ratio_frame(self._records, self._labels())

    def points(self, step: int | None = None) -> list[Point]:
        """One step block by block, combined as in :meth:`ratios`; the last step by default."""
        records = self._recorded()
        if step is None:
            return history.points(records[-1], self._labels())
        found = next((record for record in records if record.step == step), None)
        if found is None:
            known = join_names([str(record.step) for record in records])
            msg = f"Step {step} was not sampled; these were: {known}."
            raise InvalidArgumentError(msg)
        return history.points(found, self._labels())

    def scalars(self, prefix: str = "norms/") -> dict[str, float]:
        """The last sampled step as a flat dict, for any logger; empty before there is one.

        Keys are ``norms/ratio/BLOCK`` and so on, and ``norms/ratio_min``, ``norms/ratio_max``,
        ``norms/mean_deviation`` (mean of ``|1 - ratio|``), ``norms/product``.
        """
        if not self._records:
            return {}  # a logger is not worth a run
        return history.scalars(self._records[-1], self._labels(), prefix)

    def first_nonfinite(self) -> NonFinite | None:
        """Where NaN or an infinity came up first, or None if everything was finite."""
        return history.first_nonfinite(self._records, self._labels())

    def verdict(self, bound: float | tuple[float, float]) -> NormVerdict:
        """Whether all recorded ratios lie within ``[1 - bound, 1 + bound]``, or a pair of ends.

        The bound of the theory for a network of L blocks is ``c log(2L) / L``, see
        :func:`conditioning.theory.depth_rate`.
        """
        return history.judge(self._recorded(), self._labels(), bound)

    def plot(self, kind: Literal["ratio", "heatmap"] = "ratio", ax: Axes | None = None) -> Axes:
        """Draw the ratios: ``"ratio"`` against depth, a curve for each snapshot; ``"heatmap"``
        against depth and step. Transition blocks are marked.
        """  # noqa: D205
        from conditioning import plots

        if kind not in ("ratio", "heatmap"):
            msg = f"kind must be 'ratio' or 'heatmap', got {kind!r}."
            raise InvalidArgumentError(msg)
        self._recorded()
        frame = self.ratios()
        found = {p.name: p.kind for r in self._records for p in history.points(r, self._labels())}
        transitions = [name for name, what in found.items() if what == "transition"]
        draw = plots.plot_ratios if kind == "ratio" else plots.plot_ratio_heatmap
        return draw(frame, ax, transitions=transitions)

    def __str__(self) -> str:
        if not self._records:
            return f"{len(self.blocks)} blocks, nothing recorded yet\n{self.blocks}"
        return step_table(self._records, self._labels())

    # -- resuming -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, as plain Python, for a checkpoint."""
        return {
            "num_steps": self.num_steps,
            "blocks": list(self.blocks.names),
            "records": [record.state() for record in self._records],
            "shapes": {i: [list(s) for s in shapes] for i, shapes in self._shapes.items()},
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises
        ------
        InvalidArgumentError
            If it belongs to other blocks.
        """
        if list(state["blocks"]) != list(self.blocks.names):
            msg = (
                f"The state is of the blocks {join_names(list(state['blocks']))}, this tracker "
                f"has {join_names(list(self.blocks.names))}."
            )
            raise InvalidArgumentError(msg)
        self._records = [StepRecord.from_state(record) for record in state["records"]]
        self._shapes = {
            int(i): tuple(torch.Size(s) for s in shapes) for i, shapes in state["shapes"].items()
        }
        self._warned = set(state["warned"])
        self.num_steps = state["num_steps"]
        self._recorder.clear()
        self._recorder.listening = self.num_steps % self._every == 0


def _stop(handle: RemovableHandle, recorder: Recorder) -> None:
    handle.remove()
    recorder.detach()
