"""From stored cells to measurements: estimates, laws in depth, and means of several runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.claims import Measured

Array = NDArray[np.float64]
# A value at each depth.
Curve = Mapping[int, float]
# Products of the sizes of two groups up to which the law of Mann and Whitney is taken as it is.
_EXACT = 10_000


def number(value: Any) -> float:
    """A number as it comes back from the store."""
    return math.nan if value is None else float(value)


def enclosed(result: Mapping[str, Any], **more: Any) -> Measured:
    """A stored estimate as a measurement."""
    return Measured(number(result["value"]), number(result["low"]), number(result["high"]), **more)


def slope(curve: Curve, x: Callable[[int], float], y: Callable[[float], float]) -> float:
    """Slope of the least-squares line through ``(x(L), y(value))``; NaN for fewer than 2 points."""
    depths = sorted(curve)
    values = np.array([y(curve[depth]) for depth in depths])
    if len(depths) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(np.polyfit([x(depth) for depth in depths], values, 1)[0])


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line, with half its 95 % interval."""
    fit = stats.linregress(x, y)
    # Without any residual the error is 0 over 0.
    error = 0.0 if math.isnan(fit.stderr) else float(fit.stderr)
    return float(fit.slope), float(stats.t.ppf(0.975, len(x) - 2)) * error


def slope_of(curve: Curve) -> tuple[float, float]:
    """Slope of the straight line through a curve, with half its 95 % interval."""
    depths = [depth for depth in sorted(curve) if depth >= 2]
    return _line(depths, [curve[depth] for depth in depths])


def growth_exponent(curve: Curve) -> Measured:
    """Exponent p in kappa(2L) - kappa(L) ~ L^p, with the 95 % interval of the fit."""
    pairs = [(d, curve[2 * d] - curve[d]) for d in sorted(curve) if d >= 2 and 2 * d in curve]
    pairs = [(depth, rise) for depth, rise in pairs if _doubling(depth)]
    return _power_law(pairs, f"L = {pairs[0][0]} ... {2 * pairs[-1][0]}" if pairs else "")


def _doubling(depth: int) -> bool:
    return depth & (depth - 1) == 0


def power_law(curve: Curve, label: str = "", symbol: str = "L") -> Measured:
    """Exponent p in value ~ L^p, with the 95 % interval of the fit; ``symbol`` is what L is."""
    pairs = sorted(curve.items())
    depths = f"{symbol} = {pairs[0][0]} ... {pairs[-1][0]}" if pairs else ""
    return _power_law(pairs, ", ".join(text for text in (label, depths) if text))


def _power_law(pairs: Sequence[tuple[int, float]], run: str) -> Measured:
    if len(pairs) < 3 or any(not 0 < value < math.inf for _, value in pairs):
        return Measured(math.nan, run=run)
    found, half = _line([math.log(d) for d, _ in pairs], [math.log(v) for _, v in pairs])
    return Measured(found, found - half, found + half, run=run)


