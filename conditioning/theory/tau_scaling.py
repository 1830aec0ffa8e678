r"""Growth of norms in ReLU residual networks whose branches are scaled by a factor tau.

A block maps :math:`h_{l-1}` to :math:`h_l = \mathrm{relu}(h_{l-1} + \tau W_l h_{l-1})` with
entries of :math:`W_l` drawn from :math:`N(0, s^2 / m)`, ``m`` the width and :math:`s^2` the
``variance`` below. All that is said here depends on :math:`s^2 \tau^2` only.

Sources: "Zhang et al." is H. Zhang, D. Yu, M. Yi, W. Chen, T.-Y. Liu, *Stabilize Deep ResNet with A
Sharp Scaling Factor tau*, arXiv:1903.07120, Machine Learning 111, 2022. "Derived here" marks what
was worked out for this module.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from conditioning.errors import InvalidArgumentError
from conditioning.theory._checks import finite_float, positive_int

# So that squares stay finite.
_HUGE = 1e100
# The narrowest and the widest step of a block that the law of a coordinate is followed at.
_NARROW, _WIDE = 1e-4, 1e4
# A coordinate beyond so many standard deviations of its law is left out: it would add 1e-13.
_REACH = 11.0
_NODES = 6
# A panel of the quadrature in units of the step that a block makes.
_PANEL = 1.4
# The step's own law is cut off where it is 1e-15 of its largest value.
_CUT = 8.3


def scaling_factor(num_blocks: int, exponent: float, kappa: float = 1.0) -> float:
    r"""The factor :math:`\tau = \kappa L^{-p}` of every branch.

    Zhang et al.: ``exponent`` 1/2 is the sharp one; with less the forward pass grows without
    bound in the depth.

    Parameters
    ----------
    num_blocks : int
        ``L``.
    exponent : float
        ``p``.
    kappa : float
        The factor before it.

    Returns
    -------
    float
        ``tau``.

    Raises
    ------
    InvalidArgumentError
        If ``num_blocks`` is not a positive integer, another number is not finite, or the power
        leaves the range of float64.

    Examples
    --------
    >>> scaling_factor(100, 0.5)
    0.1
    """
    count = positive_int(num_blocks, "num_blocks")
    factor, power = finite_float(kappa, "kappa"), -finite_float(exponent, "exponent")
    try:
        return factor * math.pow(count, power)
    except OverflowError as error:
        msg = "num_blocks ** -exponent must lie in the range of float64; choose a smaller power."
        raise InvalidArgumentError(msg) from error


def log_growth_bounds(tau: float, num_blocks: int, variance: float = 1.0) -> tuple[float, float]:
    r"""Bounds on :math:`\log(E\|h_L\|^2 / \|h_0\|^2)` at any width.

    Given :math:`h_{l-1}`, the coordinates of :math:`W_l h_{l-1}` are normal, and for
    :math:`a \ge 0` and :math:`g \sim N(0, s^2)` one has
    :math:`a^2 + s^2/2 \le E\,\mathrm{relu}(a + g)^2 \le a^2 + s^2`. So the logarithm lies
    between :math:`L \log(1 + s^2\tau^2/2)` and :math:`L \log(1 + s^2\tau^2)`. The lower
    one gives the converse of Zhang et al.: at :math:`\tau = L^{-1/2 + c}` the growth is at least
    :math:`1 + L^{2c}/2`. Source: derived here.

    Parameters
    ----------
    tau : float
        Of every branch.
    num_blocks : int
        ``L``.
    variance : float
        :math:`m \operatorname{Var}(W)`.

    Returns
    -------
    low, high : float
        Natural logarithms, of squared norms.

    Raises
    ------
    InvalidArgumentError
        If ``variance`` is negative, a number is not finite or ``num_blocks`` is no positive
        integer.
    """
    step = _step(tau, variance)
    count = positive_int(num_blocks, "num_blocks")
    return count * math.log1p(step / 2), count * math.log1p(step)


def limit_log_growth(kappa: float, variance: float = 1.0) -> float:
    r"""Limit :math:`s^2 \kappa^2 / 2` of :math:`\log(\|h_L\|/\|h_0\|)` at :math:`\kappa/\sqrt L`.

    First the width and then the depth grow. A coordinate then becomes a Brownian motion that is
    reflected at zero, with the variance :math:`s^2 \kappa^2 \|h\|^2/m`; reflection does no work,
    so :math:`\|h\|^2` grows by :math:`\exp(s^2 \kappa^2)`. Source: derived here.

    Parameters
    ----------
    kappa : float
        ``tau`` times the root of the depth.
    variance : float
        :math:`m \operatorname{Var}(W)`.

    Returns
    -------
    float
        Natural logarithm, of the norm itself.

    Raises
    ------
    InvalidArgumentError
        If ``variance`` is negative or a number is not finite.

    Examples
    --------
    >>> round(math.exp(limit_log_growth(1.0)), 3)
    1.649
    """
    return _step(kappa, variance) / 2


def mean_field_log_growth(tau: float, num_blocks: int, variance: float = 1.0) -> float:
    r"""Value of :math:`\log(\|h_L\|/\|h_0\|)` in the limit of large width, at any depth.

    There the coordinates of :math:`h_l` are independent and have one law, and given
    :math:`h_{l-1}` those of :math:`W_l h_{l-1}` are normal. So the law of a coordinate of norm 1,
    an atom at zero and a density beside it, goes from block to block by
    :math:`x \mapsto \mathrm{relu}(x + s\tau g)` and the growth of its second moment. It begins
    as that of :math:`h_0 = \mathrm{relu}(Ax)`. Source: derived here.

    Parameters
    ----------
    tau : float
        Of every branch.
    num_blocks : int
        ``L``.
    variance : float
        :math:`m \operatorname{Var}(W)`.

    Returns
    -------
    float
        Natural logarithm, of the norm itself, to about 1e-6 of itself. At finite width the mean
        logarithm differs by the order of ``num_blocks * step / m``, ``step`` being
        :math:`s^2\tau^2`.

    Raises
    ------
    InvalidArgumentError
        If the step ``sqrt(variance) * tau`` is below 1e-4 or above 1e4, a number is not finite or
        ``num_blocks`` is no positive integer.

    Notes
    -----
    The law is kept at the nodes of a Gauss-Legendre rule on panels about as wide as a step, so the
    time grows as ``num_blocks / tau`` and memory as ``1 / tau``: some seconds for 1000 blocks at
    1/√L. Once the law
    is stationary the rest is a product.

    Examples
    --------
    >>> round(mean_field_log_growth(1.0, 1000) / 1000, 4)
    0.2781
    """
    step = math.sqrt(_step(tau, variance))
    if not _NARROW <= step <= _WIDE:
        msg = (
            f"sqrt(variance) * |tau| must lie in [{_NARROW:g}, {_WIDE:g}] for this, got {step:g}; "
            "for less, limit_log_growth is as good."
        )
        raise InvalidArgumentError(msg)
    return _growth_of_law(step, positive_int(num_blocks, "num_blocks"))


@functools.lru_cache(maxsize=256)
def _growth_of_law(step: float, count: int) -> float:
    panel = min(_PANEL * step, _REACH / 4)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    num_panels = math.ceil(_REACH / panel)
    x = (np.arange(num_panels)[:, None] + (nodes + 1) / 2) * panel
    weights = weights * panel / 2
    # The panels that a step comes from.
    reach = math.ceil(_CUT * step / panel) + 1
    window = np.arange(-reach, reach + 1)
    normal = 1 / math.sqrt(2 * math.pi)
    # relu of a normal variable, with second moment 1.
    atom, density = 0.5, np.exp(-(x**2) / 4) * normal / math.sqrt(2)
    from scipy.special import ndtr  # slow to import

    z = x / step
    right, peak = ndtr(z), np.exp(-(z**2) / 2) * normal
    gain = (x**2 + step**2) * right + x * step * peak  # E relu(x + step g)^2
    total, before = 0.0, math.inf
    for done in range(1, count + 1):
        # Errors of the quadrature must not add up: they would change the mass by a power.
        whole = atom + float((weights * density).sum())
        atom, mass = atom / whole, weights * density / whole
        after = float((mass * gain).sum()) + atom * step**2 / 2
        growth = math.log(after / float((mass * x**2).sum()))
        total += growth
        scale = math.sqrt(after)
        shifted = scale * x
        near = np.floor(shifted / panel).astype(int)[..., None] + window
        inside = (near >= 0) & (near < num_panels)
        near = near.clip(0, num_panels - 1)
        kernel = np.exp(-(((shifted[..., None, None] - x[near]) / step) ** 2) / 2)
        arriving = (kernel * (mass[near] * inside[..., None])).sum((-1, -2))
        arriving += atom * np.exp(-((shifted / step) ** 2) / 2)
        atom = float((mass * (1 - right)).sum()) + atom / 2
        density = arriving * scale * normal / step
        if abs(growth - before) <= 1e-9 * growth:
            total += growth * (count - done)
            break
        before = growth
    return total / 2


def _step(tau: float, variance: float) -> float:
    spread = finite_float(variance, "variance")
    if spread < 0:
        msg = f"variance must not be negative, got {spread}."
        raise InvalidArgumentError(msg)
    size = abs(finite_float(tau, "tau"))
    if size > _HUGE or spread > _HUGE:
        msg = f"tau and variance must not exceed {_HUGE:g}, got {tau} and {variance}."
        raise InvalidArgumentError(msg)
    return spread * size**2
