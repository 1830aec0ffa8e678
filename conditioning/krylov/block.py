"""Block Lanczos: a Krylov space from several vectors, which holds as many copies of an eigenvalue.

From one vector a Krylov space holds one copy of each eigenvalue; from ``p`` vectors up to ``p``.
What a block of Gaussian columns may claim is known without a second run. Let ``G`` be the start,
``(n, p)``, ``theta_1 >= theta_2 >= ...`` the Ritz values after ``s`` steps, and ``C`` the product
of ``G`` with the ``i`` leading eigenvectors, an ``(i, p)`` matrix of independent Gaussians. Then ::

    lambda_i - theta_i <= (theta_i - lambda_n) sinh(asinh(|G| / sigma_min(C)) / (2 s - 1))^2

*Proof.* Let ``x = theta_i < lambda_i`` and ``q`` be a polynomial of degree below ``s``. The columns
of ``q(A) G`` lie in the Krylov space, on which ``A - x`` has at most ``i - 1`` positive
eigenvalues; so ``c^T G^T q(A) (A - x) q(A) G c <= 0`` for all ``c`` of a space of dimension
``p - i + 1``, and one unit vector in it has ``|C c| >= sigma_min(C)`` (Courant-Fischer). Written in
eigenvectors, the first ``i`` give at least ``q(lambda_i)^2 (lambda_i - x) sigma_min(C)^2``, those
below ``x`` take away at most ``|G|^2 max q(t)^2 (x - t)`` over ``lambda_n <= t <= x``, and
``q(t)^2 (x - t) = T_{2s-1}(sqrt((x - t) / (x - lambda_n)))^2`` makes that maximum one.

For ``p = 1`` this is the kind of bound of Kuczynski and Wozniakowski (SIAM J. Matrix Anal. Appl.
13, 1992); for blocks that of Saad (SIAM J. Numer. Anal. 17, 1980), who has the angle between ``G``
and the eigenvectors instead of its law. ``|G|`` is measured, and ``sigma_min`` has a known law:
A. Edelman, SIAM J. Matrix Anal. Appl. 9 (1988) 543-560.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.jacobi import Array
from conditioning.krylov.methods import check_steps
from conditioning.krylov.run import refuse_products
from conditioning.krylov.vectors import Basis, inner, norm, orthonormal
from conditioning.operators.base import LinearOperator, as_operator

_EPS = float(np.finfo(np.float64).eps)


class BlockLanczos(NamedTuple):
    """What ``block_lanczos`` returns; ``A @ basis == basis @ projected + residual E^T``.

    Attributes
    ----------
    basis : Tensor of shape (n, m)
        Orthonormal columns: ``p`` for each step, fewer once the block has lost rank.
    projected : Tensor of shape (m, m)
        Symmetric block tridiagonal, float64, on the host.
    residual : Tensor of shape (n, w)
        Belongs to the last ``w`` basis vectors, the newest block; orthogonal to the basis.
    ritz_values, residual_norms : ndarray of shape (m,)
        Ascending, and ``||A v - value v||`` of each, told by the residual without a product.
    num_matvecs : int
        Products: one for each column.
    """

    basis: Tensor
    projected: Tensor
    residual: Tensor
    ritz_values: Array
    residual_norms: Array
    num_matvecs: int


class _BlockFunction(LinearOperator):
    """An operator from a function that multiplies whole blocks."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: Tensor) -> None:
        dtype = start.dtype if start.dtype.is_floating_point else torch.float64
        super().__init__((len(start), len(start)), dtype, start.device, symmetric=True)
        self._function = function

    def _matmat(self, vectors: Tensor) -> Tensor:
        product = self._function(vectors)
        if product.shape != vectors.shape:
            msg = (
                f"matmat must return a tensor of shape {tuple(vectors.shape)}, as it is given, "
                f"got {tuple(product.shape)}."
            )
            raise ShapeError(msg)
        return product.detach()


@dataclass(frozen=True)
class _State:
    """What a step replaces: all at once, so that an interrupt leaves the last complete step."""

    next: Tensor  # the block to be multiplied
    residual: Tensor
    tail: Array  # a matrix with the Gram matrix of the residual
    coupling: Array  # of the next block to the newest one in the basis
    projected: Array
    num_steps: int = 0
    num_matvecs: int = 0
    closed: bool = False
    scale: float = 0.0
    leak: float = 0.0  # what a product has where exact arithmetic has nothing
    lost: float = 0.0  # by storing, relative to a unit vector
    dropped: float = 0.0

    @cached_property
    def ritz(self) -> tuple[Array, Array, Array]:
        values, vectors = np.linalg.eigh(self.projected)
        tails = self.tail @ vectors[len(vectors) - len(self.tail) :]
        return np.asarray(values), np.asarray(vectors), np.asarray(tails)


