"""The norm-preservation experiment, small: its verdicts, its files, and that they can be bad."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import norm_preservation, pictures, registry
from experiments import ratios as ratios_of_blocks
from experiments.data import load
from experiments.errors import DataFormatError
from experiments.norm_preservation import Sizes, laboratory, readings, statements, verdicts
from experiments.norm_preservation.laboratory import Laboratory
from experiments.sweep import RunInterrupted

TINY = Sizes(
    summary="for tests",
    seeds=2,
    linear=(2, 16, 32),
    mlp=(2, 4, 8),
    wide=(4, 8),
    trained=(2, 4, 8),
    mlp_steps=24,
    mlp_every=6,
    mlp_lr=0.02,
    num_batches=1,
    conv=(2,),
    conv_trained=(2,),
    conv_size=8,
    conv_batch=8,
    num_conv_batches=1,
    train_size=8,
    train_batch=16,
    conv_every=1,
    conv_steps=10,
    conv_epochs=0,
    some_seeds=2,
    train_seeds=1,
    jacobian_seeds=1,
    max_matvecs=20,
)


def colours(path, count=100):
    """A small data set of colour images, channels last."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 4
    images = rng.integers(0, 200, size=(count, 6, 6, 3)) + 10 * labels[:, None, None, None]
    np.savez(path, x=images.astype(np.uint8), y=labels)
    return str(path)


def small_options(out, **options):
    return registry.options_for(norm_preservation, device="cpu", out=out, progress=False, **options)


@pytest.fixture(scope="module")
def tiny():
    """The quick preset made small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(norm_preservation.PRESETS, "quick", TINY)
        yield


@pytest.fixture(scope="module")
def options(tiny, tmp_path_factory):
    """Options of a small run, in a folder of its own."""
    return small_options(tmp_path_factory.mktemp("norm_preservation"))


@pytest.fixture(scope="module")
def decided(options):
    """The verdicts of that run, by the claims' ids."""
    return {verdict.claim.id: verdict for verdict in registry.run(norm_preservation, options)}


def stored(options):
    """What that run measured."""
    cells = norm_preservation.cells(TINY, options.seeds)
    again = dataclasses.replace(options, mode="resume")
    with again.open_store() as store:
        return [(cell, store[cell]) for cell in cells]


def test_what_is_exact_holds_at_any_size(decided):
    checks = [c.id for c in norm_preservation.claims() if c.statement.startswith(statements.CHECK)]
    assert checks == [
        "t0.ratio", "t0.skip", "t0.bound", "t1.remainder", "t1.ratio", "t1.product",
        "conv.isometric",
    ]  # fmt: skip
    for name in checks:
        assert decided[name].value == "holds", name


def test_what_needs_depth_is_not_decided_by_a_shallow_sweep(decided):
    for name in (
        "conv.rate", "conv.constant", "conv.proc-closer", "conv.outliers", "conv.downsamplings",
        "conv.downsamplings-farthest", "conv.first", "conv.animation",
    ):  # fmt: skip
        assert decided[name].value == "not decided", name


def test_the_largest_deviation_does_not_follow_the_rate_of_the_mean(decided):
    assert abs(decided["init.max"].measured) < 0.3
    assert decided["init.rate"].measured > 0.6


