"""Everything on one model, within a budget, and ending cleanly whenever it is told to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.blocks import Block, Blocks, block_jacobians, select_blocks
from conditioning.blocks.record import refuse_lazy
from conditioning.blocks.wrappers import unwrapped
from conditioning.checkup.clock import Clock
from conditioning.checkup.findings import find
from conditioning.checkup.layers import read_layers
from conditioning.checkup.passes import Passes, run_passes
from conditioning.checkup.predictions import predictions
from conditioning.checkup.readings import (
    BlockReading,
    LayerReading,
    Missing,
    Setting,
    SpectrumReading,
)
from conditioning.checkup.results import Checkup, Completeness
from conditioning.checkup.spectra import read_spectrum, step_size
from conditioning.checkup.steady import steady
from conditioning.errors import (
    BlockSelectionError,
    ConditioningError,
    InvalidArgumentError,
    NoTrainableParametersError,
)
from conditioning.operators import GaussNewtonOperator, HessianOperator
from conditioning.operators.batches import Batches, map_tensors, to_device
from conditioning.operators.guards import isolated_randomness

_HESSIAN, _JACOBIANS = 0.5, 0.6  # of what is left when it is their turn
_JACOBIAN_MATVECS = 200  # for each block
# Passes over the data that an operator's checks and twenty products cost, in forward and backward
# passes like that of the norms.
_LEAST_COST = 60
_ENTRIES = 40_000  # of a stream: Jacobians are taken on as few samples as this needs


def checkup(
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    *,
    blocks: Any = None,
    params: Any = None,
    learning_rate: float | None = None,
    momentum: float = 0.0,
    seconds: float | None = 60.0,
    num_matvecs: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Checkup:
    """Where a network loses the norm, and how badly its loss is conditioned: all on one page.

    Parameters
    ----------
    model : nn.Module
        In the mode in which it is of interest. In training mode batch normalisation uses the
        statistics of each batch, and dropout is off, since a Hessian needs a loss without chance;
        in evaluation mode it runs as it is. Mode, buffers, ``.grad`` and random state are left as
        they were.
    loss_fn : callable or None
        ``loss_fn(outputs, targets)`` returns the mean over the batch; ``None`` if the model,
        called with a whole batch, returns the loss.
    data : tuple, or re-iterable of batches
        One batch ``(inputs, targets)``, or a list or ``DataLoader`` of them, as for
        :class:`HessianOperator`. A few hundred samples are enough for most of what is found.
    blocks : optional
        As :func:`select_blocks` takes them. Default: what :func:`find_blocks` finds.
    params : optional
        Parameters of the Hessian, as :class:`HessianOperator` takes them.
    learning_rate : float, optional
        The one that is used, of plain gradient descent or SGD: it is set against the largest
        stable one. It says nothing for Adam and its relatives, which rescale the gradient.
    momentum : float
        Heavy-ball momentum that goes with it.
    seconds : float or None
        The budget; ``None`` for no limit. Norms are measured on the first batch at any rate; a
        matrix of which not even twenty products fit is left out, and ``missing`` says what it
        would take.
    num_matvecs : int, optional
        Products at most, with Hessian, Gauss-Newton matrix and Jacobians together. With
        ``seconds=None`` and this the result does not depend on how fast the machine is.
    seed : int
        Of the random vectors.
    progress : bool
        Show bars on a terminal.

    Returns
    -------
    Checkup
        ``print`` it, or ``save`` it as ``.html``, ``.json`` or ``.txt``. Its ``findings`` are in
        order of weight; ``missing`` lists what could not be measured or certified, and why.

    Raises
    ------
    InvalidArgumentError
        If the model is no module, or an option is out of range.
    NoTrainableParametersError
        If no parameter requires a gradient.
    BatchFormatError, EmptyDataError, OneShotDataError
        If the data are not of the right form.
    BlockSelectionError
        If ``blocks`` is given and matches nothing, or the model is lazy and did not run yet.
    LossWithoutGraphError, NonScalarLossError
        If the loss is not one number that depends on the parameters.

    Notes
    -----
    Ctrl-C after the first batch ends it with what is known so far: ``status`` is then
    ``interrupted``. A loss that is not finite is no error here: the checkup says where NaN or an
    infinity came up first.

    Norms are measured on all batches (as the time allows), block by block in one forward and one
    backward pass each. Jacobians of blocks are those on the first batch, on as few of its samples
    as keep them small unless normalisation couples the samples.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 3)).double()
    >>> batch = torch.randn(32, 8).double(), torch.randint(3, (32,))
    >>> report = checkup(model, nn.CrossEntropyLoss(), batch, num_matvecs=500, seconds=None)
    >>> report.status, len(report.blocks)
    ('complete', 4)
    """
    return _Examination(
        model, loss_fn, data, blocks, params, learning_rate, momentum,
        Clock(seconds, num_matvecs, progress=progress), seconds, num_matvecs, seed,
    ).run()  # fmt: skip


@dataclass
class _Examination:
    """The stages of one checkup, and what they have found so far."""

    model: nn.Module
    loss_fn: Any
    data: Any
    wanted: Any
    params: Any
    learning_rate: float | None
    momentum: float
    clock: Clock
    seconds: float | None
    num_matvecs: int | None
    seed: int
    layers: tuple[LayerReading, ...] = ()
    readings: tuple[BlockReading, ...] = ()
    hessian: SpectrumReading | None = None
    gauss_newton: SpectrumReading | None = None
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            msg = (
                f"model must be an nn.Module, got {type(self.model).__name__}: blocks and layers "
                f"are found in its modules."
            )
            raise InvalidArgumentError(msg)
        inner = unwrapped(self.model)
        if inner is not self.model:
            self.notes.append(f"without the {type(self.model).__name__} around it")
            self.model = inner
        refuse_lazy(self.model)
        rate = self.learning_rate
        if rate is not None and not (_is_real(rate) and 0 < rate < math.inf):
            msg = f"learning_rate must be a finite number above 0, or None, got {rate!r}."
            raise InvalidArgumentError(msg)
        if not (_is_real(self.momentum) and 0 <= self.momentum < 1):
            msg = f"momentum must lie in [0, 1), got {self.momentum!r}."
            raise InvalidArgumentError(msg)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            msg = f"seed must be an integer, got {self.seed!r}."
            raise InvalidArgumentError(msg)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            msg = "No parameter of the model requires a gradient: call requires_grad_(True)."
            raise NoTrainableParametersError(msg)
        self.device = self.parameters[0].device
        self.batches = Batches(self.data, paired=self.loss_fn is not None)

    def run(self) -> Checkup:
        with steady(self.model) as self.mode:
            # Every pass over shuffled data begins in one random state, so it sees the same batches.
            with isolated_randomness(self.batches.generators()):
                first = to_device(next(iter(self.batches)), self.device)
            self.inputs = first[0] if self.loss_fn is not None else (first,)
            self.first = first
            self.blocks = self._find_blocks()
            self.passes = run_passes(
                self.model,
                self.loss_fn,
                self.batches,
                self.blocks,
                self.parameters,
                self.inputs,
                self.clock,
            )
            self.readings = self.passes.blocks
            self.interrupted = self.passes.interrupted
            if not self.passes.complete:
                self.missing.append(
                    Missing(
                        "norms on the other batches",
                        f"the time was enough for {self.passes.num_batches}: give more seconds"
                        if not self.interrupted
                        else "it was interrupted",
                    )
                )
            finite = math.isfinite(self.passes.loss.value) and math.isfinite(
                self.passes.gradient_norm.value
            )
            stages = [self._spectra, self._layers, self._jacobians, self._second_spectrum]
            if not finite:
                stages = [self._layers]
                reason = "the loss or its gradient is not finite"
                self.missing += [
                    Missing(what, reason) for what in ("spectra", "Jacobians of the blocks")
                ]
            for stage in stages:
                if self.interrupted:
                    self._skip(stage.__name__)
                    continue
                try:
                    stage()
                except KeyboardInterrupt:
                    self.interrupted = True
                    self._skip(stage.__name__)
            return self._report(self.passes)

    # -- stages -------------------------------------------------------------------------------

    def _find_blocks(self) -> Blocks | None:
        try:
            return select_blocks(self.model, self.wanted, self.inputs)
        except BlockSelectionError as error:
            if self.wanted is not None:
                raise
            self.missing.append(Missing("norms block by block", str(error)))
            return None

    def _spectra(self) -> None:
        self.hessian = self._spectrum(HessianOperator, _HESSIAN)

    def _second_spectrum(self) -> None:
        if self.clock.is_out:
            self.clock.reached = True
            self._skip("_second_spectrum", "the budget ended before: give more seconds")
        elif self.loss_fn is None:
            self._skip("_second_spectrum", "it needs loss_fn apart from the model: pass both")
        else:
            self.gauss_newton = self._spectrum(GaussNewtonOperator, 1.0)

    def _spectrum(self, kind: Any, share: float) -> SpectrumReading | None:
        needed = self.passes.seconds * _LEAST_COST
        if needed > max(self.clock.seconds_left(), 0.0):
            # Twenty products would take longer than all that is left: said at once.
            self.clock.reached = True
            name = "Hessian" if kind is HessianOperator else "Gauss-Newton"
            reason = (
                f"twenty products need about {needed:.0f} seconds, the budget has "
                f"{self.clock.seconds_left():.0f} left: give more seconds, or fewer samples"
            )
            self.missing.append(Missing(f"spectrum of the {name} matrix", reason))
            return None
        found = read_spectrum(
            kind, (self.model, self.loss_fn, self.data), {"params": self.params}, self.clock,
            share, self.seed,
        )  # fmt: skip
        self.missing += found.missing
        self.notes += [note for note in found.notes if note not in self.notes]
        self.interrupted |= found.interrupted
        return found.reading

    def _layers(self) -> None:
        self.layers, missing = read_layers(self.model, self.inputs, self.passes.layers, self.clock)
        self.missing += missing

    def _jacobians(self) -> None:
        """One block after the other, in an order that covers the depth early."""
        if self.blocks is None:
            return
        inputs, samples = self._few_samples()
        known = {block.label: block for block in self.blocks}
        names = list(dict.fromkeys(reading.name.split("#")[0] for reading in self.readings))
        order = [names[i] for i in spread(len(names))]
        order.sort(key=lambda name: known[name].kind != "transition")
        end, left = self.clock.deadline(_JACOBIANS), []
        products = self.clock.matvecs_left(_JACOBIANS)
        with self.clock.stage("Jacobians", total=len(order), unit=" blocks") as bar:
            for done, name in enumerate(order):
                if self.interrupted or end() or products < 20:
                    left.append(name)
                    continue
                calls = sum(r.name.split("#")[0] == name for r in self.readings)
                fair = products // ((len(order) - done) * calls)
                allowed = min(_JACOBIAN_MATVECS, max(fair, 20))
                try:
                    products -= self._one_jacobian(inputs, known[name], allowed)
                except KeyboardInterrupt:
                    self.interrupted = True
                    left.append(name)
                bar.update()
        if samples:
            self.notes.append(f"Jacobians of blocks on the first {samples} samples")
        if left:
            why = "it was interrupted" if self.interrupted else "the budget ended before"
            self.missing.append(
                Missing(
                    f"Jacobians of {len(left)} of {len(order)} blocks", f"{why}: give more seconds"
                )
            )

    def _one_jacobian(self, inputs: Any, block: Block, allowed: int) -> int:
        name = block.label
        try:
            found = block_jacobians(
                self.model, inputs, Blocks([block]), max_matvecs=allowed,
                seed=self.seed, progress=False,
            )  # fmt: skip
        except ConditioningError as error:
            self.missing.append(Missing(f"Jacobian of {name}", str(error)))
            return 0
        by_call = {name + (f"#{j.call}" if j.call else ""): j for j in found}
        self.readings = tuple(
            replace(reading, jacobian=by_call[reading.name]) if reading.name in by_call else reading
            for reading in self.readings
        )
        self.clock.num_matvecs += found.num_matvecs
        return found.num_matvecs

    def _few_samples(self) -> tuple[Any, int]:
        """The inputs of the first samples, as many as keep the widest stream small."""
        assert self.blocks is not None
        size = self.batches.size_or(self.first, 0.0)
        widest = max(
            (math.prod(s) for b in self.blocks for s in (b.input_shape, b.output_shape) if s),
            default=0,
        )
        if self.mode.couples_samples or size < 2 or widest <= _ENTRIES:
            return self.inputs, 0
        count = max(int(size * _ENTRIES / widest), 1)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:count] if tensor.ndim and len(tensor) == size else tensor

        return map_tensors(cut, self.inputs), count

    def _skip(self, stage: str, reason: str = "it was interrupted") -> None:
        what = {
            "_spectra": "spectrum of the Hessian matrix",
            "_second_spectrum": "spectrum of the Gauss-Newton matrix",
            "_layers": "layers",
            "_jacobians": "Jacobians of the blocks",
        }[stage]
        self.missing.append(Missing(what, reason))

    # -- the result ---------------------------------------------------------------------------

    def _report(self, passes: Passes) -> Checkup:
        status: Completeness = "complete"
        if self.interrupted:
            status = "interrupted"
        elif self.clock.reached:
            status = "out of budget"
        steps = None
        if self.hessian is not None:
            steps = step_size(self.hessian, self.learning_rate, self.momentum)
        report = Checkup(
            self._setting(passes), status, passes.loss, passes.gradient_norm, passes.product,
            passes.mean_deviation, passes.nonfinite, self.readings, passes.activations, self.layers,
            passes.recurrent, self.hessian, self.gauss_newton, steps,
            predictions(self.readings, self.layers), (), tuple(self.missing),
            {**self.clock.spent, "total": self.clock.elapsed}, self.clock.num_matvecs,
        )  # fmt: skip
        return replace(report, findings=find(report))

    def _setting(self, passes: Passes) -> Setting:
        import conditioning

        everything = list(self.model.parameters())
        dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in everything)
        return Setting(
            type(self.model).__name__, _name_of(self.loss_fn), sum(p.numel() for p in everything),
            sum(p.numel() for p in self.parameters), ", ".join(dtypes), str(self.device),
            passes.num_batches, passes.num_samples, self.mode.name, self.seed, self.seconds,
            self.num_matvecs, conditioning.__version__, str(torch.__version__),
            (*self.mode.notes, *self.notes, *passes.notes),
        )  # fmt: skip


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name_of(loss_fn: Any) -> str:
    if loss_fn is None:
        return "returned by the model"
    return str(getattr(loss_fn, "__name__", type(loss_fn).__name__))


def spread(count: int) -> Iterator[int]:
    """0 ... count - 1 in an order of which every beginning covers the range: ends, then middles."""
    seen: set[int] = set()
    step = max(count - 1, 1)
    while len(seen) < count:
        for place in range(0, count, max(step, 1)):
            if place not in seen:
                seen.add(place)
                yield place
        if step == 1:
            break
        step = max(step // 2, 1)
