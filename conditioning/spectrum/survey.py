"""Everything that one set of Lanczos runs knows about a spectrum, within one budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from conditioning.jacobi import Array
from conditioning.krylov import LanczosRun, make_generator, start_for
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.bounds import Options
from conditioning.spectrum.certify import certify, is_enclosed, is_exhausted, needed_of
from conditioning.spectrum.common import check_at_least, check_counts, square
from conditioning.spectrum.density import trace
from conditioning.spectrum.full import NAN, full_spectrum, zero_operator
from conditioning.spectrum.measure import Probe, SpectralMeasure, inverse_weight
from conditioning.spectrum.percentile import over_percentile
from conditioning.spectrum.results import ConditionNumber, Estimate, Result, Status

_CHUNK = 10  # steps between two looks at the clock
_PROBE_STEPS = 80  # resolution of the density, and of the ends to a hundredth or better
_FEWEST_STEPS = 10
_WIDE = 60  # products with which a second run is worth its place
_TRACE_PROBES = 32
_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class SpectrumSurvey(Result):
    """The ends, both condition numbers, density, trace and index of one symmetric operator.

    Attributes
    ----------
    size : int
        ``n``.
    largest, smallest : Estimate
        The algebraically largest and smallest eigenvalue: certain on the inner side, with the
        failure probability on the outer one.
    condition : ConditionNumber
    condition10 : ConditionNumber
        With ``percentile=10``.
    index : Estimate
        Share of negative eigenvalues.
    trace : Estimate
        Hutchinson's estimate, with a 95 % Student interval, asymptotic; NaN where the budget has
        no room for it.
    nodes, weights : ndarray of shape (m,)
        Of the density: quadrature nodes, ascending, and their shares.
    quantiles : dict of float to Estimate
        Of the eigenvalues.
    num_matvecs, num_probes : int
        ``num_probes`` is 0 where all eigenvalues are known.
    stopped, interrupted : bool
        Whether it was told to end before it was done; by Ctrl-C.
    message : str
    """

    size: int
    largest: Estimate
    smallest: Estimate
    condition: ConditionNumber
    condition10: ConditionNumber
    index: Estimate
    trace: Estimate
    nodes: Array
    weights: Array
    quantiles: dict[float, Estimate]
    num_matvecs: int
    num_probes: int
    stopped: bool
    interrupted: bool
    message: str


def survey(
    operator: Any,
    max_matvecs: int = 1000,
    *,
    dense: bool | None = None,
    num_probes: int = 6,
    zero_rtol: float = 1e-10,
    failure_probability: float = 1e-6,
    seed: int | torch.Generator = 0,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int], object] | None = None,
) -> SpectrumSurvey:
    """Ends, condition numbers, density, trace and index from the same products.

    One Lanczos run goes on until the condition number is enclosed or its share of the budget is
    spent; it is also the first of the probes that give density, percentile, trace and index, so
    that nothing is computed twice. With ``n <= max_matvecs`` all eigenvalues are computed.

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        Symmetric, ``(n, n)``.
    max_matvecs : int
        Products at most.
    dense : bool, optional
        Whether to compute all eigenvalues. Default: if ``n`` is within ``max_matvecs``, and the
        matrix fits half of the free memory.
    num_probes : int
        Random vectors at most, the first run included. They get half of the products, from 60 on.
    zero_rtol, failure_probability
        As of :func:`condition_number`.
    seed : int or torch.Generator
    should_stop : callable, optional
        Asked every ten products; ``True`` ends the survey with what is known.
    progress : callable, optional
        Called with the number of new products.

    Returns
    -------
    SpectrumSurvey

    Raises
    ------
    InvalidArgumentError
        If an option is out of range.
    ShapeError
        If the operator is not square and symmetric.
    NonFiniteError
        If a product is not finite.

    Notes
    -----
    ``KeyboardInterrupt`` between the first ten products and the end also ends it with what is
    known, and ``stopped`` says so.

    Examples
    --------
    >>> import numpy as np
    >>> found = survey(np.diag([-1.0, 0.5, 2.0, 4.0]))
    >>> found.condition.status, float(found.index), 4.0 in found.largest, -1.0 in found.smallest
    ('exact', 0.25, True, True)
    """
    taken = square(operator)
    check_counts(max_matvecs=max_matvecs, num_probes=num_probes)
    check_at_least(_FEWEST_STEPS + 2, max_matvecs=max_matvecs)
    options = Options(1e-2, zero_rtol, None, max_matvecs, failure_probability, "auto", None)
    spent = taken.num_matvecs
    if options.dense_is_open(taken) if dense is None else dense:
        return _from_all(taken, options, spent)
    walk = _Walk(taken, options, spent, should_stop or _never, progress or _ignore, seed)
    walk.go_deep(max_matvecs // 2 if num_probes > 1 and max_matvecs >= _WIDE else max_matvecs)
    walk.take_trace(max_matvecs)
    walk.go_broad(num_probes, max_matvecs)
    return walk.result()


def _never() -> bool:
    return False


def _ignore(_: int) -> None:
    return None


def _from_all(operator: LinearOperator, options: Options, spent: int) -> SpectrumSurvey:
    found = full_spectrum(operator)
    values, error = found.values, found.error
    total = float(values.sum())
    slack = error * math.sqrt(found.size)

    def end(value: float) -> Estimate:
        return Estimate(value, value - error, value + error)

    return SpectrumSurvey(
        found.size, end(float(values[-1])), end(float(values[0])),
        found.condition_number(options.zero_rtol),
        found.condition_number(options.zero_rtol, percentile=10.0), found.index(options.zero_rtol),
        Estimate(total, total - slack, total + slack), values,
        np.full(found.size, 1 / found.size), {q: found.quantile(q) for q in _QUANTILES},
        operator.num_matvecs - spent, 0, False, False, f"all {found.size} eigenvalues known",
    )  # fmt: skip


class _Walk:
    """The runs of one survey: one deep, then further ones of equal depth."""

    def __init__(
        self,
        operator: LinearOperator,
        options: Options,
        spent: int,
        should_stop: Callable[[], bool],
        progress: Callable[[int], object],
        seed: int | torch.Generator,
    ) -> None:
        self._operator = operator
        self._options = options
        self._spent = spent
        self._should_stop = should_stop
        self._progress = progress
        self._generator = make_generator(seed)
        self._probes: list[Probe] = []
        self._stopped = self._interrupted = False
        self._trace = NAN
        self._run = self._new_run(measure_noise=True)

    @property
    def _used(self) -> int:
        return self._operator.num_matvecs - self._spent

    def _new_run(self, *, measure_noise: bool = False) -> LanczosRun:
        size = self._operator.shape[0]
        # The deep basis stays while a second one grows.
        held = 8 * max(self._operator.local_size, 1)
        fits = self._operator.least(available_bytes(self._operator.device) // 4 // held)
        room = max(fits, _FEWEST_STEPS)
        start = start_for(self._operator, self._generator)
        return LanczosRun(
            self._operator, start, measure_noise=measure_noise, max_steps=min(room, size)
        )

    def _extend(self, run: LanczosRun, steps: int, limit: int) -> bool:
        """Some steps more; False where the run can or may not go on."""
        before = self._operator.num_matvecs
        spare = 1 if not run.num_steps else 0
        count = min(steps, limit - self._used - spare, run.max_steps - run.num_steps)
        if count <= 0 or run.closed or self._stopped:
            return False
        try:
            run.extend(count)
        except KeyboardInterrupt:
            if run.num_steps < _FEWEST_STEPS and not self._probes:
                raise
            self._stopped = self._interrupted = True
        self._progress(self._operator.num_matvecs - before)
        self._stopped |= self._operator.agree(self._should_stop())
        return not self._stopped

    def go_deep(self, limit: int) -> None:
        """The first run: until the condition number is enclosed, or ``limit`` products."""
        run = self._run
        check = 4 * _CHUNK
        while self._extend(run, _CHUNK, limit) or (self._unsettled() and run.reopen()):
            if run.num_steps < check:
                continue
            check = run.num_steps + max(_CHUNK, run.num_steps // 4)
            if is_enclosed(run, self._options):
                break

    def _unsettled(self) -> bool:
        """Whether the run closed, but on a residual too large for the condition number."""
        return self._run.closed and not self._stopped and not is_exhausted(self._run, self._options)

    def take_trace(self, limit: int) -> None:
        """A few products in a block, which cost less than those of a run."""
        count = min(_TRACE_PROBES, (limit - self._used) // 8)
        if self._stopped or count < 4 or self._run.only_zeros:
            return
        before = self._operator.num_matvecs
        try:
            self._trace = trace(self._operator, count, self._generator)
        except KeyboardInterrupt:
            self._stopped = self._interrupted = True
        self._progress(self._operator.num_matvecs - before)
        self._stopped |= self._operator.agree(self._should_stop())

    def go_broad(self, num_probes: int, limit: int) -> None:
        """Further runs, all of one depth, for as many as the budget has room."""
        first = self._run
        self._probes.append(Probe(first.jacobi, first.start_norm**2, first.guard))
        if first.closed or self._stopped:
            return
        left = limit - self._used
        count = min(num_probes - 1, max(left // _PROBE_STEPS, 1))
        steps = min(_PROBE_STEPS, left // max(count, 1))
        for _ in range(count):
            if steps < _FEWEST_STEPS or self._stopped:
                break
            run = self._new_run()
            run.noise = first.noise
            end = min(self._used + steps, limit)
            while self._extend(run, _CHUNK, end):
                pass
            if run.num_steps >= _FEWEST_STEPS:
                self._probes.append(Probe(run.jacobi, run.start_norm**2, run.guard))

    def _condition(self) -> ConditionNumber:
        """What the deep run knows now; not a product more."""
        run, options = self._run, self._options
        asked = Options(
            options.rtol, options.zero_rtol, None, max(self._used, 3),
            options.failure_probability, "lanczos", None,
        )  # fmt: skip
        return certify(run, asked, self._spent, self._generator)

    def result(self) -> SpectrumSurvey:
        """All that is known."""
        deep, size = self._run, self._operator.shape[0]
        allowed = self._options.failure_probability
        measure = SpectralMeasure(self._probes, size)
        condition = self._condition()
        tenth = self._tenth(measure, condition.largest)
        condition = self._raised(condition, tenth, measure)
        nodes, weights = measure.nodes(absolute=False)
        steps = self._probes[-1].jacobi.size
        others = len(self._probes) - 1
        message = f"a Lanczos run of {deep.num_steps} steps"
        if others:
            message += f" and {others} of {steps}" + (" each" if others > 1 else "")
        if self._stopped:
            message += ", ended early"
        return SpectrumSurvey(
            size, *self._ends(), condition, tenth,
            self._index(measure), self._trace, nodes, weights,
            {q: measure.quantile(q, allowed, absolute=False) for q in _QUANTILES},
            self._used, len(self._probes), self._stopped, self._interrupted, message,
        )  # fmt: skip

    def _raised(
        self, condition: ConditionNumber, tenth: ConditionNumber, measure: SpectralMeasure
    ) -> ConditionNumber:
        """A lower bound that knows what the other probes know.

        Shares of all probes give a certain one. Where the percentile is not zero, no smaller
        eigenvalue is larger than it, so that kappa is at least kappa_10.
        """
        if condition.status != "lower bound only":
            return condition
        radius = measure.some_within(condition.zero_threshold)
        low = max(condition.low, condition.largest.low / radius)
        message = condition.message
        if low > condition.low:
            message = f"kappa >= {low:.4g} is certain from the shares of all probes; " + message
        if tenth.low > low and tenth.smallest.low > condition.zero_threshold:
            low = tenth.low
            chance = self._options.failure_probability
            message = (
                f"kappa >= kappa_10 >= {low:.4g} with probability at least 1 - {chance:g}; "
                + message
            )
        needed = needed_of(self._run, low, self._options)
        return replace(condition, value=low, low=low, message=message, needed_matvecs=needed)

    def _ends(self) -> tuple[Estimate, Estimate]:
        """The two ends of the spectrum, over all runs."""
        size = self._operator.shape[0]
        guard = self._run.guard
        if self._run.only_zeros:
            zero = Estimate(0.0, -guard, guard)
            return zero, zero
        inverse_mass = inverse_weight(size, self._options.failure_probability / 2)
        top = self._run.jacobi
        low = max(float(p.jacobi.ritz_values.max()) for p in self._probes)
        high = self._outer(top, inverse_mass)
        bottom = min(float(p.jacobi.ritz_values.min()) for p in self._probes)
        under = -self._outer(top.mirrored(), inverse_mass)
        return (
            Estimate(low, low - guard, max(high, low) + guard),
            Estimate(bottom, min(under, bottom) - guard, bottom + guard),
        )

    def _outer(self, jacobi: Any, inverse_mass: float) -> float:
        if self._run.complete:
            return float((jacobi.ritz_values + jacobi.residual_norms).max())
        return float(jacobi.right_end(inverse_mass))

    def _tenth(self, measure: SpectralMeasure, largest: Estimate) -> ConditionNumber:
        """kappa_10 from the pooled probes."""
        options, deep, size = self._options, self._run, self._operator.shape[0]
        if deep.only_zeros:
            return zero_operator(size, 10.0, self._used, 0.0, deep.guard, "exhausted")
        lowest = measure.quantile(0.1, options.failure_probability / 2, absolute=True)
        threshold = max(options.zero_rtol * largest.value, 4 * deep.guard)
        value, low, high = over_percentile(largest, lowest, threshold)
        status: Status = "certified"
        message = f"{len(self._probes)} random vectors"
        if lowest.high <= threshold:
            status, message = "not resolvable", "a tenth of the spectrum or more is zero"
        elif not math.isfinite(high):
            status = "lower bound only"
            message += ": the 10th percentile of |lambda| may be zero for all they tell"
        elif deep.closed and deep.complete:
            status = "exhausted"
        return ConditionNumber(
            float(np.clip(value, low, high)), low, high, largest, lowest,
            Estimate(0.0, 0.0, float(size)), threshold, 10.0, status, message, self._used,
            math.nan, math.nan, deep.guard, options.failure_probability,
        )  # fmt: skip

    def _index(self, measure: SpectralMeasure) -> Estimate:
        """Share of eigenvalues below minus the zero threshold."""
        options, size = self._options, self._operator.shape[0]
        scale = max(p.jacobi.scale for p in self._probes)
        cut = max(options.zero_rtol * scale, 4 * self._run.guard)
        if self._run.only_zeros or cut == 0:
            return Estimate(0.0, 0.0, 0.0)
        count = measure.count_at(-cut, options.failure_probability)
        nodes, weights = measure.nodes(absolute=False)
        low, high = count.low / size, count.high / size
        return Estimate(float(np.clip(weights[nodes < -cut].sum(), low, high)), low, high)
