"""Nets followed through their training: paths, spectra along them, and what is read off."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conditioning import theory
from experiments.data import load
from experiments.models import ShortcutNet, half_mean_squared_error
from experiments.models.shortcut_kinds import ONE, SHORTCUT_KINDS, TWO
from experiments.moments import principal_moments, virtual_samples
from experiments.shortcut_training import along
from experiments.shortcut_training.descent import LinearObjective, stack
from experiments.shortcut_training.trajectories import (
    around,
    at_levels,
    follow,
    hessian_record,
)

DIM = 10


@pytest.fixture(scope="module")
def moments():
    """Moments of the digits."""
    return principal_moments(load("digits"), DIM)


def followed(moments, *, rate=0.05, max_steps=300, until=1e-2, seeds=(0, 1)):
    nets = [SHORTCUT_KINDS[TWO].build(DIM, 4, seed).stacked_weights() for seed in seeds]
    objective = LinearObjective(moments, shortcut=True)
    return follow(objective, stack(nets), rate, max_steps, until)


def test_a_path_begins_at_the_initial_weights_and_keeps_every_step(moments):
    for seed, path in enumerate(followed(moments, max_steps=5)):
        net = SHORTCUT_KINDS[TWO].build(DIM, 4, seed)
        assert torch.equal(path.weights[0], net.stacked_weights())
        assert len(path.losses) == len(path.gradients) == len(path.weights) == 6
        loss = half_mean_squared_error(net(moments.inputs), moments.targets)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        assert path.losses[0] + moments.minimum_loss == pytest.approx(
            float(loss.detach()), rel=1e-12
        )
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert path.gradients[0] == pytest.approx(norm, rel=1e-10)
        moved = path.weights[0] - 0.05 * torch.stack(gradients).reshape(path.weights[0].shape)
        torch.testing.assert_close(path.weights[1], moved)


def test_a_path_ends_at_the_loss_that_was_asked_for(moments):
    alone = followed(moments, seeds=(1,), until=0.5)[0]
    for path in (followed(moments, until=0.5)[1], alone):
        assert path.losses[-1] <= 0.5 < path.losses[-2]
        assert len(path.losses) < 300


def test_a_path_that_diverges_ends_before_it(moments):
    path = followed(moments, rate=30.0)[0]
    assert np.isfinite(path.losses).all()
    assert np.isfinite(path.gradients).all()
    assert len(path.losses) < 300


def test_levels_are_taken_where_the_loss_first_comes_down_to_them():
    losses = np.array([8.0, 6.0, 3.9, 2.0, 1.0, 0.6])
    assert at_levels(losses, [8.0, 4.0, 2.0, 0.7, 0.1]) == [0, 2, 3, 5]
    assert at_levels(losses, [4.0, 3.95]) == [0, 2]
    assert around(np.linspace(2, 0, 101), 1.0, 3) == [38, 50, 62]
    assert around(losses, 0.1, 3) == []
    assert around(losses, 1.0, 0) == []


def test_the_spectrum_at_zero_is_that_of_the_theory(moments):
    net = ShortcutNet(DIM, 3, 2)
    few = virtual_samples(moments.inputs, moments.targets)
    record = hessian_record(net, torch.zeros(3, 2, DIM, DIM).double(), few)
    exact = theory.two_shortcut_spectrum(moments.difference, 3)
    assert record["n"] == 600
    assert record["kappa10"]["value"] == pytest.approx(exact.condition_number(percentile=10))
    assert record["kappa10"]["status"] == "exact"
    assert record["index"]["value"] == 0.5
    top = float(torch.linalg.svdvals(moments.difference)[0])
    assert record["largest"]["value"] == pytest.approx(top)
    assert record["negative"] == pytest.approx(-top)


def test_the_spectrum_elsewhere_is_that_of_torch_func(moments):
    few = virtual_samples(moments.inputs, moments.targets)
    net = SHORTCUT_KINDS[ONE].build(DIM, 3, 0)
    weights = 30 * net.stacked_weights().detach()

    def loss(flat):
        stacked = flat.reshape(weights.shape)
        matrix = torch.eye(DIM).double()
        for unit in stacked[:, 0]:
            matrix = (unit + torch.eye(DIM).double()) @ matrix
        return half_mean_squared_error(few[0] @ matrix.T, few[1])

    hessian = torch.func.jacrev(torch.func.jacrev(loss))(weights.flatten())
    values = torch.linalg.eigvalsh(hessian).numpy()
    record = hessian_record(net, weights, few)
    magnitudes = np.abs(values)
    assert record["largest"]["value"] == pytest.approx(magnitudes.max())
    assert record["tenth"]["value"] == pytest.approx(np.percentile(magnitudes, 10), rel=1e-8)
    assert record["kappa10"]["low"] <= magnitudes.max() / np.percentile(magnitudes, 10)
    assert record["index"]["value"] == (values < 0).mean()


def path_of(losses, kappas, *, indices=None, steps=None):
    """A stored path with these numbers."""
    indices = [0.5] * len(losses) if indices is None else indices
    steps = range(len(losses)) if steps is None else steps
    return {
        "records": [
            {"step": s, "loss": x, "kappa10": {"value": k, "low": k}, "index": {"value": i}}
            for s, x, k, i in zip(steps, losses, kappas, indices, strict=True)
        ]
    }


def test_a_power_law_is_interpolated_exactly_and_nothing_is_extrapolated():
    losses = [5.0, 2.0, 0.3, 0.01]
    path = path_of(losses, [x**-1.5 for x in losses], indices=[0.5 - 0.01 * x for x in losses])
    for level in (5.0, 1.0, 0.05, 0.01):
        assert along.at_loss(path, level, along.kappa10) == pytest.approx(level**-1.5)
    assert along.at_loss(path, 5.04, along.kappa10) == pytest.approx(5**-1.5)
    assert math.isnan(along.at_loss(path, 5.06, along.kappa10))
    assert math.isnan(along.at_loss(path, 0.009, along.kappa10))
    assert along.at_loss(path, 2.0, along.index, log=False) == pytest.approx(0.48)
    found = along.at_level([path, path_of([0.1], [3.0])], 1.0, along.kappa10)
    assert found[0] == pytest.approx(1.0)
    assert math.isnan(found[1])


def test_an_unresolved_condition_number_counts_with_its_lower_bound():
    record = {"kappa10": {"value": None, "low": 1e9}}
    assert along.kappa10(record) == 1e9


def test_half_of_the_drop_is_interpolated_between_spectra():
    path = path_of([4, 3, 2, 1], [1] * 4, indices=[0.5, 0.5, 0.46, 0.45], steps=[0, 10, 20, 30])
    assert along.half_drop(path) == pytest.approx(10 + 10 * 0.025 / 0.04)
    assert math.isnan(along.half_drop(path_of([2, 1], [1, 1])))
