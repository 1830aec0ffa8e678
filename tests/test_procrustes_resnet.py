"""The Procrustes experiment, small: its verdicts, its files, and that they can be bad."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import procrustes_resnet, registry
from experiments.data import Dataset
from experiments.procrustes_resnet import Sizes, nets, operators, statements, verdicts
from experiments.procrustes_resnet.laboratory import Laboratory
from experiments.sweep import RunInterrupted, parts

TINY = Sizes(
    summary="for tests",
    seeds=2,
    initial=(1,),
    initial_batches=1,
    initial_batch=8,
    initial_size=8,
    trained=(1,),
    deep=(),
    size=8,
    batch=32,
    epochs=0.3,
    every=1,
    evaluations=2,
    augment=False,
    precision="float32",
    train_seeds=2,
    deep_seeds=1,
    operator_seeds=1,
)


def small_options(out, **options):
    return registry.options_for(procrustes_resnet, device="cpu", out=out, progress=False, **options)


@pytest.fixture(scope="module")
def tiny():
    """The quick preset made small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(procrustes_resnet.PRESETS, "quick", TINY)
        yield


@pytest.fixture(scope="module")
def options(tiny, tmp_path_factory):
    """Options of a small run, in a folder of its own."""
    return small_options(tmp_path_factory.mktemp("procrustes_resnet"))


@pytest.fixture(scope="module")
def decided(options):
    """The verdicts of that run, by the claims' ids."""
    return {verdict.claim.id: verdict for verdict in registry.run(procrustes_resnet, options)}


@pytest.fixture(scope="module")
def measured(decided, options):
    """What that run measured."""
    cells = procrustes_resnet.cells(TINY, options.seeds)
    with dataclasses.replace(options, mode="resume").open_store() as store:
        return [(cell, store[cell]) for cell in cells]


def test_what_is_exact_holds_at_any_size(decided):
    checks = [c.id for c in procrustes_resnet.claims() if c.statement.startswith(statements.CHECK)]
    assert checks == [
        "layer.1x1", "layer.one-matrix", "layer.rank", "layer.2x2", "layer.stem",
        "layer.stem-zeros", "layer.gain", "init.2x2", "init.parameters", "train.2x2",
        "train.spectrum",
    ]  # fmt: skip
    for name in checks:
        assert decided[name].value == "holds", name


def test_single_draws_decide_nothing(decided):
    for name in ("layer.stem-paper", "layer.stride", "layer.stride-aware", "layer.stride-zeros"):
        assert decided[name].value == "not decided", name


def test_nets_at_chance_decide_nothing_about_training(measured):
    stuck = copy.deepcopy(measured)
    for _, result in parts(stuck, "train"):
        result["loss"] = result["chance"]
    for verdict in verdicts.decide_claims(stuck):
        name = verdict.claim.id
        if name.startswith("error.") or name in ("train.1x1", "train.speed", "train.flat-init"):
            assert verdict.value == "not decided", name
            assert "did not train" in verdict.note


