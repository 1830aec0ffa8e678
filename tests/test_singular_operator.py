"""Layers as operators: any affine module, no trace left, any precision, and bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import Snapshot
from dense_layers import assert_all_known, matrix_of
from torch import nn
from torch.nn.utils import parametrizations

from conditioning import GradientNorms
from conditioning.errors import (
    AsymmetricOperatorError,
    InvalidArgumentError,
    LossWithoutGraphError,
    NonFiniteError,
    RandomForwardError,
    ShapeError,
    UnsupportedLayerError,
    UnsupportedParameterError,
)
from conditioning.singular import singular_values

# -------------------------------------------------------------------- any affine module


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Adapted(nn.Module):
    """A frozen layer with a low-rank addition, as adapters are."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


class Rotated(nn.Module):
    """A linear layer with its weight the other way round, as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 4), self.weight).view(*x.shape[:-1], 6)


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(3.0).flip(-1)


AFFINE = [
    (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 5, 1)), (3, 4, 4)),
    (lambda: nn.AvgPool2d(2), (2, 4, 4)),
    (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval(), (2, 5, 5)),
    (lambda: Standardised(2, 3, 3, padding=1), (2, 4, 4)),
    (Adapted, (6,)),
    (Adapted, (2, 6)),
    (Rotated, (4,)),
    (InPlace, (4,)),
    (nn.Identity, (3, 2)),
    (lambda: nn.Flatten(), (3, 2)),
    (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).eval(), (3,)),
    (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 3)),
]


@pytest.mark.parametrize(("make", "shape"), AFFINE)
@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_any_affine_module_has_singular_values(make, shape, method):
    torch.manual_seed(0)
    module = make().double()
    result = singular_values(module, shape, method=method)
    matrix = matrix_of(module, shape)
    expected = torch.linalg.svdvals(matrix)
    assert type(module).__name__ == result.layer
    assert result.shape == tuple(matrix.shape)
    assert result.largest.low - 1e-13 <= float(expected[0]) <= result.largest.high + 1e-13
    assert result.smallest.low - 1e-13 <= float(expected[-1]) <= result.smallest.high + 1e-13
    if method == "auto":
        assert_all_known(result, matrix)
    else:
        assert result.backward_gain is None


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("norm", ["spectral", "weight"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_normalised_weights_are_those_of_the_next_forward_pass(norm, old, training):
    torch.manual_seed(0)
    where = nn.utils if old else parametrizations
    layer = getattr(where, f"{norm}_norm")(nn.Conv2d(3, 4, 3, padding=1))
    with torch.no_grad():  # far from what the power iteration has seen
        next(p for n, p in layer.named_parameters() if "weight" in n).mul_(2).add_(0.1)
    layer.double().train(training)
    held = dict(vars(layer)).get("weight")
    snapshot = Snapshot(layer)
    results = {o: singular_values(layer, (3, 5, 5), o) for o in ("true", "circular", "kernel")}
    snapshot.assert_unchanged()
    assert dict(vars(layer)).get("weight") is held
    units = torch.eye(75, dtype=torch.float64).view(75, 3, 5, 5)
    with torch.no_grad():
        once = layer(torch.cat([units, 0 * units[:1]]))
        assert_all_known(results["true"], (once[:75] - once[75:]).flatten(1).T)
        # The forward pass above has set the weight, or a step of the power iteration has.
        used = vars(layer).get("weight") if old else None
        if used is None and not training:
            used = layer.weight
        if used is not None:
            expected = torch.linalg.svdvals(used.flatten(1))
            assert (results["kernel"].values - expected).abs().max() < 1e-12


def test_a_hook_that_looks_on_changes_nothing_and_one_that_acts_takes_the_products():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    plain = singular_values(layer, (2, 5, 5))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(singular_values(layer, (2, 5, 5)).values, plain.values)
    assert seen
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    result = singular_values(layer, (2, 5, 5))
    assert result.layer == "Conv2d"
    assert (result.values - 3 * plain.values).abs().max() < 1e-12
    with pytest.raises(UnsupportedLayerError, match="Hooks of the Conv2d"):
        singular_values(layer, operator="kernel")


def test_a_parametrised_bias_is_taken_off_as_well():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus())
    result = singular_values(layer, method="dense")
    assert (result.values - torch.linalg.svdvals(layer.weight.detach())).abs().max() < 1e-14


class Squashed(nn.Module):
    def forward(self, x):
        return x + 1e-3 * torch.sin(x)


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.Hardtanh(-50, 50), nn.MaxPool1d(2), Squashed(), Noisy(), Mixing()]
)
def test_what_is_not_affine_is_refused(module):
    with pytest.raises(UnsupportedLayerError, match="JacobianOperator"):
        singular_values(module, (3, 6))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)), "Dropout"),
        (nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)), "BatchNorm1d"),
    ],
)
def test_modules_that_are_random_or_normalise_by_the_batch_are_named(module, name):
    with pytest.raises(RandomForwardError, match=rf"{name}.*model\.eval\(\)"):
        singular_values(module, (3, 6))


class Paired(nn.Module):
    def forward(self, x):
        return x, x


class Summed(nn.Module):
    def forward(self, x):
        return x.sum(0)


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


class HalfTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class WrongBackward(nn.Module):
    def forward(self, x):
        return HalfTransposed.apply(x)


def test_outputs_without_a_matrix_are_refused():
    with pytest.raises(UnsupportedLayerError, match="returns a tuple"):
        singular_values(Paired(), (3,))
    with pytest.raises(UnsupportedLayerError, match="keep the samples apart"):
        singular_values(Summed(), (3,))
    with pytest.raises(LossWithoutGraphError, match="detach"):
        singular_values(Cut(), (3,))
    for method in ("auto", "lanczos"):
        with pytest.raises(AsymmetricOperatorError):
            singular_values(WrongBackward(), (40,), method=method)


# --------------------------------------------------------------- precision and traces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_lifted(dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1).to(dtype)
    result = singular_values(layer, (3, 5, 5))
    assert_all_known(result, matrix_of(copy.deepcopy(layer).double(), (3, 5, 5)))
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("operator", ["true", "circular", "kernel"])
def test_in_single_precision_the_noise_says_so(operator):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1, stride=1)
    fine = singular_values(layer, (3, 6, 6), operator)
    coarse = singular_values(layer, (3, 6, 6), operator, dtype=torch.float32)
    assert coarse.values.dtype == torch.float64
    assert fine.noise < 1e-12 < coarse.noise < 1e-3
    assert (fine.values - coarse.values).abs().max() <= coarse.noise


@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
@pytest.mark.parametrize("inference", [False, True])
def test_the_layer_is_left_as_it_was(method, inference):
    torch.manual_seed(0)
    first = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
    layer = nn.Sequential(first, nn.Conv2d(4, 2, 3))
    layer(torch.randn(1, 3, 6, 6)).sum().backward()
    snapshot = Snapshot(layer)
    with torch.inference_mode(inference):
        for module, shape in ((layer, (3, 6, 6)), (first, (3, 6, 6)), (layer[1], (4, 5, 5))):
            result = singular_values(module, shape, method=method)
            assert result.largest.value > 0
    snapshot.assert_unchanged()


def test_weights_that_were_made_in_inference_mode_are_taken():
    with torch.inference_mode():
        layer = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    assert_all_known(singular_values(layer, (2, 4, 4)), matrix_of(layer, (2, 4, 4)))


def test_under_autocast_the_products_stay_fine():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    expected = singular_values(layer, (2, 4, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = singular_values(layer, (2, 4, 4), dtype=torch.float32)
    assert torch.equal(found.values, expected.values)


def test_a_tracker_does_not_see_the_evaluations():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 1))
    x, frames = torch.randn(3, 4), []
    for measured in (False, True):
        with GradientNorms(model, "1") as tracker:
            for _ in range(2):
                model(x).sum().backward()
                if measured:
                    singular_values(model[0], method="lanczos")
                    singular_values(block[0])
                    singular_values(nn.Sequential(model[0], block[0]), (4,), method="dense")
                tracker.step()
        frames.append(tracker.ratios())
    assert len(frames[0]) == 2
    assert frames[0].equals(frames[1])


class Wrapper(nn.Module):
    """What torch.compile makes of a module, as far as it matters."""

    def __init__(self, layer):
        super().__init__()
        self._orig_mod = layer


def test_a_compiled_layer_is_not_compiled_again():
    def refuse(*_):
        raise AssertionError("the compiled layer ran")

    layer = nn.Conv2d(2, 3, 3)
    expected = singular_values(layer, (2, 5, 5))
    assert singular_values(Wrapper(layer), (2, 5, 5)) == expected
    layer._compiled_call_impl = refuse
    for model in (layer, nn.Sequential(layer)):
        found = singular_values(model, (2, 5, 5))
        assert torch.equal(found.values, expected.values)
    assert layer._compiled_call_impl is refuse


@pytest.mark.parametrize("kind", [list, np.array, torch.Size])
def test_shapes_come_in_many_forms(kind):
    result = singular_values(nn.Conv2d(2, 3, 3), kind((2, 5, 5)))
    assert result.input_shape == (2, 5, 5)
    assert all(type(n) is int for n in result.input_shape)


# --------------------------------------------------------------------------- bad input


def test_a_layer_without_a_matrix_is_refused_for_kernel_and_circles():
    for operator in ("kernel", "circular"):
        with pytest.raises(UnsupportedLayerError, match="AvgPool2d"):
            singular_values(nn.AvgPool2d(2), (1, 4, 4), operator)
    with pytest.raises(UnsupportedLayerError, match="nn.Module"):
        singular_values(torch.eye(3))


class Sharded(nn.Parameter):
    def full_tensor(self):
        raise AssertionError("collectives are for the caller to start")


def _with_weight(weight):
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = weight
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
        (lambda: nn.LazyConv2d(3, 3), "lazy"),
        (lambda: _with_weight(Sharded(torch.eye(2))), "DTensor"),
        (lambda: _with_weight(nn.Parameter(torch.eye(2).to_sparse())), "sparse"),
        (
            lambda: _with_weight(
                nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
            ),
            "dequantise",
        ),
    ],
)
def test_weights_without_real_numbers_at_hand_are_refused(make, words):
    with pytest.raises(UnsupportedParameterError, match=rf"Parameter 'weight' .*{words}"):
        singular_values(make(), (2,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operator", ["true", "circular", "kernel"])
def test_a_weight_that_is_not_finite_is_named(bad, operator):
    layer = nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match="'weight' of the Conv2d .* in 1 of 54 entries"):
        singular_values(layer, (2, 4, 4), operator)


@pytest.mark.parametrize("operator", ["true", "circular"])
def test_a_missing_or_wrong_shape_says_what_is_needed(operator):
    layer = nn.Conv2d(16, 32, 3)
    with pytest.raises(InvalidArgumentError, match=r"input_shape=\(16, height, width\)"):
        singular_values(layer, operator=operator)
    for wrong in ((3, 8, 8), (1, 16, 8, 8), (16, 8), (8,)):
        with pytest.raises(ShapeError, match=r"input_shape=\(16, height, width\).*got"):
            singular_values(layer, wrong, operator)
    for wrong in ((16, 0, 8), (16, 8.0, 8), 16.0, ()):
        with pytest.raises(ShapeError, match="positive integers"):
            singular_values(layer, wrong, operator)
    with pytest.raises(ShapeError, match="ends in 3, got"):
        singular_values(nn.Linear(3, 2), (4,), operator)


def test_a_module_of_another_kind_needs_a_shape_that_it_takes():
    module = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InvalidArgumentError, match="input_shape"):
        singular_values(module)
    with pytest.raises(ShapeError, match=r"does not take a torch.float64 input of shape \(4,\)"):
        singular_values(module, (4,))


def test_a_kernel_larger_than_its_input_is_named():
    with pytest.raises(ShapeError, match=r"shape \(1, 4, 4\).*Kernel size"):
        singular_values(nn.Conv2d(1, 1, 7, padding=1), (1, 4, 4))
    with pytest.raises(ShapeError, match=r"shape \(1, 4\)"):
        singular_values(nn.Conv1d(1, 1, 3, padding=5, padding_mode="reflect"), (1, 4))


def test_on_a_circle_the_stride_must_divide_the_size():
    with pytest.raises(InvalidArgumentError, match=r"2 does not divide 7.*operator='true'"):
        singular_values(nn.Conv2d(1, 1, 3, stride=2), (1, 8, 7), "circular")


@pytest.mark.parametrize(
    "options",
    [
        {"operator": "fft"}, {"method": "power"}, {"rtol": 0}, {"max_matvecs": 2},
        {"failure_probability": 1}, {"memory_budget": 0}, {"dtype": torch.float16},
        {"seed": "zero"},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        singular_values(nn.Linear(2, 2), **options)
