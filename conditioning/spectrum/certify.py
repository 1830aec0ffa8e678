"""The matrix-free route of ``condition_number``: Lanczos until both ends are enclosed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from conditioning.krylov import LanczosRun, random_start
from conditioning.memory import available_bytes, format_bytes
from conditioning.operators.base import LinearOperator, dense_bytes
from conditioning.spectrum.common import (
    METHODS,
    check_between,
    check_choice,
    check_counts,
    check_zero_and_percentile,
    dense_fits,
)
from conditioning.spectrum.full import NAN, zero_operator
from conditioning.spectrum.measure import Probe, SpectralMeasure, inverse_weight
from conditioning.spectrum.results import ConditionNumber, Estimate, Status

DEFAULT_MATVECS = 1000


@dataclass(frozen=True)
class Options:
    """The options of ``condition_number``, checked."""

    rtol: float
    zero_rtol: float
    percentile: float | None
    max_matvecs: int | None
    failure_probability: float
    method: str
    memory_budget: int | None

    def __post_init__(self) -> None:
        check_between(0, 1, rtol=self.rtol)
        check_between(0, 0.5, failure_probability=self.failure_probability)
        check_zero_and_percentile(self.zero_rtol, self.percentile)
        check_choice(METHODS, method=self.method)
        if self.max_matvecs is not None:
            check_counts(max_matvecs=self.max_matvecs)
            # One product, one more to measure its noise, and one that tells something.
            check_between(2, math.inf, max_matvecs=self.max_matvecs)

    def budget(self, device: torch.device) -> int:
        """Bytes for the Krylov basis."""
        return available_bytes(device) // 2 if self.memory_budget is None else self.memory_budget

    def dense_is_open(self, operator: LinearOperator) -> bool:
        """Whether the dense route fits the memory, and the caller's own limit of products."""
        in_limit = self.max_matvecs is None or operator.shape[0] <= self.max_matvecs
        return in_limit and dense_fits(operator, self.memory_budget)


@dataclass(frozen=True)
class _Bounds:
    """What a Lanczos run proves about both ends of ``|lambda|``."""

    largest: Estimate
    smallest: Estimate | None  # None: no Ritz value is surely above the threshold
    threshold: float
    wanted_threshold: float
    below: float
    null_weight: float
    closed: bool

    @property
    def ratio(self) -> float:
        """``high / low`` of the condition number; infinite where one end is missing."""
        if self.smallest is None or self.smallest.low <= 0:
            return math.inf
        ends = self.largest.high / self.largest.low * self.smallest.high / self.smallest.low
        return ends if math.isfinite(ends) else math.inf


def largest_magnitude(run: LanczosRun, inverse_mass: float) -> Estimate:
    """``max |lambda|``: certain from below (Rayleigh), excluded above with high probability."""
    jacobi, guard = run.jacobi, run.guard
    scale = jacobi.scale
    if run.closed:
        reach = float((np.abs(jacobi.ritz_values) + jacobi.residual_norms).max())
        return Estimate(scale, max(scale - guard, 0.0), reach + guard)
    high = max(jacobi.right_end(inverse_mass), jacobi.mirrored().right_end(inverse_mass))
    return Estimate(scale, max(scale - guard, 0.0), high + guard)


def _bounds(run: LanczosRun, options: Options, inverse_mass: float) -> _Bounds:
    jacobi, guard = run.jacobi, run.guard
    largest = largest_magnitude(run, inverse_mass)
    wanted = options.zero_rtol * largest.value
    threshold = max(wanted, 4 * guard)
    magnitudes = np.abs(jacobi.ritz_values)
    radii = jacobi.residual_norms + guard
    settled_zero = magnitudes + radii <= threshold
    sure = magnitudes - radii > threshold
    below = float(magnitudes[settled_zero].max()) if settled_zero.any() else 0.0
    weight = float(jacobi.weights[settled_zero].sum())
    if not sure.any():
        return _Bounds(largest, None, threshold, wanted, below, weight, run.closed)
    index = int(np.where(sure, magnitudes + radii, np.inf).argmin())
    value, high = float(magnitudes[index]), float(magnitudes[index] + radii[index])
    begin = threshold - guard
    reached = min(
        side.excluded_until(begin, high, inverse_mass, options.rtol / 20)
        for side in (jacobi, jacobi.mirrored())
    )
    low = reached - guard if reached > begin else 0.0
    if run.closed and low > 0.5 * value:
        # All that could still hide has been excluded; what is left is the residual.
        low = value - float(radii[index])
    smallest = Estimate(value, max(min(low, value), 0.0), high)
    return _Bounds(largest, smallest, threshold, wanted, below, weight, run.closed)


