"""Findings along the depth: which product counts, and what healthy nets may do to norms."""

from __future__ import annotations

import dataclasses
import math

import pytest
from checkup_parts import BEYOND, block, chain, check_complete, clean, exact, kinds, layer, lead

from conditioning import Estimate
from conditioning.checkup import limits
from conditioning.checkup.depth import carriers, growth_of, holds, pooled, pooled_between
from conditioning.checkup.findings import find
from conditioning.theory import initial_ratios


@pytest.mark.parametrize(("sign", "kind"), [(-1, "gradient-vanishes"), (1, "gradient-explodes")])
def test_the_product_over_all_blocks_decides(sign, kind):
    limit = limits.fair_factor(20)
    beyond, inside = (limit * BEYOND) ** sign, (limit / BEYOND) ** sign
    for product, expected in ((beyond, [kind]), (inside, [])):
        report = chain([product ** (1 / 20)] * 20, kind="plain")
        assert kinds(report) == expected
    report = chain([beyond ** (1 / 20)] * 20, kind="plain")
    check_complete(report)
    assert lead(report).where == ()  # spread over the depth
    assert "skips" in lead(report).remedy


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_product_whose_enclosure_straddles_the_limit_is_no_finding(sign):
    limit = limits.fair_factor(20) ** sign
    ends = sorted((limit * 2**sign, limit / 1.001**sign))
    report = chain([(limit * 2**sign) ** (1 / 20)] * 20, kind="plain")
    assert kinds(report)
    straddling = dataclasses.replace(report, product=Estimate(limit * 2**sign, *ends))
    assert kinds(straddling) == []


def test_one_block_that_loses_most_is_named():
    ratios = [1.0] * 9
    ratios[4] = 1e-6
    report = chain(ratios, kind="plain")
    found = lead(report)
    assert (found.kind, found.where) == ("gradient-vanishes", ("b.4",))
    assert "'b.4'" in found.remedy


def test_a_gradient_of_zero_is_lost():
    report = chain([1.0, 1.0, 0.0, 1.0], kind="plain", product=exact(0.0))
    found = lead(report)
    assert found.kind == "gradient-vanishes"
    assert math.isfinite(found.weight)
    assert "Nothing is left" in found.sentence


@pytest.mark.parametrize("num_blocks", [3, 10, 54, 200])
@pytest.mark.parametrize("variance", [0.3, 1.0])
def test_resnets_with_batchnorm_are_healthy_at_any_depth(num_blocks, variance):
    ratios = initial_ratios(num_blocks, input_variance=variance).tolist()
    assert find(chain(ratios)) == ()


@pytest.mark.parametrize("num_blocks", [12, 54, 200])
def test_branches_without_normalisation_need_a_factor(num_blocks):
    ratios = initial_ratios(num_blocks, normalised=False).tolist()
    found = lead(chain(ratios))
    assert found.kind == "unscaled-branches"
    assert f"1/sqrt({num_blocks}) = {num_blocks**-0.5:.3g}" in found.remedy
    check_complete(chain(ratios))
    scaled = initial_ratios(num_blocks, normalised=False, branch_scale=num_blocks**-0.5)
    assert find(chain(scaled.tolist())) == ()


def test_a_plain_net_with_batchnorm_explodes():
    ratios = initial_ratios(40, skip=False).tolist()
    found = lead(chain(ratios, kind="plain"))
    assert found.kind == "gradient-explodes"
    assert "skips" in found.remedy


@pytest.mark.parametrize(("factor", "fires"), [(BEYOND, True), (1 / BEYOND, False)])
def test_growth_of_the_second_half_decides_on_branches(factor, fires):
    each = (limits.second_half(1) * factor) ** (1 / 5)
    assert kinds(chain([1.0] * 5 + [each] * 5)) == (["unscaled-branches"] if fires else [])
    # Straddling: the value beyond, the lower end inside.
    wide = Estimate(each, each * 0.95, each)
    assert kinds(chain([1.0] * 5 + [wide] * 5)) == []


def test_runs_are_taken_stage_by_stage():
    """Normalisation on the skips of transitions starts the growth anew in each stage."""
    stage = initial_ratios(18).tolist()
    blocks = [
        block(i, r, shapes=f"8x{2**s} -> 8x{2**s}")
        for s in range(3)
        for i, r in enumerate(stage, start=18 * s)
    ]
    product = exact(math.prod(stage) ** 3)
    assert "unscaled-branches" not in kinds(clean(blocks=tuple(blocks), product=product))


