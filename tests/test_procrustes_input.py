"""What is said where something cannot be projected."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from conditioning.errors import (
    InvalidArgumentError,
    LayerSelectionError,
    NonFiniteError,
    OptimizerMismatchError,
    ParametrizedWeightError,
    RankDeficientWeightError,
    UnsupportedLayerError,
    UnsupportedParameterError,
)
from conditioning.procrustes import Procrustes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 19, 3), nn.BatchNorm2d(19)),
        nn.ModuleDict({"down": nn.Conv2d(4, 8, 1, stride=2), "mix": nn.Conv2d(4, 4, 3)}),
        nn.ModuleDict({"down": nn.Conv2d(8, 16, 1, stride=2)}),
        nn.Linear(4, 3),
    )


# ------------------------------------------------------------------- unsupported layers


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LSTM(2, 3), "'here' cannot be projected. A LSTM is not a layer whose weight"),
        (lambda: nn.BatchNorm2d(3), "A BatchNorm2d is not .* known are nn.Linear, nn.Conv1d"),
        (lambda: nn.Embedding(3, 3), "A Embedding"),
        (lambda: nn.Bilinear(2, 2, 2), "A Bilinear"),
        (lambda: Doubled(2, 2), "A Doubled is not .* subclasses with the same forward"),
        (lambda: OtherConvolution(2, 2, 1), "A OtherConvolution"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2))),
            r"A Sequential .* Inside it are: 0, 2\.0\.$",
        ),
        (
            lambda: nn.ModuleList(nn.Linear(2, 2) for _ in range(9)),
            r"Inside it are: 0, 1, 2, 3, 4\.$",
        ),
        (lambda: nn.MultiheadAttention(4, 2), "A MultiheadAttention .* Inside it are: out_proj"),
    ],
)
def test_other_modules_are_refused_and_what_is_inside_is_named(make, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        Procrustes({"here": make()})


def test_what_is_no_module_is_refused(model):
    with pytest.raises(UnsupportedLayerError, match="'x' is a Parameter, not a layer"):
        Procrustes({"x": model[3].weight})
    with pytest.raises(UnsupportedLayerError, match="'layer 0' is a int"):
        Procrustes([3])


def test_a_subclass_that_computes_the_same_is_no_other_layer():
    class Named(nn.Linear):
        def extra_repr(self):
            return "named"

    Procrustes(Named(2, 3)).project()


# --------------------------------------------------------------------- unsupported weights


PARAMETRIZED = {
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "the old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "the old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
    "pruning": lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5),
}


# The old one says that it is old.
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_weight_that_is_computed_is_refused(name):
    layer = PARAMETRIZED[name]()
    with pytest.raises(ParametrizedWeightError, match="'head' is computed from .* leave"):
        Procrustes({"head": layer})
    if name == "orthogonal":
        parametrize.remove_parametrizations(layer, "weight")
        Procrustes({"head": layer}).project()


def test_a_parametrized_bias_is_no_obstacle():
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    Procrustes(layer).project()
    assert torch.linalg.svdvals(layer.weight.detach()).numpy() == pytest.approx(1.0, abs=1e-5)


def complex_weight():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
    return layer


def sparse_weight():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.eye(3).to_sparse())
    return layer


def with_weight(shape):
    """As wrappers leave it that keep all weights in one, or parts of them."""
    layer = nn.Conv2d(3, 4, 2)
    layer.weight = nn.Parameter(torch.randn(shape))
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 3, device="meta"), "'head' has no values yet: initialise"),
        (lambda: nn.LazyLinear(3), "no values yet"),
        (lambda: nn.LazyConv2d(3, 2), "no values yet"),
        (complex_weight, "is torch.complex64, .*: real, dense floating-point"),
        (sparse_weight, "torch.sparse_coo: real, dense"),
        (
            lambda: with_weight(0),
            r"has shape \(0,\), which is not that of a conv 2x2, 3 -> 4.*FSDP",
        ),
        (lambda: with_weight(48), r"has shape \(48,\)"),
        (lambda: nn.Linear(3, 0), "'head' has no entries, .* leave it out"),
        (lambda: nn.Linear(0, 3), "has no entries"),
        (lambda: with_weight((3, 3, 2, 2)), r"has shape \(3, 3, 2, 2\).* or it was cut"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_weights_without_values_or_of_another_kind_are_refused(make, message):
    with pytest.raises(UnsupportedParameterError, match=message):
        Procrustes({"head": make()})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["auto", "eigh", "newton-schulz", "svd"])
@pytest.mark.parametrize("name", ["0.0", "1.mix", "2.down", "3"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed(model, name, method, bad):
    layer = dict(model.named_modules())[name]
    with torch.no_grad():
        layer.weight.view(-1)[0] = bad
    before = {key: value.clone() for key, value in model.state_dict().items()}
    procrustes = Procrustes("*", model=model, method=method)
    with pytest.raises(NonFiniteError, match=rf"The weight of '{name}' holds NaN or an infinity"):
        procrustes.project()
    assert_unchanged(model, before)
    assert procrustes.num_projections == 0


def assert_unchanged(model, before):
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0)), key


@pytest.mark.parametrize("how", ["zero", "twice the same row"])
@pytest.mark.parametrize("method", ["auto", "eigh", "newton-schulz", "svd"])
@pytest.mark.parametrize("name", ["0.0", "1.mix", "2.down", "3"])
def test_a_deficient_weight_is_named_and_nothing_is_changed(model, name, method, how):
    layer = dict(model.named_modules())[name]
    with torch.no_grad():
        if how == "zero":
            layer.weight.zero_()
        else:
            # Of the smaller side.
            side = layer.weight.transpose(0, 1) if name in ("0.0", "2.down") else layer.weight
            side[0] = side[1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    procrustes = Procrustes("*", model=model, method=method)
    message = rf"The weight of '{name}' has singular values that are zero to rounding"
    with pytest.raises(RankDeficientWeightError, match=message):
        procrustes.project()
    assert_unchanged(model, before)
    assert procrustes.num_projections == 0
    # With another weight all is well.
    nn.init.orthogonal_(layer.weight.data.flatten(1))
    layer.reset_parameters()
    procrustes.project()


def test_of_layers_of_one_shape_only_the_deficient_one_is_named():
    layers = {name: nn.Linear(4, 4) for name in "abc"}
    nn.init.zeros_(layers["b"].weight)
    with pytest.raises(RankDeficientWeightError, match="The weight of 'b' has"):
        Procrustes(layers).project()
    groups = nn.Conv1d(4, 4, 1, groups=2)
    nn.init.zeros_(groups.weight[2:])
    with pytest.raises(RankDeficientWeightError, match="'g'"):
        Procrustes({"a": nn.Conv1d(4, 4, 1, groups=2), "g": groups}).project()


@pytest.mark.parametrize("method", ["auto", "eigh", "newton-schulz", "svd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ordinary_weights_in_half_precision_are_not_deficient(dtype, method):
    layer = nn.Linear(128, 100, dtype=dtype)
    Procrustes(layer, method=method).project()
    values = torch.linalg.svdvals(layer.weight.detach().double())
    assert values.numpy() == pytest.approx(1.0, abs=4 * torch.finfo(dtype).eps)


def test_a_nearly_singular_square_layer_is_not_deficient():
    layer = nn.Linear(256, 256)
    left, values, right = torch.linalg.svd(layer.weight.detach().double())
    values[-1] = 1e-5 * values[0]  # one in a hundred random ones is as bad
    with torch.no_grad():
        layer.weight.copy_((left * values) @ right)
    Procrustes(layer).project()
    found = torch.linalg.svdvals(layer.weight.detach().double())
    assert found.numpy() == pytest.approx(1.0, abs=1e-5)


# -------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "target", [0, -1.0, math.nan, math.inf, "bakward", True, None, [1.0], np.zeros(2), -math.inf]
)
def test_targets_that_are_none_are_refused(target):
    message = "target must be 'backward', 'forward' or a positive number"
    with pytest.raises(InvalidArgumentError, match=message):
        Procrustes(nn.Linear(2, 2), target=target)
    with pytest.raises(InvalidArgumentError, match=message):
        Procrustes({"x": nn.Linear(2, 2)}, target={"x": target})


@pytest.mark.parametrize("target", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)])
def test_targets_of_any_kind_of_number_are_taken(target):
    (layer,) = Procrustes(nn.Linear(2, 2), target=target).layers
    assert (layer.target, type(layer.target)) == (2.0, float)


def test_targets_of_layers_that_are_not_there_are_refused():
    with pytest.raises(LayerSelectionError, match="target names 'y', but the layers are 'x'"):
        Procrustes({"x": nn.Linear(2, 2)}, target={"y": 1.0})


def test_two_layers_with_one_weight_must_want_the_same():
    one, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.weight = one.weight
    layers = {"x": one, "y": other}
    assert len(Procrustes(layers, target=1.5).layers) == 1
    with pytest.raises(InvalidArgumentError, match="'x' and 'y' share one weight"):
        Procrustes(layers, target={"x": 1.0, "y": 2.0})
    strided = nn.Conv1d(4, 2, 3, stride=3)
    dense = nn.Conv1d(4, 2, 3)
    dense.weight = strided.weight
    with pytest.raises(InvalidArgumentError, match="projected in two ways"):
        Procrustes({"x": strided, "y": dense}, target=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweeps": 0}, "sweeps must be a positive integer, got 0"),
        ({"sweeps": 1.0}, "sweeps"),
        ({"sweeps": True}, "sweeps"),
        ({"method": "qr"}, "method must be one of auto, eigh, newton-schulz, svd, got 'qr'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Procrustes(nn.Linear(2, 2), **options)


def test_so_are_sweeps_of_one_projection():
    with pytest.raises(InvalidArgumentError, match="sweeps must be a positive integer, got -1"):
        Procrustes(nn.Linear(2, 2)).project(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a positive integer, got 0"),
        ({"every": 1.5}, "every"),
        ({"every": True}, "every"),
        ({"probability": 0}, r"probability must lie in \(0, 1\] or be None, got 0"),
        ({"probability": 1.01}, "probability"),
        ({"probability": -0.5}, "probability"),
        ({"probability": math.nan}, "probability"),
        ({"probability": "half"}, "probability must .* got 'half'"),
        ({"probability": True}, "probability must .* got True"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 0.5}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(InvalidArgumentError, match=message):
        Procrustes(layer).attach(optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks


# ------------------------------------------------------------------------ optimizers


def test_an_optimizer_that_does_not_own_the_weight_is_refused(model):
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    procrustes = Procrustes(["1.down", "3", "2.down"], model=model)
    message = "does not own the weight of '1.down', '2.down'. Attach to the one that does"
    with pytest.raises(OptimizerMismatchError, match=message):
        procrustes.attach(optimizer)
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(OptimizerMismatchError, match="after the model has reached its device"):
        procrustes.attach([optimizer, optimizer])
    with pytest.raises(OptimizerMismatchError, match="does not own"):
        procrustes.attach([])


def test_a_frozen_layer_needs_no_optimizer(model):
    model[1]["down"].weight.requires_grad_(False)
    procrustes = Procrustes("1.down", model=model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(OptimizerMismatchError, match=r"frozen layers need project\(\) only once"):
        procrustes.attach(torch.optim.SGD(trained, lr=0.1))
    procrustes.project()
    assert not model[1]["down"].weight.requires_grad


class Cyclic:
    """An object that holds itself as its optimizer."""

    @property
    def optimizer(self):
        return self


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2), Cyclic()], ids=lambda x: str(type(x)))
def test_what_is_no_optimizer_is_refused(thing):
    message = f"{type(thing).__name__} is no torch.optim.Optimizer, .* call project"
    with pytest.raises(OptimizerMismatchError, match=message):
        Procrustes(nn.Linear(2, 2)).attach(thing)
    with pytest.raises(OptimizerMismatchError, match=message):
        Procrustes(nn.Linear(2, 2)).attach([thing])


def test_a_state_of_other_layers_or_optimizers_is_refused():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = Procrustes({"a": one}), Procrustes({"b": other})
    with pytest.raises(InvalidArgumentError, match="layers a with 0 optimizers .* here they are b"):
        second.load_state_dict(first.state_dict())
    first.attach(torch.optim.SGD(one.parameters(), lr=0.1))
    again = Procrustes({"a": one})
    with pytest.raises(InvalidArgumentError, match="with 1 optimizers attached; .* a with 0"):
        again.load_state_dict(first.state_dict())


@pytest.mark.parametrize("state", [{}, None, {"layers": ["a"]}], ids=repr)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(
        InvalidArgumentError, match="no state of a Procrustes: it has no .*'seconds"
    ):
        Procrustes({"a": nn.Linear(2, 2)}).load_state_dict(state)


@pytest.mark.parametrize("other", [{"every": 2}, {"probability": 0.5}, {"seed": 1}, {}], ids=str)
def test_a_state_of_another_schedule_is_refused(other):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    own = {"every": 3, "probability": np.float64(0.25), "seed": np.int64(7)}
    state = Procrustes(layer).attach(optimizer, **own).state_dict()
    assert state["schedule"] == own
    assert [type(x) for x in state["schedule"].values()] == [int, float, int]
    again = Procrustes(layer).attach(optimizer, **(own | other))
    if other:
        message = "attached with every=3, probability=0.25, seed=7, .* would not be the same"
        with pytest.raises(InvalidArgumentError, match=message):
            again.load_state_dict(state)
    else:
        again.load_state_dict(state)
