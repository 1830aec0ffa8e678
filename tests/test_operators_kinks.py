"""A warning where the parameters sit on a kink, and nowhere else."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import Apply, ZeroBranch
from torch import nn

from conditioning import errors
from conditioning.operators import GaussNewtonOperator, HessianOperator

MSE = nn.MSELoss()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(),
        nn.ELU(alpha=2.0),
        nn.ReLU6(),
        Apply(torch.abs),
        Apply(lambda x: x.abs()),
        Apply(lambda x: x.clamp(min=0)),
        Apply(lambda x: torch.clamp(x, -1, 0)),
        Apply(lambda x: torch.maximum(x, torch.zeros_like(x))),
    ],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_zero_branches_sit_on_a_kink(activation, kind):
    model = ZeroBranch(activation)
    data = torch.randn(5, 3), torch.randn(5, 3)
    before = [(id(p), p.data_ptr(), p._version, p.clone()) for p in model.parameters()]
    with pytest.warns(errors.NonsmoothPointWarning, match="small random perturbation") as caught:
        operator = kind(model, MSE, data)
    assert caught[0].filename == __file__
    for parameter, (identity, pointer, version, bits) in zip(
        model.parameters(), before, strict=True
    ):
        assert (id(parameter), parameter.data_ptr()) == (identity, pointer)
        assert parameter._version == version
        assert torch.equal(parameter, bits)
    kept = operator._kept
    operator @ torch.randn(operator.shape[0])
    assert operator._kept is kept


def test_a_kink_whose_conventions_contradict_each_other_is_an_error():
    # torch's prelu takes another side of zero for the input than for the slope.
    data = torch.randn(5, 3), torch.randn(5, 3)
    with pytest.raises(errors.AsymmetricOperatorError, match=r"sit on a kink: prelu.*perturbation"):
        HessianOperator(ZeroBranch(nn.PReLU()), MSE, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ordinary_networks_sit_on_no_kink(dtype):
    layers = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.ReLU(), nn.Flatten())
    models = [
        nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 3)),
        nn.Sequential(*layers, Apply(torch.abs), nn.Linear(512, 3), nn.LeakyReLU(1.0)),
        ZeroBranch(nn.Tanh()),
        ZeroBranch(nn.LeakyReLU(1.0)),
    ]
    images = torch.randn(20, 2, 8, 8)
    images[:, :, :3] = 0  # blank borders
    with torch.no_grad():
        models[0][0].bias[0] = -100  # a dead channel
    for model in models:
        inputs = torch.randn(20, 3) if isinstance(model, ZeroBranch) else images
        with warnings.catch_warnings():
            warnings.simplefilter("error", errors.NonsmoothPointWarning)
            HessianOperator(model.to(dtype), MSE, (inputs.to(dtype), torch.randn(20, 3).to(dtype)))


def test_data_is_not_touched_by_a_model_that_works_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    inputs, targets = torch.randn(5, 3), torch.randn(5, 2)
    before = inputs.clone()
    with pytest.warns(errors.NonsmoothPointWarning):
        HessianOperator(model, nn.MSELoss(), (inputs, targets))
    assert torch.equal(inputs, before)
