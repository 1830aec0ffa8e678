"""The experiment along training, small: verdicts, files, resuming, and that it can be bad."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from killed import kill_small, run_small

from experiments import registry, shortcut_training
from experiments.models.shortcut_kinds import (
    ONE,
    ORTHOGONAL,
    SHORTCUT_KINDS,
    THREE,
    TWO,
    TWO_XAVIER,
    XAVIER,
)
from experiments.shortcut_training import Sizes, reference, statements, tables, verdicts
from experiments.shortcut_training.best import Sweep, sweeps
from experiments.shortcut_training.laboratory import learning_rates
from experiments.sweep import parts

PRESETS = dict(shortcut_training.PRESETS)
ROOT = Path(__file__).resolve().parent.parent
TINY = Sizes(
    summary="for tests",
    seeds=2,
    depths=(6, 12, 24),
    num_steps=60,
    rates=(-2, 1, 2),
    precision="float64",
    relu_depths=(6, 12),
    relu_samples=60,
    relu_rates=(-1, 0, 2),
    start_depths=(2, 4, 8),
    path_depths=(6, 12),
    path_rate=0.05,
    path_steps=400,
    levels=5,
    decades=2.0,
    around=3,
    together=1,
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a small run, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shortcut_training.PRESETS, "quick", TINY)
        folder = tmp_path_factory.mktemp("shortcut_training")
        yield registry.options_for(shortcut_training, device="cpu", out=folder, progress=False)


@pytest.fixture(scope="module")
def decided(options):
    """The verdicts of that run, by the claims' ids."""
    return {verdict.claim.id: verdict for verdict in registry.run(shortcut_training, options)}


@pytest.fixture(scope="module")
def measured(decided, options):
    """What that run measured."""
    with dataclasses.replace(options, mode="resume").open_store() as store:
        return [(cell, store[cell]) for cell in shortcut_training.cells(TINY, options.seeds)]


@pytest.fixture(scope="module")
def context(options):
    """What the verdicts need to know besides."""
    from experiments.moments import principal_moments
    from experiments.shortcut_training.laboratory import Laboratory

    moments = principal_moments(options.dataset, 10)
    laboratory = Laboratory(moments, TINY, "cpu")
    return {
        "data": "digits", "least_loss": moments.minimum_loss, "scale": laboratory.scale,
        "levels": laboratory.levels, "depth": 6,
        "singular_values": np.linalg.svd(moments.difference.numpy(), compute_uv=False).tolist(),
    }  # fmt: skip


def again(measured, context):
    """Verdicts by id, of measurements that were tampered with."""
    return {v.claim.id: v for v in verdicts.decide_claims(measured, context)}


def test_what_only_a_mistake_could_break_holds(decided):
    checks = [c.id for c in statements.CLAIMS if c.statement.startswith(statements.CHECK)]
    assert checks == ["check.descent"]
    assert decided["check.descent"].value == "holds"
    assert decided["check.descent"].measured < 1e-13


def test_what_is_sure_at_any_size_holds(decided):
    for name in ("start.flat", "loss.full-xavier", "path.xavier", "path.peak"):
        assert decided[name].value == "holds", name


def test_every_claim_has_a_verdict_and_a_source(decided):
    assert list(decided) == [claim.id for claim in shortcut_training.claims()]
    for claim in shortcut_training.claims():
        assert claim.source
        assert claim.reason
        assert claim.how


def test_the_numbers_are_those_of_the_data(context):
    assert context["least_loss"] == pytest.approx(0.27659897698808905, rel=1e-12)  # digits
    assert context["scale"] == pytest.approx(5.124541408, rel=1e-9)
    assert context["levels"][0] == context["scale"]
    assert context["levels"][-1] == pytest.approx(context["scale"] / 100)


