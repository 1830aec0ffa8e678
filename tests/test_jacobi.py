"""The bounds that a Jacobi matrix gives, against the measure it came from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import diagonal

from conditioning.jacobi import JacobiMatrix
from conditioning.krylov import LanczosRun, random_start
from conditioning.operators.base import MatrixOperator


def measured(values, steps, seed=0):
    """A run on a diagonal matrix, so that the spectral measure is known: (jacobi, weights)."""
    start = random_start(len(values), seed, "cpu")
    run = LanczosRun(MatrixOperator(diagonal(values)), start)
    run.extend(steps)
    return run.jacobi, ((start / start.norm()) ** 2).numpy()


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_an_eigenvalue_is_never_excluded(seed, steps):
    """Up to rounding: next to a converged Ritz value the bound is a spike of width eps."""
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(-3, 5, 60))
    jacobi, weights = measured(values, steps, seed)
    for value, weight in zip(values, weights, strict=True):
        around = value + 1e-14 * np.array([-1.0, 1.0])
        assert weight <= 1 / jacobi.inverse_mass(around)[1][0] * (1 + 1e-8)


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_away_from_the_spectrum_the_bound_falls_with_every_step(seed, steps):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(1, 2, 60))
    jacobi, _ = measured(values, steps, seed)
    more, _ = measured(values, steps + 5, seed)
    points = np.linspace(-1, 0.9, 7)
    assert np.all(more.inverse_mass(points)[0] > jacobi.inverse_mass(points)[0])


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_interval_bounds_hold_between_the_points(seed, steps):
    rng = np.random.default_rng(seed)
    jacobi, _ = measured(np.sort(rng.uniform(-3, 5, 60)), steps, seed)
    points = np.sort(rng.uniform(-3.5, 5.5, 30))
    bound = jacobi.inverse_mass(points)[1]
    for left, right, low in zip(points[:-1], points[1:], bound, strict=True):
        inside = np.linspace(left, right, 40)
        assert jacobi.inverse_mass(inside)[0].min() >= low * (1 - 1e-9)


@given(st.integers(0, 10**6), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_cumulated_mass_is_enclosed(seed, steps):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(-3, 5, 50))
    jacobi, weights = measured(values, steps, seed)
    points = np.sort(rng.uniform(-4, 6, 40))
    low, high = jacobi.cumulated(points)
    truth = np.array([weights[values <= point].sum() for point in points])
    assert np.all(low - 1e-12 <= truth)
    assert np.all(truth <= high + 1e-12)


def test_a_closed_run_knows_the_measure():
    values = np.repeat([-1.0, 0.5, 2.0], 10)
    jacobi, weights = measured(values, 20)
    assert jacobi.size == 3
    low, high = jacobi.cumulated(np.array([-2.0, 0.0, 1.0, 3.0]))
    assert low == pytest.approx([0, weights[:10].sum(), weights[:20].sum(), 1], abs=1e-12)
    assert high == pytest.approx(low, abs=1e-12)


def test_right_end_is_beyond_every_eigenvalue_that_has_the_mass():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = np.sort(rng.uniform(0, 1, 200) ** rng.integers(1, 4))
        jacobi, weights = measured(values, 12, seed)
        assert jacobi.right_end(1 / weights[-1]) >= values[-1]
        assert jacobi.mirrored().right_end(1 / weights[0]) >= -values[0]


def test_the_mirror_has_the_eigenpairs_of_the_negated_matrix():
    jacobi, _ = measured(np.linspace(-1, 4, 60), 15)
    mirror = jacobi.mirrored()
    matrix, vectors = mirror.dense(), mirror.ritz_vectors
    assert np.allclose(matrix @ vectors, vectors * mirror.ritz_values, atol=1e-12)
    assert np.allclose(mirror.ritz_values, -jacobi.ritz_values[::-1], atol=1e-14)
    assert np.allclose(mirror.weights, jacobi.weights[::-1], atol=1e-14)


def test_exclusion_stops_before_an_eigenvalue_and_reaches_it_in_the_end():
    values = np.concatenate([np.linspace(2, 10, 100), [0.5]])
    for steps, reached_it in ((5, False), (60, True)):
        jacobi, weights = measured(values, steps)
        reached = jacobi.excluded_until(1e-6, 3.0, 1 / weights[-1])
        assert reached <= 0.5 + 1e-9
        assert (reached > 0.49) == reached_it


def test_exclusion_does_not_step_over_a_converged_ritz_value():
    """A grid alone would: after convergence the bound is huge on both sides of it."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        hidden = 10 ** rng.uniform(-3, -1)
        values = np.concatenate([rng.uniform(1, 5, 80), [hidden]])
        jacobi, weights = measured(values, 81, int(rng.integers(10**6)))
        assert jacobi.excluded_until(1e-5, 0.9, 1 / weights[-1]) <= hidden * (1 + 1e-9)


def test_nothing_is_excluded_on_an_empty_interval():
    jacobi = JacobiMatrix(np.array([1.0]), np.array([]), 0.5)
    assert jacobi.excluded_until(1.0, 0.5, 10.0) == 1.0


@pytest.mark.parametrize("steps", [1, 7, 30, 60])
def test_one_point_in_floats_is_one_of_an_array(steps):
    values = np.sort(np.random.default_rng(0).uniform(-3, 5, 60))
    jacobi, _ = measured(values, steps)
    for matrix in (jacobi, jacobi.mirrored()):
        points = matrix.ritz_values[-1] + matrix.scale * np.geomspace(1e-12, 1e3, 60)
        sums, _ = matrix.inverse_mass(points)
        for point, size in zip(points, sums, strict=True):
            assert matrix.excludes_beyond(float(point), size * (1 - 1e-12))
            if size < 1e190:  # beyond, the array is scaled down to stay finite
                assert not matrix.excludes_beyond(float(point), size * (1 + 1e-12))
        end = matrix.right_end(1e6)
        assert matrix.inverse_mass(np.array([end]))[0][0] >= 1e6 * (1 - 1e-12)
