"""Pairs put aside by ``eigenvalues``: shared residuals, what is beside them, what it all claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import KINDS, diagonal, planted, random_spectrum

from conditioning import eigenvalues
from conditioning.krylov import LanczosRun, random_start
from conditioning.krylov.restart import RestartedRun
from conditioning.operators.base import MatrixOperator
from conditioning.spectrum import search
from conditioning.spectrum.locked import SharedPairs, joined, num_worth_keeping
from conditioning.spectrum.measure import inverse_weight
from conditioning.spectrum.search import Search

SIZE = 200
CLUSTERED = np.concatenate([np.linspace(-1, 1, 192), [2, 2, 2, 1.9, 1.9, 1.7, 1.7 + 1e-5, -1.8]])


def shared_pairs(matrix, steps=(14, 18, 12), extra=6):
    """Pairs of several runs, most of them far from converged."""
    operator = MatrixOperator(matrix)
    pairs = SharedPairs(operator, 3, extra, np.abs)
    for seed, count in enumerate(steps):
        run = LanczosRun(operator, random_start(SIZE, seed, "cpu"), deflate=pairs.vectors)
        run.extend(count)
        best = np.argsort(-np.abs(run.jacobi.ritz_values))[:4]
        vectors = run.combine(torch.from_numpy(run.jacobi.ritz_vectors[:, best].copy()))
        shares = run.jacobi.residual_norm * run.jacobi.ritz_vectors[-1, best]
        pairs.add(vectors, run.jacobi.ritz_values[best], run.direction, shares, run.guard)
    return pairs


@pytest.mark.parametrize("extra", [0, 6, 100])
def test_residuals_of_pairs_of_several_runs_are_known_without_a_product(extra):
    matrix = planted(CLUSTERED)
    pairs = shared_pairs(matrix, extra=extra)
    kept = pairs.vectors
    assert kept.shape[1] == min(12, 3 + extra)
    assert (kept.T @ kept - torch.eye(kept.shape[1])).abs().max() < 1e-13
    true = matrix @ kept - kept * torch.from_numpy(pairs.values)
    norms, together = pairs.residuals()
    assert np.allclose(norms, true[:, :3].norm(dim=0).numpy(), atol=1e-13)
    assert together == pytest.approx(float(torch.linalg.matrix_norm(true[:, :3], 2)), abs=1e-13)
    assert norms.max() > 1e-3  # otherwise nothing is tested
    if extra == 100:  # nothing was dropped: Rayleigh-Ritz, residuals orthogonal to the space
        assert (kept.T @ true).abs().max() < 1e-13


def test_what_lies_beside_the_wanted_pairs_is_bounded_by_what_lies_beside_all():
    matrix = planted(CLUSTERED)
    pairs = shared_pairs(matrix)

    def beside(vectors):
        rest = torch.eye(SIZE, dtype=torch.float64) - vectors @ vectors.T
        return float(torch.linalg.matrix_norm(rest @ matrix @ rest, 2))

    outer, true = beside(pairs.vectors), beside(pairs.vectors[:, :3])
    bound = pairs.beyond(outer)
    assert outer < true <= bound + 1e-12
    assert pairs.target(bound) == pytest.approx(outer, abs=1e-12)
    assert pairs.narrow()
    assert not pairs.narrow()
    assert pairs.beyond(outer) == outer == pairs.target(outer)


def test_joined_is_an_eigenvalue_of_the_two_by_two_matrix():
    for first, second, coupling in ((1.0, 2.0, 0.3), (2.0, -1.0, 0.0), (-1.0, -1.0, 0.5)):
        matrix = np.array([[first, coupling], [coupling, second]])
        assert joined(first, second, coupling) == pytest.approx(np.linalg.eigvalsh(matrix)[-1])


def test_pairs_are_kept_where_they_widen_the_gap_and_not_otherwise():
    keys = np.array([10, 8, 7.9, 7.8, 3, 2.9, 2.8])
    converged = np.zeros(7)
    assert num_worth_keeping(keys, converged, 2, 8.08, 20) == 4  # all that another one follows
    assert num_worth_keeping(keys, converged, 2, 8.08, 1) == 1
    assert num_worth_keeping(keys, converged, 2, 7.9, 20) == 0
    assert num_worth_keeping(keys[:2], converged[:2], 2, 8.08, 20) == 0
    # Not told apart from the next one, or so far from settled that they cost all they bring:
    assert num_worth_keeping(keys, np.full(7, 0.2), 2, 8.08, 20) == 0
    assert num_worth_keeping(keys, np.array([0, 0, 0, 1.0, 0, 0, 0]), 2, 8.08, 20) == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_one_point_tells_what_the_search_for_the_end_would(restarted):
    operator = MatrixOperator(planted(CLUSTERED))
    start = random_start(SIZE, 0, "cpu")
    run = RestartedRun(operator, start, key=np.abs, max_steps=16 if restarted else SIZE)
    run.extend(40)
    assert (run.num_restarts > 0) == restarted
    for matrix in (run.jacobi, run.jacobi.mirrored()):
        for inverse_mass in (1e4, 1e12):
            end = matrix.right_end(inverse_mass)
            assert matrix.excludes_beyond(end * (1 + 1e-9), inverse_mass)
            less = end - 1e-2 * (end - matrix.ritz_values[-1]) - 1e-9
            assert not matrix.excludes_beyond(less, inverse_mass)
        assert not matrix.excludes_beyond(float(matrix.ritz_values[-1]), 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_enclosure_misses_on_planted_spectra(kind):
    """40 spectra of each kind: stated is a failure in a million."""
    rng = np.random.default_rng(KINDS.index(kind))
    certified = 0
    for trial in range(40):
        values = random_spectrum(kind, rng)
        k, which = int(rng.integers(1, 5)), ("LM", "LA", "SA")[trial % 3]
        rtol = 10 ** rng.uniform(-4, -2)
        order = {"LM": -np.abs(values), "LA": -values, "SA": values}[which]
        truth = values[np.argsort(order, kind="stable")][:k]
        found = eigenvalues(diagonal(values), k, which, rtol=rtol, seed=trial)
        certified += found.status in ("certified", "exhausted")
        for estimate, true in zip(found.values, truth, strict=True):
            # Of a pair +-x either may be listed first.
            if which == "LM":
                sizes = sorted((abs(estimate.low), abs(estimate.high)))
                assert sizes[0] - 1e-12 <= abs(true) <= sizes[1] + 1e-12
            else:
                assert estimate.low - 1e-12 <= true <= estimate.high + 1e-12
    assert certified == 40


@pytest.mark.parametrize("kind", ["multiple", "cluster"])
def test_with_half_of_the_failures_allowed_no_more_are_seen(kind):
    """A second copy, or a near one, is overlooked no more often than stated."""
    top = [3.0, 3.0] if kind == "multiple" else [3.0, 3.0 - 1e-9]
    values = np.concatenate([np.linspace(-1, 1, 98) * 2.5, top])
    wrong = sum(
        found.status == "certified" and found[1].high < top[1] - 1e-6
        for found in (
            eigenvalues(diagonal(values), 2, seed=seed, rtol=1e-2, failure_probability=0.45)
            for seed in range(25)
        )
    )
    assert wrong <= 0.45 * 25


def test_what_all_rounds_leave_to_chance_is_no_more_than_stated(monkeypatch):
    """Rounds that close early leave more to chance, and still share it."""
    spent = {}

    def converge(self, *args):
        spent[self.rounds] = 0.0
        return whole(self, *args)

    def weight(size, failure_probability):
        spent[max(spent)] = max(spent[max(spent)], failure_probability)
        return inverse_weight(size, failure_probability)

    whole = Search._converge
    monkeypatch.setattr(Search, "_converge", converge)
    monkeypatch.setattr(search, "inverse_weight", weight)
    values = np.concatenate([np.full(12, 2.0), np.full(88, 1.0)])
    found = eigenvalues(diagonal(values).float(), 3, rtol=1e-3, seed=1)
    assert found.status == "exhausted"
    assert max(spent) >= 3
    assert 0 < sum(spent.values()) <= found.failure_probability
    clear = np.concatenate([np.full(12, 2.0), np.linspace(-1, 1, 388)])
    spent.clear()
    found = eigenvalues(diagonal(clear), 12, rtol=1e-3, failure_probability=1e-4)
    assert (found.status, found.failure_probability) == ("certified", 1e-4)
    assert 0 < sum(spent.values()) <= 1e-4


def test_a_second_run_costs_less_beside_pairs_that_have_not_converged(monkeypatch):
    values = 1 / np.sqrt(np.arange(1, 1001))
    with_them = eigenvalues(diagonal(values), 5, rtol=1e-3)
    monkeypatch.setattr("conditioning.spectrum.search._EXTRA", 0)
    without = eigenvalues(diagonal(values), 5, rtol=1e-3)
    assert with_them.status == without.status == "certified"
    assert with_them.num_matvecs < without.num_matvecs


def test_without_a_certificate_one_run_is_made_and_what_is_open_is_said():
    values = np.concatenate([np.linspace(-1, 1, 196), [2.0, 1.8, 1.6, 1.5]])
    matrix = planted(values)
    short = eigenvalues(matrix, 3, certify=False, vectors=True)
    assert short.status == "not certified"
    assert "copies" in short.message
    assert short.num_matvecs < 0.8 * eigenvalues(matrix, 3).num_matvecs
    assert short.numpy() == pytest.approx([2.0, 1.8, 1.6], abs=1e-6)
    residual = matrix @ short.vectors - short.vectors * torch.from_numpy(short.numpy())
    assert (residual.norm(dim=0).numpy() <= np.array(short.residual_norms) + 1e-14).all()
    # Nothing exceeds the first value, which the run does prove, to 1 - failure_probability.
    assert short[0].low <= 2.0 <= short[0].high < 2.1
    assert 0 < short.failure_probability <= 1e-6


def test_copies_that_are_not_looked_for_stay_within_the_enclosures():
    values = np.concatenate([np.linspace(-1, 1, 196), [2.0, 2.0, 2.0, 1.5]])
    short = eigenvalues(planted(values), 2, "LA", rtol=1e-3, certify=False)
    assert short.status == "not certified"
    assert short.numpy() == pytest.approx([2.0, 1.5], abs=1e-3)  # one copy of 2 only
    assert all(estimate.low <= 2.0 <= estimate.high for estimate in short.values)
    full = eigenvalues(planted(values), 2, "LA", rtol=1e-3)
    assert full.numpy() == pytest.approx([2.0, 2.0], abs=1e-3)
