r"""Two-layer convolutional nets with a shortcut in the filter: loss, critical points, basins.

The net is :math:`f(Z) = \sum_j a_j \, \mathrm{relu}(Z_j^T v)` on ``k`` patches
:math:`Z_j \sim N(0, I_p)`, independent, with the filter :math:`v = u / |u|` (normalised) or
:math:`v = u`. With a shortcut :math:`u = 1/\sqrt p + w`, without one :math:`u = w`: the loss knows
``u`` alone, so the functions here take ``u``, the *filter*, and ``a``, the *outputs*. The targets
are those of a teacher of the same form, :math:`(v^*, a^*)` with :math:`|v^*| = 1`, and the loss is
:math:`L = \frac12 E (f - f^*)^2`.

Which start leads where is the topic of :mod:`~conditioning.theory.shortcut_basins`.

Sources: "Liu et al." is Liu, Chen, Zhou, Du, Zhou, Zhao, *Towards Understanding the Importance of
Shortcut Connections in Residual Networks*, arXiv:1909.04653; "Du et al." is Du, Lee, Tian, Poczos,
Singh, arXiv:1712.00779, for nets without a shortcut; "Cho, Saul" is *Kernel Methods for Deep
Learning*, NIPS 2009. "Derived here" marks what was worked out for this module.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory._checks import positive_int, real_tensor
from conditioning.theory.discrete_spectrum import DiscreteSpectrum

_TWO_PI = 2 * math.pi

# ------------------------------------------------------------------------- loss and gradients


def angle_between(first: Any, second: Any) -> Tensor:
    """Angle between vectors, exact to rounding at 0 and pi, too, where arccos is not.

    Parameters
    ----------
    first, second : Tensor of shape (..., p)
        Not zero.

    Returns
    -------
    Tensor of shape (...)
        In ``[0, pi]``. Source: Kahan's formula ``2 atan2(|x - y|, |x + y|)`` of unit vectors.

    Raises
    ------
    ShapeError
        If the last axes differ, or the others do not fit.
    InvalidArgumentError
        If a vector is zero.

    Examples
    --------
    >>> round(angle_between([1.0, 0.0], [1.0, 1e-12]).item() * 1e12, 9)
    1.0
    """
    x, y = _vectors(first, "first"), _vectors(second, "second")
    _same_last_axis("first and second", x, y)
    fitting(first=x, second=y)
    return angle_of(_unit(x, "first"), _unit(y, "second"))[..., 0]


def rectified_overlap(angle: Tensor | float) -> Tensor:
    r""":math:`g(\varphi) = (\pi - \varphi) \cos \varphi + \sin \varphi`.

    :math:`2\pi \, E\, \mathrm{relu}(Z^T x) \mathrm{relu}(Z^T y) = |x| |y| g(\varphi)` for standard
    normal ``Z`` and the angle between ``x`` and ``y``. It falls from :math:`\pi` at 0 over 1 at
    :math:`\pi/2` to 0 at :math:`\pi`, there as :math:`(\pi - \varphi)^3 / 3`. Source: Cho, Saul
    (their :math:`J_1`).

    Parameters
    ----------
    angle : Tensor of shape (...), or float
        In ``[0, pi]``, up to a few roundings of its dtype.

    Returns
    -------
    Tensor of shape (...)

    Examples
    --------
    >>> rectified_overlap(math.pi / 2).item()
    1.0
    """
    return overlap_of(angle_values(angle))


def conv_loss(
    filters: Tensor,
    outputs: Tensor,
    teacher_filter: Tensor,
    teacher_outputs: Tensor,
    *,
    normalised: bool = True,
) -> Tensor:
    r"""Population loss of the net.

    .. math:: 4 \pi L = (\pi - 1)(|a|^2 + |a^*|^2) - 2 (g(\varphi) - 1) a^T a^*
              + (1^T a - 1^T a^*)^2

    Without normalisation ``a`` stands for :math:`|u| a`. Source: derived here; the form is that
    of Du et al.

    Parameters
    ----------
    filters : Tensor of shape (..., p)
        ``u``; only its direction counts if the net normalises it.
    outputs : Tensor of shape (..., k)
        ``a``.
    teacher_filter, teacher_outputs : Tensor of shape (..., p) and (..., k)
        ``v*``, of norm 1, and ``a*``.
    normalised : bool
        Whether the net divides its filter by its norm.

    Returns
    -------
    Tensor of shape (...)

    Raises
    ------
    ShapeError, InvalidArgumentError
        If axes do not fit, a filter is zero, or the teacher's does not have norm 1.

    Examples
    --------
    >>> u, a = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    >>> conv_loss(u, a, u, a).item()
    0.0
    >>> round(conv_loss(-u, a, u, a).item(), 6)  # (2 (pi - 1) + 2) / (4 pi)
    0.5
    """
    u, a, v_star, a_star = _net(filters, outputs, teacher_filter, teacher_outputs)
    scaled = a if normalised else torch.linalg.vector_norm(u, dim=-1, keepdim=True) * a
    g = rectified_overlap(angle_between(u, v_star))
    squares = (math.pi - 1) * (scaled.square().sum(-1) + a_star.square().sum(-1))
    sums = (scaled.sum(-1) - a_star.sum(-1)).square()
    return (squares - 2 * (g - 1) * (scaled * a_star).sum(-1) + sums) / (2 * _TWO_PI)


def conv_gradients(
    filters: Tensor,
    outputs: Tensor,
    teacher_filter: Tensor,
    teacher_outputs: Tensor,
    *,
    normalised: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Gradients of the population loss in the filter and in the outputs.

    .. math:: \nabla_a L &= \frac{1}{2\pi} \left[ (11^T + (\pi - 1) I) a
              - (11^T + (g - 1) I) a^* \right] \\
              \nabla_u L &= -\frac{a^T a^* (\pi - \varphi)}{2 \pi |u|} (I - v v^T) v^*

    Without normalisation ``a`` stands for :math:`|u| a`, the first has a factor :math:`|u|`, and
    the second gets the radial term :math:`(a^T \nabla_a L) v` with the first before that factor.
    Source: derived here; the form is that of Du et al.

    Parameters
    ----------
    filters, outputs, teacher_filter, teacher_outputs, normalised
        As in :func:`conv_loss`.

    Returns
    -------
    filter_gradient, output_gradient : Tensor of shape (..., p) and (..., k)
        The first is that in ``w``, too.

    Raises
    ------
    ShapeError, InvalidArgumentError
        As :func:`conv_loss`.
    """
    net = _net(filters, outputs, teacher_filter, teacher_outputs)
    in_filter, in_outputs = gradients_of(*net, normalised=normalised)
    shape = torch.broadcast_shapes(net[1].shape, in_outputs.shape)
    return in_filter, in_outputs.broadcast_to(shape)


