"""The largest and the smallest singular value of any operator, each with its enclosure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conditioning.errors import (
    AsymmetricOperatorError,
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
)
from conditioning.krylov import make_generator, random_start
from conditioning.memory import format_bytes
from conditioning.operators.base import (
    FunctionOperator,
    LinearOperator,
    MatrixOperator,
    as_operator,
    dense_bytes,
)
from conditioning.spectrum.full import solver_error
from conditioning.spectrum.results import Estimate
from conditioning.spectrum.singular_bounds import (
    SingularOptions,
    SingularRange,
    SingularSearch,
)

_SMALL = 128  # up to here all singular values cost about what a run costs


def singular_range(
    operator: Any,
    rtol: float = 1e-2,
    max_matvecs: int | None = None,
    failure_probability: float = 1e-6,
    seed: int | torch.Generator = 0,
    *,
    atol: float = 0.0,
    which: str = "both",
    method: str = "auto",
    memory_budget: int | None = None,
) -> SingularRange:
    r"""Largest and smallest singular value of an operator, enclosed.

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        ``(m, n)``, with products of its transpose (``rmatvec``). The smallest is that of the
        ``min(m, n)`` singular values: 0 only where the rank is deficient.
    rtol : float
        Stop when ``high / low <= 1 + rtol`` at both ends.
    max_matvecs : int, optional
        A hard limit on the products with the operator and its transpose together. Default:
        1000; ``method="dense"`` takes what it needs.
    failure_probability : float
        Allowed to the two outer ends together. It enters as a logarithm: 1e-6 is nearly free.
    seed : int or torch.Generator
        Of the start vectors.
    atol : float
        An enclosure that is narrower than this is good enough too. Where singular values lie
        densely down to ``sigma_min``, it takes about ``100 sigma_max / sigma_min`` products to
        1 % of itself, and far fewer to a given width.
    which : {"both", "largest"}
        ``largest`` stops when the spectral norm is known, and reports what it then knows of the
        smallest.
    method : {"auto", "dense", "lanczos"}
        ``auto`` takes the dense route up to ``min(m, n) = 128``, and later where a run of
        ``min(m, n)`` products did not settle the ends and the limits allow it.
    memory_budget : int, optional
        Bytes for the Krylov bases (``4 (m + n)`` a product) or the dense matrix. Default: half
        of what is free.

    Returns
    -------
    SingularRange
        With ``largest, smallest, status, message, num_matvecs``.

    Raises
    ------
    InvalidArgumentError
        If an option is out of range, or the operator has no product with its transpose.
    ShapeError
        If the operator has no entries.
    NonFiniteError
        If a product is not finite.
    AsymmetricOperatorError
        If the product with the transpose is that of another operator.

    Notes
    -----
    One Golub-Kahan run serves both ends (``conditioning.krylov.bidiagonal``),
    each product once with the operator or its transpose. From within, both ends are certain:
    the singular values of the operator restricted to a subspace of the smaller side. From
    without, a singular value beyond the end would have a share of the random start vector so
    small that it happens with ``failure_probability`` only (Christoffel function,
    ``conditioning.jacobi``).

    The run works on ``[[0, J], [J^T, 0]]`` and not on ``J^T J``, whose rounding would hide every
    singular value below ``sqrt(eps) sigma_max``. What lies below the measured rounding of the
    products, about ``10 eps sigma_max``, is enclosed as ``[0, high]``.

    Where a Krylov space closes early (all singular values of a batch of equal samples, or of a
    branch that is still zero, are few), a second, third, ... start vector excludes what the first
    may have missed; the chances are accounted for.

    The statuses:

    ``exact``
        All singular values, by a dense solver; the enclosure is rounding.
    ``exhausted``
        The Krylov space closed, and both ends are as narrow as asked for, or zero to rounding.
    ``certified``
        Both ends are enclosed from both sides, with probability at least
        ``1 - failure_probability``; the message says if they are wider than asked for.
    ``one-sided``
        ``smallest.high`` and ``largest.low`` are certain, but the budget ended before the
        smallest (or the largest) was bounded from the other side.
    ``not resolvable``
        ``sigma_min`` is at most the rounding of the products: zero and small cannot be told
        apart. ``largest`` is certified. In float32, float64 may help.

    Examples
    --------
    >>> import torch
    >>> print(singular_range(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).largest.value)
    4.0
    """
    options = SingularOptions(
        rtol, atol, max_matvecs, failure_probability, which, method, memory_budget
    )
    taken = as_operator(operator)
    if 0 in taken.shape:
        msg = f"An operator of shape {taken.shape} has no singular values."
        raise ShapeError(msg)
    spent = taken.num_matvecs
    if method == "dense":
        return _dense(taken, options, spent)
    smaller = min(taken.shape)
    transposable = _knows_transpose(taken)
    fits = dense_bytes(taken.shape, taken.dtype) <= options.bytes_on(taken.device)
    columns = smaller if transposable else taken.shape[1]
    dense = method == "auto" and fits and columns + 2 <= options.limit
    if dense and (smaller <= _SMALL or not transposable):
        return _dense(taken, options, spent)
    if not transposable:
        msg = (
            f"{taken!r} has no product with its transpose, which a Krylov run needs. Pass "
            f"rmatvec=, or method='dense' ({columns} products, "
            f"{format_bytes(dense_bytes(taken.shape, taken.dtype))})."
        )
        raise InvalidArgumentError(msg)
    search = SingularSearch(taken, options, spent, make_generator(seed))
    # The dense route needs its products: a run that does not settle stops in time for it.
    room = min(smaller, options.limit - columns - 2) if dense else options.limit
    if room >= 3:
        found = search.run(room)
        if found is not None:
            return found
    return _dense(taken, options, spent) if dense else search.conclude()


def _knows_transpose(operator: LinearOperator) -> bool:
    square = operator.shape[0] == operator.shape[1]
    if isinstance(operator, FunctionOperator):
        return operator._adjoint is not None or (operator.symmetric and square)
    return operator.symmetric or type(operator)._rmatmat is not LinearOperator._rmatmat


# -- the dense route -----------------------------------------------------------------------


class _Transposed(LinearOperator):
    """The transpose, with its products counted where they are done."""

    def __init__(self, operator: LinearOperator) -> None:
        rows, columns = operator.shape
        super().__init__((columns, rows), operator.dtype, operator.device)
        self._operator = operator

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._operator.rmatvec(vectors)

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        return self._operator.matvec(vectors)


def _dense(operator: LinearOperator, options: SingularOptions, spent: int) -> SingularRange:
    """All singular values, from as many products as the smaller side has entries."""
    transposable = _knows_transpose(operator)
    if isinstance(operator, MatrixOperator):
        matrix, noise = operator._matrix.to(torch.float64), 0.0
    else:
        wide = transposable and operator.shape[0] < operator.shape[1]
        tall: LinearOperator = _Transposed(operator) if wide else operator
        matrix = tall.dense(options.memory_budget).to(torch.float64)
        noise = _product_error(tall, matrix, transposable=transposable)
    if not bool(torch.isfinite(matrix).all()):
        msg = "The dense matrix is not finite (NaN or infinity). Check the values for overflow."
        raise NonFiniteError(msg)
    values = torch.linalg.svdvals(matrix).cpu().numpy()
    # The divide-and-conquer solver was seen to miss equal singular values by 45 eps sigma_max.
    error = noise + 8 * solver_error(values)
    top, low = float(values[0]), float(values[-1])
    count = len(values)
    message = f"all {count} singular values known" if count > 1 else "the only singular value known"
    if low <= error:
        message += f"; the smallest is zero to rounding ({error:.1g})"
    return SingularRange(
        Estimate(top, max(top - error, 0.0), top + error),
        Estimate(low, max(low - error, 0.0), low + error),
        operator.shape, "exact", message, operator.num_matvecs - spent, error, 0.0,
    )  # fmt: skip


def _product_error(operator: LinearOperator, matrix: Tensor, *, transposable: bool) -> float:
    """Size of what the columns of a matrix got wrong, by two products of the other kind."""
    generator = make_generator(0)
    worst = 0.0
    for _ in range(2):
        if transposable:
            probe = random_start(operator.shape[0], generator, operator.device).to(operator.dtype)
            product, expected = operator.rmatvec(probe), matrix.T @ probe.to(torch.float64)
        else:
            probe = random_start(operator.shape[1], generator, operator.device).to(operator.dtype)
            product, expected = operator.matvec(probe), matrix @ probe.to(torch.float64)
        gap = float(torch.linalg.vector_norm(product.to(torch.float64) - expected))
        size = float(torch.linalg.vector_norm(expected))
        if gap > 0.1 * size and size > 0:
            msg = (
                "The product with the transpose (rmatvec) is not the transpose of the product "
                f"(matvec): on a random vector they differ by {gap / size:.1e} of its size."
            )
            raise AsymmetricOperatorError(msg)
        worst = max(worst, gap)
    # For a normal probe the gap is in the mean the Frobenius norm of the error.
    return 3 * worst