def certify(
    run: LanczosRun, options: Options, spent: int, generator: torch.Generator
) -> ConditionNumber:
    """Extend a run until the condition number is enclosed, the space closes, or the budget ends.

    Parameters
    ----------
    run : LanczosRun
        Fresh or continued, with the noise of its products measured.
    options : Options
    spent : int
        ``num_matvecs`` of the operator when the caller's count began.
    generator : torch.Generator
        For further probes, where a percentile is asked for.

    Returns
    -------
    ConditionNumber
    """
    operator = run.operator
    size = operator.shape[0]
    by_memory = max(options.budget(operator.device) // (8 * size), 8)
    limit = DEFAULT_MATVECS if options.max_matvecs is None else options.max_matvecs
    room = min(limit - (operator.num_matvecs - spent), by_memory - run.num_steps)
    if not run.num_steps:
        room -= 1  # the product that measures the noise
    last = run.num_steps + max(room, 0)
    if options.percentile is not None:
        return _percentile(run, options, spent, generator, last, limit)
    inverse_mass = inverse_weight(size, options.failure_probability / 2)
    while True:
        if run.num_steps:
            if _is_zero(run):
                return zero_operator(
                    size, None, operator.num_matvecs - spent, run.jacobi.scale, run.guard,
                    "exhausted",
                )  # fmt: skip
            bounds = _bounds(run, options, inverse_mass)
            if run.closed and bounds.ratio > 1 + options.rtol and run.reopen():
                continue
            if run.closed or bounds.ratio <= 1 + options.rtol or run.num_steps >= last:
                break
        run.extend(min(_next_check(run.num_steps), last) - run.num_steps)
    used = operator.num_matvecs - spent
    return _conclude(run, bounds, options, used, inverse_mass, by_memory)


def _next_check(num_steps: int) -> int:
    """Step counts at which a run is judged, the same however it was interrupted."""
    if num_steps < 100:
        return (num_steps // 10 + 1) * 10
    check = 100
    while check <= num_steps:
        check += check // 10
    return check


def _is_zero(run: LanczosRun) -> bool:
    return run.closed and run.jacobi.scale <= run.guard


def _conclude(
    run: LanczosRun,
    bounds: _Bounds,
    options: Options,
    used: int,
    inverse_mass: float,
    by_memory: int,
) -> ConditionNumber:
    size = run.operator.shape[0]
    nullity = _nullity(run, bounds, options)
    if bounds.smallest is not None and bounds.smallest.low <= 0 and not run.closed:
        bounds = _raise_threshold(run, bounds, inverse_mass)
    scale, smallest = bounds.largest.value, bounds.smallest
    above = smallest.value if smallest else math.nan
    noisy = bounds.threshold > 1.01 * bounds.wanted_threshold
    low = bounds.largest.low / smallest.high if smallest else 1.0
    high = bounds.largest.high / smallest.low if smallest and smallest.low > 0 else math.inf
    value = bounds.largest.value / smallest.value if smallest else low
    failure = 0.0 if run.closed else options.failure_probability
    distinct = run.num_steps if run.closed else None
    status: Status
    undecided = noisy and bounds.below > bounds.wanted_threshold
    if smallest is None or undecided:
        status, value, high = "not resolvable", low, math.inf
        message = (
            f"what decides lies below {bounds.threshold / scale:.1e} max|lambda|, four times the "
            f"rounding measured in the products, and above zero_rtol. Use float64."
            if undecided or noisy
            else "no Ritz value has settled above the zero threshold. Allow more products."
        )
        if not noisy and not undecided:
            status = "lower bound only"
    elif bounds.below > bounds.threshold / 10 and smallest.value < bounds.threshold * 10:
        status = "depends on threshold"
        message = (
            f"eigenvalues on both sides of the zero threshold {bounds.threshold:.3g}: "
            f"{bounds.below:.3g} counts as zero, {smallest.value:.3g} does not. Choose zero_rtol, "
            f"or quote percentile=10."
        )
    elif run.closed:
        status = "exhausted"
        message = (
            f"the Krylov space closed after {run.num_steps} steps: all {distinct} distinct "
            f"eigenvalues of {size} are known, "
            f"the smallest kept is {above / scale:.2g} max|lambda|"
        )
        if nullity.high:
            message += f"; about {nullity.value:.0f} eigenvalues are zero"
    elif math.isfinite(high):
        status = "certified"
        message = (
            f"no eigenvalue with {bounds.threshold:.2g} < |lambda| < {smallest.low:.4g}, with "
            f"probability at least 1 - {options.failure_probability:g}"
        )
        if bounds.ratio > 1 + options.rtol:
            message += f"; wider than rtol={options.rtol:g}, {_more(run, used, by_memory)}"
    else:
        status, value = "lower bound only", low
        message = (
            f"kappa >= {low:.4g} is certain (an eigenvalue of size at most {smallest.high:.3g} "
            f"exists), nothing below it is excluded yet; certifying would take about "
            f"{18 * low:.2g} products, {_dense_cost(run)}; {_more(run, used, by_memory)}"
        )
    return ConditionNumber(
        value, low, high, bounds.largest, smallest or NAN, nullity, bounds.threshold,
        None, status, message, used, bounds.below, above, run.guard, failure, distinct,
    )  # fmt: skip


def _more(run: LanczosRun, used: int, by_memory: int) -> str:
    if run.num_steps >= by_memory:
        size = format_bytes(8 * run.operator.shape[0])
        return f"the basis filled memory_budget ({size} a step)"
    return f"max_matvecs ended the run after {used} products"


def _dense_cost(run: LanczosRun) -> str:
    shape = run.operator.shape
    return f"the dense route takes {shape[0]} and {format_bytes(dense_bytes(shape, torch.float64))}"


def _raise_threshold(run: LanczosRun, bounds: _Bounds, inverse_mass: float) -> _Bounds:
    """Certify above a larger threshold where the asked one is not reached.

    Next to a null space, exclusion starts a little above zero. If it starts well below the
    smallest eigenvalue seen, the statement is worth having, with the threshold it needs.
    """
    smallest, guard = bounds.smallest, run.guard
    if smallest is None or smallest.value <= 100 * bounds.threshold:
        return bounds
    sides = (run.jacobi, run.jacobi.mirrored())
    for begin in np.geomspace(10 * bounds.threshold, smallest.value / 10, 12):
        reached = min(s.excluded_until(begin - guard, smallest.high, inverse_mass) for s in sides)
        if reached > 5 * begin:
            proved = Estimate(smallest.value, min(reached - guard, smallest.value), smallest.high)
            return _Bounds(
                bounds.largest, proved, float(begin), float(begin), bounds.below,
                bounds.null_weight, bounds.closed,
            )  # fmt: skip
    return bounds


def _nullity(run: LanczosRun, bounds: _Bounds, options: Options) -> Estimate:
    """Number of eigenvalues counted as zero, from the weight of the settled zero Ritz values."""
    size = run.operator.shape[0]
    clear = bounds.smallest is not None and bounds.smallest.low > bounds.threshold
    if bounds.null_weight == 0:
        return Estimate(0.0, 0.0, 0.0 if clear else float(size))
    measure = SpectralMeasure([Probe(run.jacobi, run.start_norm**2, run.guard)], size)
    weight = bounds.null_weight
    widest = float(measure.within(np.array([bounds.threshold]))[1][0])
    shares = (weight, weight) if clear else (weight, widest)
    found = measure.count(shares, options.failure_probability)
    return Estimate(min(max(size * weight, 1.0), float(size)), max(found.low, 1.0), found.high)


# -- a percentile instead of the smallest --------------------------------------------------


def _percentile(
    run: LanczosRun,
    options: Options,
    spent: int,
    generator: torch.Generator,
    last: int,
    limit: int,
) -> ConditionNumber:
    """kappa_q from several probes: depth until the resolution is fine, then breadth."""
    operator = run.operator
    size = operator.shape[0]
    share = options.failure_probability / 2
    inverse_mass = inverse_weight(size, share)
    q = float(options.percentile or 0.0) / 100
    probes: list[Probe] = []
    best: Estimate | None = None
    stalled = 0
    depth = min(last, 50)
    while True:
        run.extend(max(depth - run.num_steps, 0))
        if not probes and _is_zero(run):
            used = operator.num_matvecs - spent
            return zero_operator(size, options.percentile, used, 0.0, run.guard, "exhausted")
        if not probes:
            largest = largest_magnitude(run, inverse_mass)
        current = [*probes, Probe(run.jacobi, run.start_norm**2, run.guard)]
        # Every further probe is another look at the data: the looks share the allowance.
        look = share / (len(current) * (len(current) + 1))
        lowest = SpectralMeasure(current, size).quantile(q, look, absolute=True)
        old, best = best, lowest
        ratio = _width(largest) * _width(lowest)
        left = limit - (operator.num_matvecs - spent)
        # The two ends come from resolution (more steps) and sampling (more probes). The first
        # probe deepens while that pays; later ones have the same depth.
        paid = old is None or lowest.low <= 0 or _width(lowest) < 0.9 * _width(old)
        if ratio <= 1 + options.rtol:
            break
        if not probes and not run.closed and run.num_steps < min(last, 400) and paid:
            depth = min(2 * run.num_steps, last, 400)
            continue
        stalled = 0 if paid and lowest.low > 0 else stalled + 1
        if left < run.num_steps or stalled >= 4:
            break
        probes = current
        depth = run.num_steps
        start = random_start(size, generator, operator.device)
        noise = run.noise
        run = LanczosRun(operator, start)
        run.noise = noise
    used = operator.num_matvecs - spent
    guard = run.guard
    threshold = max(options.zero_rtol * largest.value, 4 * guard)
    low = largest.low / lowest.high if lowest.high > 0 else math.inf
    high = largest.high / lowest.low if lowest.low > threshold else math.inf
    value = largest.value / lowest.value if lowest.value > 0 and math.isfinite(high) else low
    status: Status
    if lowest.high <= threshold:
        status, value = "not resolvable", low
        message = "the percentile lies within the zero threshold: the quotient has no meaning"
    elif not math.isfinite(high):
        status = "lower bound only"
        message = f"the percentile of |lambda| may be zero; {len(current)} probes of {depth} steps"
    else:
        status = "exhausted" if run.closed else "certified"
        message = (
            f"{len(current)} probes of {run.num_steps} steps, with probability at least "
            f"1 - {options.failure_probability:g}"
        )
        if ratio > 1 + options.rtol:
            reason = "more probes no longer help" if stalled >= 4 else "max_matvecs ended the run"
            message += f"; wider than rtol={options.rtol:g}, {reason}"
    weights = Estimate(0.0, 0.0, float(size))
    return ConditionNumber(
        value, low, high, largest, lowest, weights, threshold, options.percentile, status,
        message, used, math.nan, math.nan, guard, options.failure_probability,
        run.num_steps if run.closed else None,
    )  # fmt: skip


def _width(estimate: Estimate) -> float:
    return estimate.high / estimate.low if estimate.low > 0 else math.inf
