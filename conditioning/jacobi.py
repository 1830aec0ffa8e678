"""Jacobi matrices: what a Lanczos run knows about a spectral measure, and what follows from it.

A run from a unit vector ``b`` yields the recurrence coefficients of the polynomials
``p_0, p_1, ..., p_k`` that are orthonormal in the measure ``mu = sum_i (u_i . b)^2
delta(lambda_i)``. Everything here is about that measure and is exact (up to rounding):

* Christoffel: a point ``x`` has mass at most ``1 / (p_0(x)^2 + ... + p_k(x)^2)``.
* ``p_j`` is real-rooted, so ``log |p_j|`` is concave between its roots, and an interval free
  of its roots is bounded from below by its two ends. Sturm counts say which ones are free.
* Chebyshev-Markov-Stieltjes: ``mu((-inf, t])`` differs from that of the Gauss rule by at most
  the same ``1 / sum_j p_j(t)^2``.

References
----------
N. I. Akhiezer, The Classical Moment Problem, 1965, chapter 2. G. H. Golub, G. Meurant,
Matrices, Moments and Quadrature, 2010, chapters 3 and 6. B. N. Parlett, The Symmetric
Eigenvalue Problem, 1998, chapters 3 and 7.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

_HUGE = 1e100


def first_beyond(top: float, scale: float, passes: Callable[[float], bool]) -> float:
    """Where a condition that holds from some point to the right of ``top`` on surely holds.

    From above, closer than a tenth of a percent of the distance; infinite if it does not hold
    a million scales away.
    """
    scale = max(scale, 1e-300)
    low, high = 1e-17, 1e6
    for _ in range(3):
        steps = [float(step) for step in np.geomspace(low, high, 200)]
        first = bisect_left(steps, True, key=lambda step: passes(top + scale * step))
        if first == len(steps):
            return float("inf")
        high = steps[first]
        low = steps[first - 1] if first else high / 2
    return top + scale * high


@dataclass(frozen=True)
class JacobiMatrix:
    """A symmetric tridiagonal matrix and the residual norm that continues it.

    Parameters
    ----------
    diagonal : ndarray of shape (k,)
    off_diagonal : ndarray of shape (k - 1,)
        Positive.
    residual_norm : float
        The next off-diagonal entry; zero (to rounding) when the Krylov space is closed.
    """

    diagonal: Array
    off_diagonal: Array
    residual_norm: float

    @property
    def size(self) -> int:
        """Number of steps ``k``."""
        return len(self.diagonal)

    def dense(self) -> Array:
        """The matrix, shape ``(k, k)``."""
        return (
            np.diag(self.diagonal) + np.diag(self.off_diagonal, 1) + np.diag(self.off_diagonal, -1)
        )

    def mirrored(self) -> JacobiMatrix:
        """The matrix of ``-A``: what holds on the left of zero, read on the right."""
        return self._mirror

    @cached_property
    def _mirror(self) -> JacobiMatrix:
        mirror = JacobiMatrix(-self.diagonal, self.off_diagonal, self.residual_norm)
        # -T = S (T with its diagonal negated) S, S = diag(1, -1, 1, ...): nothing to solve again.
        values, vectors = self._eigh
        signs = np.where(np.arange(self.size) % 2, -1.0, 1.0)[:, None]
        mirror.__dict__["_eigh"] = (-values[::-1], (signs * vectors)[:, ::-1])
        return mirror

    @cached_property
    def _eigh(self) -> tuple[Array, Array]:
        from scipy.linalg import eigh_tridiagonal  # slow to import

        values, vectors = eigh_tridiagonal(self.diagonal, self.off_diagonal)
        return np.asarray(values), np.asarray(vectors)

    @property
    def ritz_values(self) -> Array:
        """Eigenvalues, ascending, shape ``(k,)``."""
        return self._eigh[0]

    @property
    def ritz_vectors(self) -> Array:
        """Eigenvectors in the Krylov basis, shape ``(k, k)``."""
        return self._eigh[1]

    @property
    def weights(self) -> Array:
        """Gauss weights: squared first components, shape ``(k,)``."""
        return np.asarray(self._eigh[1][0] ** 2)

    @property
    def residual_norms(self) -> Array:
        """Residual norm of every Ritz pair: an eigenvalue lies that near (Weinstein)."""
        return np.asarray(self.residual_norm * np.abs(self._eigh[1][-1]))

    @property
    def scale(self) -> float:
        """Largest Ritz value in magnitude: never more than the spectral radius."""
        values = self.ritz_values  # ascending
        return max(abs(float(values[0])), abs(float(values[-1])))

    def rounding_growth(self) -> float:
        """By how much errors of size one in every product can have grown in the residual.

        Within an eigenspace of several dimensions the errors leave the start vector's
        direction and follow the recurrence like a start of their own; this is the root sum of
        squares over the steps, at the worst Ritz value. Infinite where it overflows.
        """
        points = self.ritz_values
        previous = current = np.zeros((0, self.size))
        with np.errstate(over="ignore", invalid="ignore"):
            for j in range(self.size):
                lower = self.off_diagonal[j - 1] if j else 0.0
                following = (points - self.diagonal[j]) * current - lower * previous
                divisor = self.off_diagonal[j] if j < self.size - 1 else 1.0
                previous = np.vstack([current, np.zeros((1, self.size))])
                current = np.vstack([following, np.ones((1, self.size))]) / divisor
            worst = float(np.sqrt((current**2).sum(axis=0).max()))
        return worst if np.isfinite(worst) else float("inf")

    # -- point masses -----------------------------------------------------------------------

    def inverse_mass(self, points: Array) -> tuple[Array, Array]:
        """Bounds of ``sum_j p_j(x)^2`` at sorted ``points`` and on the intervals between them.

        Parameters
        ----------
        points : ndarray of shape (m,)
            Ascending.

        Returns
        -------
        at : ndarray of shape (m,)
            The sums. The mass of ``points[i]`` is at most ``1 / at[i]``.
        between : ndarray of shape (m - 1,)
            The mass of any point of ``[points[i], points[i + 1]]`` is at most
            ``1 / between[i]``: a proof for the whole interval, not a sample.
        """
        values, before = self._polynomials(points)
        squares = values * values
        # A zero counts as a sign change, so that a root at a point belongs to one side.
        changes = (values * np.sign(before) < 0) | (values == 0)
        counts = np.cumsum(changes, axis=0)
        free = counts[:, 1:] == counts[:, :-1]
        smaller = np.minimum(squares[:, 1:], squares[:, :-1])
        return 1 + squares.sum(axis=0), 1 + np.where(free, smaller, 0.0).sum(axis=0)

    def _polynomials(self, points: Array) -> tuple[Array, Array]:
        """``p_1, ..., p_k`` at the points, row by row, and what went into each, of its sign."""
        off = self._divisors
        shifted = points - self.diagonal[:, None]
        values, before = np.empty_like(shifted), np.empty_like(shifted)
        previous, current = np.zeros_like(points), np.ones_like(points)
        for j in range(self.size):
            before[j] = current
            following = (shifted[j] * current - off[j] * previous) / off[j + 1]
            previous, current = current, following
            values[j] = current
            if float(np.abs(current).max()) > _HUGE:
                # Scaling down both terms keeps signs and leaves a valid, smaller lower bound.
                shrink = np.where(np.abs(current) > _HUGE, 1 / _HUGE, 1.0)
                current, previous = current * shrink, previous * shrink
        return values, before

    @cached_property
    def _divisors(self) -> Array:
        """Off-diagonal entries between a zero and the residual norm, shape ``(k + 1,)``."""
        # A residual that is too small to divide by may be taken larger: the bound stays a bound.
        floor = 1e-20 * float(np.abs(self.diagonal).max()) + 1e-290
        return np.concatenate([[0.0], self.off_diagonal, [max(self.residual_norm, floor)]])

    def excluded_until(
        self, begin: float, end: float, inverse_mass: float, resolution: float = 1e-4
    ) -> float:
        """Largest ``x <= end`` found such that no point of ``[begin, x]`` can carry a given mass.

        Parameters
        ----------
        begin, end : float
            ``0 < begin <= end``. Use ``mirrored`` for the negative axis.
        inverse_mass : float
            One over the mass that an eigenvalue is known to have.
        resolution : float
            Relative accuracy to which the end is searched; what is returned is proved.

        Returns
        -------
        float
            At least ``begin``; equal to ``begin`` when nothing can be excluded there.
        """
        if end <= begin:
            return begin
        return self._march(begin, end, inverse_mass, resolution, [60])

    def _march(
        self, begin: float, end: float, wanted: float, resolution: float, budget: list[int]
    ) -> float:
        budget[0] -= 1
        points = np.geomspace(begin, end, 65)
        points[0], points[-1] = begin, end
        at, between = self.inverse_mass(points)
        for i in np.flatnonzero(between <= wanted):
            left, right = float(points[i]), float(points[i + 1])
            # Where the point itself may carry the mass, a finer mesh cannot help.
            if at[i] <= wanted or right <= left * (1 + resolution) or budget[0] <= 0:
                return left
            reached = self._march(left, right, wanted, resolution, budget)
            if reached < right:
                return reached
        return end

    def right_end(self, inverse_mass: float) -> float:
        """An ``x`` such that no point of ``[x, inf)`` can carry a given mass.

        To the right of the largest Ritz value every ``p_j`` grows, so the sum of squares
        is monotone and one crossing bounds the whole half line.
        """
        return first_beyond(
            float(self.ritz_values[-1]),
            self.scale,
            lambda point: self._excludes(point, inverse_mass),
        )

    def excludes_beyond(self, point: float, inverse_mass: float) -> bool:
        """Whether ``right_end`` is at most ``point``, without searching for it."""
        return bool(point > self.ritz_values[-1]) and self._excludes(point, inverse_mass)

    def _excludes(self, point: float, inverse_mass: float) -> bool:
        # ``inverse_mass`` at one point: in floats, an array of one entry costs ten times as much.
        off = self._divisors.tolist()
        previous, current, total = 0.0, 1.0, 1.0
        for j, diagonal in enumerate(self.diagonal.tolist()):
            following = ((point - diagonal) * current - off[j] * previous) / off[j + 1]
            previous, current = current, following
            total += current * current
            if total > inverse_mass:
                return True
        return False

    # -- cumulated mass ---------------------------------------------------------------------

    @cached_property
    def _gauss_sums(self) -> Array:
        sums = np.concatenate([[0.0], np.cumsum(self.weights)])
        return np.asarray(np.minimum(sums, 1.0))

    def cumulated(self, points: Array) -> tuple[Array, Array]:
        """Bounds ``low <= mu((-inf, t))`` and ``mu((-inf, t]) <= high`` at sorted points.

        The Gauss rule and the measure agree in ``2 k`` moments, so at every ``t`` their
        cumulated masses differ by at most the Christoffel number of ``t``, and at most by the
        weights of the neighbouring nodes (separation theorem).
        """
        index = np.searchsorted(self.ritz_values, points, side="right")
        here = self._gauss_sums[index]
        width = 1 / (1 + (self._polynomials(points)[0] ** 2).sum(axis=0))
        low = np.maximum(self._gauss_sums[np.maximum(index - 1, 0)], here - width)
        high = np.minimum(self._gauss_sums[np.minimum(index + 1, self.size)], here + width)
        # The measure is monotone, so a bound at one point is a bound further on.
        return (
            np.maximum.accumulate(np.maximum(low, 0.0)),
            np.minimum.accumulate(high[::-1])[::-1],
        )
