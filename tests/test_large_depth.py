"""The large-depth experiment, small: verdicts, files, resuming, and that it can be bad."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from killed import kill_small, run_small

from conditioning import theory
from experiments import large_depth, registry
from experiments.data import load
from experiments.errors import DataFormatError, ExperimentError
from experiments.large_depth import Sizes, reference, statements, tables
from experiments.large_depth.laboratory import Laboratory

PRESETS = dict(large_depth.PRESETS)
ROOT = Path(__file__).resolve().parent.parent
TINY = Sizes(
    summary="for tests",
    seeds=2,
    width=8,
    depths=(10, 40, 120),
    smooth_depths=(10, 100, 200),
    nets=6,
    smooth_nets=6,
    together=4,
    law_width=10,
    law_depth=40,
    law_nets=60,
    chain_width=20,
    chain_depth=50,
    chain_nets=800,
    growth_depths=(10, 40),
    growth_nets=60,
    order_width=6,
    order_nets=4,
    order_depths=(16, 32, 64),
    map_depth=60,
    map_nets=3,
    map_inputs=2,
    map_hursts=(0.2, 0.5, 0.8, 0.95),
    map_betas=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2),
    train_width=6,
    regularity_depth=24,
    regularity_epochs=2,
    train_depth=12,
    train_epochs=2,
    train_hursts=(0.2, 0.5, 0.8),
    train_betas=(0.1, 0.5, 0.9),
    train_rates=(1e-2, 1e-1),
    hursts_together=2,
    samples=120,
)
TABLES = (
    "movements", "moments", "norms", "orders", "map", "critical", "regularity", "accuracy",
    "comparison",
)  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a small run, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(large_depth.PRESETS, "quick", TINY)
        folder = tmp_path_factory.mktemp("large_depth")
        yield registry.options_for(large_depth, device="cpu", out=folder, progress=False)


@pytest.fixture(scope="module")
def decided(options):
    """The verdicts of that run, by the claims' ids."""
    return {verdict.claim.id: verdict for verdict in registry.run(large_depth, options)}


def test_what_only_a_mistake_could_break_holds(decided):
    checks = [c.id for c in statements.CLAIMS if c.statement.startswith(statements.CHECK)]
    assert checks == ["check.gradient", "check.training", "check.embedding", "check.noise"]
    for name in checks:
        assert decided[name].value == "holds", name


def test_what_is_sure_at_any_size_holds(decided):
    for name in ("iid.explodes", "gradient.explodes", "smooth.explodes"):
        assert decided[name].value == "holds", name


def test_every_claim_has_a_verdict_and_a_source(decided):
    assert list(decided) == [claim.id for claim in large_depth.claims()]
    for claim in large_depth.claims():
        assert claim.source.startswith(("Marion", "derived for this project"))
        assert claim.reason
        assert claim.how