def test_tables_figures_and_verdicts_are_written(decided, options):
    for name in ("mean_deviation", "ratios_in_training", "products", "jacobians"):
        assert (options.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    frame = pd.read_csv(options.out / "deviations.csv")
    law = frame[(frame.part == "mlp init") & (frame.net == "skip, BN")]
    assert (law.predicted_mean / law["mean"]).between(0.5, 2).all()
    assert set(frame.moment) == {"initial", "training"}
    ratios = pd.read_csv(options.out / "ratios.csv")
    conv = ratios[(ratios.part == "conv train") & (ratios.net == "ProcResNet")]
    assert list(conv.block[:4]) == ["stage1.0", "stage1.1", "down1", "stage2.0"]
    assert set(conv[conv.transition].block) == {"down1", "down2"}
    assert sorted(set(conv.last_step)) == [0, 1, 2, 5, 9]
    jacobians = pd.read_csv(options.out / "jacobians.csv")
    assert (jacobians.ratio_low <= jacobians.ratio).all()
    assert (jacobians.ratio <= jacobians.ratio_high).all()
    assert set(pd.read_csv(options.out / "trainings.csv").status) == {"finished"}
    written = json.loads((options.out / "verdicts.json").read_text())
    assert [c["id"] for c in written["claims"]] == [c.id for c in norm_preservation.claims()]
    assert not (options.out / "checkpoints").exists()


def test_results_that_contradict_the_claims_fail(decided, options):
    measured = copy.deepcopy(stored(options))
    for cell, result in measured:
        if cell["part"] == "jacobian":
            result["blocks"][0]["ratio"] *= 100
        if cell["part"] == "linear":
            result["delta"] *= 2
        if cell["part"] == "mlp init":
            result["mean"] = 1 / cell["L"] ** 2
            result["log_product"] = 3.0 * cell["L"]
        if cell["part"] == "mlp train":
            result["loss"] = result["chance"] * (cell["net"] != "plain, BN")
        if cell["part"] == "conv init":
            result["transition"]["ratios"] = [2.0] * len(result["transitions"])
    wrong = {v.claim.id: v for v in verdicts.decide_claims(measured)}
    for name in (
        "t0.ratio", "t0.bound", "t1.remainder", "init.law", "init.rate",
        "init.product", "init.product-bound", "skip.flat", "plain.flat", "train.skip",
        "train.plain", "conv.proc-transitions", "conv.isometric",
    ):  # fmt: skip
        assert wrong[name].value == "fails", name
    assert wrong["t1.product"].value == "holds"  # its numbers were not changed
    for name in ("rate", "at-least", "constant", "max", "product", "scaled"):
        verdict = wrong[f"train.{name}"]
        assert verdict.value == "not decided"
        assert "did not train" in verdict.note


def test_claims_about_training_ask_whether_the_nets_they_are_about_have_trained(decided, options):
    measured = copy.deepcopy(stored(options))
    for cell, result in measured:
        if cell["part"] == "mlp train":
            result["loss"] = result["chance"] * (0.1 if cell["net"] == "skip, BN" else 0.6)
    found = {v.claim.id: v for v in verdicts.decide_claims(measured)}
    for name in ("rate", "at-least", "constant", "max", "product"):
        assert "did not train" not in found[f"train.{name}"].note
    assert found["train.product"].measured > 0
    assert "did not train: net=skip, scaled" in found["train.scaled"].note


def as_if_deep(measured, **ratios):
    """The convolutional cells with n = 18 and a second seed; mean deviations as given by net."""
    found = []
    for cell, result in measured:
        if cell["part"] == "conv init" and cell["net"] in ratios:
            first, down, identity, largest = ratios[cell["net"]]
            changed = copy.deepcopy(result)
            changed["first_block"]["mean"] = first
            changed["downsampling"]["mean"] = down
            changed["transition"]["mean"] = (first + 2 * down) / 3
            changed["identity"] |= {"mean": identity, "max": largest}
            found += [({**cell, "n": 18, "seed": seed}, changed) for seed in (0, 1)]
    return found


def test_the_first_block_does_not_decide_about_the_downsamplings(decided, options):
    nets = {"ResNet": (2.0, 0.3, 0.2, 0.6), "ProcResNet": (4.8, 0.01, 0.1, 4.8)}
    deep = as_if_deep(stored(options), **nets)
    found = {v.claim.id: v for v in verdicts.decide_claims(deep)}
    assert found["conv.outliers"].value == "holds"
    assert found["conv.downsamplings"].value == "fails"
    assert found["conv.downsamplings"].measured == pytest.approx(1.5)
    assert found["conv.downsamplings-farthest"].value == "fails"
    assert found["conv.downsamplings-farthest"].measured == pytest.approx(0.5)
    assert found["conv.first"].value == "fails"
    assert found["conv.first"].measured == pytest.approx(2.4)
    assert "rests on the first block" in found["conv.outliers"].note


def test_repair_compares_downsamplings_with_downsamplings(decided, options):
    measured = copy.deepcopy(stored(options))
    for cell, result in measured:
        if cell["part"] == "conv train":
            result["training"]["downsampling"]["mean"] = 0.2
            result["training"]["transition"]["mean"] = 1.0 if cell["net"] == "ResNet" else 0.2
    found = {v.claim.id: v for v in verdicts.decide_claims(measured)}
    assert found["conv.train-repair"].measured == pytest.approx(1.0)


def test_a_training_at_chance_decides_nothing_about_convolutional_nets(decided, options):
    measured = copy.deepcopy(stored(options))
    for cell, result in measured:
        if cell["part"] == "conv train":
            result["loss"] = 0.95 * result["chance"]
    found = {v.claim.id: v for v in verdicts.decide_claims(measured)}
    for name in ("outliers", "downsamplings", "repair", "identity"):
        assert found[f"conv.train-{name}"].value == "not decided"
        assert "did not train" in found[f"conv.train-{name}"].note


def test_titles_are_the_verdicts(decided):
    from experiments.report import Titles

    titles = Titles(list(decided.values()))
    assert titles(("t0.ratio", "a"), ("conv.outliers", "b")) == "a: holds\nb: not decided"
    other = dataclasses.replace(decided["t0.ratio"], value="fails")
    assert Titles([other])(("t0.ratio", "a")) == "a: fails"


def test_spreads_are_not_given_for_one_seed(decided, options):
    from experiments.norm_preservation.figures import _bars

    cells = [(cell, {}) for cell in norm_preservation.cells(TINY, 2)]
    one = [pair for pair in cells if pair[0]["seed"] == 0]
    assert _bars(("a", one), ("b", one)) == "one seed"
    assert _bars(("a", cells), ("b", cells)) == "bars: range over 2 seeds"
    assert _bars(("a", cells), ("b", one)) == "bars: range over seeds (2 a, 1 b)"
    first = [(c, r) for c, r in stored(options) if c["seed"] == 0]
    note = {v.claim.id: v.note for v in verdicts.decide_claims(first)}["init.rate"]
    assert "one seed" in note
    assert "±" not in note
    assert "±" in decided["init.rate"].note


def test_a_number_of_seeds_that_is_asked_for_is_used_for_every_cell():
    def seeds(number):
        found = {}
        for cell in norm_preservation.cells(TINY, number):
            found.setdefault(cell["part"], set()).add(cell["seed"])
        return {part: len(some) for part, some in found.items()}

    assert seeds(TINY.seeds)["jacobian"] == 1
    assert seeds(TINY.seeds)["mlp init"] == 2
    assert set(seeds(3).values()) == {3}
    assert set(seeds(1).values()) == {1}


def test_a_diverged_training_is_a_result_and_counts_against_the_claim(decided, options):
    measured = copy.deepcopy(stored(options))
    for cell, result in measured:
        if cell["part"] == "mlp train" and cell["L"] == 8:
            result["status"] = "diverged"
    found = {v.claim.id: v for v in verdicts.decide_claims(measured)}
    assert found["train.skip"].value == "fails"
    assert math.isinf(found["train.skip"].measured)
    assert found["train.plain"].value == "holds"
    assert "diverged at L = 8" in found["train.plain"].note


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_exponent_of_a_power_of_the_rate_is_found(exponent):
    curve = {d: 3 * (math.log(2 * d) / d) ** exponent for d in (4, 8, 16)}
    assert readings.rate_exponent(curve) == pytest.approx(exponent, abs=1e-12)


def test_values_without_a_logarithm_have_no_exponent():
    assert math.isnan(readings.rate_exponent({4: 0.0, 8: 1.0}))
    assert math.isnan(readings.rate_exponent({4: 1.0}))


def test_windows_cover_the_training_once():
    for steps in (1, 2, 3, 10, 50, 997):
        windows = ratios_of_blocks.windows_of(steps)
        assert windows[0] == (0, 0)
        covered = [step for first, last in windows for step in range(first, last + 1)]
        assert covered == list(range(steps))


def test_ratios_are_summed_up_step_by_step():
    ratios = np.array([[2.0, 1.0], [0.5, 1.0]])
    found = ratios_of_blocks.summary(ratios)
    assert found["mean"] == pytest.approx(0.375)
    assert found["max"] == pytest.approx(0.75)
    assert found["log_product"] == pytest.approx(0.0)
    frame = pd.DataFrame(ratios, columns=["a", "b"])
    split = ratios_of_blocks.split_summary(frame, ["a"])
    assert split["identity"]["mean"] == 0.0
    assert split["transition"]["mean"] == pytest.approx(0.75)
    assert split["first_block"] == split["transition"]
    assert "downsampling" not in split
    assert ratios_of_blocks.split_summary(frame, ["b"])["downsampling"]["mean"] == 0.0


def test_the_constants_of_the_claims_are_those_of_the_theory():
    from conditioning import theory

    deep = theory.initial_ratios(100_000)
    assert float((deep[-1] - 1) * 100_000) == pytest.approx(statements.CONSTANT, rel=1e-3)
    plain = theory.initial_ratios(3, skip=False)
    assert float(plain[-1]) == pytest.approx(statements.ALPHA)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 6), (5, 1, 8, 6)),
        ((5, 3, 8, 6), (5, 3, 8, 6)),
        ((5, 8, 6, 3), (5, 3, 8, 6)),
        ((5, 49), (5, 1, 7, 7)),
    ],
)
def test_images_come_in_many_shapes(shape, expected):
    images = np.arange(math.prod(shape), dtype=float).reshape(shape)
    found = pictures.as_pictures(images, "images")
    assert found.shape == expected
    if shape[-1] == 3:
        assert found[2, 1, 4, 5] == images[2, 4, 5, 1]


