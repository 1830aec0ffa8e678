"""Which layers are transitions, told by running a network and by its structure."""

from __future__ import annotations

import pytest
import torch
from architectures import ZOO, PreActBlock, StageNet
from conftest import Snapshot
from torch import nn

from conditioning.blocks.transitions import transition_layers
from conditioning.procrustes.layers import is_layer
from experiments.models import CifarResNet, ResidualMLP

STEM_AND_SHORTCUT = ["stem", "stages.1.0.shortcut"]
# Where both ways agree.
EXPECTED = {
    "preact_resnet": STEM_AND_SHORTCUT,
    "preact_resnet_inplace": STEM_AND_SHORTCUT,
    "preact_resnet_without_norm": STEM_AND_SHORTCUT,
    "postact_resnet": ["stem", "stages.1.0.shortcut.0"],
    "torchvision_layout": [
        "conv1", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0",
    ],
    "bottleneck_resnet": [
        "conv1", "layer1.0.downsample.0", "layer2.0.downsample.0", "layer3.0.downsample.0",
        "layer4.0.downsample.0",
    ],
    "procrustes_layout": ["stem", "stages.0.2"],
    "bare_transition_attribute": ["stem", "transition1"],
    "inplace_relu_first": ["stem"],
    "nested_stages": ["stem", "body.1.0.shortcut"],
    "convnext": ["stem", "stages.1.1"],
    "residual_mlp": ["embed"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_running(model, inputs, **options):
    return transition_layers(model, inputs, is_layer, **options)


def by_structure(model, **options):
    return transition_layers(model, None, is_layer, **options)


@pytest.mark.parametrize("name", EXPECTED)
def test_both_ways_find_the_transitions_and_the_stem(name):
    model, inputs = ZOO[name]()
    assert list(by_running(model, inputs)) == EXPECTED[name]
    assert list(by_structure(model)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_without_the_stem_only_those_behind_it_are_left(name):
    model, inputs = ZOO[name]()
    assert list(by_running(model, inputs, stem=False)) == EXPECTED[name][1:]
    assert list(by_structure(model, stem=False)) == EXPECTED[name][1:]


@pytest.mark.parametrize("name", ZOO)
def test_layers_come_by_their_names_and_the_model_is_left_as_it_was(name):
    model, inputs = ZOO[name]()
    before = Snapshot(model)
    found = {**by_running(model, inputs), **by_structure(model)}
    before.assert_unchanged()
    modules = dict(model.named_modules())
    assert all(modules[key] is module and is_layer(module) for key, module in found.items())


# Without skips, where what repeats looks like residual blocks unless it is run.
ONLY_BY_STRUCTURE = {"densenet": ["stem", "stages.0.2"], "unet": ["grow.0", "grow.1"]}


@pytest.mark.parametrize("name", ZOO)
def test_both_ways_agree_unless_there_is_no_skip(name):
    model, inputs = ZOO[name]()
    run = list(by_running(model, inputs))
    assert list(by_structure(model)) == ONLY_BY_STRUCTURE.get(name, run)
    assert name not in ONLY_BY_STRUCTURE or not run


@pytest.mark.parametrize("name", ["plain_mlp", "vgg", "autoencoder", "lstm"])
def test_networks_without_residual_blocks_have_none(name):
    model, inputs = ZOO[name]()
    assert not by_running(model, inputs)
    assert not by_structure(model)


class InvertedResidual(nn.Module):
    """MobileNet's: without a skip where the shape changes; the first is without expansion."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = c_in * expansion
        layers = [nn.Sequential(nn.Conv2d(c_in, width, 1), nn.ReLU6())] if expansion > 1 else []
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width)
        layers += [nn.Sequential(depthwise, nn.ReLU6()), nn.Conv2d(width, c_out, 1)]
        self.conv = nn.Sequential(*layers)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


def test_blocks_without_a_skip_are_no_bare_layers():
    sizes = [(4, 5, 1, 1), (5, 6, 2, 3), (6, 6, 1, 3), (6, 6, 1, 3), (6, 8, 2, 3), (8, 8, 1, 3)]
    model = StageNet([nn.Sequential(*(InvertedResidual(*size) for size in sizes))], 8)
    assert list(by_running(model, torch.randn(2, 3, 8, 8))) == ["stem"]
    assert list(by_structure(model)) == ["stem"]


class SqueezedBlock(nn.Module):
    """Some of them have squeeze and excitation."""

    def __init__(self, c_in: int, c_out: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.squeeze = None
        if squeeze:
            layers = nn.Conv2d(c_out, 2, 1), nn.ReLU(), nn.Conv2d(2, c_out, 1), nn.Sigmoid()
            self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x):
        y = self.conv2(torch.relu(self.conv1(x)))
        y = y if self.squeeze is None else y * self.squeeze(y)
        return y + (x if self.shortcut is None else self.shortcut(x))


def test_what_else_some_blocks_have_is_no_transition():
    sizes = [(4, 4, 1, False), (4, 4, 1, True), (4, 8, 2, True), (8, 8, 1, False), (8, 8, 1, True)]
    model = StageNet([nn.Sequential(*(SqueezedBlock(*size) for size in sizes))], 8)
    for found in (by_running(model, torch.randn(2, 3, 8, 8)), by_structure(model)):
        assert list(found) == ["stem", "stages.0.2.shortcut"]


class Projected(nn.Module):
    """All of them have a projection, which comes before or after the others."""

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool, kernel: int = 3) -> None:
        super().__init__()
        shortcut = nn.Conv2d(c_in, c_out, 1, stride)
        if first:
            self.shortcut = shortcut
        self.conv1 = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
        self.conv2 = nn.Conv2d(c_out, c_out, kernel, padding=kernel // 2)
        if not first:
            self.shortcut = shortcut

    def forward(self, x):
        return self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x)


@pytest.mark.parametrize("widths", [(8, 16, 32), (4, 4, 4)])
@pytest.mark.parametrize("first", [False, True])
def test_with_one_block_in_each_stage_all_projections_are_found(first, widths):
    sizes = zip((4, *widths), widths, strict=False)
    model = StageNet([nn.Sequential(*(Projected(*size, 2, first) for size in sizes))], widths[-1])
    expected = ["stem", *(f"stages.0.{i}.shortcut" for i in range(3))]
    assert list(by_running(model, torch.randn(2, 3, 8, 8))) == expected
    assert list(by_structure(model)) == expected


def test_where_structure_does_not_tell_the_projection_no_layer_is_taken_for_it():
    sizes = [(4, 8), (8, 16), (16, 32)]
    blocks = (Projected(*size, 2, first=True, kernel=1) for size in sizes)
    model = StageNet([nn.Sequential(*blocks)], 32)
    assert list(by_structure(model)) == ["stem"]
    assert len(by_running(model, torch.randn(2, 3, 8, 8))) == 4


CIFAR = {
    "resnet": [
        "stem.0", "stage1.0.projection.2", "stage2.0.projection.2", "stage3.0.projection.2",
    ],
    "proc": ["stem.0", "down1", "down2"],
}  # fmt: skip


@pytest.mark.parametrize("variant", CIFAR)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_networks_of_the_paper_have_the_transitions_that_it_names(variant, n):
    net = CifarResNet(n, variant, widths=(2, 4, 8), transition_kernel=2)
    images = torch.randn(2, 3, 8, 8)
    assert list(by_running(net, images)) == CIFAR[variant]
    # That of the first stage changes no shape, which is seen only if other blocks lack it.
    seen = [name for name in CIFAR[variant] if n > 1 or "stage1" not in name]
    assert list(by_structure(net)) == seen


def test_in_a_network_of_identities_only_the_first_layer_is_left():
    net = ResidualMLP(3, 5, num_blocks=4, num_classes=2)
    assert not by_structure(net, stem=False)
    assert not by_running(net, torch.randn(4, 3), stem=False)
    assert [type(layer) for layer in by_running(net, torch.randn(4, 3)).values()] == [nn.Linear]


@pytest.mark.parametrize("wrap", ["compiled", "data parallel"])
def test_wrappers_do_not_change_names(wrap):
    model, inputs = ZOO["preact_resnet"]()
    if wrap == "compiled":
        torch._dynamo.reset()
        wrapped = torch.compile(model, backend="eager")
    else:
        wrapped = nn.DataParallel(model)
    for found in (by_running(wrapped, inputs), by_structure(wrapped)):
        assert list(found) == STEM_AND_SHORTCUT
        assert found["stem"] is model.stem


def test_a_shared_transition_comes_once():
    stages = [
        nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 4)),
        nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 4)),
    ]
    model = StageNet(stages, 4).double()
    shared = nn.Conv2d(4, 4, 1, bias=False).double()
    model.stages[0][0].shortcut = model.stages[1][0].shortcut = shared
    found = by_running(model, torch.randn(2, 3, 8, 8).double())
    assert list(found.values()) == [model.stem, shared]


def test_only_wanted_layers_are_given():
    model, inputs = ZOO["preact_resnet"]()

    def strided(module):
        return isinstance(module, nn.Conv2d) and module.stride == (2, 2)

    for found in (
        transition_layers(model, inputs, strided),
        transition_layers(model, None, strided),
    ):
        assert all(strided(module) for module in found.values())
        assert "stages.1.0.shortcut" in found
        assert "stem" not in found


def test_running_takes_keywords_and_tuples():
    model, inputs = ZOO["gpt_tuples"]()
    assert isinstance(inputs, dict)
    assert not by_running(model, inputs, stem=False)
