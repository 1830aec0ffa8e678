"""Runs that cannot certify are stopped with their price; those that can are not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from conditioning import FunctionOperator, HessianOperator, condition_number
from conditioning.jacobi import JacobiMatrix
from conditioning.spectrum.predict import needed_products
from experiments.models.shortcut_net import ShortcutNet


def diagonal(values):
    entries = torch.as_tensor(values, dtype=torch.float64)
    size = len(entries)
    return FunctionOperator(lambda v: entries * v, (size, size), torch.float64, symmetric=True)


def shortcut_hessian(width, depth, scale, span=2):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * width, width, dtype=torch.float64, generator=generator)
    inputs = torch.linalg.qr(inputs)[0] * math.sqrt(4 * width)
    teacher = torch.randn(width, width, dtype=torch.float64, generator=generator)
    targets = inputs @ teacher.T / math.sqrt(width)
    net = ShortcutNet(width, depth // span, span)
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(0, scale, generator=generator) if scale else None
    loss = lambda out, aim: ((out - aim) ** 2).sum(1).mean() / 2  # noqa: E731
    return HessianOperator(net, loss, [(inputs, targets)])


CERTIFIED = {
    "shortcuts, zero weights": lambda: shortcut_hessian(12, 8, 0.0),
    "shortcuts, wide": lambda: shortcut_hessian(24, 4, 0.0),
    "shortcuts, perturbed": lambda: shortcut_hessian(8, 8, 1e-2),
    "a gap of 1 to 12": lambda: diagonal(np.concatenate([np.linspace(1, 12, 3000), [-1.0]])),
    "150 distinct values over four orders": lambda: diagonal(np.repeat(np.logspace(-2, 0, 60), 50)),
    "close to n": lambda: diagonal(np.linspace(-1, 1, 300) ** 3 + 1e-4),
}


@pytest.mark.parametrize("name", CERTIFIED)
def test_what_gets_certified_is_never_stopped_and_takes_the_same_products(name):
    operator = CERTIFIED[name]()
    found, full = (
        condition_number(operator, method="lanczos", max_matvecs=800, stop_early=early)
        for early in (True, False)
    )
    assert found.status == full.status in ("certified", "exhausted")
    assert found.to_dict() == full.to_dict()
    assert found.needed_matvecs is None
    assert found.kappa_10 is None


TAILS = {
    "dense at zero": np.linspace(-1, 1, 4000) ** 3,
    "logarithmic tail": np.concatenate([np.logspace(-7, 0, 2000), -np.logspace(-7, 0, 2000)]),
    "outliers and a null space": np.concatenate(
        [np.zeros(300), np.logspace(-6, -2, 3690), np.linspace(0.3, 1, 10)]
    ),
}


@pytest.mark.parametrize("name", TAILS)
def test_what_cannot_be_certified_is_stopped_with_its_price_and_kappa_10(name):
    values = TAILS[name]
    operator = diagonal(values)
    found = condition_number(operator, method="lanczos", max_matvecs=400)
    full = condition_number(operator, method="lanczos", max_matvecs=400, stop_early=False)
    assert found.status == full.status == "lower bound only"
    assert full.num_matvecs == 400
    assert full.kappa_10 is None
    assert found.num_matvecs < 400
    kept = np.abs(values)[np.abs(values) > found.zero_threshold]
    assert 1 < found.low <= kept.max() / kept.min()
    assert found.low == found.value
    assert math.isinf(found.high)
    assert 400 < found.needed_matvecs <= 4000
    truth = kept.max() / np.quantile(np.abs(values), 0.1)
    assert found.kappa_10.low <= truth <= found.kappa_10.high
    for part in ("is certain", "stopped early", "the dense route takes 4000", "kappa_10"):
        assert part in str(found)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["needed_matvecs"] == found.needed_matvecs
    assert record["kappa_10"]["low"] == found.kappa_10.low


def test_a_stop_is_said_whatever_the_status():
    values = np.concatenate([np.linspace(-1e-2, 1e-2, 2990), np.linspace(0.3, 1, 10)])
    factors = torch.from_numpy(values).float()

    def product(vector):
        return (factors * vector + 20) - 20  # rounds as float32 intermediates of size 20 do

    operator = FunctionOperator(product, (3000, 3000), torch.float32)
    found = condition_number(operator, method="lanczos", max_matvecs=300)
    assert found.status == "not resolvable"
    used = found.num_matvecs
    assert used < 300
    assert f"Stopped early after {used} of max_matvecs=300 products" in str(found)
    full = condition_number(operator, method="lanczos", max_matvecs=300, stop_early=False)
    assert "topped early" not in str(full)
    assert full.num_matvecs == 300


def test_a_space_that_closed_in_rounding_is_not_taken_for_a_spent_budget():
    factors = torch.linspace(-1e-3, 1e-3, 3000)
    factors[:10] = torch.linspace(0.3, 1, 10)
    operator = FunctionOperator(lambda v: (factors * v + 10) - 10, (3000, 3000), torch.float32)
    found = condition_number(operator, method="lanczos", max_matvecs=300)
    assert found.num_matvecs < 30
    assert "max_matvecs" not in str(found)


SHAPES = {
    "both sides": (np.concatenate([np.linspace(-1, -0.1, 600), np.linspace(0.1, 1, 600)]), 80),
    "one side": (np.linspace(1 / 300, 1, 1200), 80),
    "outliers": (
        np.concatenate(
            [np.linspace(-1, -0.1, 600), np.linspace(0.1, 1, 600), np.linspace(30, 100, 10)]
        ),
        120,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_price_is_about_what_certifying_takes(name):
    values, budget = SHAPES[name]
    options = {"rtol": 0.9, "method": "lanczos", "stop_early": False}
    paid = condition_number(diagonal(values), max_matvecs=400, **options)
    short = condition_number(diagonal(values), max_matvecs=budget, **options)
    assert (paid.status, short.status) == ("certified", "lower bound only")
    assert budget < short.needed_matvecs
    assert 0.5 * paid.num_matvecs < short.needed_matvecs < 1.5 * paid.num_matvecs


def test_the_price_is_never_more_than_all_columns():
    # Chebyshev polynomials of the second kind: the bulk is [-1, 1].
    bulk = JacobiMatrix(np.zeros(50), np.full(49, 0.5), 0.5)
    assert needed_products(100.0, bulk, 1e17, 10_000) == pytest.approx(
        math.log(1e17) / 2 / math.asinh(0.01 * bulk.scale), rel=0.2
    )
    assert needed_products(1e9, bulk, 1e17, 10_000) == 10_000