def ratio_of_groups(
    values: Sequence[float] | Array,
    others: Sequence[float] | Array,
    *,
    confidence: float = 0.95,
    run: str = "",
) -> Measured:
    """By what factor one group of independent runs lies above another (Hodges and Lehmann).

    Parameters
    ----------
    values, others : sequence of float
        A number for each run, not negative. A run that diverged enters as infinity.
    confidence : float
        Of the enclosure, at least.
    run : str
        As in :class:`~experiments.claims.Measured`.

    Returns
    -------
    Measured
        The median of all ratios of a value to another, and the order statistics of these ratios
        that the exact Mann-Whitney test gives: the enclosure leaves out 1 where that test sees a
        difference. It assumes no law, so that runs that are better or worse than the others by
        orders of magnitude, or diverge, count no more than their rank. Fewer than four runs
        against four give no enclosure at 95 %. The ratio is NaN if a number is, or if runs of both
        groups diverge.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.sort(
            np.divide.outer(np.asarray(values, float), np.asarray(others, float)), None
        )
    count = len(values) + len(others)
    if not len(ratios) or np.isnan(ratios).any():
        return Measured(math.nan, num_runs=count, run=run)
    # The median of an even number of ratios lies between two: at their geometric mean.
    middle = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
    value = float(middle[0]) if middle[0] == middle[1] else math.sqrt(middle[0] * middle[1])
    place = _rank(len(values), len(others), (1 - confidence) / 2)
    low, high = (ratios[place - 1], ratios[-place]) if place else (0.0, math.inf)
    return Measured(value, float(low), float(high), num_runs=count, run=run)


@dataclass(frozen=True)
class Rate(Measured):
    """A rate of success, with the counts behind it.

    Parameters
    ----------
    successes, undecided : int
        Among ``num_runs`` runs.
    confidence : float
        Of the enclosure.
    """

    successes: int = 0
    undecided: int = 0
    confidence: float = 0.95


def rate_of(
    successes: int, runs: int, *, undecided: int = 0, confidence: float = 0.95, run: str = ""
) -> Rate:
    """Rate of success of independent runs, with the exact interval of Clopper and Pearson.

    Parameters
    ----------
    successes, runs : int
    undecided : int
        Runs of which it is not known: the lower end takes them as failures, the upper one as
        successes, and the value is that without them.
    confidence : float
        Of the interval, at least.
    run : str
        As in :class:`~experiments.claims.Measured`.

    Returns
    -------
    Rate
        NaN without any decided run.
    """
    if not 0 <= successes <= successes + undecided <= runs:
        msg = f"{successes} successes and {undecided} undecided runs among {runs}"
        raise ValueError(msg)
    counts: dict[str, Any] = {
        "num_runs": runs, "run": run, "successes": successes, "undecided": undecided,
        "confidence": confidence,
    }  # fmt: skip
    if undecided == runs:
        return Rate(math.nan, **counts)
    tail, most = (1 - confidence) / 2, successes + undecided
    low = stats.beta.ppf(tail, successes, runs - successes + 1) if successes else 0.0
    high = stats.beta.isf(tail, most + 1, runs - most) if most < runs else 1.0
    value = successes / (runs - undecided)
    return Rate(value, float(low), float(high), **counts)


def difference_of_rates(rate: Rate, other: Rate, *, run: str = "") -> Measured:
    """How far one rate lies above another, of independent runs, each with its interval.

    The distances of the ends to the values are combined by the square root of their squares
    (Newcombe, Statistics in Medicine 17, 1998, with other intervals of the two). That is for
    errors of sampling, which are independent. Runs that are not decided are none: for the lower
    end those of the first are failures and those of the other successes, for the upper end the
    other way round.
    """
    value = rate.value - other.value
    runs = rate.num_runs + other.num_runs
    if math.isnan(value):
        return Measured(math.nan, num_runs=runs, run=run)
    least, other_least = (_without_open(one, open_won=False) for one in (rate, other))
    most, other_most = (_without_open(one, open_won=True) for one in (rate, other))
    low, high = least.value - other_most.value, most.value - other_least.value
    low -= math.hypot(least.value - least.enclosure[0], other_most.enclosure[1] - other_most.value)
    high += math.hypot(most.enclosure[1] - most.value, other_least.value - other_least.enclosure[0])
    return Measured(value, low, high, num_runs=runs, run=run)


def _without_open(rate: Rate, *, open_won: bool) -> Rate:
    """The same runs if those that are not decided had all succeeded, or all failed."""
    won = rate.successes + (rate.undecided if open_won else 0)
    return rate_of(won, rate.num_runs, confidence=rate.confidence)


def mann_whitney_law(size: int, other: int) -> Array:
    """Probabilities of the Mann-Whitney statistic 0 ... size * other, if two laws are the same.

    They are the coefficients of a Gaussian binomial (Mann and Whitney, Ann. Math. Statist. 18,
    1947): of the product over i of (1 - q^(other + i)) / (1 - q^i).
    """
    # The law is symmetric, and in its second half the differences would cancel.
    half = np.zeros(size * other // 2 + 1)
    half[0] = 1
    for i in range(1, size + 1):
        half[other + i :] -= half[: max(len(half) - other - i, 0)].copy()
        rows = np.pad(half, (0, -len(half) % i)).reshape(-1, i)
        half = rows.cumsum(axis=0).ravel()[: len(half)]
    law = half / math.comb(size + other, size)
    return np.concatenate([law, law[::-1][1 - (size * other) % 2 :]])


@functools.lru_cache(maxsize=64)
def _rank(size: int, other: int, tail: float) -> int:
    """How many of the sorted ratios on a side lie outside the enclosure; exact for small groups."""
    if size * other <= _EXACT:
        below = np.cumsum(mann_whitney_law(size, other))
        return int(np.searchsorted(below, tail, side="right"))
    # The normal law, with the half that a whole number is rounded by.
    mean, variance = size * other / 2, size * other * (size + other + 1) / 12
    return math.floor(mean + 0.5 + float(stats.norm.ppf(tail)) * math.sqrt(variance))
