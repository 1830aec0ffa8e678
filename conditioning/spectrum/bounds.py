"""What a Lanczos run proves about both ends of ``|lambda|``, and the options that it serves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from conditioning.krylov import LanczosRun
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.common import (
    METHODS,
    check_at_least,
    check_between,
    check_choice,
    check_counts,
    check_zero_and_percentile,
    dense_fits,
)
from conditioning.spectrum.measure import inverse_weight
from conditioning.spectrum.results import Estimate


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
    stop_early: bool = True

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
        held = 8 * max(operator.local_size, 1) * (1 if self.percentile is None else 2)
        return max(operator.least(budget // held), 8)

    def dense_is_open(self, operator: LinearOperator) -> bool:
        """Whether the dense route fits the memory, and the caller's own limit of products."""
        in_limit = self.max_matvecs is None or operator.shape[0] <= self.max_matvecs
        return in_limit and dense_fits(operator, self.memory_budget)


@dataclass(frozen=True)
class Bounds:
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


def enclose(run: LanczosRun, options: Options, allowed: float, *, raised: bool) -> Bounds:
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
    return Bounds(largest, smallest, threshold, wanted, begin, below, weight, failure)


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


def count_of(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
