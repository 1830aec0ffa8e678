"""``eigenvalues`` from a block: copies, enclosures, and what it does where a block cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import diagonal, planted

from conditioning import FunctionOperator, eigenvalues
from conditioning.errors import InvalidArgumentError

COPIES = np.concatenate([[3.0, 3.0, 3.0, -2.9, -2.9, 2.5], np.linspace(-1, 1, 294)])


@pytest.mark.parametrize(
    ("which", "truth"),
    [
        ("LM", [3.0, 3.0, 3.0, 2.9, 2.9]),
        ("LA", [3.0, 3.0, 3.0]),
        ("SA", [-2.9, -2.9]),
    ],
)
def test_all_copies_are_found_by_one_run(which, truth):
    k = len(truth)
    found = eigenvalues(planted(COPIES), k, which, rtol=1e-4, vectors=True, block_size=k + 6)
    assert found.status == "certified"
    assert "one block of" in found.message
    assert found.failure_probability == 1e-6
    for estimate, value in zip(found.values, truth, strict=True):
        ends = sorted((abs(estimate.low), abs(estimate.high)))
        assert ends[0] <= abs(value) + 1e-12
        assert abs(value) <= ends[1] <= 1.02 * ends[0]
    image = planted(COPIES) @ found.vectors - found.vectors * torch.from_numpy(found.numpy())
    assert (image.norm(dim=0).numpy() <= np.array(found.residual_norms) + 1e-12).all()


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_a_block_misses_no_more_often_than_stated(which):
    """30 spectra with copies or near ones at a failure probability of 0.1."""
    rng = np.random.default_rng(("LM", "LA", "SA").index(which))
    misses = certified = 0
    for trial in range(30):
        size, copies = int(rng.integers(100, 160)), int(rng.integers(1, 7))
        k = int(rng.integers(1, 5))
        sizes = 3.0 + rng.choice([0.0, 1e-9, 1e-2]) * rng.standard_normal(copies)
        signs = 1.0 if which != "LM" else rng.choice([-1.0, 1.0], copies)
        values = np.concatenate([sizes * signs, rng.uniform(-1.5, 1.5, size - copies)])
        values = -values if which == "SA" else values
        key = np.abs if which == "LM" else np.positive if which == "LA" else np.negative
        truth = np.sort(key(values))[::-1][:k]
        found = eigenvalues(
            diagonal(values), k, which, rtol=1e-2, seed=trial, failure_probability=0.1,
            block_size=k + int(rng.integers(0, 4)) or 2,
        )  # fmt: skip
        certified += found.status == "certified"
        keys = [sorted(key(np.array([e.low, e.high]))) for e in found.values]
        misses += any(
            not low - 1e-12 <= true <= high + 1e-12
            for (low, high), true in zip(keys, truth, strict=True)
        )
    assert certified >= 27
    assert misses <= 6  # 3 expected at most; 7 or more have a chance of 3 %


def test_where_a_block_closes_single_vectors_go_on():
    values = np.repeat([3.0, -1.0, 2.0, 0.5], [2, 50, 100, 48])
    found = eigenvalues(planted(values), 3, rtol=1e-4, block_size=4)
    assert found.status == "exhausted"
    assert "a block of 4 closed after" in found.message
    assert np.allclose(found.numpy(), [3, 3, 2], atol=1e-3)


def test_where_a_block_fills_the_memory_single_vectors_go_on():
    operator = FunctionOperator(lambda v: entries * v, (2000, 2000))
    entries = torch.linspace(-1, 1, 2000).double()
    entries[:3] = 4.0
    found = eigenvalues(operator, 3, rtol=1e-3, block_size=9, memory_budget=80 * 8 * 2000)
    assert "a block of 9 took 36 products, single vectors went on" in found.message
    assert found.status == "certified"
    assert operator.num_matvecs == found.num_matvecs


def test_without_a_certificate_a_block_stops_at_its_residuals():
    full = eigenvalues(planted(COPIES), 3, "LA", rtol=1e-2, block_size=6)
    short = eigenvalues(planted(COPIES), 3, "LA", rtol=1e-2, block_size=6, certify=False)
    assert short.status == "not certified"
    assert short.num_matvecs < full.num_matvecs
    assert np.allclose(short.numpy(), 3.0, atol=0.03)
    assert all(estimate.high >= 3.0 for estimate in short.values)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 2}, "between 3 and 60"),
        ({"block_size": 61}, "between 3 and 60"),
        ({"block_size": 4, "method": "power"}, "method='lanczos'"),
    ],
)
def test_blocks_out_of_range_are_named(options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        eigenvalues(planted(np.linspace(1, 2, 60)), 3, **options)
