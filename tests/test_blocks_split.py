"""Skip and branch are measured at the additions, and agree with what is computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from architectures import ZOO
from architectures_unusual import BLOCKS, Residual, chain
from torch import Tensor, nn

from conditioning.blocks import find_blocks, record_calls, select_blocks, split_blocks
from conditioning.errors import BlockSelectionError, RandomForwardError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def _is_split(split, skip: Tensor, branch: Tensor, rel: float = 1e-10) -> None:
    cosine = F.cosine_similarity(skip.flatten(), branch.flatten(), 0)
    assert split.skip == pytest.approx(float(skip.norm()), rel=rel)
    assert split.branch == pytest.approx(float(branch.norm()), rel=rel)
    assert split.ratio == pytest.approx(float(branch.norm() / skip.norm()), rel=rel)
    assert split.cosine == pytest.approx(float(cosine), rel=rel)


@pytest.mark.parametrize(
    "name", ["preact_resnet", "convnext", "residual_mlp", "shared_block", "inplace_relu_first"]
)
def test_the_branch_is_what_an_identity_block_adds_to_its_input(name):
    model, inputs = ZOO[name]()
    model.eval()
    blocks = [block for block in find_blocks(model, inputs) if block.kind == "identity"]
    splits = split_blocks(model, inputs, blocks)
    calls = record_calls(model, inputs, blocks)
    assert len(splits) == len(calls)
    for split, call in zip(splits, calls, strict=True):
        assert (split.name, split.call) == (call.block.name, call.call)
        skip = call.args[0].relu() if name == "inplace_relu_first" else call.args[0]
        _is_split(split, skip, call.output - skip)


def test_a_projection_and_its_branch_are_told_apart():
    model, inputs = ZOO["postact_resnet"]()
    model.eval()
    call = record_calls(model, inputs, select_blocks(model, "stages.1.0"))[0]
    block, x = model.stages[1][0], call.args[0]
    branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    (split,) = split_blocks(model, inputs, "stages.1.0")
    _is_split(split, block.shortcut(x), branch)
    assert split.kind == "transition"


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_has_two_rows(norm_first):
    model, inputs = ZOO["encoder_prenorm" if norm_first else "encoder_postnorm"]()
    model.eval()
    splits = split_blocks(model, inputs, "layers.0")
    layer = model.layers[0]

    def attend(x: Tensor) -> Tensor:
        return layer.self_attn(x, x, x, need_weights=False)[0]

    def feed(x: Tensor) -> Tensor:
        return layer.linear2(F.gelu(layer.linear1(x)))

    if norm_first:
        first = inputs, attend(layer.norm1(inputs))
        middle = sum(first)
        second = middle, feed(layer.norm2(middle))
    else:
        first = inputs, attend(inputs)
        middle = layer.norm1(sum(first))
        second = middle, feed(middle)
    assert [(s.call, s.addition) for s in splits] == [(0, 0), (0, 1)]
    for split, parts in zip(splits, (first, second), strict=True):
        _is_split(split, *parts)


@pytest.mark.parametrize("name", [key for key, value in BLOCKS.items() if value[2] == "identity"])
def test_every_form_of_addition_is_measured(name):
    forward, parts, _, _ = BLOCKS[name]
    model, inputs = chain(forward, **parts)
    splits = split_blocks(model, inputs, "1")
    call = record_calls(model, inputs, select_blocks(model, "1"))[0]
    block, x = model[1], call.args[0]
    if name == "three additions":
        half = x + 0.5 * block.a(x)
        whole = half + block.b(half)
        steps = [
            (x, 0.5 * block.a(x)),
            (half, block.b(half)),
            (whole, 0.5 * block.c(whole)),
        ]
    elif name == "shifted features":
        half = x + block.a(x)
        steps = [(x, block.a(x)), (half, call.output - half)]
    else:
        factor = {"scaled skip": 0.7, "alpha": 0.5}.get(name, 1.0)
        output = call.output * (2**0.5 if name == "scaled sum" else 1.0)
        branch = output - factor * x
        if name == "learned scalar gain":  # zero to begin with
            (split,) = splits
            assert split.branch == split.ratio == 0
            assert math.isnan(split.cosine)
            return
        steps = [(factor * x, branch)]
    assert len(splits) == len(steps)
    for split, step in zip(splits, steps, strict=True):
        _is_split(split, *step)


def test_additions_that_a_loop_makes_belong_to_its_branches():
    model, inputs = ZOO["additions_in_the_model"]()
    splits = split_blocks(model, inputs)
    x = model.embed(inputs)
    for split, branch in zip(splits, model.branches, strict=True):
        _is_split(split, x, branch(x))
        x = x + branch(x)
    assert [split.name for split in splits] == [f"branches.{i}" for i in range(3)]


def test_small_branches_of_a_coarse_model_are_measured_before_they_are_rounded_away():
    model = nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4)))
    model = model.bfloat16()
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    model[1].inner.weight.mul_(1e-4)
    model[1].inner.bias.fill_(1e-4)
    inputs = torch.randn(3, 4).bfloat16()
    split = split_blocks(model, inputs)[0]
    x = model[0](inputs)
    branch = model[1].inner(x)
    assert torch.equal(x + branch, x)  # nothing of it is left in the output
    _is_split(split, x.double(), branch.double(), rel=1e-6)


def test_the_same_random_numbers_are_drawn_in_both_runs():
    model, inputs = ZOO["convnext"]()  # stochastic depth in training mode
    one, other = split_blocks(model, inputs), split_blocks(model, inputs)
    assert one.to_frame().equals(other.to_frame())


def test_blocks_without_an_addition_have_no_row():
    model, inputs = ZOO["procrustes_layout"]()
    splits = split_blocks(model, inputs)
    assert [s.name for s in splits] == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    for name in ("plain_mlp", "vgg", "unet"):
        with pytest.raises(BlockSelectionError, match="No residual addition in"):
            split_blocks(*ZOO[name]())
    with pytest.raises(BlockSelectionError, match="No residual addition in 'stages.0.2'"):
        split_blocks(model, inputs, "stages.0.2")


def test_a_model_with_a_state_of_its_own_is_refused():
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.count = nn.Linear(3, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + (self.inner(x) if self.count % 2 else self.inner(x).tanh())

    with pytest.raises(RandomForwardError, match="another course in the second of two runs"):
        split_blocks(Alternating(), torch.randn(2, 3))


def test_splits_print_and_become_a_frame():
    splits = split_blocks(*ZOO["gpt_tuples"]())
    lines = str(splits).splitlines()
    assert len(lines) == 1 + len(splits) == 7
    assert lines[0].split()[:4] == ["block", "call", "addition", "kind"]
    assert f"{splits[3].skip:.4g}" in lines[4]
    frame = splits.to_frame()
    assert list(frame.columns) == [
        "block", "call", "addition", "kind", "skip", "branch", "ratio", "cosine",
    ]  # fmt: skip
    assert list(frame.block) == [f"blocks.{i // 2}" for i in range(6)]
    assert list(frame.addition) == [0, 1] * 3
    assert splits[1:3][0] is splits[1]
    assert splits[0].to_dict()["name"] == "blocks.0"
    assert str(splits[0]).startswith("blocks.0: skip ")
    assert repr(splits) == "BlockSplits(6 additions)"


def test_a_zero_skip_has_an_infinite_ratio():
    model = nn.Sequential(Residual(nn.Linear(3, 3)), Residual(nn.Linear(3, 3)))
    split = split_blocks(model, torch.zeros(2, 3))[0]
    assert split.skip == 0
    assert math.isinf(split.ratio)
    assert math.isnan(split.cosine)