def test_the_first_plain_block_is_left_out_with_the_data_in_front_of_it():
    ratios = [1e-6, 1.0, 1.0]
    report = chain(ratios, kind="plain")
    assert kinds(report) == ["gradient-vanishes"]
    blocks = tuple(dataclasses.replace(b, product=exact(1.0)) for b in report.blocks)
    layers = (layer(0, 1.4), layer(1, 1.4))
    assert kinds(dataclasses.replace(report, blocks=blocks, layers=layers)) == []
    # The gradient behind it counts, also where it comes there by other ways than the next block.
    around = (dataclasses.replace(blocks[0], grad_out=exact(1e-7)), *blocks[1:])
    found = lead(dataclasses.replace(report, blocks=around, layers=layers))
    assert (found.kind, found.evidence) == ("gradient-vanishes", "blocks[0].grad_out")
    assert found.number.value == pytest.approx(1e-7)
    lost = tuple(dataclasses.replace(b, product=exact(1e-6)) for b in report.blocks)
    report = dataclasses.replace(report, blocks=lost, layers=layers)
    assert lead(report).evidence == "blocks[1].product"


def test_pooling_may_lose_norm():
    shapes = "8x4x32x32 -> 8x4"
    pool = block(1, 0.9 / 32, kind="plain", shapes=shapes, act=(32.0, 1.0))
    assert pooled(pool) == 1024
    assert pooled(block(1, 1.0, kind="plain", shapes="8x5x16 -> 8x16")) == 5  # over time
    assert pooled(block(1, 1.0, kind="identity", shapes=shapes)) == 1
    limit = 1 / limits.fair_factor(2)
    low = dataclasses.replace(block(0, 1.0, kind="plain"))
    for product, expected in ((limit / 30, []), (limit / 40, ["gradient-vanishes"])):
        assert kinds(clean(blocks=(low, pool), product=exact(product))) == expected


@pytest.mark.parametrize(
    ("before", "after", "positions"),
    [
        ("8x1000x32", "8x32", 1000), ("8x4x8x8", "8x4", 64), ("8x4x8x8", "8x256", 1),
        ("8x64", "8x32", 1), ("8x32", "8x50x32", 1), ("8x32 / 8x32", "8x32", 1), ("", "", 1),
    ],
)  # fmt: skip
def test_means_between_blocks_may_lose_norm(before, after, positions):
    first = block(0, 1.0, kind="plain", shapes=f"{before} -> {before}" if before else "scalar")
    last = block(1, 1.0, kind="plain", shapes=f"{after} -> {after}" if after else "scalar")
    assert pooled_between(first, last) == positions
    limit = 1 / limits.fair_factor(2) / math.sqrt(positions)
    for product, expected in ((limit * BEYOND, []), (limit / BEYOND, ["gradient-vanishes"])):
        assert kinds(clean(blocks=(first, last), product=exact(product))) == expected


def behind_first(*, grad_out, act_in=1.0, followed_by="relu"):
    """A plain net in whose first block the gradient is ``grad_out``, 1 in front of the next."""
    report = chain([1.0, 1.0, 1.0], kind="plain")
    blocks = [dataclasses.replace(b, product=exact(1.0)) for b in report.blocks]
    blocks[0] = dataclasses.replace(blocks[0], grad_out=exact(grad_out))
    blocks[1:] = (
        dataclasses.replace(b, act_in=exact(act_in), act_out=exact(act_in)) for b in blocks[1:]
    )
    layers = (layer(0, 1.4, followed_by=followed_by), layer(1, 1.4), layer(2, 1.4))
    return dataclasses.replace(report, blocks=tuple(blocks), layers=layers)


def test_a_normalisation_behind_the_first_block_has_the_scale_of_the_data():
    assert kinds(behind_first(grad_out=1e-5)) == ["gradient-vanishes"]
    assert kinds(behind_first(grad_out=1e-5, followed_by="normalisation")) == []
    # Behind an activation it shows by what it does to the scale of the activations.
    assert kinds(behind_first(grad_out=1e-5, act_in=1e-5)) == []
    assert kinds(behind_first(grad_out=1e-5, act_in=0.1)) == ["gradient-vanishes"]
    assert kinds(behind_first(grad_out=0.0, act_in=0.0)) == ["gradient-vanishes"]


def test_what_is_lost_between_blocks_is_said_so():
    report = chain([1.0] * 5, kind="plain", product=exact(1e-6))
    blocks = list(report.blocks)
    for index in range(3):
        norm = exact(1e-6)
        blocks[index] = dataclasses.replace(blocks[index], grad_in=norm, grad_out=norm)
    report = dataclasses.replace(report, blocks=tuple(blocks))
    found = lead(report)
    assert (found.kind, found.where) == ("gradient-vanishes", ())
    assert "between 'b.2' and 'b.3'." in found.sentence
    assert "between 'b.2' and 'b.3'" in found.remedy
    # A little at each of many places has no name.
    for index in range(5):
        before, after = exact(10.0 ** (2 * index - 10)), exact(10.0 ** (2 * index - 9.9))
        blocks[index] = dataclasses.replace(blocks[index], grad_in=before, grad_out=before)
        blocks[index] = dataclasses.replace(blocks[index], grad_out=after, ratio=exact(10**-0.1))
    found = lead(dataclasses.replace(report, blocks=tuple(blocks), product=exact(1e-8)))
    assert "between the blocks" in found.sentence
    assert "skips" in found.remedy


