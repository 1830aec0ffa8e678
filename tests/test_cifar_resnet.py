"""CIFAR's ResNets and Procrustes ResNets: sizes, switches, initial weights, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from conditioning import find_blocks
from conditioning.errors import InvalidArgumentError, ShapeError
from experiments.models import CifarResNet, ResidualBranch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def net(n=1, variant="resnet", *, seed=0, **options):
    return CifarResNet(n, variant, generator=generator(seed), dtype=torch.float64, **options)


def convolutions(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def parameters_by_hand(n, variant):
    """Three BNs and three convolutions a block; the rest layer by layer."""

    def block(outside, width, projection=0):
        norms = 2 * outside + 2 * width + 2 * width
        return norms + outside * width + 9 * width * width + width * 4 * width + projection

    head = 2 * 256 + 256 * 10 + 10
    identity = [block(4 * width, width) for width in (16, 32, 64)]
    if variant == "proc":
        return 27 * 64 + n * sum(identity) + 64 * 128 + 128 * 256 + head
    first = [
        block(inside, width, projection=2 * inside + inside * 4 * width)
        for inside, width in ((16, 16), (64, 32), (128, 64))
    ]
    return 27 * 16 + 2 * 16 + (n - 1) * sum(identity) + sum(first) + head


@pytest.mark.parametrize(
    ("n", "variant", "name", "millions"),
    [
        (18, "resnet", "ResNet-164", 1.704), (18, "proc", "ProcResNet-166", 1.715),
        (30, "resnet", "ResNet-272", 2.817), (30, "proc", "ProcResNet-274", 2.828),
        (70, "resnet", "ResNet-632", 6.526), (70, "proc", "ProcResNet-634", 6.537),
        (111, "resnet", "ResNet-1001", 10.328), (111, "proc", "ProcResNet-1003", 10.339),
    ],
)  # fmt: skip
def test_the_papers_nets_have_their_number_of_parameters(n, variant, name, millions):
    model = CifarResNet(n, variant, init="zero", transition_init="zero")
    assert model.name == name
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters_by_hand(n, variant)
    assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize("variant", ["resnet", "proc"])
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 16), (1, 8), (2, 4)])
def test_images_of_many_sizes_are_mapped_to_logits(variant, channels, size):
    model = CifarResNet(1, variant, in_channels=channels, num_classes=7, generator=generator())
    assert model(normal(2, channels, size, size, dtype=torch.float32)).shape == (2, 7)


def test_widths_decide_stages_and_channels():
    model = net(2, "proc", widths=(2, 3))
    assert model.name == "ProcResNet-15"
    assert model.block_names == ["stage1.0", "stage1.1", "down1", "stage2.0", "stage2.1"]
    assert model.down1.weight.shape == (12, 8, 1, 1)
    assert model(normal(2, 3, 6, 6)).shape == (2, 10)


@pytest.mark.parametrize("variant", ["resnet", "proc"])
def test_the_library_finds_the_blocks_and_transitions_that_there_are(variant):
    model = net(2, variant)
    found = find_blocks(model, normal(4, 3, 16, 16))
    assert list(found.names) == model.block_names
    assert list(found.transitions) == model.transition_names
    kinds = {block.kind for block in found if block.name not in model.transition_names}
    assert kinds == {"identity"}


def test_a_block_is_branch_plus_skip():
    model = net(2, branch_scale=0.3).eval()
    x = normal(2, 16, 8, 8)
    first, second = model.stage1
    assert torch.equal(first(x), 0.3 * first.branch(x) + first.projection(x))
    y = normal(2, 64, 8, 8)
    assert second.projection is None
    assert torch.equal(second(y), 0.3 * second.branch(y) + y)


def test_without_skip_there_really_is_none():
    model = net(2, skip=False).eval()
    with_skip = net(2)
    x = normal(2, 16, 8, 8)
    assert torch.equal(model.stage1[0](x), model.stage1[0].branch(x))
    assert not any("projection" in name for name, _ in model.named_modules())
    lost = sum(p.numel() for p in with_skip.parameters()) - sum(
        p.numel() for p in model.parameters()
    )
    # Three projections with their BN.
    assert lost == sum(2 * a + a * b for a, b in ((16, 64), (64, 128), (128, 256)))


def test_with_branches_times_zero_a_stage_is_the_identity():
    model = net(3, "proc", branch_scale=0.0)
    x = normal(2, 64, 8, 8)
    assert torch.equal(model.stage1(x), x)


def test_a_shared_learnable_factor_is_one_parameter_and_gets_a_gradient():
    tau = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    model = net(2, branch_scale=tau)
    assert sum(p is tau for p in model.parameters()) == 1
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in net(2).parameters()) + 1
    x = normal(4, 3, 8, 8)
    torch.testing.assert_close(model(x), net(2, branch_scale=0.5)(x))
    model(x).square().sum().backward()
    assert float(tau.grad.abs()) > 0


@pytest.mark.parametrize("variant", ["resnet", "proc"])
def test_without_bn_there_is_no_normalisation(variant):
    model = net(1, variant, bn=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = normal(2, 3, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_the_stride_is_where_it_was_asked_for():
    for place, index in (("1x1", 2), ("3x3", 5)):
        model = net(1, stride_on=place)
        strided = [n for n, m in convolutions(model).items() if m.stride == (2, 2)]
        assert f"stage2.0.branch.{index}" in strided
        assert len(strided) == 4  # one in each branch, one in each projection
        assert model(normal(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("init", "gain"), [("he", 2.0), ("lecun", 1.0), ("torch", 1 / 3)])
def test_weights_have_the_variance_of_their_initialisation(init, gain):
    model = net(2, "proc", init=init, transition_init=init)
    for layer in convolutions(model).values():
        weight = layer.weight.detach()
        expected = gain / weight[0].numel()
        # Standard error of a variance of so many values, normal or uniform, five times.
        slack = 5 * math.sqrt(2 / weight.numel())
        assert float(weight.square().mean()) == pytest.approx(expected, rel=slack)
        assert abs(float(weight.mean())) < 5 * math.sqrt(expected / weight.numel())
    bound = 1 / math.sqrt(256)
    assert 0.95 * bound < float(model.head[-1].weight.detach().abs().max()) <= bound


def test_projections_can_begin_small():
    small, plain = net(2, shortcut_scale=0.01), net(2)
    pairs = zip(convolutions(small).items(), convolutions(plain).values(), strict=True)
    for (name, layer), other in pairs:
        factor = 0.01 if "projection" in name else 1.0
        torch.testing.assert_close(layer.weight, factor * other.weight)


def test_a_flat_transition_has_equal_singular_values():
    model = net(1, "proc", transition_init="flat")
    for layer in (model.down1, model.down2):
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        torch.testing.assert_close(values, torch.full_like(values, math.sqrt(2)))
    stem = torch.linalg.svdvals(model.stem[0].weight.detach().flatten(1))
    torch.testing.assert_close(stem, torch.full_like(stem, math.sqrt(64 / 27)))


def test_a_flat_transition_of_2x2_kernels_keeps_the_norm_of_every_gradient():
    model = net(1, "proc", transition_init="flat", transition_kernel=2)
    x = normal(2, 64, 8, 8).requires_grad_()
    y = model.down1(x)
    g = normal(*y.shape, seed=1)
    (back,) = torch.autograd.grad(y, x, g)
    assert float(back.norm()) == pytest.approx(float(g.norm()), rel=1e-12)
    # Of a 1x1 kernel only in expectation: it has less outputs than a gradient has directions.
    other = net(1, "proc", transition_init="flat")
    (back,) = torch.autograd.grad(other.down1(x), x, g)
    assert abs(float(back.norm() / g.norm()) - 1) > 1e-4


def test_the_weights_depend_on_the_generator_alone():
    state = torch.random.get_rng_state()
    first, second = net(1, seed=3), net(1, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    single = CifarResNet(1, generator=generator(3))
    for one, two, rounded in zip(
        first.parameters(), second.parameters(), single.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        assert torch.equal(one.float(), rounded)
    assert not torch.equal(net(1, seed=4).stem[0].weight, first.stem[0].weight)


def test_without_a_generator_the_global_one_is_used():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = CifarResNet(1).stem[0].weight
        torch.manual_seed(5)
        assert torch.equal(CifarResNet(1).stem[0].weight, first)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 0}, "n must be a positive integer"),
        ({"n": 1, "in_channels": 1.5}, "in_channels"),
        ({"n": 1, "widths": ()}, "widths"),
        ({"n": 1, "widths": (4, -1)}, r"widths\[1\]"),
        ({"n": 1, "variant": "wide"}, "variant must be one of resnet, proc"),
        ({"n": 1, "stride_on": "5x5"}, "stride_on"),
        ({"n": 1, "transition_kernel": 3}, "transition_kernel must be one of 1, 2"),
        ({"n": 1, "init": "xavier"}, "init must be one of he"),
        ({"n": 1, "branch_scale": math.nan}, "branch_scale must be finite"),
        ({"n": 1, "branch_scale": nn.Parameter(torch.ones(2))}, "one element"),
    ],
)
def test_a_bad_option_is_named(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        CifarResNet(**options)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ShapeError, match="at least 4×4"):
        net(1)(normal(1, 3, 3, 8))
    with pytest.raises(ShapeError, match="takes images"):
        net(1)(normal(3, 8, 8))


def test_a_projection_is_dropped_with_the_skip():
    block = ResidualBranch(nn.Identity(), skip=False, projection=nn.Linear(2, 2))
    assert block.projection is None