def test_tables_and_figures_are_written(decided, options):
    for name in (
        "independent", "smooth", "log_normal", "convergence", "hurst_paths", "critical_line",
        "weights_after_training", "accuracy",
    ):  # fmt: skip
        assert (options.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    written_tables = {name: pd.read_csv(options.out / f"{name}.csv") for name in TABLES}
    assert set(written_tables["movements"].weights) == {
        "independent", "smooth, process", "smooth, increments"
    }  # fmt: skip
    assert (written_tables["movements"].low <= written_tables["movements"]["mean"]).all()
    moments = written_tables["moments"]
    some = moments[(moments.beta == 0.5) & (moments.L == 40) & (moments.of == "output")].iloc[0]
    exact = theory.deviation_second_moment(40, 40**-0.5) ** 0.5
    assert some.exact_root_mean_square == pytest.approx(exact)
    assert some.nets == 6
    critical = written_tables["critical"]
    assert critical.H.tolist() == [*TINY.map_hursts] * 2
    row = critical[(critical.block == "res-1") & (critical.H == 0.8)].iloc[0]
    assert row.predicted_compounded == pytest.approx(theory.critical_beta(60, 0.8, "res-1"))
    assert len(written_tables["map"]) == 2 * 4 * 7
    assert len(written_tables["accuracy"]) == 2 * 3 * 3 * 2
    assert written_tables["norms"].nets.tolist() == [60, 60, 800]
    written = json.loads((options.out / "verdicts.json").read_text(encoding="utf-8"))
    assert [claim["id"] for claim in written["claims"]] == list(decided)


def test_numbers_of_others_stand_beside_those_of_the_same_sizes(decided, options):
    assert len(pd.read_csv(options.out / "comparison.csv")) == 0  # TINY is of another width
    movements = [
        {"weights": "independent", "beta": 0.5, "L": depth, "of": of, "mean": 0.8, "low": 0.7,
         "high": 0.9}
        for depth in (120, 130)
        for of in ("output", "gradient")
    ]  # fmt: skip
    critical = [
        {"block": "res-1", "H": h, "beta": 0.3, "low": 0.2, "high": 0.4} for h in (0.2, 0.3)
    ]
    found = tables._comparison(movements, critical, {"sizes": PRESETS["quick"]})
    assert found.earlier.tolist() == [0.804, 0.207]
    assert found.L.tolist() == [120, 1000]
    quick = PRESETS["quick"]
    for values in (reference.EARLIER, reference.AUTHORS):
        for (weights, beta), row in values.items():
            smooth = weights.startswith("smooth")
            assert beta in (quick.smooth_betas if smooth else quick.iid_betas)
            assert set(row) <= set(quick.smooth_depths if smooth else quick.depths)
    for row in reference.CRITICAL.values():
        assert tuple(row) == quick.map_hursts


# ---------------------------------------------------------------------------- sizes


def test_the_presets_are_those_of_the_paper_file():
    for sizes in PRESETS.values():
        assert sizes.depths == tuple(np.linspace(10, 1000, 10).round().astype(int).tolist())
        assert (sizes.width, sizes.smooth_nets, sizes.map_depth) == (40, 50, 1000)
        assert (sizes.chain_width, sizes.chain_depth) == (100, 1000)
        assert min(sizes.chain_nets, 200 * sizes.nets) >= 10_000
    paper = PRESETS["paper"]
    assert (paper.law_width, paper.law_depth, paper.law_nets) == (100, 1000, 10_000)
    assert len(paper.map_betas) == 70
    assert len(paper.map_hursts) == 52  # 51 of the paper, and 1/2
    assert (paper.train_width, paper.train_depth, paper.regularity_depth) == (30, 1000, 1000)
    assert len(paper.train_hursts) == len(paper.train_betas) == 10


def test_cells_are_all_different_and_hold_every_net_once():
    cells = large_depth.cells(TINY, 3)
    assert len({json.dumps(cell) for cell in cells}) == len(cells)
    for part, total in (("law", 60), ("iid", 6)):
        nets = sorted(
            net
            for cell in cells
            if cell["part"] == part and cell["L"] in (40,)
            for net in range(cell["first"], cell["first"] + cell["nets"])
        )
        assert nets == list(range(total))
    hursts = [h for c in cells if c["part"] == "accuracy" and c["seed"] == 2 for h in c["H"]]
    assert hursts == list(TINY.train_hursts)
    assert all(large_depth._cost(cell, TINY) > 0 for cell in cells)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"order_depths": (16, 48)}, "must double"),
        ({"order_depths": (16,)}, "two depths or more"),
        ({"map_hursts": (0.2, 0.8)}, "must contain 0.5"),
        ({"train_hursts": (0.5, 1.0)}, r"must lie in \(0, 1\)"),
        ({"map_betas": (0.5, 0.1)}, "must rise"),
        ({"train_betas": (0.9, 0.1)}, "must rise"),
        ({"map_betas": (0.5,)}, "two or more"),
        ({"train_hursts": ()}, "two or more"),
        ({"growth_depths": (10,)}, "two or more"),
        ({"law_depth": 2}, "depths must be at least 8"),
        ({"iid_betas": (0.25, 0.5)}, "iid_betas must contain"),
        ({"iid_betas": (0.2, 0.5, 1.0)}, "iid_betas must contain"),
        ({"smooth_betas": (0.5, 1.0, 3.0)}, "smooth_betas must contain"),
        ({"train_rates": ()}, "train_rates and regularity_rate must be positive"),
        ({"train_rates": (0.0, 0.1)}, "train_rates and regularity_rate must be positive"),
        ({"regularity_rate": math.nan}, "train_rates and regularity_rate must be positive"),
        ({"law_nets": 1}, "must be 2 or more"),
        ({"chain_nets": 0}, "must be 2 or more"),
        ({"samples": 0}, "samples must be None or at least 1"),
        *(
            ({name: 0}, f"{name} must be at least 1")
            for name in (
                "nets",
                "smooth_nets",
                "together",
                "width",
                "law_width",
                "chain_width",
                "order_width",
                "order_nets",
                "map_nets",
                "map_inputs",
                "train_width",
                "batch",
                "train_epochs",
                "regularity_epochs",
                "hursts_together",
            )
        ),
    ],
)
def test_sizes_that_make_no_sense_are_an_error(change, text):
    with pytest.raises(ExperimentError, match=text):
        dataclasses.replace(TINY, **change)


