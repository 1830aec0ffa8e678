"""Findings: each rule fires beyond its limit, and only if the whole enclosure lies there."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from checkups import checkup, near
from torch import nn

from conditioning import Estimate
from conditioning.checkup import (
    ActivationReading,
    BlockReading,
    LayerReading,
    RecurrentReading,
    StepSize,
    limits,
)
from conditioning.checkup.depth import carriers, growth_of, holds, pooled, pooled_between
from conditioning.checkup.findings import find
from conditioning.theory import initial_ratios

NAN = Estimate(math.nan, math.nan, math.nan)
HE = math.sqrt(2)
BEYOND = 1.05  # by so much a number lies beyond its limit, and inside with the inverse


def exact(value):
    return Estimate(value, value, value)


def block(depth, ratio, *, kind="identity", name=None, product=NAN, act=(1.0, 1.0), shapes=None):
    ratio = ratio if isinstance(ratio, Estimate) else exact(ratio)
    return BlockReading(
        name or f"b.{depth}", "Block", kind, shapes or "8x16 -> 8x16", depth, exact(act[0]),
        exact(act[1]), ratio, exact(1.0), ratio, product, None, None,
    )  # fmt: skip


def chain(ratios, *, kind="identity", product=None, **more):
    """Blocks with these ratios, and the checkup's product."""
    blocks = tuple(block(i, r, kind=kind, **more) for i, r in enumerate(ratios))
    norm, linked = 1.0, []
    for entry in reversed(blocks):
        after, norm = norm, norm * float(entry.ratio)
        linked.append(dataclasses.replace(entry, grad_in=exact(norm), grad_out=exact(after)))
    blocks = tuple(reversed(linked))
    whole = exact(math.prod(float(b.ratio) for b in blocks)) if product is None else product
    return clean(blocks=blocks, product=whole)


def layer(depth, gain, *, name=None, role="layer", followed_by="relu"):
    return LayerReading(
        name or f"b.{depth}.w", "Linear", role, 2 * depth, 16, gain, followed_by, None, None, "",
        None, "",
    )  # fmt: skip


def use(name, *, function="relu", dead=0.0, flat=0.5, units=64, depth=1, rms=1.0):
    return ActivationReading(name, function, depth, rms, flat, dead, units)


