"""The one interface of every operator here: a linear map that is known by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import (
    DenseTooLargeError,
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
)
from conditioning.memory import available_bytes, format_bytes

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator


class LinearOperator:
    """A real linear map of shape ``(m, n)`` known by its products.

    A subclass implements ``_matmat(V)`` for ``V`` of shape ``(n, k)``, and
    ``_rmatmat`` when the map is not symmetric. Everything else is built on that.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns.
    dtype : torch.dtype
        Floating dtype of the products.
    device : torch.device or str
        Where the products live.
    symmetric : bool
        Whether the operator equals its transpose. Then ``rmatvec`` is ``matvec``.

    Attributes
    ----------
    num_matvecs : int
        Products with one vector done so far (a block of ``k`` vectors counts ``k``).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        symmetric: bool = False,
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = symmetric
        self.num_matvecs = 0

    # What a subclass whose vectors are spread over ranks overrides.

    @property
    def local_size(self) -> int:
        """Entries that this process holds of a vector of the domain: all ``n``, unless sharded."""
        return self.shape[1]

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold different entries of a vector."""
        return False

    def local_part(self, vector: Tensor) -> Tensor:
        """Of a whole vector of the domain, the entries that this process holds."""
        return vector

    def sum_over_shards(self, partial: Tensor) -> Tensor:
        """Add up what the processes found on their entries: inner products, squared norms."""
        return partial

    def whole(self, part: Tensor) -> Tensor:
        """Inverse of ``local_part``: every process gets the whole vector (or block)."""
        return part

    def agree(self, flag: bool) -> bool:
        """Whether a process says so: what depends on memory or time is decided alike on all."""
        return flag

    def least(self, value: int) -> int:
        """The smallest over the processes, of bytes that are free and the like."""
        return value

    def _matmat(self, vectors: Tensor) -> Tensor:
        raise NotImplementedError

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        if self.symmetric:
            return self._matmat(vectors)
        msg = f"{type(self).__name__} has no product with its transpose."
        raise NotImplementedError(msg)

    def _apply(self, product: Callable[[Tensor], Tensor], vectors: Tensor, length: int) -> Tensor:
        if not isinstance(vectors, Tensor):
            msg = (
                f"{type(self).__name__} multiplies torch tensors, got "
                f"{type(vectors).__name__}. Convert with torch.as_tensor, or use to_scipy()."
            )
            raise ShapeError(msg)
        if vectors.ndim not in (1, 2) or vectors.shape[0] != length:
            msg = (
                f"{type(self).__name__} of shape {self.shape} needs a tensor of shape "
                f"({length},) or ({length}, k), got {tuple(vectors.shape)}."
            )
            raise ShapeError(msg)
        vectors = vectors.detach().to(device=self.device, dtype=self.dtype)
        single = vectors.ndim == 1
        block = vectors[:, None] if single else vectors
        self.num_matvecs += block.shape[1]
        result = product(block)
        return result[:, 0] if single else result

    def matvec(self, vector: Tensor) -> Tensor:
        """Product with a tensor of shape ``(n,)`` (or a block ``(n, k)``)."""
        return self._apply(self._matmat, vector, self.local_size)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Product with a block of vectors of shape ``(n, k)``."""
        return self._apply(self._matmat, vectors, self.local_size)

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Product of the transpose with a tensor of shape ``(m,)`` or ``(m, k)``."""
        length = self.local_size if self.is_sharded else self.shape[0]
        return self._apply(self._rmatmat, vector, length)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.matvec(vectors)

    def dense(self, memory_budget: int | None = None) -> Tensor:
        """The matrix itself, column by column (not symmetrised).

        Parameters
        ----------
        memory_budget : int, optional
            Bytes that the matrix and its work space may take. Default: half of
            what the device has free now.

        Returns
        -------
        Tensor of shape ``(m, n)``

        Raises
        ------
        DenseTooLargeError
            If the matrix does not fit; says what it would take.
        """
        rows, columns = self.shape
        needed = dense_bytes(self.shape, self.dtype)
        budget = available_bytes(self.device) // 2 if memory_budget is None else memory_budget
        if self.agree(needed > budget):
            msg = (
                f"The dense matrix of shape {self.shape} takes {format_bytes(needed)}, the budget "
                f"is {format_bytes(budget)}. Use products (eigenvalues, condition_number, "
                f"spectral_density), a subset of the parameters (params=...), or raise "
                f"memory_budget."
            )
            raise DenseTooLargeError(msg)
        matrix = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        step = self._dense_block()
        for begin in range(0, columns, step):
            end = min(begin + step, columns)
            block = torch.zeros(columns, end - begin, dtype=self.dtype, device=self.device)
            block[begin:end].fill_diagonal_(1)
            matrix[:, begin:end] = self.whole(self.matmat(self.local_part(block)))
        return matrix

    def _dense_block(self) -> int:
        """How many columns of ``dense()`` go into one block product."""
        return 64

    def to_scipy(self) -> ScipyLinearOperator:
        """The same map for ``scipy.sparse.linalg``: NumPy arrays in, NumPy arrays out."""
        from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator  # slow to import

        if self.is_sharded:
            msg = (
                "The vectors of this operator are sharded over ranks, and SciPy's methods know "
                "nothing of that. Use eigenvalues() or condition_number()."
            )
            raise ShapeError(msg)
        numpy_dtype = np.float32 if self.dtype.itemsize <= 4 else np.float64

        def wrap(product: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            def on_numpy(array: Any) -> Any:
                host = torch.from_numpy(np.ascontiguousarray(array, dtype=numpy_dtype))
                result = product(host.to(self.device))
                return result.detach().cpu().numpy().astype(numpy_dtype, copy=False)

            return on_numpy

        return ScipyLinearOperator(
            shape=self.shape,
            dtype=numpy_dtype,
            matvec=wrap(lambda v: self.matvec(v.reshape(-1))),
            matmat=wrap(self.matmat),
            rmatvec=wrap(lambda v: self.rmatvec(v.reshape(-1))),
            rmatmat=wrap(self.rmatvec),
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"
        )


class FunctionOperator(LinearOperator):
    """An operator from a function that computes its products.

    Parameters
    ----------
    matvec : callable
        Maps a tensor of shape ``(n,)`` to one of shape ``(m,)``.
    shape : tuple of int
    dtype, device
        Of the products.
    symmetric : bool
    rmatvec : callable, optional
        Product with the transpose, for maps that are not symmetric.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        *,
        symmetric: bool = True,
        rmatvec: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(shape, dtype, device, symmetric=symmetric)
        self._function = matvec
        self._adjoint = rmatvec

    def _matmat(self, vectors: Tensor) -> Tensor:
        return torch.stack([self._checked(self._function(v)) for v in vectors.unbind(1)], dim=1)

    def _checked(self, product: Any) -> Tensor:
        if not isinstance(product, Tensor) or tuple(product.shape) != self.shape[:1]:
            got = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
            msg = f"matvec must return a tensor of shape ({self.shape[0]},), got {got}."
            raise ShapeError(msg)
        return product.detach()

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        if self._adjoint is None:
            return super()._rmatmat(vectors)
        return torch.stack([self._adjoint(v) for v in vectors.unbind(1)], dim=1)


