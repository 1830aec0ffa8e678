"""Eight ailments in several networks each, and what a checkup must say of them.

Variant 0 of each is what the rules of :mod:`conditioning.checkup.findings` were tried on; the other
variants were held out, with other sizes, activations, kinds of layers and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from experiments.gallery.cases import Case, Patient, digits, seeded, sequences
from experiments.gallery.networks import (
    CellLoop,
    Narrowing,
    Recurrent,
    Tower,
    balance_,
    convnet,
    mlp,
    set_gain_,
    set_recurrent_,
)
from experiments.models.cifar_resnet import CifarResNet
from experiments.models.residual_mlp import ResidualMLP
from experiments.models.scaled_resnet import ScaledResNet

_HE = math.sqrt(2)
Build = Callable[[], nn.Module]


def _on_digits(
    build: Build, seed: int, options: dict[str, float] | None = None, *, raw: bool = False
) -> Patient:
    with seeded(seed):
        model = build()
    return Patient(model, nn.CrossEntropyLoss(), digits(seed, raw=raw), options or {})


def _pair(
    name: str,
    variant: int,
    summary: str,
    kind: str,
    build: Callable[..., nn.Module],
    *,
    where: str = "",
) -> Case:
    """A case of networks on digits that ``build(sick)`` makes."""
    seed = 100 * variant + sum(map(ord, name)) % 100
    return Case(
        name, variant, summary, kind, where,
        partial(_on_digits, partial(build, True), seed),
        partial(_on_digits, partial(build, False), seed),
    )  # fmt: skip


def _no_skip() -> Iterator[Case]:
    def tower(sick: bool, *, width: int, num_blocks: int, **more: Any) -> nn.Module:
        return Tower(width, num_blocks, skip=not sick, **more)

    cases = [
        ("50 linear layers, ReLU, weights as torch draws them", "gradient-vanishes",
         partial(tower, width=48, num_blocks=25)),
        ("48 convolutions, ReLU, weights as torch draws them", "gradient-vanishes",
         partial(tower, width=8, num_blocks=24, conv=True)),
        ("60 linear layers, tanh, weights as torch draws them", "gradient-vanishes",
         partial(tower, width=32, num_blocks=30, activation=nn.Tanh)),
        ("60 linear layers with BatchNorm and ReLU", "gradient-explodes",
         partial(tower, width=48, num_blocks=30, norm=True)),
    ]  # fmt: skip
    for variant, (summary, kind, build) in enumerate(cases):
        yield _pair("no-skip", variant, summary, kind, build)


def _unscaled() -> Iterator[Case]:
    def dense(sick: bool, *, width: int, num_blocks: int) -> nn.Module:
        scale = 1.0 if sick else num_blocks**-0.5
        return ResidualMLP(64, width, num_blocks, 10, bn=False, branch_scale=scale)

    def scaled(sick: bool) -> nn.Module:
        tau = 1.0 if sick else 24**-0.5
        return ScaledResNet(8, tau, in_channels=1, widths=(8, 16, 16), bn=False)

    def bottlenecks(sick: bool) -> nn.Module:
        scale = 1.0 if sick else 24**-0.5
        return CifarResNet(12, in_channels=1, widths=(4, 8), bn=False, branch_scale=scale)

    cases: list[tuple[str, Callable[..., nn.Module]]] = [
        ("24 residual blocks of two linear layers", partial(dense, width=48, num_blocks=24)),
        ("40 residual blocks of two linear layers", partial(dense, width=32, num_blocks=40)),
        ("ResNet-50 for small images without BatchNorm", scaled),
        ("24 bottlenecks before activation without BatchNorm", bottlenecks),
    ]
    for variant, (summary, build) in enumerate(cases):
        yield _pair("unscaled-branches", variant, summary, "unscaled-branches", build)


def _bad_gain() -> Iterator[Case]:
    def dense(
        sick: bool, *, gain: float, right: float, layers: int, act: Callable[[], nn.Module], w: int
    ) -> nn.Module:
        return set_gain_(mlp([64, *[w] * layers, 10], act), gain if sick else right)

    def conv(sick: bool, *, gain: float) -> nn.Module:
        return set_gain_(convnet([1, *[12] * 12, 10]), gain if sick else _HE)

    cases: list[tuple[str, Callable[..., nn.Module]]] = [
        ("11 linear layers, ReLU, gain 0.5 for 1.41",
         partial(dense, gain=0.5, right=_HE, layers=10, act=nn.ReLU, w=64)),
        ("13 linear layers, tanh, gain 0.4 for 1",
         partial(dense, gain=0.4, right=1.0, layers=12, act=nn.Tanh, w=48)),
        ("11 linear layers, ReLU, gain 4 for 1.41",
         partial(dense, gain=4.0, right=_HE, layers=10, act=nn.ReLU, w=48)),
        ("12 convolutions, ReLU, gain 0.6 for 1.41", partial(conv, gain=0.6)),
    ]  # fmt: skip
    for variant, (summary, build) in enumerate(cases):
        yield _pair("bad-gain", variant, summary, "weight-gain", build)


def _shift_(layer: nn.Module, amount: float) -> None:
    bias = layer.bias
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        bias.sub_(amount)


def _dead() -> Iterator[Case]:
    def dense(sick: bool, *, layers: int, width: int, at: int) -> nn.Module:
        net = set_gain_(mlp([64, *[width] * layers, 10]), _HE)
        if sick:
            _shift_(net.get_submodule(str(2 * at + 1)), 30.0)
        return net

    def conv(sick: bool) -> nn.Module:
        net = convnet([1, 8, 8, 8, 8, 10], norm=True)
        if sick:
            _shift_(net.get_submodule("4"), 20.0)  # the bias of the second BatchNorm
        return net

    def mostly(sick: bool) -> nn.Module:
        net = set_gain_(convnet([1, 16, 16, 16, 10]), _HE)
        if sick:
            bias = net.get_submodule("2").bias
            assert isinstance(bias, nn.Parameter)
            with torch.no_grad():
                bias[:15] -= 40.0
        return net

    cases: list[tuple[str, str, Callable[..., nn.Module]]] = [
        ("the third of 5 linear layers has a bias of -30", "6",
         partial(dense, layers=5, width=32, at=2)),
        ("the first of 3 linear layers has a bias of -30", "2",
         partial(dense, layers=3, width=64, at=0)),
        ("the second of 4 BatchNorms has a bias of -20", "5", conv),
        ("15 of 16 channels of the second convolution have a bias of -40", "3", mostly),
    ]  # fmt: skip
    for variant, (summary, where, build) in enumerate(cases):
        yield _pair("dead-relu", variant, summary, "dead-units", build, where=where)


def _saturated() -> Iterator[Case]:
    def dense(sick: bool, *, layers: int, width: int, at: int, factor: float) -> nn.Module:
        net = set_gain_(mlp([64, *[width] * layers, 10], nn.Tanh), 1.0)
        if sick:
            layer = net.get_submodule(str(2 * at + 1))
            assert isinstance(layer, nn.Linear)
            with torch.no_grad():
                layer.weight.mul_(factor)
        return net

    def conv(sick: bool) -> nn.Module:
        net = set_gain_(convnet([1, 8, 16, 16, 10], nn.Tanh), 1.0)
        if sick:
            _shift_(net.get_submodule("2"), 8.0)
        return net

    yield _pair(
        "saturated-tanh", 0, "the weights of the second of 4 layers are 30 times too large",
        "saturated-units", partial(dense, layers=4, width=32, at=1, factor=30.0), where="4",
    )  # fmt: skip
    # Pixels from 0 to 255: the ailment lies in the data.
    build = partial(dense, False, layers=3, width=48, at=0, factor=1.0)
    yield Case(
        "saturated-tanh", 1, "pixels from 0 to 255 go into tanh", "saturated-units", "2",
        partial(_on_digits, build, 171, raw=True), partial(_on_digits, build, 171),
    )  # fmt: skip
    yield _pair(
        "saturated-tanh", 2, "the second of 3 convolutions has a bias of -8", "saturated-units",
        conv, where="3",
    )  # fmt: skip
    yield _pair(
        "saturated-tanh", 3, "the weights of the last of 6 hidden layers are 20 times too large",
        "saturated-units", partial(dense, layers=6, width=64, at=5, factor=20.0), where="12",
    )  # fmt: skip


def _transition() -> Iterator[Case]:
    def narrowing(
        sick: bool, *, widths: list[int], per_stage: int, at: int, rank: int | None = None,
        scale: float = 1.0,
    ) -> nn.Module:  # fmt: skip
        net = Narrowing(widths, per_stage)
        if sick:
            skip = net.get_submodule(f"stages.{at}.0.projection")
            assert isinstance(skip, nn.Conv2d)
            balance_(skip, rank=rank, scale=scale)
        return net

    def proc(sick: bool) -> nn.Module:
        net = CifarResNet(
            2, "proc", in_channels=1, widths=(4, 8, 8), transition_init="flat", transition_kernel=2
        )
        if sick:
            transition = net.get_submodule("down2")
            assert isinstance(transition, nn.Conv2d)
            with torch.no_grad():
                transition.weight.mul_(0.1)
        return net

    cases: list[tuple[str, str, Callable[..., nn.Module]]] = [
        ("a skip of stride 2 has singular values a tenth of the right ones", "stages.1.0",
         partial(narrowing, widths=[8, 16, 32], per_stage=2, at=1, scale=0.1)),
        ("a skip of stride 2 has rank 1 of 16", "stages.2.0",
         partial(narrowing, widths=[8, 16, 32], per_stage=3, at=2, rank=1)),
        ("a skip of stride 2 has rank 2 of 12", "stages.1.0",
         partial(narrowing, widths=[12, 24], per_stage=4, at=1, rank=2)),
        ("a bare transition has singular values a tenth of the right ones", "down2", proc),
    ]  # fmt: skip
    for variant, (summary, where, build) in enumerate(cases):
        kind = "transition-loses-gradient"
        yield _pair("transition", variant, summary, kind, build, where=where)


def _recurrent() -> Iterator[Case]:
    def on_sequences(build: Build, seed: int, steps: int) -> Patient:
        with seeded(seed):
            model = build()
        data = sequences(seed, steps=steps, features=8)
        return Patient(model, nn.CrossEntropyLoss(), data, {})

    def rnn(sick: bool, *, width: int, gain: float, right: float, act: str) -> nn.Module:
        layer = nn.RNN(8, width, batch_first=True, nonlinearity=act)
        set_recurrent_(layer, gain if sick else right)
        return Recurrent(layer, 8)

    def lstm(sick: bool) -> nn.Module:
        layer = nn.LSTM(8, 32, batch_first=True)
        set_recurrent_(layer, 8.0 if sick else 1.0)
        return Recurrent(layer, 8)

    def cell(sick: bool) -> nn.Module:
        layer = nn.RNNCell(8, 32)
        set_recurrent_(layer, 4.0 if sick else 1.0)
        return CellLoop(layer)

    tanh = partial(rnn, width=32, gain=3.5, right=1.0, act="tanh")
    relu = partial(rnn, width=48, gain=2.2, right=_HE, act="relu")
    cases: list[tuple[str, str, Callable[..., nn.Module], int]] = [
        ("nn.RNN, tanh, 40 steps, recurrent weights 3.5 times orthogonal", "rnn", tanh, 40),
        ("nn.RNN, ReLU, 30 steps, recurrent weights 2.2 times orthogonal", "rnn", relu, 30),
        ("nn.LSTM, 50 steps, recurrent weights 8 times orthogonal", "rnn", lstm, 50),
        ("nn.RNNCell, tanh, 40 steps, recurrent weights 4 times orthogonal", "cell", cell, 40),
    ]
    for variant, (summary, where, build, steps) in enumerate(cases):
        seed = 7 + 100 * variant
        yield Case(
            "recurrent", variant, summary, "recurrent-explodes", where,
            partial(on_sequences, partial(build, True), seed, steps),
            partial(on_sequences, partial(build, False), seed, steps),
        )  # fmt: skip


def _learning_rate() -> Iterator[Case]:
    def conv() -> nn.Module:
        return convnet([1, 8, 8, 10], norm=True)

    cases: list[tuple[str, Build, dict[str, float], float]] = [
        ("30 for two linear layers", lambda: mlp([64, 24, 10]), {"learning_rate": 30.0}, 0.02),
        ("50 for a net with BatchNorm", conv, {"learning_rate": 50.0}, 0.02),
        ("40 with momentum 0.5, tanh", lambda: mlp([64, 20, 20, 10], nn.Tanh),
         {"learning_rate": 40.0, "momentum": 0.5}, 0.02),
        ("10 for weights of gain 1.41", lambda: set_gain_(mlp([64, 24, 24, 10]), _HE),
         {"learning_rate": 10.0}, 0.005),
    ]  # fmt: skip
    for variant, (summary, build, options, right) in enumerate(cases):
        seed = 11 + 100 * variant
        yield Case(
            "learning-rate", variant, f"a learning rate of {summary}", "learning-rate", "",
            partial(_on_digits, build, seed, options),
            partial(_on_digits, build, seed, options | {"learning_rate": right}),
        )  # fmt: skip


def ailments() -> list[Case]:
    """All cases with an ailment, variants of one ailment next to each other."""
    makers = (
        _no_skip, _unscaled, _bad_gain, _dead, _saturated, _transition, _recurrent, _learning_rate,
    )  # fmt: skip
    return [case for maker in makers for case in maker()]
