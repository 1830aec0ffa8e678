"""From random probes to counts of eigenvalues: bounds that hold with a stated probability.

For a Gaussian probe ``g`` and a set ``S`` that holds ``m`` of the ``n`` eigenvalues, the share
``sum_{i in S} (u_i . g)^2 / ||g||^2`` is distributed as Beta(m / 2, (n - m) / 2), exactly, and
for ``p`` probes pooled as Beta(p m / 2, p (n - m) / 2). A Lanczos run encloses the share
(Gauss-Radau), the Beta law turns the share into a count. Nothing else is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conditioning.jacobi import Array, JacobiMatrix
from conditioning.spectrum.results import Estimate


@dataclass(frozen=True)
class Probe:
    """One finished Lanczos run from a Gaussian vector."""

    jacobi: JacobiMatrix
    squared_norm: float
    guard: float


def _beta_quantile(share: float, a: float, b: float, *, upper: bool = False) -> float:
    """Quantile of a beta distribution, counted from above with ``upper``."""
    from scipy.special import betainccinv, betaincinv  # slow to import, scipy.stats slower still

    return float((betainccinv if upper else betaincinv)(a, b, share))


def inverse_weight(size: int, failure_probability: float) -> float:
    """One over the share that a fixed eigenvector has in a random vector.

    At least, but with the given probability: the quantile of Beta(1/2, (n - 1)/2).
    """
    if size == 1:
        return 1.0
    floor = np.pi * failure_probability**2 / (2 * size)  # never above the quantile
    quantile = _beta_quantile(failure_probability, 0.5, (size - 1) / 2)
    return float(1 / max(quantile, floor))


class SpectralMeasure:
    """What several probes know about the distribution of all ``n`` eigenvalues."""

    def __init__(self, probes: Sequence[Probe], size: int) -> None:
        self.probes = tuple(probes)
        self.size = size
        total = sum(p.squared_norm for p in self.probes)
        self._shares = [p.squared_norm / total for p in self.probes]

    # -- shares -----------------------------------------------------------------------------

    def cumulated(self, points: Array) -> tuple[Array, Array]:
        """Bounds of the pooled share of eigenvalues below and up to each of sorted ``points``."""
        low, high = np.zeros(len(points)), np.zeros(len(points))
        for share, probe in zip(self._shares, self.probes, strict=True):
            low += share * probe.jacobi.cumulated(points - probe.guard)[0]
            high += share * probe.jacobi.cumulated(points + probe.guard)[1]
        return low, np.minimum(high, 1.0)

    def within(self, radii: Array) -> tuple[Array, Array]:
        """Bounds of the pooled share with ``|lambda| < r`` and ``|lambda| <= r``, ``r`` sorted."""
        left = self.cumulated(-radii[::-1])
        right = self.cumulated(radii)
        low = np.maximum(right[0] - left[1][::-1], 0.0)
        high = np.minimum(right[1] - left[0][::-1], 1.0)
        return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]

    def some_within(self, threshold: float) -> float:
        """A radius that surely has an eigenvalue with ``threshold < |lambda| < radius``.

        Its share exceeds all that may lie within the threshold: certain, whatever the probes are.
        Infinite where none is found.
        """
        scale = max(p.jacobi.scale for p in self.probes)
        if not 0 < threshold < scale:
            return math.inf
        radii = np.geomspace(threshold, 2 * scale, 1000)
        low, high = self.within(radii)
        found = np.flatnonzero(low > high[0] + 1e-12)
        return float(radii[found[0]]) if len(found) else math.inf

    def nodes(self, absolute: bool) -> tuple[Array, Array]:
        """Pooled Gauss nodes, ascending, with weights that sum to one."""
        nodes = np.concatenate([p.jacobi.ritz_values for p in self.probes])
        weights = np.concatenate(
            [s * p.jacobi.weights for s, p in zip(self._shares, self.probes, strict=True)]
        )
        nodes = np.abs(nodes) if absolute else nodes
        order = np.argsort(nodes)
        return nodes[order], weights[order] / weights.sum()

    # -- counts -----------------------------------------------------------------------------

    def _law(self, count: int) -> tuple[float, float]:
        pooled = len(self.probes) / 2
        return pooled * count, pooled * (self.size - count)

    def count_below(self, share_high: float, failure_probability: float) -> int:
        """Largest count that a share of at most ``share_high`` still allows."""
        low, high = 0, self.size
        while low < high:  # counts above the answer are rejected, monotonically
            middle = (low + high + 1) // 2
            if middle == self.size:
                rejected = share_high < 1 - 1e-12
            else:
                law = self._law(middle)
                rejected = share_high < _beta_quantile(failure_probability, *law)
            low, high = (low, middle - 1) if rejected else (middle, high)
        return low

    def count_above(self, share_low: float, failure_probability: float) -> int:
        """Smallest count that a share of at least ``share_low`` still allows."""
        return self.size - self.count_below(1 - share_low, failure_probability)

    def count(self, shares: tuple[float, float], failure_probability: float) -> Estimate:
        """Number of eigenvalues in a set whose pooled share lies between two bounds."""
        low = self.count_above(shares[0], failure_probability / 2)
        high = self.count_below(shares[1], failure_probability / 2)
        value = self.size * (shares[0] + shares[1]) / 2
        return Estimate(float(np.clip(value, low, high)), float(low), float(high))

    def count_at(self, point: float, failure_probability: float) -> Estimate:
        """Number of eigenvalues up to ``point``, enclosed."""
        low, high = self.cumulated(np.array([point]))
        return self.count((float(low[0]), float(high[0])), failure_probability)

    # -- quantiles --------------------------------------------------------------------------

    def quantile(self, q: float, failure_probability: float, *, absolute: bool) -> Estimate:
        """The ``q``-quantile of all eigenvalues (linear interpolation, as NumPy's), enclosed.

        Parameters
        ----------
        q : float
            Between 0 and 1.
        failure_probability : float
            Of both ends together.
        absolute : bool
            Of ``|lambda|`` instead of ``lambda``.
        """
        for probe in self.probes:
            if probe.jacobi.size == self.size:  # the run went through: these are all of them
                ritz = probe.jacobi.ritz_values
                exact = float(np.quantile(np.abs(ritz) if absolute else ritz, q))
                error = probe.guard + float(probe.jacobi.residual_norms.max())
                low = max(exact - error, 0.0) if absolute else exact - error
                return Estimate(exact, low, exact + error)
        position = q * (self.size - 1)
        below = int(np.floor(position + 1e-9))
        above = min(below if position - below < 1e-9 else below + 1, self.size - 1)
        allowed = failure_probability / 2
        most = (
            _beta_quantile(allowed, *self._law(below + 1)) if below + 1 < self.size else 1 - 1e-12
        )
        least = _beta_quantile(allowed, *self._law(above), upper=True) if above else 0.0
        low = high = math.inf
        radius = max(p.jacobi.scale + p.guard for p in self.probes) * 1.1
        if radius == 0:
            return Estimate(0.0, 0.0, 0.0)
        points = np.geomspace(1e-14 * radius, radius, 1500)
        points = np.concatenate([[0.0], points] if absolute else [-points[::-1], [0.0], points])
        shares = self.within if absolute else self.cumulated
        for _ in range(2):
            share_low, share_high = shares(points)
            # Below `low` there are surely at most `below` eigenvalues: it bounds the quantile.
            fewer = np.flatnonzero(share_high < most)
            # At most `high` there are surely more than `above` of them.
            enough = np.flatnonzero(share_low > least)
            low = float(points[fewer[-1]]) if len(fewer) else (0.0 if absolute else -math.inf)
            high = float(points[enough[0]]) if len(enough) else math.inf
            # Once more, with a fine mesh on the cells where the tests turned.
            cells = [fewer[-1:], enough[:1] - 1]
            fine = [
                np.linspace(points[i], points[i + 1], 60)
                for i in np.concatenate(cells)
                if 0 <= i < len(points) - 1
            ]
            points = np.unique(np.concatenate([points[:1], *fine, points[-1:]]))
        nodes, weights = self.nodes(absolute)
        middle = np.cumsum(weights) - weights / 2
        value = float(np.interp(q, middle, nodes))
        return Estimate(float(np.clip(value, low, high)), low, high)
