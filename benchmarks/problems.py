"""The training steps that are timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Problem:
    """A model with a batch and an optimizer, and how its blocks are called.

    Parameters
    ----------
    title : str
    model : nn.Module
    inputs, targets : Tensor
    optimizer : Optimizer
    """

    title: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    optimizer: torch.optim.Optimizer

    def step(self) -> Tensor:
        """Forward pass, backward pass, SGD step."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()
        return loss


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and a skip."""

    def __init__(self, channels: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Sequential()
        if channels != outside:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        branch += self.skip(x)
        out: Tensor = self.relu(branch)
        return out


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2: three stages of three blocks, 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(
            *(BasicBlock(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths))
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits


class Transformer8(nn.Module):
    """Eight encoder layers, of width 256 unless another one is given."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).mean(dim=1))
        return logits


def _problem(
    title: str, model: nn.Module, batch: int, shape: tuple[int, ...], device: str
) -> Problem:
    model = model.to(device)
    return Problem(
        title,
        model,
        torch.randn(batch, *shape).to(device),
        torch.randint(10, (batch,)).to(device),
        torch.optim.SGD(model.parameters(), lr=1e-3),
    )


def resnet20(device: str, batch: int = 64) -> Problem:
    torch.manual_seed(0)
    return _problem(f"ResNet-20, batch {batch} of 3x32x32", ResNet20(), batch, (3, 32, 32), device)


def transformer8(device: str, batch: int = 16) -> Problem:
    torch.manual_seed(0)
    title = f"8-layer transformer encoder, d = 256, batch {batch} of length 64"
    return _problem(title, Transformer8(), batch, (64, 256), device)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "resnet20": resnet20,
    "transformer8": transformer8,
}
