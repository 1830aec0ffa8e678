r"""Closed forms at zero weights for shortcuts of depth 1, and for orthogonal plain nets.

Setting, notation and sources as in :mod:`conditioning.theory.shortcut_depth`: the linear
network :math:`(I + W^L) \cdots (I + W^1)` under the loss :math:`\|Y - \hat Y\|_F^2 / 2m`.
At zero it is the plain net with identity matrices, and zero is not stationary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory._checks import (
    finite_float,
    positive_int,
    real_tensor,
    square_matrix,
    symmetric_matrix,
)
from conditioning.theory.discrete_spectrum import DiscreteSpectrum, rounding_atol


def one_shortcut_gradient(residual: Tensor, num_layers: int) -> Tensor:
    """Gradient at zero for shortcuts of depth 1: ``D`` for every layer, so not stationary.

    Source: Li et al., gradient step, evaluated at zero.

    Parameters
    ----------
    residual : Tensor of shape (d, d)
        Residual moment ``D``.
    num_layers : int
        ``L``.

    Returns
    -------
    Tensor of shape (L, d, d)
        Gradient by each weight matrix.

    Raises
    ------
    ShapeError
        If ``residual`` is not square.
    InvalidArgumentError
        If ``num_layers`` is not a positive integer, or an entry is not finite.
    """
    d = square_matrix(residual, "residual")
    return d.repeat(positive_int(num_layers, "num_layers"), 1, 1)


def one_shortcut_hessian(input_moment: Tensor, residual: Tensor, num_layers: int) -> Tensor:
    r"""Hessian at zero for shortcuts of depth 1, as a dense matrix.

    .. math:: H = J \otimes B + N \otimes C + N^T \otimes C^T, \qquad
              B: Z \mapsto Z \Sigma_{XX}, \quad C: Z \mapsto D Z^T,

    with ``J`` all ones and ``N`` strictly lower triangular ones, both ``L x L``. Block
    Toeplitz: ``B`` on the diagonal, ``B + C`` below. Source: Li et al., main theorem,
    part 3; written with Kronecker products here.

    Parameters
    ----------
    input_moment : Tensor of shape (d, d)
        :math:`\Sigma_{XX}`, symmetric.
    residual : Tensor of shape (d, d)
        Residual moment ``D``.
    num_layers : int
        ``L``.

    Returns
    -------
    Tensor of shape (L d^2, L d^2)
        ``H``.

    Raises
    ------
    ShapeError
        If the shapes are not one ``(d, d)``.
    InvalidArgumentError
        If ``input_moment`` is not symmetric, an entry is not finite, or ``num_layers`` is
        not a positive integer.
    """
    sigma = symmetric_matrix(input_moment, "input_moment")
    size = len(sigma)
    d = square_matrix(residual, "residual", size=size).to(sigma)
    layers = positive_int(num_layers, "num_layers")
    identity = torch.eye(size).to(sigma)
    b = torch.kron(identity, sigma)
    c = torch.einsum("il,jk->ijkl", d, identity).reshape(size**2, size**2)
    ones = torch.ones(layers, layers).to(sigma)
    lower = torch.kron(ones.tril(-1), c)
    return torch.kron(ones, b) + lower + lower.T


def one_shortcut_isotropic_spectrum(
    dim: int, num_layers: int, residual_scale: float
) -> DiscreteSpectrum:
    r"""Hessian spectrum at zero, shortcuts of depth 1, :math:`\Sigma_{XX} = I`, :math:`D = sI`.

    With :math:`a = d(d+1)/2`, :math:`b = d(d-1)/2` (targets :math:`Y = (1-s)X`):

    ================  ================
    eigenvalue        multiplicity
    ================  ================
    ``L(1+s) - s``    ``a``
    ``-s``            ``a (L-1)``
    ``L(1-s) + s``    ``b``
    ``s``             ``b (L-1)``
    ================  ================

    For :math:`0 < s \le 1` and :math:`L \ge 2` the condition number is
    :math:`(L(1+s) - s)/s`: linear in depth. For :math:`s > 1` and :math:`L = s/(s-1)`
    exactly ``b`` eigenvalues are zero. Source: derived here.

    Parameters
    ----------
    dim : int
        ``d``.
    num_layers : int
        ``L``.
    residual_scale : float
        ``s``.

    Returns
    -------
    DiscreteSpectrum
        Of :math:`Ld^2` eigenvalues; ``nullity`` and ``condition_number(nonzero=True)``
        serve the singular case.

    Raises
    ------
    InvalidArgumentError
        If ``dim`` or ``num_layers`` is not a positive integer, or ``s`` is not finite.
    """
    d = positive_int(dim, "dim")
    layers = positive_int(num_layers, "num_layers")
    s = finite_float(residual_scale, "residual_scale")
    a, b = d * (d + 1) // 2, d * (d - 1) // 2
    values = [layers * (1 + s) - s, -s, layers * (1 - s) + s, s]
    counts = [a, a * (layers - 1), b, b * (layers - 1)]
    return DiscreteSpectrum.collect(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(counts),
        atol=rounding_atol(1, layers * (1 + abs(s))),
    )


def one_shortcut_zero_target_condition_number(input_moment: Tensor, num_layers: int) -> float:
    r"""Condition number :math:`(2L-1)\, \kappa(\Sigma_{XX})` at zero, depth 1, targets ``Y = 0``.

    Source: derived here.

    Parameters
    ----------
    input_moment : Tensor of shape (d, d)
        :math:`\Sigma_{XX}`, symmetric positive definite.
    num_layers : int
        ``L``.

    Returns
    -------
    float
        The condition number over all eigenvalues.

    Raises
    ------
    ShapeError
        If ``input_moment`` is not square.
    InvalidArgumentError
        If it is not symmetric positive definite beyond rounding, an entry is not finite, or
        ``num_layers`` is not a positive integer.

    Notes
    -----
    Proof. Here :math:`D = \Sigma_{XX}`. In the eigenbasis of :math:`\Sigma_{XX}` the entries
    ``Z_ii`` give the eigenvalues :math:`(2L-1)\sigma_i` and, for ``L > 1``,
    :math:`-\sigma_i`. The block norm of ``H`` is at most
    :math:`L\|\Sigma\| + (L-1)\|\Sigma\|`, so :math:`|\lambda|_{\max} = (2L-1)\sigma_{\max}`.
    It remains that a pair ``x = (Z_ij, Z_ji)`` has no eigenvalue with
    :math:`|\lambda| < \min(\sigma_i, \sigma_j)`. Differences of consecutive rows of
    :math:`Hx = \lambda x` read :math:`K_1 x_{r+1} = K_2 x_r` with
    :math:`K_1 = \begin{pmatrix}\sigma_i & \lambda \\ \lambda & \sigma_j\end{pmatrix}` and
    :math:`K_2` the same with i, j exchanged, both positive definite; the first row reads
    :math:`K_1 x_1 = S (\sigma_i, \sigma_j)^T` where ``S`` sums all entries. ``S = 0`` forces
    ``x = 0``. For ``S = 1``, :math:`a_r = (x_r)_1 + (x_r)_2` obeys
    :math:`a_{r+1} = \tau a_r - a_{r-1}` with
    :math:`\tau = \mathrm{tr}\, K_1^{-1} K_2 \ge 2`, and with :math:`k = \det K_1`

    .. math:: a_1 - 1 = (\sigma_i-\lambda)(\sigma_j-\lambda)/k > 0, \qquad
              a_2 - a_1 = (\sigma_i-\sigma_j)^2 (\sigma_i-\lambda)(\sigma_j-\lambda)/k^2 \ge 0,

    so ``a`` never decreases, and :math:`1 = S = \sum_r a_r \ge a_1 > 1` is a contradiction.
    """
    sigma = symmetric_matrix(input_moment, "input_moment")
    layers = positive_int(num_layers, "num_layers")
    values = torch.linalg.eigvalsh(sigma)
    smallest, largest = float(values[0]), float(values[-1])
    if smallest <= rounding_atol(len(sigma), max(largest, 0.0)):
        msg = (
            f"input_moment must be positive definite, its eigenvalues go from {smallest:.3g} to "
            f"{largest:.3g}. Drop directions without variance, e.g. by PCA."
        )
        raise InvalidArgumentError(msg)
    return (2 * layers - 1) * largest / smallest


def one_shortcut_commuting_spectrum(
    input_moment: Tensor, residual: Tensor, num_layers: int
) -> DiscreteSpectrum:
    r"""Hessian spectrum at zero, shortcuts of depth 1, symmetric commuting moments.

    With common eigenvectors, eigenvalues :math:`\sigma_i` of :math:`\Sigma_{XX}` and
    :math:`\delta_i` of ``D``, each ``i`` gives :math:`L(\sigma_i + \delta_i) - \delta_i` once
    and :math:`-\delta_i` with multiplicity ``L - 1``; each pair ``i < j`` gives the ``2L``
    eigenvalues of

    .. math:: \begin{pmatrix} \sigma_j J & \delta_i N + \delta_j N^T \\
              \delta_j N + \delta_i N^T & \sigma_i J \end{pmatrix}.

    The pair blocks are solved one by one: ``d(d-1)/2`` of size ``2L``, in place of one of
    size ``L d^2``. Source: derived here.

    Parameters
    ----------
    input_moment : Tensor of shape (d, d)
        :math:`\Sigma_{XX}`, symmetric.
    residual : Tensor of shape (d, d)
        Residual moment ``D``, symmetric, commuting with ``input_moment``.
    num_layers : int
        ``L``.

    Returns
    -------
    DiscreteSpectrum
        Of :math:`Ld^2` eigenvalues.

    Raises
    ------
    ShapeError
        If the shapes are not one ``(d, d)``.
    InvalidArgumentError
        If a matrix is not symmetric, the two do not commute, an entry is not finite, or
        ``num_layers`` is not a positive integer.
    """
    first = symmetric_matrix(input_moment, "input_moment")
    second = symmetric_matrix(residual, "residual", size=len(first)).to(first)
    layers = positive_int(num_layers, "num_layers")
    sigma, delta = _common_eigenvalues(first, second)
    ones = torch.ones(layers, layers).to(first)
    lower = ones.tril(-1)
    values = [layers * (sigma + delta) - delta, -delta]
    counts = [torch.ones_like(sigma), torch.full_like(sigma, layers - 1)]
    for i in range(len(sigma)):
        for j in range(i + 1, len(sigma)):
            across = delta[i] * lower + delta[j] * lower.T
            block = torch.cat(
                [
                    torch.cat([sigma[j] * ones, across], dim=1),
                    torch.cat([across.T, sigma[i] * ones], dim=1),
                ]
            )
            values.append(torch.linalg.eigvalsh(block))
            counts.append(torch.ones_like(values[-1]))
    found = torch.cat(values)
    atol = rounding_atol(2 * layers, float(found.abs().max()))
    return DiscreteSpectrum.collect(found, torch.cat(counts).to(torch.int64), atol=atol)


def one_shortcut_largest_eigenvalue_bounds(
    input_moment: Tensor, residual: Tensor, num_layers: int
) -> tuple[float, float]:
    r"""Two-sided bound on the largest Hessian eigenvalue at zero, shortcuts of depth 1.

    .. math:: \lambda_{\max}\left(L \Sigma_{XX} + (L-1) \frac{D + D^T}2\right) \le
              \lambda_{\max}(H) \le L \|\Sigma_{XX}\|_2 + (L-1) \|D\|_2 ,

    for whitened data :math:`L(1+\mu) - \mu` with :math:`\mu = \lambda_{\max}((D + D^T)/2)`
    and :math:`L + (L-1)\|D\|_2`. The upper bound also holds for :math:`|\lambda|_{\max}`.
    Source: derived here; below, the same matrix :math:`vv^T` in every layer is the trial
    vector, above, the spectral norms of the blocks are summed along a block row.

    Parameters
    ----------
    input_moment : Tensor of shape (d, d)
        :math:`\Sigma_{XX}`, symmetric; the identity for whitened data.
    residual : Tensor of shape (d, d)
        Residual moment ``D``.
    num_layers : int
        ``L``.

    Returns
    -------
    lower, upper : float
        The bounds.

    Raises
    ------
    ShapeError
        If the shapes are not one ``(d, d)``.
    InvalidArgumentError
        If ``input_moment`` is not symmetric, an entry is not finite, or ``num_layers`` is
        not a positive integer.
    """
    sigma = symmetric_matrix(input_moment, "input_moment")
    d = square_matrix(residual, "residual", size=len(sigma)).to(sigma)
    layers = positive_int(num_layers, "num_layers")
    trial = layers * sigma + (layers - 1) * (d + d.T) / 2
    lower = float(torch.linalg.eigvalsh(trial)[-1])
    norms = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in (sigma, d)]
    return lower, layers * norms[0] + (layers - 1) * norms[1]


def rotate_cross_moment(product: Tensor, cross_moment: Tensor) -> Tensor:
    r"""Rotated moment :math:`Q^T \Sigma_{YX}` that turns orthogonal into zero initialisation.

    A plain linear net whose matrices are orthogonal with product
    :math:`Q = W^L \cdots W^1` has, at that point, the Hessian spectrum of the net with
    shortcuts of depth 1 at zero with :math:`\Sigma_{YX}` replaced by this. Source: derived
    here, by :math:`W^l \to W^l + (W^l \cdots W^1) Z_l (W^{l-1} \cdots W^1)^T`, an isometry
    of the parameters; Li et al. note the case ``Q = I``.

    Parameters
    ----------
    product : Tensor of shape (d, d)
        ``Q``, orthogonal to 1e-8.
    cross_moment : Tensor of shape (d, d)
        :math:`\Sigma_{YX}`.

    Returns
    -------
    Tensor of shape (d, d)
        The rotated moment.

    Raises
    ------
    ShapeError
        If the shapes are not one ``(d, d)``.
    InvalidArgumentError
        If ``product`` is not orthogonal, or an entry is not finite.
    """
    q = _orthogonal(product)
    return q.T @ square_matrix(cross_moment, "cross_moment", size=len(q)).to(q)


def rotate_targets(product: Tensor, targets: Tensor) -> Tensor:
    r"""Rotated targets :math:`YQ`, each row :math:`Q^T y`; see :func:`rotate_cross_moment`.

    Source: derived here.

    Parameters
    ----------
    product : Tensor of shape (d, d)
        ``Q``, orthogonal to 1e-8.
    targets : Tensor of shape (m, d)
        One sample per row.

    Returns
    -------
    Tensor of shape (m, d)
        The rotated targets.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    InvalidArgumentError
        If ``product`` is not orthogonal, or an entry is not finite.
    """
    q = _orthogonal(product)
    y = real_tensor(targets, "targets")
    if y.ndim != 2 or y.shape[1] != len(q):
        msg = f"targets must have shape (m, {len(q)}), got {tuple(y.shape)}."
        raise ShapeError(msg)
    return y @ q.to(y)


def _common_eigenvalues(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of two commuting symmetric matrices, in the order of common eigenvectors."""
    scales = [float(matrix.abs().max()) or 1.0 for matrix in (first, second)]
    a, b = first / scales[0], second / scales[1]
    best, smallest = (a.diagonal(), b.diagonal()), math.inf
    # Eigenvectors of a + c b are common ones unless a coincidence of eigenvalues ties them.
    for c in (0.5 * math.sqrt(5.0) - 0.5, math.sqrt(2.0), -math.e / 3, 7 / math.pi):
        vectors = torch.linalg.eigh(a + c * b).eigenvectors
        rotated = [vectors.T @ matrix @ vectors for matrix in (a, b)]
        error = max(float((m - m.diagonal().diag()).abs().max()) for m in rotated)
        if error < smallest:
            smallest, best = error, (rotated[0].diagonal(), rotated[1].diagonal())
    if smallest > 1e-9:
        msg = (
            "input_moment and residual do not commute: in the best common basis an entry of "
            f"{smallest:.3g} stays off the diagonal. Use one_shortcut_hessian."
        )
        raise InvalidArgumentError(msg)
    return best[0] * scales[0], best[1] * scales[1]


def _orthogonal(product: Tensor) -> Tensor:
    """Return ``product`` when it is orthogonal to 1e-8."""
    q = square_matrix(product, "product")
    error = float((q.T @ q - torch.eye(len(q)).to(q)).abs().max())
    if error > 1e-8:
        msg = f"product must be orthogonal, but Q^T Q differs from the identity by {error:.3g}."
        raise InvalidArgumentError(msg)
    return q