def clean(**changes):
    """A checkup without any finding, with some fields changed."""
    base = dataclasses.replace(
        checkup(findings=False), recurrent=(), step_size=None, predictions=(), layers=(),
        activations=(), hessian=None, gauss_newton=None,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def kinds(report, severity=None):
    return [f.kind for f in find(report) if severity in (None, f.severity)]


def lead(report):
    findings = find(report)
    assert findings, "no finding at all"
    return findings[0]


def check_complete(report):
    """Each finding has a number beyond its limit, a weight, a place in the checkup and a remedy."""
    for finding in find(report):
        number = finding.number
        assert finding.limit < number.low or number.high < finding.limit
        assert finding.weight > 0
        assert finding.remedy.endswith(".")
        assert finding.sentence.endswith(".")
        found = eval(f"report.{finding.evidence}", {"report": report})
        assert found is not None


def test_a_healthy_checkup_has_no_findings():
    assert find(clean()) == ()


# ---------------------------------------------------------------------- the depth


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
    blocks[1:] = [
        dataclasses.replace(b, act_in=exact(act_in), act_out=exact(act_in)) for b in blocks[1:]
    ]
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
    few = added(30.0, limits.FEWEST_BLOCKS - 1)
    layers = tuple(layer(i, 3.0) for i in range(6))
    found = lead(dataclasses.replace(few, layers=layers))
    assert found.kind == "gradient-explodes"
    assert "skips around" not in found.remedy


# ---------------------------------------------------------------------- weights


def plain_net(gain, count=10, followed_by="relu", right=HE):
    """Plain blocks of one layer each whose gradients change as their gain says."""
    report = chain([gain / right] * count, kind="plain")
    layers = tuple(layer(i, gain, followed_by=followed_by) for i in range(count))
    products = [(gain / right) ** (count - i) for i in range(count)]
    blocks = tuple(
        dataclasses.replace(b, product=exact(p))
        for b, p in zip(report.blocks, products, strict=True)
    )
    return dataclasses.replace(report, layers=layers, blocks=blocks)


@pytest.mark.parametrize(("gain", "verb"), [(0.5, "keeps only"), (5.0, "multiplied")])
def test_a_wrong_gain_leads(gain, verb):
    report = plain_net(gain)
    found = lead(report)
    assert found.kind == "weight-gain"
    assert kinds(report) == ["weight-gain"]
    assert verb in found.sentence
    assert "kaiming" in found.remedy
    assert found.number.value == pytest.approx(gain)
    check_complete(report)


@pytest.mark.parametrize("factor", [BEYOND, 1 / BEYOND])
def test_the_gain_counts_by_what_it_does_over_the_depth(factor):
    count = 10
    most = limits.fair_factor(count - 1) * factor
    gain = math.sqrt(2) * most ** (-1 / (count - 1))
    assert kinds(plain_net(gain, count)) == (["weight-gain"] if factor > 1 else [])


def test_a_right_gain_for_tanh_is_one():
    assert kinds(plain_net(0.3, followed_by="tanh", right=1.0)) == ["weight-gain"]
    assert kinds(plain_net(1.0, followed_by="tanh", right=1.0)) == []


def test_a_gain_that_explains_little_does_not_lead():
    report = plain_net(0.5)
    layers = tuple(dataclasses.replace(entry, weight_gain=1.3) for entry in report.layers)
    assert kinds(dataclasses.replace(report, layers=layers)) == ["gradient-vanishes"]
    # Nor do layers in front of a normalisation, or two layers alone.
    layers = tuple(
        dataclasses.replace(entry, followed_by="normalisation") for entry in report.layers
    )
    assert kinds(dataclasses.replace(report, layers=layers)) == ["gradient-vanishes"]
    assert kinds(dataclasses.replace(report, layers=report.layers[:3])) == ["gradient-vanishes"]


def test_deep_plain_nets_need_skips_whatever_their_gain():
    found = lead(plain_net(0.6, limits.PLAIN_DEPTH))
    assert found.kind == "gradient-vanishes"
    assert "gain 0.6" in found.sentence
    assert "skips" in found.remedy


@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "leaky_relu"])
def test_right_gains_keep_the_second_moment(name):
    nodes, weights = np.polynomial.legendre.leggauss(400)
    z = torch.tensor(12 * nodes)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    moment = float(
        (torch.tensor(12 * weights) * density * getattr(nn.functional, name)(z) ** 2).sum()
    )
    assert limits.RIGHT_GAIN[name] == pytest.approx(moment**-0.5, rel=1e-4)


# ---------------------------------------------------------------------- activations


def test_dead_units_lead_and_norms_follow():
    report = dataclasses.replace(
        chain([1.0, 0.0, math.nan, math.nan], kind="plain", product=exact(0.0)),
        activations=(
            use("b.0.act", depth=1), use("b.1.act", dead=1.0, flat=1.0, depth=3),
            use("b.2.act", dead=1.0, flat=1.0, depth=5),
        ),
    )  # fmt: skip
    found = find(report)
    assert [(f.kind, f.severity) for f in found] == [
        ("dead-units", "problem"), ("gradient-vanishes", "remark"),
    ]  # fmt: skip
    assert found[0].where == ("b.1.act", "b.2.act")
    assert "dead-units" in found[1].remedy
    check_complete(report)


@pytest.mark.parametrize("units", [1, 8, 64, 4096])
def test_chance_explains_some_dead_units(units):
    limit = limits.dead_limit(units)
    more, fewer = math.floor(limit * units + 1) / units, math.floor(limit * units) / units
    assert kinds(clean(activations=(use("a", dead=more, units=units),))) == ["dead-units"]
    assert kinds(clean(activations=(use("a", dead=fewer, units=units),))) == []
    assert limit >= 0.5


def test_saturated_units_name_the_worst_first():
    uses = (
        use("a", function="tanh", flat=0.6), use("b", function="sigmoid", flat=0.9),
        use("c", function="tanh", flat=0.5), use("d", function="relu", flat=0.9),
        use("e", function="relu6", flat=0.9), use("f", function="relu6", flat=0.9, rms=20.0),
    )  # fmt: skip
    report = clean(activations=uses)
    assert lead(report).where == ("b", "f", "a")
    assert kinds(report) == ["saturated-units"]
    check_complete(report)


