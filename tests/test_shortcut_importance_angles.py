"""First angles: edges and verdicts from fabricated cells, and cells that are measured."""

from __future__ import annotations

import math

import pytest

from conditioning.theory import warm_up_limit
from experiments.shortcut_importance import PRESETS, angles
from experiments.shortcut_importance.laboratory import Laboratory
from experiments.shortcut_importance.setting import WARM

RUNS = 5


def edge_cell(offsets, successes, *, left=0, adversarial=None):
    """A teacher with ``r = 0.05``, ``k = 16`` and these angles beside the limit, over pi."""
    limit = warm_up_limit(0.05, 16)
    cell = {"part": "edge", "method": WARM.name, "share": 0.05, "patches": [16],
            "offsets": list(offsets), "seeds": RUNS}  # fmt: skip
    result = {
        "angles": [[limit + math.pi * x for x in offsets]],
        "successes": [list(successes)],
        "open": [[left if won < RUNS else 0 for won in successes]],
        "adversarial": [adversarial or [1 if won == RUNS else -1 for won in successes]],
        "runs": RUNS,
    }
    return cell, result


def below_cell(size, successes, *, left=(0, 0), adversarial=(1, 1)):
    cell = {"part": "below", "method": WARM.name, "size": size, "shares": [0.05], "patches": [16],
            "angles": [0.3, 0.48], "seeds": RUNS}  # fmt: skip
    return cell, {"successes": [list(successes)], "open": [list(left)],
                  "adversarial": [list(adversarial)], "runs": RUNS}  # fmt: skip


def decided(*measured):
    return {verdict.claim.id: verdict for verdict in angles.decide(measured)}


def test_the_edge_lies_where_starts_begin_to_fail():
    found = decided(edge_cell((-0.02, -0.006, -0.002, 0.003, 0.01), (5, 5, 4, 1, 0)))["angle.edge"]
    assert found.value == "holds"
    assert (found.low, found.high) == pytest.approx((-0.006, -0.002))
    assert "+0.003π beyond" in found.note
    far = decided(edge_cell((-0.06, -0.05, 0.003), (5, 3, 0)))["angle.edge"]
    assert far.value == "fails"
    assert far.measured == pytest.approx(-0.055)


def test_the_adversarial_start_counts_for_the_edge():
    cell = edge_cell((-0.03, -0.02, -0.004, 0.003), (5, 5, 5, 0), adversarial=[1, 1, -1, -1])
    found = decided(cell)["angle.edge"]
    assert (found.low, found.high) == pytest.approx((-0.02, -0.004))
    # One that is not decided may be on either side.
    cell = edge_cell((-0.03, -0.02, -0.004, 0.003), (5, 5, 5, 0), adversarial=[1, 1, 0, -1])
    found = decided(cell)["angle.edge"]
    assert (found.low, found.high) == pytest.approx((-0.02, 0.003))


def test_an_edge_that_was_not_seen_is_not_known():
    for successes in ([5, 5, 5], [0, 0, 0], [5, 0, 5]):
        assert decided(edge_cell((-0.1, 0.0, 0.1), successes))["angle.edge"].value == "not decided"
    left = decided(edge_cell((-0.1, -0.05, 0.03), (5, 4, 0), left=1, adversarial=[1, 1, -1]))[
        "angle.edge"
    ]
    assert (left.low, left.high) == pytest.approx((-0.1, 0.03))


def test_angles_below_a_right_one_are_decided_by_teacher():
    found = decided(below_cell(1.0, (5, 5)), below_cell(64.0, (5, 5)))
    for name in ("prior", "adversarial", "large"):
        assert found[f"angle.{name}"].value == "holds", name
    found = decided(below_cell(1.0, (5, 5)), below_cell(64.0, (5, 4), adversarial=(1, -1)))
    assert [found[f"angle.{n}"].value for n in ("prior", "adversarial", "large")] == [
        "holds", "holds", "fails",
    ]  # fmt: skip
    assert "lowest rate 0.8 at r=0.05 k=16 0.48π" in found["angle.large"].note
    found = decided(below_cell(1.0, (5, 4), adversarial=(1, -1)), below_cell(64.0, (5, 5)))
    assert [found[f"angle.{n}"].value for n in ("prior", "adversarial", "large")] == [
        "fails", "fails", "holds",
    ]  # fmt: skip
    found = decided(below_cell(1.0, (5, 4), left=(0, 1), adversarial=(1, 0)))
    for name in ("prior", "adversarial"):
        assert found[f"angle.{name}"].value == "not decided", name


def test_large_teachers_lose_starts_below_a_right_angle_and_others_do_not():
    laboratory = Laboratory(PRESETS["quick"], "cpu")
    cell = {"part": "below", "method": WARM.name, "shares": [1 / 256], "patches": [16],
            "angles": [1 / 3, 0.499], "seeds": 60}  # fmt: skip
    small, large = (laboratory.measure({**cell, "size": size}) for size in (1.0, 64.0))
    assert small["successes"].tolist() == [[60, 60]]
    assert small["adversarial"].tolist() == [[1, 1]]
    assert large["successes"][0, 0] == 60
    assert 20 < large["successes"][0, 1] < 60


def test_offsets_that_leave_the_angles_are_refused():
    laboratory = Laboratory(PRESETS["quick"], "cpu")
    cell = {"part": "edge", "method": WARM.name, "share": 0.05, "patches": [16], "offsets": [0.6],
            "seeds": 2}  # fmt: skip
    with pytest.raises(ValueError, match="first angles that are none"):
        laboratory.measure(cell)


def test_offsets_of_the_presets_are_not_symmetric():
    for sizes in PRESETS.values():
        offsets = sizes.edge_offsets
        near = max(x for x in offsets if x < 0), min(x for x in offsets if x > 0)
        assert sum(near) != 0
        assert max(sizes.below_angles) < 0.5
