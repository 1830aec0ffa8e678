"""Ritz pairs put aside by the runs of ``eigenvalues``, with the residuals that they share.

A Lanczos run on what is left beside orthonormal columns ``V`` ends with Ritz vectors ``X`` and one
residual vector ``q``: beside ``V``, ``A X = X T + q s^T``. Kept is ``A V = V M + Q S`` with ``V^T Q
= 0``, one column of ``Q`` for each run. With ``E = V^T A X = S^T Q^T X`` a further run adds ::

    A [V, X] = [V, X] [[M, E], [E^T, T]] + [Q - X X^T Q, q] [[S, 0], [0, s^T]]

so that Rayleigh-Ritz on everything that was found, and the residuals of that, take no product.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from conditioning.jacobi import Array
from conditioning.krylov.vectors import inner
from conditioning.operators.base import LinearOperator


class SharedPairs:
    """Orthonormal Ritz vectors of several runs, best first; the ``k`` first ones are wanted.

    Those behind them are kept for what they do to a run beside them: it does not see them, so
    that the wanted values lie further from what it sees. They need not have converged.
    """

    def __init__(
        self, operator: LinearOperator, k: int, extra: int, key: Callable[[Array], Array]
    ) -> None:
        self._operator = operator
        self.k, self.extra, self.key = k, extra, key
        empty = torch.empty(operator.local_size, 0, dtype=torch.float64, device=operator.device)
        self.vectors, self._tails = empty, empty
        self.values: Array = np.empty(0)
        self._shares: Array = np.empty((0, 0))
        self.rounding = 0.0
        self._behind = 0.0

    def add(
        self, vectors: Tensor, values: Array, tail: Tensor, shares: Array, guard: float
    ) -> None:
        """Put Ritz pairs of one run beside all these aside; keep the best.

        Parameters
        ----------
        vectors : Tensor of shape (n, l)
        values : ndarray of shape (l,)
        tail : Tensor of shape (n,)
            The unit vector along which all residuals of the run lie.
        shares : ndarray of shape (l,)
            Residuals as multiples of it.
        guard : float
            Rounding of the run.
        """
        new, device = len(values), vectors.device
        overlap = inner(self._operator, self._tails, vectors)
        coupling = self._shares.T @ overlap.cpu().numpy()
        projected = np.block([[np.diag(self.values), coupling], [coupling.T, np.diag(values)]])
        found, turn = np.linalg.eigh(projected)
        order = np.argsort(-self.key(found), kind="stable")[: self.k + self.extra]
        turn = turn[:, order]
        together = torch.cat([self.vectors, vectors], dim=1)
        self.vectors = together @ torch.from_numpy(turn.copy()).to(device)
        self.values = found[order]
        self._tails = torch.cat([self._tails - vectors @ overlap.T, tail[:, None]], dim=1)
        old = self._shares
        blocks = [[old, np.zeros((len(old), new))], [np.zeros((1, old.shape[1])), shares[None]]]
        self._shares = np.block(blocks) @ turn
        self.rounding += guard
        self._behind = self._coupling(slice(self.k, None))

    def narrow(self) -> bool:
        """Keep the wanted pairs alone; whether there were others."""
        if len(self.values) <= self.k:
            return False
        self.vectors, self.values = self.vectors[:, : self.k].clone(), self.values[: self.k]
        self._shares, self._behind = self._shares[:, : self.k], 0.0
        return True

    @property
    def full(self) -> bool:
        """Whether there are as many as are wanted."""
        return len(self.values) >= self.k

    @property
    def floor(self) -> float:
        """Key of the last wanted one."""
        return float(self.key(self.values[: self.k]).min()) if self.full else -np.inf

    def _roots(self, wanted: slice) -> Array:
        """A matrix with the same Gram matrix as the residuals of some pairs."""
        gram = inner(self._operator, self._tails, self._tails).cpu().numpy()
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
        return np.asarray(root @ self._shares[:, wanted])

    def residuals(self) -> tuple[Array, float]:
        """Residual norm of every wanted pair, and the spectral norm of all together."""
        wanted = slice(0, self.k)
        return np.linalg.norm(self._roots(wanted), axis=0), self._coupling(wanted)

    def target(self, limit: float) -> float:
        """What ``beyond`` takes to ``limit``; minus infinity where nothing does."""
        if len(self.values) <= self.k:
            return limit
        room = limit - float(self.key(self.values[self.k :]).max())
        return limit - self._behind**2 / room if room > 0 else -np.inf

    def _coupling(self, wanted: slice) -> float:
        roots = self._roots(wanted)
        return float(np.linalg.norm(roots, 2)) if roots.size else 0.0

    def beyond(self, outer: float) -> float:
        """Largest key beside the wanted pairs, where it is ``outer`` beside all pairs.

        ``|x^T A x| <= a |x_1|^2 + 2 r |x_1| |x_2| + outer |x_2|^2`` with ``a`` the largest key of
        the pairs behind the wanted ones and ``r`` the norm of their residuals.
        """
        if len(self.values) <= self.k or not np.isfinite(outer):
            return outer
        largest = float(self.key(self.values[self.k :]).max())
        return joined(largest, outer, self._behind)


def joined(first: float, second: float, coupling: float) -> float:
    """Larger eigenvalue of ``[[first, coupling], [coupling, second]]``."""
    half = (first - second) / 2
    return (first + second) / 2 + float(np.hypot(half, coupling))


def num_worth_keeping(keys: Array, shares: Array, k: int, limit: float, extra: int) -> int:
    """How many pairs behind the ``k`` wanted ones a run beside them gains most from.

    With ``m`` of them away the run has to exclude what lies above ``limit - r^2 / (limit - a)``
    (:meth:`SharedPairs.beyond`), and sees hardly anything above the last of them: the wider the
    gap between the two, the fewer the products. Only those that are told apart from the next one
    by more than their residual count: below, any number may lie between two Ritz values. A wrong
    guess costs products, never the certificate.

    Parameters
    ----------
    keys, shares : ndarray
        Of all pairs of a run, best first: keys, and residuals as multiples of one vector.
    k : int
    limit : float
        Key beyond which nothing is to be missed.
    extra : int
        Pairs at most.
    """
    if len(keys) <= k or limit <= keys[k]:
        return 0
    told_apart = np.abs(shares[k:-1]) < keys[k:-1] - keys[k + 1 :]
    count = min(extra, int(np.append(told_apart, False).argmin()))
    lost = np.cumsum(shares[k : k + count] ** 2) / (limit - keys[k])
    gaps = limit - lost - keys[k : k + count]
    return int(gaps.argmax()) + 1 if count and gaps.max() > 0 else 0
