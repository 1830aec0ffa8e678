"""Claims, three-way verdicts, the table, verdicts.json, and two runs side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from experiments.claims import (
    FAILS,
    HOLDS,
    NOT_DECIDED,
    Claim,
    Measured,
    Tolerance,
    decide,
    decide_all,
    decide_every,
    over_runs,
)
from experiments.errors import ClaimError, VerdictFileError
from experiments.report import (
    claim_list,
    compare,
    environment,
    read_verdicts,
    verdict_table,
    write_verdicts,
)

NAN, INF = math.nan, math.inf


def claim(predicted=1.0, tolerance=None, id="depth-two", statement="κ does not depend on depth"):
    tolerance = Tolerance.within(atol=0.1) if tolerance is None else tolerance
    return Claim(id, "A paper, theorem 1", statement, predicted, tolerance, "rounding", "Lanczos")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.95, 1.05, HOLDS),
        (0.9, 1.1, HOLDS),  # the limit itself is accepted
        (1.2, 1.3, FAILS),
        (0.1, 0.2, FAILS),
        (1.05, 1.15, NOT_DECIDED),  # across one limit
        (0.5, 1.5, NOT_DECIDED),  # across both
        (-INF, INF, NOT_DECIDED),
        (NAN, 1.0, NOT_DECIDED),
        (1.0, NAN, NOT_DECIDED),
        (INF, INF, FAILS),
    ],
)
def test_an_enclosure_holds_inside_fails_outside_and_is_open_across(low, high, verdict):
    value = low if low == high else 1.0
    assert decide(claim(), Measured(value, low, high)).value == verdict


def test_nan_is_never_decided_whatever_is_accepted():
    anything = Tolerance(below=True, above=True)
    for measured in (Measured(NAN), Measured(NAN, 0.9, 1.1)):
        assert decide(claim(tolerance=anything), measured).value == NOT_DECIDED
    assert decide(claim("κ(D)"), Measured(1.0, expected=NAN)).value == NOT_DECIDED


@pytest.mark.parametrize(
    ("tolerance", "inside", "outside"),
    [
        (Tolerance.within(rtol=0.1), [1.8, 2.2], [1.79, 2.21, -2.0]),
        (Tolerance.within(), [2.0], [2.0 + 1e-15]),
        (Tolerance.at_most(), [2.0, -INF], [2.1, INF]),
        (Tolerance.at_most(rtol=0.5), [3.0], [3.01]),
        (Tolerance.at_least(atol=0.5), [1.5, INF], [1.49]),
    ],
)
def test_a_tolerance_accepts_one_interval(tolerance, inside, outside):
    for value in inside:
        assert decide(claim(2.0, tolerance), Measured(value)).value == HOLDS, value
    for value in outside:
        assert decide(claim(2.0, tolerance), Measured(value)).value == FAILS, value


def test_an_infinite_prediction_is_met_by_infinity_only():
    explodes = claim(INF, Tolerance.within(rtol=0.1))
    assert decide(explodes, Measured(INF)).value == HOLDS
    assert decide(explodes, Measured(1e300)).value == FAILS


def test_a_relation_needs_its_number():
    with pytest.raises(ClaimError, match="expected="):
        decide(claim("κ(D)"), Measured(1.0))
    verdict = decide(claim("κ(D)"), Measured(1.6, expected=1.594))
    assert verdict.value == HOLDS
    assert verdict.expected == 1.594
    assert verdict.accepted == pytest.approx((1.494, 1.694))


def test_impossible_claims_and_enclosures_are_refused():
    with pytest.raises(ClaimError, match="without spaces"):
        claim(id="two words")
    with pytest.raises(ClaimError, match="rtol"):
        Tolerance.within(rtol=-1)
    with pytest.raises(ClaimError, match="atol"):
        Tolerance.within(atol=NAN)
    with pytest.raises(ClaimError, match="low <= high"):
        decide(claim(), Measured(1.0, 2.0, 0.0))


def test_an_estimate_of_the_library_brings_its_enclosure():
    @dataclass(frozen=True)
    class Estimate:
        value: float
        low: float
        high: float

    verdict = decide(claim(), Measured.of(Estimate(1.0, 0.95, 1.2), run="L=2"))
    assert (verdict.value, verdict.low, verdict.high) == (NOT_DECIDED, 0.95, 1.2)
    assert verdict.run == "L=2"


def test_every_depth_must_hold_and_the_worst_is_shown():
    cells = [Measured(1 + 0.01 * k, run=f"L={k}", expected=1.0) for k in range(5)]
    verdict = decide_every(claim("κ(D)"), cells)
    assert (verdict.value, verdict.run, verdict.num_runs) == (HOLDS, "worst of 5: L=4", 5)

    bad = [*cells, Measured(1.3, run="L=8", expected=1.0), Measured(0.2, run="L=9", expected=1.0)]
    verdict = decide_every(claim("κ(D)"), bad)
    assert (verdict.value, verdict.run) == (FAILS, "worst of 7: L=9")
    assert "L=8, L=9" in verdict.note

    open_cell = Measured(1.0, 0.0, 2.0, expected=1.0, run="L=16")
    assert decide_every(claim("κ(D)"), [*cells, open_cell]).value == NOT_DECIDED
    assert decide_every(claim("κ(D)"), [*bad, open_cell]).value == FAILS
    assert decide_every(claim("κ(D)"), []).value == NOT_DECIDED


def test_a_missing_cell_among_good_ones_leaves_the_claim_open():
    cells = [Measured(1.0, run="L=2"), Measured(NAN, run="L=4")]
    verdict = decide_every(claim(), cells)
    assert verdict.value == NOT_DECIDED
    assert "L=4" in verdict.note


def test_a_property_of_cells():
    always = claim(1.0, Tolerance.within())
    assert decide_all(always, {"L=2": True, "L=4": True}).value == HOLDS
    verdict = decide_all(always, {"L=2": True, "L=4": False, "L=8": None})
    assert verdict.value == FAILS
    assert (verdict.low, verdict.high) == pytest.approx((1 / 3, 2 / 3))
    assert "not so: L=4" in verdict.note
    assert "open: L=8" in verdict.note
    assert decide_all(always, {"L=2": True, "L=4": None}).value == NOT_DECIDED
    assert decide_all(always, {}).value == NOT_DECIDED
    assert decide_all(claim("always", Tolerance.within()), {"L=2": True}).value == HOLDS


def test_a_mean_over_runs_has_the_students_t_interval():
    from scipy.stats import ttest_1samp

    values = [1.0, 1.2, 0.9, 1.1]
    measured = over_runs(values)
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert measured.value == pytest.approx(1.05)
    assert (measured.low, measured.high) == pytest.approx((interval.low, interval.high))
    assert measured.num_runs == 4


def test_runs_that_say_too_little_decide_nothing():
    assert decide(claim(), over_runs([1.0])).value == NOT_DECIDED
    assert decide(claim(), over_runs([])).value == NOT_DECIDED
    assert decide(claim(), over_runs([1.0, NAN])).value == NOT_DECIDED
    assert decide(claim(), over_runs([1.0, INF])).value == NOT_DECIDED
    assert decide(claim(), over_runs([INF, -INF])).value == NOT_DECIDED
    assert decide(claim(), over_runs([INF, INF])).value == FAILS
    assert decide(claim(), over_runs([1.0, 1.0, 1.0])).value == HOLDS
    with pytest.raises(ClaimError, match="confidence"):
        over_runs([1.0, 2.0], confidence=95)


def some_verdicts():
    long = "the condition number of the Hessian at zero grows with every layer " * 3
    return [
        decide(claim(), Measured(1.0, 0.95, 1.05, run="n=2 L=64")),
        decide(claim("κ(D)", id="other", statement=long), Measured(3.0, expected=1.5), note="why"),
        decide(claim(id="third"), Measured(NAN)),
        decide(claim(id="fourth", predicted=INF), Measured(INF)),
        decide(claim(id="fifth"), over_runs([1.0])),
    ]


@pytest.mark.parametrize("width", [20, 40, 72, 80, 100, 200])
def test_the_table_fits_the_terminal(width):
    text = verdict_table(some_verdicts(), width)
    lines = text.split("\n")
    assert all(len(line) <= max(width, 20) for line in lines[:-1])
    assert all(line == line.rstrip() for line in lines)
    assert lines[-1] == "5 claims: 2 hold, 1 fail, 2 not decided"
    for word in ("holds", "fails", "not decided", "depth-two", "1.05"):
        assert word.lower() in " ".join(text.lower().split()), word


def test_the_table_of_nothing_says_so():
    assert verdict_table([]) == "0 claims: 0 hold, 0 fail, 0 not decided"


def test_claims_are_listed_with_prediction_and_source():
    text = claim_list([claim("κ(D)")], 60)
    assert "depth-two: κ does not depend on depth" in text
    assert "predicted κ(D) (± 0.1 absolute); A paper, theorem 1" in text


def test_verdicts_are_valid_json_of_the_promised_form_and_equal_bytes(tmp_path):
    described = environment(seeds=3, data="digits", fingerprint="abc")
    paths = [tmp_path / "a" / "verdicts.json", tmp_path / "b" / "verdicts.json"]
    for path in paths:
        write_verdicts(path, "shortcut_depth", "quick", described, some_verdicts())
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [path.name for path in paths[0].parent.iterdir()] == ["verdicts.json"]

    def refuse(word):
        raise AssertionError(word)

    document = json.loads(paths[0].read_text("utf-8"), parse_constant=refuse)
    assert list(document) == ["experiment", "preset", "environment", "claims"]
    first, second, third, fourth, fifth = document["claims"]
    assert list(first)[:10] == [
        "id", "source", "statement", "predicted", "measured", "low", "high", "tolerance",
        "verdict", "num_runs",
    ]  # fmt: skip
    assert (first["predicted"], first["measured"], first["verdict"]) == (1.0, 1.0, "holds")
    assert (second["predicted"], second["relation"]) == (1.5, "κ(D)")
    assert (third["measured"], third["verdict"]) == (None, "not decided")
    assert fourth["measured"] == "inf"
    assert (fifth["low"], fifth["high"]) == ("-inf", "inf")


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "verdicts.json"
    write_verdicts(path, "e", "quick", {}, some_verdicts())
    before = path.read_bytes()
    with pytest.raises(ClaimError, match="depth-two"):
        write_verdicts(path, "e", "quick", {}, some_verdicts()[:1] * 2)
    with pytest.raises(TypeError):
        write_verdicts(path, "e", "quick", {"x": object()}, some_verdicts())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_environment_identifies_no_person_and_no_machine():
    import socket
    from pathlib import Path

    described = environment(seeds=1, data="digits", fingerprint="abc")
    assert set(described) == {
        "conditioning", "data", "data_sha256", "device", "numpy", "platform", "python", "scipy",
        "seeds", "threads", "torch",
    }  # fmt: skip
    assert socket.gethostname() not in described.values()
    assert str(Path.home()) not in [str(value) for value in described.values()]


def written(tmp_path, name, verdicts, **described):
    path = tmp_path / name / "verdicts.json"
    write_verdicts(path, "e", "quick", described, verdicts)
    return read_verdicts(path.parent)


def test_comparing_shows_what_moved_beyond_its_error_and_what_changed(tmp_path):
    base = written(tmp_path, "a", some_verdicts(), torch="2.13")
    text, changed = compare(base, base, 100)
    assert not changed
    assert "0 verdicts changed, 0 values moved" in text
    assert "moved" not in text.split("\n")[2]

    moved = [decide(claim(), Measured(1.08, 1.07, 1.09)), *some_verdicts()[1:]]
    text, changed = compare(base, written(tmp_path, "b", moved, torch="2.14"), 100)
    assert not changed
    assert "0 verdicts changed, 1 values moved" in text
    assert "torch: 2.13 -> 2.14" in text

    rounded = [decide(claim(), Measured(1.0, 0.95, 1.05)), *some_verdicts()[1:]]
    rounded[1] = decide(rounded[1].claim, Measured(3.0 * (1 + 1e-13), expected=1.5))
    assert "0 values moved" in compare(base, written(tmp_path, "c", rounded), 100)[0]

    failed = [decide(claim(), Measured(2.0)), *some_verdicts()[1:]]
    text, changed = compare(base, written(tmp_path, "d", failed), 100)
    assert changed
    assert "CHANGED" in text

    text, changed = compare(base, written(tmp_path, "e", some_verdicts()[1:]), 100)
    assert changed
    assert "absent" in text


def test_what_is_not_a_file_of_verdicts_is_said_to_be_none(tmp_path):
    with pytest.raises(VerdictFileError, match="no such file"):
        read_verdicts(tmp_path)
    path = tmp_path / "verdicts.json"
    for content in ("{", "[]", '{"claims": [{}]}', '{"claims": 3}'):
        path.write_text(content)
        with pytest.raises(VerdictFileError, match="not a file of verdicts"):
            read_verdicts(path)


@pytest.mark.parametrize(
    ("low", "high", "value"),
    [(-1, -1e-9, "holds"), (-1, 0, "not decided"), (0, 0, "fails"), (0, 1, "fails"),
     (-math.inf, -1, "holds"), (-1, math.inf, "not decided"), (math.nan, -1, "not decided")],
)  # fmt: skip
def test_below_is_no_at_most(low, high, value):
    assert Tolerance.less_than().judge(low, high, 0.0) == value
    assert Tolerance.more_than().judge(-high, -low, 0.0) == value
    assert str(Tolerance.less_than()) == "below"
    assert str(Tolerance.more_than()) == "above"
