"""Operators leave model and global state bit by bit as they were, also when they fail."""

from __future__ import annotations

import pytest
import torch
from conftest import Apply, Snapshot, dense_hessian, regression, small_mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conditioning import errors
from conditioning.operators import GaussNewtonOperator, HessianOperator, JacobianOperator

MSE = nn.MSELoss()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


MODELS = {
    "works": (lambda: small_mlp(nn.BatchNorm1d(4), nn.Dropout()).eval(), None),
    "part in training mode": (lambda: small_mlp(nn.Dropout(0.0), nn.LayerNorm(4)), None),
    "batch norm": (lambda: small_mlp(nn.BatchNorm1d(4)), errors.BatchNormTrainingError),
    "dropout": (lambda: small_mlp(nn.Dropout()), errors.RandomForwardError),
    "fails": (lambda: small_mlp(nn.BatchNorm1d(4), nn.Linear(9, 9)), RuntimeError),
}


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, JacobianOperator])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_state_is_left_as_it_was(name, kind, loader):
    make, error = MODELS[name]
    model = make()
    x, y = regression(7)
    MSE(model[0](x), torch.zeros(7, 4).double()).backward()  # some .grad, others stay None
    data = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True) if loader else (x, y)
    arguments = (model, x) if kind is JacobianOperator else (model, MSE, data)
    before = Snapshot(model)
    if error:
        with pytest.raises(error):
            kind(*arguments)
        Snapshot.assert_unchanged(before)
        return
    operator = kind(*arguments)
    operator @ torch.randn(operator.shape[1], 5, generator=torch.Generator().manual_seed(0))
    before.assert_unchanged()


def test_buffers_that_a_module_changes_are_restored_and_products_stay_right():
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(4).double())
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.5)
            self.calls = self.calls + 1
            return x * self.scale

    model, data = small_mlp(Averaging()), regression()
    before = Snapshot(model)
    operator = HessianOperator(model, MSE, data)
    matrix = operator.dense()
    before.assert_unchanged()
    halved = nn.Sequential(model[0], Apply(lambda x: x / 2), *model[2:])
    torch.testing.assert_close(matrix, HessianOperator(halved, MSE, data).dense())


def test_a_step_of_a_fused_optimizer_is_noticed(mlp_problem):
    model, loss_fn, batch = mlp_problem.model, mlp_problem.loss_fn, mlp_problem.batch
    operator = HessianOperator(model, loss_fn, batch)
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    loss_fn(model(batch[0]), batch[1]).backward()
    optimizer.step()
    torch.testing.assert_close(operator.dense(), dense_hessian(mlp_problem))


def test_a_cache_that_grows_stays_grown():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1).double())
            self.length = 1

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.length:
                self.length, self.table = len(x), torch.arange(len(x)).double()
            return x + self.table[: len(x), None]

    model = small_mlp(Cached())
    HessianOperator(model, MSE, regression())
    assert len(model[1].table) == model[1].length == 6


def test_without_check_nothing_is_evaluated_until_needed():
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return MSE(outputs, targets)

    model, data = small_mlp(nn.BatchNorm1d(4), nn.Dropout()), regression()
    before = Snapshot(model)
    operator = HessianOperator(model, loss_fn, data, check=False)
    assert not calls
    operator @ torch.zeros(operator.shape[0])
    assert len(calls) == 1
    before.assert_unchanged()
    with pytest.raises(errors.NonScalarLossError):
        HessianOperator(model, nn.MSELoss(reduction="none"), data, check=False).gradient()


class RecurrentNet(nn.Module):
    def __init__(self, *, convolve: bool) -> None:
        super().__init__()
        self.mix = nn.Conv1d(3, 3, 1) if convolve else nn.Identity()
        self.recurrent = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(self.mix(x.mT).mT)[0][:, -1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build without oneDNN")
@pytest.mark.parametrize("convolve", [False, True])
def test_recurrent_layers_avoid_the_kernel_whose_second_derivative_is_slow(convolve):
    """Unless convolutions would suffer; the setting is left as it was."""
    model = RecurrentNet(convolve=convolve)
    flags = torch.backends.mkldnn
    before = (flags.enabled, flags.deterministic, flags.allow_tf32, flags.fp32_precision)
    within = []
    model.register_forward_hook(lambda *_: within.append(flags.enabled))
    inputs, targets = torch.randn(5, 6, 3), torch.randn(5, 4)
    columns = HessianOperator(model, MSE, (inputs, targets)).dense()
    assert set(within) == {convolve}
    assert before == (flags.enabled, flags.deterministic, flags.allow_tf32, flags.fp32_precision)
    exact = HessianOperator(model.double(), MSE, (inputs.double(), targets.double())).dense()
    torch.testing.assert_close(columns.double(), exact, rtol=1e-4, atol=1e-6)
