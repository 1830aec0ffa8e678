"""Polar factors: right by every method, and never wrong in silence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.procrustes.polar import METHODS, polar

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = [(9, 4), (4, 9), (6, 6), (1, 1), (1, 5), (5, 1), (3, 9, 4), (2, 3, 4, 9)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_values(values, rows=None, columns=None, dtype=torch.float64):
    """A matrix with given singular values and random singular vectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    rows, columns = rows or len(values), columns or len(values)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))
    return ((left * values) @ right.mT).to(dtype)


def random_matrices(shape, dtype, *, is_complex=False):
    """Matrices with singular values between 0.1 and 10."""
    if is_complex:
        dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=dtype), full_matrices=False)
    return (u * torch.logspace(1, -1, s.shape[-1], dtype=s.dtype)) @ v


def truth(matrices):
    """Polar factors by SciPy in double precision."""
    exact = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64).numpy()
    flat = exact.reshape(-1, *exact.shape[-2:])
    return torch.from_numpy(
        np.stack([scipy.linalg.polar(one)[0] for one in flat]).reshape(exact.shape)
    )


def off(found, expected):
    return float((found.to(expected.dtype) - expected).abs().max())


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_scipys_factor(method, shape, dtype, is_complex):
    matrices = random_matrices(shape, dtype, is_complex=is_complex)
    before = matrices.clone()
    found = polar(matrices, method)
    assert off(found.factors, truth(matrices)) < TOLERANCES[dtype]
    assert found.factors.shape == matrices.shape
    assert torch.equal(matrices, before)
    if method in ("newton-schulz", "svd"):
        assert found.method == method
    if found.deficient is not None:
        assert found.deficient.shape == shape[:-2]
        assert not found.deficient.any()


def test_eigenvectors_of_the_gram_matrix_are_used_where_they_are_exact():
    assert polar(random_matrices((8, 4), torch.float32)).method == "eigh"
    mild = with_values(torch.linspace(1, 2, 6).double())
    assert polar(mild).method == "eigh"


@pytest.mark.parametrize("shape", [(64, 64), (200, 7), (7, 200), (5, 32, 16)], ids=str)
def test_newton_schulz_agrees_with_the_svd_for_random_matrices(shape):
    matrices = torch.randn(shape)
    found, exact = polar(matrices, "newton-schulz"), polar(matrices, "svd")
    # The worst of all singular values of the square ones is below 1e-2.
    assert found.method == "newton-schulz"
    assert off(found.factors, exact.factors) < 1e-5


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_a_matrix_does_not_matter(method, scale):
    matrix = random_matrices((8, 5), torch.float32)
    assert off(polar(scale * matrix, method).factors, truth(matrix)) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_squares_that_leave_the_range_of_single_precision_do_no_harm(method, scale):
    matrix = random_matrices((8, 5), torch.float32)
    assert off(polar(scale * matrix, method).factors, truth(matrix)) < 1e-5


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("method", METHODS)
def test_nor_do_those_that_leave_the_range_of_double_precision(method, scale):
    matrix = random_matrices((8, 5), torch.float64)
    assert off(polar(scale * matrix, method).factors, truth(matrix)) < 1e-11


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("method", ["eigh", "newton-schulz"])
def test_ill_conditioned_matrices_are_right_or_left_to_the_svd(method, condition, dtype):
    values = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    matrix = with_values(values, 40, dtype=dtype)
    found, exact = polar(matrix, method), polar(matrix, "svd")
    assert off(found.factors, exact.factors) < 1e-5
    if condition == 1e6:
        assert found.method == "svd"
        assert not found.deficient


