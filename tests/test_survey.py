"""One survey of a spectrum against planted ones: every enclosure, in every budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted import planted

from conditioning import FunctionOperator, condition_number
from conditioning.errors import InvalidArgumentError, NonFiniteError, ShapeError
from conditioning.spectrum import survey


def spectra():
    generator = np.random.default_rng(0)
    bulk = generator.normal(size=300)
    return {
        "positive": np.abs(bulk) + 0.2,
        "indefinite": np.concatenate([bulk * 0.3, [-9.0, 4.0, 7.0]]),
        "rank deficient": np.concatenate([np.abs(bulk[:250]) + 0.3, np.zeros(60)]),
        "hidden small": np.concatenate([np.abs(bulk) + 0.5, [1e-3]]),
        "clusters": np.repeat([1.0, 2.0, 5.0, 10.0, -3.0], 60),
        "wide": np.sign(bulk) * 10.0 ** generator.uniform(-4, 2, size=300),
        "negative": -(np.abs(bulk) + 0.1),
    }


def truth(values, zero_rtol=1e-10):
    magnitudes = np.sort(np.abs(values))
    kept = magnitudes[magnitudes > zero_rtol * magnitudes[-1]]
    tenth = np.percentile(magnitudes, 10)
    return magnitudes[-1] / kept[0], magnitudes[-1] / tenth if tenth else math.inf


@pytest.mark.parametrize("name", list(spectra()))
@pytest.mark.parametrize("budget", [60, 140, 280])
def test_every_enclosure_contains_the_truth(name, budget):
    values = spectra()[name]
    matrix = planted(values)
    found = survey(matrix, budget, dense=False, seed=1)
    assert found.num_matvecs <= budget
    assert values.max() in found.largest
    assert values.min() in found.smallest
    kappa, tenth = truth(values)
    slack = 1e-9
    assert found.condition.low <= kappa * (1 + slack)
    assert kappa <= found.condition.high * (1 + slack)
    assert found.condition.low <= found.condition.value <= found.condition.high
    if found.condition10.status in ("certified", "exhausted"):
        assert found.condition10.low <= tenth * (1 + slack)
        assert tenth <= found.condition10.high * (1 + slack)
    negative = float(np.mean(values < -1e-9))
    assert found.index.low <= negative <= found.index.high
    for level, estimate in found.quantiles.items():
        assert np.quantile(values, level) in estimate
    assert found.weights.sum() == pytest.approx(1)


def test_the_dense_route_is_exact():
    values = spectra()["wide"]
    found = survey(planted(values), 300)
    assert found.condition.status == "exact"
    assert found.num_probes == 0
    assert found.largest.value == pytest.approx(values.max())
    assert found.smallest.value == pytest.approx(values.min())
    assert found.trace.value == pytest.approx(values.sum())
    assert found.index.value == pytest.approx(np.mean(values < 0))
    assert found.condition.value == pytest.approx(truth(values)[0])
    assert found.condition10.value == pytest.approx(truth(values)[1])


def test_the_trace_is_that_of_its_own_function():
    values = spectra()["indefinite"]
    found = survey(planted(values), 280, dense=False).trace
    width = (found.high - found.low) / 2
    assert 0 < width < 30
    # An interval of 95 % is missed by twice its width once in ten thousand.
    assert abs(found.value - values.sum()) < 2 * width
    assert math.isnan(survey(planted(values), 40, dense=False).trace.value)  # no room for it


def test_it_ends_early_where_the_space_closes():
    found = survey(planted(spectra()["clusters"]), 200, dense=False)
    assert found.condition.status == "exhausted"
    assert found.condition.value == pytest.approx(10)
    assert found.num_matvecs < 60


def test_the_condition_number_is_that_of_its_own_function():
    matrix = planted(spectra()["positive"])
    alone = condition_number(matrix, method="lanczos", max_matvecs=150, seed=4)
    together = survey(matrix, 300, dense=False, seed=4).condition
    assert together.status == alone.status == "certified"
    assert together.value == pytest.approx(alone.value, rel=1e-2)


def test_a_zero_operator_is_said_to_be_one():
    found = survey(np.zeros((50, 50)), 30, dense=False)
    assert found.condition.largest.value == 0
    assert (found.largest.low, found.smallest.high) == pytest.approx((0, 0))
    assert found.index.high == 0
    assert math.isnan(found.condition.value)


def test_rounding_of_single_precision_is_in_the_enclosures():
    values = spectra()["indefinite"]
    matrix = planted(values).float()
    operator = FunctionOperator(
        lambda v: (matrix @ v.float()).double(), matrix.shape, torch.float64, "cpu"
    )
    found = survey(operator, 150, dense=False)
    assert values.max() in found.largest
    assert values.min() in found.smallest


def test_it_can_be_told_to_stop():
    calls = 0

    def stop():
        nonlocal calls
        calls += 1
        return calls == 3

    counted = []
    found = survey(
        planted(spectra()["wide"]), 250, dense=False, should_stop=stop, progress=counted.append
    )
    assert found.stopped
    assert not found.interrupted
    assert sum(counted) == found.num_matvecs == 31  # three times ten, and one for the noise
    assert "ended early" in found.message


@pytest.mark.parametrize("at", [5, 25, 110, 160])
def test_ctrl_c_keeps_what_is_known(at):
    values = spectra()["wide"]
    matrix = planted(values)
    count = 0

    def product(vector):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return matrix @ vector

    operator = FunctionOperator(product, matrix.shape, torch.float64, "cpu")
    if at < 10:
        with pytest.raises(KeyboardInterrupt):
            survey(operator, 200, dense=False)
        return
    found = survey(operator, 200, dense=False)
    assert found.stopped
    assert found.interrupted
    assert values.max() in found.largest


def test_bad_input():
    matrix = planted(spectra()["positive"])
    with pytest.raises(InvalidArgumentError, match="max_matvecs"):
        survey(matrix, 5)
    with pytest.raises(InvalidArgumentError, match="num_probes"):
        survey(matrix, 100, num_probes=0)
    with pytest.raises(InvalidArgumentError, match="failure_probability"):
        survey(matrix, 100, failure_probability=1.0)
    with pytest.raises(ShapeError, match="square"):
        survey(np.ones((3, 4)), 100)
    with pytest.raises(NonFiniteError):
        survey(np.full((20, 20), np.nan), 100, dense=False)


@pytest.mark.parametrize("budget", [80, 500])
def test_kappa_is_never_said_to_be_less_than_kappa_10(budget):
    values = torch.linspace(-1, 1, 3000, dtype=torch.float64)
    operator = FunctionOperator(lambda v: values * v, (3000, 3000), torch.float64, symmetric=True)
    found = survey(operator, budget, dense=False)
    assert found.condition.status == "lower bound only"
    assert found.condition.low <= 1 / float(values.abs().min())
    # Only where a tenth of the spectrum may be zero for all that is known, it does not follow.
    sure = found.condition10.smallest.low > found.condition.zero_threshold
    assert sure or budget < 500
    if sure:
        assert found.condition.low >= found.condition10.low
    assert found.num_matvecs < found.condition.needed_matvecs <= 3000
