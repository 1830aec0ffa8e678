"""Closed forms of norm preservation against dense matrices, autograd and random networks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn import functional

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory import (
    branch_bound,
    depth_rate,
    expected_backward_gain,
    expected_forward_gain,
    initial_ratios,
    matrix_root_deviation,
    product_bound,
    ratio_band,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---------------------------------------------------------------------------- one block


@pytest.mark.parametrize("size", [0.0, 0.3, 0.99, 2.5])
def test_singular_values_and_ratios_of_an_identity_block_lie_in_the_band(size):
    branch = normal(12, 12)
    branch *= size / torch.linalg.matrix_norm(branch, 2)
    jacobian = torch.eye(12, dtype=torch.float64) + branch
    low, high = ratio_band(size)
    values = torch.linalg.svdvals(jacobian)
    assert low - 1e-14 <= float(values[-1])
    assert float(values[0]) <= high + 1e-14
    gradients = normal(12, 200)
    ratios = (jacobian.T @ gradients).norm(dim=0) / gradients.norm(dim=0)
    assert low <= float(ratios.min()) + 1e-14
    assert float(ratios.max()) <= high + 1e-14


def test_the_band_is_attained():
    low, high = ratio_band(0.4)
    jacobian = torch.diag(torch.tensor([0.6, 1.4]))
    assert torch.linalg.svdvals(jacobian).tolist() == pytest.approx([high, low])


@pytest.mark.parametrize("length", [1, 5, 60])
def test_a_product_of_ratios_lies_in_the_product_band(length):
    low, high = product_bound(0.2, length)
    gradient = normal(8)
    before = gradient.norm()
    for _ in range(length):
        branch = normal(8, 8)
        branch *= 0.2 / torch.linalg.matrix_norm(branch, 2)
        gradient = gradient + branch.T @ gradient
    assert low <= float(gradient.norm() / before) <= high
    assert high == pytest.approx(1.2**length)


def test_the_product_at_the_depth_rate_is_polynomial_in_the_depth():
    for depth in (1, 2, 16, 1000):
        assert product_bound(0.7 * depth_rate(depth), depth)[1] <= (2 * depth) ** 0.7
    assert product_bound(3.0, 10**6) == (0.0, math.inf)
    assert depth_rate(1) == pytest.approx(math.log(2))


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_the_branch_bound_holds_for_the_jacobian_of_a_branch(activation):
    first, second, x = normal(9, 6) / 3, normal(6, 9) / 3, normal(6)

    def branch(x):
        return second @ activation(first @ activation(x))

    jacobian = torch.autograd.functional.jacobian(branch, x)
    bound = branch_bound(first, second)
    assert 0 < float(torch.linalg.matrix_norm(jacobian, 2)) <= bound
    assert branch_bound(first, second, slope=2) == pytest.approx(4 * bound)
    linear = torch.linalg.matrix_norm(first, 2) * torch.linalg.matrix_norm(second, 2)
    assert bound == pytest.approx(float(linear))


# -------------------------------------------------------------------------------- depth


def test_equal_linear_blocks_deviate_like_the_norm_of_the_logarithm():
    logarithm = normal(10, 10) / 3
    target = torch.from_numpy(scipy.linalg.expm(logarithm.numpy()))
    principal = np.asarray(scipy.linalg.logm(target.numpy())).real
    for depth in (1, 2, 16, 512):
        root = scipy.linalg.expm(principal / depth)
        assert np.linalg.norm(np.linalg.matrix_power(root, depth) - target.numpy()) < 1e-9
        expected = np.linalg.norm(root - np.eye(10), 2)
        assert matrix_root_deviation(target, depth) == pytest.approx(expected, rel=1e-9)
    limit = np.linalg.norm(principal, 2)
    assert 10**6 * matrix_root_deviation(target, 10**6) == pytest.approx(limit, rel=1e-5)


def test_the_root_of_a_symmetric_target_is_that_of_its_eigenvalues():
    basis, _ = torch.linalg.qr(normal(5, 5))
    values = torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)
    target = (basis * values) @ basis.T
    expected = max(abs(v ** (1 / 7) - 1) for v in values.tolist())
    assert matrix_root_deviation(target, 7) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "target",
    [
        torch.diag(torch.tensor([1.0, -1.0])),
        -torch.eye(2),
        torch.diag(torch.tensor([1.0, 0.0])),
        torch.zeros(2, 2),
        torch.tensor([[-1.0, 1.0], [0.0, -1.0]]),
    ],
)
def test_targets_without_a_real_root_are_refused(target):
    with pytest.raises(InvalidArgumentError, match="no real principal root"):
        matrix_root_deviation(target, 4)


def test_a_rotation_short_of_half_a_turn_has_a_root():
    angle = 3.0
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    target = math.cos(angle) * torch.eye(2) + math.sin(angle) * turn
    expected = 2 * math.sin(angle / 10 / 2)
    assert matrix_root_deviation(target, 10) == pytest.approx(expected, rel=1e-8)


# --------------------------------------------------------------------- layers, expected

CONVOLUTIONS = [
    (1, 1, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (3, 2, 0, 1, 1), (2, 2, 0, 1, 1),
    (4, 2, 1, 1, 1), (3, 1, 2, 2, 1), (5, 3, 4, 1, 1), (3, 2, 1, 1, 2),
]  # fmt: skip


def dense_gains(layer, *sides):
    """Backward and forward gain from the dense matrix of a layer."""
    channels = getattr(layer, "in_channels", None) or layer.in_features
    x = torch.zeros(1, channels, *sides, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
    energy = float(matrix.square().sum())
    return math.sqrt(energy / matrix.shape[0]), math.sqrt(energy / matrix.shape[1])


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
def test_gains_of_a_convolution_are_those_of_its_dense_matrix(
    kernel, stride, padding, dilation, groups, mode
):
    for sides in ((7, 7), (8, 6)):
        layer = nn.Conv2d(
            4, 6, kernel, stride, padding, dilation, groups, padding_mode=mode
        ).double()
        options = {
            "stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode,
        }  # fmt: skip
        backward, forward = dense_gains(layer, *sides)
        found = expected_backward_gain(layer.weight, sides, **options)
        assert found == pytest.approx(backward, rel=1e-12)
        found = expected_forward_gain(layer.weight, sides, groups=groups, **options)
        assert found == pytest.approx(forward, rel=1e-12)


def test_gains_of_other_layers_are_those_of_their_dense_matrices():
    line = nn.Conv1d(2, 3, 5, 2, 3, padding_mode="zeros").double()
    volume = nn.Conv3d(2, 3, (1, 2, 3), (1, 2, 1), (0, 1, 2)).double()
    linear = nn.Linear(4, 7).double()
    for layer, sides, options in (
        (line, (9,), {"stride": 2, "padding": 3}),
        (volume, (3, 4, 5), {"stride": (1, 2, 1), "padding": (0, 1, 2)}),
        (linear, (), {}),
    ):
        backward, forward = dense_gains(layer, *sides)
        given = (layer.weight, sides) if sides else (layer.weight,)
        assert expected_backward_gain(*given, **options) == pytest.approx(backward, rel=1e-12)
        assert expected_forward_gain(*given, **options) == pytest.approx(forward, rel=1e-12)


def test_the_backward_gain_is_the_mean_of_backward_passes_through_a_convolution():
    layer = nn.Conv2d(3, 8, 3, 2, 1, bias=False).double()
    x = normal(1, 3, 8, 8).requires_grad_()
    output = layer(x)
    squares = []
    for _ in range(2000):
        gradient = torch.randn_like(output)
        (pulled,) = torch.autograd.grad(output, x, gradient, retain_graph=True)
        squares.append(float(pulled.square().sum() / gradient.square().sum()))
    expected = expected_backward_gain(layer.weight, 8, stride=2, padding=1)
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - expected**2) < 5 * error


@pytest.mark.parametrize("output", [2, 5, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_zero_padding_of_a_3x3_kernel_has_the_factor_of_its_closed_form(output, stride):
    weight = torch.ones(4, 2, 3, 3)
    padded = expected_backward_gain(weight, stride * output, stride=stride, padding=1)
    circular = expected_backward_gain(weight, padding_mode="circular", stride=stride)
    assert circular == pytest.approx(math.sqrt(float(weight.square().sum()) / 4))
    factor = (3 * output - (2 if stride == 1 else 1)) / (3 * output)
    assert padded == pytest.approx(factor * circular, rel=1e-12)


def test_no_transition_keeps_both_norms():
    weight = normal(16, 8, 3, 3)
    options = {"stride": 2, "padding": 1, "padding_mode": "circular"}
    ratio = expected_backward_gain(weight, 8, **options) / expected_forward_gain(
        weight, 8, **options
    )
    assert ratio**2 == pytest.approx(2.0)  # stride^2 c_in / c_out


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((torch.ones(3),), {}, ShapeError, "weight"),
        ((torch.ones(0, 3),), {}, ShapeError, "weight"),
        ((torch.ones(2, 2, 3),), {}, InvalidArgumentError, "size"),
        ((torch.ones(2, 2, 3), 2), {}, ShapeError, "does not fit"),
        ((torch.ones(2, 2, 3), 2), {"padding_mode": "circular", "padding": 1},
         InvalidArgumentError, "wraps"),
        ((torch.ones(2, 2, 3), 8), {"padding_mode": "reflect"}, InvalidArgumentError, "reflect"),
        ((torch.ones(2, 2, 3), (8, 8)), {}, InvalidArgumentError, "size"),
        ((torch.ones(2, 2, 3), 8), {"stride": 0}, InvalidArgumentError, "stride"),
        ((torch.ones(2, 2, 3), 8), {"padding": "same"}, InvalidArgumentError, "padding"),
        ((torch.full((2, 2), math.nan),), {}, InvalidArgumentError, "NaN"),
    ],
)  # fmt: skip
def test_layers_without_a_gain_are_refused(arguments, options, error, text):
    for function in (expected_backward_gain, expected_forward_gain):
        with pytest.raises(error, match=text):
            function(*arguments, **options)


# ---------------------------------------------------------------------- initialisation


def measured_ratios(
    length, seed, *, layers=2, gain=2.0, scale=1.0, variance=1.0, normalised=True, skip=True
):
    """Ratios of gradient norms of a random network, from autograd."""
    width, batch = 128, 512
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, width, generator=generator) * math.sqrt(variance)
    streams = [x.requires_grad_()]
    for _ in range(length):
        stream = branch = streams[-1]
        for _ in range(layers):
            weight = torch.randn(width, width, generator=generator) * math.sqrt(gain / width)
            if normalised:
                branch = functional.batch_norm(branch, None, None, training=True)
            branch = torch.relu(branch) @ weight.T
        streams.append(scale * branch + (stream if skip else 0))
    logits = torch.relu(functional.batch_norm(streams[-1], None, None, training=True))[:, :10]
    targets = torch.randint(0, 10, (batch,), generator=generator)
    gradients = torch.autograd.grad(functional.cross_entropy(logits, targets), streams)
    norms = [float(gradient.norm()) for gradient in gradients]
    return np.array([a / b for a, b in itertools.pairwise(norms)])


@pytest.mark.parametrize(
    ("length", "options", "tolerance"),
    [
        (2, {}, 0.02),
        (8, {}, 0.02),
        (32, {}, 0.02),
        (12, {"num_layers": 1}, 0.02),
        (12, {"num_layers": 3}, 0.02),
        (12, {"weight_gain": 1 / 3}, 0.02),
        (12, {"branch_scale": 0.25}, 0.02),
        (12, {"input_variance": 5.0}, 0.02),
        (12, {"normalised": False, "branch_scale": 0.3}, 0.02),
        (12, {"skip": False}, 0.06),
    ],
)
def test_random_networks_have_the_predicted_ratios(length, options, tolerance):
    names = {
        "num_layers": "layers", "weight_gain": "gain", "branch_scale": "scale",
        "input_variance": "variance", "normalised": "normalised", "skip": "skip",
    }  # fmt: skip
    given = {names[name]: value for name, value in options.items()}
    measured = np.mean([measured_ratios(length, seed, **given) for seed in range(12)], axis=0)
    predicted = initial_ratios(length, **options).numpy()
    assert predicted.shape == (length,)
    assert np.abs(measured - 1).mean() == pytest.approx(np.abs(predicted - 1).mean(), rel=tolerance)
    assert np.abs(measured / predicted - 1).max() < 0.03


def test_the_mean_deviation_falls_like_the_logarithm_over_the_depth():
    slope = (1 - 1 / math.pi) ** -2 / 2
    assert slope == pytest.approx(1.08, abs=0.005)
    totals = [float((initial_ratios(depth) - 1).sum()) for depth in (10**4, 10**6)]
    assert (totals[1] - totals[0]) / math.log(100) == pytest.approx(slope, rel=1e-3)


def test_without_normalisation_depth_does_not_help():
    for depth in (2, 64):
        ratios = initial_ratios(depth, normalised=False)
        assert ratios.tolist() == pytest.approx([math.sqrt(2)] * depth)
    assert initial_ratios(5, normalised=False, skip=False).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ratio_band(-0.1), "delta"),
        (lambda: ratio_band(math.nan), "delta"),
        (lambda: product_bound(0.1, 0), "num_blocks"),
        (lambda: depth_rate(0), "num_blocks"),
        (lambda: depth_rate(1.5), "num_blocks"),
        (lambda: matrix_root_deviation(torch.eye(2), 0), "num_blocks"),
        (lambda: branch_bound(torch.eye(2), torch.eye(2), -1), "slope"),
        (lambda: initial_ratios(0), "num_blocks"),
        (lambda: initial_ratios(2, num_layers=0), "num_layers"),
        (lambda: initial_ratios(2, weight_gain=0), "weight_gain"),
        (lambda: initial_ratios(2, input_variance=-1), "input_variance"),
        (lambda: initial_ratios(2, branch_scale=math.inf), "branch_scale"),
    ],
)
def test_arguments_out_of_range_are_refused(call, text):
    with pytest.raises(InvalidArgumentError, match=text):
        call()


def test_matrices_that_do_not_follow_each_other_are_refused():
    for first, second in ((torch.ones(3, 2), torch.ones(2, 2)), (torch.ones(3), torch.ones(3, 3))):
        with pytest.raises(ShapeError, match="first and second"):
            branch_bound(first, second)
    with pytest.raises(ShapeError, match="target"):
        matrix_root_deviation(torch.ones(2, 3), 2)
