"""Decisions of the large-depth experiment: every claim can hold, fail and stay open."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
from test_large_depth import TINY

from conditioning import theory
from experiments import large_depth, registry
from experiments.large_depth import figures, verdicts
from experiments.sweep import parts


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a small run measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(large_depth.PRESETS, "quick", TINY)
        patch.setattr("experiments.large_depth.figures.draw", lambda *_: None)
        folder = tmp_path_factory.mktemp("large_depth")
        options = registry.options_for(large_depth, device="cpu", out=folder, progress=False)
        registry.run(large_depth, options)
    with dataclasses.replace(options, mode="resume").open_store() as store:
        return [(cell, store[cell]) for cell in large_depth.cells(TINY, options.seeds)]


CONTEXT = {"sizes": TINY, "data": "digits", "commonest": 0.12}


def again(measured, **changed):
    """Verdicts by id, of measurements that were tampered with."""
    context = {**CONTEXT, "sizes": dataclasses.replace(TINY, **changed)}
    return {v.claim.id: v for v in verdicts.decide_claims(measured, context)}


# ------------------------------------------------------------------------ decisions


def with_movements(measured, part, law):
    """The same run, in which movements are ``law(L, beta)`` with a spread of a tenth."""
    betas = TINY.iid_betas if part == "iid" else TINY.smooth_betas
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, part):
        for key in ("output", "gradient"):
            nets = np.arange(cell["first"], cell["first"] + cell["nets"])
            noise = 0.1 * np.sin(7.0 * nets + cell["L"])
            logs = [math.log(law(cell["L"], beta)) for beta in betas]
            result[key] = (np.array(logs) + noise[:, None] * 1e-2).tolist()
    return changed


def test_movements_of_independent_weights_decide(measured):
    def exact(depth, beta):
        return theory.deviation_second_moment(depth, depth**-beta) ** 0.5

    found = again(with_movements(measured, "iid", exact))
    names = [f"{part}.{kind}" for part in ("iid", "gradient") for kind in verdicts.INDEPENDENT]
    for kind in ("identity", "balanced", "explosion"):
        names += [f"moment.{kind}", f"moment.gradient-{kind}"]
    for name in names:
        assert found[name].value == "holds", name
    assert found["iid.balanced"].num_runs == 6
    found = again(with_movements(measured, "iid", lambda depth, beta: depth ** (0.5 - beta)))
    assert found["moment.balanced"].value == "fails"
    assert found["iid.balanced"].value == "holds"
    assert found["moment.gradient-balanced"].value == "fails"
    found = again(with_movements(measured, "iid", lambda depth, beta: depth ** (beta - 0.9)))
    assert found["iid.explodes"].value == "fails"
    assert found["iid.identity"].value == "fails"
    assert found["iid.balanced"].value == "fails"


def test_moments_that_are_off_by_a_tenth_fail(measured):
    def more(depth, beta):
        return (1.1 * theory.deviation_second_moment(depth, depth**-beta)) ** 0.5

    found = again(with_movements(measured, "iid", more))
    for name in ("identity", "balanced", "gradient-identity", "gradient-balanced"):
        assert found[f"moment.{name}"].value == "fails", name
        assert "standard errors" in found[f"moment.{name}"].note
    assert found["moment.explosion"].value == "holds"


def test_scalings_are_found_by_value(measured):
    # The same nets, stored with more scalings than claims are about, in front of them.
    changed = copy.deepcopy(measured)
    for part in ("iid", "smooth"):
        for _, result in parts(changed, part):
            for key in ("output", "gradient"):
                result[key] = [[9.9, *row] for row in result[key]]
    found = again(changed, iid_betas=(0.1, 0.25, 0.5, 1.0), smooth_betas=(0.1, 0.5, 1.0, 2.0))
    plain = again(measured)
    for name in plain:
        if name.startswith(("iid.", "gradient.", "moment.", "smooth.")):
            assert found[name] == plain[name], name


@pytest.mark.parametrize(
    ("units", "value"), [(1.0, "holds"), (0.0, "fails"), (0.5, "not decided"), (2.0, "fails")]
)
def test_rates_and_means_see_the_term_of_ito(measured, units, value):
    changed = copy.deepcopy(measured)
    rng = np.random.default_rng(0)
    for cell, result in parts(changed, "growth"):
        rate = 1 / 4 - units / (2 * cell["d"])
        logs = rate * math.sqrt(cell["L"]) + 0.01 * rng.normal(size=TINY.growth_nets)
        result["logs"] = logs.tolist()
    for part, width in (("law", TINY.law_width), ("chain", TINY.chain_width)):
        for _, result in parts(changed, part):
            for key in {"output", "gradient", "logs"} & set(result):
                logs = np.array(result[key])
                noise = 0.01 * (logs - logs.mean()) / logs.std()
                result[key] = (1 / 4 - units / (2 * width) + noise).tolist()
    found = again(changed)
    for name in ("iid.rate", "law.mean", "law.gradient-mean", "law.chain-mean"):
        assert found[name].value == value, name


def test_movements_of_smooth_weights_decide(measured):
    found = again(with_movements(measured, "smooth", lambda depth, beta: depth ** (1 - beta)))
    for name in ("identity", "balanced", "shallow", "explodes"):
        assert found[f"smooth.{name}"].value == "holds", name

    def late(depth, beta):
        return depth ** (1 - beta) * (2.0 if depth == 10 else 1.0)

    found = again(with_movements(measured, "smooth", late))
    assert found["smooth.balanced"].value == "holds"
    assert found["smooth.shallow"].value == "fails"


def test_a_net_that_is_not_finite_leaves_a_claim_open(measured):
    broken = copy.deepcopy(measured)
    next(iter(parts(broken, "iid")))[1]["output"][0] = [math.nan] * 3
    next(iter(parts(broken, "law")))[1]["output"][0] = math.inf
    found = again(broken)
    for name in ("iid.balanced", "iid.explodes", "moment.identity", "law.mean", "law.spread"):
        assert found[name].value == "not decided", name


def test_laws_decide(measured):
    mean, variance = theory.limit_log_norm_law(10)
    good, bad = copy.deepcopy(measured), copy.deepcopy(measured)
    rng = np.random.default_rng(0)
    for changed, widening in ((good, 1.0), (bad, 1.6)):
        for cell, result in parts(changed, "law"):
            for key in ("output", "gradient"):
                draws = widening * rng.normal(size=cell["nets"] * 100)
                result[key] = (mean / 2 + variance**0.5 / 2 * draws).tolist()
        for cell, result in parts(changed, "chain"):
            centre, square = theory.limit_log_norm_law(cell["d"])
            draws = widening * rng.normal(size=20000)
            result["logs"] = (centre / 2 + square**0.5 / 2 * draws).tolist()
    names = ("law.spread", "law.gradient-spread", "law.chain-spread", "law.shape")
    found = again(good)
    assert [found[name].value for name in (*names, "law.mean")] == ["holds"] * 5
    found = again(bad)
    assert [found[name].value for name in names] == ["fails"] * 4
    shifted = copy.deepcopy(good)
    for cell, result in parts(shifted, "chain"):
        result["logs"] = (np.array(result["logs"]) + 1 / (2 * cell["d"])).tolist()
    found = again(shifted)  # without the term of Ito, at d = 20
    assert [found[f"law.{name}"].value for name in ("chain-mean", "shape")] == ["fails", "fails"]


def test_orders_decide(measured):
    def run(orders):
        changed = copy.deepcopy(measured)
        for cell, result in parts(changed, "order"):
            order = orders[cell["limit"]]
            result["distances"] = [
                [(1 + 0.01 * net) * depth**-order for net in range(4)]
                for depth in TINY.order_depths
            ]
        found = again(changed)
        return found["order.sde"].value, found["order.ode"].value

    assert run({"sde": 0.5, "ode": 1.0}) == ("holds", "holds")
    assert run({"sde": 1.0, "ode": 0.5}) == ("fails", "fails")
    assert run({"sde": math.nan, "ode": 1.0}) == ("not decided", "holds")


def with_lines(measured, line):
    """The same run, in which a net crosses 0 at ``line(block, H, key)``, up to 0.002."""
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, "map"):
        for key in ("output", "gradient"):
            beta = line(cell["block"], cell["H"], key)
            result[key] = [
                [4 * (beta + 0.002 * (net - 1) - place) for place in TINY.map_betas]
                for net in range(cell["nets"])
            ]
    return changed


def test_lines_decide(measured):
    def predicted(block, hurst, key):
        return theory.critical_beta(60, hurst, block, gradient=key == "gradient", width=TINY.width)

    # By the formula, at so small a depth.
    gap = max(
        abs(predicted("res-3", h, "output") - predicted("res-3", h, "gradient"))
        for h in TINY.map_hursts
    )
    assert gap > 0.05
    found = again(with_lines(measured, predicted))
    for name in (
        "line", "compounding", "gradient-line", "gradient-below", "plateau", "rises", "end",
        "no-plateau", "single", "single-rough", "single-gradient", "single-gradient-rough",
    ):  # fmt: skip
        assert found[f"map.{name}"].value == "holds", name
    assert found["map.gradient"].value == "fails"
    found = again(with_lines(measured, lambda block, hurst, key: 0.5 + 0.1 * hurst))
    assert found["map.gradient"].value == "holds"
    assert found["map.rises"].value == "holds"
    for name in (
        "line", "gradient-line", "gradient-below", "end", "single", "single-rough",
        "single-gradient", "single-gradient-rough",
    ):  # fmt: skip
        assert found[f"map.{name}"].value == "fails", name
    found = again(with_lines(measured, lambda block, hurst, key: 1.0 - 0.5 * hurst))
    for name in ("plateau", "rises", "no-plateau"):
        assert found[f"map.{name}"].value == "fails", name


def test_claims_about_gradients_do_not_hide_in_each_other(measured):
    def on_its_line(block, hurst, key):
        return theory.critical_beta(60, hurst, block, gradient=key == "gradient", width=TINY.width)

    def far_above(block, hurst, key):
        return on_its_line(block, hurst, key) + 0.15 * (key == "gradient" and hurst > 0.9)

    found = again(with_lines(measured, far_above))
    assert found["map.line"].value == "holds"
    for name in ("gradient-below", "gradient-line", "single-gradient"):
        assert found[f"map.{name}"].value == "fails", name

    def rough_above(block, hurst, key):
        return on_its_line(block, hurst, key) + 0.2 * (key == "gradient" and hurst < 0.3)

    found = again(with_lines(measured, rough_above))
    for name, value in (
        ("gradient-below", "holds"), ("gradient-line", "fails"), ("single", "holds"),
        ("single-gradient", "holds"), ("single-gradient-rough", "fails"),
    ):  # fmt: skip
        assert found[f"map.{name}"].value == value, name


def test_the_nearer_of_two_lines_decides(measured):
    def run(share):
        def line(block, hurst, key):
            first, compounded = (
                theory.critical_beta(60, hurst, block, compounded=kind) for kind in (False, True)
            )
            return (1 - share) * first + share * compounded

        return again(with_lines(measured, line))["map.compounding"].value

    assert [run(share) for share in (0.0, 0.5, 1.0)] == ["fails", "not decided", "holds"]


def test_lines_outside_of_the_map_leave_claims_open(measured):
    found = again(with_lines(measured, lambda block, hurst, key: 1.5))
    for name in (
        "line", "line-first", "compounding", "plateau", "rises", "end", "gradient",
        "gradient-below", "gradient-line", "no-plateau", "single", "single-gradient",
    ):  # fmt: skip
        assert found[f"map.{name}"].value == "not decided", name


def with_exponents(measured, after, change):
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, "regularity"):
        jitter = 0.001 * cell["seed"]
        result["before"] = 1.0 if cell["init"] == "smooth" else 0.0
        result["after"] = after[cell["init"]] + jitter
        result["change"] = change[cell["init"]] + jitter
    found = again(changed)
    return [
        found[f"regularity.{name}"].value for name in ("smooth", "rough", "change", "change-rough")
    ]


def test_regularity_decides(measured):
    def both(smooth, independent):
        return {"smooth": smooth, "independent": independent}

    assert with_exponents(measured, both(0.99, 0.02), both(0.8, 0.55)) == ["holds"] * 4
    assert with_exponents(measured, both(0.5, 0.5), both(0.3, 0.9)) == ["fails"] * 4
    # Added noise without memory is no Brownian motion either.
    assert with_exponents(measured, both(1.0, 0.0), both(0.9, 0.0))[3] == "fails"
    found = with_exponents(measured, both(math.nan, 0.0), both(math.nan, math.nan))
    assert found == ["not decided", "holds", "not decided", "not decided"]


def with_accuracies(measured, law):
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, "accuracy"):
        noise = 0.002 * (cell["seed"] - 0.5)
        table = [
            [[law(hurst, beta) + noise * (1 + hurst + beta)] * 2 for beta in TINY.train_betas]
            for hurst in cell["H"]
        ]
        result["train"] = result["test"] = table
    return again(changed)


def test_accuracies_decide(measured):
    def above(hurst, beta):
        return beta > theory.critical_beta(TINY.train_depth, hurst, "res-1")

    found = with_accuracies(measured, lambda *cell: 0.9 if above(*cell) else 0.12)
    for name in ("above", "above-hurst", "corner", "below"):
        assert found[f"accuracy.{name}"].value == "holds", name
    found = with_accuracies(measured, lambda hurst, beta: 0.9 - 0.1 * beta)
    for name in ("above-hurst", "corner", "below"):
        assert found[f"accuracy.{name}"].value == "fails", name
    assert "and" not in found["accuracy.corner"].run
    # A law of β alone is no law of the line, and one of H alone neither.
    assert found["accuracy.above"].value == "not decided"
    found = with_accuracies(measured, lambda hurst, beta: 0.2 + 0.1 * beta)
    values = [found[f"accuracy.{name}"].value for name in ("above", "above-hurst")]
    assert values == ["not decided", "holds"]
    found = with_accuracies(measured, lambda hurst, beta: 0.9 - 0.5 * hurst)
    values = [found[f"accuracy.{name}"].value for name in ("above", "above-hurst")]
    assert values == ["holds", "not decided"]
    found = with_accuracies(measured, lambda hurst, beta: 0.2 + 0.5 * hurst)
    assert found["accuracy.above"].value == "fails"
    assert "distance below the line" in found["accuracy.below"].note


def test_one_seed_decides_nothing_random(measured):
    one = [pair for pair in measured if pair[0].get("seed", 0) == 0]
    found = again(one)
    for name in ("smooth", "rough", "change", "change-rough"):
        assert found[f"regularity.{name}"].value == "not decided", name
    for name in ("above", "above-hurst", "corner"):
        assert found[f"accuracy.{name}"].value == "not decided", name


# -------------------------------------------------------------------------- figures


def test_one_net_is_drawn_without_an_interval():
    logs = {10: np.log([[2.0]]), 20: np.log([[3.0]])}
    middle, ends = figures._interval([values[:, 0] for values in logs.values()])
    assert np.exp(middle).tolist() == pytest.approx([2.0, 3.0])
    assert np.isnan(ends).all()


def test_intervals_of_means_are_not_cut():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=20) for _ in range(2)]
    middle, ends = figures._interval(values)
    for place, some in enumerate(values):
        assert middle[place] == pytest.approx(some.mean())
        half = 2.093 * some.std(ddof=1) / 20**0.5
        assert ends[:, place] == pytest.approx([some.mean() - half, some.mean() + half], rel=1e-3)
