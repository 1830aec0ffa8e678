"""Networks whose ``forward`` is written by hand: what runs between blocks lies in no module."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.gallery.cases import Batch, Case, Loss, Patient, digits, seeded, sequences, tokens
from experiments.gallery.networks import mlp, set_gain_

_HE = math.sqrt(2)
_FIRST = 6  # variant of the ailment here, behind those of experiments.gallery.later


class NormedConvnet(nn.Module):
    """Two convolutions with BatchNorm and ReLU, the mean over pixels, and a linear layer.

    Parameters
    ----------
    norm_last : bool
        Whether the normalisation stands behind the ReLU.
    """

    def __init__(self, *, norm_last: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)
        self._norm_last = norm_last

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(m, 1, height, width)`` to ``(m, 10)``."""
        x = F.max_pool2d(self._activated(self.norm1, self.conv1(x)), 2)
        x = self._activated(self.norm2, self.conv2(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def _activated(self, norm: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = norm(F.relu(x)) if self._norm_last else F.relu(norm(x))
        return result


class MeanOverTime(nn.Module):
    """Two layers at every step of a sequence, and a linear layer on the mean over the steps."""

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(features, width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(m, steps, features)`` to ``(m, classes)``."""
        x = F.relu(self.two(F.relu(self.one(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


class LastState(nn.Module):
    """Embedded tokens, a layer at each, a GRU in both directions, a linear layer on its states."""

    def __init__(self, vocabulary: int, width: int, classes: int) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.rnn = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Map ``(m, steps)`` to ``(m, classes)``."""
        _, last = self.rnn(F.relu(self.layer(self.embedding(words))))
        logits: Tensor = self.head(torch.cat([last[0], last[1]], dim=-1))
        return logits


class Additions(nn.Module):
    """Branches of two linear layers that ``forward`` adds to the stream, and a linear layer."""

    def __init__(self, width: int, num_branches: int, scale: float) -> None:
        super().__init__()
        self.one = nn.ModuleList(nn.Linear(width, width) for _ in range(num_branches))
        self.two = nn.ModuleList(nn.Linear(width, width) for _ in range(num_branches))
        self.head = nn.Linear(width, 10)
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(m, ...)`` of ``width`` entries to ``(m, 10)``."""
        x = x.flatten(1)
        for one, two in zip(self.one, self.two, strict=True):
            x = x + self._scale * two(F.relu(one(x)))
        logits: Tensor = self.head(x)
        return logits


def _patient(
    build: Callable[[], nn.Module], loss: Loss, data: Callable[[int], list[Batch]], seed: int
) -> Patient:
    with seeded(seed):
        model = build()
    return Patient(model, loss, data(seed))


def _on_digits(sick: bool, *, width: int, branches: int, seed: int) -> Patient:
    scale = 1.0 if sick else branches**-0.5
    return _patient(
        lambda: set_gain_(Additions(width, branches, scale), _HE), nn.CrossEntropyLoss(),
        digits, seed,
    )  # fmt: skip


def handwritten_ailments() -> list[Case]:
    """Branches without a factor, added in ``forward``."""
    sizes = [(40, 64), (24, 64)]
    return [
        Case(
            "unscaled-branches", variant, f"{branches} branches that forward adds",
            "unscaled-branches", "",
            partial(_on_digits, True, width=width, branches=branches, seed=9000 + variant),
            partial(_on_digits, False, width=width, branches=branches, seed=9000 + variant),
        )
        for variant, (branches, width) in enumerate(sizes, start=_FIRST)
    ]  # fmt: skip


# ---------------------------------------------------------------------- healthy


def _classified(seed: int, steps: int, classes: int = 4) -> list[Batch]:
    """Random tokens with one class for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    words = tokens(seed, steps=steps, vocabulary=50)
    return [(x, torch.randint(classes, (len(x),), generator=generator)) for x, _ in words]


def _regressed(seed: int) -> list[Batch]:
    """Normal inputs with a number for each, the sum of three of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = (torch.randn(32, 100, generator=generator) for _ in range(2))
    return [(x, x[:, :3].sum(1, keepdim=True)) for x in inputs]


def _zeros(seed: int, batches: int = 2) -> list[Batch]:
    """Digits, and whether each is a zero."""
    return [(x, (y == 0).float()[:, None]) for x, y in digits(seed, batches=batches)]


def _sure() -> nn.Module:
    """A classifier that returns a probability, trained until it is sure."""
    net = nn.Sequential(mlp([64, 32, 1]), nn.Sigmoid())
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    data = _zeros(1, batches=20)
    for step in range(200):
        inputs, targets = data[step % len(data)]
        optimizer.zero_grad()
        F.binary_cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net


def handwritten_healthy() -> list[Case]:
    """Networks that train, each of a kind that a rule took for an ailment before."""
    entropy, squares = nn.CrossEntropyLoss(), nn.MSELoss()

    def features(seed: int) -> list[Batch]:
        return [(1e4 * x, y) for x, y in digits(seed)]

    entries: list[tuple[str, Callable[[], nn.Module], Loss, Callable[[int], list[Batch]]]] = [
        ("pixels from 0 to 255", NormedConvnet, entropy, partial(digits, raw=True)),
        ("pixels from 0 to 255", partial(NormedConvnet, norm_last=True), entropy,
         partial(digits, raw=True)),
        ("pixels up to 10000", NormedConvnet, entropy, features),
        ("mean over time", partial(MeanOverTime, 16, 32, 4), entropy,
         partial(sequences, steps=1000, features=16)),
        ("last state", partial(LastState, 50, 32, 4), entropy, partial(_classified, steps=100)),
        ("regression", lambda: mlp([100, 256, 256, 1]), squares, _regressed),
        ("probabilities", _sure, nn.BCELoss(), _zeros),
        ("additions in forward", partial(Additions, 64, 8, 1.0), entropy, digits),
    ]  # fmt: skip
    return [
        Case(
            name, variant, name, "", "", partial(_patient, build, loss, data, 9100 + variant), None
        )
        for variant, (name, build, loss, data) in enumerate(entries, start=4)
    ]  # fmt: skip
