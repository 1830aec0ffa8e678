"""Density, trace and index against full spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import diagonal, planted

from conditioning import index, spectral_density, trace
from conditioning.errors import InvalidArgumentError, NonFiniteError
from conditioning.operators.base import FunctionOperator

VALUES = np.concatenate([np.linspace(-2, 5, 900), np.full(100, -3.0)])


@pytest.fixture(scope="module")
def estimated():
    return spectral_density(diagonal(VALUES), num_probes=6, num_steps=50, method="lanczos")


def test_quantiles_and_shares_are_enclosed(estimated):
    for q in (0.02, 0.1, 0.5, 0.9):
        assert np.quantile(VALUES, q) in estimated.quantile(q)
        assert np.quantile(np.abs(VALUES), q) in estimated.quantile(q, absolute=True)
    for point in (-3.5, -2.5, 0.0, 1.0, 6.0):
        assert (point >= VALUES).mean() in estimated.cdf(point)


def test_shares_are_useful_not_only_safe(estimated):
    share = estimated.cdf(-2.5)
    assert share.high - share.low < 0.1
    assert float(share) == pytest.approx(0.1, abs=0.04)
    assert estimated.weights.sum() == pytest.approx(1.0)


def test_the_enclosures_hold_over_many_seeds():
    misses = 0
    for seed in range(40):
        density = spectral_density(
            diagonal(VALUES[::4]), 1, 30, seed, method="lanczos", failure_probability=0.1
        )
        misses += np.quantile(np.abs(VALUES[::4]), 0.1) not in density.quantile(0.1, absolute=True)
    assert misses <= 8


def test_a_small_operator_is_exact():
    density = spectral_density(planted(VALUES[::5]))
    assert density.status == "exact"
    assert np.allclose(density.nodes, np.sort(VALUES[::5]), atol=1e-12)
    assert float(density.quantile(0.3)) == pytest.approx(np.quantile(VALUES[::5], 0.3))
    assert float(density.cdf(0.0)) == (VALUES[::5] <= 0).mean()


def test_the_density_integrates_to_one(estimated):
    points = np.linspace(-6, 8, 4000)
    area = np.trapezoid(estimated.density(points), points)
    assert area == pytest.approx(1.0, abs=1e-6)
    assert "\n" not in str(estimated)


def test_a_single_eigenvalue_has_a_density():
    density = spectral_density(torch.eye(20, dtype=torch.float64), method="lanczos", num_probes=2)
    assert np.isfinite(density.density(np.array([0.0, 1.0]))).all()
    assert float(density.quantile(0.5)) == pytest.approx(1.0)


def test_index_is_exact_on_the_dense_route_and_enclosed_on_the_other():
    share = (VALUES < 0).mean()
    exact = index(planted(VALUES))
    assert (exact.low, exact.value, exact.high) == pytest.approx((share,) * 3)
    estimate = index(diagonal(VALUES), num_probes=6, method="lanczos")
    assert share in estimate
    assert estimate.high - estimate.low < 0.15


def test_index_does_not_count_zeros():
    values = np.concatenate([np.zeros(50), -np.ones(25), np.ones(25)])
    assert float(index(planted(values))) == 0.25
    assert 0.25 in index(diagonal(values), method="lanczos")


def test_a_zero_operator_has_its_density_at_zero():
    zero = torch.zeros(3000, 3000, dtype=torch.float64)
    assert float(spectral_density(zero, 2, 5, method="lanczos").quantile(0.5)) == 0
    assert float(index(zero, method="lanczos")) == 0


def test_a_trace_that_is_not_finite_is_named():
    operator = FunctionOperator(lambda v: v * float("nan"), (200, 200))
    for num_probes in (5, 200):
        with pytest.raises(NonFiniteError, match="not finite"):
            trace(operator, num_probes)


def test_trace_of_a_small_operator_is_exact():
    matrix = planted(np.linspace(-1, 3, 40))
    assert float(trace(matrix)) == pytest.approx(40.0, abs=1e-12)


def test_the_trace_interval_covers_as_often_as_stated():
    matrix = planted(np.linspace(-1, 3, 300))
    covered = sum(300.0 in trace(matrix, 20, seed, confidence=0.9) for seed in range(100))
    assert 80 <= covered <= 99


def test_the_same_seed_gives_the_same_numbers():
    matrix = planted(VALUES[::3])
    assert trace(matrix, 8, 3) == trace(matrix, 8, torch.Generator().manual_seed(3))
    first, second = (index(matrix, seed=1, method="lanczos") for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: trace(m, 1), "num_probes"),
        (lambda m: trace(m, 8, confidence=1.0), "confidence"),
        (lambda m: index(m, num_probes=0), "num_probes"),
        (lambda m: spectral_density(m, num_steps=-1), "num_steps"),
        (lambda m: spectral_density(m, method="fft"), "auto, dense, lanczos"),
        (lambda m: spectral_density(m, failure_probability=0.7), "failure_probability"),
        (lambda m: spectral_density(m).quantile(1.5), "q must lie"),
    ],
)
def test_options_out_of_range_are_named(call, text):
    with pytest.raises(InvalidArgumentError, match=text):
        call(planted(np.linspace(1, 2, 30)))