def test_tables_figures_and_verdicts_are_written(decided, options):
    for name in ("ratios_in_training", "singular_values", "test_error"):
        assert (options.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    layers = pd.read_csv(options.out / "layers.csv")
    assert set(layers.operator) == {"circular", "true"}
    flat = layers[(layers.layer == "1×1, stride 2") & (layers.method == "ours ×1")]
    assert flat.sigma_max.to_numpy() == pytest.approx(math.sqrt(2))
    assert (flat["rank"] * 2 == flat.outputs).all()
    trainings = pd.read_csv(options.out / "trainings.csv")
    steps = trainings.num_steps.iloc[0]
    projections = trainings.set_index(["net", "seed"]).projections
    assert projections[nets.OURS].eq(steps + 1).all()
    assert projections[nets.PAPER].between(1, steps).all()
    assert projections[nets.PAPER_FREE].eq(0).all()
    content = json.loads((options.out / "verdicts.json").read_text(encoding="utf-8"))
    assert [claim["id"] for claim in content["claims"]] == list(decided)


def test_a_run_that_is_stopped_and_continued_ends_alike(decided, options, tmp_path):
    calls = 0
    original = Laboratory.measure

    def stopping(self, cell):
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return original(self, cell)

    again = small_options(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Laboratory, "measure", stopping)
        with pytest.raises(RunInterrupted):
            procrustes_resnet.run(again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.procrustes_resnet.figures.draw", lambda *_: None)
        registry.run(procrustes_resnet, again)
    for name in ("layers", "ratios", "trainings", "evaluations"):
        first, second = (
            (folder / f"{name}.csv").read_bytes() for folder in (options.out, tmp_path)
        )
        assert first == second, name


@pytest.mark.parametrize(
    ("claim", "part", "change"),
    [
        ("layer.1x1", "full size", lambda r: r.update(smallest=1.3)),
        ("layer.one-matrix", "full size", lambda r: r.update(gap=1e-3)),
        ("layer.rank", "operator", lambda r: r["true"].update(rank=r["true"]["rows"])),
        ("layer.2x2", "operator", lambda r: r["true"]["smallest"].update(value=0.99)),
        ("layer.stem", "operator", lambda r: r["circular"]["largest"].update(value=4.7)),
        ("layer.stem-zeros", "operator", lambda r: r["true"]["smallest"].update(value=4.0)),
        ("layer.gain", "operator", lambda r: r.update(energy=2 * r["energy"])),
        ("init.2x2", "init", lambda r: r["downsampling"].update(max=0.01)),
        ("init.parameters", "init", lambda r: r.update(num_parameters=1)),
        ("train.2x2", "train", lambda r: r.update(downsampling_ratios=[[1.1, 1.0]])),
        ("train.spectrum", "train", lambda r: r["projected"][0].update(now=[0.1, 9.0])),
    ],
)
def test_a_claim_fails_on_what_contradicts_it(measured, claim, part, change):
    broken = copy.deepcopy(measured)
    touched = [result for cell, result in broken if cell["part"] == part]
    if claim == "init.parameters":
        touched = [r for c, r in broken if c["part"] == part and c["net"] == nets.OURS]
    for result in touched:
        if result.get("projected") != []:
            change(result)
    found = {verdict.claim.id: verdict for verdict in verdicts.decide_claims(broken)}
    assert found[claim].value == "fails"


def learnt(measured, **changes):
    """The same cells as if all nets had learnt, with given results for some nets."""
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, "train"):
        result["loss"] = 0.01
        for net, values in changes.items():
            if cell["net"] == getattr(nets, net):
                result.update(values)
        for what in ("final_error", "best_error"):
            result[what] += 0.001 * cell["seed"]
    return {verdict.claim.id: verdict for verdict in verdicts.decide_claims(changed)}


def errors(value):
    return {"final_error": value, "best_error": value}


def test_errors_are_compared_seed_by_seed(measured):
    found = learnt(measured, PAPER=errors(0.01), RESNET=errors(0.05), PAPER_FREE=errors(0.2))
    better = found["error.better-he"]
    assert (better.value, better.measured) == ("holds", pytest.approx(-0.04))
    # An image more or less of the 359 that are held out.
    assert better.high == pytest.approx(-0.04 + 1 / 359)
    assert found["error.best-he"].value == found["error.better-free"].value == "holds"
    found = learnt(measured, PAPER=errors(0.05), RESNET=errors(0.01), PAPER_FREE=errors(0.046))
    assert found["error.final-he"].value == found["error.better-he"].value == "fails"
    # Two images are within the margin of "no worse", and not better.
    margin = math.sqrt(0.0465 * (1 - 0.0465) / 359)
    assert found["error.best-free"].expected == pytest.approx(margin)
    assert found["error.best-free"].value == "holds"
    assert found["error.better-free"].value == "fails"


def test_equal_nets_are_neither_better_nor_faster(measured):
    same = {**errors(0.0275), "mean_loss": 0.5}
    found = learnt(measured, PAPER=same, RESNET=same, PAPER_FREE=same, OURS=same, OURS_FREE=same)
    for name in ("error.better-he", "error.better-free", "error.better-2x2-free"):
        assert found[name].value == "not decided", name
    assert found["train.speed"].value == found["train.speed-free"].value != "holds"


def test_a_training_that_diverged_counts_as_worst(measured):
    gone = {
        "status": "diverged", "final_error": math.inf, "best_error": math.inf, "windows": [],
        "downsampling_ratios": np.zeros((0, 2)), "projected": [],
    }  # fmt: skip
    found = learnt(measured, PAPER=gone, OURS=gone, RESNET=errors(0.05))
    assert found["error.final-he"].value == "fails"
    assert found["error.final-he"].measured == pytest.approx(0.85, abs=0.01)
    for name in ("train.1x1", "train.speed", "train.2x2", "train.spectrum"):
        assert found[name].value != "holds", name
    # Against a net that diverged nothing is shown.
    found = learnt(measured, RESNET=gone)
    assert found["error.final-he"].value == found["error.better-he"].value == "not decided"
    assert "did not train" in found["error.final-he"].note
    found = learnt(measured, PAPER_FREE=gone)
    assert found["train.flat-init"].value == "not decided"


# -- pieces -------------------------------------------------------------------------------------


def dataset(count=50, test=None):
    rng = np.random.default_rng(0)
    images = rng.random((count, 6, 6, 3))
    labels = rng.integers(0, 3, count)
    more = {} if test is None else {"test_images": rng.random((test, 6, 6, 3)) + 5.0,
                                    "test_labels": rng.integers(0, 3, test)}  # fmt: skip
    return Dataset("small", images, labels, 3, "0" * 64, **more)


def test_a_fifth_is_held_out_where_the_data_define_no_test_samples(tmp_path):
    data = dataset()
    images, labels, test, test_labels = Laboratory(data, TINY, "cpu", tmp_path).split
    assert (len(images), len(test)) == (40, 10) == (len(labels), len(test_labels))
    assert images.mean((0, 2, 3)).abs().max() < 1e-6
    assert images.square().mean((0, 2, 3)) == pytest.approx(1.0, abs=1e-5)
    pixels = torch.cat([images, test]).flatten(1)
    assert len(pixels.unique(dim=0)) == 50
    again = Laboratory(data, TINY, "cpu", tmp_path).split
    assert torch.equal(again[2], test)


def test_test_samples_are_standardised_by_those_to_train_on(tmp_path):
    images, _, test, _ = Laboratory(dataset(test=20), TINY, "cpu", tmp_path).split
    assert (len(images), len(test)) == (50, 20)
    assert images.mean((0, 2, 3)).abs().max() < 1e-6
    assert (test.mean((0, 2, 3)) > 10).all()


def test_nets_of_one_seed_share_their_draws(tmp_path):
    laboratory = Laboratory(dataset(), TINY, "cpu", tmp_path)
    one, other = (
        laboratory.net({"net": net, "n": 1, "seed": 0}) for net in (nets.PAPER, nets.PAPER_FREE)
    )
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    third = laboratory.net({"net": nets.PAPER, "n": 1, "seed": 1})
    assert not torch.equal(one.stem[0].weight, third.stem[0].weight)


def test_the_papers_route_is_one_polar_factor_for_each_frequency():
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False).double()
    before = layer.weight.detach().clone()
    operators.paper_(layer, 5, 1)
    expected = torch.zeros(8, 3, 5, 5, dtype=torch.complex128)
    for u in range(5):
        for v in range(5):
            taps = torch.arange(3, dtype=torch.float64)
            waves = torch.exp(-2j * math.pi * (u * taps[:, None] + v * taps) / 5)
            symbol = (before * waves).sum((2, 3))
            left, _, right = torch.linalg.svd(symbol, full_matrices=False)
            for a in range(5):
                for b in range(5):
                    phase = 2j * math.pi * (u * a + v * b) / 5
                    expected[:, :, a, b] += (left @ right) * complex(np.exp(phase)) / 25
    expected = math.sqrt(8 / 3) * expected[:, :, :3, :3]
    assert expected.imag.abs().max() < 1e-12
    assert torch.allclose(layer.weight.detach(), expected.real, atol=1e-12)


def test_reshaping_keeps_the_gain_of_a_random_gradient():
    layer = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False).double()
    operators.reshape_(layer)
    assert float(layer.weight.detach().square().sum()) == pytest.approx(32)
    values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    assert float(values.max()) == pytest.approx(float(values.min()))