@pytest.mark.parametrize("shape", [(5, 50), (5, 2, 3, 4, 5)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(DataFormatError, match="samples, "):
        pictures.as_pictures(np.zeros(shape), "these")


def test_constant_entries_are_not_blown_up():
    found = pictures.standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), dims=(0,))
    assert found.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_on_a_gpu_convolutions_are_deterministic_and_not_switched_off(tmp_path):
    bench = Laboratory(load("digits"), TINY, "cpu", tmp_path)
    flags = torch.backends.cudnn
    bench._kinds["look"] = lambda _: (flags.enabled, flags.deterministic, flags.allow_tf32)
    before = flags.enabled, flags.deterministic, flags.allow_tf32
    assert bench.measure({"part": "look"}) == (True, True, False)
    assert (flags.enabled, flags.deterministic, flags.allow_tf32) == before


def test_an_unscaled_net_that_diverges_leaves_a_result(tmp_path):
    wild = dataclasses.replace(TINY, mlp_lr=50.0)
    bench = Laboratory(load("digits"), wild, "cpu", tmp_path)
    found = bench.measure({"part": "mlp train", "net": "skip", "L": 8, "seed": 0})
    assert found["status"] == "diverged"
    assert found["num_steps"] < TINY.mlp_steps
    assert found["initial"]["mean"] > 0


