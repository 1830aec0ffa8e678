"""Further cases: variants from 4 on, written after the rules had been judged on variants 1 to 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gallery.cases import Batch, Case, Patient, digits, seeded, sequences, tokens
from experiments.gallery.networks import (
    LanguageModel,
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

_HE = math.sqrt(2)
Build = Callable[[], nn.Module]
Data = Callable[[int], list[Batch]]
Act = Callable[[], nn.Module]


def _patient(
    build: Build, seed: int, data: Data = digits, options: dict[str, float] | None = None
) -> Patient:
    with seeded(seed):
        model = build()
    return Patient(model, nn.CrossEntropyLoss(), data(seed), options or {})


def _case(
    name: str,
    variant: int,
    summary: str,
    kind: str,
    build: Callable[..., nn.Module],
    *,
    where: str = "",
    data: Data = digits,
) -> Case:
    seed = 5000 + 10 * variant + len(name)
    return Case(
        name, variant, summary, kind, where,
        partial(_patient, partial(build, True), seed, data),
        partial(_patient, partial(build, False), seed, data),
    )  # fmt: skip


def _tower(sick: bool, *, width: int, blocks: int, gain: float | None, **more: Any) -> nn.Module:
    net = Tower(width, blocks, skip=not sick, branch_scale=1 if sick else blocks**-0.5, **more)
    return net if gain is None else set_gain_(net, gain)


def _branches(sick: bool, *, width: int, blocks: int, gain: float, **more: Any) -> nn.Module:
    scale = 1.0 if sick else blocks**-0.5
    return set_gain_(Tower(width, blocks, skip=True, branch_scale=scale, **more), gain)


def _dense(sick: bool, *, sizes: list[int], act: Act, gain: float, right: float) -> nn.Module:
    return set_gain_(mlp(sizes, act), gain if sick else right)


def _conv(sick: bool, *, channels: list[int], act: Act, gain: float, right: float) -> nn.Module:
    return set_gain_(convnet(channels, act), gain if sick else right)


def _broken(
    sick: bool, *, build: Build, layer: str, shift: float = 0.0, factor: float = 1.0
) -> nn.Module:
    net = build()
    if sick:
        part = net.get_submodule(layer)
        assert isinstance(part, (nn.Linear, nn.Conv2d))
        assert part.bias is not None
        with torch.no_grad():
            part.weight.mul_(factor)
            part.bias.sub_(shift)
    return net


def _dead_branch() -> nn.Module:
    return set_gain_(Tower(32, 6, skip=True, branch_scale=6**-0.5), _HE)


def _skip(sick: bool, *, build: Build, name: str, rank: int | None, scale: float) -> nn.Module:
    net = build()
    if sick:
        part = net.get_submodule(name)
        assert isinstance(part, nn.Conv2d)
        balance_(part, rank=rank, scale=scale)
    return net


def _preactivation() -> nn.Module:
    return CifarResNet(3, in_channels=1, widths=(4, 8), bn=False, branch_scale=6**-0.5)


def _rnn(sick: bool, *, kind: Callable[..., nn.RNNBase], gain: float, layers: int) -> nn.Module:
    layer = kind(8, 24, num_layers=layers, batch_first=True)
    set_recurrent_(layer, gain if sick else 1.0)
    return Recurrent(layer, 8)


def _steps(count: int) -> Data:
    return partial(sequences, steps=count, features=8)


def later_ailments() -> list[Case]:
    """Two further variants of each ailment."""
    deep = partial(_tower, width=48, blocks=25)
    branch = partial(_broken, build=_dead_branch, layer="blocks.2.branch.1", shift=40.0)
    sigmoid = partial(_broken, build=lambda: set_gain_(mlp([64, 32, 32, 10], nn.Sigmoid), 1.0))
    normed = partial(Narrowing, [8, 16, 32], 2, norm=True)
    cases = [
        _case("no-skip", 4, "50 linear layers, ReLU, right gain", "inputs-collapse",
              partial(deep, gain=_HE)),
        _case("no-skip", 5, "50 linear layers, GELU, weights as torch draws them",
              "gradient-vanishes", partial(deep, gain=None, activation=nn.GELU)),
        _case("unscaled-branches", 4, "20 residual blocks of two convolutions",
              "unscaled-branches", partial(_branches, width=8, blocks=20, gain=_HE, conv=True)),
        _case("unscaled-branches", 5, "30 residual blocks of two linear layers, GELU",
              "unscaled-branches",
              partial(_branches, width=40, blocks=30, gain=1.53, activation=nn.GELU)),
        _case("bad-gain", 4, "13 linear layers, GELU, gain 0.7 for 1.53", "weight-gain",
              partial(_dense, sizes=[64, *[48] * 12, 10], act=nn.GELU, gain=0.7, right=1.53)),
        _case("bad-gain", 5, "10 convolutions, ReLU, gain 4 for 1.41", "weight-gain",
              partial(_conv, channels=[1, *[8] * 10, 10], act=nn.ReLU, gain=4.0, right=_HE)),
        _case("dead-relu", 4, "the ReLU inside the third of 6 residual branches has -40 in front",
              "dead-units", branch, where="blocks.2.branch.2"),
        _case("dead-relu", 5, "the last of 4 convolutions has a bias of -50", "dead-units",
              partial(_broken, build=lambda: set_gain_(convnet([1, 8, 8, 8, 8, 10]), _HE),
                      layer="6", shift=50.0), where="7"),
        _case("saturated-tanh", 4, "the weights of the second sigmoid layer are 60 times too large",
              "saturated-units", partial(sigmoid, layer="3", factor=60.0), where="4"),
        _case("saturated-tanh", 5, "the first of 4 tanh layers has a bias of -12",
              "saturated-units",
              partial(_broken, build=lambda: set_gain_(mlp([64, *[40] * 4, 10], nn.Tanh), 1.0),
                      layer="1", shift=12.0), where="2"),
        _case("transition", 4, "a skip of stride 2 has rank 1 of 16, BatchNorm in the branches",
              "transition-loses-gradient",
              partial(_skip, build=normed, name="stages.2.0.projection", rank=1, scale=1.0),
              where="stages.2.0"),
        _case("transition", 5, "a projection is a hundredth of what it should be",
              "transition-loses-gradient",
              partial(_skip, build=_preactivation, name="stage2.0.projection.1", rank=None,
                      scale=0.01), where="stage2.0"),
        _case("recurrent", 4, "nn.GRU, 60 steps, recurrent weights 8 times orthogonal",
              "recurrent-explodes", partial(_rnn, kind=nn.GRU, gain=8.0, layers=1),
              where="rnn", data=_steps(60)),
        _case("recurrent", 5, "nn.RNN of 2 layers, 50 steps, recurrent weights 3 times orthogonal",
              "recurrent-explodes", partial(_rnn, kind=nn.RNN, gain=3.0, layers=2),
              where="rnn", data=_steps(50)),
    ]  # fmt: skip
    rates: list[tuple[str, Build, Data, dict[str, float]]] = [
        ("100 with momentum 0.9 for two convolutions", lambda: convnet([1, 8, 16, 10]), digits,
         {"learning_rate": 100.0, "momentum": 0.9}),
        ("300 for an LSTM", lambda: Recurrent(nn.LSTM(8, 16, batch_first=True), 8), _steps(10),
         {"learning_rate": 300.0}),
    ]  # fmt: skip
    for variant, (summary, build, data, options) in enumerate(rates, start=4):
        seed = 5000 + variant
        cases.append(
            Case(
                "learning-rate", variant, f"a learning rate of {summary}", "learning-rate", "",
                partial(_patient, build, seed, data, options),
                partial(_patient, build, seed, data, options | {"learning_rate": 0.01}),
            )
        )  # fmt: skip
    return cases


# ---------------------------------------------------------------------- healthy


class _PostNorm(nn.Module):
    """Transformer blocks with LayerNorm behind each addition, as at first."""

    def __init__(self, vocabulary: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
            for _ in range(num_layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits.transpose(1, 2)


def _zero_branches() -> nn.Module:
    """A residual net whose branches begin at zero."""
    net = Tower(32, 16, skip=True)
    for block in net.blocks:
        last = block.get_submodule("branch.3")
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return net


def _trained(build: Build, learning_rate: float = 0.1, steps: int = 150) -> nn.Module:
    """Some steps of gradient descent on other digits than those that are examined."""
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9)
    data = digits(1, batch=64, batches=20)
    for step in range(steps):
        inputs, targets = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net


def later_healthy() -> list[Case]:
    """Further networks that are known to train, some of them trained."""
    texts = partial(tokens, steps=12, vocabulary=30)
    entries: list[tuple[str, Build, Data]] = [
        ("resnet with BatchNorm", partial(Narrowing, [8, 16, 32], 3, norm=True), digits),
        ("resnet with BatchNorm", partial(ResidualMLP, 64, 32, 60, 10), digits),
        ("resnet with BatchNorm", partial(CifarResNet, 5, in_channels=1, widths=(4, 8, 8)), digits),
        ("transformer", partial(_PostNorm, 30, 32, 4), texts),
        ("tied embeddings", partial(LanguageModel, 30, 32, 10), texts),
        ("recurrent net", lambda: Recurrent(nn.GRU(8, 16, num_layers=2, batch_first=True), 8),
         _steps(50)),
        ("mlp", lambda: mlp([64, *[64] * 5, 10]), digits),
        ("mlp", lambda: set_gain_(mlp([64, *[64] * 8, 10], nn.Tanh), 1.0), digits),
        ("mlp", lambda: mlp([64, *[32] * 8, 10], norm=True), digits),
        ("convnet", lambda: convnet([1, 8, 8, 16, 16, 16, 16, 16, 10], norm=True), digits),
        ("zero branches", _zero_branches, digits),
        ("trained", partial(_trained, lambda: mlp([64, 64, 64, 10])), digits),
        ("trained", partial(_trained, partial(ResidualMLP, 64, 32, 10, 10)), digits),
        ("trained", partial(_trained, lambda: convnet([1, 8, 16, 16, 10], norm=True)), digits),
        ("trained", partial(_trained, lambda: mlp([64, 48, 48, 10], nn.Tanh), 0.05), digits),
    ]  # fmt: skip
    return [
        Case(name, variant, name, "", "", partial(_patient, build, 7000 + variant, data), None)
        for variant, (name, build, data) in enumerate(entries, start=4)
    ]
