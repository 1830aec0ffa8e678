"""Lanes of nets trained at once: as autograd and torch's optimizer do it, and when they blow up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conditioning.errors import InvalidArgumentError
from experiments.data import Dataset
from experiments.models import ShortcutNet, half_mean_squared_error
from experiments.models.shortcut_kinds import SHORTCUT_KINDS, TWO
from experiments.moments import principal_moments
from experiments.shortcut_training.descent import (
    LinearObjective,
    ReluObjective,
    active_share,
    descend,
    mean_frobenius_norms,
    spaced_steps,
    stack,
    unstack,
)

DIM = 4


@pytest.fixture(scope="module", params=[True, False], ids=["whitened", "raw"])
def moments(request):
    """Moments of a small data set of four classes, whitened or not."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % DIM
    images = rng.normal(size=(60, 6)) + 2 * np.eye(6)[labels]
    dataset = Dataset("small", images, labels, DIM, "0")
    return principal_moments(dataset, DIM, whiten=request.param)


def random_net(num_units, depth, seed=0, scale=0.5, **options):
    generator = torch.Generator().manual_seed(seed)
    return ShortcutNet(
        DIM, num_units, depth, init="xavier", scale=scale, generator=generator, **options
    )


def autograd(net, moments):
    """Loss and gradient ``(R, n, d, d)`` of a net on the samples."""
    loss = half_mean_squared_error(net(moments.inputs), moments.targets)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    return loss.detach(), torch.stack(gradients).reshape(net.stacked_weights().shape)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(("num_units", "depth"), [(1, 1), (3, 1), (1, 2), (3, 2), (2, 3), (2, 4)])