def test_tables_and_figures_are_written(decided, options):
    for name in (
        "final_loss", "learning_rates", "weight_norms", "spectra_along_training", "escape", "relu"
    ):  # fmt: skip
        assert (options.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    best = pd.read_csv(options.out / "best.csv")
    assert set(best.net) == set(SHORTCUT_KINDS)
    two = best[(best.net == TWO) & (best.L == 12) & (best.kind == "linear")].iloc[0]
    rates = pd.read_csv(options.out / "learning_rates.csv")
    some = rates[(rates.net == TWO) & (rates.L == 12) & (rates.kind == "linear")]
    assert some.learning_rate.tolist() == pytest.approx(learning_rates(-2, 1, 2))
    assert two.loss == pytest.approx(some.loss.min())
    spectra = pd.read_csv(options.out / "spectra.csv")
    assert (spectra.kappa10_low <= spectra.kappa10_high).all()
    assert set(spectra.part) == {"start", "path"}
    curves = pd.read_csv(options.out / "curves.csv")
    assert curves.step.max() == TINY.num_steps
    written = json.loads((options.out / "verdicts.json").read_text(encoding="utf-8"))
    assert [claim["id"] for claim in written["claims"]] == list(decided)


def with_final_losses(measured, size):
    """The same run with four seeds, whose final losses are ``size(net, depth)`` at every rate."""
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, "sweep"):
        row = size(cell["net"], cell["L"]) * (1 + 0.01 * np.arange(4))
        result["losses"] = [row.tolist()] * len(result["rates"])
    return changed


def test_final_losses_decide(measured, context):
    paper = with_final_losses(measured, lambda net, depth: 1e-5 if net == TWO else 1e-2 * depth)
    found = again(paper, context)
    for name in ("near-minimum", "beats-plain", "beats-shortcuts", "xavier-degrades", "two-keeps"):
        # At equal losses the enclosure of a ratio goes a little beyond 1.
        expected = "not decided" if name == "two-keeps" else "holds"
        assert found[f"loss.{name}"].value == expected, name
    assert found["loss.beats-plain"].num_runs == 3 * 3 * 4
    other = with_final_losses(measured, lambda net, depth: 1.0 if net == TWO else 1e-2 / depth)
    found = again(other, context)
    for name in ("near-minimum", "beats-plain", "beats-shortcuts", "xavier-degrades"):
        assert found[f"loss.{name}"].value == "fails", name
    diverged = with_final_losses(measured, lambda net, depth: math.inf if net == TWO else 1.0)
    found = again(diverged, context)
    assert found["loss.near-minimum"].value == "fails"
    assert found["loss.beats-plain"].value == "fails"
    assert found["rate.keeps"].value == "not decided"


def test_nets_that_do_not_diverge_turn_the_claim_that_they_do(measured, context):
    tame = copy.deepcopy(measured)
    for _, result in parts(tame, "sweep", net=TWO_XAVIER, L=24):
        result["losses"] = np.ones_like(np.asarray(result["losses"], dtype=float)).tolist()
    assert again(tame, context)["loss.full-xavier"].value == "fails"


def with_paths(measured, context, kappas, indices, *, until=0):
    """The same run with four paths of power laws for each net, without so many of the levels."""
    changed = []
    levels = context["levels"][: len(context["levels"]) - until]
    for cell, result in measured:
        if cell["part"] == "path" and cell["L"] == 6 and cell["net"] in kappas:
            if cell["first"] > 0:
                continue
            kappa, index = kappas[cell["net"]], indices[cell["net"]]
            records = [
                {
                    "step": step, "loss": level,
                    "kappa10": {"value": kappa * (1 + 0.1 * seed) / level**2, "low": 1.0},
                    "index": {"value": (0.5 if step == 0 else index) - 0.001 * seed},
                }
                for seed in range(4)
                for step, level in enumerate(levels)
            ]  # fmt: skip
            count = len(levels)
            paths = [
                {"records": records[seed * count : (seed + 1) * count], "peak": 1}
                for seed in range(4)
            ]
            changed.append((cell, {"paths": paths}))
        else:
            changed.append((cell, result))
    return changed