# ------------------------------------------------------------------------- critical points


def conv_best_outputs(angle: Tensor | float, teacher_outputs: Tensor) -> Tensor:
    r"""Outputs of least loss while the filter is held at an angle.

    :math:`(11^T + (\pi - 1) I)^{-1} (11^T + (g - 1) I) a^*`; at 0 these are :math:`a^*`, at
    :math:`\pi` those of the spurious critical point :math:`(-v^*, a_{sp})`. Source: derived here;
    the spurious point is that of Du et al.

    Parameters
    ----------
    angle : Tensor of shape (...), or float
    teacher_outputs : Tensor of shape (..., k)

    Returns
    -------
    Tensor of shape (..., k)

    Examples
    --------
    >>> a = torch.tensor([2.0, -1.0])
    >>> conv_best_outputs(0.0, a)
    tensor([ 2., -1.], dtype=torch.float64)
    """
    a_star = _vectors(teacher_outputs, "teacher_outputs")
    g = rectified_overlap(angle).to(a_star.device)[..., None]
    k = a_star.shape[-1]
    mean = a_star.mean(-1, keepdim=True)
    other = (a_star - mean) * (g - 1) / (math.pi - 1)
    return mean * (k + g - 1) / (k + math.pi - 1) + other


def conv_spurious_threshold(num_patches: int) -> float:
    r"""The spurious point is a local minimum iff :math:`(1^T a^*)^2 / |a^*|^2` is below this.

    :math:`1 + (k - 1)/\pi`. Then :math:`a_{sp}^T a^* < 0`; else it is a saddle. Source: derived
    here, from the loss near the point: with the best outputs it exceeds that of the point by
    :math:`-g a_{sp}^T a^*/(2\pi) - O(g^2)`, and ``g`` is cubic in the distance. The Hessian does
    not tell: see :func:`conv_spurious_spectrum`.

    Parameters
    ----------
    num_patches : int
        ``k``.

    Returns
    -------
    float

    Examples
    --------
    >>> round(conv_spurious_threshold(16), 4)
    5.7746
    """
    return 1 + (positive_int(num_patches, "num_patches") - 1) / math.pi


