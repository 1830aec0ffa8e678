"""Laws in depth and means of runs, from numbers whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.readings import (
    difference_of_rates,
    growth_exponent,
    mann_whitney_law,
    power_law,
    rate_of,
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


@pytest.mark.parametrize(("size", "other"), [(1, 1), (2, 3), (4, 4), (5, 3), (10, 10), (3, 90)])
def test_the_law_of_the_mann_whitney_statistic_is_that_of_scipy(size, other):
    law = mann_whitney_law(size, other)
    assert law.sum() == pytest.approx(1)
    assert law == pytest.approx(law[::-1])
    below = stats.mannwhitneyu(
        np.arange(size), size + np.arange(other), alternative="less", method="exact"
    )
    assert law[0] == pytest.approx(below.pvalue)


@pytest.mark.parametrize("size", [40, 100])
def test_the_law_of_larger_groups_is_one(size):
    law = mann_whitney_law(size, size)
    assert law.sum() == pytest.approx(1)
    assert law.min() >= 0
    assert (np.diff(law[: len(law) // 2]) >= -1e-18).all()


def test_the_enclosure_of_large_groups_goes_on_from_that_of_small_ones():
    rng = np.random.default_rng(0)
    for size in (100, 101):  # the exact law, and the normal one
        values, others = np.exp(rng.normal(size=(2, size)))
        low, high = ratio_of_groups(values, others).enclosure
        # Quantiles of the statistic at the size where both are known.
        assert math.log(high / low) == pytest.approx(2 * 1.96 * math.sqrt(2 / size), rel=0.25)
    exact = np.cumsum(mann_whitney_law(100, 100)).searchsorted(0.025, side="right")
    mean, deviation = 5000, math.sqrt(100 * 100 * 201 / 12)
    assert exact == math.floor(mean + 0.5 + stats.norm.ppf(0.025) * deviation)


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


def test_a_rate_is_enclosed_by_the_exact_interval():
    # Without a failure the lower end is the n-th root of the tail; from tables: 7 of 10.
    assert rate_of(5000, 5000).enclosure == (pytest.approx(0.025 ** (1 / 5000)), 1.0)
    assert rate_of(0, 20).enclosure == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    some = rate_of(7, 10)
    assert (some.value, some.num_runs) == (0.7, 10)
    assert some.enclosure == (pytest.approx(0.3475, abs=1e-4), pytest.approx(0.9333, abs=1e-4))
    for won, runs in ((1, 9), (4990, 5000), (300, 301)):
        known = stats.binomtest(won, runs).proportion_ci(0.9, method="exact")
        assert rate_of(won, runs, confidence=0.9).enclosure == pytest.approx(
            (known.low, known.high)
        )


def test_the_interval_of_a_rate_covers_it():
    rng = np.random.default_rng(0)
    for rate in (0.5, 0.97):
        ends = [rate_of(int(won), 50).enclosure for won in rng.binomial(50, rate, 2000)]
        assert np.mean([low <= rate <= high for low, high in ends]) >= 0.95


def test_runs_that_are_not_decided_widen_a_rate_on_both_sides():
    wide = rate_of(50, 100, undecided=20)
    assert wide.value == 50 / 80
    assert wide.enclosure == (rate_of(50, 100).low, rate_of(70, 100).high)
    assert math.isnan(rate_of(0, 5, undecided=5).value)
    for numbers in ((6, 5, 0), (3, 5, 3), (-1, 5, 0)):
        with pytest.raises(ValueError, match="among"):
            rate_of(numbers[0], numbers[1], undecided=numbers[2])


def test_a_difference_of_rates_is_enclosed():
    one, other = rate_of(90, 100), rate_of(50, 100)
    found = difference_of_rates(one, other)
    assert found.value == pytest.approx(0.4)
    assert found.num_runs == 200
    low, high = found.enclosure
    assert 0.25 < low < 0.4 < high < 0.55
    same = difference_of_rates(one, one)
    assert same.low == -same.high
    assert math.isnan(difference_of_rates(one, rate_of(0, 5, undecided=5)).value)


def test_undecided_runs_may_all_lie_on_the_worse_side_of_a_difference():
    one, other = rate_of(600, 1000, undecided=200), rate_of(420, 1000, undecided=200)
    found = difference_of_rates(one, other)
    # 0.6 against 0.62 is possible, and 0.8 against 0.42.
    assert found.low < 0.6 - 0.62 < found.value < 0.8 - 0.42 < found.high
    for first in (0, 100, 200):
        for second in (0, 100, 200):
            settled = difference_of_rates(
                rate_of(600 + first, 1000), rate_of(420 + second, 1000)
            ).enclosure
            assert found.low <= settled[0]
            assert settled[1] <= found.high
    ends = (
        difference_of_rates(rate_of(600, 1000), rate_of(620, 1000)).low,
        difference_of_rates(rate_of(800, 1000), rate_of(420, 1000)).high,
    )
    assert found.enclosure == pytest.approx(ends)


def test_the_confidence_of_rates_is_that_of_their_difference():
    wide, narrow = (
        difference_of_rates(rate_of(60, 100, confidence=level), rate_of(40, 100, confidence=level))
        for level in (0.99, 0.5)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_interval_of_a_difference_covers_it():
    rng = np.random.default_rng(1)
    pairs = zip(rng.binomial(60, 0.95, 1000), rng.binomial(60, 0.8, 1000), strict=True)
    found = [difference_of_rates(rate_of(int(a), 60), rate_of(int(b), 60)) for a, b in pairs]
    assert np.mean([one.low <= 0.15 <= one.high for one in found]) >= 0.94


def test_a_law_names_what_it_is_a_law_in():
    curve = {k: float(k) ** 2 for k in (4, 9, 16)}
    assert power_law(curve, label="r=1", symbol="k").run == "r=1, k = 4 ... 16"
