"""Closed forms of deep scaled nets against sums, integrals and random networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from conditioning.errors import InvalidArgumentError
from conditioning.theory import (
    critical_beta,
    critical_exponent,
    deviation_second_moment,
    fgn_autocovariance,
    first_order_sum,
    gate_correlation,
    limit_log_norm_law,
    limit_norm_ratio_density,
    norm_second_moment,
    relu_correlation,
    scaling_factor,
)

HURSTS = (0.05, 0.3, 0.5, 0.75, 0.97)


def nets(depth, width, alpha, count, draw):
    """First and last states of res-3 nets whose entries have mean 0 and variance 1 / width."""
    first = np.random.default_rng(1).normal(size=(count, width, 1))
    state = first
    for _ in range(depth):
        outer, inner = (draw((count, width, width)) / width**0.5 for _ in range(2))
        state = state + alpha * outer @ np.maximum(inner @ state, 0)
    return first, state


@pytest.mark.parametrize("law", ["uniform", "signs"])
def test_second_moments_are_exact_for_any_symmetric_entries(law):
    rng = np.random.default_rng(0)
    draws = {
        "uniform": lambda shape: rng.uniform(-(3**0.5), 3**0.5, shape),
        "signs": lambda shape: rng.choice([-1.0, 1.0], shape),
    }
    depth, alpha = 6, 0.5
    first, last = nets(depth, 3, alpha, 40000, draws[law])
    before = (first**2).sum((1, 2))
    for found, exact in (
        ((last**2).sum((1, 2)) / before, norm_second_moment(depth, alpha)),
        (((last - first) ** 2).sum((1, 2)) / before, deviation_second_moment(depth, alpha)),
    ):
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - exact) < 4 * error
        assert error < 0.02 * exact


@pytest.mark.parametrize("law", ["uniform", "signs"])
@pytest.mark.parametrize("width", [2, 5])
def test_second_moments_of_gradients_are_exact_at_every_width(law, width):
    rng = np.random.default_rng(3)
    draw = {
        "uniform": lambda shape: rng.uniform(-(3**0.5), 3**0.5, shape),
        "signs": lambda shape: rng.choice([-1.0, 1.0], shape),
    }[law]
    depth, alpha, count = 5, 0.6, 60000
    state, blocks = rng.normal(size=(count, width, 1)), []
    for _ in range(depth):
        outer, inner = (draw((count, width, width)) / width**0.5 for _ in range(2))
        hidden = inner @ state
        blocks.append((outer, inner, hidden > 0))
        state = state + alpha * outer @ np.maximum(hidden, 0)
    last = draw((count, width, 1))
    slope = last
    for outer, inner, gates in reversed(blocks):
        slope = slope + alpha * inner.mT @ (gates * (outer.mT @ slope))
    found = ((slope - last) ** 2).sum((1, 2)) / (last**2).sum((1, 2))
    error = found.std() / count**0.5
    exact = deviation_second_moment(depth, alpha)
    assert abs(found.mean() - exact) < 4 * error
    # A relative correction of order 1 / d would be seen.
    assert error < 0.1 / width * exact


def test_gradients_have_the_limit_law_of_outputs():
    # Tangents and gradients of the small steps of the equation, three wide, where a wrong drift of
    # order 1/d would be a third.
    rng, width, depth, count = np.random.default_rng(4), 3, 150, 3000
    state, blocks = rng.normal(size=(count, width, 1)), []
    for _ in range(depth):
        outer, inner = (rng.normal(size=(count, width, width)) / width**0.5 for _ in range(2))
        hidden = inner @ state
        blocks.append((outer, inner, hidden > 0))
        state = state + depth**-0.5 * outer @ np.maximum(hidden, 0)
    slope = last = rng.normal(size=(count, width, 1))
    for outer, inner, gates in reversed(blocks):
        slope = slope + depth**-0.5 * inner.mT @ (gates * (outer.mT @ slope))
    logs = np.log((slope**2).sum((1, 2)) / (last**2).sum((1, 2)))
    mean, variance = limit_log_norm_law(width)
    assert abs(logs.mean() - mean) < 4 * (variance / count) ** 0.5
    assert logs.var() == pytest.approx(variance, rel=0.1)


def test_moments_of_the_paper_file():
    def root(beta):
        return deviation_second_moment(1000, scaling_factor(1000, beta)) ** 0.5

    assert root(0.5) == pytest.approx(0.8054, abs=1e-4)
    assert root(1) == pytest.approx(0.0224, abs=1e-4)
    assert root(0.25) == pytest.approx(2550, rel=1e-3)
    assert norm_second_moment(1000, 1000**-0.5) ** 0.5 == pytest.approx(1.284, abs=1e-3)
    assert norm_second_moment(10**5, 1.0) == deviation_second_moment(10**5, 1.0) == math.inf
    assert norm_second_moment(10, 1e200) == norm_second_moment(10**400, 0.1) == math.inf
    assert norm_second_moment(10**400, 0.0) == 1
    # No cancellation where branches are tiny.
    assert deviation_second_moment(1, 1e-12) == pytest.approx(5e-25)


def test_the_limit_law_is_that_of_the_stochastic_equation():
    # d log|H|^2 of dH = |H| / sqrt(2d) dB, by small steps of the equation itself.
    rng, width, steps, count = np.random.default_rng(0), 5, 400, 4000
    state = np.zeros((count, width))
    state[:, 0] = 1.0
    for _ in range(steps):
        norm = np.linalg.norm(state, axis=1, keepdims=True)
        state = state + norm / (2 * width) ** 0.5 * rng.normal(size=state.shape) / steps**0.5
    logs = np.log((state**2).sum(1))
    mean, variance = limit_log_norm_law(width)
    assert abs(logs.mean() - mean) < 4 * (variance / count) ** 0.5
    assert logs.var() == pytest.approx(variance, rel=0.1)
    assert stats.kstest(logs, stats.norm(mean, variance**0.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize("width", [2, 40])
def test_the_density_is_that_of_the_norm_ratio(width):
    mean, variance = limit_log_norm_law(width)
    same = stats.lognorm(variance**0.5 / 2, scale=math.exp(mean / 2))
    places = np.array([0.5, 0.9, 1.3, 2.0])
    assert limit_norm_ratio_density(places, width) == pytest.approx(same.pdf(places))
    mass, _ = integrate.quad(lambda x: float(limit_norm_ratio_density(x, width)), 0, 30)
    assert mass == pytest.approx(1)
    assert limit_norm_ratio_density([-1.0, 0.0], width).tolist() == [0.0, 0.0]
    assert np.isnan(limit_norm_ratio_density([math.nan, 1.0], width)).tolist() == [True, False]


@pytest.mark.parametrize("hurst", HURSTS)
def test_fractional_noise_adds_up_to_fractional_brownian_motion(hurst):
    size = 60
    lags = np.subtract.outer(np.arange(size), np.arange(size))
    covariance = fgn_autocovariance(hurst, lags)
    assert covariance.sum() == pytest.approx(size ** (2 * hurst))
    assert np.linalg.eigvalsh(covariance)[0] > 0
    if hurst == 0.5:
        assert covariance == pytest.approx(np.eye(size))


@pytest.mark.parametrize("r", [-0.9, -0.3, 0.0, 0.4, 0.95])
def test_correlations_after_a_relu(r):
    def density(x, y):
        inner = (x * x - 2 * r * x * y + y * y) / (2 * (1 - r * r))
        return math.exp(-inner) / (2 * math.pi * math.sqrt(1 - r * r))

    product, _ = integrate.dblquad(lambda y, x: x * y * density(x, y), 0, 9, 0, 9, epsabs=1e-8)
    both, _ = integrate.dblquad(lambda y, x: density(x, y), 0, 9, 0, 9, epsabs=1e-8)
    assert float(relu_correlation(r)) == pytest.approx(product, abs=1e-6)
    assert float(gate_correlation(r)) == pytest.approx(r * both, abs=1e-6)


def test_correlations_at_the_ends():
    assert relu_correlation([-1, 0, 1]) == pytest.approx([0, 1 / (2 * math.pi), 0.5])
    assert gate_correlation([-1, 0, 1]) == pytest.approx([0, 0, 0.5])


@pytest.mark.parametrize("hurst", HURSTS)
def test_first_order_sums_are_sums_over_all_pairs_of_layers(hurst):
    depth = 25
    lags = np.subtract.outer(np.arange(depth), np.arange(depth))
    rho = fgn_autocovariance(hurst, lags)
    assert first_order_sum(depth, hurst, "res-1") == pytest.approx(rho.sum() / 2)
    assert first_order_sum(depth, hurst) == pytest.approx((rho * relu_correlation(rho)).sum())
    assert first_order_sum(depth, hurst, gradient=True) == pytest.approx(
        (rho * gate_correlation(rho)).sum()
    )
    # One component of a row lies along the state.
    gates, along = (rho * gate_correlation(rho)).sum(), (rho * relu_correlation(rho)).sum()
    for width in (1, 2, 9):
        assert first_order_sum(depth, hurst, gradient=True, width=width) == pytest.approx(
            gates + (along - gates) / width
        )
        assert first_order_sum(depth, hurst, width=width) == first_order_sum(depth, hurst)
    # Without inner matrices gates do not depend on the layer.
    assert first_order_sum(depth, hurst, "res-1", gradient=True) == first_order_sum(
        depth, hurst, "res-1"
    )


def conditional_sum(depth, hurst, width, count):
    """First-order sum of gradients of res-3, drawn over inner matrices: mean, standard error.

    The outer matrices are averaged exactly, so that what is drawn is not the formula.
    """
    rng = np.random.default_rng(6)
    lags = np.subtract.outer(np.arange(depth), np.arange(depth))
    root = np.linalg.cholesky(fgn_autocovariance(hurst, lags))
    # One row of W at all layers, the first component along the state.
    rows = np.einsum("kl,lnd->knd", root, rng.normal(size=(depth, count, width)))
    passed = rows * (rows[:, :, :1] > 0)
    mixed = np.tensordot(fgn_autocovariance(hurst, lags), passed, 1)
    values = (mixed * passed).sum((0, 2)) / width
    return values.mean(), values.std() / count**0.5


@pytest.mark.parametrize(("depth", "width", "hurst"), [(20, 4, 0.85), (200, 4, 0.75), (20, 1, 0.3)])
def test_first_order_sums_of_gradients_are_exact_at_every_width(depth, width, hurst):
    mean, error = conditional_sum(depth, hurst, width, 8000)
    exact = first_order_sum(depth, hurst, gradient=True, width=width)
    assert abs(mean - exact) < 4 * error
    assert abs(mean - first_order_sum(depth, hurst, gradient=True)) > 8 * error


@pytest.mark.parametrize("block", ["res-1", "res-3"])
@pytest.mark.parametrize("gradient", [False, True])
def test_lines_tend_to_their_exponents(block, gradient):
    for hurst in (0.3, 0.5, 0.65, 0.9):
        sums = [first_order_sum(n, hurst, block, gradient=gradient) for n in (200_000, 1_600_000)]
        slope = math.log(sums[1] / sums[0]) / math.log(8) / 2
        assert slope == pytest.approx(critical_exponent(hurst, block, gradient=gradient), abs=0.03)


def test_at_a_fixed_width_gradients_have_the_exponent_of_outputs():
    for hurst in (0.3, 0.8, 0.9):
        assert critical_exponent(hurst, gradient=True, width=40) == critical_exponent(hurst)
    assert critical_exponent(0.9, gradient=True) == pytest.approx(0.8)
    # Narrow nets are there at depths that can be summed; wide ones are on their way.
    sums = [first_order_sum(n, 0.9, gradient=True, width=2) for n in (200_000, 1_600_000)]
    slope = math.log(sums[1] / sums[0]) / math.log(8) / 2
    assert slope == pytest.approx(0.9, abs=0.03)
    lines = [critical_beta(10**n, 0.8, gradient=True, width=40) for n in (3, 4, 5, 6)]
    assert lines == pytest.approx([0.587, 0.598, 0.611, 0.628], abs=6e-4)


def test_correlations_that_rounding_lifts_above_one_are_one():
    for depth, hurst in ((10**6, 0.999999), (1000, 1 - 1e-12)):
        assert first_order_sum(depth, hurst) == pytest.approx(depth**2 / 2, rel=1e-3)
        assert critical_beta(depth, hurst) == pytest.approx(
            critical_beta(depth, hurst, "res-1"), abs=1e-4
        )


def test_critical_lines_are_where_the_moment_is_one():
    first = {0.05: 0.439, 0.2: 0.433, 0.35: 0.430, 0.5: 0.450, 0.7: 0.581, 0.9: 0.795, 0.97: 0.896}
    for hurst, value in first.items():
        assert critical_beta(1000, hurst, compounded=False) == pytest.approx(value, abs=6e-4)
    for depth in (64, 10**6):
        alpha = scaling_factor(depth, critical_beta(depth, 0.5))
        # The exact moment for independent layers is 1 as alpha -> 0.
        assert deviation_second_moment(depth, alpha) == pytest.approx(1, abs=alpha**2)
    beta = critical_beta(100, 0.7, "res-1", compounded=False)
    assert 100 ** (-2 * beta) * first_order_sum(100, 0.7, "res-1") == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: norm_second_moment(3, math.inf), "alpha"),
        (lambda: deviation_second_moment(2.5, 0.1), "depth"),
        (lambda: limit_log_norm_law(0), "width"),
        (lambda: limit_norm_ratio_density(1.0, -1), "width"),
        (lambda: fgn_autocovariance(0.0, 1), "strictly between 0 and 1"),
        (lambda: fgn_autocovariance(1.0, 1), "strictly between 0 and 1"),
        (lambda: relu_correlation(1.1), "correlation"),
        (lambda: gate_correlation([0.0, math.nan]), "correlation"),
        (lambda: first_order_sum(10, 0.5, "res-2"), "res-1, res-3"),
        (lambda: critical_beta(1, 0.5), "depth"),
        (lambda: norm_second_moment(3, 10**400), "alpha must be finite"),
        (lambda: scaling_factor(10**400, 0.5), "range of float64"),
        (lambda: scaling_factor(1000, -1e5), "range of float64"),
        (lambda: limit_norm_ratio_density(10**400, 3), "ratio"),
        (lambda: limit_norm_ratio_density(1.0, 10**400), "width"),
        (lambda: fgn_autocovariance(0.5, 10**400), "lags"),
        (lambda: relu_correlation("one"), "correlation"),
        (lambda: fgn_autocovariance(10**400, 1), "hurst must be finite"),
        (lambda: first_order_sum(10, 0.5, gradient=True, width=0), "width"),
        (lambda: critical_exponent(0.5, gradient=True, width=2.5), "width"),
        (lambda: critical_exponent(0.5, "plain"), "res-1, res-3"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(InvalidArgumentError, match=text):
        call()
