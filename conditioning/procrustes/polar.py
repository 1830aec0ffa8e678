r"""The polar factor of many matrices at once: the nearest matrix with equal singular values.

Of all matrices whose singular values are equal to one, :math:`U V^*` is nearest to
:math:`X = U S V^*` in the Frobenius norm, and in every other unitarily invariant one: the
orthogonal Procrustes problem, P. H. Schönemann, *A generalized solution of the orthogonal
Procrustes problem*, Psychometrika 31, 1966; K. Fan, A. J. Hoffman, *Some metric inequalities in the
space of matrices*, Proc. AMS 6, 1955. It is :math:`X G^{-1/2}` with the Gram matrix
:math:`G = X^* X`, always of the smaller side here: the other one is singular.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError

METHODS = ("auto", "eigh", "newton-schulz", "svd")
# Newton-Schulz steps before each look at the residual: the first round is enough for weights that
# left the projected set in one step of training. Small singular values grow by 1.5 in each step:
# all 36 reach from 5e-7 to 1.
_ROUNDS = (6, 12, 18)


@dataclass(frozen=True)
class Polar:
    """Polar factors, and how they were found.

    Attributes
    ----------
    factors : Tensor of shape (..., m, n)
        All singular values are 1 to rounding.
    deficient : Tensor of shape (...) or None
        bool: the smallest singular value is zero to rounding, so the factor is one of many; or
        the matrix is not finite. ``None`` where the method shows that there is no such matrix.
    method : str
        What was used in the end: ``eigh``, ``newton-schulz`` or ``svd``.
    """

    factors: Tensor
    deficient: Tensor | None
    method: str


def polar(matrices: Tensor, method: str = "auto", *, rounding: float | None = None) -> Polar:
    """Polar factors of a batch of real or complex matrices.

    Parameters
    ----------
    matrices : Tensor of shape (..., m, n)
        Finite.
    method : {"auto", "eigh", "newton-schulz", "svd"}
        ``eigh`` and ``newton-schulz`` work on the smaller Gram matrix, whose condition number is
        the square of that of the matrix; both are checked, and ``svd`` takes over where they would
        lose digits. ``auto`` takes ``newton-schulz``, which is matrix products only, on a GPU and
        ``eigh`` elsewhere.
    rounding : float, optional
        Relative accuracy of the entries, that of their dtype by default: a singular value below
        ``rounding`` times the largest one counts as zero. Errors of entries, which are as good as
        random, make no more; the usual ``max(m, n) * rounding`` refuses every third random matrix
        of 1024 rows and columns.

    Returns
    -------
    Polar
        In double precision, but in single precision where Newton-Schulz was used on it.

    Raises
    ------
    ShapeError
        If there are no matrices.
    InvalidArgumentError
        If there is no such method.
    """
    if method not in METHODS:
        msg = f"method must be one of {', '.join(METHODS)}, got {method!r}."
        raise InvalidArgumentError(msg)
    if matrices.ndim < 2 or 0 in matrices.shape:
        msg = f"Polar factors are those of matrices (..., m, n), got {tuple(matrices.shape)}."
        raise ShapeError(msg)
    eps = torch.finfo(matrices.dtype).eps if rounding is None else rounding
    if method == "auto":
        method = "newton-schulz" if matrices.device.type == "cuda" else "eigh"
    rows, columns = matrices.shape[-2:]
    tall = matrices if rows >= columns else matrices.mH
    found = None
    if method == "newton-schulz":
        found = _newton_schulz(tall, eps)
    elif method == "eigh":
        found = _from_gram(tall, eps)
    if found is None:
        found = _svd(tall, eps)
    if rows >= columns:
        return found
    return Polar(found.factors.mH.resolve_conj(), found.deficient, found.method)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _svd(tall: Tensor, eps: float) -> Polar:
    left, values, right = torch.linalg.svd(_exact(tall), full_matrices=False)
    zero = max(eps, tall.shape[-2] * torch.finfo(torch.float64).eps) * values[..., 0]
    # Also true of a zero matrix, and of singular values that are not numbers. Those of a matrix
    # with infinite entries may be any.
    deficient = ~(values[..., -1] > zero) | ~torch.isfinite(tall).flatten(-2).all(-1)
    return Polar(left @ right, deficient, "svd")


def _from_gram(tall: Tensor, eps: float) -> Polar | None:
    """``X G^(-1/2)``, or ``None`` where squaring lost more than the entries' own rounding."""
    exact = _exact(tall)
    try:
        values, vectors = torch.linalg.eigh(exact.mH @ exact)
    # Entries whose squares are infinite do that, too.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    least, most = values[..., 0], values[..., -1]
    # Rounding of G, relative to its smallest eigenvalue, is the relative error of the factor.
    allowed = max(eps, 1e-12) * 0.1
    if not bool((least * allowed > torch.finfo(torch.float64).eps * most).all()):
        return None
    root = (vectors * values.rsqrt()[..., None, :]) @ vectors.mH
    return Polar(exact @ root, None, "eigh")


def _newton_schulz(tall: Tensor, eps: float) -> Polar | None:
    r"""``X <- X (3I - X* X) / 2``, or ``None`` if that did not converge.

    All steps are taken on the small Gram matrix, ``T = (3I - G)/2, G <- T G T, R <- R T``, so
    that ``X R`` is formed once in a round. N. J. Higham, *Functions of Matrices*, SIAM 2008,
    section 8.3 and problem 8.20.
    """
    coarse = eps >= torch.finfo(torch.float32).eps
    factor = tall.to(torch.complex64 if tall.is_complex() else torch.float32)
    factor = factor if coarse else _exact(tall)
    unit = torch.finfo(factor.dtype).eps
    size = tall.shape[-1]
    identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
    limit = 20 * math.sqrt(size) * unit
    with _full_precision():
        gram = factor.mH @ factor
        # Two bounds on the largest eigenvalue: the second is sharp for a multiple of the identity.
        bound = torch.minimum(
            torch.linalg.matrix_norm(gram), gram.abs().sum(-1).amax(-1)
        ).clamp_min(torch.finfo(factor.dtype).tiny)
        scaled = factor * bound.rsqrt()[..., None, None]
        found = scaled
        for steps in _ROUNDS:
            gram = found.mH @ found
            root = identity.expand_as(gram)
            for _ in range(steps):
                step = 1.5 * identity - 0.5 * gram
                gram = step @ gram @ step
                root = root @ step
            found = found @ root
            # Once more on the matrix itself, because rounding adds up in the Gram matrix.
            found = found @ (1.5 * identity - 0.5 * (found.mH @ found))
            drift = torch.linalg.matrix_norm(found.mH @ found - identity).amax()
            # Orthonormal columns are not enough: those of the nearest such matrix make this
            # product Hermitian.
            inner = found.mH @ scaled
            skew = (torch.linalg.matrix_norm(inner - inner.mH)).amax()
            # The one look that makes a GPU wait.
            if float(torch.maximum(drift, skew)) <= limit:
                return Polar(found, None, "newton-schulz")
    return None


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TensorFloat-32 off: its ten bits are no base for a convergence check."""
    matmul: Any = torch.backends.cuda.matmul
    newer = hasattr(matmul, "fp32_precision")
    name, value = ("fp32_precision", "ieee") if newer else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)