class BlockRun:
    """A block Lanczos run that can be extended, interrupted and inspected.

    Full reorthogonalisation in float64. Directions of which the newest block holds nothing but
    rounding are dropped: the block gets narrower, and the run closes when none is left. An
    exception or Ctrl-C within ``extend`` leaves the last complete step.

    Parameters
    ----------
    operator : LinearOperator
        Symmetric, ``(n, n)``; products are taken of whole blocks. Of a sharded operator the
        vectors are this process's parts.
    start : Tensor of shape (n, p)
        Not zero. ``bounds`` needs independent standard normal entries (``start_for`` with a
        ``width``).
    basis_dtype : torch.dtype
        Of the stored basis: float32 halves the memory, inner products stay in float64.
    """

    def __init__(
        self, operator: LinearOperator, start: Tensor, *, basis_dtype: torch.dtype = torch.float64
    ) -> None:
        size = operator.shape[0]
        if operator.shape != (size, size):
            msg = f"Lanczos needs a square symmetric operator, got shape {operator.shape}."
            raise ShapeError(msg)
        if start.ndim != 2 or start.shape[0] != operator.local_size or not start.shape[1]:
            msg = (
                f"The start block must have shape (n, p) with n = {operator.local_size} and p at "
                f"least 1, got {tuple(start.shape)}."
            )
            raise ShapeError(msg)
        if basis_dtype not in (torch.float32, torch.float64):
            msg = f"basis_dtype must be torch.float32 or torch.float64, got {basis_dtype}."
            raise InvalidArgumentError(msg)
        block = start.detach().to(operator.device, torch.float64)
        largest = float(norm(operator, block).max())
        if not math.isfinite(largest):
            raise InvalidArgumentError("The start block of a Krylov method must be finite.")
        if not largest:
            raise InvalidArgumentError("The start block of a Krylov method must not be zero.")
        self.operator = operator
        self._basis = Basis(operator, operator.local_size, size, basis_dtype)
        q, r = orthonormal(operator, block)
        turn, sizes, _ = np.linalg.svd(r.cpu().numpy())
        kept = sizes > 1e-12 * sizes[0]
        self._start_norm = float(sizes[0])
        # Columns that depend on others are no Gaussian ones: nothing is bounded then.
        self._columns = start.shape[1] if kept.all() else 0
        first, lost = self._unit_block(q, turn[:, kept])
        empty: Array = np.empty((0, 0))
        self._state = _State(
            first, block[:, :0], empty, np.empty((kept.sum(), 0)), empty, lost=lost
        )

    def _unit_block(self, q: Tensor, turn: Array) -> tuple[Tensor, float]:
        """Some directions of ``q`` as they will be stored, and what storing loses."""
        block = q @ torch.from_numpy(turn.copy()).to(q.device)
        for _ in range(2):
            # What was small before it was scaled has kept the rounding of what was not.
            self._basis.subtract_(block, self._basis.inner(block))
            block, _ = orthonormal(self.operator, block)
        stored = block.to(self._basis.dtype).to(torch.float64)
        return stored, float(norm(self.operator, stored - block).max())

    def extend(self, num_steps: int) -> None:
        """Do up to ``num_steps`` further steps, a block product each.

        Raises
        ------
        NonFiniteError
            If a product is not finite, or too large or small for squares in float64.
        AsymmetricOperatorError
            If the products are not those of a symmetric operator.
        """
        for _ in range(num_steps):
            if self.closed:
                return
            try:
                self._state = self._step(self._state)
            finally:
                self._basis.truncate(len(self._state.projected))

    def _step(self, state: _State) -> _State:
        block, basis, done = state.next, self._basis, len(state.projected)
        width, before = state.coupling.shape
        rest = self.operator.matmat(block).to(torch.float64, copy=True)
        basis.append(block)
        total = torch.zeros(done + width, width, dtype=torch.float64, device=rest.device)
        for count in (width + before, done + width):  # what couples, then the rounding of all
            coefficients = basis.inner(rest, count)
            basis.subtract_(rest, coefficients)
            total[done + width - count :] += coefficients
        inside = total.cpu().numpy()
        size, left = float(np.abs(inside).max()), float(norm(self.operator, rest).max())
        refuse_products(max(size, left, state.scale), 0.0)
        if left:
            q, r = orthonormal(self.operator, rest)
        else:
            q, r = rest, torch.zeros(width, width, dtype=torch.float64)
        tail = r.cpu().numpy()
        diagonal = inside[done:]
        expected = np.zeros((done, width))
        expected[done - before :] = state.coupling.T
        # In exact arithmetic a product has nothing beyond the two newest blocks, there is the
        # coupling, and the diagonal block is symmetric: what differs is rounding.
        wrong = np.vstack([inside[:done] - expected, (diagonal - diagonal.T) / 2])
        scale = max(state.scale, float(np.linalg.norm(np.vstack([inside, tail]), 2)))
        leak = max(state.leak, float(np.linalg.norm(wrong, 2)))
        refuse_products(scale, leak)
        turn, sizes, _ = np.linalg.svd(tail)
        kept = sizes > 20 * max(leak, state.lost * scale) + 50 * _EPS * scale
        kept[max(self.operator.shape[0] - done - width, 0) :] = False
        projected = np.block(
            [[state.projected, expected], [expected.T, (diagonal + diagonal.T) / 2]]
        )
        following, lost = self._unit_block(q, turn[:, kept]) if kept.any() else (rest[:, :0], 0.0)
        dropped = float(sizes[~kept].max()) if not kept.all() else 0.0
        return _State(
            following, rest, tail, inner(self.operator, following, rest).cpu().numpy(), projected,
            state.num_steps + 1, state.num_matvecs + width, not kept.any(), scale, leak,
            max(state.lost, lost), state.dropped + dropped,
        )  # fmt: skip

    # -- what the run knows -----------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Block steps done."""
        return self._state.num_steps

    @property
    def num_matvecs(self) -> int:
        """Products: one for each column."""
        return self._state.num_matvecs

    @property
    def closed(self) -> bool:
        """Whether the Krylov space is invariant: nothing is left of any direction but rounding."""
        return self._state.closed

    @property
    def guard(self) -> float:
        """Allowance for rounding, as of :class:`LanczosRun`, and for what was dropped."""
        state = self._state
        rounding = 3 * max(state.leak, state.lost * state.scale) + 10 * _EPS * state.scale
        return rounding + state.dropped

    @property
    def basis(self) -> Tensor:
        """Orthonormal basis, shape ``(n, m)``, a copy in float64."""
        return self._basis.dense() if len(self._basis) else self._state.next[:, :0]

    @property
    def projected(self) -> Tensor:
        """The operator in the basis, shape ``(m, m)``, float64 on the host."""
        return torch.from_numpy(self._state.projected.copy())

    @property
    def residual(self) -> Tensor:
        """``R`` in ``A Q = Q T + R E^T``, shape ``(n, w)``."""
        return self._state.residual

    def ritz(self) -> tuple[Array, Array, Array]:
        """Ritz values, ascending; their vectors in the basis; residuals in shared coordinates.

        The Gram matrix of the last one's columns is that of the residuals, so their norms are the
        column norms. No product is taken.
        """
        return self._state.ritz

    def combine(self, coefficients: Tensor) -> Tensor:
        """Basis times ``coefficients`` of shape ``(m, l)``, without copying the basis."""
        return self._basis.combine(coefficients.to(self.operator.device, torch.float64))

    def bounds(
        self, k: int, which: str = "LA", failure_probability: float = 1e-6
    ) -> tuple[Array, Array]:
        """Enclose the ``k`` largest or smallest eigenvalues, copies counted.

        The inner ends are certain. The outer ones hold with the stated probability, all together
        and after any number of steps: the two events that they exclude are about the start alone.
        With ``k`` below the width ``p`` the probability that they pay for enters to the power ``1 /
        (p - k)``, and an outer end comes down to the residuals as soon as the bound of the
        next eigenvalue lies below. Until then it shrinks like ``1 / num_steps^2``, or faster.

        Parameters
        ----------
        k : int
            At most the width of the start.
        which : {"LA", "SA"}
            Largest, or smallest (most negative).
        failure_probability : float

        Returns
        -------
        low, high : ndarray of shape (k,)
            Of the ``k`` eigenvalues in the order of ``which``; infinite where nothing is known.

        Raises
        ------
        InvalidArgumentError
            If the start has no ``k`` independent columns, or another option is out of range.
        """
        if which not in ("LA", "SA"):
            msg = f"which should be 'LA' or 'SA', got {which!r}."
            raise InvalidArgumentError(msg)
        if not 0 < failure_probability < 0.5:
            msg = f"failure_probability must lie between 0 and 0.5, got {failure_probability}."
            raise InvalidArgumentError(msg)
        if not 1 <= k <= self._columns:
            msg = (
                f"k must be at least 1 and at most the {self._columns} independent columns of the "
            )
            msg += f"start, got {k}."
            raise InvalidArgumentError(msg)
        if not self.num_steps:
            return np.full(k, -np.inf), np.full(k, np.inf)
        values, _, tails = self.ritz()
        sign = 1.0 if which == "LA" else -1.0
        order = np.argsort(-sign * values, kind="stable")
        inner_ends, tails = sign * values[order], tails[:, order]
        if len(values) == self.operator.shape[0]:  # all of them
            radius = float(np.linalg.norm(tails, 2)) + self.guard
            ends = sign * values[order][:k] - radius, sign * values[order][:k] + radius
            return ends if which == "LA" else (-ends[1], -ends[0])
        rows = min(k + 1, self._columns, len(values))
        outer = self._outer_ends(inner_ends, rows, failure_probability / 2)
        for j in range(1, rows):
            # Within r there are j eigenvalues, one for each Ritz value (Kahan). All are beyond the
            # bound of the next, so they are the first j.
            radius = float(np.linalg.norm(tails[:, :j], 2))
            if inner_ends[j - 1] - radius - 2 * self.guard > outer[j]:
                outer[:j] = np.minimum(outer[:j], inner_ends[:j] + radius)
        low, high = inner_ends[:k] - self.guard, outer[:k] + self.guard
        return (low, high) if which == "LA" else (-high, -low)

    def _outer_ends(self, values: Array, rows: int, allowed: float) -> Array:
        """Upper bounds of the first eigenvalues, from Ritz values in descending order."""
        shares = [
            self._start_norm / gaussian_floor(count, self._columns, allowed) for count in (rows, 1)
        ]
        degree = 2 * self.num_steps - 1
        # sinh overflows where nothing can be said anyway.
        upper, lower = (math.sinh(min(math.asinh(share) / degree, 300.0)) ** 2 for share in shares)
        if upper + lower >= 1:
            return np.full(rows, np.inf)
        # The width of the spectrum, w: w <= theta_1 - theta_m + (upper + lower) w.
        width = (values[0] - values[-1]) / (1 - upper - lower)
        return np.asarray(values[:rows] + (values[:rows] - values[0] + width) * upper)


