"""Extreme eigenvalues: multiplicities, enclosures, and what is said when it did not work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import diagonal, planted
from scipy.sparse.linalg import aslinearoperator

from conditioning import eigenvalues
from conditioning.errors import AsymmetricOperatorError, InvalidArgumentError
from conditioning.krylov import LanczosRun, random_start
from conditioning.operators.base import FunctionOperator, MatrixOperator
from conditioning.spectrum.measure import inverse_weight

RNG = np.random.default_rng(0)
SPECTRA = {
    "uniform": np.linspace(-5, 20, 200),
    "decay": np.concatenate([0.8 ** np.arange(40), np.zeros(60)]),
    "cluster": np.concatenate([np.full(3, 10.0), [9.99], RNG.uniform(-5, 5, 150)]),
    "multiplicity": np.repeat([3.0, -2.5, 2.0, -1.0, 0.5], 40),
    "negative": -np.linspace(1, 9, 120),
}
ORDERS = {"LM": lambda v: -np.abs(v), "LA": lambda v: -v, "SA": lambda v: v}


def wanted(values, which, k):
    return values[np.argsort(ORDERS[which](values), kind="stable")][:k]


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_them_with_multiplicity_and_encloses_each(name, which):
    values = SPECTRA[name]
    result = eigenvalues(planted(values), 5, which)
    assert result.status in ("certified", "exhausted")
    expected = wanted(values, which, 5)
    scale = np.abs(values).max()
    assert np.allclose(result.numpy(), expected, atol=2e-6 * scale)
    for estimate, true in zip(result.values, expected, strict=True):
        assert estimate.low - 1e-12 <= true <= estimate.high + 1e-12


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", ["decay", "multiplicity"])
def test_power_iteration_agrees_and_claims_no_more_than_it_knows(name, which):
    values = SPECTRA[name]
    result = eigenvalues(planted(values), 3, which, method="power", rtol=1e-5, max_matvecs=20000)
    assert result.status == "not certified"
    # Power iteration sees the edge of a cluster, not its members: compare where it is simple.
    if not (name == "decay" and which == "SA"):
        assert np.allclose(result.numpy(), wanted(values, which, 3), atol=1e-4)


def test_a_spectrum_symmetric_about_zero_is_no_trap():
    values = np.concatenate([np.linspace(1, 4, 50), -np.linspace(1, 4, 50)])
    for method in ("lanczos", "power"):
        result = eigenvalues(planted(values), 2, method=method, max_matvecs=5000)
        assert sorted(result.numpy()) == pytest.approx([-4, 4], abs=1e-4)


def test_vectors_are_orthonormal_and_have_the_stated_residuals():
    matrix = planted(SPECTRA["uniform"])
    for method in ("lanczos", "dense"):
        result = eigenvalues(matrix, 4, method=method, vectors=True)
        vectors = result.vectors
        assert vectors.shape == (200, 4)
        identity = torch.eye(4, dtype=torch.float64)
        assert (vectors.T @ vectors - identity).abs().max() < 1e-7
        residuals = (matrix @ vectors - vectors * torch.as_tensor(result.numpy())).norm(dim=0)
        assert np.all(residuals.numpy() <= np.array(result.residual_norms) + 1e-12)


def test_smallest_magnitudes_need_the_dense_route():
    values = SPECTRA["uniform"]
    with pytest.raises(InvalidArgumentError, match="condition_number"):
        eigenvalues(planted(values), 3, "SM")
    result = eigenvalues(planted(values), 3, "SM", method="dense")
    assert np.allclose(np.abs(result.numpy()), np.sort(np.abs(values))[:3], atol=1e-12)


def test_a_budget_that_is_too_small_is_said():
    matrix = planted(np.linspace(1, 2, 400))
    few = eigenvalues(matrix, 5, max_matvecs=12)
    assert few.status == "not converged"
    assert "max_matvecs" in few.message
    assert few.num_matvecs <= 12
    power = eigenvalues(matrix, 2, method="power", max_matvecs=12)
    assert power.status == "not converged"
    for limit in (2, 3, 7, 40):
        for method in ("lanczos", "power"):
            assert eigenvalues(matrix, 3, method=method, max_matvecs=limit).num_matvecs <= limit


@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_all_of_them_can_be_asked_for(size):
    values = np.arange(1.0, size + 1)
    result = eigenvalues(diagonal(values), size)
    assert np.allclose(result.numpy(), values[::-1], atol=1e-10)
    assert result.status == "exact"


def test_a_zero_operator_has_zero_eigenvalues():
    result = eigenvalues(torch.zeros(100, 100, dtype=torch.float64), 4)
    assert result.status == "exhausted"
    assert np.array_equal(result.numpy(), np.zeros(4))


def test_scipy_and_numpy_operators_are_taken():
    matrix = planted(SPECTRA["negative"]).numpy()
    for form in (matrix, aslinearoperator(matrix)):
        assert eigenvalues(form, 2).numpy() == pytest.approx([-9, -9 + 8 / 119], rel=1e-6)


def test_products_are_counted():
    operator = MatrixOperator(planted(SPECTRA["decay"]))
    assert eigenvalues(operator, 3).num_matvecs == operator.num_matvecs


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k must be a positive"),
        ({"k": 41}, "n = 40"),
        ({"k": 2.5}, "k must be a positive"),
        ({"which": "BE"}, "LM, LA, SA, SM"),
        ({"method": "qr"}, "lanczos, power, dense"),
        ({"rtol": 0}, "rtol"),
        ({"max_matvecs": 1}, "max_matvecs"),
        ({"failure_probability": 1}, "failure_probability"),
    ],
)
def test_options_out_of_range_are_named(options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        eigenvalues(torch.eye(40, dtype=torch.float64), **options)


@pytest.mark.parametrize("rtol", [1e-6, 1e-3])
def test_residuals_and_enclosures_are_those_of_the_whole_operator(rtol):
    """Pairs found one after the other are coupled: what is stated must include it."""
    for seed in range(25):
        values = np.random.default_rng(seed).uniform(0, 1e-4, 100)
        values[0] = 1
        matrix = diagonal(values)
        result = eigenvalues(matrix, 3, seed=seed, rtol=rtol, vectors=True)
        residuals = (
            matrix @ result.vectors - result.vectors * torch.as_tensor(result.numpy())
        ).norm(dim=0)
        assert np.all(residuals.numpy() <= np.array(result.residual_norms) + 1e-15)
        if result.status in ("certified", "exhausted"):
            for estimate, true in zip(result.values, np.sort(values)[::-1], strict=False):
                assert estimate.low - 1e-13 <= true <= estimate.high + 1e-13


def test_an_operator_that_is_not_symmetric_is_refused():
    operator = FunctionOperator(lambda v: torch.roll(v, 1), (500, 500))
    with pytest.raises(AsymmetricOperatorError, match="not symmetric"):
        eigenvalues(operator, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_value_takes_no_product_more_than_its_proof(seed):
    """It ends with the first product after which the Christoffel bound excludes a larger one."""
    values = np.concatenate([np.linspace(-1, 1, 599), [1.3]])
    run = LanczosRun(MatrixOperator(diagonal(values)), random_start(600, seed, "cpu"))
    mass = inverse_weight(600, 1e-6)
    while True:
        run.extend(1)
        largest = float(run.jacobi.ritz_values[-1])
        sides = (run.jacobi, run.jacobi.mirrored())
        if all(side.excludes_beyond(1.01 * largest, mass) for side in sides):
            break
    found = eigenvalues(diagonal(values), 1, rtol=1e-2, seed=seed)
    assert run.num_steps > 15
    assert found.num_matvecs == run.num_steps
