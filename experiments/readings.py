"""From stored cells to measurements: estimates, laws in depth, and means of several runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.claims import Measured

# A value at each depth.
Curve = Mapping[int, float]


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


def growth_exponent(curve: Curve, label: str = "") -> Measured:
    """Exponent p in kappa(2L) - kappa(L) ~ L^p, with the 95 % interval of the fit."""
    pairs = [(d, curve[2 * d] - curve[d]) for d in sorted(curve) if d >= 2 and 2 * d in curve]
    pairs = [(depth, rise) for depth, rise in pairs if _doubling(depth)]
    last = 2 * pairs[-1][0] if pairs else 0
    return _power_law(pairs, label, last)


def power_law(curve: Curve, label: str = "") -> Measured:
    """Exponent p in value ~ L^p, with the 95 % interval of the fit."""
    pairs = sorted(curve.items())
    return _power_law(pairs, label, pairs[-1][0] if pairs else 0)


def _power_law(pairs: Sequence[tuple[int, float]], label: str, last: int) -> Measured:
    run = f"L = {pairs[0][0]} ... {last}" if pairs else ""
    run = f"{label}, {run}" if label else run
    if len(pairs) < 3 or any(not 0 < value < math.inf for _, value in pairs):
        return Measured(math.nan, run=run)
    fit = stats.linregress(np.log([p[0] for p in pairs]), np.log([p[1] for p in pairs]))
    half = float(stats.t.ppf(0.975, len(pairs) - 2) * fit.stderr)
    return Measured(float(fit.slope), fit.slope - half, fit.slope + half, run=run)


def _doubling(depth: int) -> bool:
    return depth & (depth - 1) == 0


def slope_of(curve: Curve) -> tuple[float, float]:
    """Slope of the straight line through a curve, with half its 95 % interval."""
    depths = [depth for depth in sorted(curve) if depth >= 2]
    fit = stats.linregress(depths, [curve[depth] for depth in depths])
    return float(fit.slope), float(stats.t.ppf(0.975, len(depths) - 2) * fit.stderr)


def ratio_of_groups(
    values: Sequence[float], others: Sequence[float], *, confidence: float = 0.95, **more: Any
) -> Measured:
    """Geometric mean of some runs over that of others, which were drawn independently.

    Parameters
    ----------
    values, others : sequence of float
        A positive number for each run. A run that diverged enters as infinity.
    confidence : float
        Of the enclosure.
    **more
        For :class:`~experiments.claims.Measured`.

    Returns
    -------
    Measured
        The enclosure is that of Welch's t for the difference of the mean logarithms. A group with a
        diverged run decides by itself: the ratio is then 0, infinite, or, if both have one,
        unknown. So it is if a number is not positive; where a group has a single run, nothing
        bounds it.
    """
    more = {"num_runs": len(values) + len(others), **more}
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log(np.asarray(group, dtype=float)) for group in (values, others)]
    if any(not len(group) or np.isnan(group).any() or (group == -np.inf).any() for group in logs):
        return Measured(math.nan, **more)
    diverged = [bool(np.isinf(group).any()) for group in logs]
    if any(diverged):
        both, first = all(diverged), diverged[0]
        return Measured(math.nan if both else math.inf if first else 0.0, **more)
    gap = float(logs[0].mean() - logs[1].mean())
    if min(len(group) for group in logs) < 2:
        return Measured(math.exp(gap), 0.0, math.inf, **more)
    shares = [float(group.var(ddof=1)) / len(group) for group in logs]
    half = 0.0
    if sum(shares) > 0:
        freedom = sum(shares) ** 2 / sum(
            share**2 / (len(group) - 1) for share, group in zip(shares, logs, strict=True)
        )
        half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(sum(shares))
    return Measured(math.exp(gap), math.exp(gap - half), math.exp(gap + half), **more)