def test_spectra_decide(measured, context):
    low, high = {TWO: 1.0, ORTHOGONAL: 100.0}, {TWO: 100.0, ORTHOGONAL: 1.0}
    below, above = {TWO: 0.4, ORTHOGONAL: 0.49}, {TWO: 0.49, ORTHOGONAL: 0.4}
    found = again(with_paths(measured, context, low, below), context)
    assert found["path.smaller"].value == "holds"
    assert found["path.smaller"].note == "below at every level that all reach"
    assert found["path.smaller"].num_runs == 8
    assert found["path.smaller-early"].value == "holds"
    assert found["path.larger-late"].value == "fails"
    assert found["path.same-end"].value == "fails"
    assert found["path.same-end"].measured == pytest.approx(-2, abs=0.2)
    assert found["path.diverges"].value == "holds"
    assert found["path.peak"].value == "not decided" or found["path.peak"].measured < 1
    found = again(with_paths(measured, context, high, above), context)
    for name in ("smaller", "smaller-early", "index-below"):
        assert found[f"path.{name}"].value == "fails", name
    assert found["path.larger-late"].value == "holds"
    assert "mean above from" in found["path.smaller"].note


def test_levels_that_are_not_reached_leave_a_claim_open(measured, context):
    low, below = {TWO: 1.0, ORTHOGONAL: 100.0}, {TWO: 0.4, ORTHOGONAL: 0.49}
    for until in (1, 4):
        found = again(with_paths(measured, context, low, below, until=until), context)
        assert found["path.smaller"].value == "not decided"
        assert "reached by 0 of 8" in found["path.smaller"].note
        assert found["path.same-end"].value == "not decided"


def test_optima_at_the_edge_of_the_grid_are_said(measured, context):
    edge = copy.deepcopy(measured)
    for _, result in parts(edge, "sweep", net=ORTHOGONAL, L=12):
        losses = np.ones_like(np.asarray(result["losses"], dtype=float))
        losses[-1] = 1e-3
        result["losses"] = losses.tolist()
    note = again(edge, context)["rate.larger"].note
    assert f"at the edge of the grid: {ORTHOGONAL} L=12 (highest)" in note


def sweep_of(losses):
    losses = np.asarray(losses, dtype=float)
    rates = learning_rates(-1, 1, 1)
    return Sweep("net", 6, rates, losses, np.ones_like(losses), np.ones_like(losses))


def test_one_diverged_seed_discards_a_learning_rate():
    sweep = sweep_of([[1.0, 1.2], [0.5, 0.6], [0.1, math.inf]])
    assert (sweep.rate, sweep.edge, sweep.largest_finite) == (1.0, "", 1.0)
    assert sweep.final.tolist() == [0.5, 0.6]
    assert sweep_of([[1.0, 1.2], [1.5, 1.6], [2.0, 2.0]]).edge == "lowest"
    assert sweep_of([[3.0, 3.2], [1.5, 1.6], [1.0, 1.0]]).edge == "highest"
    gone = sweep_of([[math.inf, 1.0]] * 3)
    assert not gone.trains
    assert math.isnan(gone.rate)
    assert gone.edge == ""
    assert math.isnan(gone.largest_finite)


def test_seeds_of_several_cells_are_put_together(measured):
    relu = sweeps(measured, "relu")[TWO, 6]
    assert relu.losses.shape == (3, 2)
    first, second = parts(measured, "relu", net=TWO, L=6)
    assert relu.losses[:, 1].tolist() == [row[0] for row in second[1]["losses"]]
    assert (first[0]["first"], second[0]["first"]) == (0, 1)


def test_learning_rates_are_those_of_the_paper_file():
    rates = learning_rates(-4, 1, 4)
    assert len(rates) == 21
    assert rates[1:] / rates[:-1] == pytest.approx([10**0.25] * 20)
    assert (rates[0], rates[-1]) == pytest.approx((1e-4, 10))


def test_the_presets_are_those_of_the_paper_file():
    for sizes in PRESETS.values():
        assert sizes.depths == reference.DEPTHS
        assert sizes.num_steps == 1000
        assert sizes.rates == (-4, 1, 4)
        assert sizes.path_depths == (12, 16)
    assert PRESETS["paper"].seeds == 10
    cells = shortcut_training.cells(PRESETS["quick"], 10)
    for cell in cells:
        if cell["part"] == "sweep":
            assert cell["seeds"] == 10
    followed = [c for c in cells if c["part"] == "path" and c["net"] == TWO and c["L"] == 12]
    assert [(c["first"], c["seeds"]) for c in followed] == [(0, 4), (4, 4), (8, 2)]


