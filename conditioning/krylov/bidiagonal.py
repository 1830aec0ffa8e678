"""Golub-Kahan bidiagonalisation: a Lanczos run that sees the singular values of any operator.

It is the Lanczos run of the augmented operator ``[[0, J], [J^T, 0]]``, with eigenvalues
``+sigma_i`` and ``-sigma_i``, from a start vector with one half zero. Then the basis vectors
alternate between the two halves, every step is one product with ``J`` or ``J^T``, and only the
half that is not zero is stored. Against the Gram operator ``J^T J`` it needs the same products,
but its rounding is relative to ``sigma_max`` and not to ``sigma_max^2``: small singular values
keep twice as many digits.

References
----------
G. Golub, W. Kahan, SIAM J. Numer. Anal. B 2 (1965) 205-224. C. C. Paige, M. A. Saunders, ACM
Trans. Math. Software 8 (1982) 43-71.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from conditioning.errors import AsymmetricOperatorError, InvalidArgumentError, ShapeError
from conditioning.krylov.run import LanczosRun
from conditioning.krylov.vectors import Basis
from conditioning.operators.base import LinearOperator


class _Augmented(LinearOperator):
    """``[[0, J], [J^T, 0]]``, to tell a Lanczos run its size, device and dtype."""

    def __init__(self, operator: LinearOperator) -> None:
        size = sum(operator.shape)
        super().__init__((size, size), operator.dtype, operator.device, symmetric=True)


class BidiagonalRun(LanczosRun):
    """A Lanczos run on ``[[0, J], [J^T, 0]]`` that can be extended and inspected.

    Basis vectors of even index live on the smaller side of ``J`` (its ``p`` entries), those of
    odd index on the other. After ``2 p`` steps all singular values are known. The Jacobi matrix
    has a zero diagonal; its positive eigenvalues are those of the bidiagonal matrix.

    Parameters
    ----------
    operator : LinearOperator
        ``(m, n)``, with products of its transpose.
    start : Tensor of shape (min(m, n),)
        Not zero.
    measure_noise, max_steps
        As :class:`LanczosRun` takes them.
    """

    def __init__(
        self,
        operator: LinearOperator,
        start: Tensor,
        *,
        measure_noise: bool = False,
        max_steps: int | None = None,
    ) -> None:
        self._map = operator
        self._wide = operator.shape[0] < operator.shape[1]
        self._lengths = sorted(operator.shape)
        if tuple(start.shape) != (self._lengths[0],):
            msg = (
                f"The start vector must have shape ({self._lengths[0]},), the smaller side of the "
                f"operator, got {tuple(start.shape)}."
            )
            raise ShapeError(msg)
        limit = 2 * self._lengths[0]
        padded = torch.nn.functional.pad(start.detach(), (0, self._lengths[1]))
        super().__init__(
            _Augmented(operator),
            padded,
            measure_noise=measure_noise,
            max_steps=limit if max_steps is None else min(max_steps, limit),
        )
        self._next = self._next[: self._lengths[0]].clone()

    @property
    def shape(self) -> tuple[int, int]:
        """Of the operator."""
        return self._map.shape

    # -- what differs: two half bases -------------------------------------------------------

    def _new_basis(self, dtype: torch.dtype) -> Basis:
        rooms = [(self.max_steps + 1 - parity) // 2 for parity in (0, 1)]
        self._sides = [
            Basis(self.operator, length, room, dtype)
            for length, room in zip(self._lengths, rooms, strict=True)
        ]
        return self._sides[0]

    def _append(self, vector: Tensor) -> None:
        self._sides[self.num_steps % 2].append(vector)
        self.num_steps += 1

    def _orthogonalise(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        # The other half of the basis is orthogonal without doing anything, and so is the newest
        # vector, whose coefficient (the diagonal of the Jacobi matrix) is zero.
        side = self._sides[self.num_steps % 2]
        total = torch.zeros(len(side) + 1, dtype=vector.dtype, device=vector.device)
        for count in (min(len(side), 1), len(side)):  # the newest couples, the rest is rounding
            coefficients = side.inner(vector, count)
            side.subtract_(vector, coefficients)
            total[len(side) - count : -1] += coefficients
        return vector, total

    def _product(self, vector: Tensor) -> Tensor:
        parity = self.num_steps % 2
        forward = (parity == 0) != self._wide
        product = self._map.matvec(vector) if forward else self._map.rmatvec(vector)
        if tuple(product.shape) != (self._lengths[1 - parity],):
            msg = (
                f"A product of the {'operator' if forward else 'transposed operator'} has shape "
                f"{tuple(product.shape)}, expected ({self._lengths[1 - parity]},). Does "
                f"{type(self._map).__name__} know its transpose? Pass rmatvec=."
            )
            raise ShapeError(msg)
        return product.to(torch.float64, copy=True)

    def _rewind(self) -> None:
        kept = len(self._alpha)
        if self.num_steps > kept:
            place, parity = divmod(kept, 2)
            self._next = self._sides[parity][place]
            self._forget(kept)

    def _forget(self, kept: int) -> None:
        for parity, side in enumerate(self._sides):
            side.truncate((kept + 1 - parity) // 2)
        self.num_steps = kept

    def _check_scalars(self, alpha: float, beta: float, leak: float) -> None:
        try:
            # The diagonal is zero, whatever the products are: the size is told by the rest.
            super()._check_scalars(alpha + beta, beta, leak)
        except AsymmetricOperatorError:
            msg = (
                "The product with the transpose (rmatvec) is not the transpose of the product "
                "(matvec): a part of it leaves the two-term recurrence, which rounding does not "
                "explain. An operator that is not symmetric needs rmatvec=."
            )
            raise AsymmetricOperatorError(msg) from None

    @property
    def complete(self) -> bool:
        """Whether the smaller side is spanned, so that all singular values are known."""
        return self.num_steps >= 2 * self._lengths[0]

    # -- what is not offered ----------------------------------------------------------------

    @property
    def basis(self) -> Tensor:
        """Not one matrix here: the vectors have two lengths."""
        raise AttributeError("A bidiagonal run has two bases, no single one.")

    def combine(self, coefficients: Tensor) -> Tensor:
        """Ritz vectors on the smaller side (right singular vectors when ``m >= n``).

        Parameters
        ----------
        coefficients : Tensor of shape (k, l)
            In the Krylov basis of ``k`` steps; those of even index are used.
        """
        return self._sides[0].combine(coefficients[::2].to(self._device, torch.float64))

    def save(self, path: str | Path) -> None:  # noqa: ARG002
        """Not offered."""
        raise InvalidArgumentError("A bidiagonal run cannot be saved.")

    def load(self, path: str | Path) -> None:  # noqa: ARG002
        """Not offered."""
        raise InvalidArgumentError("A bidiagonal run cannot be loaded.")