def test_an_interrupted_run_ends_with_the_same_files(tmp_path, monkeypatch):
    smaller = dataclasses.replace(TINY, linear=(16, 32), mlp=(2, 4), trained=(4,))
    monkeypatch.setitem(norm_preservation.PRESETS, "quick", smaller)
    monkeypatch.setattr(norm_preservation, "_JACOBIANS", (("skip, BN", "L", 2),))
    path = colours(tmp_path / "colours.npz")
    whole = small_options(tmp_path / "whole", data_name=path, seeds=1)
    registry.run(norm_preservation, whole)
    cut = small_options(tmp_path / "cut", data_name=path, seeds=1)
    run_cell, run_step = Laboratory.measure, laboratory.Trainer._step
    done = []

    def step_until_after_an_epoch(trainer):
        run_step(trainer)
        if trainer.num_steps == 8:  # an epoch has 6
            raise KeyboardInterrupt

    def measure(bench, cell):
        if cell["part"] == "conv train":
            monkeypatch.setattr(laboratory.Trainer, "_step", step_until_after_an_epoch)
        found = run_cell(bench, cell)
        done.append(cell)
        return found

    monkeypatch.setattr(Laboratory, "measure", measure)
    with pytest.raises(RunInterrupted):
        registry.run(norm_preservation, cut)
    assert len(done) == len(norm_preservation.cells(smaller, 1)) - 2
    assert len(list((cut.out / "checkpoints").iterdir())) == 1
    steps = []

    def counted(trainer):
        steps.append(trainer.num_steps)
        run_step(trainer)

    monkeypatch.setattr(laboratory.Trainer, "_step", counted)
    monkeypatch.setattr(Laboratory, "measure", run_cell)
    registry.run(norm_preservation, cut)
    assert steps[0] == 6  # the interrupted training went on from its checkpoint
    names = sorted(p.name for p in whole.out.iterdir() if p.suffix != ".jsonl")
    assert names == sorted(p.name for p in cut.out.iterdir() if p.suffix != ".jsonl")
    for name in names:
        assert (whole.out / name).read_bytes() == (cut.out / name).read_bytes(), name
