"""What a case of the gallery is, and the data that its networks see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data import load

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Patient:
    """What a checkup is given.

    Attributes
    ----------
    model : nn.Module
    loss_fn : callable
    data : list of (Tensor, Tensor)
        Batches of inputs and targets.
    options : dict
        Further arguments of the checkup, such as ``learning_rate``.
    """

    model: nn.Module
    loss_fn: Loss
    data: list[Batch]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One network with a known ailment, and the same without it.

    Attributes
    ----------
    ailment : str
        Which ailment of the gallery.
    variant : int
        0 is what the rules were made with; the others were held out.
    summary : str
        The network and what is wrong with it, in a few words.
    kind : str
        Of the finding that must lead; empty where nothing is wrong.
    where : str
        The block or layer that must be named; empty where it is the whole network.
    sick, twin : callable
        Make the network with the ailment and without it. ``twin`` is ``None`` where nothing is
        wrong.
    """

    ailment: str
    variant: int
    summary: str
    kind: str
    where: str
    sick: Callable[[], Patient]
    twin: Callable[[], Patient] | None

    @property
    def name(self) -> str:
        """Ailment and variant, as rows of tables are called."""
        return f"{self.ailment}/{self.variant}"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw by a seed inside; the caller's random numbers go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@cache
def _digits() -> tuple[Tensor, Tensor]:
    data = load("digits")
    images = torch.from_numpy(data.images).to(torch.float32).reshape(-1, 1, 8, 8)
    return images, torch.from_numpy(data.labels)


def digits(seed: int, *, batch: int = 32, batches: int = 2, raw: bool = False) -> list[Batch]:
    """Batches of handwritten digits, of mean 0 and variance 1; ``raw`` are from 0 to 255."""
    images, labels = _digits()
    images = images / images.max() * 255 if raw else (images - images.mean()) / images.std()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)[: batch * batches]
    return [(images[part], labels[part]) for part in order.split(batch)]


def sequences(
    seed: int, *, steps: int, features: int, classes: int = 4, batch: int = 16, batches: int = 2
) -> list[Batch]:
    """Batches of normal sequences ``(batch, steps, features)`` with a class for each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch, steps, features, generator=generator),
            torch.randint(classes, (batch,), generator=generator),
        )
        for _ in range(batches)
    ]


def tokens(
    seed: int, *, steps: int, vocabulary: int, batch: int = 16, batches: int = 2
) -> list[Batch]:
    """Batches of random tokens ``(batch, steps)``, each with the one that follows it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocabulary, (batches, batch, steps + 1), generator=generator)
    return [(words[:, :-1], words[:, 1:]) for words in drawn]
