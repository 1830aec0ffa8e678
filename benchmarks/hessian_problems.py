"""The losses whose Hessians are multiplied.

Needs nothing but torch: the environment of other tools reads it, too.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.problems import ResNet20, Transformer8


@dataclass
class HessianProblem:
    """A loss on one batch.

    Parameters
    ----------
    title : str
    model : nn.Module
        In the mode in which it is measured.
    loss : nn.Module
        Mean over the batch.
    inputs, targets : Tensor
    """

    title: str
    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def gradient(self) -> tuple[Tensor, ...]:
        """What products are compared with: forward and backward pass."""
        value = self.loss(self.model(self.inputs), self.targets)
        return torch.autograd.grad(value, list(self.model.parameters()))

    def double(self) -> HessianProblem:
        """The same parameters and data in float64."""
        inputs, targets = (
            t.double() if t.is_floating_point() else t for t in (self.inputs, self.targets)
        )
        model = copy.deepcopy(self.model).double()
        return HessianProblem(self.title, model, self.loss, inputs, targets)

    def fingerprint(self) -> tuple[float, float]:
        """Loss and squared norm of the gradient: other weights or data have others."""
        value = self.loss(self.model(self.inputs), self.targets)
        gradient = torch.autograd.grad(value, list(self.model.parameters()))
        return float(value.detach()), float(sum(g.double().square().sum() for g in gradient))


class ResidualNet(nn.Module):
    """Units ``x + W2 relu(W1 x)`` of one width, scaled so that no depth explodes."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, width, bias=False), nn.ReLU(),
                nn.Linear(width, width, bias=False),
            )
            for _ in range(depth // 2)
        )  # fmt: skip
        with torch.no_grad():
            for unit in self.units:
                nn.init.normal_(unit[0].weight, std=math.sqrt(2 / width))
                nn.init.normal_(unit[2].weight, std=math.sqrt(2 / (depth * width)))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = x + unit(x)
        return x


class LSTMClassifier(nn.Module):
    """Two layers of an LSTM, and a linear map of the last state."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(inputs, width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return logits


class MathAttention(nn.Module):
    """A model whose attention takes the unfused path, which every tool can differentiate twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            out: Tensor = self.model(x)
        return out


def residual_net(depth: int = 32, width: int = 64, samples: int = 1000) -> HessianProblem:
    torch.manual_seed(0)
    model = ResidualNet(depth, width)
    inputs = torch.randn(samples, width)
    targets = inputs + torch.randn(samples, width)
    title = f"residual ReLU net, depth {depth}, width {width}, {samples} samples"
    return HessianProblem(title, model, nn.MSELoss(), inputs, targets)


def resnet20(batch: int = 16, side: int = 32) -> HessianProblem:
    torch.manual_seed(0)
    model = ResNet20().eval()
    return _classify(
        f"ResNet-20, batch {batch} of 3x{side}x{side}, BN in eval mode",
        model, batch, (3, side, side),
    )  # fmt: skip


def transformer(batch: int = 4, length: int = 32, width: int = 128) -> HessianProblem:
    torch.manual_seed(0)
    # Without dropout, training mode is the same function, and has no fast path of its own.
    return _classify(
        f"8-layer transformer, d = {width}, batch {batch} of length {length}, fused attention",
        Transformer8(width), batch, (length, width),
    )  # fmt: skip


def math_transformer(**sizes: int) -> HessianProblem:
    problem = transformer(**sizes)
    problem.title = problem.title.replace("fused attention", "attention not fused")
    problem.model = MathAttention(problem.model)
    return problem


def lstm(batch: int = 32, length: int = 32, width: int = 128) -> HessianProblem:
    torch.manual_seed(0)
    title = f"LSTM, two layers of width {width}, batch {batch} of length {length}"
    return _classify(title, LSTMClassifier(32, width), batch, (length, 32))


def tiny(samples: int = 256) -> HessianProblem:
    torch.manual_seed(0)
    widths = [16, 32, 32]
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 5))
    return _classify(f"tanh MLP of 1765 parameters, {samples} samples", model, samples, (16,), 5)


def _classify(
    title: str, model: nn.Module, batch: int, shape: tuple[int, ...], classes: int = 10
) -> HessianProblem:
    inputs, targets = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    return HessianProblem(title, model, nn.CrossEntropyLoss(), inputs, targets)


@dataclass(frozen=True)
class Case:
    """A problem in two sizes.

    Parameters
    ----------
    name : str
        Of the column in tables.
    make : callable
    quick : mapping
        Arguments of the small size.
    """

    name: str
    make: Callable[..., HessianProblem]
    quick: Mapping[str, int]

    def build(self, *, quick: bool) -> HessianProblem:
        return self.make(**self.quick if quick else {})


CASES: dict[str, Case] = {
    "tiny": Case("tiny MLP", tiny, {}),
    "fc": Case("residual net", residual_net, {"depth": 8, "width": 32, "samples": 250}),
    "lstm": Case("LSTM", lstm, {"batch": 8, "length": 8, "width": 32}),
    "transformer": Case("transformer", math_transformer, {"batch": 1, "length": 8, "width": 32}),
    "fused": Case(
        "transformer, fused attention", transformer, {"batch": 1, "length": 8, "width": 32}
    ),
    "resnet20": Case("ResNet-20", resnet20, {"batch": 2, "side": 8}),
}
