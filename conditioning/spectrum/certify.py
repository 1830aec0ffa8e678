"""The matrix-free route of ``condition_number``: Lanczos until both ends are enclosed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from conditioning.krylov import LanczosRun
from conditioning.memory import format_bytes
from conditioning.operators.base import dense_bytes
from conditioning.spectrum.bounds import Bounds, Options, count_of, enclose
from conditioning.spectrum.full import NAN, zero_operator
from conditioning.spectrum.measure import Probe, SpectralMeasure, inverse_weight
from conditioning.spectrum.percentile import by_percentile, more_probes, over_probes
from conditioning.spectrum.predict import Outlook, needed_products
from conditioning.spectrum.results import ConditionNumber, Estimate, Status

DEFAULT_MATVECS = 1000
# What a closed run may leave to chance, where the asked allowance cannot be had: the next one
# that encloses is taken, and stated in the result.
_LADDER = (1e-4, 1e-2, 2.5e-2)


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
        return by_percentile(run, options, spent, generator, last, limit)
    allowed = options.failure_probability / 2
    outlook = Outlook(size, inverse_weight(size, allowed), last)
    hopeless = False
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
            bounds = settled or enclose(run, options, allowed, raised=False)
            if run.closed or bounds.ratio <= 1 + options.rtol or run.num_steps >= last:
                break
            hopeless = outlook.look(run.jacobi, bounds.threshold, bounds.certain)
            if hopeless and options.stop_early and bounds.ratio == math.inf:
                break
        run.extend(min(_next_check(run.num_steps), last) - run.num_steps)
    used = operator.num_matvecs - spent
    result = _conclude(run, bounds, options, used, by_memory)
    stopped = hopeless and not run.closed and bounds.ratio == math.inf and run.num_steps < last
    if stopped and result.status != "lower bound only":
        message = f"{result.message} Stopped early after {used} of max_matvecs={limit} products, "
        message += "since the rest cannot suffice to certify. stop_early=False goes on."
        return replace(result, message=message)
    if not stopped:
        return result
    left = min(limit - used, by_memory - run.num_steps)
    probes = more_probes(run, generator, left)
    tenth = over_probes(probes, bounds.largest, bounds.threshold, size, allowed)
    low = max(result.low, _by_mass(probes, bounds, size))
    certain = f"kappa >= {low:.4g} is certain"
    if math.isfinite(tenth.high) and tenth.low > low:
        # The percentile is above the threshold, and no smaller one that is kept is above it.
        low = tenth.low
        certain += f", and >= {low:.4g} with probability 1 - {options.failure_probability:g}"
    needed = needed_of(run, low, options)
    message = (
        f"{certain}; stopped early after {used} products, since max_matvecs={limit} cannot "
        f"suffice: "
        f"{_price(needed)}, {_dense_cost(run)}. stop_early=False goes on. "
    )
    message += f"kappa_10 >= {tenth.low:.4g}" if math.isinf(tenth.high) else f"kappa_10 = {tenth}"
    return replace(
        result, value=low, low=low, message=message, num_matvecs=operator.num_matvecs - spent,
        needed_matvecs=needed, kappa_10=tenth,
    )  # fmt: skip


def needed_of(run: LanczosRun, certain: float, options: Options) -> int:
    """Products that certifying would take, as the run tells."""
    size = run.operator.shape[0]
    mass = inverse_weight(size, options.failure_probability / 2)
    return needed_products(certain, run.jacobi, mass, size)


def _by_mass(probes: list[Probe], bounds: Bounds, size: int) -> float:
    """Certain lower bound of the condition number from shares, which need no settled Ritz pair."""
    radius = SpectralMeasure(probes, size).some_within(bounds.threshold)
    return max(bounds.largest.low / radius, 1.0)


def is_exhausted(run: LanczosRun, options: Options) -> bool:
    """Whether a run has closed in a way that settles the answer."""
    return run.only_zeros or _exhausted(run, options, options.failure_probability / 2) is not None


def is_enclosed(run: LanczosRun, options: Options) -> bool:
    """Whether a run knows the condition number as narrowly as is asked for."""
    bounds = enclose(run, options, options.failure_probability / 2, raised=False)
    return bounds.ratio <= 1 + options.rtol


def _exhausted(run: LanczosRun, options: Options, allowed: float) -> Bounds | None:
    """Bounds of a closed run, with the smallest allowance that encloses; None if none does."""
    if not run.closed:
        return None
    for chance in (allowed, *(step for step in _LADDER if step > allowed)):
        for raised in (False, True):
            bounds = enclose(run, options, chance, raised=raised)
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
    run: LanczosRun, bounds: Bounds, options: Options, used: int, by_memory: int
) -> ConditionNumber:
    nullity = _nullity(run, bounds, options)
    exhausted = run.closed and bounds.ratio <= 1 + options.rtol
    smallest = bounds.smallest
    low = bounds.certain
    if math.isinf(bounds.ratio):
        probe = Probe(run.jacobi, run.start_norm**2, run.guard)
        low = max(low, _by_mass([probe], bounds, run.operator.shape[0]))
    value, high = low, math.inf
    status, message = _judge(run, bounds, low, needed_of(run, low, options), exhausted=exhausted)
    if status in ("exhausted", "certified", "depends on threshold") and smallest is not None:
        high = bounds.largest.high / smallest.low if smallest.low > 0 else math.inf
        value = max(bounds.largest.value / smallest.value, 1.0) if math.isfinite(high) else low
    if status == "exhausted" and nullity.high:
        message += f"; about {count_of(round(nullity.value), 'eigenvalue')} counted as zero"
    if status == "certified" and bounds.ratio > 1 + options.rtol:
        message += f"; wider than rtol={options.rtol:g}, {_more(run, used, by_memory)}"
    if status == "lower bound only":
        message += _between(run, options) + f"; {_more(run, used, by_memory)}"
    return ConditionNumber(
        value, low, high, bounds.largest, smallest or NAN, nullity, bounds.threshold, None, status,
        message, used, bounds.below, smallest.value if smallest else math.nan, run.guard,
        bounds.failure_probability, run.num_distinct() if exhausted else None,
        needed_of(run, low, options) if status == "lower bound only" else None,
    )  # fmt: skip


def _judge(
    run: LanczosRun, bounds: Bounds, certain: float, needed: int, *, exhausted: bool
) -> tuple[Status, str]:
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
        distinct = count_of(run.num_distinct(), "distinct eigenvalue")
        return "exhausted", (
            f"the Krylov space closed after {count_of(run.num_steps, 'step')}: {distinct} of "
            f"{run.operator.shape[0]} known, the smallest kept is "
            f"{smallest.value / scale:.2g} max|lambda|"
        )
    if smallest.low > 0:
        return "certified", (
            f"no eigenvalue with {bounds.threshold:.2g} < |lambda| < {smallest.low:.4g}, with "
            f"probability at least 1 - {bounds.failure_probability:g}"
        )
    return "lower bound only", (
        f"kappa >= {certain:.4g} is certain (an eigenvalue of size at most "
        f"{scale / certain:.3g} exists), nothing below it is excluded down to the zero threshold "
        f"yet; {_price(needed)}, {_dense_cost(run)}"
    )


def _price(needed: int) -> str:
    return (
        f"certifying would take about {needed:.2g} products if kappa were no larger than that, and "
        f"more if it is"
    )


def _between(run: LanczosRun, options: Options) -> str:
    """What is excluded above a larger threshold than the asked one."""
    bounds = enclose(run, options, options.failure_probability / 2, raised=True)
    if bounds.smallest is None or bounds.smallest.low <= 0:
        return ""
    return (
        f"; nothing lies between {bounds.begin:.2g} and {bounds.smallest.low:.4g}, but from "
        f"{bounds.threshold:.2g} to {bounds.begin:.2g} nothing is excluded"
    )


def _more(run: LanczosRun, used: int, by_memory: int) -> str:
    if run.closed:
        return f"after {used} products the Krylov space closed, and what was left is rounding"
    if run.num_steps >= by_memory:
        size = format_bytes(8 * run.operator.shape[0])
        return f"the basis filled memory_budget ({size} a step)"
    return f"max_matvecs ended the run after {used} products"


def _dense_cost(run: LanczosRun) -> str:
    shape = run.operator.shape
    return f"the dense route takes {shape[0]} and {format_bytes(dense_bytes(shape, torch.float64))}"


def _nullity(run: LanczosRun, bounds: Bounds, options: Options) -> Estimate:
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
