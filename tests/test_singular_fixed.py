"""Layers with their weights at one moment: tied ones, hooks of all kinds, views, other devices."""

from __future__ import annotations

import pytest
import torch
from conftest import Snapshot
from dense_layers import assert_all_known, matrix_of
from torch import nn

from conditioning.errors import AsymmetricOperatorError, ShapeError, UnsupportedLayerError
from conditioning.singular import LayerOperator, singular_values

METHODS = ("auto", "dense", "lanczos")


def assert_encloses(result, matrix, slack=1e-13):
    expected = torch.linalg.svdvals(matrix)
    assert result.shape == tuple(matrix.shape)
    for end, value in ((result.largest, expected[0]), (result.smallest, expected[-1])):
        assert end.low - slack <= float(value) <= end.high + slack


# ------------------------------------------------------------------------------- tied


def twice():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, layer)


def shared_parameter():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, second)


def norm_twice():
    norm = nn.BatchNorm1d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm).eval()


def shared_buffer():
    # Before they are tied: conversion gives every module its own buffers.
    first, second = norm_twice()[1].double(), nn.BatchNorm1d(6).double()
    second.running_var = first.running_var
    return nn.Sequential(first, nn.Linear(6, 6), second).eval()


def aliased():
    layer = nn.Linear(6, 6)
    layer.alias = layer.weight
    return layer


@pytest.mark.parametrize(
    "make", [twice, shared_parameter, norm_twice, shared_buffer, aliased], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_tied_stays_tied(make, method):
    torch.manual_seed(0)
    module = make().double()
    snapshot = Snapshot(module)
    assert_encloses(singular_values(module, (6,), method=method), matrix_of(module, (6,)))
    snapshot.assert_unchanged()


def test_a_convolution_whose_weight_has_a_second_name_is_measured():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    layer.alias = layer.weight
    assert_all_known(singular_values(layer, (2, 4, 4)), matrix_of(layer, (2, 4, 4)))
    kernel = singular_values(layer, operator="kernel")
    expected = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    assert (kernel.values - expected).abs().max() < 1e-14
    assert layer.alias is layer.weight


class Counting(nn.Module):
    """Changes a buffer that two modules hold, and reads it under both names."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.register_buffer("count", torch.zeros(1))
        self.inner.register_buffer("count", self.count)

    def forward(self, x):
        self.count.add_(1)
        return x * self.inner.count


def test_a_shared_buffer_that_the_forward_pass_changes_is_one():
    module = Counting()
    result = singular_values(module, (3,), method="dense")
    assert torch.equal(result.values, torch.ones(3, dtype=torch.float64))
    assert float(module.count) == 0


# ------------------------------------------------------------------------------ views


class Viewed(nn.Module):
    """Takes views across batch and positions, as the projections of GPT-2 do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return (x.view(-1, 4) @ self.weight).view(x.size(0), -1, 6)


class ViewedBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.view(-1).view(gradient.shape)


class ViewsGradients(nn.Module):
    def forward(self, x):
        return ViewedBack.apply(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [Viewed, ViewsGradients])
def test_inputs_and_gradients_lie_in_one_piece(make, method):
    torch.manual_seed(0)
    module = make().double()
    result = singular_values(module, (3, 4), method=method)
    assert_encloses(result, matrix_of(module, (3, 4)))
    operator = LayerOperator(module, (3, 4))
    block = torch.randn(operator.shape[0], 5, dtype=torch.float64)
    assert (operator.rmatvec(block) - operator.dense().T @ block).abs().max() < 1e-13


# ------------------------------------------------------------------------------ hooks


def doubled(_module, grad_input, _grad_output):
    return (2 * grad_input[0],)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [6, 20])
def test_a_backward_hook_that_changes_gradients_is_noticed(method, size):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3).double()
    layer.register_full_backward_hook(doubled)
    with pytest.raises(AsymmetricOperatorError, match="hooks that change gradients"):
        singular_values(layer, (2, size, size), method=method)
    for operator in ("circular", "kernel"):
        with pytest.raises(UnsupportedLayerError, match="Hooks of the Conv2d"):
            singular_values(layer, (2, size, size), operator)


def test_a_backward_pre_hook_that_changes_gradients_is_noticed():
    layer = nn.Linear(4, 4).double()
    layer.register_full_backward_pre_hook(lambda _module, gradients: (3 * gradients[0],))
    with pytest.raises(AsymmetricOperatorError):
        singular_values(layer)


def test_a_backward_hook_that_looks_on_changes_nothing():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    plain = singular_values(layer, (2, 5, 5))
    seen = []
    layer.register_full_backward_hook(lambda *_: seen.append(1))
    assert singular_values(layer, (2, 5, 5)) == plain
    assert seen


