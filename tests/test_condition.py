"""Statuses, messages and limits of ``condition_number``."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from planted import diagonal, planted

from conditioning import condition_number, lanczos
from conditioning.errors import InvalidArgumentError, NonFiniteError, ShapeError
from conditioning.operators.base import FunctionOperator, MatrixOperator


def multiply(values):
    """The diagonal operator, by its products only: too large for the dense route."""
    diagonal_of = torch.as_tensor(values)
    return FunctionOperator(lambda v: diagonal_of * v, (len(values),) * 2)


def test_a_small_generic_operator_is_exact():
    values = np.linspace(-3, 7, 150)
    result = condition_number(planted(values))
    assert result.status == "exact"
    assert result.value == pytest.approx(7 / np.abs(values).min(), rel=1e-9)
    assert result.low <= 7 / np.abs(values).min() <= result.high
    assert result.high / result.low < 1 + 1e-9


def test_a_degenerate_operator_is_exhausted_after_its_distinct_eigenvalues():
    values = np.repeat([1.0, -1.0, 2.0, -2.0, 0.25], 60)
    result = condition_number(planted(values))
    assert (result.status, result.distinct) == ("exhausted", 5)
    assert result.num_matvecs == 6  # five steps and the product that measures the noise
    assert result.value == pytest.approx(8.0, rel=1e-10)
    assert 8.0 in result.estimate


def test_a_large_gap_is_certified_with_few_products():
    values = np.concatenate([np.linspace(2, 10, 9000), [0.5]])
    operator = multiply(values)
    result = condition_number(operator)
    assert result.status == "certified"
    assert result.num_matvecs < 150
    assert result.low <= 20 <= result.high <= result.low * 1.01


def test_what_cannot_be_certified_is_a_lower_bound_with_its_price():
    values = np.logspace(-7, 0, 9000)
    operator = multiply(values)
    result = condition_number(operator, max_matvecs=60)
    assert result.status == "lower bound only"
    assert math.isinf(result.high)
    assert 1 < result.low <= 1e7
    assert result.value == result.low
    for part in ("is certain", "certifying would take about", "products", "GiB"):
        assert part in result.message


def test_eigenvalues_on_both_sides_of_the_threshold_are_reported():
    values = np.concatenate([np.linspace(1, 2, 40), [3e-10, 5e-11]])
    for method in ("dense", "lanczos"):
        result = condition_number(planted(values), method=method)
        assert result.status == "depends on threshold"
        assert result.below_threshold == pytest.approx(5e-11, rel=1e-2)
        assert result.above_threshold == pytest.approx(3e-10, rel=1e-2)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_what_lies_below_the_rounding_is_not_resolvable(method):
    values = np.concatenate([np.linspace(1, 2, 60), np.full(20, 1e-9)])
    noisy = planted(values, dtype=torch.float32)
    operator = FunctionOperator(lambda v: noisy @ v, (80, 80), torch.float32)
    result = condition_number(operator, method=method)
    assert result.status in ("not resolvable", "exact")
    if method == "lanczos":
        assert result.status == "not resolvable"
        assert "float64" in result.message


def test_a_raised_threshold_is_part_of_the_result():
    values = np.concatenate([np.linspace(1, 2, 60)])
    result = condition_number(planted(values, dtype=torch.float32), method="lanczos")
    assert result.zero_threshold > 1e-10 * 2
    assert result.status in ("certified", "exhausted")
    assert result.low <= 2 * (1 + 1e-6)
    assert result.high >= 2 * (1 - 1e-6)


@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
@pytest.mark.parametrize("percentile", [None, 10])
def test_a_zero_operator_says_so_in_words(method, percentile):
    zero = torch.zeros(30, 30, dtype=torch.float64)
    result = condition_number(zero, method=method, percentile=percentile)
    assert "zero operator" in result.message
    assert "zero operator" in str(result)
    assert math.isnan(result.value)
    assert result.nullity.value == 30
    json.dumps(result.to_dict())


def test_the_null_space_is_counted_and_kept_out():
    values = np.concatenate([np.zeros(25), np.linspace(1, 4, 75), -np.linspace(1, 4, 50)])
    dense = condition_number(planted(values), method="dense")
    assert (dense.nullity.low, dense.nullity.value, dense.nullity.high) == (25, 25, 25)
    assert dense.value == pytest.approx(4.0, rel=1e-9)
    lanczos = condition_number(planted(values), method="lanczos")
    assert 25 in lanczos.nullity
    assert lanczos.low <= 4.0 <= lanczos.high


@pytest.mark.parametrize("q", [0, 10, 50, 90])
def test_percentiles_are_those_of_numpy(q):
    values = np.random.default_rng(0).standard_normal(201)
    expected = np.abs(values).max() / np.percentile(np.abs(values), q)
    dense = condition_number(planted(values), percentile=q)
    assert dense.value == pytest.approx(expected, rel=1e-9)
    assert dense.status == "exact"
    lanczos = condition_number(planted(values), percentile=q, method="lanczos")
    assert lanczos.low <= expected <= lanczos.high


def test_a_percentile_inside_the_null_space_is_not_resolvable():
    values = np.concatenate([np.zeros(40), np.linspace(1, 4, 60)])
    for method in ("dense", "lanczos"):
        result = condition_number(planted(values), percentile=10, method=method)
        assert result.status == "not resolvable"


def test_an_own_limit_is_kept_on_every_route():
    matrix = planted(np.linspace(0.1, 5, 300))
    for limit in (5, 40, 200, 299, 300, 301, 700):
        for percentile in (None, 10):
            operator = MatrixOperator(matrix)
            result = condition_number(operator, max_matvecs=limit, percentile=percentile)
            assert result.num_matvecs == operator.num_matvecs <= limit
            assert (result.status == "exact") <= (limit >= 300)


def test_the_same_seed_gives_the_same_result_and_the_global_generator_is_untouched():
    matrix = planted(np.linspace(1, 5, 300))
    state = torch.get_rng_state()
    first = condition_number(matrix, method="lanczos", seed=4)
    second = condition_number(matrix, method="lanczos", seed=torch.Generator().manual_seed(4))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())


def test_an_interrupted_run_continues_from_its_checkpoint(tmp_path):
    values = torch.linspace(1, 5, 9000, dtype=torch.float64)
    products = []

    def matvec(vector):
        products.append(1)
        if len(products) == 30:
            raise KeyboardInterrupt
        return values * vector

    operator = FunctionOperator(matvec, (9000, 9000))
    with pytest.raises(KeyboardInterrupt):
        condition_number(operator, checkpoint=tmp_path / "run.pt")
    resumed = condition_number(operator, checkpoint=tmp_path / "run.pt")
    plain = condition_number(multiply(values))
    assert (resumed.value, resumed.low, resumed.high) == (plain.value, plain.low, plain.high)
    assert resumed.num_matvecs < plain.num_matvecs - 15


def test_size_one_and_two():
    assert condition_number(torch.tensor([[-3.0]], dtype=torch.float64)).value == 1.0
    assert condition_number(diagonal([2.0, -8.0])).value == pytest.approx(4.0)


def test_results_are_frozen_and_print_as_one_line():
    result = condition_number(planted(np.linspace(1, 5, 60)))
    assert "\n" not in str(result)
    assert str(result).startswith("kappa = 5")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = 0.0
    assert set(json.loads(json.dumps(result.to_dict()))) >= {"value", "low", "high", "status"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rtol": 0.0}, "rtol"),
        ({"rtol": 1.5}, "rtol"),
        ({"rtol": float("nan")}, "rtol"),
        ({"rtol": "small"}, "rtol"),
        ({"zero_rtol": -1.0}, "zero_rtol"),
        ({"percentile": 100}, "percentile"),
        ({"percentile": -1}, "percentile"),
        ({"max_matvecs": 0}, "max_matvecs"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"method": "arnoldi"}, "auto, dense, lanczos"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_options_out_of_range_are_named(options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        condition_number(torch.eye(40, dtype=torch.float64), **options)


def test_operators_of_the_wrong_kind_are_named():
    with pytest.raises(ShapeError, match="square"):
        condition_number(torch.ones(3, 4))
    with pytest.raises(ShapeError, match="not symmetric"):
        condition_number(torch.triu(torch.ones(4, 4)))
    with pytest.raises(InvalidArgumentError, match="Expected an operator"):
        condition_number("hessian")
    for other in (torch.zeros(0, 0), torch.eye(5).to_sparse(), torch.eye(5).long()):
        with pytest.raises(ShapeError, match="dense floating-point matrix"):
            condition_number(other)
    with pytest.raises(NonFiniteError, match="not finite"):
        condition_number(torch.full((4, 4), float("nan"), dtype=torch.float64))


def depth_two(moment, num_units):
    """The Hessian of a depth-2 linear net at zero, ``[[0, A^T], [A, 0]]`` for each unit."""
    dim = len(moment)

    def matvec(vector):
        first, second = vector.reshape(num_units, 2, dim, dim).unbind(1)
        products = [second.transpose(1, 2) @ moment, moment @ first.transpose(1, 2)]
        return torch.stack(products, dim=1).reshape(-1)

    return FunctionOperator(matvec, (2 * num_units * dim**2,) * 2)


@pytest.mark.parametrize("dim", [3, 5, 8, 10])
@pytest.mark.parametrize("seed", range(5))
def test_degenerate_pairs_are_exhausted_also_where_rounding_has_grown(dim, seed):
    """The residual after 2 d steps is up to 1e-5 here, where exact arithmetic has zero."""
    rng = np.random.default_rng(seed)
    moment = torch.from_numpy(rng.standard_normal((dim, dim)))
    singular = torch.linalg.svdvals(moment)
    result = condition_number(depth_two(moment, 16), method="lanczos", seed=seed)
    assert (result.status, result.distinct) == ("exhausted", 2 * dim)
    assert result.num_matvecs <= 2 * dim + 1
    assert result.value == pytest.approx(float(singular[0] / singular[-1]), rel=1e-9)
    assert float(singular[0] / singular[-1]) in result.estimate
    assert 0 < result.failure_probability <= 0.05


def test_a_null_space_does_not_keep_a_closed_run_open():
    values = np.append(np.resize([1.0, 2.0, 3.0, -1.0, -2.0, -3.0], 600), np.zeros(40))
    result = condition_number(multiply(values), method="lanczos")
    assert result.status == "exhausted"
    assert 3.0 in result.estimate
    assert math.isfinite(result.high)
    assert 40 in result.nullity


@pytest.mark.parametrize("gap", [1e-8, 1e-6, 1e-4])
def test_a_near_duplicate_of_the_smallest_is_inside_the_enclosure(gap):
    base = np.linspace(-10, 10, 21) + 0.09
    for seed in range(10):
        values = np.random.default_rng(seed).choice(base, 300)
        values[:21] = base
        values[-1] = base[np.abs(base).argmin()] * (1 - gap)
        result = condition_number(multiply(values), method="lanczos", seed=seed)
        assert np.abs(values).max() / np.abs(values).min() in result.estimate


def test_outliers_over_a_small_bulk_are_not_taken_for_a_closed_space():
    bulk = 1e-4 * np.random.default_rng(3).uniform(0.1, 1, 1960)
    operator = multiply(np.concatenate([np.linspace(1, 10, 40), bulk]))
    start = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert lanczos(operator, start, 100).basis.shape == (2000, 100)
    assert condition_number(operator, method="lanczos", max_matvecs=100).status != "exhausted"


def test_nothing_is_certified_above_a_threshold_that_was_not_asked_for():
    values = np.concatenate([np.linspace(1, 10, 200), np.geomspace(1e-8, 1e-6, 5)])
    for budget in range(40, 140, 7):
        result = condition_number(multiply(values), method="lanczos", max_matvecs=budget)
        assert result.low <= 1e9 <= result.high
        assert result.zero_threshold == pytest.approx(1e-9, rel=1e-3)


def test_what_ended_the_run_is_said():
    operator = multiply(np.linspace(1e-3, 2, 20000))
    result = condition_number(operator, memory_budget=8 * 20000 * 50)
    assert "memory_budget" in result.message
    assert result.num_matvecs == 51
    assert "max_matvecs" in condition_number(operator, max_matvecs=30).message


def test_sizes_whose_squares_leave_float64_are_refused():
    fine = condition_number(multiply(np.linspace(1, 3, 100) * 1e-120), method="lanczos")
    assert 3.0 in fine.estimate
    for scale in (1e-170, 1e170):
        with pytest.raises(NonFiniteError, match="scale of the loss"):
            condition_number(multiply(np.linspace(1, 3, 100) * scale), method="lanczos")


def test_a_checkpoint_that_cannot_be_written_or_read_is_said_before_the_run(tmp_path):
    operator = multiply(np.linspace(1, 3, 9000))
    for path in (tmp_path / "nowhere" / "run.pt", tmp_path):
        with pytest.raises(InvalidArgumentError, match="checkpoint"):
            condition_number(operator, checkpoint=path)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(InvalidArgumentError, match="not the checkpoint"):
        condition_number(operator, checkpoint=tmp_path / "junk.pt")
    assert operator.num_matvecs == 0
