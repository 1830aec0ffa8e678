"""Laws in depth and means of runs, from numbers whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.readings import growth_exponent, ratio_of_means, slope_of


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


def test_the_ratio_of_means_is_decided_where_welchs_test_decides():
    rng = np.random.default_rng(0)
    for _ in range(50):
        few, many = rng.normal(1.0, 0.4, 5), rng.normal(1.4, 0.1, 9)
        found = ratio_of_means(few, many)
        assert found.value == pytest.approx(few.mean() / many.mean())
        p = stats.ttest_ind(few, many, equal_var=False).pvalue
        assert (found.low < 1 < found.high) == (p > 0.05)
        assert found.num_runs == 14


def test_diverged_runs_decide_a_ratio_and_single_runs_do_not():
    assert ratio_of_means([1.0, math.inf], [1.0, 2.0]).value == math.inf
    assert ratio_of_means([1.0, 2.0], [math.inf, math.inf]).enclosure == (0, 0)
    for first, second in (([math.inf], [math.inf]), ([], [1.0]), ([1.0], [0.0, 0.0])):
        assert math.isnan(ratio_of_means(first, second).value)
    assert ratio_of_means([1.0], [2.0, 3.0]).enclosure == (-math.inf, math.inf)
    assert ratio_of_means([1.0, 1.0], [2.0, 2.0]).enclosure == (0.5, 0.5)
