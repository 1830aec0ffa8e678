"""Everything on one model, within a budget, and ending cleanly whenever it is told to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from conditioning.blocks import Blocks, select_blocks
from conditioning.blocks.record import refuse_lazy
from conditioning.blocks.wrappers import unwrapped
from conditioning.checkup.clock import Clock
from conditioning.checkup.findings import find
from conditioning.checkup.jacobians import read_jacobians
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
    InvalidArgumentError,
    NoTrainableParametersError,
)
from conditioning.operators import GaussNewtonOperator, HessianOperator
from conditioning.operators.batches import Batches, to_device
from conditioning.operators.guards import isolated_randomness
from conditioning.operators.modules import join_names
from conditioning.operators.parameters import select_parameters

_HESSIAN, _JACOBIANS = 0.5, 0.6  # of what is left when it is their turn
_FEWEST = 20  # products with which a spectrum says something
# Passes over the data that an operator's checks and twenty products cost, in forward and backward
# passes like that of the norms.
_LEAST_COST = 60


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
    samples: int = 0

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
        if self.params is not None:
            select_parameters({"": self.model}, self.params)  # a mistake is said before the run

    def run(self) -> Checkup:
        """All stages, the model as in its own mode but without chance.

        Models that compute something else in training mode are given only so much of evaluation
        mode as takes the chance out.
        """
        try:
            return self._run(gently=False)
        except KeyboardInterrupt:
            raise
        except Exception:
            if not self.model.training or hasattr(self, "passes"):
                raise
        return self._run(gently=True)

    def _run(self, *, gently: bool) -> Checkup:
        with steady(self.model, gently=gently) as self.mode:
            # Every pass over shuffled data begins in one random state, so it sees the same batches.
            with isolated_randomness(self.batches.generators()):
                first = to_device(next(iter(self.batches)), self.device)
            self.inputs = first[0] if self.loss_fn is not None else (first,)
            self.first = first
            with self.clock.stage("blocks"):
                self.blocks = self._find_blocks()
            self.passes = run_passes(
                self.model, self.loss_fn, self.batches, self.blocks, self.parameters, self.inputs,
                self.clock,
            )  # fmt: skip
            self.readings = self.passes.blocks
            self.interrupted = self.passes.interrupted
            self.missing += [*self._unseen(), *self.passes.missing]
            stages = {
                "spectrum of the Hessian matrix": self._spectra,
                "layers": self._layers,
                "Jacobians of the blocks": self._jacobians,
                "spectrum of the Gauss-Newton matrix": self._second_spectrum,
            }
            if not self._finite:
                reason = "the loss or its gradient is not finite"
                self.missing += [Missing(what, reason) for what in stages if what != "layers"]
                stages = {"layers": self._layers}
            for what, stage in stages.items():
                if self.interrupted:
                    self.missing.append(Missing(what, "it was interrupted"))
                    continue
                try:
                    stage()
                except KeyboardInterrupt:
                    self.interrupted = True
                    self.missing.append(Missing(what, "it was interrupted"))
                except Exception as error:
                    # What is known already is not lost to one stage that fails.
                    self.missing.append(Missing(what, f"it failed with {error!r}"))
            return self._report(self.passes)

    @property
    def _finite(self) -> bool:
        passes = self.passes
        return math.isfinite(passes.loss.value) and math.isfinite(passes.gradient_norm.value)

    def _unseen(self) -> Iterator[Missing]:
        """What the passes left out."""
        passes = self.passes
        if not passes.complete:
            why = f"the time was enough for {passes.num_batches}: give more seconds"
            yield Missing(
                "norms on the other batches", "it was interrupted" if passes.interrupted else why
            )
        without = [b.name for b in passes.blocks if math.isnan(b.ratio.value)]
        if without and self._finite:
            yield Missing(
                f"ratios of {join_names(without)}",
                "no gradient comes to their input or output: what is before them is frozen, or "
                "they take no part in the loss",
            )

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
        if self.loss_fn is None:
            reason = "it needs loss_fn apart from the model: pass both"
            self.missing.append(Missing("spectrum of the Gauss-Newton matrix", reason))
        else:
            self.gauss_newton = self._spectrum(GaussNewtonOperator, 1.0)

    def _spectrum(self, kind: Any, share: float) -> SpectrumReading | None:
        what = f"spectrum of the {'Hessian' if kind is HessianOperator else 'Gauss-Newton'} matrix"
        needed, left = self.passes.seconds * _LEAST_COST, self.clock.seconds_left()
        if needed > left or self.clock.matvecs_left(share) < _FEWEST:
            # Twenty products would take longer than all that is left: said at once.
            self.clock.reached = True
            reason = self.clock.remedy
            if needed > left:
                reason = (
                    f"twenty products need about {needed:.2g} seconds, the budget has {left:.2g} "
                    f"left: give more seconds, or fewer samples"
                )
            self.missing.append(Missing(what, reason))
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
        if self.blocks is None:
            return
        # What the last matrix has no use for is theirs.
        after = self.passes.seconds * _LEAST_COST
        wanted = self.loss_fn is not None and after <= self.clock.seconds_left(1 - _JACOBIANS)
        found = read_jacobians(
            self.model, self.inputs, self.blocks, self.readings, self.clock,
            num_samples=self.batches.size_or(self.first, 0.0),
            may_cut=not self.mode.couples_samples,
            share=_JACOBIANS if wanted else 1.0,
            pass_seconds=self.passes.seconds / max(self.passes.num_batches, 1), seed=self.seed,
        )  # fmt: skip
        self.readings, self.samples = found.readings, found.samples
        self.missing += found.missing
        self.interrupted |= found.interrupted
        if found.samples:
            self.notes.append(f"Jacobians of blocks on the first {found.samples} samples")

    # -- the result ---------------------------------------------------------------------------

    def _report(self, passes: Passes) -> Checkup:
        status: Completeness = "complete"
        if self.interrupted:
            status = "interrupted"
        elif self.clock.reached:
            status = "out of budget"
        steps = None
        if self.hessian is not None and self.hessian.size < sum(p.numel() for p in self.parameters):
            reason = "the Hessian is that of a part of the parameters: leave out params="
            self.missing.append(Missing("largest stable step", reason))
        elif self.hessian is not None:
            steps = step_size(self.hessian, self.learning_rate, self.momentum)
        same = passes.num_batches == 1 and not self.samples
        report = Checkup(
            self._setting(passes), status, passes.loss, passes.gradient_norm, passes.product,
            passes.mean_deviation, passes.nonfinite, self.readings, passes.activations, self.layers,
            passes.recurrent, self.hessian, self.gauss_newton, steps,
            predictions(self.readings, self.layers, same_samples=same), (), tuple(self.missing),
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