def test_the_earlier_replication_stands_beside_what_was_measured(decided, options):
    for depths, table in reference.tables().values():
        for net, values in table.items():
            assert net in SHORTCUT_KINDS
            assert len(values) == len(depths)
    frame = pd.read_csv(options.out / "comparison.csv")
    assert set(frame.quantity) == {*reference.tables(), "κ₁₀ along training"}
    best = pd.read_csv(options.out / "best.csv")
    for quantity, kind, column, net, depth, earlier in (
        ("final loss above the least one", "linear", "loss", THREE, 12, 1.1e-3),
        ("best learning rate", "linear", "learning_rate", XAVIER, 24, 0.010),
        ("mean Frobenius norm", "linear", "norm", ONE, 6, 1.35),
        ("final loss, ReLU in the middle", "ReLU in the middle", "loss", XAVIER, 12, 0.182),
    ):
        where = (frame.quantity == quantity) & (frame.net == net) & (depth == frame.L)
        (row,) = frame[where].itertuples()
        assert row.earlier_on_mnist == earlier
        here = best[(best.kind == kind) & (best.net == net) & (depth == best.L)]
        assert row.measured == pytest.approx(here[column].iloc[0])
    assert set(tables.KINDS) == {"sweep", "relu"}


def test_a_single_seed_decides_nothing_that_needs_a_spread(tmp_path, monkeypatch):
    small = dataclasses.replace(
        TINY, depths=(6, 12, 24), path_depths=(6,), relu_depths=(6, 12), num_steps=10, path_steps=80
    )
    monkeypatch.setitem(shortcut_training.PRESETS, "quick", small)
    monkeypatch.setattr("experiments.shortcut_training.figures.draw", lambda *_: None)
    options = registry.options_for(
        shortcut_training, device="cpu", out=tmp_path, seeds=1, progress=False
    )
    found = {v.claim.id: v.value for v in registry.run(shortcut_training, options)}
    for name in ("loss.near-minimum", "norm.falls", "path.smaller", "relu.best", "start.linear"):
        assert found[name] == "not decided", name


def test_other_data_of_another_width_are_taken(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    images = rng.normal(size=(200, 6, 6)) + labels[:, None, None] * np.eye(6)
    np.savez(tmp_path / "small.npz", x=images, y=labels)
    small = dataclasses.replace(TINY, num_steps=20, path_depths=(6,), start_depths=(2, 4))
    monkeypatch.setitem(shortcut_training.PRESETS, "quick", small)
    options = registry.options_for(
        shortcut_training, data_name=str(tmp_path / "small.npz"), device="cpu", seeds=1,
        out=tmp_path / "out", progress=False,
    )  # fmt: skip
    found = {v.claim.id: v for v in registry.run(shortcut_training, options)}
    assert found["check.descent"].value == "holds"
    assert found["start.flat"].value == "holds"
    # The figures of a single seed are drawn as well.
    assert (tmp_path / "out" / "final_loss.png").read_bytes()[:4] == b"\x89PNG"


SMALLEST = dataclasses.replace(
    TINY, depths=(6, 12), num_steps=20, start_depths=(2, 4), path_depths=(6,), path_steps=100
)


def test_a_run_that_is_killed_twice_ends_with_the_same_files(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_small("shortcut_training", SMALLEST, whole, monkeypatch) == 0
    total = len(shortcut_training.cells(SMALLEST, 2))
    for share in (0.3, 0.7):
        kill_small("shortcut_training", "test_shortcut_training", killed, share * total, pause=0.01)
    assert not (killed / "verdicts.json").exists()
    assert run_small("shortcut_training", SMALLEST, killed, monkeypatch) == 0
    for name in ("best.csv", "learning_rates.csv", "curves.csv", "spectra.csv", "verdicts.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