def added(growth, count):
    """A model that adds branches of two plain blocks to a stream; each grows the gradient so."""
    blocks, norm = [], 1.0
    for index in reversed(range(2 * count)):
        first = index % 2 == 0
        after, norm = (norm / 7, norm * growth) if first else (norm, norm)
        entry = block(index, (norm if first else 0.9 * norm) / after, kind="plain")
        entry = dataclasses.replace(
            entry, grad_in=exact(norm if first else 0.9 * norm), grad_out=exact(after),
            branch_share=0.5, product=exact(norm),
        )  # fmt: skip
        blocks.append(entry)
    return clean(blocks=tuple(reversed(blocks)), product=exact(norm))


@pytest.mark.parametrize(("factor", "fires"), [(BEYOND, True), (1 / BEYOND, False)])
def test_branches_that_the_model_adds_are_residual_blocks(factor, fires):
    each = (limits.second_half(1) * factor) ** (1 / 10)
    report = added(each, 20)
    assert kinds(report) == (["unscaled-branches"] if fires else [])
    if fires:
        assert "20 residual blocks" in lead(report).sentence
        assert "1/sqrt(20)" in lead(report).remedy
        check_complete(report)


def test_no_skips_are_recommended_where_the_model_has_them():
    found = lead(added(30.0, limits.FEWEST_BLOCKS - 1))
    assert found.kind == "gradient-explodes"
    assert "Lead identity skips" not in found.remedy
    assert "branches" in found.remedy


def test_activations_alone_out_of_range():
    grown = tuple(block(i, 1.0, act=(10.0**i, 10.0 ** (i + 1))) for i in range(6))
    report = clean(blocks=grown, product=exact(1.0))
    assert kinds(report) == ["activations-explode"]
    check_complete(report)
    faded = tuple(block(i, 1.0, act=(10.0**-i, 10.0 ** (-i - 1))) for i in range(6))
    assert kinds(clean(blocks=faded, product=exact(1.0))) == ["activations-vanish"]
    # With the gradient out of range as well it is one finding.
    report = clean(blocks=grown, product=exact(1e6))
    assert kinds(report) == ["gradient-explodes"]


def test_a_head_of_few_outputs_does_not_vanish():
    """A regression net: Frobenius norms fall with the width, root mean squares do not."""
    wide = block(0, 1.0, kind="plain", act=(80.0, 52.0), shapes="64x100 -> 64x256")
    inner = block(1, 1.0, kind="plain", act=(52.0, 22.0), shapes="64x256 -> 64x256")
    head = block(2, 1.0, kind="plain", act=(22.0, 0.01), shapes="64x256 -> 64x1")
    layers = tuple(layer(i, 1.0, role="head" if i == 2 else "layer") for i in range(3))
    report = clean(blocks=(wide, inner, head), product=exact(1.0), layers=layers)
    assert kinds(report) == []
    narrow = block(0, 1.0, kind="plain", act=(64.0, 1.0), shapes="64x64 -> 64x4096")
    assert growth_of([narrow]).value == pytest.approx(1 / 512)
    assert kinds(clean(blocks=(narrow,), product=exact(1.0))) == ["activations-vanish"]


def test_growth_goes_over_blocks_with_nothing_between_them():
    """Behind a normalisation, or a mean over time, activations have a scale of their own."""
    first, second = (block(i, 1.0, act=(10.0, 100.0)) for i in range(2))
    limit = limits.fair_factor(1)
    assert limit < 10 * 10
    assert kinds(clean(blocks=(first, second), product=exact(1.0))) == []
    linked = dataclasses.replace(second, act_in=exact(100.0), act_out=exact(1000.0))
    assert kinds(clean(blocks=(first, linked), product=exact(1.0))) == ["activations-explode"]
    # One norm by chance is not one tensor.
    other = dataclasses.replace(linked, shapes="8x3 -> 8x3", depth=1)
    assert kinds(clean(blocks=(first, other), product=exact(1.0))) == []


@pytest.mark.parametrize(
    ("block_name", "name", "inside"),
    [
        ("a", "a", True), ("a", "a.b", True), ("a", "ab", False), ("a#3", "a.b", True),
        ("f.3-5", "f.4", True), ("f.3-5", "f.4.relu", True), ("f.3-5", "f.6", False),
        ("f.3-5", "g.4", False), ("3-5", "4", True), ("3-5", "14", False),
        ("f.one-two", "f.two.w", True), ("f.one-two", "f.three", False),
    ],
)  # fmt: skip
def test_which_modules_a_block_holds(block_name, name, inside):
    assert holds(block_name, name) == inside


def test_carriers_are_the_fewest_blocks():
    blocks = [block(i, r) for i, r in enumerate([0.5, 0.01, 0.9, 2.0])]
    assert [b.name for b in carriers(blocks, 0.5)] == ["b.1"]
    assert [b.name for b in carriers(blocks, 0.9)] == ["b.1", "b.0"]
