"""Extreme singular values: enclosures against dense truth, statuses, limits and bad input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from planted import KINDS, random_spectrum
from scipy.sparse.linalg import aslinearoperator
from scipy.stats import binom
from torch import nn

from conditioning.errors import (
    AsymmetricOperatorError,
    DenseTooLargeError,
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
)
from conditioning.krylov import random_start
from conditioning.krylov.bidiagonal import BidiagonalRun
from conditioning.operators import FunctionOperator, JacobianOperator, MatrixOperator
from conditioning.spectrum.singular import singular_range


def rectangular(values, extra=(0, 0), seed=0, dtype=torch.float64):
    """A matrix with these singular values, with more rows or columns than their number."""
    values = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(
            torch.randn(len(values) + more, len(values), dtype=torch.float64, generator=generator)
        )[0]
        for more in extra
    ]
    return ((sides[0] * values) @ sides[1].T).to(dtype)


def products_of(matrix):
    """The operator of a matrix that is known by its products alone."""
    return FunctionOperator(
        lambda v: matrix @ v, tuple(matrix.shape), matrix.dtype,
        symmetric=False, rmatvec=lambda v: matrix.T @ v,
    )  # fmt: skip


def contains(result, values, slack=5e-15):
    """Whether both enclosures hold, up to the rounding of the dense reference."""
    error = slack * values[0]
    return (
        result.largest.low - error <= values[0] <= result.largest.high + error,
        result.smallest.low - error <= values[-1] <= result.smallest.high + error,
    )


def svd(matrix):
    return torch.linalg.svdvals(matrix.double()).numpy()


# ------------------------------------------------------------------------- as a claim


def count_misses(kind, failure_probability, trials, dtype):
    asked = missed = 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, KINDS.index(kind)])
        values = np.abs(random_spectrum(kind, rng))[:140]
        more = int(rng.integers(0, 60))
        matrix = rectangular(values, [(0, 0), (more, 0), (0, more)][trial % 3], trial, dtype)
        budget = int(rng.integers(10, 250))
        result = singular_range(
            products_of(matrix), failure_probability=failure_probability, max_matvecs=budget,
            method="lanczos", seed=trial,
        )  # fmt: skip
        assert result.num_matvecs <= budget
        inside = contains(result, svd(matrix))
        asked += 2
        missed += 2 - sum(inside)
    return asked, missed


@pytest.mark.parametrize(("dtype", "trials"), [(torch.float64, 25), (torch.float32, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_enclosure_contains_the_dense_singular_value(kind, dtype, trials, capsys):
    asked, missed = count_misses(kind, 1e-6, trials, dtype)
    with capsys.disabled():
        print(f"\n  {kind}, {dtype}: {asked - missed} of {asked} enclosures contain the truth")
    assert missed == 0


def test_a_large_allowance_is_not_exceeded(capsys):
    asked, missed = count_misses("hidden", 0.2, 40, torch.float64)
    with capsys.disabled():
        print(f"\n  hidden: {missed} of {asked} enclosures miss the truth (stated: up to 20 %)")
    # Per result, which has two ends: both share the allowance.
    assert missed <= binom.isf(1e-3, asked // 2, 0.2)


@pytest.mark.parametrize("shape", [(0, 0), (70, 0), (0, 50)])
def test_both_ends_reach_the_tolerance_asked_for(shape):
    matrix = rectangular(np.linspace(0.5, 1.5, 200), shape)
    for rtol in (1e-1, 1e-2, 1e-3):
        result = singular_range(products_of(matrix), rtol, method="lanczos")
        assert result.status == "certified"
        assert all(contains(result, [1.5, 0.5]))
        for end in (result.largest, result.smallest):
            assert end.high <= end.low * (1 + rtol)
    assert result.num_matvecs < 400


def test_an_absolute_width_is_enough_where_asked_for():
    matrix = rectangular(np.linspace(1e-3, 1, 300))
    result = singular_range(products_of(matrix), atol=0.02, method="lanczos")
    assert result.status == "certified"
    assert all(contains(result, [1, 1e-3]))
    assert result.smallest.high - result.smallest.low <= 0.02
    assert result.num_matvecs < 200


def test_the_largest_alone_takes_fewer_products():
    matrix = rectangular(np.concatenate([[3.0], np.linspace(1e-3, 1, 299)]))
    both = singular_range(products_of(matrix), method="lanczos", max_matvecs=500)
    largest = singular_range(products_of(matrix), method="lanczos", which="largest")
    assert largest.status == "certified"
    assert largest.num_matvecs < both.num_matvecs / 5
    assert all(contains(largest, [3, 1e-3]))


def test_tiny_singular_values_are_resolved_far_below_the_gram_matrix():
    values = np.concatenate([[1e-10], np.linspace(0.5, 1, 299)])
    result = singular_range(products_of(rectangular(values, (40, 0))), method="lanczos")
    assert result.status == "certified"
    assert result.smallest.low > 0.99e-10
    assert 1e-10 in result.smallest


# ----------------------------------------------------------------------------- closing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(0, 0), (30, 0), (0, 30)])
@pytest.mark.parametrize("distinct", [[1.0], [0.0, 1.0], [0.5, 1.0, 2.0], [0.0, 0.3, 1.0, 1.7]])
def test_few_distinct_singular_values_close_the_krylov_space(distinct, shape, dtype):
    matrix = rectangular(np.repeat(distinct, 60), shape, dtype=dtype)
    result = singular_range(products_of(matrix), method="lanczos")
    assert result.status == "exhausted" or (result.status == "not resolvable" and not distinct[0])
    assert result.num_matvecs < 80
    assert all(contains(result, svd(matrix), 1e-13))
    assert result.largest.high <= result.largest.low * 1.01
    assert result.smallest.high - result.smallest.low <= 0.01 * distinct[-1]
    assert (result.smallest.low == 0) == (distinct[0] == 0)
    assert result.failure_probability == 1e-6


def test_the_identity_closes_at_once():
    result = singular_range(FunctionOperator(lambda v: v, (5000, 5000)))
    assert (result.status, result.num_matvecs) == ("exhausted", 3)
    assert abs(result.largest.high - 1) < 1e-5
    assert abs(result.smallest.low - 1) < 1e-5


def test_in_float32_a_second_start_vector_narrows_what_the_first_leaves_open():
    matrix = rectangular(np.ones(400), dtype=torch.float32)
    result = singular_range(products_of(matrix), method="lanczos")
    assert "start vectors" in result.message
    assert result.largest.high < 1.01
    assert result.smallest.low > 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
@pytest.mark.parametrize("shape", [(3, 7), (300, 200)])
def test_a_zero_operator_has_two_zeros(shape, method, dtype):
    result = singular_range(products_of(torch.zeros(shape, dtype=dtype)), method=method)
    assert result.largest.value == result.largest.high == result.smallest.value == 0
    assert result.status in ("exact", "exhausted")
    assert math.isnan(result.condition.value)


def test_all_singular_values_are_known_when_the_smaller_side_is_spanned():
    matrix = torch.randn(90, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = singular_range(products_of(matrix), rtol=1e-12, method="lanczos")
    values = svd(matrix)
    assert (result.status, result.num_matvecs) == ("exhausted", 81)
    assert result.failure_probability == 0
    assert result.smallest.value == pytest.approx(values[-1], rel=1e-12)
    assert result.largest.high - result.largest.low < 1e-12


# ---------------------------------------------------------------------------- statuses


def test_what_the_rounding_hides_is_not_resolvable():
    values = np.concatenate([[1e-9], np.linspace(0.5, 1, 299)])
    matrix = rectangular(values, dtype=torch.float32)
    result = singular_range(products_of(matrix), method="lanczos")
    assert result.status == "not resolvable"
    assert "float64" in result.message
    assert result.smallest.low == 0
    assert all(contains(result, svd(matrix)))
    assert result.smallest.high < 1e-5
    # A width that rounding does not reach is certified all the same.
    assert singular_range(products_of(matrix), atol=1e-2).status == "certified"


def test_a_null_space_without_closing_is_not_told_from_rounding():
    values = np.concatenate([np.zeros(60), np.linspace(0.5, 1, 240)])
    result = singular_range(products_of(rectangular(values, (0, 30))), method="lanczos")
    assert result.status == "not resolvable"
    assert result.smallest.low == 0
    assert result.smallest.high < 1e-13


def test_a_budget_that_ends_early_leaves_certain_ends_and_says_so():
    matrix = rectangular(np.linspace(1e-4, 1, 400))
    result = singular_range(products_of(matrix), max_matvecs=60, method="lanczos")
    assert result.status == "one-sided"
    assert "max_matvecs ended the run after" in result.message
    assert result.num_matvecs <= 60
    assert all(contains(result, [1, 1e-4]))
    assert math.isinf(result.condition.high)
    few = singular_range(products_of(matrix), max_matvecs=3, method="lanczos")
    assert few.num_matvecs == 3
    assert all(contains(few, [1, 1e-4]))


def test_a_wide_enclosure_says_that_it_is_wide():
    matrix = rectangular(np.linspace(0.5, 1, 300))
    result = singular_range(products_of(matrix), 1e-6, max_matvecs=100, method="lanczos")
    assert result.status == "certified"
    assert "wider than rtol=1e-06" in result.message
    assert all(contains(result, [1, 0.5]))


def test_a_run_ends_where_only_rounding_is_left():
    matrix = rectangular(np.linspace(0.5, 1.5, 300), dtype=torch.bfloat16)
    result = singular_range(products_of(matrix), 1e-3, method="lanczos")
    assert result.num_matvecs < 400
    assert "which is rounding. Use float64" in result.message
    assert all(contains(result, svd(matrix)))


def test_memory_bounds_the_steps():
    matrix = rectangular(np.linspace(1e-4, 1, 400))
    result = singular_range(products_of(matrix), memory_budget=20 * 4 * 800, method="lanczos")
    assert "the bases filled memory_budget" in result.message
    assert result.num_matvecs <= 21


def test_small_operators_are_exact_and_middling_ones_fall_back_to_it():
    small = rectangular(np.linspace(0, 1, 60), (0, 500))
    result = singular_range(products_of(small))
    assert result.status == "exact"
    assert result.num_matvecs == 62  # the smaller side, and two that measure the rounding
    assert "zero to rounding" in result.message
    assert all(contains(result, svd(small)))
    middling = rectangular(np.linspace(1e-5, 1, 200), (30, 0))
    result = singular_range(products_of(middling))
    assert result.status == "exact"
    assert result.num_matvecs <= 201 + 202
    assert all(contains(result, [1, 1e-5]))
    limited = singular_range(products_of(middling), max_matvecs=150)
    assert limited.status == "one-sided"


def test_the_rounding_of_float32_columns_is_in_the_exact_enclosure():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 30))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    x = torch.randn(3, 40, generator=generator)
    coarse = singular_range(JacobianOperator(model, x), method="dense")
    fine = svd(JacobianOperator(model.double(), x.double()).dense())
    assert coarse.noise > 1e-7
    assert all(contains(coarse, fine))


@pytest.mark.parametrize("value", [-2.0, 0.0, 1e-30])
def test_one_by_one(value):
    for method in ("auto", "lanczos"):
        operator = products_of(torch.tensor([[value]], dtype=torch.float64))
        result = singular_range(operator, method=method)
        assert abs(value) in result.largest
        assert abs(value) in result.smallest
        assert result.largest.value == pytest.approx(abs(value))


def test_other_forms_are_taken():
    matrix = rectangular(np.linspace(0.5, 2, 30), (10, 0))
    expected = singular_range(matrix)
    assert (expected.status, expected.num_matvecs) == ("exact", 0)
    for form in (matrix.numpy(), aslinearoperator(matrix.numpy()), MatrixOperator(matrix)):
        for method in ("auto", "lanczos"):
            result = singular_range(form, method=method, rtol=1e-9)
            assert result.largest.value == pytest.approx(2.0, rel=1e-9)
            assert result.smallest.value == pytest.approx(0.5, rel=1e-9)


def test_a_result_prints_and_converts():
    result = singular_range(rectangular([2.0, 1.0, 0.5]))
    assert str(result).startswith("sigma_max = 2 ± ")
    assert json.loads(json.dumps(result.to_dict()))["smallest"]["value"] == pytest.approx(0.5)
    assert 4 in result.condition


def test_one_seed_gives_one_result():
    matrix = rectangular(np.linspace(0.1, 1, 300))
    options = {"method": "lanczos", "max_matvecs": 120}
    assert singular_range(products_of(matrix), **options) == singular_range(
        products_of(matrix), **options
    )


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_refused(bad, method):
    matrix = torch.ones(200, 150, dtype=torch.float64)
    matrix[3, 4] = bad
    with pytest.raises(NonFiniteError):
        singular_range(products_of(matrix), method=method)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_wrong_transpose_is_found(method):
    matrix = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    operator = FunctionOperator(
        lambda v: matrix @ v, (200, 200), symmetric=False, rmatvec=lambda v: matrix @ v
    )
    with pytest.raises(AsymmetricOperatorError, match="rmatvec"):
        singular_range(operator, method=method)


def test_without_a_transpose_only_the_dense_route_is_open():
    matrix = rectangular(np.linspace(0.5, 2, 40), (0, 20))
    operator = FunctionOperator(lambda v: matrix @ v, (40, 60), symmetric=False)
    result = singular_range(operator)
    assert (result.status, result.num_matvecs) == ("exact", 62)
    assert all(contains(result, [2, 0.5]))
    for options in ({"method": "lanczos"}, {"max_matvecs": 20}):
        with pytest.raises(InvalidArgumentError, match="no product with its transpose"):
            singular_range(operator, **options)


def test_a_transpose_of_the_wrong_length_is_named():
    matrix = torch.ones(300, 200, dtype=torch.float64)
    operator = FunctionOperator(
        lambda v: matrix @ v, (300, 200), symmetric=False, rmatvec=lambda v: matrix @ matrix.T @ v
    )
    with pytest.raises(ShapeError, match=r"transposed operator has shape \(300,\)"):
        singular_range(operator, method="lanczos")


@pytest.mark.parametrize(
    "options",
    [
        {"rtol": 0}, {"rtol": 1}, {"atol": -1}, {"atol": float("nan")}, {"max_matvecs": 2},
        {"max_matvecs": 10.5}, {"failure_probability": 0.7}, {"which": "smallest"},
        {"method": "power"}, {"memory_budget": 0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        singular_range(torch.eye(3), **options)


def test_what_has_no_entries_or_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="no singular values"):
        singular_range(FunctionOperator(lambda v: v, (0, 0)))
    with pytest.raises(DenseTooLargeError):
        singular_range(products_of(torch.ones(50, 40)), method="dense", memory_budget=100)


# ------------------------------------------------------------------------- the run itself


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("shape", [(0, 0), (40, 0), (0, 40)])
def test_a_bidiagonal_run_is_the_lanczos_run_of_the_augmented_matrix(shape, batch):
    matrix = rectangular(np.linspace(0.2, 1, 120), shape)
    run = BidiagonalRun(products_of(matrix), random_start(120, 0, "cpu"))
    run._check_every = batch  # what devices do that read their scalars back in batches
    run.extend(14)
    run.extend(16)
    augmented = torch.zeros(2 * [sum(matrix.shape)], dtype=torch.float64)
    rows = matrix.shape[0]
    augmented[:rows, rows:], augmented[rows:, :rows] = matrix, matrix.T
    basis = torch.zeros(sum(matrix.shape), 30, dtype=torch.float64)
    first, second = (side.dense() for side in run._sides)
    near = slice(rows, None) if shape[0] >= shape[1] else slice(0, rows)
    far = slice(0, rows) if shape[0] >= shape[1] else slice(rows, None)
    basis[near, ::2], basis[far, 1::2] = first, second
    tridiagonal = torch.from_numpy(run.jacobi.dense())
    assert torch.allclose(basis.T @ basis, torch.eye(30).double(), atol=1e-14)
    rest = augmented @ basis - basis @ tridiagonal
    assert rest[:, :-1].abs().max() < 1e-14
    assert float(rest[:, -1].norm()) == pytest.approx(run.jacobi.residual_norm, rel=1e-10)
    assert run.jacobi.ritz_values == pytest.approx(-run.jacobi.ritz_values[::-1], abs=1e-14)


def test_a_ritz_vector_of_a_finished_run_is_a_singular_vector():
    matrix = rectangular(np.linspace(0.2, 1, 40), (10, 0))
    run = BidiagonalRun(products_of(matrix), random_start(40, 0, "cpu"))
    run.extend(100)
    assert (run.complete, run.num_steps, run.shape) == (True, 80, (50, 40))
    top = run.combine(torch.from_numpy(run.jacobi.ritz_vectors[:, -1:].copy()))[:, 0]
    assert float((matrix @ top).norm() / top.norm()) == pytest.approx(1.0, abs=1e-12)


def test_an_interrupted_run_goes_on_where_it_was():
    matrix = rectangular(np.linspace(0.2, 1, 100), (20, 0))
    whole = BidiagonalRun(products_of(matrix), random_start(100, 0, "cpu"))
    whole.extend(20)
    calls = []

    def interrupted(vector):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return matrix @ vector

    operator = FunctionOperator(
        interrupted, (120, 100), symmetric=False, rmatvec=lambda v: matrix.T @ v
    )
    run = BidiagonalRun(operator, random_start(100, 0, "cpu"))
    run._check_every = 5
    with pytest.raises(KeyboardInterrupt):
        run.extend(20)
    assert run.num_steps == 5
    run.extend(15)
    assert run.jacobi.off_diagonal == pytest.approx(whole.jacobi.off_diagonal, rel=1e-12)


def test_what_a_bidiagonal_run_does_not_offer_is_said(tmp_path):
    operator = products_of(rectangular([1.0, 2.0], (1, 0)))
    with pytest.raises(ShapeError, match="smaller side"):
        BidiagonalRun(operator, torch.ones(3))
    run = BidiagonalRun(operator, torch.ones(2))
    for action in (run.save, run.load):
        with pytest.raises(InvalidArgumentError, match="cannot be"):
            action(tmp_path / "run")
    assert not hasattr(run, "basis")