def gaussian_floor(rows: int, columns: int, failure_probability: float) -> float:
    """What the smallest singular value of a Gaussian matrix exceeds, but with this probability.

    The density of its square is at most ``L t^((p - i - 1) / 2) exp(-t / 2)`` with ``L =
    2^((p - i - 1) / 2) Gamma((p + 1) / 2) / (Gamma(i / 2) Gamma(p - i + 1))`` for ``i`` rows and
    ``p >= i`` columns (A. Edelman, SIAM J. Matrix Anal. Appl. 9, 1988, 543-560).
    """
    spare = columns - rows + 1
    log_density = (
        (spare - 2) / 2 * math.log(2) + math.lgamma((columns + 1) / 2)
        - math.lgamma(rows / 2) - math.lgamma(spare)
    )  # fmt: skip
    return math.exp((math.log(failure_probability * spare / 2) - log_density) / spare)


def block_lanczos(
    matmat: Any,
    start: Tensor,
    num_steps: int,
) -> BlockLanczos:
    """Block Lanczos with full reorthogonalisation: sees multiplicities up to the block size.

    For bounds, or to go on, see :class:`BlockRun`.

    Parameters
    ----------
    matmat : callable, LinearOperator or matrix
        ``V -> A V`` for blocks of shape ``(n, p)``.
    start : Tensor of shape (n, p)
        Not zero; columns that depend on others are dropped.
    num_steps : int
        Block steps wanted; fewer are done when the Krylov space closes.

    Returns
    -------
    BlockLanczos
        ``A Q = Q T + R E^T``, Ritz values with residual norms, and the number of products.

    References
    ----------
    G. H. Golub, R. Underwood, in Mathematical Software III, 1977, 361-377.
    """
    check_steps(num_steps)
    if callable(matmat) and not isinstance(matmat, LinearOperator):
        matmat = _BlockFunction(matmat, start)
    run = BlockRun(as_operator(matmat), start)
    run.extend(num_steps)
    values, _, tails = run.ritz()
    return BlockLanczos(
        run.basis, run.projected, run.residual, values, np.linalg.norm(tails, axis=0),
        run.num_matvecs,
    )  # fmt: skip
