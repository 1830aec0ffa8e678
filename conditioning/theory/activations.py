"""Activations at zero: the facts the main theorem of "Demystifying ResNet" rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from conditioning.theory._checks import elementwise, positive_int

Activation = Callable[[Tensor], Tensor]

_STEP = 1e-6  # distance from zero at which the one-sided derivatives are compared
_JUMP = 1e-3  # a larger relative difference is a jump: a smooth function's is about 2e-6
_VALUE = 1e-12  # a larger |value| at zero is not a rounded zero


@dataclass(frozen=True)
class ActivationAtZero:
    """What an elementwise activation does at zero.

    Parameters
    ----------
    value : float
        Value at zero.
    slope : float
        First derivative at zero; at a kink, what autograd returns by convention.
    smooth : bool
        Whether the first and second derivatives are continuous at zero.
    """

    value: float
    slope: float
    smooth: bool


#: Exact values, keyed by name: ``shifted_sigmoid`` is sigmoid(x) - 1/2 and
#: ``shifted_softplus`` is log(1 + exp(x)) - log 2. Derived here.
ACTIVATIONS_AT_ZERO: Mapping[str, ActivationAtZero] = MappingProxyType(
    {
        "identity": ActivationAtZero(0.0, 1.0, smooth=True),
        "tanh": ActivationAtZero(0.0, 1.0, smooth=True),
        "gelu": ActivationAtZero(0.0, 0.5, smooth=True),
        "shifted_sigmoid": ActivationAtZero(0.0, 0.25, smooth=True),
        "shifted_softplus": ActivationAtZero(0.0, 0.5, smooth=True),
        "sigmoid": ActivationAtZero(0.5, 0.25, smooth=True),
        "softplus": ActivationAtZero(math.log(2.0), 0.5, smooth=True),
        "relu": ActivationAtZero(0.0, 0.0, smooth=False),
    }
)


@dataclass(frozen=True)
class TheoremAssumptions:
    """Whether a theorem's assumptions hold, and if not, which fail.

    Parameters
    ----------
    violations : tuple of str
        One sentence for each assumption that fails.
    """

    violations: tuple[str, ...]

    @property
    def hold(self) -> bool:
        """Whether no assumption is violated."""
        return not self.violations

    def __bool__(self) -> bool:
        """Return ``hold``."""
        return self.hold


def _derivatives(activation: Activation, point: float, order: int) -> list[float]:
    """Value and derivatives 1 .. ``order`` of an elementwise callable, by nested autograd."""
    with torch.enable_grad():
        x = torch.tensor([point], dtype=torch.float64, requires_grad=True)
        y = elementwise(activation, x, "activation")
        found = [float(y.detach())]
        while len(found) <= order:
            grad: Tensor | None = None
            if y.requires_grad:
                (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True)
            if grad is None:  # constant from here on
                found.extend([0.0] * (order + 1 - len(found)))
                break
            y = grad
            found.append(float(y.detach()))
    return found


def _first_jump(activation: Activation, order: int) -> int | None:
    """Lowest order 0 .. ``order`` whose derivative jumps or is not finite at zero."""
    left = _derivatives(activation, -_STEP, order)
    right = _derivatives(activation, _STEP, order)
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        if not abs(a - b) <= _JUMP * max(1.0, abs(a), abs(b)):
            return k
    return None


def activation_at_zero(activation: Activation) -> ActivationAtZero:
    """Value and slope at zero of any elementwise callable, by autograd.

    Smoothness is read off the derivatives up to order 2 at ``-1e-6`` and ``1e-6``: a
    jump there is certain, its absence is evidence and no proof. Method derived here.

    Parameters
    ----------
    activation : callable
        Maps a float64 tensor elementwise.

    Returns
    -------
    ActivationAtZero
        Value, slope and smoothness at zero.

    Raises
    ------
    InvalidArgumentError
        If ``activation`` is not callable.
    ShapeError
        If it does not keep the shape of its argument.

    Examples
    --------
    >>> activation_at_zero(torch.tanh)
    ActivationAtZero(value=0.0, slope=1.0, smooth=True)
    """
    value, slope = _derivatives(activation, 0.0, 1)
    return ActivationAtZero(value, slope, smooth=_first_jump(activation, 2) is None)


def main_theorem_assumptions(
    shortcut_depth: int, *, mid: Activation | None = None, post: Activation | None = None
) -> TheoremAssumptions:
    r"""Check the assumptions under which zero is an :math:`(n-1)`-th order stationary point.

    They are :math:`\sigma_{mid}(0) = \sigma_{post}(0) = 0` and derivatives of orders
    1 .. max(n - 1, 2) at zero. Li, Jiao, Han, Weissman, Demystifying ResNet,
    arXiv:1611.01186, main theorem, asks for the same derivatives of
    :math:`\sigma_{pre}`; for :math:`n \ge 2` the leading terms use only its values at
    the samples, so it is not checked (derived here).

    Parameters
    ----------
    shortcut_depth : int
        Matrices that a shortcut skips, ``n >= 1``. With ``n = 1`` there is no mid position.
    mid, post : callable, optional
        Activations between the matrices and after the last; ``None`` is the identity.

    Returns
    -------
    TheoremAssumptions
        True in a boolean context when all hold; ``violations`` says what fails.

    Raises
    ------
    InvalidArgumentError
        If ``shortcut_depth`` is not a positive integer, or an activation is not callable.
    ShapeError
        If an activation is not elementwise.
    """
    depth = positive_int(shortcut_depth, "shortcut_depth")
    order = max(depth - 1, 2)
    violations = []
    for name, activation in (("mid", mid if depth > 1 else None), ("post", post)):
        if activation is None:
            continue
        value = _derivatives(activation, 0.0, 0)[0]
        if not abs(value) <= _VALUE:
            violations.append(f"{name}(0) = {value:.6g}, it must be 0.")
        jump = _first_jump(activation, order)
        if jump is not None:
            violations.append(
                f"the derivative of order {jump} of {name} jumps at 0, "
                f"orders up to {order} must exist."
            )
    return TheoremAssumptions(tuple(violations))
