r"""Closed forms at zero weights for networks whose shortcuts skip n matrices.

The network is a product of ``R`` units :math:`x \mapsto x + \sigma_{post}(W^{r,n}
\sigma_{mid}(\cdots W^{r,1} \sigma_{pre}(x)))` with square bias-free matrices, ``L = nR``
of them, under the loss :math:`\|Y - \hat Y\|_F^2 / 2m`. Samples are rows: ``inputs`` and
``targets`` have shape ``(m, d)``. Parameters are ordered layer by layer, each matrix row
by row, as ``named_parameters`` of a stack of ``nn.Linear`` orders them.

Everything follows from two moments, :math:`\Sigma_{XX} = X^T X / m` and the residual
moment :math:`D = \Sigma_{XX} - \Sigma_{YX}`, the gradient of the loss with respect to the
end-to-end map at the identity.

Sources: "Li et al." is Li, Jiao, Han, Weissman, *Demystifying ResNet*, arXiv:1611.01186;
"derived here" marks what that paper does not state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory._checks import (
    elementwise,
    finite_float,
    positive_int,
    real_tensor,
    samples,
    square_matrix,
    symmetric_matrix,
)
from conditioning.theory.activations import Activation
from conditioning.theory.discrete_spectrum import DiscreteSpectrum, rounding_atol

# ---------------------------------------------------------------------------- moments


def second_moments(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    r"""Uncentred moments :math:`\Sigma_{XX} = X^T X / m` and :math:`\Sigma_{YX} = Y^T X / m`.

    Source: Li et al., definitions.

    Parameters
    ----------
    inputs, targets : Tensor of shape (m, d)
        One sample per row.

    Returns
    -------
    input_moment, cross_moment : Tensor of shape (d, d)
        :math:`\Sigma_{XX}` and :math:`\Sigma_{YX}`.

    Raises
    ------
    ShapeError
        If the two are not matrices of one shape with at least one sample.
    InvalidArgumentError
        If an entry is not finite.
    """
    x, y = samples(inputs, targets)
    return x.T @ x / len(x), y.T @ x / len(x)


def residual_moment(input_moment: Tensor, cross_moment: Tensor) -> Tensor:
    r"""Residual moment :math:`D = \Sigma_{XX} - \Sigma_{YX}` of the identity map.

    Source: Li et al., main theorem (linear case); the symbol is ours.

    Parameters
    ----------
    input_moment : Tensor of shape (d, d)
        :math:`\Sigma_{XX}`, symmetric.
    cross_moment : Tensor of shape (d, d)
        :math:`\Sigma_{YX}`.

    Returns
    -------
    Tensor of shape (d, d)
        ``D``.

    Raises
    ------
    ShapeError
        If the shapes are not one ``(d, d)``.
    InvalidArgumentError
        If ``input_moment`` is not symmetric, or an entry is not finite.
    """
    first = symmetric_matrix(input_moment, "input_moment")
    return first - square_matrix(cross_moment, "cross_moment", size=len(first))


def sample_residual_moment(
    inputs: Tensor, targets: Tensor, *, pre: Activation | None = None
) -> Tensor:
    r"""Residual moment :math:`M = \frac1m \sum_\mu (x^\mu - y^\mu)\, \sigma_{pre}(x^\mu)^T`.

    Source: Li et al., main theorem. With ``pre=None`` it is ``D``.

    Parameters
    ----------
    inputs, targets : Tensor of shape (m, d)
        One sample per row.
    pre : callable, optional
        Activation before the first matrix of a unit; ``None`` is the identity.

    Returns
    -------
    Tensor of shape (d, d)
        ``M``.

    Raises
    ------
    ShapeError
        If the two are not matrices of one shape, or ``pre`` is not elementwise.
    InvalidArgumentError
        If an entry is not finite, or ``pre`` is not callable.
    """
    x, y = samples(inputs, targets)
    return (x - y).T @ elementwise(pre, x, "pre") / len(x)


# --------------------------------------------------------------------- n >= 2, at zero


def stationary_order(shortcut_depth: int) -> int:
    r"""Order ``n - 1`` of the stationary point at zero: derivatives of order 1 .. n - 1 vanish.

    Source: Li et al., main theorem, part 1. It is exactly that order when the residual
    moment is nonzero (derived here). ``n = 1`` gives 0: not stationary.

    Parameters
    ----------
    shortcut_depth : int
        Matrices that a shortcut skips, ``n >= 1``.

    Returns
    -------
    int
        ``n - 1``.

    Raises
    ------
    InvalidArgumentError
        If ``shortcut_depth`` is not a positive integer.
    """
    return positive_int(shortcut_depth, "shortcut_depth") - 1


def leading_coefficient(
    moment: Tensor, weights: Tensor, *, mid_slope: float = 1.0, post_slope: float = 1.0
) -> Tensor:
    r"""Coefficient of :math:`t^n` in the loss along a ray from zero.

    .. math:: L(tw) = L(0) + t^n c + o(t^n), \qquad
              c = \sigma_{post}'(0)\, \sigma_{mid}'(0)^{n-1}
                  \sum_r \langle M, W^{r,n} \cdots W^{r,1} \rangle,

    so that :math:`d^n L(tw) / dt^n` at ``t = 0`` is ``n! c`` and all lower derivatives
    vanish. Source: derived here, from the proof idea of Li et al., main theorem.

    Parameters
    ----------
    moment : Tensor of shape (d, d)
        Residual moment ``M``, or ``D`` without a pre-activation.
    weights : Tensor of shape (R, n, d, d)
        Direction ``w``; ``weights[r, l]`` is the matrix :math:`W^{r+1,l+1}`.
    mid_slope, post_slope : float
        Slopes at zero of the activations, both of which vanish at zero.

    Returns
    -------
    Tensor of shape ()
        ``c``.

    Raises
    ------
    ShapeError
        If ``weights`` is not ``(R, n, d, d)`` with the ``d`` of ``moment``.
    InvalidArgumentError
        If an entry or slope is not finite.
    """
    m = square_matrix(moment, "moment")
    w = real_tensor(weights, "weights")
    size = len(m)
    if w.ndim != 4 or 0 in w.shape or w.shape[2:] != (size, size):
        msg = f"weights must have shape (R, n, {size}, {size}), got {tuple(w.shape)}."
        raise ShapeError(msg)
    product = w[:, 0]
    for layer in range(1, w.shape[1]):
        product = w[:, layer] @ product
    slope = finite_float(post_slope, "post_slope") * (
        finite_float(mid_slope, "mid_slope") ** (w.shape[1] - 1)
    )
    return slope * (m * product.sum(0)).sum()


def two_shortcut_spectrum(
    moment: Tensor, num_units: int, *, mid_slope: float = 1.0, post_slope: float = 1.0
) -> DiscreteSpectrum:
    r"""Hessian spectrum at zero for shortcuts of depth 2.

    The eigenvalues are :math:`\pm \sigma_{mid}'(0)\, \sigma_{post}'(0)\, \sigma_i(M)`, each
    with multiplicity :math:`dR`, so the condition number is :math:`\kappa_2(M)` for every
    ``R`` (infinite when ``M`` is singular), the index is 1/2 when ``M`` is not, and there
    are at most ``2d`` distinct eigenvalues. Eigenvalues: Li et al., main theorem, part 2;
    multiplicities: derived here.

    Parameters
    ----------
    moment : Tensor of shape (d, d)
        Residual moment ``M``, or ``D`` without a pre-activation.
    num_units : int
        ``R``.
    mid_slope, post_slope : float
        Slopes at zero of the activations, both of which vanish at zero.

    Returns
    -------
    DiscreteSpectrum
        Of :math:`2Rd^2` eigenvalues. Singular values below rounding count as zero.

    Raises
    ------
    ShapeError
        If ``moment`` is not square.
    InvalidArgumentError
        If ``num_units`` is not a positive integer, or an entry or slope is not finite.

    Examples
    --------
    >>> two_shortcut_spectrum(torch.diag(torch.tensor([2.0, 0.5])), 8).condition_number()
    4.0
    """
    m = square_matrix(moment, "moment")
    units = positive_int(num_units, "num_units")
    slope = finite_float(mid_slope, "mid_slope") * finite_float(post_slope, "post_slope")
    singular = torch.linalg.svdvals(m) * abs(slope)
    counts = torch.full((2 * len(m),), units * len(m), device=m.device)
    atol = rounding_atol(len(m), float(singular[0]))
    return DiscreteSpectrum.collect(torch.cat([singular, -singular]), counts, atol=atol)


def whitened_condition_bound(cross_norm: float) -> float:
    r"""Bound :math:`\kappa_2(D) \le (1 + s) / (1 - s)` for whitened inputs.

    Source: derived here, from :math:`D = I - \Sigma_{YX}` and
    :math:`s = \|\Sigma_{YX}\|_2 < 1`. By :func:`two_shortcut_spectrum` it bounds the
    condition number of the depth-2 shortcut network at zero.

    Parameters
    ----------
    cross_norm : float
        ``s``, with ``0 <= s < 1``.

    Returns
    -------
    float
        The bound.

    Raises
    ------
    InvalidArgumentError
        If ``cross_norm`` is outside ``[0, 1)``.
    """
    s = finite_float(cross_norm, "cross_norm")
    if not 0 <= s < 1:
        msg = f"cross_norm must be in [0, 1), got {s}: from 1 on, D may be singular."
        raise InvalidArgumentError(msg)
    return (1 + s) / (1 - s)


# ------------------------------------------------------------------ ReLU between, n = 2


def relu_gated_moments(
    inputs: Tensor, targets: Tensor, first_weights: Tensor, *, pre: Activation | None = None
) -> Tensor:
    r"""Residual moments of the samples that open each hidden unit of a ReLU.

    .. math:: D_j = \frac1m \sum_{\mu:\ w_j^T \sigma_{pre}(x^\mu) > 0}
              (x^\mu - y^\mu)\, \sigma_{pre}(x^\mu)^T .

    Source: derived here; Li et al. treat ReLU by an informal local polynomial.

    Parameters
    ----------
    inputs, targets : Tensor of shape (m, d)
        One sample per row.
    first_weights : Tensor of shape (..., d)
        Rows :math:`w_j` of the first matrices, such as ``(R, d, d)``.
    pre : callable, optional
        Activation before the first matrix; ``None`` is the identity.

    Returns
    -------
    Tensor of shape (..., d, d)
        :math:`D_j` for each row.

    Raises
    ------
    ShapeError
        If the rows have not the length ``d`` of the samples, there is none, or the
        samples' shapes differ.
    InvalidArgumentError
        If an entry is not finite, or ``pre`` is not callable.
    """
    x, y = samples(inputs, targets)
    size = x.shape[1]
    rows = real_tensor(first_weights, "first_weights").to(x)
    if rows.ndim == 0 or rows.shape[-1] != size or rows.numel() == 0:
        msg = f"first_weights must have shape (..., {size}), got {tuple(rows.shape)}."
        raise ShapeError(msg)
    features = elementwise(pre, x, "pre")
    difference = (x - y) / len(x)
    gates = features @ rows.reshape(-1, size).T > 0
    gated = [(difference * gate[:, None]).T @ features for gate in gates.T]
    return torch.stack(gated).reshape(*rows.shape, size)


def relu_limit_spectrum(gated_moments: Tensor, *, post_slope: float = 1.0) -> DiscreteSpectrum:
    r"""Limit of the Hessian spectrum at :math:`\epsilon w`, :math:`\epsilon \to 0`, ReLU between.

    For shortcuts of depth 2 the eigenvalues tend to
    :math:`\pm \sigma_{post}'(0)\, \sigma_i(D_j)` over all hidden units ``j`` of all ``R``
    units and all ``i``: the block of unit ``j`` couples column ``j`` of the second matrix
    with row ``j`` of the first. At exactly zero weights the loss is not twice
    differentiable and autograd returns 0. Source: derived here.

    Parameters
    ----------
    gated_moments : Tensor of shape (..., d, d)
        From :func:`relu_gated_moments`, for all rows of all first matrices.
    post_slope : float
        Slope at zero of the activation after the last matrix, which vanishes at zero.

    Returns
    -------
    DiscreteSpectrum
        Of ``2 d`` eigenvalues for each matrix, :math:`2Rd^2` for ``(R, d, d, d)``.

    Raises
    ------
    ShapeError
        If ``gated_moments`` is not a stack of square matrices.
    InvalidArgumentError
        If an entry or the slope is not finite.
    """
    moments = real_tensor(gated_moments, "gated_moments")
    if moments.ndim < 2 or moments.shape[-1] != moments.shape[-2] or moments.numel() == 0:
        msg = f"gated_moments must have shape (..., d, d), got {tuple(moments.shape)}."
        raise ShapeError(msg)
    singular = torch.linalg.svdvals(moments).flatten()
    singular = singular * abs(finite_float(post_slope, "post_slope"))
    values = torch.cat([singular, -singular])
    atol = rounding_atol(moments.shape[-1], float(singular.max()))
    return DiscreteSpectrum.collect(values, torch.ones_like(values, dtype=torch.int64), atol=atol)


# ---------------------------------------------------------------- where the minima lie


def near_global_minimiser_norm(optimal_map: Tensor, num_units: int, shortcut_depth: int) -> float:
    r"""Spectral norm :math:`((\pi + \gamma)/R)^{1/n}` that weights of a global minimiser need.

    For large ``R`` the linear n-shortcut network has exact global minimisers with
    :math:`\max_{r,l} \|W^{r,l}\|_2 \le ((\pi + \gamma)/R)^{1/n} (1 + o(1))`, where
    :math:`\gamma = \max_i |\log \sigma_i(W^*)|` and :math:`\det W^* > 0`: minima approach
    zero as depth grows. Source: derived here (polar factors :math:`W^* = UQ`, split into
    equal powers of ``exp``). It stands in for the infinite-depth statement of Li et al.
    and is not theirs. The leading order only, no bound at finite ``R``.

    Parameters
    ----------
    optimal_map : Tensor of shape (d, d)
        :math:`W^* = \Sigma_{YX} \Sigma_{XX}^{-1}`.
    num_units : int
        ``R``.
    shortcut_depth : int
        ``n``.

    Returns
    -------
    float
        The leading order of the norm.

    Raises
    ------
    ShapeError
        If ``optimal_map`` is not square.
    InvalidArgumentError
        If :math:`\det W^* \le 0` up to rounding (a negative one is out of reach of
        near-identity factors, a zero one is only approached), an entry is not finite, or
        a count is not a positive integer.
    """
    w = square_matrix(optimal_map, "optimal_map")
    units = positive_int(num_units, "num_units")
    depth = positive_int(shortcut_depth, "shortcut_depth")
    singular = torch.linalg.svdvals(w)
    sign = float(torch.linalg.slogdet(w).sign)
    if sign <= 0 or float(singular[-1]) <= rounding_atol(len(w), float(singular[0])):
        msg = (
            f"optimal_map must have a positive determinant, got sign {sign:g} and smallest "
            f"singular value {float(singular[-1]):.3g}."
        )
        raise InvalidArgumentError(msg)
    gamma = float(singular.log().abs().max())
    return math.pow((math.pi + gamma) / units, 1 / depth)
