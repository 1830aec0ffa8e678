"""The matrix-free route of ``condition_number``: Lanczos until both ends are enclosed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from conditioning.krylov import LanczosRun, start_for
from conditioning.memory import available_bytes, format_bytes
from conditioning.operators.base import LinearOperator, dense_bytes
from conditioning.spectrum.common import (
    METHODS,
    check_at_least,
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
            check_at_least(3, max_matvecs=self.max_matvecs)
        if self.memory_budget is not None:
            check_at_least(1, memory_budget=self.memory_budget)

    def max_steps(self, operator: LinearOperator) -> int:
        """Steps whose basis fits the memory: further probes need room for a second basis."""
        budget = self.memory_budget
        if budget is None:
            budget = available_bytes(operator.device) // 2
        return max(budget // (8 * operator.shape[0] * (1 if self.percentile is None else 2)), 8)

    def dense_is_open(self, operator: LinearOperator) -> bool:
        """Whether the dense route fits the memory, and the caller's own limit of products."""
        in_limit = self.max_matvecs is None or operator.shape[0] <= self.max_matvecs
        return in_limit and dense_fits(operator, self.memory_budget)


# What a closed run may leave to chance, where the asked allowance cannot be had: the next one
# that encloses is taken, and stated in the result.
_LADDER = (1e-4, 1e-2, 2.5e-2)


@dataclass(frozen=True)
class _Bounds:
    """What a Lanczos run proves about both ends of ``|lambda|``."""

    largest: Estimate
    smallest: Estimate | None  # None: no Ritz value is surely above the threshold
    threshold: float
    wanted_threshold: float
    begin: float  # where exclusion begins: the threshold, or above it
    below: float
    null_weight: float
    failure_probability: float

    @property
    def certain(self) -> float:
        """The condition number is at least this, whatever chance does."""
        return max(self.largest.low / self.smallest.high, 1.0) if self.smallest else 1.0

    @property
    def ratio(self) -> float:
        """``high / low`` of the condition number; infinite where one end is missing."""
        if self.smallest is None or self.smallest.low <= 0 or self.largest.low <= 0:
            return math.inf
        ends = self.largest.high / self.largest.low * self.smallest.high / self.smallest.low
        return ends if math.isfinite(ends) else math.inf


def largest_magnitude(run: LanczosRun, inverse_mass: float) -> Estimate:
    """``max |lambda|``: certain from below (Rayleigh), excluded above with high probability."""
    jacobi, guard = run.jacobi, run.guard
    scale = jacobi.scale
    if run.complete:
        high = float((np.abs(jacobi.ritz_values) + jacobi.residual_norms).max())
    else:
        high = max(jacobi.right_end(inverse_mass), jacobi.mirrored().right_end(inverse_mass))
    return Estimate(scale, max(scale - guard, 0.0), high + guard)


def _enclose(run: LanczosRun, options: Options, allowed: float, *, raised: bool) -> _Bounds:
    """Both ends, each wrong with probability at most ``allowed``.

    With ``raised`` exclusion may begin above the threshold: next to a null space it does.
    """
    inverse_mass = inverse_weight(run.operator.shape[0], allowed)
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
    failure = 0.0 if run.complete else 2 * allowed
    smallest, begin = None, threshold
    if sure.any():
        index = int(np.where(sure, magnitudes + radii, np.inf).argmin())
        value, high = float(magnitudes[index]), float(magnitudes[index] + radii[index])
        if run.complete:
            low = value - float(radii[index])
        else:
            resolution = options.rtol / 20 if not run.closed else 1e-10
            low, begin = _exclude(run, threshold, high, inverse_mass, resolution, raised=raised)
        smallest = Estimate(value, max(min(low, value), 0.0), high)
    return _Bounds(largest, smallest, threshold, wanted, begin, below, weight, failure)


def _exclude(
    run: LanczosRun,
    threshold: float,
    high: float,
    inverse_mass: float,
    resolution: float,
    *,
    raised: bool,
) -> tuple[float, float]:
    """Where exclusion on both sides of zero ends (0 if there is none), and where it begins."""
    sides = (run.jacobi, run.jacobi.mirrored())
    begins = [threshold]
    if raised and high > 100 * threshold:
        begins = list(np.geomspace(10 * threshold, high / 10, 12))
    for begin in begins:
        start = begin - run.guard
        reached = min(s.excluded_until(start, high, inverse_mass, resolution) for s in sides)
        if reached > (5 * begin if raised else start):
            return reached - run.guard, float(begin)
    return 0.0, threshold


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
    limit = DEFAULT_MATVECS if options.max_matvecs is None else options.max_matvecs
    products = limit - (operator.num_matvecs - spent)
    if not run.num_steps:
        products -= 1  # the one that measures the noise
    by_memory = options.max_steps(operator)
    last = max(run.num_steps, min(run.num_steps + max(products, 0), by_memory))
    if options.percentile is not None:
        return _percentile(run, options, spent, generator, last, limit)
    allowed = options.failure_probability / 2
    while True:
        if run.num_steps:
            if run.only_zeros:
                return zero_operator(
                    size, None, operator.num_matvecs - spent, run.jacobi.scale, run.guard,
                    "exhausted",
                )  # fmt: skip
            settled = _exhausted(run, options, allowed)
            if run.closed and settled is None and run.num_steps < last and run.reopen():
                continue
            bounds = settled or _enclose(run, options, allowed, raised=False)
            if run.closed or bounds.ratio <= 1 + options.rtol or run.num_steps >= last:
                break
        run.extend(min(_next_check(run.num_steps), last) - run.num_steps)
    used = operator.num_matvecs - spent
    return _conclude(run, bounds, options, used, by_memory)


