r"""Residual nets at initialisation: norms of outputs and gradients, many nets and scalings at once.

Nets are stacks of weights ``(L, nets, d, d)``, layers first. The columns of a state are all
scalings ``alpha`` and all inputs of a net. Norms are kept as logarithms: with little scaling they
leave the range of float64 before the last of a thousand layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A layer multiplies a norm by some ten at most: far from overflow after so many.
_BETWEEN_SCALINGS = 32


@dataclass(frozen=True, eq=False)
class Movement:
    """How far outputs and gradients move, natural logarithms, each ``(nets, alphas, inputs)``.

    Parameters
    ----------
    output : Tensor
        Of ``|h_L - h_0| / |h_0|``.
    gradient : Tensor
        Of ``|g_0 - g_L| / |g_L|`` for the gradient ``g_k`` of the loss with respect to ``h_k``.
    output_norm, gradient_norm : Tensor
        Of ``|h_L| / |h_0|`` and ``|g_0| / |g_L|``.
    """

    output: Tensor
    gradient: Tensor
    output_norm: Tensor
    gradient_norm: Tensor


def propagate(
    outer: Tensor,
    inner: Tensor | None,
    start: Tensor,
    cotangent: Tensor,
    alphas: Sequence[float],
) -> Movement:
    r"""Run nets forward and backward at every scaling.

    The block is :math:`h + \alpha V \sigma(W h)`, or :math:`h + \alpha V \sigma(h)` without inner
    matrices. With one output the loss scales all gradients alike, so its form does not matter.

    Parameters
    ----------
    outer : Tensor of shape (L, nets, d, d)
        ``V``.
    inner : Tensor of shape (L, nets, d, d) or None
        ``W``.
    start : Tensor of shape (nets, d, inputs)
        ``h_0``, the same at every scaling.
    cotangent : Tensor of shape (nets, d)
        ``g_L`` up to a factor.
    alphas : sequence of float

    Returns
    -------
    Movement
        On the CPU.
    """
    nets, _, inputs = start.shape
    count = len(alphas)
    scale = start.new_tensor(list(alphas)).repeat_interleave(inputs)
    first = start.repeat(1, 1, count)
    last = cotangent[:, :, None].expand_as(first)
    state, logs, gates = _forward(outer, inner, first, scale)
    gradient, gradient_logs = _backward(outer, inner, last, scale, gates)
    moved = _moved(state, logs, first), _moved(gradient, gradient_logs, last)
    grown = _grown(state, logs, first), _grown(gradient, gradient_logs, last)
    return Movement(*(found.reshape(nets, count, inputs).cpu() for found in (*moved, *grown)))


def _forward(
    outer: Tensor, inner: Tensor | None, first: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The last state divided by a norm, that norm's logarithm, and where units were active."""
    state, logs = first.clone(), first.new_zeros(first.shape[0], 1, first.shape[2])
    gates = torch.empty(len(outer), *first.shape, dtype=torch.bool, device=first.device)
    hidden = torch.empty_like(state)
    for layer, matrix in enumerate(outer):
        if inner is None:
            hidden.copy_(state)
        else:
            torch.bmm(inner[layer], state, out=hidden)
        torch.gt(hidden, 0, out=gates[layer])
        hidden.relu_().mul_(scale)
        state = torch.baddbmm(state, matrix, hidden)
        if layer % _BETWEEN_SCALINGS == 0:
            _rescale(state, logs)
    return state, logs, gates


def _backward(
    outer: Tensor, inner: Tensor | None, last: Tensor, scale: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient at the first state divided by a norm, and that norm's logarithm."""
    gradient, logs = last.clone(), last.new_zeros(last.shape[0], 1, last.shape[2])
    hidden = torch.empty_like(gradient)
    for layer in range(len(outer) - 1, -1, -1):
        torch.bmm(outer[layer].mT, gradient, out=hidden)
        hidden.mul_(gates[layer]).mul_(scale)
        if inner is None:
            gradient += hidden
        else:
            gradient = torch.baddbmm(gradient, inner[layer].mT, hidden)
        if layer % _BETWEEN_SCALINGS == 0:
            _rescale(gradient, logs)
    return gradient, logs


def _rescale(state: Tensor, logs: Tensor) -> None:
    norms = torch.linalg.vector_norm(state, dim=1, keepdim=True)
    # A state that has become zero stays there.
    norms = torch.where(norms > 0, norms, 1.0)
    state /= norms
    logs += norms.log()


def _grown(state: Tensor, logs: Tensor, start: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(state, dim=1), torch.linalg.vector_norm(start, dim=1)
    grown: Tensor = logs[:, 0] + norms[0].log() - norms[1].log()
    return grown


def _moved(state: Tensor, logs: Tensor, start: Tensor) -> Tensor:
    """Logarithm of ``|exp(logs) state - start| / |start|`` without overflow."""
    up = logs.clamp_min(0.0)
    difference = state * (logs - up).exp() - start * (-up).exp()
    norms = torch.linalg.vector_norm(difference, dim=1), torch.linalg.vector_norm(start, dim=1)
    moved: Tensor = up[:, 0] + norms[0].log() - norms[1].log()
    return moved


def trajectory(outer: Tensor, inner: Tensor | None, start: Tensor, alpha: float) -> Tensor:
    """All states of nets from ``start`` of shape ``(nets, d, 1)``, shape ``(L + 1, nets, d)``."""
    states = [start]
    for layer, matrix in enumerate(outer):
        hidden = states[-1] if inner is None else inner[layer] @ states[-1]
        states.append(torch.baddbmm(states[-1], matrix, hidden.relu() * alpha))
    return torch.stack(states)[..., 0]


def distance(coarse: Tensor, fine: Tensor) -> Tensor:
    """Greatest distance of two trajectories on the coarser grid, by ``|h_0|``, for each net."""
    times = (len(fine) - 1) // (len(coarse) - 1)
    gaps = torch.linalg.vector_norm(coarse - fine[::times], dim=-1)
    relative: Tensor = gaps.amax(0) / torch.linalg.vector_norm(coarse[0], dim=-1)
    return relative


def norm_chain(
    depth: int, width: int, alpha: float, nets: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    r"""Draw ``log(|h_L| / |h_0|)`` of res-3 nets with normal entries, without their matrices.

    Given ``h``, the branch :math:`V \sigma(W h)` of such a net is :math:`q |h| / \sqrt{d}` times a
    standard normal vector, with :math:`d q^2` a chi-square variable whose degrees of freedom are
    the number of active units, binomial (d, 1/2). So the norm is a Markov chain of its own, with
    the same law as that of the nets (derived for this project).
    """
    logs = np.zeros(nets)
    for _ in range(depth):
        # A chi-square variable is twice a gamma variable; without active units it is 0.
        active = generator.binomial(width, 0.5, nets) / 2
        step = alpha * np.sqrt(2 * generator.standard_gamma(active)) / width
        across = 2 * generator.standard_gamma((width - 1) / 2, nets)
        along = generator.standard_normal(nets)
        logs += np.log((1 + step * along) ** 2 + step**2 * across) / 2
    return logs
