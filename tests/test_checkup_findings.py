"""Findings: each rule fires beyond its limit, and only if the whole enclosure lies there."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from checkup_parts import (
    BEYOND,
    HE,
    NAN,
    block,
    chain,
    check_complete,
    clean,
    exact,
    kinds,
    layer,
    lead,
    use,
)  # fmt: skip
from checkups import checkup, near
from torch import nn

from conditioning import Estimate
from conditioning.checkup import LayerReading, RecurrentReading, StepSize, limits
from conditioning.checkup.findings import find


def test_a_healthy_checkup_has_no_findings():
    assert find(clean()) == ()


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
