"""Lanczos and power iteration: the identities that define them, and their ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import HostReads
from planted import diagonal, planted

from conditioning.errors import InvalidArgumentError, NonFiniteError, ShapeError
from conditioning.krylov import (
    LanczosRun,
    lanczos,
    make_generator,
    power_iteration,
    random_start,
)
from conditioning.operators.base import FunctionOperator, MatrixOperator

SPECTRA = {
    "decay": 0.7 ** np.arange(60),
    "indefinite": np.linspace(-3, 5, 80),
    "pairs": np.concatenate([np.linspace(1, 4, 30), -np.linspace(1, 4, 30)]),
    "dynamic range": np.logspace(-10, 0, 70),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_the_lanczos_relation_holds_and_the_basis_is_orthonormal(name, num_steps):
    matrix = planted(SPECTRA[name])
    start = random_start(len(matrix), 3, "cpu")
    basis, tridiagonal, residual = lanczos(lambda v: matrix @ v, start, num_steps)
    unit = torch.zeros(num_steps, dtype=torch.float64)
    unit[-1] = 1
    scale = matrix.abs().max()
    error = matrix @ basis - basis @ tridiagonal - torch.outer(residual, unit)
    assert error.abs().max() < 1e-13 * scale * num_steps
    identity = torch.eye(num_steps, dtype=torch.float64)
    assert (basis.T @ basis - identity).abs().max() < 1e-13
    assert (basis.T @ residual).abs().max() < 1e-13 * scale
    assert torch.allclose(basis[:, 0], start / start.norm(), atol=1e-14)


def test_steps_on_a_device_are_read_ten_at_a_time(monkeypatch):
    """Counted here on the host, in the way that a device's steps take."""
    read = torch.Tensor.tolist
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(1), read(t))[1])
    matrix = planted(np.linspace(1, 2, 90))
    run = LanczosRun(MatrixOperator(matrix), random_start(90, 0, "cpu"))
    run._check_every = 10
    run.extend(5)
    reads.clear()
    with HostReads() as others:
        run.extend(40)
    assert (len(reads), others.count) == (4, 0)


@pytest.mark.parametrize("distinct", [1, 2, 7, 20])
def test_the_space_closes_after_as_many_steps_as_there_are_distinct_eigenvalues(distinct):
    values = np.repeat(np.linspace(-2, 3, distinct + 1)[1:], 12)
    basis, tridiagonal, residual = lanczos(planted(values), random_start(len(values), 0, "cpu"), 50)
    assert basis.shape[1] == distinct
    # Rounding grows within the eigenspaces until it is all that is left of the residual.
    assert residual.norm() < 1e-8
    found = torch.linalg.eigvalsh(tridiagonal).numpy()
    assert np.allclose(found, np.unique(values), atol=1e-12)


def test_an_invariant_start_closes_at_once():
    basis, tridiagonal, residual = lanczos(
        diagonal([1.0, 2.0, 3.0]), torch.tensor([0.0, 5.0, 0]), 3
    )
    assert basis.shape == (3, 1)
    assert float(tridiagonal) == pytest.approx(2.0)
    assert residual.norm() == 0


def test_extending_in_pieces_equals_one_run():
    operator = MatrixOperator(planted(SPECTRA["indefinite"]))
    start = random_start(80, 1, "cpu")
    whole, pieces = LanczosRun(operator, start), LanczosRun(operator, start)
    whole.extend(70)
    for _ in range(7):
        pieces.extend(10)
    assert torch.equal(whole.basis, pieces.basis)
    assert np.array_equal(whole.jacobi.diagonal, pieces.jacobi.diagonal)


def test_a_saved_run_continues_without_loss(tmp_path):
    operator = MatrixOperator(planted(SPECTRA["indefinite"]))
    start = random_start(80, 1, "cpu")
    whole = LanczosRun(operator, start, measure_noise=True)
    whole.extend(30)
    first = LanczosRun(operator, start, measure_noise=True)
    first.extend(12)
    first.save(tmp_path / "run.pt")
    second = LanczosRun(operator, random_start(80, 99, "cpu"))
    second.load(tmp_path / "run.pt")
    second.extend(18)
    assert np.array_equal(whole.jacobi.diagonal, second.jacobi.diagonal)
    assert np.array_equal(whole.jacobi.off_diagonal, second.jacobi.off_diagonal)
    assert whole.guard == second.guard


def test_a_saved_run_of_other_parameters_is_refused(tmp_path):
    start = random_start(80, 1, "cpu")
    run = LanczosRun(MatrixOperator(planted(SPECTRA["indefinite"])), start)
    run.extend(12)
    run.save(tmp_path / "run.pt")
    other = LanczosRun(MatrixOperator(2 * planted(SPECTRA["indefinite"])), start)
    with pytest.raises(InvalidArgumentError, match="other parameters"):
        other.load(tmp_path / "run.pt")
    smaller = LanczosRun(MatrixOperator(planted([1.0, 2.0])), random_start(2, 1, "cpu"))
    with pytest.raises(InvalidArgumentError, match="80 rows"):
        smaller.load(tmp_path / "run.pt")


def test_deflated_runs_never_leave_the_rest_of_the_space():
    matrix = planted(SPECTRA["decay"])
    values, vectors = torch.linalg.eigh(matrix)
    locked = vectors[:, -3:]
    run = LanczosRun(MatrixOperator(matrix), random_start(60, 0, "cpu"), deflate=locked)
    run.extend(20)
    assert (locked.T @ run.basis).abs().max() < 1e-13
    assert run.jacobi.ritz_values[-1] == pytest.approx(float(values[-4]), rel=1e-9)