@pytest.mark.parametrize("shape", [(12, 12), (30, 8), (8, 30)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rank_deficiency_is_found_by_every_method(method, dtype, shape):
    good = torch.randn(shape, dtype=dtype)
    rank_four = torch.randn(shape[0], 4, dtype=dtype) @ torch.randn(4, shape[1], dtype=dtype)
    twice = good.clone()
    if shape[0] <= shape[1]:
        twice[1] = twice[0]
    else:
        twice[:, 1] = twice[:, 0]
    matrices = torch.stack([good, rank_four, twice, torch.zeros(shape, dtype=dtype)])
    found = polar(matrices, method)
    assert found.method == "svd"
    assert found.deficient.tolist() == [False, True, True, True]
    assert torch.isfinite(found.factors).all()
    assert off(found.factors[0], truth(good)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_large_random_square_matrices_do_not_count_as_deficient(method):
    # As ill-conditioned as one in ten random matrices of 512 rows, in single precision: 512
    # roundings, the usual threshold, are 6e-5.
    values = torch.cat([torch.linspace(1, 0.01, 511), torch.tensor([4e-5])])
    matrix = torch.diag(values)[torch.randperm(512)]
    found = polar(matrix, method)
    assert found.deficient is None or not found.deficient
    identity = torch.eye(512, dtype=found.factors.dtype)
    assert off(found.factors.mT @ found.factors, identity) < 1e-5


def test_the_accuracy_of_entries_says_what_counts_as_zero():
    matrix = with_values([1.0, 0.5, 1e-4])
    assert not polar(matrix, "svd").deficient
    assert polar(matrix, "svd", rounding=1e-3).deficient
    assert not polar(matrix, "svd", rounding=1e-5).deficient


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_does_not_give_a_factor_in_silence(method, shape, dtype, bad):
    matrices = torch.randn(shape, dtype=dtype)
    matrices[1, 0, 0] = bad
    if math.isnan(bad):
        with pytest.raises(RuntimeError, match="non-finite"):
            polar(matrices, method)
    else:
        assert polar(matrices, method).deficient.tolist() == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_a_wide_matrix_stays_finite_where_its_larger_gram_matrix_is_singular(method):
    wide = torch.randn(16, 1000)
    factor = polar(wide, method).factors
    for _ in range(50):
        factor = polar(factor.float(), method).factors
    assert off(factor, truth(wide)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_is_its_own_factor(method):
    once = polar(torch.randn(20, 12).double(), method).factors
    assert off(polar(once, method).factors, once) < 1e-13


def test_single_precision_is_left_only_where_newton_schulz_allows():
    matrix = random_matrices((8, 4), torch.float32)
    assert polar(matrix, "newton-schulz").factors.dtype == torch.float32
    assert polar(matrix, "eigh").factors.dtype == torch.float64
    assert polar(matrix, "newton-schulz", rounding=1e-10).factors.dtype == torch.float64


OLD = {
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "nothing": lambda: None,
}


@pytest.fixture
def restored_precision():
    matmul = torch.backends.cuda.matmul
    yield matmul
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "none"
    matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("choice", OLD)
def test_tensorfloat_32_is_as_before_however_it_was_chosen(choice, restored_precision):
    OLD[choice]()
    before = restored_precision.allow_tf32, torch.get_float32_matmul_precision()
    assert before[0] == (choice != "nothing")
    polar(torch.randn(4, 3), "newton-schulz")
    assert (restored_precision.allow_tf32, torch.get_float32_matmul_precision()) == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs a newer torch"
)
@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_so_is_the_newer_setting(precision, restored_precision):
    restored_precision.fp32_precision = precision
    polar(torch.randn(4, 3), "newton-schulz")
    assert restored_precision.fp32_precision == precision


def test_tensorfloat_32_is_off_while_it_matters_and_restored_after_an_error(
    monkeypatch, restored_precision
):
    restored_precision.allow_tf32 = True
    newer = hasattr(restored_precision, "fp32_precision")
    seen = []

    def norm(*_args, **_options):
        seen.append(restored_precision.fp32_precision if newer else restored_precision.allow_tf32)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.linalg, "matrix_norm", norm)
    with pytest.raises(KeyboardInterrupt):
        polar(torch.randn(4, 3), "newton-schulz")
    assert seen == ["ieee" if newer else False]
    assert restored_precision.allow_tf32


@pytest.mark.parametrize("shape", [(3,), (), (0, 2), (2, 0), (0, 2, 2)], ids=str)
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ShapeError, match=r"matrices \(\.\.\., m, n\)"):
        polar(torch.ones(shape))


def test_an_unknown_method_is_refused():
    with pytest.raises(InvalidArgumentError, match="newton-schulz, svd, got 'qr'"):
        polar(torch.eye(2), "qr")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (9, 64, 64)], ids=str)
def test_newton_schulz_is_what_a_gpu_uses(shape):
    matrices = torch.randn(shape)
    found = polar(matrices.cuda())
    assert found.method == "newton-schulz"
    assert off(found.factors.cpu(), truth(matrices)) < 1e-4