def is_exhausted(run: LanczosRun, options: Options) -> bool:
    """Whether a run has closed in a way that settles the answer."""
    return run.only_zeros or _exhausted(run, options, options.failure_probability / 2) is not None


def is_enclosed(run: LanczosRun, options: Options) -> bool:
    """Whether a run knows the condition number as narrowly as is asked for."""
    bounds = _enclose(run, options, options.failure_probability / 2, raised=False)
    return bounds.ratio <= 1 + options.rtol


def _exhausted(run: LanczosRun, options: Options, allowed: float) -> _Bounds | None:
    """Bounds of a closed run, with the smallest allowance that encloses; None if none does."""
    if not run.closed:
        return None
    for chance in (allowed, *(step for step in _LADDER if step > allowed)):
        for raised in (False, True):
            bounds = _enclose(run, options, chance, raised=raised)
            if bounds.ratio <= 1 + options.rtol:
                return bounds
    return None


def _next_check(num_steps: int) -> int:
    """Step counts at which a run is judged, the same however it was interrupted."""
    if num_steps < 100:
        return (num_steps // 10 + 1) * 10
    check = 100
    while check <= num_steps:
        check += check // 10
    return check


def _conclude(
    run: LanczosRun, bounds: _Bounds, options: Options, used: int, by_memory: int
) -> ConditionNumber:
    nullity = _nullity(run, bounds, options)
    exhausted = run.closed and bounds.ratio <= 1 + options.rtol
    smallest = bounds.smallest
    value, low, high = bounds.certain, bounds.certain, math.inf
    status, message = _judge(run, bounds, exhausted=exhausted)
    if status in ("exhausted", "certified", "depends on threshold") and smallest is not None:
        high = bounds.largest.high / smallest.low if smallest.low > 0 else math.inf
        value = max(bounds.largest.value / smallest.value, 1.0) if math.isfinite(high) else low
    if status == "exhausted" and nullity.high:
        message += f"; about {_count(round(nullity.value), 'eigenvalue')} counted as zero"
    if status == "certified" and bounds.ratio > 1 + options.rtol:
        message += f"; wider than rtol={options.rtol:g}, {_more(run, used, by_memory)}"
    if status == "lower bound only":
        message += _between(run, options) + f"; {_more(run, used, by_memory)}"
    return ConditionNumber(
        value, low, high, bounds.largest, smallest or NAN, nullity, bounds.threshold, None, status,
        message, used, bounds.below, smallest.value if smallest else math.nan, run.guard,
        bounds.failure_probability, run.num_distinct() if exhausted else None,
    )  # fmt: skip


def _judge(run: LanczosRun, bounds: _Bounds, *, exhausted: bool) -> tuple[Status, str]:
    """Status and what it means here."""
    scale, smallest = bounds.largest.value, bounds.smallest
    noisy = bounds.threshold > 1.01 * bounds.wanted_threshold
    if noisy and (smallest is None or bounds.below > bounds.wanted_threshold):
        return "not resolvable", (
            f"what decides lies below {bounds.threshold / scale:.1e} max|lambda|, four times the "
            f"rounding measured in the products, and above zero_rtol. Use float64."
        )
    if smallest is None:
        return "lower bound only", "no Ritz value has settled above the zero threshold"
    if bounds.below > bounds.threshold / 10 and smallest.value < bounds.threshold * 10:
        return "depends on threshold", (
            f"eigenvalues on both sides of the zero threshold {bounds.threshold:.3g}: "
            f"{bounds.below:.3g} counts as zero, {smallest.value:.3g} does not. Choose zero_rtol, "
            f"or quote percentile=10."
        )
    if exhausted:
        distinct = _count(run.num_distinct(), "distinct eigenvalue")
        return "exhausted", (
            f"the Krylov space closed after {_count(run.num_steps, 'step')}: {distinct} of "
            f"{run.operator.shape[0]} known, the smallest kept is "
            f"{smallest.value / scale:.2g} max|lambda|"
        )
    if smallest.low > 0:
        return "certified", (
            f"no eigenvalue with {bounds.threshold:.2g} < |lambda| < {smallest.low:.4g}, with "
            f"probability at least 1 - {bounds.failure_probability:g}"
        )
    return "lower bound only", (
        f"kappa >= {bounds.certain:.4g} is certain (an eigenvalue of size at most "
        f"{smallest.high:.3g} exists), nothing below it is excluded down to the zero threshold "
        f"yet; certifying would take about {18 * bounds.certain:.2g} products or more, "
        f"{_dense_cost(run)}"
    )


def _between(run: LanczosRun, options: Options) -> str:
    """What is excluded above a larger threshold than the asked one."""
    bounds = _enclose(run, options, options.failure_probability / 2, raised=True)
    if bounds.smallest is None or bounds.smallest.low <= 0:
        return ""
    return (
        f"; nothing lies between {bounds.begin:.2g} and {bounds.smallest.low:.4g}, but from "
        f"{bounds.threshold:.2g} to {bounds.begin:.2g} nothing is excluded"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _more(run: LanczosRun, used: int, by_memory: int) -> str:
    if run.num_steps >= by_memory:
        size = format_bytes(8 * run.operator.shape[0])
        return f"the basis filled memory_budget ({size} a step)"
    return f"max_matvecs ended the run after {used} products"


def _dense_cost(run: LanczosRun) -> str:
    shape = run.operator.shape
    return f"the dense route takes {shape[0]} and {format_bytes(dense_bytes(shape, torch.float64))}"


def _nullity(run: LanczosRun, bounds: _Bounds, options: Options) -> Estimate:
    """Number of eigenvalues counted as zero, from the weight of the settled zero Ritz values."""
    size = run.operator.shape[0]
    clear = bounds.smallest is not None and bounds.smallest.low > bounds.threshold
    if bounds.null_weight == 0:
        return Estimate(0.0, 0.0, 0.0 if clear else float(size))
    if run.complete:
        exact = float((np.abs(run.jacobi.ritz_values) <= bounds.threshold).sum())
        return Estimate(exact, exact, exact)
    measure = SpectralMeasure([Probe(run.jacobi, run.start_norm**2, run.guard)], size)
    weight = bounds.null_weight
    widest = float(measure.within(np.array([bounds.threshold]))[1][0])
    shares = (weight, weight) if clear else (weight, widest)
    found = measure.count(shares, options.failure_probability)
    low = max(found.low, 1.0)
    return Estimate(float(np.clip(size * weight, low, found.high)), low, found.high)


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
        if not probes and run.only_zeros:
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
        noise = run.noise
        run = LanczosRun(operator, start_for(operator, generator), max_steps=last)
        run.noise = noise
    used = operator.num_matvecs - spent
    guard = run.guard
    threshold = max(options.zero_rtol * largest.value, 4 * guard)
    value, low, high = over_percentile(largest, lowest, threshold)
    status: Status
    if lowest.high <= threshold:
        status, value = "not resolvable", low
        message = "the percentile lies within the zero threshold: the quotient has no meaning"
    elif not math.isfinite(high):
        status = "lower bound only"
        message = (
            f"the percentile of |lambda| may be zero; {_count(len(current), 'probe')} of "
            f"{_count(depth, 'step')}"
        )
    else:
        status = "exhausted" if run.closed else "certified"
        message = (
            f"{_count(len(current), 'probe')} of {_count(run.num_steps, 'step')}, with probability "
            f"at least 1 - {options.failure_probability:g}"
        )
        if ratio > 1 + options.rtol:
            reason = "more probes no longer help" if stalled >= 4 else "max_matvecs ended the run"
            message += f"; wider than rtol={options.rtol:g}, {reason}"
    weights = Estimate(0.0, 0.0, float(size))
    return ConditionNumber(
        value, low, high, largest, lowest, weights, threshold, options.percentile, status,
        message, used, math.nan, math.nan, guard, options.failure_probability,
    )  # fmt: skip


def over_percentile(
    largest: Estimate, lowest: Estimate, threshold: float
) -> tuple[float, float, float]:
    """Value and both ends of ``largest / lowest``; no upper end where ``lowest`` may be zero."""
    low = max(largest.low / lowest.high, 1.0) if lowest.high > 0 else math.inf
    high = largest.high / lowest.low if lowest.low > threshold else math.inf
    value = largest.value / lowest.value if lowest.value > 0 and math.isfinite(high) else low
    return value, low, high


def _width(estimate: Estimate) -> float:
    return estimate.high / estimate.low if estimate.low > 0 else math.inf
