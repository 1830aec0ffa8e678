"""A Lanczos run of bounded memory: thick restarts that keep the certificate.

When the basis is full, the best Ritz vectors stay and the rest is dropped (K. Wu, H. Simon, SIAM
J. Matrix Anal. Appl. 22, 2000, 602-616). The projected matrix then has an arrow before its
tridiagonal part.

What such a run may still claim: after ``N`` products in all, with any restarts, the newest vector
is ``q = P(A) b / c``, where the roots of the polynomial ``P`` of degree ``N`` are all Ritz values
that were ever dropped and those of now, and ``c`` is the product of all norms that the run has
divided by. (Dropping Ritz values divides ``b`` by nothing: it moves their factors from the
characteristic polynomial of the projected matrix into the start vector, and ``P`` stays.) For a
unit eigenvector ``u`` with eigenvalue ``x``: ``|P(x)| |u . b| = c |u . q| <= c``. So an
eigenvalue ``x`` beyond all roots has ``(u . b)^2 <= c^2 / P(x)^2``, which falls with the distance:
the outer bound of an unrestarted run, from one polynomial instead of the sum of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError
from conditioning.jacobi import Array, JacobiMatrix, first_beyond
from conditioning.krylov.run import LanczosRun
from conditioning.operators.base import LinearOperator


@dataclass(frozen=True)
class RestartedMatrix(JacobiMatrix):
    """The projected matrix after a restart: an arrow, then tridiagonal.

    Parameters
    ----------
    diagonal, off_diagonal, residual_norm
        As of :class:`~conditioning.jacobi.JacobiMatrix`; the arrow replaces the first entries.
    arrow : ndarray of shape (l,)
        Couplings of the ``l`` kept Ritz vectors to the vector after them.
    dropped : ndarray
        Ritz values that restarts have dropped.
    log_norm : float
        Logarithm of the product of all norms that the run has divided by.
    """

    arrow: Array
    dropped: Array
    log_norm: float

    def dense(self) -> Array:
        """The matrix, shape ``(k, k)``."""
        matrix = super().dense()
        kept = len(self.arrow)
        if kept < self.size:
            matrix[kept, :kept] = matrix[:kept, kept] = self.arrow
        return matrix

    @cached_property
    def _eigh(self) -> tuple[Array, Array]:
        values, vectors = np.linalg.eigh(self.dense())
        return np.asarray(values), np.asarray(vectors)

    @property
    def residual_norms(self) -> Array:
        """Residual norm of every Ritz pair."""
        if len(self.arrow) < self.size:
            return super().residual_norms
        return np.abs(self.arrow @ self._eigh[1])  # nothing after the restart yet

    @cached_property
    def _mirror(self) -> JacobiMatrix:
        return RestartedMatrix(
            -self.diagonal, -self.off_diagonal, self.residual_norm, -self.arrow,
            -self.dropped, self.log_norm,
        )  # fmt: skip

    def right_end(self, inverse_mass: float) -> float:
        """An ``x`` such that no point of ``[x, inf)`` can carry a given mass of the start."""
        roots = np.concatenate([self.dropped, self.ritz_values])
        return first_beyond(
            float(roots.max()),
            float(np.abs(roots).max()),
            lambda point: self.excludes_beyond(point, inverse_mass),
        )

    def excludes_beyond(self, point: float, inverse_mass: float) -> bool:
        """Whether ``right_end`` is at most ``point``, without searching for it."""
        distances = point - np.concatenate([self.dropped, self.ritz_values])
        if distances.min() <= 0:
            return False
        wanted = self.log_norm + 0.5 * float(np.log(inverse_mass))
        return bool(np.log(distances).sum() > wanted)

    def inverse_mass(self, points: Array) -> tuple[Array, Array]:  # noqa: ARG002
        """Not known within the spectrum: the polynomials are gone."""
        raise InvalidArgumentError("A restarted run excludes nothing within its spectrum.")


class RestartedRun(LanczosRun):
    """A Lanczos run that restarts when ``max_steps`` vectors are stored; until then the same.

    Parameters
    ----------
    operator, start, max_steps
        And all others as :class:`LanczosRun` takes them.
    key : callable
        What makes a Ritz value worth keeping, larger is better: ``np.abs`` for both ends.
    wanted : int
        Pairs that the caller is after; more are kept at each restart.
    """

    def __init__(
        self,
        operator: LinearOperator,
        start: Tensor,
        *,
        key: Callable[[Array], Array],
        wanted: int = 1,
        **options: Any,
    ) -> None:
        self._arrow = np.empty(0)
        super().__init__(operator, start, **options)
        self._key = key
        self._wanted = wanted
        self.num_restarts = 0
        self._dropped = np.empty(0)
        self._log_before = 0.0

    def extend(self, num_steps: int) -> None:
        """Do up to ``num_steps`` further products, restarting where the basis is full.

        Raises
        ------
        InvalidArgumentError
            If an interrupt fell into a restart: the basis was half turned, and is gone.
        """
        if len(self._basis) != self.num_steps:
            raise InvalidArgumentError(
                "This run was interrupted within a restart: begin a new one."
            )
        while num_steps > 0 and not self.closed:
            if self.num_steps >= self.max_steps:
                if self.complete:
                    return
                try:
                    self._restart()
                except BaseException:
                    self._basis.clear()
                    raise
            count = min(num_steps, self.max_steps - self.num_steps)
            super().extend(count)
            num_steps -= count

    @property
    def _log_norm(self) -> float:
        return self._log_before + float(np.log(self._beta[len(self._arrow) :]).sum())

    def _restart(self) -> None:
        matrix = self.jacobi
        keep = min(self._wanted + max((self.num_steps - self._wanted) // 2, 1), self.num_steps - 2)
        order = np.argsort(-self._key(matrix.ritz_values), kind="stable")
        best, rest = order[:keep], order[keep:]
        turn = torch.from_numpy(matrix.ritz_vectors[:, best].copy()).to(self._device)
        arrow = self._beta[-1] * matrix.ritz_vectors[-1, best]
        self._log_before = self._log_norm
        self._dropped = np.concatenate([self._dropped, matrix.ritz_values[rest]])
        self._arrow = arrow
        self._expected = torch.from_numpy(arrow.copy()).to(self._device)
        self._basis.rotate(turn)
        self.num_steps = keep
        self._alpha = [float(value) for value in matrix.ritz_values[best]]
        self._beta = [0.0] * (keep - 1) + [self._beta[-1]]
        self._may_close = False  # the recurrence that tells rounding from a residual is gone
        self._jacobi, self._known_scale = None, (0, 0.0)
        self.num_restarts += 1

    def _num_coupled(self) -> int:
        # The first product after a restart couples to all vectors that were kept.
        kept = len(self._arrow)
        return self.num_steps if kept and self.num_steps == kept + 1 else super()._num_coupled()

    def _leaked(self, coefficients: Tensor) -> Tensor:
        kept = len(self._arrow)
        if not kept or self.num_steps != kept + 1:
            return super()._leaked(coefficients)
        size: Tensor = torch.linalg.vector_norm(coefficients[:kept] - self._expected)
        return size

    @property
    def jacobi(self) -> JacobiMatrix:
        """The projected matrix with the norm of the residual behind it."""
        if not self.num_restarts:
            return super().jacobi
        if self._jacobi is None or self._jacobi.size != len(self._alpha):
            self._jacobi = RestartedMatrix(
                np.array(self._alpha), np.array(self._beta[:-1]), self._beta[-1], self._arrow,
                self._dropped, self._log_norm,
            )  # fmt: skip
        return self._jacobi

    # -- what is not offered ----------------------------------------------------------------

    def save(self, path: str | Path) -> None:  # noqa: ARG002
        """Not offered: the state of a plain run does not hold what restarts dropped."""
        raise InvalidArgumentError("A run that restarts cannot be saved.")

    def load(self, path: str | Path) -> None:  # noqa: ARG002
        """Not offered."""
        raise InvalidArgumentError("A run that restarts cannot be loaded.")