def test_losses_and_gradients_of_linear_lanes_are_those_of_autograd(
    moments, num_units, depth, shortcut
):
    nets = [random_net(num_units, depth, seed, shortcut=shortcut) for seed in range(3)]
    objective = LinearObjective(moments, shortcut=shortcut)
    rates = torch.tensor([1.0, 0.5, 2.0]).double()
    for _ in range(2):  # buffers are used again
        losses, changes = objective(stack(net.stacked_weights() for net in nets), rates)
    for lane, (net, change) in enumerate(zip(nets, unstack(changes), strict=True)):
        loss, gradient = autograd(net, moments)
        torch.testing.assert_close(losses[lane] + moments.minimum_loss, loss)
        torch.testing.assert_close(change, rates[lane] * gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("num_units", [1, 2, 5])
def test_losses_and_gradients_of_relu_lanes_are_those_of_autograd(moments, num_units, shortcut):
    options = {"shortcut": shortcut, "mid": "relu"}
    nets = [random_net(num_units, 2, seed, **options) for seed in range(3)]
    objective = ReluObjective(
        moments.inputs, moments.targets, shortcut=shortcut, dtype=torch.float64
    )
    rates = torch.tensor([1.0, 0.5, 2.0]).double()
    for _ in range(2):
        losses, changes = objective(stack(net.stacked_weights() for net in nets), rates)
    for lane, (net, change) in enumerate(zip(nets, unstack(changes), strict=True)):
        loss, gradient = autograd(net, moments)
        torch.testing.assert_close(losses[lane], loss)
        torch.testing.assert_close(change, rates[lane] * gradient, rtol=1e-11, atol=1e-13)


def test_at_zero_the_derivative_of_relu_is_zero_as_in_autograd(moments):
    net = ShortcutNet(DIM, 2, 2, mid="relu")
    objective = ReluObjective(moments.inputs, moments.targets, shortcut=True, dtype=torch.float64)
    _, change = objective(stack([net.stacked_weights()]), torch.ones(1).double())
    torch.testing.assert_close(unstack(change)[0], autograd(net, moments)[1])


def test_a_descent_is_that_of_the_optimizer_in_every_lane(moments):
    rates, num_steps = (0.01, 0.1), 40
    net = random_net(3, 2)
    weights = stack([net.stacked_weights()] * len(rates))
    before = weights.clone()
    done = descend(
        LinearObjective(moments, shortcut=True),
        weights,
        torch.tensor(rates, dtype=torch.float64),
        num_steps,
        [0, 7],
    )
    assert torch.equal(weights, before)
    assert done.steps == (0, 7, num_steps)
    for lane, rate in enumerate(rates):
        net = random_net(3, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        for step in range(num_steps + 1):
            loss = half_mean_squared_error(net(moments.inputs), moments.targets)
            if step in done.steps:
                row = done.steps.index(step)
                assert done.loss_curves[row, lane] + moments.minimum_loss == pytest.approx(
                    float(loss.detach()), rel=1e-9
                )
                norm = torch.linalg.matrix_norm(net.stacked_weights()).mean()
                assert done.norm_curves[row, lane] == pytest.approx(float(norm.detach()), rel=1e-9)
            if step < num_steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert torch.equal(done.losses, done.loss_curves[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanes_that_blow_up_are_infinite_and_leave_the_others_alone(moments, dtype):
    nets = [random_net(3, 2, seed).stacked_weights().to(dtype) for seed in range(4)]
    rates = torch.tensor([0.05, 1e4, 0.02, 1e6], dtype=dtype)
    objective = LinearObjective(moments, shortcut=True, dtype=dtype)
    together = descend(objective, stack(nets), rates, 25, [0, 3, 11])
    for lane in (0, 2):
        alone = descend(
            LinearObjective(moments, shortcut=True, dtype=dtype), stack([nets[lane]]),
            rates[lane : lane + 1], 25, [0, 3, 11],
        )  # fmt: skip
        torch.testing.assert_close(together.loss_curves[:, lane], alone.loss_curves[:, 0])
        torch.testing.assert_close(together.norms[lane], alone.norms[0])
        torch.testing.assert_close(together.shares[lane], alone.shares[0])
    for lane in (1, 3):
        assert together.losses[lane] == math.inf
        assert torch.isfinite(together.loss_curves[0, lane])
        assert torch.isnan(together.norms[lane])
        assert torch.isnan(together.shares[lane])


def test_if_all_lanes_blow_up_that_is_the_result(moments):
    objective = LinearObjective(moments, shortcut=True)
    done = descend(objective, stack([random_net(3, 2).stacked_weights()]), torch.tensor([1e8]), 500)
    assert done.losses.tolist() == [math.inf]
    assert done.norms.isnan().all()


def test_stacking_keeps_each_net():
    nets = [random_net(2, 3, seed).stacked_weights().detach() for seed in range(2)]
    for net, again in zip(nets, unstack(stack(nets)), strict=True):
        assert torch.equal(net, again)
    norms = torch.stack([torch.linalg.matrix_norm(net).mean() for net in nets])
    torch.testing.assert_close(mean_frobenius_norms(stack(nets)), norms)


def test_the_active_share_counts_units_of_equal_size():
    weights = torch.zeros(5, 2, DIM, DIM).double()
    weights[:3] = torch.eye(DIM).double()
    one = torch.zeros_like(weights)
    one[4, 1] = 7.0
    shares = active_share(stack([weights, one, torch.ones_like(weights)]))
    assert shares.tolist() == pytest.approx([0.6, 0.2, 1.0])


@pytest.mark.parametrize("num_steps", [1, 2, 30, 1000])
def test_recorded_steps_reach_from_the_first_to_the_last(num_steps):
    steps = spaced_steps(num_steps, 40)
    assert steps[0] == 0
    assert steps[-1] == num_steps
    assert steps == sorted(set(steps))


def test_kinds_of_nets_are_built_as_they_are_called():
    net = SHORTCUT_KINDS[TWO].build(DIM, 6, seed=3)
    again = random_net(3, 2, seed=3, scale=0.01)
    assert torch.equal(net.stacked_weights(), again.stacked_weights())
    with pytest.raises(InvalidArgumentError, match="7 layers are no whole number of units of 2"):
        SHORTCUT_KINDS[TWO].build(DIM, 7, seed=0)
