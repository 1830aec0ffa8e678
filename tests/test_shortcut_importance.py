"""The experiment, small: verdicts, files, interruption, and that it can be bad."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import registry, shortcut_importance
from experiments.shortcut_importance import (
    PRESETS,
    Sizes,
    critical,
    statements,
    tables,
    verdicts,
)
from experiments.shortcut_importance.laboratory import Laboratory
from experiments.shortcut_importance.setting import (
    CNN,
    COLD,
    LARGE,
    LARGE_SUM,
    METHODS,
    SHORT,
    STRESS,
    TEACHERS,
    UNIT,
    WARM,
    Teacher,
    disc,
    generator,
    in_ball,
    on_sphere,
    random_lanes,
    random_nets,
    spread,
)
from experiments.sweep import RunInterrupted, parts

QUICK = PRESETS["quick"]
TINY = Sizes(
    summary="for tests",
    seeds=60,
    filter_size=5,
    patches=(16, 20, 25),
    max_steps=4000,
    ratios=(0.5, 1.5),
    monte_carlo_samples=160_000,
    vectors=6,
    vector_steps=300,
    arrival=25,
    start_sizes=(16.0,),
    start_shares=(0.1,),
    start_patches=(16, 49),
    start_points=5,
    edge_shares=(0.05,),
    edge_patches=(16,),
    edge_offsets=(-0.2, -0.03, 0.03),
    edge_seeds=5,
    below_angles=(0.3, 0.45),
    below_sizes=(1.0, 64.0),
    below_seeds=5,
    rate_patches=(16,),
    followed=13,
    plain_seeds=4,
    plain_steps=60,
    sample_seeds=3,
    sample_group=2,
    samples=60,
    sample_steps=60,
)
CSV = ("angles", "critical", "other", "rates", "starts")


def options_in(folder):
    return registry.options_for(shortcut_importance, device="cpu", out=folder, progress=False)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a small run, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shortcut_importance.PRESETS, "quick", TINY)
        yield options_in(tmp_path_factory.mktemp("shortcut_importance"))


@pytest.fixture(scope="module")
def decided(options):
    """The verdicts of that run, by the claims' ids."""
    return {verdict.claim.id: verdict for verdict in registry.run(shortcut_importance, options)}


@pytest.fixture(scope="module")
def measured(decided, options):
    """What that run measured."""
    with dataclasses.replace(options, mode="resume").open_store(uses_data=False) as store:
        return [(cell, store[cell]) for cell in shortcut_importance.cells(TINY, options.seeds)]


def again(measured):
    """Verdicts by id, of measurements that were tampered with."""
    return {v.claim.id: v for v in verdicts.decide_claims(measured)}


# -------------------------------------------------------------------------------- the run


def test_what_only_a_mistake_could_break_holds(decided):
    checks = [c.id for c in statements.CLAIMS if c.statement.startswith(statements.CHECK)]
    assert len(checks) == 5
    for name in checks:
        expected = ("holds", "not decided") if name == "check.monte-carlo" else ("holds",)
        assert decided[name].value in expected, name
    proven = [c.id for c in statements.CLAIMS if c.statement.startswith(statements.PROVEN)]
    assert len(proven) == 8
    for name in proven:
        assert decided[name].value == "holds", name


def test_what_is_sure_at_any_size_holds(decided):
    for name, verdict in decided.items():
        if name.startswith("critical.") or name in ("stage.angle-rate", "starts.adversarial"):
            assert verdict.value == "holds", name
    assert decided["rates.warm-up"].measured == 1
    # Sixty starts do not show a rate of 0.999.
    assert decided["rates.warm-up-1000"].value == "not decided"
    assert "decided at step" in decided["rates.warm-up-1000"].note


def test_every_claim_has_a_verdict_and_a_source(decided):
    assert list(decided) == [claim.id for claim in shortcut_importance.claims()]
    for claim in shortcut_importance.claims():
        assert claim.source
        assert claim.reason
        assert claim.how