@pytest.mark.parametrize(
    ("function", "depth", "fires"),
    [("sigmoid", 9, False), ("sigmoid", 3, True), ("tanh", 9, True), ("hardtanh", 9, True)],
)
def test_a_sigmoid_that_returns_probabilities_may_be_sure(function, depth, fires):
    uses = (use("out", function=function, flat=0.99, depth=depth),)
    report = clean(layers=(layer(1, 1.4), layer(2, 1.4)), activations=uses)  # depths 2 and 4
    assert kinds(report) == (["saturated-units"] if fires else [])


def test_the_slope_of_a_sigmoid_that_returns_probabilities_is_not_that_of_the_depth():
    report = chain([1.0, 1.0, 1.0, 1e-5], kind="plain")
    layers = tuple(layer(i, 1.4) for i in range(4))
    out = use("b.3.act", function="sigmoid", flat=0.99, depth=7)
    blocks = tuple(dataclasses.replace(b, product=exact(1e-5)) for b in report.blocks)
    report = dataclasses.replace(report, layers=layers, blocks=blocks)
    assert kinds(report) == ["gradient-vanishes"]
    assert kinds(dataclasses.replace(report, activations=(out,))) == []


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
    """In front of a normalisation, or of a mean over time, activations have their own scale."""
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
    ("share", "layers", "samples", "fires"),
    [(0.55, 40, 16, True), (0.45, 40, 16, False), (0.9, 20, 16, False), (0.9, 40, 15, False)],
)
def test_gates_that_are_the_same_for_all_samples(share, layers, samples, fires):
    report = plain_net(math.sqrt(2), layers)
    uses = tuple(
        use(f"b.{i}.a", dead=0.5 * share, depth=2 * i + 1, units=10**4) for i in range(layers)
    )
    setting = dataclasses.replace(report.setting, num_samples=samples)
    report = dataclasses.replace(report, activations=uses, setting=setting)
    assert kinds(report) == (["inputs-collapse"] if fires else [])
    skips = tuple(dataclasses.replace(b, kind="identity") for b in report.blocks)
    assert kinds(dataclasses.replace(report, blocks=skips)) == []


# ---------------------------------------------------------------------- single layers


def with_transition(ratio, others=1.0):
    blocks = [block(i, others) for i in range(6)]
    blocks[3] = block(3, ratio, kind="transition")
    entry = LayerReading(
        "b.3.skip", "Conv2d", "transition", 3, 16, 1.0, "", near(0.1), near(0.0), "true",
        math.sqrt(2), "exact",
    )  # fmt: skip
    return clean(blocks=tuple(blocks), product=exact(1.0), layers=(entry,))


def test_a_transition_that_loses_half_is_named_with_its_layer():
    report = with_transition(0.5 / BEYOND)
    found = lead(report)
    assert found.kind == "transition-loses-gradient"
    assert found.where == ("b.3", "b.3.skip")
    assert "0.1" in found.sentence
    assert "'b.3.skip'" in found.remedy
    assert "Procrustes" in found.remedy
    check_complete(report)
    assert find(with_transition(0.5 * BEYOND)) == ()
    assert find(with_transition(Estimate(0.4, 0.3, 0.51))) == ()
    # Where all blocks lose as much it is not the transition's doing.
    assert find(with_transition(0.45, others=0.8)) == ()


def test_a_transition_that_loses_nearly_all_is_one_finding():
    report = dataclasses.replace(with_transition(1e-6), product=exact(1e-6))
    assert kinds(report) == ["transition-loses-gradient"]


def recurrent(growth, name="rnn", classes="RNN", steps=30):
    growth = growth if isinstance(growth, Estimate) else exact(growth)
    return RecurrentReading(name, classes, steps, exact(1.0), exact(1.0), growth, 1.0)


def test_recurrent_layers():
    bound = limits.fair_factor(30) ** (1 / 29)
    for growth, classes, expected in (
        (bound * 1.01, "RNN", [("recurrent-explodes", "problem")]),
        (bound * 1.01, "LSTM", [("recurrent-explodes", "problem")]),
        (bound / 1.01, "RNN", []),
        (Estimate(2.0, bound / 1.01, 2.1), "RNN", []),
        (1 / bound / 1.01, "RNN", [("recurrent-vanishes", "problem")]),
        (1 / bound / 1.01, "GRU", [("recurrent-vanishes", "remark")]),
        (1 / bound * 1.01, "RNN", []),
        (Estimate(0.5, 0.4, 1 / bound * 1.01), "RNN", []),
        (math.nan, "RNN", []),
    ):
        report = clean(recurrent=(recurrent(growth, classes=classes),))
        assert [(f.kind, f.severity) for f in find(report)] == expected
        check_complete(report)


