"""Singular values of weights near the ends of the range of floating point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conditioning.errors import NonFiniteError
from conditioning.singular import LayerOperator, singular_values
from conditioning.singular.scales import norm_of, power_of_two, scale_of


def made(exponent, **options):
    torch.manual_seed(0)
    unit = nn.Conv2d(2, 3, 3, padding=1, bias=False, **options).double()
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False, **options).double()
    with torch.no_grad():
        layer.weight.mul_(2.0**exponent)
    return unit, layer


def assert_scaled(found, unit, factor, rel):
    assert found.rank == unit.rank
    assert found.status == unit.status
    for now, before in (
        (found.largest, unit.largest),
        (found.smallest, unit.smallest),
    ):
        for end in ("value", "low", "high"):
            expected = getattr(before, end)
            assert getattr(now, end) / factor == pytest.approx(expected, rel=rel, abs=1e-12)
    for gain in ("backward_gain", "forward_gain"):
        assert getattr(found, gain) / factor == pytest.approx(getattr(unit, gain), rel=rel)
    assert 0 < found.noise / factor < math.inf


@pytest.mark.parametrize("exponent", [-1000, -665, -200, -45, -20, 20, 45, 200, 665, 1000])
@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_scale_of_a_weight_is_that_of_the_values(exponent, method, mode):
    unit, layer = made(exponent, padding_mode=mode)
    for operator in ("true", "circular", "kernel"):
        found = singular_values(layer, (2, 6, 6), operator, method=method)
        expected = singular_values(unit, (2, 6, 6), operator, method=method)
        assert_scaled(found, expected, 2.0**exponent, 1e-9)


@pytest.mark.parametrize("exponent", [-665, -110, -66, 66, 110, 665])
@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_in_single_precision_too(exponent, method):
    unit, layer = made(exponent)
    found = singular_values(layer, (2, 6, 6), method=method, dtype=torch.float32)
    expected = singular_values(unit, (2, 6, 6), method=method)
    factor = 2.0**exponent
    for end in ("largest", "smallest"):
        assert getattr(found, end).low / factor <= getattr(expected, end).high
        assert getattr(found, end).high / factor >= getattr(expected, end).low
    assert found.backward_gain / factor == pytest.approx(expected.backward_gain, rel=1e-5)
    assert "zero" not in found.message


def test_denormal_weights_are_not_zero():
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(1e-320)
    for method in ("auto", "lanczos"):
        found = singular_values(layer, (2, 6, 6), method=method)
        assert found.largest.value > 1e-320
        assert found.backward_gain > 0
        assert "the operator is zero" not in found.message
        assert "zero operator" not in found.message


@pytest.mark.parametrize("exponent", [-660, -60, 60, 660])
@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_any_module_may_be_scaled(exponent, method):
    unit, layer = made(exponent)
    found = singular_values(nn.Sequential(layer, nn.Flatten()), (2, 6, 6), method=method)
    expected = singular_values(nn.Sequential(unit, nn.Flatten()), (2, 6, 6), method="dense")
    factor = 2.0**exponent
    for end in ("largest", "smallest"):
        low, high = (getattr(getattr(found, end), side) / factor for side in ("low", "high"))
        assert low <= getattr(expected, end).value * (1 + 1e-12)
        assert high >= getattr(expected, end).value * (1 - 1e-12)
    assert found.largest.high <= 1.011 * found.largest.low


def test_weights_beyond_the_range_of_the_products_are_named():
    module = nn.Sequential(made(200)[1])
    with pytest.raises(NonFiniteError, match=r"'0.weight'.*range of torch.float32.*float64"):
        singular_values(module, (2, 6, 6), dtype=torch.float32)
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="'0.weight' .* in 1 of 54 entries"):
        singular_values(module, (2, 6, 6), dtype=torch.float32)


@pytest.mark.parametrize("exponent", [-900, 0, 900])
def test_products_for_others_are_those_of_the_layer(exponent):
    unit, layer = made(exponent)
    found, expected = (LayerOperator(c, (2, 4, 4)).dense() for c in (layer, unit))
    assert torch.equal(found / 2.0**exponent, expected)


def test_only_a_zero_operator_is_called_zero():
    layer = nn.Linear(3, 3, bias=False).double()
    nn.init.zeros_(layer.weight)
    assert "the operator is zero" in singular_values(layer).message
    nn.init.constant_(layer.weight, 1e-310)
    found = singular_values(layer)
    assert found.largest.value == pytest.approx(3e-310)
    assert "the operator is zero" not in found.message


def test_weights_that_single_precision_rounds_enlarge_the_noise():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1).double()
    rounded = nn.Conv2d(4, 4, 3, padding=1)
    rounded.load_state_dict(layer.state_dict())
    options = {"method": "lanczos", "dtype": torch.float32}
    found = singular_values(layer, (4, 6, 6), **options)
    same = singular_values(rounded, (4, 6, 6), **options)
    norm = found.backward_gain * found.shape[0] ** 0.5
    lost = torch.finfo(torch.float32).eps * norm
    assert found.noise - same.noise == pytest.approx(lost, rel=1e-6)
    assert same.largest.low - found.largest.low == pytest.approx(lost, rel=1e-3)
    assert "rounded to torch.float32" in found.message
    fine = singular_values(layer, (4, 6, 6), method="dense")
    assert fine.largest.value in found.largest
    module = singular_values(nn.Sequential(layer), (4, 6, 6), **options)
    assert module.noise > same.noise
    assert fine.largest.value in module.largest


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_a_power_of_two_is_within_a_factor_of_two(size):
    unit = power_of_two(torch.tensor([size, -size / 3], dtype=torch.float64))
    assert math.frexp(unit)[0] == 0.5
    assert 1 <= size / unit < 2
    assert scale_of(torch.tensor([size], dtype=torch.float64)) in (1, unit)
    assert norm_of(torch.full((4,), size, dtype=torch.float64)) == pytest.approx(2 * size)


def test_sizes_without_a_power_of_two():
    for values in ([], [0.0], [math.inf], [math.nan]):
        assert power_of_two(torch.tensor(values)) == 1
    assert norm_of(torch.zeros(3)) == 0
    assert math.isinf(norm_of(torch.tensor([1.0, math.inf])))
    assert scale_of(torch.tensor([1e6, 1.0])) == 1
