"""Inner products, norms and bases of vectors whose entries may be spread over processes.

Every inner product and norm of Krylov methods and ``conditioning.spectrum`` is taken here, so
that an operator with sharded vectors overrides ``sum_over_shards`` and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conditioning.errors import NonFiniteError
from conditioning.operators.base import LinearOperator

_PIECE_BYTES = 256 * 2**20  # at most this much is allocated at once, but one vector at least
_FEWEST_ROWS = 64
_PANEL = 4096  # entries of a float32 basis that are widened at a time: 64 rows stay in the cache


def inner(operator: LinearOperator, left: Tensor, right: Tensor) -> Tensor:
    """``left^T right``: inner products of columns, or of two vectors, over all entries."""
    return operator.sum_over_shards(left.T @ right if left.ndim == 2 else left @ right)


def norm(operator: LinearOperator, vectors: Tensor) -> Tensor:
    """Euclidean norm of a vector, or of every column of a block."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=0)
    if not operator.is_sharded:
        return norms
    return operator.sum_over_shards(norms.square()).sqrt()


def orthonormal(operator: LinearOperator, block: Tensor) -> tuple[Tensor, Tensor]:
    """``Q, R`` with ``block = Q R``, orthonormal columns of ``Q`` and ``R`` upper triangular.

    Householder QR where this process holds all entries. Of sharded columns every process sees
    the Gram matrix only: Cholesky of it, twice, with a shift that keeps it definite (Fukaya,
    Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42, 2020).
    """
    if not operator.is_sharded:
        q, r = torch.linalg.qr(block)
        return q, r
    total = torch.eye(block.shape[1], dtype=block.dtype, device=block.device)
    for _ in range(3):
        gram = inner(operator, block, block)
        shift = 1e2 * torch.finfo(block.dtype).eps * torch.diagonal(gram).sum()
        gram = gram + shift * torch.eye(len(gram), dtype=block.dtype, device=block.device)
        factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
        if int(failed):
            msg = "A product of the operator is not finite, or the columns of a block all vanish."
            raise NonFiniteError(msg)
        block = torch.linalg.solve_triangular(factor, block, upper=True, left=False)
        total = factor @ total
    return block, total


