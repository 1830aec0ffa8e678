"""Parameters are selected by many means, and wrong selections are refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import regression, small_mlp
from torch import nn

from conditioning import errors
from conditioning.operators import GaussNewtonOperator, HessianOperator

MSE = nn.MSELoss()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def names(model: nn.Module, params: object) -> tuple[str, ...]:
    return HessianOperator(model, MSE, regression(), params, check=False).parameter_names


def test_parameters_are_selected_in_many_ways_and_one_order():
    model = small_mlp()
    everything = tuple(name for name, _ in model.named_parameters())
    head = ("2.weight", "2.bias")
    assert names(model, None) == everything
    for params in ("2.*", ["2.bias", "2.weight"], model[2], list(model[2].parameters())[::-1]):
        assert names(model, params) == head
    assert names(model, (p for p in model.parameters())) == everything
    assert names(model, dict(model[2].named_parameters())) == head
    assert names(model, model.named_parameters()) == everything
    assert names(model, ["*.bias", "0.*", model[0].weight]) == ("0.weight", "0.bias", "2.bias")
    assert names(model, model[0].weight) == ("0.weight",)


def test_tied_weights_count_once_under_either_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    assert names(model, None) == ("0.weight", "0.bias", "2.bias")
    assert names(model, "2.weight") == names(model, ["0.weight", "2.weight"]) == ("0.weight",)


def test_wrong_selections_are_refused():
    model = small_mlp()
    for params, text in (
        ("2.wieght", "Near: 2.weight"),
        ("2", r"'2\.\*'"),
        ([], "empty"),
        ([3], "int"),
        (small_mlp(), "Not a parameter of this model"),
        (nn.Parameter(torch.zeros(2)), "Not a parameter"),
    ):
        with pytest.raises(errors.ParameterSelectionError, match=text):
            names(model, params)
    model[0].weight.requires_grad_(requires_grad=False)
    assert names(model, "0.*") == names(model, model[0]) == ("0.bias",)
    for params in ("0.weight", model[0].weight, model.parameters(), ["0.weight", "2.*"]):
        with pytest.raises(errors.ParameterSelectionError, match="frozen"):
            names(model, params)


def test_unsupported_parameters_are_refused():
    complex_model = nn.Linear(3, 2, dtype=torch.complex64)
    for model, text in (
        (complex_model, "complex"),
        (nn.LazyLinear(2), "lazy"),
        (nn.Linear(3, 2, device="meta"), "meta"),
    ):
        with pytest.raises(errors.UnsupportedParameterError, match=text):
            names(model, None)


def test_modules_behind_a_function_have_to_be_plain():
    one, two = small_mlp(), small_mlp()

    def loss(batch, model):
        return MSE(model(batch[0]), batch[1])

    partial = functools.partial(loss, model=one)
    expected = HessianOperator(one, MSE, regression(), check=False).parameter_names
    assert HessianOperator(partial, None, regression(), check=False).parameter_names == expected
    both = HessianOperator(lambda b: loss(b, one) + loss(b, two), None, regression())
    assert both.parameter_names == tuple(f"{m}.{n}" for m in ("one", "two") for n in expected)
    with pytest.raises(errors.ParameterSelectionError, match="params="):
        HessianOperator(lambda b: b.sum(), None, regression()[0])


def test_gauss_newton_needs_a_loss():
    with pytest.raises(errors.InvalidArgumentError, match="HessianOperator"):
        GaussNewtonOperator(small_mlp(), None, regression())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_other_devices_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).cuda())
    with pytest.raises(errors.MixedDevicesError, match="params="):
        names(model, None)
    weighted = nn.CrossEntropyLoss(weight=torch.ones(2))
    data = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(errors.MixedDevicesError, match="class weights"):
        HessianOperator(nn.Linear(3, 2).cuda(), weighted, data)


class Scaled(nn.Module):
    """A net with a factor that is a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.net, self.factor = small_mlp(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        return self.factor * self.net(x)


@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
def test_a_parameter_may_have_no_dimension(operator):
    model, batch = Scaled(), regression()
    found = operator(model, MSE, batch)
    dense = found.dense()
    vector = torch.randn(found.shape[1], dtype=torch.float64)
    torch.testing.assert_close(found @ vector, dense @ vector)
    assert found.unflatten(vector)["factor"].shape == ()
    assert found.unflatten(torch.stack([vector] * 3, dim=1))["factor"].shape == (3,)
    alone = operator(model, MSE, batch, "factor")
    # d²/da² of mean (a f - y)² is 2 mean f².
    expected = 2 * model.net(batch[0]).square().mean()
    torch.testing.assert_close(alone.dense(), expected.detach().reshape(1, 1))