def test_no_data_set_is_loaded_and_none_counts(decided, options):
    assert options.loaded_dataset is None
    header = json.loads((options.out / "cells.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert header["configuration"]["data"] is None
    written = json.loads((options.out / "verdicts.json").read_text(encoding="utf-8"))
    assert written["environment"]["data"] == ""


def test_tables_and_figures_are_written(decided, options):
    for name in (
        "success_rates", "landscape", "trajectories", "first_angle", "spurious_point", "starts"
    ):  # fmt: skip
        assert (options.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    rates = pd.read_csv(options.out / "rates.csv")
    assert set(rates.method) == set(METHODS)
    assert set(rates.teacher) == {*TEACHERS, "recalled from the paper"}
    recalled = rates[rates.teacher == "recalled from the paper"]
    # The paper's experiment as recalled has a warm-up of 1000 steps.
    assert set(recalled.method) == {SHORT.name, COLD.name, CNN.name}
    starts = pd.read_csv(options.out / "starts.csv")
    # The adversarial start is none of the grid's.
    assert set(starts.starts_on_grid) == {len(disc(TINY.start_points)[0])}
    angles = pd.read_csv(options.out / "angles.csv")
    assert len(angles) == 3 + 2 * 2
    assert set(angles[angles.experiment == "below"].squared_norm) == {"1k", "64k"}
    here = rates[rates.teacher != "recalled from the paper"]
    assert (here.low <= here.rate).all()
    assert (here.rate <= here.high).all()
    assert (here.starts == 60).all()
    points = pd.read_csv(options.out / "critical.csv")
    assert (points.zero_eigenvalues == TINY.filter_size).all()
    assert (points.negative_eigenvalues == 0).all()
    assert ((points.smallest_beside_over_distance > 0) == (points.ratio_to_threshold < 1)).all()
    others = pd.read_csv(options.out / "other.csv")
    assert others[others.kind == "samples"].groupby("method").runs.sum().tolist() == [3, 3]


def test_a_run_that_is_interrupted_ends_with_the_same_files(options, decided, tmp_path):
    whole = Laboratory.measure
    count = 0

    def interrupted(self, cell):
        nonlocal count
        count += 1
        if count in (9, 31):
            raise KeyboardInterrupt
        return whole(self, cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shortcut_importance.PRESETS, "quick", TINY)
        patch.setattr(Laboratory, "measure", interrupted)
        patch.setattr("experiments.shortcut_importance.figures.draw", lambda *_: None)
        for _ in range(2):
            with pytest.raises(RunInterrupted):
                registry.run(shortcut_importance, options_in(tmp_path))
        registry.run(shortcut_importance, options_in(tmp_path))
    assert count == len(shortcut_importance.cells(TINY, 60)) + 2
    for name in (*(f"{table}.csv" for table in CSV), "verdicts.json"):
        assert (tmp_path / name).read_bytes() == (options.out / name).read_bytes(), name


# -------------------------------------------------------------------------------- decisions


def with_rates(measured, size, rate, left=0):
    """The same run with so many starts, of which ``rate(teacher, method, k)`` succeed."""
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, "rates"):
        teacher, method = TEACHERS[cell["teacher"]], METHODS[cell["method"]]
        result["successes"] = [round(size * rate(teacher, method, k)) for k in cell["patches"]]
        result["open"] = [left for _ in cell["patches"]]
        result["runs"] = size
    return changed


def as_expected(teacher, method, k):
    if method in (WARM, SHORT) or (method is COLD and teacher is UNIT):
        return 1.0
    if method is CNN:
        return 0.5 if teacher is not LARGE_SUM else 0.7 + k / 200
    return 0.6 + k / 100


def test_rates_decide(measured):
    rates = [name for name in statements.BY_ID if name.startswith("rates.")]
    found = again(with_rates(measured, 10_000, as_expected))
    for name in rates:
        assert found[name].value == "holds", name
    assert found["rates.warm-up"].num_runs == 3 * 3 * 10_000
    assert found["rates.rising"].num_runs == 3 * 10_000
    # Two teachers, three numbers of patches; what is in two differences counts once.
    assert found["rates.cnn-sum"].num_runs == 2 * 3 * 10_000
    # One failure refutes "every start"; of 10,000 three leave "0.999 of them", a hundred do not.
    for failures, most in ((1, "holds"), (3, "holds"), (10, "not decided"), (100, "fails")):

        def rate(teacher, method, k, failures=failures):
            lost = failures / 10_000 if (teacher, k) == (LARGE, 20) else 0
            return as_expected(teacher, method, k) - (lost if method in (WARM, SHORT) else 0)

        found = again(with_rates(measured, 10_000, rate))
        assert found["rates.warm-up"].value == "fails"
        assert f"{failures} starts are lost" in found["rates.warm-up"].note
        assert found["rates.warm-up-1000"].value == most
        assert found["rates.unit"].value == "holds"


def test_rates_that_contradict_the_claims_make_them_fail(measured):
    def against(teacher, method, k):
        falling = 0.9 - k / 100
        return {WARM: 0.9, SHORT: 0.9, COLD: falling, CNN: 0.7}[method]

    found = again(with_rates(measured, 10_000, against))
    for name in (
        "warm-up", "warm-up-1000", "rising", "unit", "cnn", "cnn-sum", "stress", "stress-1000",
        "stress-rising",
    ):  # fmt: skip
        expected = "not decided" if name == "cnn-sum" else "fails"
        assert found[f"rates.{name}"].value == expected, name
    found = again(with_rates(measured, 10_000, lambda *_: 1.0))
    assert found["rates.no-warm-up"].value == "not decided"
    assert found["rates.cnn"].value == "fails"


def test_a_single_start_and_starts_that_are_not_decided_leave_rates_open(measured):
    found = again(with_rates(measured, 1, as_expected))
    for name in ("warm-up-1000", "unit", "cnn", "rising", "stress"):
        assert found[f"rates.{name}"].value == "not decided", name
    half = with_rates(measured, 1000, lambda *_: 0.4, left=600)
    assert again(half)["rates.warm-up"].value == "not decided"
    for name in ("warm-up-1000", "unit", "cnn"):
        assert again(half)[f"rates.{name}"].value == "not decided", name


def test_points_of_the_other_nature_make_the_claims_fail(measured):
    changed = copy.deepcopy(measured)
    for _, result in parts(changed, "critical"):
        result["around"]["best"] = [-change for change in result["around"]["best"]]
        result["around"]["cubic"] = [-change for change in result["around"]["cubic"]]
        result["beside"] = -result["beside"]
        result["spurious"]["distance"] = 0.1
    for _, result in parts(changed, "crossing"):
        result["ratio"] *= 1.01
    found = again(changed)
    for name in ("minimum", "saddle", "third-order", "curvature", "sign", "spurious"):
        assert found[f"critical.{name}"].value == "fails", name
    assert found["critical.optimum"].value == "holds"


def test_starts_decide(measured):
    changed = copy.deepcopy(measured)
    for cell, result in parts(changed, "starts"):
        lost = cell["method"] == WARM.name
        result["adversarial"] = [1, -1] if lost else [1, 1]
        result["successes"] = [result["starts"], result["starts"] - lost]
    found = again(changed)
    for name in ("adversarial", "ball", "short", "cold"):
        assert found[f"starts.{name}"].value == "fails", name
    for _, result in parts(changed, "starts"):
        result["adversarial"] = [1, 0]
        result["successes"] = [result["starts"], result["starts"] - 1]
        result["open"] = [0, 1]
    found = again(changed)
    for name in ("adversarial", "ball", "short", "cold"):
        assert found[f"starts.{name}"].value == "not decided", name
    for _, result in parts(changed, "time"):
        result["steps"] = [k**2.5 for k in TINY.patches]
    assert again(changed)["starts.time"].value == "fails"
    for _, result in parts(changed, "time"):
        result["fates"] = [1, 1, -1]
    assert again(changed)["starts.time"].value == "not decided"


def test_stages_decide(measured):
    changed = copy.deepcopy(measured)
    for _, result in parts(changed, "follow", teacher=UNIT.name):
        result["largest_angle"] = [1.0, 2.0]
        result["warm_alignment"] = [0.5 * value for value in result["warm_expected"]]
        result["angle_rate"] = [0.1, 0.101, 0.1]
        result["outputs_rate"] = [0.34, 0.342, math.nan]
    found = again(changed)
    for name in ("angle", "alignment", "angle-rate"):
        assert found[f"stage.{name}"].value == "fails", name
    assert found["stage.outputs-rate"].value == "not decided"


def test_trainings_decide(measured):
    changed = copy.deepcopy(measured)
    for _, result in parts(changed, "plain"):
        for kind in result["kinds"]:
            lost = kind["method"] == COLD.name
            kind.update(runs=200, successes=100 if lost else 180, spurious=10, open=10)
    for cell, result in parts(changed, "samples"):
        lost = cell["method"] == WARM.name
        result.update(runs=100, successes=40 if lost else 100, open=0)
    found = again(changed)
    for name in ("plain.unit", "plain.better", "samples.shortcut"):
        assert found[name].value == "fails", name
    assert found["plain.large"].value == "holds"
    assert "180 of 200 (10 not decided) without" in found["plain.better"].note
    # A rate of 1 has an interval that ends there, which "below" leaves open.
    assert found["samples.cnn"].value == "not decided"


def test_vectors_that_arrive_elsewhere_make_the_check_fail(measured):
    changed = copy.deepcopy(measured)
    fates = parts(changed, "fates")
    fates[0][1]["same"] -= 1
    assert again(changed)["check.fates"].value == "fails"
    fates[0][1]["open"] += 1
    assert again(changed)["check.fates"].value == "not decided"


# -------------------------------------------------------------------------------- setting


def test_starts_are_uniform_in_the_ball_and_on_the_sphere():
    source = generator(test=1)
    rows = in_ball(source, 40_000, 3)
    radii = rows.norm(dim=1)
    assert radii.max() <= 1
    assert float((radii < 0.5).double().mean()) == pytest.approx(1 / 8, abs=0.01)
    assert rows.mean(0).abs().max() < 0.01
    assert on_sphere(source, 5, 4).norm(dim=1).tolist() == pytest.approx([1] * 5)


def test_draws_depend_on_what_they_are_for_alone():
    def drawn(**what):
        return random_lanes(LARGE, COLD, 16, 8, 3, generator(**what))[0].mean

    assert torch.equal(drawn(part="rates", k=16), drawn(part="rates", k=16))
    # The generator of the CPU knows 32 bits.
    assert generator(part="rates").initial_seed() < 2**32
    assert not torch.equal(drawn(part="rates", k=16), drawn(part="rates", k=25))


def test_vectors_are_what_the_three_numbers_say():
    one = torch.ones(50, dtype=torch.float64)
    rates = dict.fromkeys(("output_rate", "filter_rate", "warm_rate"), 0.01 * one)
    for teacher in TEACHERS.values():
        for method in (WARM, CNN):
            nets = random_nets(teacher, method, 16, 8, 50, generator(t=teacher.name))
            lanes = nets.reduce(**rates, warm_up=one.long())
            mean, other = teacher.parts(16)
            assert lanes.teacher_mean.tolist() == pytest.approx([mean] * 50)
            assert lanes.teacher_other.tolist() == pytest.approx([other] * 50)
            assert lanes.share.tolist() == pytest.approx([teacher.share(16)] * 50)
            assert nets.outputs.norm(dim=1).max() <= mean
            if method.shortcut:
                assert lanes.angle.tolist() == pytest.approx([math.pi * teacher.angle] * 50)
            reduced = random_lanes(teacher, method, 16, 8, 50, generator(t=1))[0]
            assert reduced.teacher_mean.tolist() == pytest.approx([mean] * 50)


def test_the_prior_of_the_theorem_is_a_third_of_pi():
    for teacher in shortcut_importance.PRIOR:
        w = math.sqrt(2 - 2 * math.cos(math.pi * teacher.angle))
        assert w <= 1 + 1e-12
    for teacher in STRESS:
        assert 1 / 3 < teacher.angle < 1 / 2


def test_the_disc_holds_its_rim_and_its_middle():
    x, y = disc(5)
    radii = torch.hypot(x, y)
    assert radii.max() <= 1 + 1e-12
    assert int((radii > 1 - 1e-12).sum()) >= 20
    assert radii.min() == 0


def test_steps_spread_from_the_first_to_the_last():
    steps = spread(20, 1000, (0, 300))
    assert steps[0] == 0
    assert steps[-1] == 1000
    assert 300 in steps
    assert steps == sorted(set(steps))


def test_a_teacher_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no a\\* of 16 entries"):
        critical.measure(16, 5, 3.0, "cpu")
    with pytest.raises(ValueError, match="below and above 1"):
        critical.measure(16, 5, 1.0, "cpu")


def test_recalled_numbers_are_no_thresholds():
    recalled = {rate for rates in tables.RECALLED.values() for rate in rates} - {1.0}
    for claim in statements.CLAIMS:
        assert claim.predicted not in recalled
        assert "recalled" not in claim.reason


def test_the_presets_are_those_of_the_paper_file():
    for sizes in (QUICK, PRESETS["paper"]):
        assert sizes.seeds >= 5000
        assert sizes.patches == (16, 25, 36, 49, 64, 81, 100)
        assert sizes.filter_size == 8
        assert len(sizes.start_sizes) * len(sizes.start_shares) * len(sizes.start_patches) == 24
    assert [WARM.warm_up(k) for k in (16, 64)] == [2560, 40960]
    assert LARGE.squared_norm(16) == 1024
    assert LARGE.share(16) == pytest.approx(1 / 256)
    cells = shortcut_importance.cells(PRESETS["paper"], 25_000)
    some = [c for c in cells if c["part"] == "rates" and c["teacher"] == UNIT.name]
    firsts = [(c["first"], c["seeds"]) for c in some if c["method"] == CNN.name]
    assert firsts == [(0, 10_000), (10_000, 10_000), (20_000, 5000)]


def test_rates_of_several_cells_are_put_together(measured):
    cell, result = parts(measured, "rates", teacher=LARGE.name, method=COLD.name)[0]
    twice = [*measured, ({**cell, "first": 10_000}, copy.deepcopy(result))]
    one, two = (verdicts.rates_of(m, LARGE, COLD)[16] for m in (measured, twice))
    assert (two.num_runs, two.value) == (2 * one.num_runs, one.value)
    assert two.low > one.low


def test_teachers_have_the_parts_that_they_say():
    mean, other = Teacher("", lambda k: 2.0 * k, lambda _: 0.25).parts(8)
    assert np.allclose([mean**2, other**2], [4, 12])