class Basis:
    """Stored basis vectors, as rows of pieces: growing never copies what is there.

    Parameters
    ----------
    operator : LinearOperator
        Sums the inner products.
    length : int
        Entries of a vector on this process.
    capacity : int
        Vectors at most.
    dtype : torch.dtype
        float64, or float32: then inner products and sums are still taken in float64.
    """

    def __init__(
        self, operator: LinearOperator, length: int, capacity: int, dtype: torch.dtype
    ) -> None:
        self._operator = operator
        self._length = length
        self.capacity = capacity
        self.dtype = dtype
        self._pieces: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """A copy of one vector, in float64."""
        for piece in self._pieces:
            if index < len(piece):
                return piece[index].to(torch.float64, copy=True)
            index -= len(piece)
        raise IndexError(index)

    def _rows(self, newest: int | None = None) -> list[Tensor]:
        rows, left = [], self._count
        skipped = 0 if newest is None else self._count - newest
        for piece in self._pieces:
            if left <= 0:
                break
            if skipped < min(left, len(piece)):
                rows.append(piece[skipped:left])
            left -= len(piece)
            skipped = max(skipped - len(piece), 0)
        return rows

    def append(self, vectors: Tensor) -> None:
        """Store a vector of shape ``(n,)``, or the columns of a block ``(n, p)``."""
        if vectors.ndim == 2:
            for column in vectors.T:
                self.append(column)
            return
        room = sum(len(piece) for piece in self._pieces)
        if self._count == room:
            # Pieces grow with the basis, so that a long one is still a handful of products.
            most = max(_PIECE_BYTES // max(self._length * self.dtype.itemsize, 1), 1)
            size = min(max(_FEWEST_ROWS, room), most, max(self.capacity - room, 1))
            shape = (size, self._length)
            self._pieces.append(torch.empty(shape, dtype=self.dtype, device=vectors.device))
        index = self._count
        for piece in self._pieces:
            if index < len(piece):
                piece[index] = vectors
                break
            index -= len(piece)
        self._count += 1

    def truncate(self, count: int) -> None:
        """Forget all but the first ``count`` vectors; their memory is kept for the next ones."""
        self._count = min(count, self._count)

    def clear(self) -> None:
        """Forget all vectors and give their memory back."""
        self._pieces, self._count = [], 0

    def inner(self, vectors: Tensor, newest: int | None = None) -> Tensor:
        """Inner products with a vector ``(n,)`` or a block ``(n, p)``: one sum over processes.

        Of the ``newest`` vectors only, if given.
        """
        rows = self._rows(newest)
        if not rows:
            return torch.zeros((0, *vectors.shape[1:]), dtype=vectors.dtype, device=vectors.device)
        partial = torch.cat([self._times(row, vectors) for row in rows])
        return self._operator.sum_over_shards(partial)

    def subtract_(self, vectors: Tensor, coefficients: Tensor) -> None:
        """Take ``basis @ coefficients`` off ``vectors``: coefficients of the newest ones."""
        rows = self._rows(len(coefficients))
        parts = coefficients.split([len(row) for row in rows])
        for row, part in zip(rows, parts, strict=True):
            self._add(vectors, row, part, -1.0)

    def combine(self, coefficients: Tensor) -> Tensor:
        """``basis @ coefficients`` for ``coefficients`` of shape ``(k, l)``, in float64."""
        shape = (self._length, *coefficients.shape[1:])
        result = torch.zeros(shape, dtype=torch.float64, device=coefficients.device)
        rows = self._rows()
        parts = coefficients.split([len(row) for row in rows])
        for row, part in zip(rows, parts, strict=True):
            self._add(result, row, part, 1.0)
        return result

    def rotate(self, coefficients: Tensor) -> None:
        """Replace the ``k`` vectors by their ``l <= k`` combinations with ``coefficients (k, l)``.

        In place, a slice of the entries after the other: no second basis is allocated.
        """
        rows = self._rows()
        parts = coefficients.split([len(row) for row in rows])
        kept = coefficients.shape[1]
        step = max(self._length // max(self._count, 1), _PANEL)
        for begin in range(0, self._length, step):
            piece = slice(begin, begin + step)
            turned = torch.zeros((), dtype=torch.float64, device=coefficients.device)
            for row, part in zip(rows, parts, strict=True):
                turned = turned + part.T @ row[:, piece].to(torch.float64)
            place = 0
            for row in rows:
                count = min(len(row), kept - place)
                if count <= 0:
                    break
                row[:count, piece] = turned[place : place + count]
                place += count
        self._count = kept

    def dense(self) -> Tensor:
        """All vectors as columns, a copy in float64: for small ones."""
        return torch.cat(self._rows()).T.to(torch.float64)

    def rows(self) -> Tensor:
        """All vectors as rows, in the stored dtype; a view where there is one piece."""
        rows = self._rows()
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _times(self, row: Tensor, vectors: Tensor) -> Tensor:
        if row.dtype == vectors.dtype:
            return row @ vectors
        total = torch.zeros((len(row), *vectors.shape[1:]), dtype=vectors.dtype, device=row.device)
        step = self._panel(row)
        for begin in range(0, self._length, step):
            part = slice(begin, begin + step)
            total += row[:, part].to(vectors.dtype) @ vectors[part]
        return total

    def _add(self, into: Tensor, row: Tensor, coefficients: Tensor, sign: float) -> None:
        if row.dtype == into.dtype:
            if into.ndim == 1:
                into.addmv_(row.T, coefficients, alpha=sign)
            else:
                into.addmm_(row.T, coefficients, alpha=sign)
            return
        step = self._panel(row)
        for begin in range(0, self._length, step):
            part = slice(begin, begin + step)
            into[part] += sign * (row[:, part].to(into.dtype).T @ coefficients)

    def _panel(self, row: Tensor) -> int:
        # On the host a panel stays in the cache; a device would rather have few, large kernels.
        return max(_PANEL * 64 // len(row), 64) * (1 if row.device.type == "cpu" else 256)
