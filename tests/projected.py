"""A small net to project, and what the tests of projections in training ask of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

ROOT_TWO = math.sqrt(2)


class Net(nn.Module):
    """A stem, a transition and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 9, 3, padding=1)
        self.down = nn.Conv2d(9, 18, 1, stride=2, bias=False)
        self.mix = nn.Conv2d(18, 18, 3, padding=1)
        self.head = nn.Linear(18, 3)

    def forward(self, x):
        x = torch.relu(self.mix(self.down(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 1, 4, 4, generator=generator)
    return images, torch.arange(6) % 3


def loss_of(model, dtype=None):
    images, labels = batch()
    images = images.to(next(model.parameters()).dtype if dtype is None else dtype)
    return nn.functional.cross_entropy(model(images).float(), labels)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def values_of(layer):
    return torch.linalg.svdvals(layer.weight.detach().double().flatten(1)).numpy()


def is_flat(layer, rel=1e-5):
    return values_of(layer) == pytest.approx(ROOT_TWO, rel=rel)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)
