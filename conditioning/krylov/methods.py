"""Lanczos and power iteration as functions of "a symmetric matvec"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, NonFiniteError
from conditioning.krylov import vectors
from conditioning.krylov.run import LanczosRun
from conditioning.operators.base import FunctionOperator, LinearOperator, as_operator


class Lanczos(NamedTuple):
    """What ``lanczos`` returns; ``A @ basis == basis @ tridiagonal + residual e_k^T``.

    Attributes
    ----------
    basis : Tensor of shape (n, k)
        Orthonormal columns; ``k`` is less than ``num_steps`` when the Krylov space closed.
    tridiagonal : Tensor of shape (k, k)
        Symmetric, float64, on the host.
    residual : Tensor of shape (n,)
        Orthogonal to the basis; zero to rounding when the Krylov space closed.
    """

    basis: Tensor
    tridiagonal: Tensor
    residual: Tensor


class PowerIteration(NamedTuple):
    """What ``power_iteration`` returns.

    Attributes
    ----------
    value : float
        Ritz value of largest magnitude.
    vector : Tensor of shape (n,)
        Its unit Ritz vector.
    residual_norm : float
        ``||A vector - value vector||``: an eigenvalue lies within this distance of ``value``.
    num_matvecs : int
    converged : bool
        Whether ``residual_norm <= rtol |value|``. Converged means *an* eigenvalue; that it is
        the largest is only as likely as the start vector is generic.
    """

    value: float
    vector: Tensor
    residual_norm: float
    num_matvecs: int
    converged: bool


def check_steps(num_steps: int) -> None:
    """Refuse a number of steps below one."""
    if num_steps < 1:
        msg = f"num_steps must be at least 1, got {num_steps}."
        raise InvalidArgumentError(msg)


def _operator_of(matvec: Any, start: Tensor) -> LinearOperator:
    if isinstance(matvec, LinearOperator) or not callable(matvec):
        return as_operator(matvec)
    size = start.shape[0]
    dtype = start.dtype if start.dtype.is_floating_point else torch.float64
    return FunctionOperator(matvec, (size, size), dtype, start.device)


def lanczos(
    matvec: Callable[[Tensor], Tensor] | LinearOperator | Tensor,
    start: Tensor,
    num_steps: int,
) -> Lanczos:
    """Tridiagonalise a symmetric operator with full reorthogonalisation.

    Parameters
    ----------
    matvec : callable, LinearOperator or matrix
        ``v -> A v`` for tensors of shape ``(n,)``.
    start : Tensor of shape (n,)
    num_steps : int
        Steps wanted. Fewer are done when the Krylov space closes before.

    Returns
    -------
    Lanczos
        ``basis, tridiagonal, residual`` with ``A Q = Q T + r e_k^T``.

    References
    ----------
    C. Lanczos, J. Res. Nat. Bur. Standards 45 (1950) 255-282. Y. Saad, Numerical Methods for
    Large Eigenvalue Problems, 2nd ed., 2011, section 6.6.
    """
    check_steps(num_steps)
    run = LanczosRun(_operator_of(matvec, start), start)
    run.extend(num_steps)
    tridiagonal = torch.from_numpy(run.jacobi.dense())
    return Lanczos(run.basis, tridiagonal, run.residual)


def power_iteration(
    matvec: Callable[[Tensor], Tensor] | LinearOperator | Tensor,
    start: Tensor,
    num_steps: int = 1000,
    rtol: float = 1e-6,
) -> PowerIteration:
    """Eigenvalue of largest magnitude by power iteration.

    Each step takes the Rayleigh-Ritz pair from the span of the last *two* iterates,
    at no further product. So a spectrum that is symmetric about zero, where plain power
    iteration never settles, converges like any other.

    Parameters
    ----------
    matvec : callable, LinearOperator or matrix
        ``v -> A v`` with ``A`` symmetric, tensors of shape ``(n,)``.
    start : Tensor of shape (n,)
    num_steps : int
        Products at most.
    rtol : float
        Stop when the residual norm is at most ``rtol`` times the Ritz value.

    Returns
    -------
    PowerIteration
    """
    check_steps(num_steps)
    if not 0 < rtol < 1:
        msg = f"rtol must lie between 0 and 1, got {rtol}."
        raise InvalidArgumentError(msg)
    operator = _operator_of(matvec, start)
    norm = vectors.norm(operator, start.to(torch.float64))
    if not (torch.isfinite(norm) and norm > 0):
        msg = "The start vector of power iteration must be finite and not zero."
        raise InvalidArgumentError(msg)
    current = start.detach().to(operator.device, torch.float64) / norm
    previous: tuple[Tensor, Tensor] | None = None
    best = PowerIteration(float("nan"), current, float("inf"), 0, False)
    for step in range(1, num_steps + 1):
        image = operator.matvec(current).to(torch.float64)
        best = _ritz_pair(operator, current, image, previous)._replace(num_matvecs=step)
        if not np.isfinite(best.residual_norm):
            msg = "A product of the operator is not finite (NaN or infinity)."
            raise NonFiniteError(msg)
        length = vectors.norm(operator, image)
        if best.residual_norm <= rtol * abs(best.value) or float(length) == 0:
            return best._replace(converged=True)
        previous = (current, image)
        current = image / length
    return best


def _ritz_pair(
    operator: LinearOperator,
    vector: Tensor,
    image: Tensor,
    previous: tuple[Tensor, Tensor] | None,
) -> PowerIteration:
    """The dominant Ritz pair of one vector, or of two when the older one adds a direction."""
    quotient = vectors.inner(operator, vector, image)
    residual = vectors.norm(operator, image - quotient * vector)
    single = PowerIteration(float(quotient), vector, float(residual), 0, False)
    if previous is None:
        return single
    overlap = vectors.inner(operator, vector, previous[0])
    other = previous[0] - overlap * vector
    length = vectors.norm(operator, other)
    if float(length) < 1e-5:  # parallel to rounding: the difference has no digits left
        return single
    basis = torch.stack([vector, other / length], dim=1)
    images = torch.stack([image, (previous[1] - overlap * image) / length], dim=1)
    small = vectors.inner(operator, basis, images)
    values, turned = torch.linalg.eigh((small + small.T) / 2)
    top = int(values.abs().argmax())
    ritz = basis @ turned[:, top]
    residual = vectors.norm(operator, images @ turned[:, top] - values[top] * ritz)
    if float(residual) >= single.residual_norm:
        return single
    return PowerIteration(float(values[top]), ritz, float(residual), 0, False)
