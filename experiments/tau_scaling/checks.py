"""Checks of our own instruments: against autograd, against dense linear algebra, in law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conditioning import JacobianOperator, singular_range
from experiments.models import TauStack
from experiments.tau_scaling.chain import norms_through
from experiments.tau_scaling.descent import Lanes
from experiments.tau_scaling.rules import RULES
from experiments.tau_scaling.stack import Stack

_DEPTH, _WIDTH, _FEATURES, _OUTPUTS = 30, 64, 16, 10
# At tau = 1 and a small width it matters most how a matrix is used twice.
_LAW_WIDTH, _NETS = 24, 1500


def _net(seed: int, tau: float, *, depth: int = _DEPTH, width: int = _WIDTH) -> TauStack:
    generator = torch.Generator().manual_seed(seed)
    return TauStack(_FEATURES, width, depth, _OUTPUTS, tau, generator=generator)


class _Blocks(nn.Module):
    """The residual part of a net."""

    def __init__(self, net: TauStack) -> None:
        super().__init__()
        self.blocks, self.tau = net.blocks, net.tau

    def forward(self, h: Tensor) -> Tensor:
        for weight in self.blocks:
            h = torch.relu(h + self.tau * (h @ weight.T))
        return h


def product(device: str) -> dict[str, Any]:
    """The product of blocks against the Jacobian that autograd takes of the module."""
    found = []
    for seed, rule in enumerate(RULES.values()):
        tau = rule.tau(_DEPTH)
        net = _net(seed, tau).to(device)
        generator = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(1, _FEATURES, generator=generator, dtype=torch.float64).to(device)
        g = torch.randn(1, _WIDTH, generator=generator, dtype=torch.float64).to(device)
        start = torch.relu(x @ net.stem.T).detach()
        stack = Stack([tau], net.blocks.detach(), start)
        jacobian = JacobianOperator(_Blocks(net), start)
        truth = singular_range(jacobian, which="largest", method="dense").largest.value
        ours = stack.spectral_norm(0, 0, seed).largest
        outside = _largest([ours.low / truth - 1, 1 - ours.high / truth, 0.0])
        back = jacobian.rmatvec(g[0])
        forward = torch.linalg.vector_norm(_Blocks(net)(start)) / torch.linalg.vector_norm(start)
        backward = torch.linalg.vector_norm(back) / torch.linalg.vector_norm(g)
        errors = [
            abs(float(stack.log_norms[-1, 0, 0]) - math.log(float(forward.detach()))),
            abs(float(stack.backward(g)[0, 0]) - math.log(float(backward))),
        ]
        found.append({"rule": list(RULES)[seed], "outside": outside, "norms": _largest(errors)})
    return {"rules": found}


def descent(device: str) -> dict[str, Any]:
    """A step of descent with gradients written out against one by autograd, in float64."""
    nets = [_net(seed, rule.tau(8), depth=8) for seed, rule in enumerate(RULES.values())]
    lanes = Lanes.of(nets, device)
    generator = torch.Generator().manual_seed(100)
    x = torch.randn(len(nets), 12, _FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randn(len(nets), 12, _OUTPUTS, generator=generator, dtype=torch.float64)
    losses, _ = lanes.step(x.to(device), y.to(device), 0.1)
    errors = []
    for index, net in enumerate(nets):
        loss = (net(x[index]) - y[index]).square().sum() / (2 * len(x[index]))
        loss.backward()
        errors.append(abs(float(losses[index]) / float(loss.detach()) - 1))
        for weight, ours in ((net.blocks, lanes.blocks[:, index]), (net.last, lanes.last[index])):
            gradient = weight.grad
            assert gradient is not None
            step = (weight.detach() - ours.cpu()) / 0.1
            distance = torch.linalg.vector_norm(step - gradient)
            errors.append(float(distance / torch.linalg.vector_norm(gradient)))
    return {"error": _largest(errors)}


def law(device: str) -> dict[str, Any]:
    """Logarithms of norms through nets with matrices, and through vectors with the same law."""
    drawn = norms_through([1.0], _DEPTH, _LAW_WIDTH, _NETS, 0, device)
    drawn["gradients"] = drawn["steepest"] - drawn["flattest"]
    found = _through_matrices(device)
    return {
        what: {"matrices": found[what].tolist(), "vectors": drawn[what][0].tolist()}
        for what in ("forward", "backward", "gradients")
    }


def _through_matrices(device: str) -> dict[str, Tensor]:
    """The same quantities of as many nets whose matrices are drawn."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    width = _LAW_WIDTH
    h = torch.relu(normal(_NETS, width, 1))
    g = normal(_NETS, width, 1)
    blocks = normal(_DEPTH, _NETS, width, width) / math.sqrt(width)
    states = [h]
    for weight in blocks:
        states.append(torch.relu(states[-1] + weight @ states[-1]))
    size, of_weights = _size(g), []
    for weight, below, above in zip(
        reversed(blocks), reversed(states[:-1]), reversed(states[1:]), strict=True
    ):
        d = g * (above > 0)
        of_weights.append((_size(d) * _size(below)).log())
        g = d + weight.mT @ d
    gradients = torch.stack(of_weights)
    return {
        "forward": (_size(states[-1]) / _size(h)).log(),
        "backward": (_size(g) / size).log(),
        "gradients": gradients.max(0).values - gradients.min(0).values,
    }


def _size(vectors: Tensor) -> Tensor:
    """Norms of columns."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=(1, 2))
    return norms


def _largest(errors: Sequence[float]) -> float:
    """The largest of some errors; NaN if one is, which max() would pass over."""
    return float(np.max(errors))


KINDS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "product": product,
    "descent": descent,
    "law": law,
}
