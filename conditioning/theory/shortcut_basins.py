r"""Basins of two-layer convolutional nets with a shortcut: which start leads to which optimum.

The net, its loss and its critical points are those of
:mod:`~conditioning.theory.shortcut_importance`, with the filter normalised after every step.
By symmetry all depends on three numbers: the angle :math:`\varphi` between the filters,
:math:`s = \pm 1^T a / \sqrt k` and the component :math:`c` of ``a`` along the part of
:math:`a^*` with sum zero. Those of the teacher are :math:`S = |1^T a^*| / \sqrt k` and ``C``, the
sign in ``s`` is that of :math:`1^T a^*`, and the *alignment* is :math:`A = a^T a^* = sS + cC`.

Gradient descent with rates :math:`\eta_a, \eta_w` maps these three to

.. math:: s' &= s - \eta_a [(k + \pi - 1) s - (k + g - 1) S] / 2\pi \\
          c' &= c - \eta_a [(\pi - 1) c - (g - 1) C] / 2\pi \\
          \varphi' &= | \varphi - \arctan(\eta_w A (\pi - \varphi) \sin \varphi / 2\pi) |,

folded back at :math:`\pi`, and shrinks all other components of ``a``. Source of all that is here:
derived here. The set around the optimum is, for small steps, that behind the proof of Liu et al.
(arXiv:1909.04653).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError
from conditioning.theory._checks import finite_float, positive_int, real_tensor
from conditioning.theory.shortcut_importance import angle_values, fitting, rectified_overlap


def conv_loss_reduced(
    mean: Tensor,
    other: Tensor,
    angle: Tensor,
    num_patches: Tensor | int,
    teacher_mean: Tensor | float,
    teacher_other: Tensor | float,
) -> Tensor:
    r"""Population loss of a normalised net from ``s``, ``c`` and the angle.

    .. math:: 4 \pi L = (k + \pi - 1)(s^2 + S^2) + (\pi - 1)(c^2 + C^2)
              - 2 (k + g - 1) s S - 2 (g - 1) c C

    Source: derived here. Components of ``a`` beside ``s`` and ``c`` would add
    :math:`(\pi - 1)/(4\pi)` times their square.

    Parameters
    ----------
    mean, other, angle : Tensor of shape (...)
        ``s``, ``c`` and the angle.
    num_patches : int or Tensor
        ``k``.
    teacher_mean, teacher_other : float or Tensor
        ``S`` and ``C``.

    Returns
    -------
    Tensor of shape (...)

    Raises
    ------
    ShapeError, InvalidArgumentError
        If axes do not fit, an angle or a number of patches is outside its range, or a norm
        negative.
    """
    s, c, phi, k, big_s, big_c = _reduced(
        mean, other, angle, num_patches, teacher_mean, teacher_other
    )
    g = rectified_overlap(phi)
    squares = (k + math.pi - 1) * (s**2 + big_s**2) + (math.pi - 1) * (c**2 + big_c**2)
    return (squares - 2 * (k + g - 1) * s * big_s - 2 * (g - 1) * c * big_c) / (4 * math.pi)


def relaxed_alignment(angle: Tensor | float, share: float, num_patches: int) -> Tensor:
    r""":math:`a^T a^* / |a^*|^2` of the best outputs while the filter is held at an angle.

    :math:`r (k + g - 1)/(k + \pi - 1) + (1 - r)(g - 1)/(\pi - 1)` with the share
    :math:`r = (1^T a^*)^2 / (k |a^*|^2)`. Source: derived here.

    Parameters
    ----------
    angle : Tensor of shape (...), or float
    share : float
        ``r`` in ``[0, 1]``.
    num_patches : int
        ``k``.

    Returns
    -------
    Tensor of shape (...)
        Positive for every angle below a right one.

    Examples
    --------
    >>> relaxed_alignment(0.0, 0.2, 16).item()
    1.0
    """
    r, k = _share(share), positive_int(num_patches, "num_patches")
    g = rectified_overlap(angle)
    return r * (k + g - 1) / (k + math.pi - 1) + (1 - r) * (g - 1) / (math.pi - 1)


def warm_up_limit(share: float, num_patches: int) -> float:
    r"""The largest angle between the first filter and the teacher's that a warm-up allows.

    Where :func:`relaxed_alignment` changes its sign: a warm-up with steps of the filter that are
    small enough makes :math:`a^T a^*` positive, and what follows leads to the global optimum, iff
    the angle is below. At least :math:`\pi/2`, so that the prior :math:`\pi/3` of Liu et al. is
    sufficient and not necessary. Source: derived here.

    Parameters
    ----------
    share : float
        ``r`` as in :func:`relaxed_alignment`.
    num_patches : int
        ``k``.

    Returns
    -------
    float
        In ``[pi/2, pi]``; ``pi`` where the spurious point is no local minimum.

    Examples
    --------
    >>> round(warm_up_limit(1 / 256, 16) / math.pi, 4)
    0.5015
    """
    r, k = _share(share), positive_int(num_patches, "num_patches")

    def alignment(angle: float) -> float:
        return float(relaxed_alignment(angle, r, k))

    if r == 0:
        return math.pi / 2
    if alignment(math.pi) >= 0:
        return math.pi
    from scipy.optimize import brentq  # slow to import

    return float(brentq(alignment, math.pi / 2, math.pi, xtol=1e-15))


def absorbed_by_optimum(
    mean: Tensor,
    other: Tensor,
    angle: Tensor,
    num_patches: Tensor | int,
    teacher_mean: Tensor | float,
    teacher_other: Tensor | float,
    filter_rate: Tensor | float,
) -> Tensor:
    r"""Whether gradient descent with normalisation is certain to end at the global optimum.

    :math:`\varphi < \pi/2`, :math:`A > 0`, :math:`s \le S`, and
    :math:`\eta_w (S^2 + \max(c, C) C) \le 4`, for rates of ``a`` up to
    :math:`2\pi/(k + \pi - 1)` and of the filter up to ``filter_rate``, constant or not, but not
    falling towards zero: bounded below by a positive number. No step leaves the set: :math:`A`
    shrinks by no more than the factor :math:`1 - \eta_a (\pi-1)/2\pi`, since :math:`g \ge 1` and
    :math:`s \le S`; the angle does not grow, since a step turns the filter by at most twice the
    angle; and the angle has no other limit than 0. Source: derived here; the set without the last
    condition, for small steps, is that behind Liu et al.

    Parameters
    ----------
    mean, other, angle, num_patches, teacher_mean, teacher_other
        As in :func:`conv_loss_reduced`.
    filter_rate : float or Tensor
        The largest step size of the filter from here on, positive.

    Returns
    -------
    Tensor of bool, shape (...)

    Raises
    ------
    ShapeError, InvalidArgumentError
        If axes do not fit, or a number is outside its range.
    """
    s, c, phi, _, big_s, big_c = _reduced(
        mean, other, angle, num_patches, teacher_mean, teacher_other
    )
    rate = _filter_rate(filter_rate)
    largest = big_s**2 + torch.maximum(c, big_c) * big_c
    gentle = rate * largest <= 4 * (1 + 1e-12)
    return (phi < math.pi / 2) & (s * big_s + c * big_c > 0) & (s <= big_s) & gentle


def absorbed_by_spurious(
    mean: Tensor,
    other: Tensor,
    angle: Tensor,
    num_patches: Tensor | int,
    teacher_mean: Tensor | float,
    teacher_other: Tensor | float,
    filter_rate: Tensor | float,
) -> Tensor:
    r"""Whether gradient descent with normalisation is certain to end at the spurious point.

    :math:`A < 0`, :math:`s \ge S (k - 1)/(k + \pi - 1)`,
    :math:`(1 - g)|a^*|^2 \ge S^2 k \pi/(k + \pi - 1)`, and
    :math:`\eta_w (\max(|s|, S) S + \max(|c|, C) C) \le 4 \pi`; rates as in
    :func:`absorbed_by_optimum`. Then no step makes :math:`A` positive, ``s`` too small or the angle
    smaller. The set is empty unless the spurious point is a local minimum. The conditions are
    sufficient, not necessary. Source: derived here.

    Parameters
    ----------
    mean, other, angle, num_patches, teacher_mean, teacher_other, filter_rate
        As in :func:`absorbed_by_optimum`.

    Returns
    -------
    Tensor of bool, shape (...)

    Raises
    ------
    ShapeError, InvalidArgumentError
        As :func:`absorbed_by_optimum`.
    """
    s, c, phi, k, big_s, big_c = _reduced(
        mean, other, angle, num_patches, teacher_mean, teacher_other
    )
    rate = _filter_rate(filter_rate)
    slow = (k + math.pi - 1).reciprocal() * big_s
    wide = (1 - rectified_overlap(phi)) * (big_s**2 + big_c**2) >= math.pi * k * slow * big_s
    largest = torch.maximum(s.abs(), big_s) * big_s + torch.maximum(c.abs(), big_c) * big_c
    gentle = rate * largest <= 4 * math.pi
    return (s * big_s + c * big_c < 0) & (s >= (k - 1) * slow) & wide & gentle


def _share(value: float) -> float:
    share = finite_float(value, "share")
    if not 0 <= share <= 1:
        msg = f"share is (1^T a*)^2 / (k |a*|^2) and lies in [0, 1], got {share}."
        raise InvalidArgumentError(msg)
    return share


def _filter_rate(value: Any) -> Tensor:
    rate = real_tensor(value, "filter_rate")
    if bool((rate <= 0).any()):
        msg = "filter_rate must be positive: a filter that rests never arrives."
        raise InvalidArgumentError(msg)
    return rate


def _reduced(s: Any, c: Any, phi: Any, k: Any, big_s: Any, big_c: Any) -> tuple[Tensor, ...]:
    teacher = real_tensor(big_s, "teacher_mean"), real_tensor(big_c, "teacher_other")
    if any(bool((part < 0).any()) for part in teacher):
        msg = "teacher_mean and teacher_other are norms, not negative: turn the signs of s and c."
        raise InvalidArgumentError(msg)
    count = real_tensor(k, "num_patches")
    if bool((count < 1).any()):
        msg = "num_patches must be at least 1."
        raise InvalidArgumentError(msg)
    found = real_tensor(s, "mean"), real_tensor(c, "other"), angle_values(phi), count, *teacher
    names = ("mean", "other", "angle", "num_patches", "teacher_mean", "teacher_other")
    fitting(**{name: value[..., None] for name, value in zip(names, found, strict=True)})
    return found
