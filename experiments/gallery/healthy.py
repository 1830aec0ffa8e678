"""Networks with nothing wrong: whatever a checkup calls a problem here is a false alarm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from experiments.gallery.cases import Batch, Case, Loss, Patient, digits, seeded, sequences, tokens
from experiments.gallery.networks import (
    Autoencoder,
    LanguageModel,
    Recurrent,
    convnet,
    mlp,
    set_gain_,
)
from experiments.models.cifar_resnet import CifarResNet
from experiments.models.residual_mlp import ResidualMLP
from experiments.models.scaled_resnet import ScaledResNet

Build = Callable[[], nn.Module]
Data = Callable[[int], list[Batch]]


def _images_as_targets(seed: int) -> list[Batch]:
    return [(images, images) for images, _ in digits(seed)]


def _long_sequences(seed: int) -> list[Batch]:
    return sequences(seed, steps=24, features=8)


def _short_texts(seed: int) -> list[Batch]:
    return tokens(seed, steps=12, vocabulary=30)


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


def _patient(build: Build, data: Data, loss: Loss, seed: int) -> Patient:
    with seeded(seed):
        model = build()
    return Patient(model, loss, data(seed))


def _narrow_resnet(n: int, widths: tuple[int, ...]) -> nn.Module:
    return ScaledResNet(n, in_channels=1, widths=widths)


def _mlp(width: int, layers: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return mlp([64, *[width] * layers, 10], activation)


def healthy() -> list[Case]:
    """Three networks each of kinds that are known to train; variant 0 as among the ailments."""
    entropy = nn.CrossEntropyLoss()
    zoo: dict[str, tuple[Data, Loss, list[Build]]] = {
        "resnet with BatchNorm": (digits, entropy, [
            partial(_narrow_resnet, 3, (8, 16, 32)),  # ResNet-20
            partial(CifarResNet, 2, in_channels=1, widths=(4, 8, 8)),
            partial(ResidualMLP, 64, 32, 30, 10),
        ]),
        "transformer": (_short_texts, entropy, [
            partial(LanguageModel, 30, 32, 8, tied=False),
            partial(LanguageModel, 30, 24, 12, tied=False),
            partial(LanguageModel, 30, 48, 4, tied=False),
        ]),
        "tied embeddings": (_short_texts, entropy, [
            partial(LanguageModel, 30, 24, 2),
            partial(LanguageModel, 30, 32, 4),
            partial(LanguageModel, 30, 16, 6),
        ]),
        "recurrent net": (_long_sequences, entropy, [
            lambda: Recurrent(nn.LSTM(8, 24, batch_first=True), 8),
            lambda: Recurrent(nn.GRU(8, 24, batch_first=True), 8),
            lambda: Recurrent(nn.LSTM(8, 16, num_layers=2, batch_first=True), 8),
        ]),
        "mlp": (digits, entropy, [
            lambda: _mlp(32, 2),
            lambda: _mlp(48, 3, nn.Tanh),
            lambda: _mlp(64, 3, nn.GELU),
        ]),
        "convnet": (digits, entropy, [
            lambda: convnet([1, 8, 8, 16, 10], norm=True),
            lambda: set_gain_(convnet([1, 16, 16, 16, 16, 16, 10]), math.sqrt(2)),
            lambda: convnet([1, 8, 16, 10]),
        ]),
        "autoencoder": (_images_as_targets, _squares, [
            lambda: Autoencoder(8),
            lambda: Autoencoder(4),
            lambda: Autoencoder(16),
        ]),
    }  # fmt: skip
    cases = []
    for name, (data, loss, builds) in zoo.items():
        for variant, build in enumerate(builds):
            sick = partial(_patient, build, data, loss, 31 + 100 * variant)
            cases.append(Case(name, variant, name, "", "", sick, None))
    return cases
