"""Checks of our own instruments: against autograd, against dense linear algebra, in law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conditioning import JacobianOperator, singular_range
from experiments.models import TauStack
from experiments.tau_scaling.chain import norms_through
from experiments.tau_scaling.descent import Lanes
from experiments.tau_scaling.rules import RULES, SHARP
from experiments.tau_scaling.stack import Stack

_DEPTH, _WIDTH, _FEATURES, _OUTPUTS = 30, 64, 16, 10
_NETS = 300


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
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, _FEATURES, generator=generator, dtype=torch.float64).to(device)
        g = torch.randn(1, _WIDTH, generator=generator, dtype=torch.float64).to(device)
        start = torch.relu(x @ net.stem.T).detach()
        stack = Stack([tau], net.blocks.detach(), start)
        jacobian = JacobianOperator(_Blocks(net), start)
        truth = singular_range(jacobian, which="largest", method="dense").largest.value
        ours = stack.spectral_norm(0, 0, seed).largest
        outside = max(ours.low / truth - 1, 1 - ours.high / truth, 0.0)
        back = jacobian.rmatvec(g[0])
        forward = torch.linalg.vector_norm(_Blocks(net)(start)) / torch.linalg.vector_norm(start)
        backward = torch.linalg.vector_norm(back) / torch.linalg.vector_norm(g)
        errors = [
            abs(float(stack.log_norms[-1, 0, 0]) - math.log(float(forward.detach()))),
            abs(float(stack.backward(g)[0, 0]) - math.log(float(backward))),
        ]
        found.append({"rule": list(RULES)[seed], "outside": outside, "norms": max(errors)})
    return {"rules": found}


def descent(device: str) -> dict[str, Any]:
    """A step of descent with gradients written out against one by autograd, in float64."""
    nets = [_net(seed, rule.tau(8), depth=8) for seed, rule in enumerate(RULES.values())]
    lanes = Lanes.of(nets, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(nets), 12, _FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randn(len(nets), 12, _OUTPUTS, generator=generator, dtype=torch.float64)
    losses, _ = lanes.step(x.to(device), y.to(device), 0.1)
    worst = 0.0
    for index, net in enumerate(nets):
        loss = (net(x[index]) - y[index]).square().sum() / (2 * len(x[index]))
        loss.backward()
        worst = max(worst, abs(float(losses[index]) / float(loss.detach()) - 1))
        for weight, ours in ((net.blocks, lanes.blocks[:, index]), (net.last, lanes.last[index])):
            gradient = weight.grad
            assert gradient is not None
            step = (weight.detach() - ours.cpu()) / 0.1
            distance = torch.linalg.vector_norm(step - gradient)
            worst = max(worst, float(distance / torch.linalg.vector_norm(gradient)))
    return {"error": worst}


def law(device: str) -> dict[str, Any]:
    """Norms through nets with matrices, and through vectors with the same law."""
    rule = RULES[SHARP]
    tau = rule.tau(_DEPTH)
    drawn = norms_through([tau], _DEPTH, _WIDTH, _NETS, 0, device)
    forward, backward = [], []
    for seed in range(_NETS):
        net = _net(1000 + seed, tau).to(device)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, _FEATURES, generator=generator, dtype=torch.float64).to(device)
        g = torch.randn(1, _WIDTH, generator=generator, dtype=torch.float64).to(device)
        stack = Stack([tau], net.blocks.detach(), torch.relu(x @ net.stem.T).detach())
        forward.append(float(stack.log_norms[-1, 0, 0]))
        backward.append(float(stack.backward(g)[0, 0]))
    return {
        "forward": {"matrices": forward, "vectors": drawn["forward"][0].tolist()},
        "backward": {"matrices": backward, "vectors": drawn["backward"][0].tolist()},
    }


KINDS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "product": product,
    "descent": descent,
    "law": law,
}