def conv_spurious_curvature(teacher_outputs: Tensor, filter_size: int) -> float:
    r"""Smallest Hessian eigenvalue beside the spurious point over the distance, at its limit.

    At the angle :math:`\pi - \varepsilon` with the outputs of the spurious point the second
    derivative along the way is :math:`-A \varepsilon/\pi`, across it
    :math:`-A \varepsilon/(2\pi)`, up to :math:`O(\varepsilon^3)`, with
    :math:`A = a_{sp}^T a^*`. Source: derived here.

    Parameters
    ----------
    teacher_outputs : Tensor of shape (k,)
    filter_size : int
        ``p``, at least 2. Only from 3 on is there a direction across.

    Returns
    -------
    float
        Positive beside a local minimum, negative beside a saddle.

    Raises
    ------
    ShapeError
        If the outputs are not those of one teacher.
    """
    size = positive_int(filter_size, "filter_size", at_least=2)
    a_star = _one_teacher(teacher_outputs)
    alignment = float(conv_best_outputs(math.pi, a_star) @ a_star)
    steep, flat = -alignment / math.pi, -alignment / _TWO_PI
    return steep if size == 2 else min(steep, flat)


def conv_optimum_spectrum(teacher_outputs: Tensor, filter_size: int) -> DiscreteSpectrum:
    r"""Hessian spectrum of the normalised net at :math:`(v^*, a^*)`, in ``(w, a)``, ``|u| = 1``.

    :math:`(\pi - 1)/2\pi` (``k - 1`` times), :math:`(k + \pi - 1)/2\pi`, :math:`|a^*|^2/2`
    (``p - 1`` times), and 0 for the scale of ``u``. Source: derived here.

    Parameters
    ----------
    teacher_outputs : Tensor of shape (k,)
    filter_size : int
        ``p``.

    Returns
    -------
    DiscreteSpectrum
    """
    a_star = _one_teacher(teacher_outputs)
    return _spectrum(a_star, filter_size, float(a_star.square().sum()) / 2)


def conv_spurious_spectrum(teacher_outputs: Tensor, filter_size: int) -> DiscreteSpectrum:
    r"""Hessian spectrum of the normalised net at the spurious point :math:`(-v^*, a_{sp})`.

    As :func:`conv_optimum_spectrum`, with 0 in all ``p`` directions of the filter: the loss is
    cubic in the distance there. So the Hessian is positive semidefinite with nullity ``p`` whether
    the point is a local minimum or a saddle. Source: derived here.

    Parameters
    ----------
    teacher_outputs : Tensor of shape (k,)
    filter_size : int
        ``p``.

    Returns
    -------
    DiscreteSpectrum
    """
    return _spectrum(_one_teacher(teacher_outputs), filter_size, 0.0)


def _spectrum(a_star: Tensor, filter_size: int, across: float) -> DiscreteSpectrum:
    k, p = len(a_star), positive_int(filter_size, "filter_size", at_least=2)
    values = [(math.pi - 1) / _TWO_PI, (k + math.pi - 1) / _TWO_PI, across, 0.0]
    return DiscreteSpectrum.collect(
        torch.tensor(values, dtype=torch.float64), torch.tensor([k - 1, 1, p - 1, 1]), atol=0.0
    )


# ------------------------------------------------------------------------- without checks
# For loops of many steps and for autograd functions: input of any floating dtype, and valid.


def angle_of(unit: Tensor, other: Tensor) -> Tensor:
    """Angle between unit vectors ``(..., p)``, of shape (..., 1)."""
    norm = torch.linalg.vector_norm
    near, far = norm(unit - other, dim=-1, keepdim=True), norm(unit + other, dim=-1, keepdim=True)
    return 2 * torch.atan2(near, far)


def overlap_of(phi: Tensor) -> Tensor:
    """:func:`rectified_overlap` of angles in ``[0, pi]``."""
    rest = math.pi - phi
    # sin(rest) - rest cos(rest) loses all digits near pi: the series is exact there.
    series = rest**3 / 3 * (1 - rest**2 / 10 * (1 - rest**2 / 28))
    return torch.where(rest < 1e-2, series, rest * torch.cos(phi) + torch.sin(phi))


