"""The ResNets with a factor on the branch, and the network of its theory."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from conditioning import find_blocks
from conditioning.errors import InvalidArgumentError, ShapeError
from experiments.models import ScaledResNet, TauStack, counted_blocks
from experiments.training import Recipe, Trainer, TrainingError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def net_of(n=2, tau=0.3, **options):
    options = {"widths": (4, 6, 8), "in_channels": 1, "generator": generator(), **options}
    return ScaledResNet(n, tau, dtype=torch.float64, **options)


def images(count=5, channels=1, size=8):
    return torch.randn(count, channels, size, size, generator=generator(1), dtype=torch.float64)


@pytest.mark.parametrize(("n", "layers"), [(3, 20), (9, 56), (18, 110), (200, 1202)])
def test_layers_are_counted_as_he_et_al_do(n, layers):
    if n < 200:
        net = ScaledResNet(n, widths=(1, 1, 2))
        assert net.depth == layers
        convolutions = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())
        assert convolutions == layers
    assert counted_blocks(n) == (layers - 2) / 2
    assert counted_blocks(n, rule="stage") == n


def test_resnet_20_has_as_many_weights_as_the_authors_net():
    # He et al.: 0.27 million; BatchNorm on the two shortcuts adds 2 (16 + 32).
    net = ScaledResNet(3)
    assert sum(p.numel() for p in net.parameters()) == 269722 + 2 * (16 + 32)


def test_the_factor_multiplies_the_branch_alone():
    net = net_of(tau=0.0)
    x = images()
    expected = net.stem(x)
    for blocks in net.stages:
        for block in blocks:
            expected = torch.relu(block.shortcut(expected))
    assert torch.equal(net(x), net.head(expected.mean((2, 3))))
    # A factor of 2 is the same as twice the last layer of each branch.
    twice, scaled = net_of(tau=2.0, bn=False), net_of(tau=1.0, bn=False)
    for name, module in scaled.named_modules():
        if name.endswith("branch.5"):
            assert isinstance(module, nn.Conv2d)
            with torch.no_grad():
                module.weight *= 2
    torch.testing.assert_close(twice(x), scaled(x))


def test_shortcuts_take_every_second_pixel_and_add_channels_of_zeros():
    net = net_of(bn=False)
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    y = net.stages[1][0].shortcut(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert y.shape == (2, 6, 3, 3)
    assert not y[:, 4:].any()


def test_convolutions_are_drawn_as_the_authors_draw_them():
    net = ScaledResNet(2, widths=(64, 64), generator=generator())
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 64:
            assert module.bias is None
            std = math.sqrt(2 / (9 * module.out_channels))
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.02)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert not module.bias.any()
    biases = [p for n, p in net_of(bn=False).named_parameters() if "branch" in n and p.numel() == 1]
    assert len(biases) == 4 * 6
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("bn", [True, False])
def test_a_shared_factor_gets_the_mean_gradient_of_the_blocks(bn):
    net = net_of(learnable=True, bn=bn)
    copied = copy.deepcopy(net)
    x = images()
    for one in (net, copied):
        one(x).square().sum().backward()
    # Each block with a factor of its own.
    taus = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    fresh = net_of(learnable=True, bn=bn)
    y, remaining = fresh.stem(x), iter(taus)
    for blocks in fresh.stages:
        for block in blocks:
            y = block(y, next(remaining))
    outputs = fresh.head(y.mean((2, 3)))
    torch.testing.assert_close(outputs, net(x))
    outputs.square().sum().backward()
    mean = torch.stack([tau.grad for tau in taus]).mean()
    torch.testing.assert_close(net.tau.grad, mean)
    assert torch.equal(copied.tau.grad, net.tau.grad)
    assert torch.equal(net_of(learnable=True, bn=bn)(x), net_of(bn=bn)(x))


def test_scalars_learn_at_a_tenth_of_the_rate():
    net = net_of(learnable=True, bn=False)
    groups = net.parameter_groups()
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in net.parameters()
    )
    assert len(groups[1]["params"]) == 4 * 6 + 1
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    recipe = Recipe(num_steps=1, batch_size=6, lr=0.01)
    x, y = images(6), torch.arange(6)
    Trainer(net, x, y, recipe, parameters=groups).run()
    moved = copy.deepcopy(net)
    moved.load_state_dict(before)
    nn.functional.cross_entropy(moved(x), y).backward()
    for name, parameter in moved.named_parameters():
        rate = 0.001 if parameter.numel() == 1 else 0.01
        expected = before[name] - rate * parameter.grad
        torch.testing.assert_close(dict(net.named_parameters())[name].detach(), expected)
    assert len(net_of().parameter_groups()) == 1


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (lambda net: [{"params": list(net_of().parameters())}], "those of the model"),
        (lambda net: [{"params": list(net.parameters()), "lr": 5.0}], "lr_factor"),
        (lambda net: [{"params": list(net.parameters()), "lr_factor": -1.0}], "lr_factor"),
    ],
)
def test_groups_that_could_not_be_meant(groups, text):
    net = net_of()
    with pytest.raises(TrainingError, match=text):
        Trainer(
            net, images(6), torch.arange(6), Recipe(num_steps=1, batch_size=6, lr=0.1),
            parameters=groups(net),
        )  # fmt: skip


def test_a_checkpoint_with_other_factors_is_not_continued():
    net = net_of(learnable=True, bn=False)

    def trainer(factor):
        groups = [{**group, "lr_factor": factor} for group in net.parameter_groups()]
        return Trainer(
            net, images(6), torch.arange(6), Recipe(num_steps=2, batch_size=6, lr=0.1),
            parameters=groups,
        )  # fmt: skip

    state = trainer(0.1).state_dict()
    trainer(0.1).load_state_dict(state)
    with pytest.raises(TrainingError, match="another recipe"):
        trainer(0.2).load_state_dict(state)


def test_blocks_are_found_by_the_library():
    net = net_of()
    assert set(find_blocks(net).names) == set(net.block_names)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 0}, "n must be"),
        ({"widths": ()}, "widths"),
        ({"widths": (8, 4)}, "not fall"),
        ({"widths": (8, 0)}, r"widths\[1\]"),
        ({"tau": math.inf}, "finite"),
        ({"num_classes": 2.5}, "num_classes"),
    ],
)
def test_bad_options_of_a_resnet(options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        net_of(**options)


def test_images_that_are_too_small():
    with pytest.raises(ShapeError, match="at least 4"):
        net_of()(images(size=3))
    with pytest.raises(InvalidArgumentError, match="rule"):
        counted_blocks(3, rule="most")
    for n in (-3, 2.5):
        with pytest.raises(InvalidArgumentError, match="positive integer"):
            counted_blocks(n)


# -- the network of the theory --------------------------------------------------------------------


def test_stack_is_what_its_formula_says():
    net = TauStack(3, 7, 4, 2, tau=0.6, generator=generator())
    x = torch.randn(5, 3, generator=generator(2), dtype=torch.float64)
    h = torch.relu(x @ net.stem.T)
    for weight in net.blocks:
        h = torch.relu((torch.eye(7) + 0.6 * weight) @ h.T).T
    torch.testing.assert_close(net(x), torch.relu(h @ net.last.T) @ net.head.T)
    torch.testing.assert_close(net.states(x)[-1], h)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "last"}


def test_stack_has_the_variances_of_the_theory():
    net = TauStack(200, 300, 3, 100, tau=0.1, variance=2.0, generator=generator())
    for name, variance in (("stem", 2 / 300), ("blocks", 2 / 300), ("last", 2 / 300)):
        assert float(getattr(net, name).detach().var()) == pytest.approx(variance, rel=0.02)
    assert float(net.head.detach().var()) == pytest.approx(1 / 100, rel=0.03)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0}, "width"),
        ({"num_blocks": 1.5}, "num_blocks"),
        ({"tau": math.nan}, "finite"),
        ({"variance": -1.0}, "variance"),
    ],
)
def test_bad_options_of_a_stack(options, text):
    sizes = {"in_features": 3, "width": 4, "num_blocks": 2, "out_features": 2, "tau": 0.1}
    with pytest.raises(InvalidArgumentError, match=text):
        TauStack(**{**sizes, **options})
