"""Block Lanczos: the relation, lost rank, interrupts, shards, and what a block may claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import diagonal, planted
from test_restart import _Halves

from conditioning import FunctionOperator
from conditioning.errors import (
    AsymmetricOperatorError,
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
)
from conditioning.krylov import BlockRun, block_lanczos, make_generator, start_for
from conditioning.krylov.block import gaussian_floor
from conditioning.operators.base import as_operator


def gaussian(size, width, seed=0):
    return torch.randn(size, width, dtype=torch.float64, generator=make_generator(seed))


def skewed(block):
    """Not symmetric."""
    return block.flip(0) + torch.linspace(0, 1, len(block)).double()[:, None] * block.roll(1, 0)


def relation_error(matrix, basis, projected, residual):
    gap = matrix @ basis - basis @ projected
    gap[:, gap.shape[1] - residual.shape[1] :] -= residual
    return float(gap.abs().max())


def orthogonality(basis):
    return float((basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max())


def test_the_relation_holds_and_copies_are_seen():
    values = np.concatenate([np.full(3, 2.0), np.linspace(-1, 1, 57)])
    matrix = planted(values)
    found = block_lanczos(matrix, gaussian(60, 4), 8)
    assert relation_error(matrix, found.basis, found.projected, found.residual) < 1e-12
    assert orthogonality(found.basis) < 1e-12
    assert float((found.basis.T @ found.residual).abs().max()) < 1e-12
    assert np.allclose(found.ritz_values[-3:], 2.0, atol=1e-8)
    assert found.num_matvecs == 32
    vectors = found.basis @ torch.linalg.eigh(found.projected).eigenvectors
    measured = (matrix @ vectors - vectors * torch.from_numpy(found.ritz_values)).norm(dim=0)
    assert np.allclose(measured.numpy(), found.residual_norms, atol=1e-12)


def test_a_function_of_blocks_and_an_operator_agree():
    matrix, start = planted(np.linspace(1, 2, 30)), gaussian(30, 3)
    by_function = block_lanczos(lambda block: matrix @ block, start, 4)
    by_operator = block_lanczos(as_operator(matrix), start, 4)
    assert np.allclose(by_function.ritz_values, by_operator.ritz_values, atol=1e-13)
    with pytest.raises(ShapeError, match="matmat must return"):
        block_lanczos(lambda block: (matrix @ block)[:, 0], start, 4)


def test_columns_that_depend_on_others_are_dropped():
    matrix = planted(np.linspace(1, 2, 40))
    start = gaussian(40, 1).repeat(1, 3)
    found = block_lanczos(matrix, start, 5)
    assert found.basis.shape == (40, 5)
    assert relation_error(matrix, found.basis, found.projected, found.residual) < 1e-12
    run = BlockRun(as_operator(matrix), start)
    run.extend(5)
    with pytest.raises(InvalidArgumentError, match="at most the 0 independent"):
        run.bounds(1)


def test_the_block_narrows_where_it_loses_rank_and_closes_with_all_copies():
    # Copies 1, 2, 5 and a fourth value 12 times: a start of width 4 sees min(copies, 4) of each.
    values = np.repeat([3.0, -1.0, 2.0, 0.5], [1, 2, 5, 12])
    matrix = planted(values)
    run = BlockRun(as_operator(matrix), gaussian(20, 4))
    run.extend(20)
    assert run.closed
    assert run.num_matvecs == 1 + 2 + 4 + 4
    expected = np.sort(np.repeat([3.0, -1.0, 2.0, 0.5], [1, 2, 4, 4]))
    assert np.allclose(run.ritz()[0], expected, atol=1e-10)
    assert orthogonality(run.basis) < 1e-12
    assert run.guard < 1e-11


def test_a_space_that_is_spanned_ends_the_run():
    values = np.linspace(-1, 1, 10)
    run = BlockRun(as_operator(planted(values)), gaussian(10, 4))
    run.extend(9)
    assert run.closed
    assert run.num_matvecs == 10
    assert np.allclose(run.ritz()[0], values, atol=1e-13)
    for which, truth in (("LA", values[::-1]), ("SA", values)):
        low, high = run.bounds(4, which)
        assert (low <= truth[:4]).all()
        assert (truth[:4] <= high).all()
        assert (high - low).max() < 1e-12


def test_a_zero_operator_closes_at_once():
    run = BlockRun(as_operator(torch.zeros(6, 6, dtype=torch.float64)), gaussian(6, 2))
    run.extend(5)
    assert (run.closed, run.num_matvecs) == (True, 2)
    assert np.allclose(run.ritz()[0], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_products_and_bases_stay_within_the_guard(dtype):
    values = np.concatenate([[5.0, 5.0, 4.0], np.linspace(-1, 1, 297)])
    matrix = planted(values)
    single = FunctionOperator(
        lambda v: (matrix.float() @ v).to(torch.float32), (300, 300), torch.float32
    )
    run = BlockRun(single, gaussian(300, 4), basis_dtype=dtype)
    run.extend(9)
    top = np.sort(run.ritz()[0])[::-1][:3]
    assert 1e-8 < run.guard < 1e-3
    assert np.abs(top - [5, 5, 4]).max() <= run.guard
    assert orthogonality(run.basis) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_sums_go_through_the_operator_where_entries_are_spread():
    values = np.concatenate([[3.0, 2.5], np.linspace(-1, 1, 38)])
    # Both halves hold the same numbers, so that a doubled sum is the whole one.
    matrix = planted(values)
    halves = _Halves(40)
    halves._matmat = lambda block: matrix @ block
    whole = BlockRun(as_operator(matrix), gaussian(40, 3))
    spread = BlockRun(halves, gaussian(40, 3))
    for run in (whole, spread):
        run.extend(5)
    assert np.allclose(whole.ritz()[0], spread.ritz()[0], atol=1e-11)
    assert orthogonality(2**0.5 * spread.basis) < 1e-12


def test_an_interrupt_keeps_the_last_complete_step():
    matrix = planted(np.linspace(-1, 2, 50))
    left = [7]

    def product(vector):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return matrix @ vector

    run = BlockRun(FunctionOperator(product, (50, 50)), gaussian(50, 3))
    with pytest.raises(KeyboardInterrupt):
        run.extend(5)
    assert (run.num_steps, run.num_matvecs, run.basis.shape[1]) == (2, 6, 6)
    left[0] = 1000
    run.extend(3)
    straight = block_lanczos(matrix, gaussian(50, 3), 5)
    assert np.allclose(run.ritz()[0], straight.ritz_values, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 3), (3, 5), (6, 8)])
def test_the_floor_of_a_gaussian_matrix_holds_as_often_as_stated(rows, columns):
    rng = np.random.default_rng(rows + 10 * columns)
    smallest = np.linalg.svd(rng.standard_normal((20000, rows, columns)), compute_uv=False)[:, -1]
    for allowed in (0.05, 0.3):
        below = float((smallest < gaussian_floor(rows, columns, allowed)).mean())
        assert below <= allowed + 4 * (allowed / 20000) ** 0.5
        # The bound of the density is sharp where the value is small.
        assert below > allowed / 3


@pytest.mark.parametrize("kind", ["copies", "cluster", "plain"])
def test_bounds_hold_on_planted_spectra(kind):
    """60 spectra of each kind at a failure probability of 0.1, looked at four times each."""
    rng = np.random.default_rng(["copies", "cluster", "plain"].index(kind))
    misses = narrow = 0
    for trial in range(60):
        size, width = int(rng.integers(60, 120)), int(rng.integers(2, 7))
        k, sign = int(rng.integers(1, width + 1)), (-1) ** trial
        copies = 1 if kind == "plain" else int(rng.integers(2, 9))
        top = 3.0 + (1e-3 if kind == "cluster" else 0.0) * rng.standard_normal(copies)
        values = np.concatenate([top, rng.uniform(-2, 2.5, size - copies)])
        truth = sign * np.sort(values)[::-1][:k]
        run = BlockRun(as_operator(diagonal(sign * values)), gaussian(size, width, 1000 + trial))
        missed = False
        for steps in (3, 2, 2, 3):
            run.extend(steps)
            low, high = run.bounds(k, "LA" if sign > 0 else "SA", 0.1)
            missed |= bool((low > truth + 1e-10).any() or (high < truth - 1e-10).any())
        misses += missed
        narrow += bool((high - low).max() < 1)  # a fifth of the spectrum
    assert misses <= 10  # 6 expected at most; 11 or more have a chance of 3 %
    assert narrow >= 30


def test_bounds_come_down_to_the_residuals_once_the_next_value_is_excluded():
    values = np.concatenate([[4.0, 4.0, 3.0], np.linspace(-1, 1, 497)])
    operator = as_operator(diagonal(values))
    run = BlockRun(operator, start_for(operator, 0, 6))
    assert np.isinf(run.bounds(3)[1]).all()
    run.extend(11)
    low, high = run.bounds(3)
    assert (low <= [4, 4, 3]).all()
    assert (high >= [4, 4, 3]).all()
    assert (high - low).max() < 1e-3
    # A fourth copy is excluded as well: beyond the third value there is a gap.
    assert run.bounds(4)[1][3] < 2.9


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, s: block_lanczos(m, s[:, 0], 2), ShapeError, r"\(n, p\)"),
        (lambda m, s: block_lanczos(m, s[:3], 2), ShapeError, "n = 8"),
        (lambda m, s: block_lanczos(m[:2], s, 2), ShapeError, "square"),
        (lambda m, s: block_lanczos(m, s, 0), InvalidArgumentError, "num_steps"),
        (lambda m, s: block_lanczos(m, 0 * s, 2), InvalidArgumentError, "not be zero"),
        (lambda m, s: block_lanczos(m, s / 0, 2), InvalidArgumentError, "finite"),
        (lambda m, s: BlockRun(as_operator(m), s).bounds(3), InvalidArgumentError, "at most the 2"),
        (lambda m, s: BlockRun(as_operator(m), s).bounds(1, "LM"), InvalidArgumentError, "which"),
        (
            lambda m, s: BlockRun(as_operator(m), s).bounds(1, "LA", 0.7),
            InvalidArgumentError,
            "failure_probability",
        ),
        (
            lambda m, s: BlockRun(as_operator(m), s, basis_dtype=torch.float16),
            InvalidArgumentError,
            "basis_dtype",
        ),
        (lambda m, s: block_lanczos(lambda v: v * float("nan"), s, 2), NonFiniteError, "finite"),
        (lambda m, s: block_lanczos(skewed, s, 4), AsymmetricOperatorError, "not symmetric"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(planted(np.linspace(1, 2, 8)), gaussian(8, 2))
