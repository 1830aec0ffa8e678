"""Laws in depth and means of runs, from numbers whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.readings import (
    growth_exponent,
    mann_whitney_law,
    power_law,
    ratio_of_groups,
    slope_of,
)


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


def test_a_power_law_in_depth_is_found():
    law = power_law({depth: 3 * depth**-0.5 for depth in (6, 12, 24, 48)}, label="net")
    assert law.enclosure == pytest.approx((-0.5, -0.5))
    assert law.run == "net, L = 6 ... 48"
    assert power_law({6: 0.1, 12: 0.1, 24: 0.1}).enclosure == (0, 0)
    assert math.isnan(power_law({6: 1.0, 12: math.inf, 24: 1.0}).value)
    assert math.isnan(power_law({6: 1.0, 12: 2.0}).value)
    assert math.isnan(power_law({}).value)


@pytest.mark.parametrize(("size", "other"), [(1, 1), (2, 3), (4, 4), (5, 3), (10, 10)])
def test_the_law_of_the_mann_whitney_statistic_is_that_of_scipy(size, other):
    law = mann_whitney_law(size, other)
    assert law.sum() == pytest.approx(1)
    assert law == pytest.approx(law[::-1])
    below = stats.mannwhitneyu(
        np.arange(size), size + np.arange(other), alternative="less", method="exact"
    )
    assert law[0] == pytest.approx(below.pvalue)


def test_the_ratio_of_groups_is_decided_where_the_exact_test_decides():
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(100):
        few, many = np.exp(rng.normal(0.0, 0.4, 5)), np.exp(rng.normal(0.5, 0.3, 9))
        found = ratio_of_groups(few, many)
        p = stats.mannwhitneyu(few, many, method="exact").pvalue
        assert (found.low < 1 < found.high) == (p > 0.05)
        assert found.low <= found.value <= found.high
        assert found.num_runs == 14
        back = ratio_of_groups(many, few)
        assert back.enclosure == pytest.approx((1 / found.high, 1 / found.low))
        decided += p <= 0.05
    assert 20 < decided < 80


@pytest.mark.parametrize("sizes", [(4, 4), (5, 7)])
def test_its_enclosure_contains_the_truth_as_often_as_it_says(sizes):
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        found = ratio_of_groups(*(rng.pareto(1.0, size) for size in sizes))
        inside += found.low <= 1 <= found.high
    assert 0.94 < inside / 2000 < 0.985


def test_runs_that_are_better_by_orders_of_magnitude_count_by_their_rank():
    found = ratio_of_groups([1e-15, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
    assert found.high == pytest.approx(4 / 5)
    assert found.low == pytest.approx(1e-15 / 8)


def test_few_runs_give_no_enclosure_and_diverged_ones_count_as_the_largest():
    assert ratio_of_groups([1.0] * 3, [2.0] * 3).enclosure == (0, math.inf)
    assert ratio_of_groups([1.0] * 4, [2.0] * 4).enclosure == (0.5, 0.5)
    assert ratio_of_groups([math.inf] * 4, [1.0] * 4).enclosure == (math.inf, math.inf)
    assert ratio_of_groups([1.0] * 4, [math.inf] * 4).enclosure == (0, 0)
    some = ratio_of_groups([1.0, 2.0, 3.0, math.inf], [0.5, 0.6, 0.7, 0.8])
    assert some.low > 1
    assert some.high == math.inf
    for first, second in (
        ([math.inf], [math.inf]),
        ([], [1.0]),
        ([math.nan], [1.0]),
        ([0.0], [0.0]),
    ):
        assert math.isnan(ratio_of_groups(first, second).value)