class MatrixOperator(LinearOperator):
    """An operator from a matrix that is already in memory."""

    def __init__(self, matrix: Tensor) -> None:
        real = matrix.dtype.is_floating_point and matrix.layout == torch.strided
        if matrix.ndim != 2 or not real or not matrix.numel():
            msg = (
                f"A matrix operator needs a real, dense floating-point matrix, got shape "
                f"{tuple(matrix.shape)}, dtype {matrix.dtype} and layout {matrix.layout}. Wrap "
                f"other forms: FunctionOperator(lambda v: A @ v, A.shape, A.dtype)."
            )
            raise ShapeError(msg)
        if not bool(torch.isfinite(matrix).all()):
            msg = "The matrix is not finite: it contains NaN or an infinity."
            raise NonFiniteError(msg)
        square = matrix.shape[0] == matrix.shape[1]
        # A symmetric operator is symmetric up to the rounding of whoever assembled it.
        bound = matrix.abs().amax() * torch.finfo(matrix.dtype).eps * 100 if square else 0
        symmetric = bool(square and ((matrix - matrix.T).abs().amax() <= bound))
        super().__init__(
            (matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device, symmetric=symmetric
        )
        self._matrix = matrix

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._matrix @ vectors

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        return self._matrix.T @ vectors


def dense_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of a dense matrix and of the two float64 copies that an eigensolver takes."""
    entries = shape[0] * shape[1]
    return entries * dtype.itemsize + 2 * entries * 8


def as_operator(operator: Any) -> LinearOperator:
    """Take an operator, a matrix (torch or NumPy) or a SciPy ``LinearOperator``.

    Raises
    ------
    InvalidArgumentError
        If it is none of these.
    """
    if isinstance(operator, LinearOperator):
        return operator
    if isinstance(operator, Tensor):
        return MatrixOperator(operator.detach())
    if isinstance(operator, np.ndarray):
        return MatrixOperator(torch.from_numpy(np.ascontiguousarray(operator, dtype=np.float64)))
    if hasattr(operator, "matvec") and hasattr(operator, "shape"):

        def on_torch(product: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
            return lambda v: torch.from_numpy(np.array(product(v.numpy()), dtype=np.float64))

        return FunctionOperator(
            on_torch(operator.matvec),
            operator.shape,
            symmetric=True,
            rmatvec=on_torch(operator.rmatvec) if hasattr(operator, "rmatvec") else None,
        )
    msg = (
        f"Expected an operator (HessianOperator, GaussNewtonOperator, FunctionOperator, ...), a "
        f"square matrix, or a scipy LinearOperator, got {type(operator).__name__}."
    )
    raise InvalidArgumentError(msg)
