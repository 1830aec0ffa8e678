"""Closed forms of the factor tau against integrals, simulations and their own limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from conditioning.errors import InvalidArgumentError
from conditioning.theory import (
    limit_log_growth,
    log_growth_bounds,
    mean_field_log_growth,
    scaling_factor,
)


def second_moment(a, step):
    """E relu(a + step g)^2, by quadrature."""
    return integrate.quad(
        lambda g: (a + step * g) ** 2 * stats.norm.pdf(g), max(-a / step, -12), 12
    )[0]


@pytest.mark.parametrize(("exponent", "kappa", "value"), [(0.5, 2, 0.2), (1, 1, 0.01), (0, 3, 3)])
def test_scaling_factor(exponent, kappa, value):
    assert scaling_factor(100, exponent, kappa) == pytest.approx(value)


@pytest.mark.parametrize("tau", [0.05, 0.4, 1.0, 3.0])
def test_the_bounds_hold_for_every_coordinate(tau):
    low, high = log_growth_bounds(tau, 1)
    norm = 1.3  # of a vector in which a coordinate has the value a: |h|^2/m
    for a in (0.0, 0.2, 1.0, 4.0):
        moment = second_moment(a, tau * norm)
        # Summed over coordinates these are the bounds on the growth of |h|^2.
        assert a**2 + tau**2 * norm**2 / 2 <= moment * (1 + 1e-9)
        assert moment <= (a**2 + tau**2 * norm**2) * (1 + 1e-9)
    assert (low, high) == pytest.approx((math.log(1 + tau**2 / 2), math.log(1 + tau**2)))
    assert log_growth_bounds(tau, 7) == pytest.approx((7 * low, 7 * high))


@pytest.mark.parametrize("tau", [0.1, 0.7, 1.5])
def test_one_block_of_large_width_is_an_integral(tau):
    # h_0 = relu(Ax): half of the coordinates are zero, the others half-normal; E h^2 = 1.
    inside = integrate.quad(
        lambda a: second_moment(a, tau) * stats.norm.pdf(a, scale=math.sqrt(2)), 0, 12
    )[0]
    expected = inside + second_moment(0.0, tau) / 2
    assert mean_field_log_growth(tau, 1) == pytest.approx(math.log(expected) / 2, rel=1e-7)


@pytest.mark.parametrize(("tau", "depth"), [(1.0, 12), (0.35, 20)])
def test_large_width_against_a_wide_population(tau, depth):
    # Coordinates are independent there, so a population of them follows the law of one.
    rng = np.random.default_rng(0)
    h = np.maximum(rng.normal(size=4_000_000), 0)
    total = 0.0
    for _ in range(depth):
        h /= math.sqrt(np.mean(h**2))
        h = np.maximum(h + tau * rng.normal(size=h.size), 0)
        total += math.log(np.mean(h**2)) / 2
    # The error of each mean is sd(h^2)/2000, below 2e-3 even for heavy tails.
    assert mean_field_log_growth(tau, depth) == pytest.approx(total, abs=1e-3 * math.sqrt(depth))


def test_large_width_lies_inside_the_bounds():
    for tau, depth in ((2.0, 3), (1.0, 50), (0.3, 40), (0.1, 100), (0.05, 50)):
        low, high = log_growth_bounds(tau, depth)
        assert low / 2 < mean_field_log_growth(tau, depth) < high / 2


def test_the_limit_is_approached_like_the_root_of_the_depth():
    for kappa in (0.5, 1.0):
        gaps = [
            (limit_log_growth(kappa) - mean_field_log_growth(kappa / depth**0.5, depth))
            * depth**0.5
            for depth in (64, 256)
        ]
        assert gaps[0] > 0
        assert gaps[0] == pytest.approx(gaps[1], rel=0.1)


def test_only_the_product_of_variance_and_squared_factor_counts():
    assert mean_field_log_growth(0.4, 9, 2.0) == pytest.approx(
        mean_field_log_growth(0.4 * math.sqrt(2), 9), rel=1e-12
    )
    assert log_growth_bounds(0.4, 9, 2.0) == pytest.approx(log_growth_bounds(0.8, 9, 0.5))
    assert limit_log_growth(1.0, 3.0) == 1.5
    assert mean_field_log_growth(-0.4, 9) == mean_field_log_growth(0.4, 9)


def test_a_stationary_law_grows_by_the_same_in_every_block():
    steps = np.diff([mean_field_log_growth(1.0, depth) for depth in (60, 61, 62, 2000)])
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)
    assert steps[2] / 1938 == pytest.approx(steps[1], rel=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: scaling_factor(0, 0.5), "num_blocks"),
        (lambda: scaling_factor(5, math.nan), "exponent"),
        (lambda: log_growth_bounds(0.1, 2.5), "num_blocks"),
        (lambda: log_growth_bounds(math.inf, 2), "tau"),
        (lambda: log_growth_bounds(0.1, 2, -1.0), "variance"),
        (lambda: limit_log_growth(1.0, math.nan), "variance"),
        (lambda: mean_field_log_growth(0.0, 2), "limit_log_growth"),
        (lambda: mean_field_log_growth(1e-6, 2), "limit_log_growth"),
        (lambda: mean_field_log_growth(1e6, 2), "must lie in"),
        (lambda: log_growth_bounds(1e200, 3), "must not exceed"),
        (lambda: scaling_factor(10, -400), "range of float64"),
        (lambda: mean_field_log_growth(0.1, -2), "num_blocks"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(InvalidArgumentError, match=text):
        call()