def test_the_steps_of_a_cell_are_no_depth():
    blocks = tuple(block(i, 2.0, kind="plain", name=f"cell#{i}") for i in range(30))
    report = clean(blocks=blocks, product=exact(2.0**30))
    assert kinds(report) == ["gradient-explodes"]
    report = dataclasses.replace(report, recurrent=(recurrent(2.0, "cell", "RNNCell"),))
    assert kinds(report) == ["recurrent-explodes"]


# ---------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("quotient", "fires"),
    [(exact(1.01), True), (exact(0.99), False), (Estimate(1.5, 0.99, 1.6), False), (None, False)],
)
def test_learning_rate(quotient, fires):
    report = clean(step_size=StepSize(near(0.1), 0.2, 0.0, quotient))
    assert kinds(report) == (["learning-rate"] if fires else [])
    check_complete(report)


def conditioned(low, status="certified", negative=0.0):
    hessian = checkup(findings=False).hessian
    number = dataclasses.replace(
        hessian.condition10, value=1e9, low=low, high=math.inf, status=status
    )
    return clean(hessian=dataclasses.replace(hessian, condition10=number, index=exact(negative)))


def test_ill_conditioning_is_a_remark():

    assert kinds(conditioned(0.9e6)) == []
    assert kinds(conditioned(1.1e6), "remark") == ["ill-conditioned"]
    assert kinds(conditioned(1.1e6), "problem") == []
    check_complete(conditioned(1.1e6))


@pytest.mark.parametrize("status", ["not resolvable", "lower bound only", "depends on threshold"])
def test_a_condition_number_of_rounding_is_no_finding(status):
    assert kinds(conditioned(1e12, status)) == []
    assert kinds(conditioned(1e12, "exhausted")) == ["ill-conditioned"]


@pytest.mark.parametrize(("negative", "bowl"), [(0.0, True), (0.09, True), (0.11, False)])
def test_steps_to_a_minimum_are_named_where_there_is_one(negative, bowl):
    sentence = lead(conditioned(1e7, negative=negative)).sentence
    assert ("reduce an error" in sentence) == bowl
    assert ("no minimum" in sentence) != bowl


def test_nonfinite_leads():
    report = dataclasses.replace(
        chain([0.1] * 20, kind="plain"), nonfinite="NaN came up first in 'b.3', forward.",
        loss=exact(math.nan),
    )  # fmt: skip
    found = find(report)
    assert found[0].kind == "nonfinite"
    assert "b.3" in found[0].sentence
    assert len(found) == 1  # behind NaN no other number means anything
    assert kinds(clean(loss=exact(math.inf))) == ["nonfinite"]


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_at_a_finite_loss(norm):
    report = clean(gradient_norm=exact(norm), loss=exact(1.4))
    assert kinds(report) == ["nonfinite"]
    assert lead(report).evidence == "gradient_norm"
    assert f"{norm}" in lead(report).sentence


def test_a_gradient_of_exactly_zero():
    report = clean(gradient_norm=exact(0.0))
    assert kinds(report, "problem") == ["gradient-zero"]
    check_complete(report)
    assert kinds(clean(gradient_norm=exact(5e-324))) == []
    assert kinds(clean(gradient_norm=Estimate(1e-9, 0.0, 1e-8))) == []
    # Where units without slope explain it, it follows from them.
    dead = clean(gradient_norm=exact(0.0), activations=(use("a", dead=1.0, flat=1.0),))
    assert kinds(dead, "problem") == ["dead-units"]


def test_problems_come_first_and_then_by_weight():
    report = clean(
        recurrent=(recurrent(0.1, "lstm", "LSTM"),),
        step_size=StepSize(near(0.1), 0.2, 0.0, exact(2.0)),
        activations=(use("a", function="tanh", flat=0.6),),
    )
    found = find(report)
    assert [f.kind for f in found] == ["learning-rate", "saturated-units", "recurrent-vanishes"]
    assert found[2].weight > found[0].weight > found[1].weight


def test_a_checkup_of_which_nothing_is_known_has_no_findings():
    blocks = tuple(block(i, NAN) for i in range(3))
    assert find(clean(blocks=blocks, product=NAN)) == ()
    assert find(clean(blocks=(), product=NAN)) == ()


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
