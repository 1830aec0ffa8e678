"""The residual MLP: what it computes, its switches, its initial weights and gradient norms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from conditioning import GradientNorms, theory
from conditioning.errors import InvalidArgumentError
from experiments.models import ResidualMLP


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def net(num_blocks=3, *, width=6, in_features=5, seed=0, **options):
    return ResidualMLP(
        in_features, width, num_blocks, 4, generator=generator(seed), dtype=torch.float64,
        **options,
    )  # fmt: skip


def batch_norm(x):
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_net_computes_its_definition(bn, skip, scale):
    model, x = net(bn=bn, skip=skip, branch_scale=scale), normal(7, 5)
    normalise = batch_norm if bn else (lambda t: t)
    stream = x @ model.stem.weight.T + model.stem.bias
    for block in model.blocks:
        first, second = (m.weight for m in block.branch if isinstance(m, nn.Linear))
        hidden = torch.relu(normalise(stream)) @ first.T
        hidden = torch.relu(normalise(hidden)) @ second.T
        stream = scale * hidden + (stream if skip else 0)
    last = model.head[-1]
    expected = torch.relu(normalise(stream)) @ last.weight.T + last.bias
    torch.testing.assert_close(model(x), expected)


def test_images_are_flattened():
    model, x = net(in_features=12), normal(3, 3, 2, 2)
    assert torch.equal(model(x), model(x.flatten(1)))
    assert model.block_names == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_shared_learnable_factor_is_one_parameter():
    tau = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    model = net(branch_scale=tau)
    assert sum(p is tau for p in model.parameters()) == 1
    torch.testing.assert_close(model(normal(7, 5)), net(branch_scale=0.5)(normal(7, 5)))


def test_weights_have_the_variance_of_their_initialisation():
    model = net(4, width=64, in_features=48)
    for weight, variance in (
        (torch.cat([m.weight for b in model.blocks for m in b.branch if isinstance(m, nn.Linear)]),
         2 / 64),
        (model.stem.weight, 1 / (3 * 48)),
    ):  # fmt: skip
        slack = 5 * math.sqrt(2 / weight.numel())
        assert float(weight.detach().square().mean()) == pytest.approx(variance, rel=slack)
    assert float(model.stem.bias.detach().abs().max()) <= 1 / math.sqrt(48)
    assert all(m.bias is None for b in model.blocks for m in b.branch if isinstance(m, nn.Linear))


def test_the_weights_depend_on_the_generator_alone():
    state = torch.random.get_rng_state()
    first, second = net(seed=3), net(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def ratios(model, seed):
    x, y = normal(256, 32, seed=seed), torch.arange(256) % 4
    with GradientNorms(model, model.block_names) as norms:
        nn.functional.cross_entropy(model(x), y).backward()
    return norms.ratios().to_numpy()[0]


@pytest.mark.parametrize("num_blocks", [2, 16])
def test_at_initialisation_ratios_are_those_of_the_mean_field(num_blocks):
    # The stem's outputs have variance 1/3.
    predicted = theory.initial_ratios(num_blocks, input_variance=1 / 3).mean() - 1
    found = [
        abs(1 - ratios(net(num_blocks, width=96, in_features=32, seed=s), s)).mean()
        for s in range(4)
    ]
    assert sum(found) / 4 == pytest.approx(float(predicted), rel=0.1)


def test_without_skip_every_block_multiplies_the_gradient():
    found = ratios(net(12, width=96, in_features=32, skip=False), 0)
    limit = math.pi / (math.pi - 1)
    assert found[2:].mean() == pytest.approx(limit, rel=0.1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_blocks": 0}, "num_blocks must be a positive integer"),
        ({"width": 2.0}, "width"),
        ({"in_features": True}, "in_features"),
        ({"branch_scale": math.inf}, "branch_scale must be finite"),
    ],
)
def test_a_bad_option_is_named(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        net(**options)