def test_hooks_of_all_modules_are_noticed():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 2, stride=2).double()
    plain = singular_values(layer, (2, 6, 6))
    state = torch.nn.modules.module
    handle = state.register_module_forward_hook(lambda _module, _inputs, output: 2 * output)
    try:
        for method in METHODS:
            found = singular_values(layer, (2, 6, 6), method=method)
            assert found.largest.value == pytest.approx(2 * plain.largest.value, rel=1e-10)
        with pytest.raises(UnsupportedLayerError, match="Hooks"):
            singular_values(layer, operator="kernel")
    finally:
        handle.remove()
    handle = state.register_module_full_backward_hook(
        lambda module, given, _: (
            doubled(module, given, _) if isinstance(module, nn.Conv2d) else None
        )
    )
    try:
        with pytest.raises(AsymmetricOperatorError):
            singular_values(layer, (2, 6, 6))
    finally:
        handle.remove()
    assert singular_values(layer, (2, 6, 6)) == plain


def centred(_module, _inputs, output):
    large = output.shape[-1] > 2
    return output - output.mean((2, 3), keepdim=True) if large else output


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_a_hook_that_acts_at_some_sizes_only_is_noticed_at_these(method):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 2, stride=2).double()
    layer.register_forward_hook(centred)
    for size in (4, 8):
        result = singular_values(layer, (4, size, size), method=method)
        assert_all_known(result, matrix_of(layer, (4, size, size)))
    with pytest.raises(UnsupportedLayerError, match="Hooks of the Conv2d"):
        singular_values(layer, (4, 8, 8), "circular")
    assert singular_values(layer, (4, 4, 4), "circular").status == "exact"


def test_a_hook_that_changes_the_sixth_digit_is_noticed():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 2, stride=2).double()
    layer.register_forward_hook(lambda _module, _inputs, output: output * (1 + 8e-6))
    assert_all_known(singular_values(layer, (4, 8, 8)), matrix_of(layer, (4, 8, 8)))


class HalfTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 1.0 * x

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


class HalfBackward(nn.Module):
    def forward(self, x):
        return HalfTransposed.apply(x)


def test_the_dense_route_measures_how_far_the_backward_pass_is_from_the_transpose(monkeypatch):
    monkeypatch.setattr(LayerOperator, "check_transpose", lambda self: torch.ones(1))
    with pytest.raises(AsymmetricOperatorError, match="of its size"):
        singular_values(HalfBackward(), (5,), method="dense")


# ------------------------------------------------------------- devices, shapes, affinity


@pytest.mark.parametrize("method", METHODS)
def test_the_default_device_does_not_matter(method):
    torch.manual_seed(0)
    hooked = nn.Conv2d(2, 3, 3, padding=1)
    hooked.register_forward_hook(lambda *_: None)
    cases = [
        (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
        (nn.Conv2d(2, 3, 2, stride=2), (2, 6, 6)),
        (nn.Sequential(nn.Linear(3, 2)), (3,)),
        (nn.AvgPool2d(2), (1, 4, 4)),
        (hooked, (2, 5, 5)),
    ]
    for layer, shape in cases:
        known = isinstance(layer, nn.Conv2d)
        for operator in ("true", "circular", "kernel") if known else ("true",):
            expected = singular_values(layer, shape, operator, method=method)
            torch.set_default_device("meta")
            try:
                found = singular_values(layer, shape, operator, method=method)
            finally:
                torch.set_default_device(None)
            assert found == expected


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_entries_is_named():
    for operator in ("true", "circular", "kernel"):
        with pytest.raises(ShapeError, match=r"weight of the Linear has shape \(0, 3\)"):
            singular_values(nn.Linear(3, 0), operator=operator)
    with pytest.raises(ShapeError, match=r"Sequential .*\(0, 3\)"):
        singular_values(nn.Sequential(nn.Linear(3, 0)), (3,))


def test_a_batch_instead_of_a_shape_is_not_printed():
    for given in (torch.rand(2, 30, 40), torch.rand(2000)):
        with pytest.raises(ShapeError, match=r"got a Tensor of shape \(2") as caught:
            singular_values(nn.Conv2d(2, 3, 3), given)
        assert len(str(caught.value)) < 120
    with pytest.raises(ShapeError) as caught:
        singular_values(nn.Conv2d(2, 3, 3), [0.5] * 1000)
    assert len(str(caught.value)) < 150


class Lifted(nn.Module):
    def __init__(self, height):
        super().__init__()
        self.height = height

    def forward(self, x):
        return x + self.height


@pytest.mark.parametrize("height", [10.0, 1e5, 1e7])
def test_a_kink_behind_a_large_response_to_zero_is_found(height):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), Lifted(height)).double()
    assert_encloses(singular_values(module, (6,)), matrix_of(module, (6,)), 1e-14 * height)
    with pytest.raises(UnsupportedLayerError, match="is not affine"):
        singular_values(nn.Sequential(module, nn.ReLU()), (6,))