def test_data_of_one_class_are_an_error(tmp_path, monkeypatch):
    np.savez(tmp_path / "one.npz", x=np.zeros((50, 4, 4)), y=np.zeros(50, dtype=int))
    monkeypatch.setitem(large_depth.PRESETS, "quick", TINY)
    options = registry.options_for(
        large_depth, data_name=str(tmp_path / "one.npz"), device="cpu", out=tmp_path / "out",
        progress=False,
    )  # fmt: skip
    with pytest.raises(DataFormatError, match="two classes or more"):
        registry.run(large_depth, options)


def test_other_data_with_test_samples_are_taken(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = (rng.random((90, 3, 5, 5)) + labels[:, None, None, None]) / 4
    np.savez(
        tmp_path / "small.npz", x_train=images[:60], y_train=labels[:60], x_test=images[60:],
        y_test=labels[60:],
    )  # fmt: skip
    monkeypatch.setitem(large_depth.PRESETS, "quick", SMALLEST)
    monkeypatch.setattr("experiments.large_depth.figures.draw", lambda *_: None)
    options = registry.options_for(
        large_depth, data_name=str(tmp_path / "small.npz"), device="cpu", seeds=1,
        out=tmp_path / "out", progress=False,
    )  # fmt: skip
    found = {v.claim.id: v for v in registry.run(large_depth, options)}
    assert found["check.training"].value == "holds"
    assert found["accuracy.corner"].expected == pytest.approx(1 / 3)
    assert found["accuracy.corner"].value == "not decided"  # one seed


def test_few_samples_of_a_sorted_file_are_of_all_classes(tmp_path):
    labels = np.repeat(np.arange(4), 50)
    np.savez(
        tmp_path / "sorted.npz", x_train=np.random.default_rng(0).random((200, 3, 3)),
        y_train=labels, x_test=np.full((200, 3, 3), 0.25), y_test=labels,
    )  # fmt: skip
    sizes = dataclasses.replace(TINY, samples=20)
    pixels, some, test, others = Laboratory(load(str(tmp_path / "sorted.npz")), sizes, "cpu").split
    assert (pixels.shape, test.shape) == ((9, 20), (9, 20))
    assert bool((test == 0.25).all())
    assert some.tolist() == others.tolist() == sorted([0, 1, 2, 3] * 5)
    assert large_depth.commonest_share(some.tolist()) == 0.25


SMALLEST = dataclasses.replace(
    TINY, depths=(10, 20), smooth_depths=(10, 120), nets=3, law_nets=20, chain_nets=50,
    order_depths=(16, 32), map_depth=20, train_betas=(0.1, 0.9), samples=60,
)  # fmt: skip


def test_a_run_that_is_killed_ends_with_the_same_files(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_small("large_depth", SMALLEST, whole, monkeypatch) == 0
    cells = 0.4 * len(large_depth.cells(SMALLEST, 2))
    kill_small("large_depth", "test_large_depth", killed, cells, pause=0.002)
    assert not (killed / "verdicts.json").exists()
    assert run_small("large_depth", SMALLEST, killed, monkeypatch) == 0
    for name in (*(f"{table}.csv" for table in TABLES), "verdicts.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
