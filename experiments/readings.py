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


def growth_exponent(curve: Curve, **more: Any) -> Measured:
    """Exponent p in kappa(2L) - kappa(L) ~ L^p, with the 95 % interval of the fit."""
    pairs = [(d, curve[2 * d] - curve[d]) for d in sorted(curve) if d >= 2 and 2 * d in curve]
    pairs = [(depth, rise) for depth, rise in pairs if _doubling(depth)]
    if len(pairs) < 3 or any(not rise > 0 for _, rise in pairs):
        return Measured(math.nan, **more)
    fit = stats.linregress(np.log([p[0] for p in pairs]), np.log([p[1] for p in pairs]))
    half = float(stats.t.ppf(0.975, len(pairs) - 2) * fit.stderr)
    run = f"L = {pairs[0][0]} ... {2 * pairs[-1][0]}"
    return Measured(float(fit.slope), fit.slope - half, fit.slope + half, run=run, **more)


def _doubling(depth: int) -> bool:
    return depth & (depth - 1) == 0


def slope_of(curve: Curve) -> tuple[float, float]:
    """Slope of the straight line through a curve, with half its 95 % interval."""
    depths = [depth for depth in sorted(curve) if depth >= 2]
    fit = stats.linregress(depths, [curve[depth] for depth in depths])
    return float(fit.slope), float(stats.t.ppf(0.975, len(depths) - 2) * fit.stderr)


def ratio_of_means(
    values: Sequence[float], others: Sequence[float], *, confidence: float = 0.95, **more: Any
) -> Measured:
    """Mean of some runs over the mean of others, which were drawn independently.

    Parameters
    ----------
    values, others : sequence of float
        One number for each run, not negative. A run that diverged enters as infinity.
    confidence : float
        Of the enclosure.
    **more
        For :class:`~experiments.claims.Measured`.

    Returns
    -------
    Measured
        The enclosure is that of Welch's t for the difference of the means, divided by the second
        mean: so it contains 1 exactly where that test sees no difference. A mean that is infinite
        decides by itself: the ratio is then 0, infinite, or, if both are, unknown. So it is where
        both groups have a single run, and where the second mean is 0.
    """
    runs = [np.asarray(group, dtype=float) for group in (values, others)]
    more = {"num_runs": len(values) + len(others), **more}
    if any(not len(group) or np.isnan(group).any() for group in runs):
        return Measured(math.nan, **more)
    mean, other = (float(group.mean()) for group in runs)
    if math.isinf(mean) or math.isinf(other):
        ratio = math.nan if math.isinf(mean) and math.isinf(other) else mean / other
        return Measured(ratio, **more)
    if other == 0:
        return Measured(math.nan, **more)
    if min(len(group) for group in runs) < 2:
        return Measured(mean / other, -math.inf, math.inf, **more)
    shares = [float(group.var(ddof=1)) / len(group) for group in runs]
    half = 0.0
    if sum(shares) > 0:
        freedom = sum(shares) ** 2 / sum(
            share**2 / (len(group) - 1) for share, group in zip(shares, runs, strict=True)
        )
        half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(sum(shares)) / other
    return Measured(mean / other, mean / other - half, mean / other + half, **more)
