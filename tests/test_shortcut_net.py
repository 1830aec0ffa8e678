"""The shortcut network: what it computes, how it is initialised, what it refuses."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from conditioning.errors import InvalidArgumentError, ShapeError
from experiments.models import (
    ACTIVATIONS,
    ShortcutNet,
    half_mean_squared_error,
    half_mean_squared_error_from_moments,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def reference(net, x, pre, mid, post, shortcut):
    """The definition, unit by unit, from the weight matrices alone."""
    for unit in range(net.num_units):
        first, *others = net.unit_weights(unit)
        hidden = pre(x) @ first.T
        for weight in others:
            hidden = mid(hidden) @ weight.T
        x = x * shortcut + post(hidden)
    return x


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("pre", "mid", "post"), [(None, None, None), ("gelu", "relu", "shifted_sigmoid")]
)
def test_the_net_computes_its_definition(shortcut, depth, pre, mid, post):
    net = ShortcutNet(
        4, 3, depth, pre=pre, mid=mid, post=post, shortcut=shortcut, init="xavier",
        generator=generator(),
    )  # fmt: skip
    x = normal(5, 4)
    functions = [ACTIVATIONS[name or "identity"] for name in (pre, mid, post)]
    torch.testing.assert_close(net(x), reference(net, x, *functions, shortcut))


def test_activations_may_be_callables():
    x = normal(5, 4)
    nets = [
        ShortcutNet(4, 2, 2, mid=mid, init="xavier", generator=generator())
        for mid in ("tanh", torch.tanh, nn.Tanh())
    ]
    torch.testing.assert_close(nets[0](x), nets[1](x))
    torch.testing.assert_close(nets[0](x), nets[2](x))


def test_parameters_are_the_weight_matrices_layer_by_layer():
    net = ShortcutNet(3, 4, 2, init="xavier", generator=generator())
    parameters = list(net.parameters())
    assert len(parameters) == net.num_layers == 8
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters)
    flat = [weight for unit in range(4) for weight in net.unit_weights(unit)]
    assert all(a is b for a, b in zip(flat, parameters, strict=True))
    assert net.unit_weights(-1)[0] is net.unit_weights(3)[0]
    torch.testing.assert_close(net.stacked_weights()[2, 1], net.unit_weights(2)[1])
    assert len({p.data_ptr() for p in parameters}) == 8


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_at_zero_a_net_with_shortcuts_is_the_identity(depth):
    x = normal(6, 4)
    net = ShortcutNet(4, 5, depth, mid="tanh", post="tanh")
    assert torch.equal(net(x), x)
    assert torch.equal(ShortcutNet(4, 5, depth, shortcut=False)(x), torch.zeros_like(x))


def test_a_plain_net_with_identity_matrices_is_the_one_shortcut_net_at_zero():
    x = normal(6, 4)
    assert torch.equal(ShortcutNet(4, 5, 1, shortcut=False, init="identity")(x), x)


@pytest.mark.parametrize(("units", "depth"), [(1, 1), (5, 2), (8, 1), (7, 3)])
@pytest.mark.parametrize("shortcut", [True, False])
def test_a_linear_net_is_its_end_to_end_matrix(units, depth, shortcut):
    net = ShortcutNet(4, units, depth, shortcut=shortcut, init="xavier", generator=generator())
    x = normal(6, 4)
    torch.testing.assert_close(x @ net.end_to_end_matrix().T, net(x), rtol=1e-11, atol=1e-12)
    assert net.end_to_end_matrix().requires_grad
    assert net.is_linear


def test_training_on_moments_is_training_on_samples():
    x, y = normal(30, 3), normal(30, 3, seed=1)
    net = ShortcutNet(3, 4, 2, init="xavier", scale=0.5, generator=generator())
    losses = [
        half_mean_squared_error(net(x), y),
        half_mean_squared_error_from_moments(
            net.end_to_end_matrix(), x.T @ x / 30, y.T @ x / 30, y.T @ y / 30
        ),
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, list(net.parameters())) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_xavier_is_uniform_within_its_bound():
    net = ShortcutNet(8, 100, 2, init="xavier", generator=generator())
    weights, bound = net.stacked_weights().detach(), math.sqrt(6 / 16)
    assert 0.99 * bound < float(weights.abs().max()) <= bound
    assert float(weights.var()) == pytest.approx(1 / 8, rel=0.03)
    small = ShortcutNet(8, 100, 2, init="xavier", scale=0.01, generator=generator())
    torch.testing.assert_close(small.stacked_weights(), 0.01 * net.stacked_weights())


def test_orthogonal_matrices_are_orthogonal_and_uniform():
    net = ShortcutNet(2, 4000, 1, init="orthogonal", generator=generator())
    weights = net.stacked_weights().detach()[:, 0]
    identity = torch.eye(2, dtype=torch.float64).expand_as(weights)
    torch.testing.assert_close(weights @ weights.mT, identity, rtol=0, atol=1e-14)
    # Haar on O(2): no preferred first column, both determinants equally likely.
    assert float(weights.mean(0).abs().max()) < 0.04
    assert float(torch.linalg.det(weights).mean().abs()) < 0.05


@pytest.mark.parametrize("init", ["zero", "identity", "xavier", "orthogonal"])
def test_the_global_random_state_is_neither_read_nor_changed(init):
    state = torch.random.get_rng_state()
    first = ShortcutNet(3, 2, 2, init=init, generator=generator(5)).stacked_weights()
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        second = ShortcutNet(3, 2, 2, init=init, generator=generator(5)).stacked_weights()
    assert torch.equal(first, second)


def test_single_precision_weights_are_the_rounded_double_ones():
    nets = [
        ShortcutNet(3, 2, 2, init="orthogonal", generator=generator(5), dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    assert nets[1].stacked_weights().dtype == torch.float32
    assert torch.equal(nets[0].stacked_weights().float(), nets[1].stacked_weights())


def test_a_thousand_layers_are_built_and_evaluated_quickly():
    start = time.perf_counter()
    net = ShortcutNet(10, 512, 2, init="orthogonal", generator=generator())
    half_mean_squared_error(net(normal(20, 10)), normal(20, 10, seed=1)).backward()
    net.end_to_end_matrix()
    assert time.perf_counter() - start < 5
    assert net.num_layers == 1024


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0, 1, 1), {}, "dim"),
        ((2, 1.0, 1), {}, "num_units"),
        ((2, 1, True), {}, "shortcut_depth"),
        ((2, 1, 1), {"mid": "swish2"}, "mid must be one of"),
        ((2, 1, 1), {"pre": 3}, "pre must be a name"),
        ((2, 1, 1), {"init": "kaiming"}, "init must be one of"),
        ((2, 1, 1), {"init": "xavier"}, "pass a generator"),
        ((2, 1, 1), {"scale": math.inf}, "scale"),
        ((2, 1, 1), {"dtype": torch.int64}, "floating dtype"),
    ],
)
def test_a_bad_option_is_named(arguments, options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        ShortcutNet(*arguments, **options)


def test_a_nonlinear_net_has_no_end_to_end_matrix():
    with pytest.raises(InvalidArgumentError, match="linear"):
        ShortcutNet(2, 1, 2, mid="tanh").end_to_end_matrix()


def test_there_is_no_unit_beyond_the_last():
    with pytest.raises(InvalidArgumentError, match=r"-2 \.\. 1"):
        ShortcutNet(2, 2, 1).unit_weights(2)


def test_the_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(ShapeError, match=r"\(4, 3\) and \(4, 1\)"):
        half_mean_squared_error(normal(4, 3), normal(4, 1))
    with pytest.raises(ShapeError, match="m >= 1"):
        half_mean_squared_error(normal(0, 3), normal(0, 3))
    with pytest.raises(ShapeError, match="square"):
        half_mean_squared_error_from_moments(normal(3, 3), normal(3, 3), normal(3, 3), normal(2, 2))
