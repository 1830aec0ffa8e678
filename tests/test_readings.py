"""Laws in depth and means of runs, from numbers whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.readings import growth_exponent, ratio_of_groups, slope_of


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_exponent_of_growth_is_found(power):
    curve = {depth: 3 + 2.0 * depth**power for depth in (1, 2, 3, 4, 8, 16, 32)}
    exponent = growth_exponent(curve)
    assert exponent.value == pytest.approx(power, abs=1e-9)


def test_growth_that_is_none_is_not_given_an_exponent():
    assert math.isnan(growth_exponent({2: 5.0, 4: 5.0, 8: 4.0, 16: 6.0, 32: 9.0}).value)


def test_a_straight_line_has_its_slope_and_no_error():
    value, half = slope_of({depth: 3 + 2.0 * depth for depth in (1, 2, 4, 8)})
    assert (value, half) == pytest.approx((2, 0), abs=1e-12)


def test_the_ratio_of_groups_is_decided_where_welchs_test_of_the_logarithms_decides():
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(50):
        few, many = np.exp(rng.normal(0.0, 0.4, 5)), np.exp(rng.normal(0.5, 0.1, 9))
        found = ratio_of_groups(few, many)
        assert found.value == pytest.approx(stats.gmean(few) / stats.gmean(many))
        p = stats.ttest_ind(np.log(few), np.log(many), equal_var=False).pvalue
        assert (found.low < 1 < found.high) == (p > 0.05)
        assert found.num_runs == 14
        decided += p <= 0.05
    assert 5 < decided < 45


def test_its_enclosure_contains_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        found = ratio_of_groups(np.exp(rng.normal(0, 1.0, 4)), np.exp(rng.normal(1, 0.3, 6)))
        inside += found.low <= math.exp(-1) <= found.high
    assert 0.93 < inside / 2000 < 0.97


def test_diverged_runs_decide_a_ratio_and_single_runs_do_not():
    assert ratio_of_groups([1.0, math.inf], [1.0, 2.0]).enclosure == (math.inf, math.inf)
    assert ratio_of_groups([1.0, 2.0], [1.0, math.inf]).enclosure == (0, 0)
    for first, second in (
        ([math.inf], [math.inf]), ([], [1.0]), ([1.0], [0.0, 1.0]), ([-1.0], [1.0]),
        ([math.nan], [1.0]),
    ):  # fmt: skip
        assert math.isnan(ratio_of_groups(first, second).value)
    assert ratio_of_groups([1.0], [2.0, 3.0]).enclosure == (0, math.inf)
    assert ratio_of_groups([1.0, 1.0], [2.0, 2.0]).enclosure == pytest.approx((0.5, 0.5))