def test_ritz_values_lie_within_their_residuals_of_an_eigenvalue():
    values = SPECTRA["indefinite"]
    run = LanczosRun(MatrixOperator(planted(values)), random_start(80, 0, "cpu"))
    run.extend(30)
    distance = np.abs(run.jacobi.ritz_values[:, None] - values).min(axis=1)
    assert np.all(distance <= run.jacobi.residual_norms + run.guard)


def test_measured_noise_follows_the_dtype_of_the_products():
    values = SPECTRA["indefinite"]
    noise = {}
    for dtype in (torch.float32, torch.float64):
        run = LanczosRun(
            MatrixOperator(planted(values, dtype=dtype)), random_start(80, 0, "cpu"),
            measure_noise=True,
        )  # fmt: skip
        run.extend(20)
        noise[dtype] = run.noise
    assert 1e-8 < noise[torch.float32] < 1e-5
    assert noise[torch.float64] < 1e-14


@pytest.mark.parametrize("name", ["decay", "indefinite"])
def test_power_iteration_finds_the_dominant_eigenvalue(name):
    values = SPECTRA[name]
    result = power_iteration(planted(values), random_start(len(values), 0, "cpu"), 5000, 1e-8)
    truth = values[np.abs(values).argmax()]
    assert result.converged
    assert abs(result.value - truth) <= result.residual_norm + 1e-13
    matrix = planted(values)
    measured = (matrix @ result.vector - result.value * result.vector).norm()
    assert float(measured) == pytest.approx(result.residual_norm, rel=1e-3, abs=1e-12)


def test_power_iteration_converges_on_a_spectrum_symmetric_about_zero():
    values = SPECTRA["pairs"]
    result = power_iteration(planted(values), random_start(60, 2, "cpu"), 3000, 1e-6)
    assert result.converged
    assert abs(result.value) == pytest.approx(4.0, rel=1e-6)


def test_power_iteration_of_a_zero_operator_is_zero():
    result = power_iteration(torch.zeros(5, 5, dtype=torch.float64), torch.ones(5), 10)
    assert (result.value, result.converged, result.num_matvecs) == (0.0, True, 1)


def test_power_iteration_says_when_it_has_not_converged():
    result = power_iteration(planted(SPECTRA["pairs"]), random_start(60, 2, "cpu"), 3, 1e-10)
    assert not result.converged
    assert result.num_matvecs == 3


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: lanczos(m, torch.zeros(4), 2), InvalidArgumentError, "not zero"),
        (lambda m: lanczos(m, torch.ones(5), 2), ShapeError, r"shape \(4,\)"),
        (lambda m: lanczos(m, torch.ones(4), 0), InvalidArgumentError, "num_steps"),
        (lambda m: lanczos(m[:2], torch.ones(4), 2), ShapeError, "square"),
        (lambda m: lanczos("no", torch.ones(4), 2), InvalidArgumentError, "Expected an operator"),
        (lambda m: power_iteration(m, torch.ones(4), 5, 2.0), InvalidArgumentError, "rtol"),
        (lambda m: power_iteration(m, torch.zeros(4), 5), InvalidArgumentError, "not zero"),
        (lambda m: make_generator("x"), InvalidArgumentError, "seed"),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_named(bad):
    operator = FunctionOperator(lambda v: v * bad, (4, 4))
    with pytest.raises(NonFiniteError, match="not finite"):
        lanczos(operator, torch.ones(4), 3)
    with pytest.raises(NonFiniteError, match="not finite"):
        power_iteration(operator, torch.ones(4), 3)


@pytest.mark.parametrize("check_every", [1, 10])
def test_an_interrupted_run_keeps_what_is_complete(check_every, tmp_path):
    """Also on devices that read their scalars back in batches, and inside a step."""
    values = torch.linspace(1, 5, 60, dtype=torch.float64)
    products = []

    def matvec(vector):
        products.append(1)
        if len(products) == 24:
            raise KeyboardInterrupt
        return values * vector

    start = random_start(60, 0, "cpu")
    run = LanczosRun(FunctionOperator(matvec, (60, 60)), start)
    run._check_every = check_every
    with pytest.raises(KeyboardInterrupt):
        run.extend(40)
    run.save(tmp_path / "run.pt")
    resumed = LanczosRun(FunctionOperator(lambda v: values * v, (60, 60)), start)
    resumed.load(tmp_path / "run.pt")
    assert resumed.num_steps == 23 // check_every * check_every
    resumed.extend(40 - resumed.num_steps)
    whole = LanczosRun(FunctionOperator(lambda v: values * v, (60, 60)), start)
    whole.extend(40)
    assert np.allclose(resumed.jacobi.ritz_values, whole.jacobi.ritz_values, atol=1e-12)


def test_a_run_goes_on_after_products_that_were_not_finite(tmp_path):
    matrix = planted(SPECTRA["indefinite"])
    broken = []
    operator = FunctionOperator(lambda v: matrix @ v * (float("nan") if broken else 1), (80, 80))
    run = LanczosRun(operator, random_start(80, 0, "cpu"))
    run.extend(10)
    broken.append(1)
    with pytest.raises(NonFiniteError):
        run.extend(5)
    broken.clear()
    run.extend(10)
    whole = LanczosRun(MatrixOperator(matrix), random_start(80, 0, "cpu"))
    whole.extend(20)
    assert np.allclose(run.jacobi.ritz_values, whole.jacobi.ritz_values, atol=1e-12)


def test_a_start_inside_the_deflated_space_is_refused():
    matrix = torch.eye(4, dtype=torch.float64)
    with pytest.raises(InvalidArgumentError, match="projected out"):
        LanczosRun(MatrixOperator(matrix), matrix[0], deflate=matrix[:, :1])