def gradients_of(
    u: Tensor, a: Tensor, v_star: Tensor, a_star: Tensor, *, normalised: bool
) -> tuple[Tensor, Tensor]:
    """:func:`conv_gradients` of tensors whose axes fit."""
    size: Tensor = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    v = u / size
    scaled = a if normalised else size * a
    phi = angle_of(v, v_star)
    difference = scaled.sum(-1, keepdim=True) - a_star.sum(-1, keepdim=True)
    rest = math.pi - phi
    # The digits of g near pi, for which overlap_of has a series, are lost in g - 1.
    g_minus_one = rest * torch.cos(phi) + torch.sin(phi) - 1
    in_outputs = (difference + (math.pi - 1) * scaled - g_minus_one * a_star) / _TWO_PI
    across = v_star - (v * v_star).sum(-1, keepdim=True) * v
    alignment = (scaled * a_star).sum(-1, keepdim=True)
    in_filter = -alignment * rest / (_TWO_PI * size) * across
    if normalised:
        return in_filter, in_outputs
    return in_filter + (a * in_outputs).sum(-1, keepdim=True) * v, size * in_outputs


# ------------------------------------------------------------------------- input


def angle_values(value: Any) -> Tensor:
    """Return angles in ``[0, pi]`` as a clean float64 tensor."""
    phi = real_tensor(value, "angle")
    # A few roundings beyond are angles, too: pi in float32 lies above pi.
    narrow = isinstance(value, Tensor) and value.is_floating_point()
    slack = max(1e-12, 4 * torch.finfo(value.dtype).eps if narrow else 0.0)
    if bool(((phi < -slack) | (phi > math.pi + slack)).any()):
        msg = "angle must lie in [0, pi] (radians); fold it, for instance with angle_between."
        raise InvalidArgumentError(msg)
    folded: Tensor = phi.clamp(0, math.pi)
    return folded


def _unit(vectors: Tensor, name: str) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if not bool((size > 0).all()):
        msg = f"{name} holds a zero vector, which has no direction."
        raise InvalidArgumentError(msg)
    unit: Tensor = vectors / size
    return unit


def fitting(**tensors: Tensor) -> None:
    """Raise unless the tensors' leading axes (all but the last) fit each other."""
    try:
        torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors.values()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        msg = f"leading axes must be the same, or 1, or absent: got {shapes}."
        raise ShapeError(msg) from error


def _vectors(value: Any, name: str) -> Tensor:
    tensor = real_tensor(value, name)
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        msg = f"{name} must have shape (..., n) with n >= 1, got {tuple(tensor.shape)}."
        raise ShapeError(msg)
    return tensor


def _one_teacher(value: Any) -> Tensor:
    a_star = _vectors(value, "teacher_outputs")
    if a_star.ndim != 1:
        msg = f"teacher_outputs must have shape (k,), got {tuple(a_star.shape)}."
        raise ShapeError(msg)
    return a_star


def _same_last_axis(names: str, one: Tensor, other: Tensor) -> None:
    if one.shape[-1] != other.shape[-1]:
        msg = f"{names} must have the same last axis: {tuple(one.shape)}, {tuple(other.shape)}."
        raise ShapeError(msg)


def _net(u: Any, a: Any, v_star: Any, a_star: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    filters, teacher_filter = _vectors(u, "filters"), _vectors(v_star, "teacher_filter")
    outputs, teacher_outputs = _vectors(a, "outputs"), _vectors(a_star, "teacher_outputs")
    _same_last_axis("filters of net and teacher", filters, teacher_filter)
    _same_last_axis("outputs of net and teacher", outputs, teacher_outputs)
    fitting(
        filters=filters, outputs=outputs, teacher_filter=teacher_filter,
        teacher_outputs=teacher_outputs,
    )  # fmt: skip
    _unit(filters, "filters")
    sizes = torch.linalg.vector_norm(teacher_filter, dim=-1)
    if bool(((sizes - 1).abs() > 1e-6).any()):
        msg = "teacher_filter must have norm 1: put its norm into teacher_outputs."
        raise InvalidArgumentError(msg)
    return filters, outputs, teacher_filter, teacher_outputs
