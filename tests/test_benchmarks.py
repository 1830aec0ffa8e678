"""The arithmetic of the benchmarks, and one turn of each variant that needs no other package."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from benchmarks import gradient_norms, variants
from benchmarks.problems import PROBLEMS
from benchmarks.timing import Entry, Median, Timing, compare
from benchmarks.worker import take_turn
from conditioning import find_blocks


@pytest.mark.parametrize("count", [6, 15, 20, 51])
def test_the_interval_of_a_median_has_its_confidence_and_no_smaller_one_has(count):
    found = Median.of(np.random.default_rng(0).permutation(count) + 1.0)
    rank = int(found.low)
    assert found.high == count + 1 - rank
    assert found.value == (count + 1) / 2
    assert 1 - 2 * binom.cdf(rank - 1, count, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(rank, count, 0.5) < 0.95


class Clock:
    """A worker whose turns take as long as they are told, on a machine that gets slower."""

    def __init__(self, seconds):
        self.seconds, self.slowness, self.asked = seconds, 1.0, []

    def turn(self, name, steps):
        self.asked.append((name, steps))
        self.slowness *= 1.01
        wall = self.seconds[name] * steps * self.slowness
        return wall, wall / 2, 0.0


def test_variants_are_compared_with_the_bare_steps_of_their_round():
    worker = Clock({"bare": 0.1, "slow": 0.3})
    entries = [Entry("bare", worker, "bare", "bare", 10), Entry("slow", worker, "slow", "bare", 2)]
    bare, slow = compare(entries, rounds=20, report=lambda _: None)
    assert bare.ratio == Median(1.0, 1.0, 1.0)
    assert slow.ratio.low <= 3.0 <= slow.ratio.high
    assert slow.ratio.value == pytest.approx(3.0, rel=0.01)
    assert slow.processor_ratio == slow.ratio
    assert worker.asked.count(("slow", 2)) == 21  # one before it counts
    assert math.isclose(slow.milliseconds, 300 * 1.01**21, rel_tol=0.1)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(1.00, 1.04, "holds"), (1.04, 1.06, "not decided"), (1.06, 1.07, "fails")],
)
def test_a_goal_is_judged_by_the_whole_interval(low, high, said):
    one = Median(1.0, 1.0, 1.0)
    timing = Timing("every 10 steps", "bare", one, Median((low + high) / 2, low, high), 1.0)
    goal = "every 10 steps: at most 1.05"
    assert gradient_norms.verdicts([timing], by_processor=True) == {goal: said}
    assert gradient_norms.verdicts([timing], by_processor=False) == {goal: "holds"}
    other = replace(timing, label="another")
    assert gradient_norms.verdicts([other], by_processor=True) == {}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_variant_of_the_library_takes_a_turn(name):
    found = variants.library(name, "cpu", batch=2)
    assert {gradient_norms.BARE, *gradient_norms.GOALS} <= set(found)
    for variant in found.values():
        wall, processor = take_turn(variant, 2, "cpu")
        assert wall > 0
        assert processor > 0


def test_what_is_tracked_are_the_blocks():
    problem = PROBLEMS["resnet20"]("cpu", batch=2)
    assert len(find_blocks(problem.model, problem.inputs)) == 9
    problem = PROBLEMS["transformer8"]("cpu", batch=2)
    assert len(find_blocks(problem.model, problem.inputs)) == 8


def test_projections_take_a_share_of_a_step():
    from benchmarks.procrustes import share_of_a_step

    assert 0 < share_of_a_step("resnet20", "cpu", steps=2) < 1


def test_all_routes_project_alike():
    from benchmarks import polar_routes

    routes = polar_routes.three_layers("cpu")
    assert set(routes) == {
        polar_routes.OURS, polar_routes.SVD, polar_routes.SVD_ALL, polar_routes.PAPER,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 64, 1, 1, generator=generator)
    one = polar_routes._single(weight)
    for other in (polar_routes._svd_everywhere(weight, 4), polar_routes.published(weight, 4)):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
    assert polar_routes.operations(published_route=True) > 1000 * polar_routes.operations(
        published_route=False
    )
