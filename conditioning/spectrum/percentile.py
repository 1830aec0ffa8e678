"""The quotient of the largest ``|lambda|`` and a percentile of all, from random probes."""

from __future__ import annotations

import math

import numpy as np
import torch

from conditioning.krylov import LanczosRun, start_for
from conditioning.spectrum.bounds import Options, count_of, largest_magnitude
from conditioning.spectrum.full import zero_operator
from conditioning.spectrum.measure import Probe, SpectralMeasure, inverse_weight
from conditioning.spectrum.results import ConditionNumber, Estimate, Status

_DEPTH = 80  # steps of a further probe
_FEWEST = 10


def by_percentile(
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
        ratio = width_of(largest) * width_of(lowest)
        left = limit - (operator.num_matvecs - spent)
        # The two ends come from resolution (more steps) and sampling (more probes). The first
        # probe deepens while that pays; later ones have the same depth.
        paid = old is None or lowest.low <= 0 or width_of(lowest) < 0.9 * width_of(old)
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
            f"the percentile of |lambda| may be zero; {count_of(len(current), 'probe')} of "
            f"{count_of(depth, 'step')}"
        )
    else:
        status = "exhausted" if run.closed else "certified"
        message = (
            f"{count_of(len(current), 'probe')} of {count_of(run.num_steps, 'step')}, with "
            f"probability at least 1 - {options.failure_probability:g}"
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


def width_of(estimate: Estimate) -> float:
    """``high / low``; infinite where the lower end is not positive."""
    return estimate.high / estimate.low if estimate.low > 0 else math.inf


def more_probes(run: LanczosRun, generator: torch.Generator, left: int) -> list[Probe]:
    """A run as the first probe, and two more of up to 80 steps.

    They take at most half of ``left``, and no more products than the run took.
    """
    probes = [Probe(run.jacobi, run.start_norm**2, run.guard)]
    steps = min(_DEPTH, left // 4, run.num_steps // 2)
    for _ in range(2 if steps >= _FEWEST else 0):
        other = LanczosRun(run.operator, start_for(run.operator, generator), max_steps=steps)
        other.noise = run.noise
        other.extend(steps)
        probes.append(Probe(other.jacobi, other.start_norm**2, other.guard))
        other.release()
    return probes


def over_probes(
    probes: list[Probe], largest: Estimate, threshold: float, size: int, allowed: float
) -> Estimate:
    """kappa_10 from probes, its percentile wrong with probability at most ``allowed``."""
    lowest = SpectralMeasure(probes, size).quantile(0.1, allowed, absolute=True)
    value, low, high = over_percentile(largest, lowest, threshold)
    return Estimate(float(np.clip(value, low, high)), low, high)
