r"""Deep residual networks with branches scaled by a power of the depth, at initialisation.

The net is :math:`h_{k+1} = h_k + \alpha V_{k+1} g(h_k)`, k = 0 ... L-1, of width d, with
:math:`\alpha = L^{-\beta}`. Two blocks occur: ``"res-1"`` has :math:`g = \sigma(h)`, ``"res-3"``
has :math:`g = \sigma(W h)`, both with :math:`\sigma` the ReLU. All weights have mean 0 and variance
:math:`1/d`; over the layers they are independent, or increments of fractional Brownian motion.

Sources: "Marion et al." is Marion, Fermanian, Biau, Vert, *Scaling ResNets in the Large-depth
Regime*, arXiv:2206.06929. "Derived here" marks what was worked out for this module.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conditioning.errors import InvalidArgumentError
from conditioning.theory._checks import finite_float, positive_int

Array = NDArray[np.float64]
RESIDUAL_BLOCKS = ("res-1", "res-3")

# Largest exponent of e that float64 holds.
_LARGEST = 709.0

# ------------------------------------------------------------------- independent weights


def norm_second_moment(depth: int, alpha: float) -> float:
    r"""Second moment :math:`E |h_L|^2 / |h_0|^2 = (1 + \alpha^2 / 2)^L` for independent weights.

    Holds exactly for res-3 blocks and any independent entries that are symmetric about 0, at every
    width: :math:`E |\sigma(W h)|^2 = |h|^2 / 2`, and the branch has mean zero given ``h``. Source:
    derived here.

    Parameters
    ----------
    depth : int
        ``L``.
    alpha : float
        Factor of the branches.

    Returns
    -------
    float
        Infinite where it leaves the range of float64.

    Raises
    ------
    InvalidArgumentError
        If ``depth`` is not a positive integer, or ``alpha`` is not finite.

    Examples
    --------
    >>> round(norm_second_moment(1000, 1000**-0.5) ** 0.5, 3)   # e^(1/4)
    1.284
    """
    exponent = _log_moment(depth, alpha)
    return math.exp(exponent) if exponent < _LARGEST else math.inf


def deviation_second_moment(depth: int, alpha: float) -> float:
    r"""Second moment :math:`E |h_L - h_0|^2 / |h_0|^2 = (1 + \alpha^2 / 2)^L - 1`.

    As :func:`norm_second_moment`, since ``h`` is a martingale. It is that of the gradient, too,
    with the last layer in place of the first: exact for an output vector with independent,
    identically distributed, symmetric entries. For a fixed ``u``, each block multiplies
    :math:`E |J u|^2` by :math:`1 + \alpha^2 / 2`, since a row ``w`` of the inner matrix and ``-w``
    are as likely, share :math:`(w \cdot u)^2` and have opposite gates; and :math:`E J u = u`. So
    :math:`E \|J - I\|_F^2 = d ((1 + \alpha^2 / 2)^L - 1)`. Source: derived here.

    Parameters
    ----------
    depth, alpha
        As there.

    Returns
    -------
    float
        Infinite where it leaves the range of float64.

    Examples
    --------
    >>> round(deviation_second_moment(1000, 1 / 1000) ** 0.5, 4)   # about 1 / sqrt(2 L)
    0.0224
    """
    exponent = _log_moment(depth, alpha)
    return math.expm1(exponent) if exponent < _LARGEST else math.inf


def _log_moment(depth: int, alpha: float) -> float:
    count, factor = positive_int(depth, "depth"), finite_float(alpha, "alpha")
    growth = math.log1p(factor * factor / 2)
    try:
        return count * growth
    except OverflowError:  # more layers than float64 can count
        return math.inf if growth > 0 else 0.0


def limit_log_norm_law(width: int) -> tuple[float, float]:
    r"""Mean and variance of :math:`\log(|H_1|^2 / |H_0|^2)`, a normal variable.

    With :math:`\beta = 1/2` and independent weights the res-3 net tends to
    :math:`dH = |H| / \sqrt{2d}\, dB`, a time-changed geometric Brownian motion:
    :math:`\log(|H_1|^2 / |H_0|^2) \sim N(1/2 - 1/d,\; 2/d)`. Source: the limit is that of Marion
    et al.; this solution of it is derived here (Ito's formula).

    The gradient of an isotropic output vector has the same law. A tangent ``u`` of fixed start has
    the noise :math:`|u| / \sqrt{2d}\, dB` whatever the state, as half of a row's variance passes
    its gate; and :math:`|J^T g| / |g|` has the law of :math:`|J u| / |u|` for isotropic ``g`` and
    ``u``, since ``J`` and its transpose share their singular values (derived here).

    Parameters
    ----------
    width : int
        ``d``.

    Returns
    -------
    mean, variance : float

    Raises
    ------
    InvalidArgumentError
        If ``width`` is not a positive integer.

    Examples
    --------
    >>> limit_log_norm_law(100)
    (0.49, 0.02)
    """
    size = positive_int(width, "width")
    return 1 / 2 - 1 / size, 2 / size


def limit_norm_ratio_density(ratio: ArrayLike, width: int) -> Array:
    r"""Density of :math:`|H_1| / |H_0|` in the limit of :func:`limit_log_norm_law`.

    Parameters
    ----------
    ratio : array_like of float
        Where the density is wanted, any shape.
    width : int
        ``d``.

    Returns
    -------
    ndarray of the same shape
        That of a log-normal law; 0 where ``ratio`` is not positive, NaN where it is NaN.

    Raises
    ------
    InvalidArgumentError
        If ``width`` is not a positive integer of which float64 has the inverse, or ``ratio`` is no
        number of float64.
    """
    mean, variance = limit_log_norm_law(width)
    if variance == 0:
        msg = "width must be smaller: 2 / width leaves the range of float64."
        raise InvalidArgumentError(msg)
    place = _numbers(ratio, "ratio")
    positive = np.where(place <= 0, 1.0, place)
    # The logarithm of the norm is half that of its square.
    spread = math.sqrt(variance) / 2
    score = (np.log(positive) - mean / 2) / spread
    density = np.exp(-(score**2) / 2) / (positive * spread * math.sqrt(2 * math.pi))
    return np.where(place <= 0, 0.0, density)


# -------------------------------------------------------------------- correlated weights


def fgn_autocovariance(hurst: float, lags: ArrayLike) -> Array:
    r"""Autocovariance of fractional Gaussian noise, increments of fractional Brownian motion.

    :math:`\rho_H(m) = (|m+1|^{2H} - 2 |m|^{2H} + |m-1|^{2H}) / 2` (Mandelbrot and Van Ness, SIAM
    Review 10, 1968).

    Parameters
    ----------
    hurst : float
        ``H`` in (0, 1); 1/2 is white noise.
    lags : array_like of int
        ``m``, any shape.

    Returns
    -------
    ndarray of the same shape
        1 at lag 0.

    Raises
    ------
    InvalidArgumentError
        If ``hurst`` lies outside (0, 1), or ``lags`` are no numbers of float64.

    Examples
    --------
    >>> [round(float(r), 2) for r in fgn_autocovariance(0.9, [0, 1, 2])]
    [1.0, 0.74, 0.63]
    """
    power = 2 * _hurst(hurst)
    lag = np.abs(_numbers(lags, "lags"))
    return np.asarray(((lag + 1) ** power - 2 * lag**power + np.abs(lag - 1) ** power) / 2)


def relu_correlation(correlation: ArrayLike) -> Array:
    r"""Mean product :math:`E[\sigma(X) \sigma(Y)]` of two standard normal variables after a ReLU.

    :math:`(\sqrt{1 - r^2} + r (\pi - \arccos r)) / (2 \pi)`: 1/2 at r = 1, 1/(2 pi) at r = 0, the
    arc-cosine kernel (Cho and Saul, NIPS 2009).

    Parameters
    ----------
    correlation : array_like of float
        ``r`` in [-1, 1], any shape.

    Returns
    -------
    ndarray of the same shape

    Raises
    ------
    InvalidArgumentError
        If a correlation lies outside [-1, 1].
    """
    r = _correlation(correlation)
    kernel = np.sqrt(1 - r**2) + r * (np.pi - np.arccos(r))
    return np.asarray(kernel / (2 * np.pi))


def gate_correlation(correlation: ArrayLike) -> Array:
    r"""Probability that two standard normal variables are positive, times their correlation.

    :math:`r (\pi - \arccos r) / (2 \pi)`: what a gate leaves of those components of a row of an
    inner matrix that are orthogonal to the state, while that along the state has
    :func:`relu_correlation`. Source: derived here.

    Parameters
    ----------
    correlation : array_like of float
        ``r`` in [-1, 1], any shape.

    Returns
    -------
    ndarray of the same shape
        1/2 at r = 1, 0 at r = 0.

    Raises
    ------
    InvalidArgumentError
        If a correlation lies outside [-1, 1].
    """
    r = _correlation(correlation)
    return np.asarray(r * (np.pi - np.arccos(r)) / (2 * np.pi))


def first_order_sum(
    depth: int,
    hurst: float,
    block: str = "res-3",
    *,
    gradient: bool = False,
    width: int | None = None,
) -> float:
    r"""``S`` in :math:`E |h_L - h_0|^2 / |h_0|^2 = \alpha^2 S + O(\alpha^3)`.

    :math:`S = \sum_{k, l} \rho_H(k - l)\, c(\rho_H(k - l))`, with c = 1/2 for res-1, where to this
    order output and gradient are alike. For res-3 the inner matrices decorrelate the branches, by
    :func:`relu_correlation` for the output. For the gradient that is so for one component of a row
    of ``W``, along the state, and by :func:`gate_correlation` for the others:
    :math:`S = (1 - 1/d)\, S_{gate} + (1/d)\, S_{relu}`. Exact for normal entries. Source: derived
    here.

    Parameters
    ----------
    depth : int
        ``L``.
    hurst : float
        ``H`` in (0, 1), of all weights as functions of the layer.
    block : {"res-1", "res-3"}
    gradient : bool
        For the gradient, ``|g_0 - g_L|^2 / |g_L|^2``, in place of the output.
    width : int, optional
        ``d``, which counts for gradients of res-3 only; left out, its limit.

    Returns
    -------
    float
        ``L / 2`` for independent weights, ``L^(2H) / 2`` for res-1.

    Raises
    ------
    InvalidArgumentError
        If ``depth`` or ``width`` is not a positive integer, ``hurst`` lies outside (0, 1), or there
        is no such block.

    Examples
    --------
    >>> round(first_order_sum(1000, 0.5), 6)
    500.0
    >>> round(first_order_sum(1000, 0.9, "res-1") / 1000**1.8, 6)
    0.5
    >>> [round(first_order_sum(1000, 0.8, gradient=True, width=d)) for d in (1, 10, None)]
    [11879, 3055, 2074]
    """
    count = positive_int(depth, "depth")
    share = _share_along(width)
    lags = np.arange(count)
    # Differences of large powers leave more rounding than there is room below 1.
    rho = np.clip(fgn_autocovariance(hurst, lags), -1.0, 1.0)
    if _block(block) == "res-1":
        weight = np.full(count, 0.5)
    elif gradient:
        weight = (1 - share) * gate_correlation(rho) + share * relu_correlation(rho)
    else:
        weight = relu_correlation(rho)
    pairs = np.where(lags == 0, count, 2 * (count - lags))
    return float(np.sum(pairs * rho * weight))


def critical_beta(
    depth: int,
    hurst: float,
    block: str = "res-3",
    *,
    gradient: bool = False,
    width: int | None = None,
    compounded: bool = True,
) -> float:
    r"""Scaling exponent at which the output has moved as far as its own norm.

    To first order :math:`\alpha^2 S = 1` (see :func:`first_order_sum`), so
    :math:`\beta = \log S / (2 \log L)`. Compounded, the moment grows as
    :math:`e^{\alpha^2 S} - 1`, so :math:`\alpha^2 S = \log 2`: for H = 1/2 and res-3 that is the
    exact moment as :math:`\alpha \to 0`, for other H an interpolation. Source: derived here.

    Parameters
    ----------
    depth : int
        ``L``, at least 2.
    hurst, block, gradient, width
        As there.
    compounded : bool
        Whether the growth is compounded.

    Returns
    -------
    float
        Above it the net is near the identity, below it explodes; with growing depth it tends to
        :func:`critical_exponent`.

    Raises
    ------
    InvalidArgumentError
        As there, or if ``depth`` is below 2.

    Examples
    --------
    >>> round(critical_beta(1000, 0.5, compounded=False), 3), round(critical_beta(1000, 0.5), 3)
    (0.45, 0.476)
    >>> round(critical_beta(1000, 0.8), 3), round(critical_beta(1000, 0.8, gradient=True), 3)
    (0.706, 0.579)
    >>> round(critical_beta(1000, 0.8, gradient=True, width=40), 3)
    0.587
    """
    count = positive_int(depth, "depth", at_least=2)
    level = math.log(2) if compounded else 1.0
    moment = first_order_sum(count, hurst, block, gradient=gradient, width=width)
    return math.log(moment / level) / (2 * math.log(count))


def critical_exponent(
    hurst: float, block: str = "res-3", *, gradient: bool = False, width: int | None = None
) -> float:
    r"""Limit of :func:`critical_beta` for large depth.

    H for res-1; max(1/2, H) for res-3, gradients included. Where the width tends to infinity before
    the depth does, max(1/2, 2H - 1) for gradients of res-3.

    Parameters
    ----------
    hurst, block, gradient, width
        As there.

    Returns
    -------
    float

    Raises
    ------
    InvalidArgumentError
        As there.

    Examples
    --------
    >>> critical_exponent(0.875, gradient=True, width=40), critical_exponent(0.875, gradient=True)
    (0.875, 0.75)

    Notes
    -----
    Marion et al. describe the shape of the line of outputs of res-3. The exponents are derived
    here, from the growth of :func:`first_order_sum`: at long distances :math:`\rho_H` is small,
    and c tends to 1/(2 pi) for outputs, but to :math:`\rho_H / 4` for gradients, up to 1/d of the
    former, which wins at last: only beyond a depth that grows with the width. The plateau below
    H = 1/2 is made by the inner matrix: without it negatively correlated branches cancel.
    """
    value, share = _hurst(hurst), _share_along(width)
    if _block(block) == "res-1":
        return value
    return max(0.5, 2 * value - 1 if gradient and share == 0 else value)


def _share_along(width: int | None) -> float:
    """Share of the components of a vector that lie along a given one."""
    return 0.0 if width is None else 1 / positive_int(width, "width")


def _correlation(correlation: ArrayLike) -> Array:
    r = _numbers(correlation, "correlation")
    if not bool((np.abs(r) <= 1).all()):
        msg = "correlation must lie in [-1, 1]."
        raise InvalidArgumentError(msg)
    return r


def _numbers(value: ArrayLike, name: str) -> Array:
    try:
        return np.asarray(value, dtype=np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        msg = f"{name} must be real numbers that float64 holds, got {type(value).__name__}."
        raise InvalidArgumentError(msg) from error


def _hurst(value: float) -> float:
    number = finite_float(value, "hurst")
    if not 0 < number < 1:
        msg = f"hurst must lie strictly between 0 and 1, got {number}."
        raise InvalidArgumentError(msg)
    return number


def _block(name: str) -> str:
    if name not in RESIDUAL_BLOCKS:
        msg = f"block must be one of {', '.join(RESIDUAL_BLOCKS)}, got {name!r}."
        raise InvalidArgumentError(msg)
    return name
