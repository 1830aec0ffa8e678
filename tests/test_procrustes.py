"""The regulariser itself: its targets, penalty and report; and the isometric transition."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from test_procrustes_routes import ALL, FREQUENCIES, dense, own_circle, values_of
from torch import nn

from conditioning.errors import InvalidArgumentError
from conditioning.procrustes import (
    IsometricDownsample,
    Procrustes,
)
from experiments.models import CifarResNet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def three_layers():
    return nn.Sequential(
        nn.Conv2d(3, 28, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(28, 32, 1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32 * 16, 2),
    )


# ------------------------------------------------------------------------------ targets

TARGETS = {
    "1x1 to twice the channels": (lambda: nn.Conv2d(64, 128, 1, stride=2), 2**0.5, 2.0),
    "1x1 to half": (lambda: nn.Conv2d(128, 64, 1), 1.0, 2**0.5),
    "stem": (lambda: nn.Conv2d(3, 64, 3), (64 / 3) ** 0.5, 1.0),
    "stem of stride 2": (lambda: nn.Conv2d(3, 64, 7, stride=2), (64 / 12) ** 0.5, 1.0),
    "isometric": (lambda: nn.Conv2d(16, 32, 2, stride=2), 1.0, 2**0.5),
    "linear": (lambda: nn.Linear(50, 10), 1.0, 5**0.5),
    "transposed": (lambda: nn.ConvTranspose2d(32, 16, 2, stride=2), 2**0.5, 1.0),
    "transposed 1x1": (lambda: nn.ConvTranspose2d(64, 128, 1), 2**0.5, 1.0),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), 2**0.5, 1.0),
    "groups": (lambda: nn.Conv2d(8, 24, 1, groups=2), 3**0.5, 1.0),
    "gaps between windows": (lambda: nn.Conv1d(4, 4, 2, stride=3), 1.0, 3**0.5),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_those_of_the_closed_form(name):
    make, backward, forward = TARGETS[name]
    for aim, expected in (("backward", backward), ("forward", forward), (0.3, 0.3)):
        (one,) = Procrustes(make(), target=aim).layers
        assert one.target == pytest.approx(expected, rel=1e-12)
        assert one.aim == (aim if isinstance(aim, str) else "given")


def test_each_layer_may_have_a_target_of_its_own():
    model = three_layers()
    procrustes = Procrustes(["0", "2", "4"], model=model, target={"0": "forward", "4": 2})
    assert [layer.target for layer in procrustes.layers] == [
        pytest.approx(1.0), pytest.approx((32 / 28) ** 0.5), 2.0,
    ]  # fmt: skip
    assert [layer.aim for layer in procrustes.layers] == ["forward", "backward", "given"]


@pytest.mark.parametrize("method", ["auto", "eigh", "newton-schulz", "svd"])
def test_layers_of_one_shape_are_projected_as_each_alone(method):
    makes = [lambda: nn.Conv2d(6, 4, 3), lambda: nn.Conv2d(6, 4, 2, stride=2, groups=2)]
    layers = [make() for make in makes for _ in range(3)]
    alone = copy.deepcopy(layers)
    targets = {f"layer {i}": 1.0 + i for i in range(6)}
    Procrustes(layers, target=targets, method=method).project()
    for place, layer in enumerate(alone):
        Procrustes(layer, target=1.0 + place, method=method).project()
        assert torch.allclose(layer.weight, layers[place].weight, atol=1e-5)


def test_it_shows_its_layers_and_targets():
    shown = repr(Procrustes(["0", "2"], model=three_layers()))
    assert shown == "Procrustes(0: 3.055, 2: 1.069)"


# ------------------------------------------------------------------------------ penalty


def closed_form(layer, circle, target):
    """The penalty from singular values of the operator on the smallest circle."""
    return (values_of(layer, circle).square() / target**2 - 1).square().mean()


MEASURED = [name for name in ALL if own_circle(name) is not None]


@pytest.mark.parametrize("name", MEASURED)
def test_the_penalty_is_that_of_the_singular_values(name):
    layer = ALL[name]().double()
    found = Procrustes(layer, target=0.9).penalty()
    assert found.shape == ()
    expected = closed_form(layer, own_circle(name), 0.9)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-10)


def test_penalties_of_layers_add_up():
    layers = [ALL[name]().double() for name in ("1x1", "3, stride 2", "groups", "groups")]
    total = Procrustes(layers).penalty().detach()
    parts = [Procrustes(layer).penalty().detach() for layer in layers]
    assert float(total) == pytest.approx(float(sum(parts)), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_the_penalty_is_zero_once_projected_and_not_before(name):
    layer = ALL[name]().double()
    procrustes = Procrustes(layer)
    assert float(procrustes.penalty().detach()) > 1e-3
    procrustes.project(sweeps=1000)
    assert float(procrustes.penalty().detach()) < (1e-3 if name in FREQUENCIES else 1e-24)
    with torch.no_grad():
        layer.weight.mul_(1.1)
    assert float(procrustes.penalty().detach()) == pytest.approx(0.21**2, rel=0.2)


SMALL = ("linear, tall", "2x2, stride 2", "stem, stride 2", "to few channels, stride 2",
         "3, stride 2", "groups", "transposed, 3, stride 2")  # fmt: skip


@pytest.mark.parametrize("at", ["random", "projected", "zero"])
@pytest.mark.parametrize("name", SMALL)
def test_the_penalty_has_two_derivatives_wherever_it_is(name, at):
    layer = ALL[name]().double()
    procrustes = Procrustes(layer)
    if at == "projected":
        procrustes.project()
    elif at == "zero":
        nn.init.zeros_(layer.weight)
    direction = torch.randn_like(layer.weight)
    weight = layer.weight.detach().clone()
    del layer.weight

    def along(t):
        # What the penalty reads is the attribute, so a tensor with a graph will do.
        layer.weight = weight + t * direction
        return procrustes.penalty()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(along, t)
    torch.autograd.gradgradcheck(along, t)


@pytest.mark.parametrize("name", ["1x1", "2x2, stride 2", "stem", "3x3", "3, stride 2"])
def test_descending_on_the_penalty_makes_the_operator_flat(name):
    layer = ALL[name]().double()
    procrustes = Procrustes(layer, target=1.0)
    optimizer = torch.optim.LBFGS([layer.weight], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = procrustes.penalty()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert values_of(layer, own_circle(name)).numpy() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_penalty_of_coarse_weights_is_computed_finely(dtype):
    layer = nn.Conv2d(4, 6, 3).to(dtype)
    fine = nn.Conv2d(4, 6, 3).double()
    with torch.no_grad():
        fine.weight.copy_(layer.weight)
    found, exact = Procrustes(layer).penalty(), Procrustes(fine).penalty()
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    found.backward()
    exact.backward()
    assert layer.weight.grad.dtype == dtype
    error = (layer.weight.grad.double() - fine.weight.grad).norm() / fine.weight.grad.norm()
    assert float(error) < 2 * torch.finfo(dtype).eps + 1e-5


def test_autocast_does_not_make_the_penalty_coarse():
    procrustes = Procrustes(["0", "2", "4"], model=three_layers())
    outside = procrustes.penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(procrustes.penalty(), outside)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_loss_with_the_penalty_can_be_compiled():
    torch._dynamo.reset()
    procrustes = Procrustes(["0", "4"], model=three_layers())
    compiled = torch.compile(procrustes.penalty, backend="aot_eager")
    assert torch.allclose(compiled(), procrustes.penalty(), rtol=1e-6)


# ---------------------------------------------------------------------- for_transitions


def test_the_papers_network_is_regularised_in_one_line():
    net = CifarResNet(2, "proc", widths=(4, 8, 16), transition_init="lecun")
    procrustes = Procrustes.for_transitions(net)
    assert [layer.name for layer in procrustes.layers] == ["stem.0", "down1", "down2"]
    procrustes.project()
    targets = [math.sqrt(16 / 3), math.sqrt(2), math.sqrt(2)]
    assert [layer.target for layer in procrustes.layers] == pytest.approx(targets)
    for row in procrustes.report():
        assert row.now == pytest.approx((row.target, row.target), rel=0.5)


def test_options_go_through():
    net = CifarResNet(2, "proc", widths=(4, 8, 16))
    procrustes = Procrustes.for_transitions(
        net, torch.randn(2, 3, 8, 8), stem=False, target="forward", sweeps=3, method="svd"
    )
    assert [layer.name for layer in procrustes.layers] == ["down1", "down2"]
    assert [layer.target for layer in procrustes.layers] == [2.0, 2.0]
    assert (procrustes.sweeps, procrustes.method) == (3, "svd")


# ------------------------------------------------------------------ IsometricDownsample


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (9, 4), (2, 3)])
@pytest.mark.parametrize(
    ("c_in", "c_out", "factor"), [(4, None, 2), (4, 16, 2), (3, 5, 2), (2, 7, 3), (6, 2, 1)]
)
def test_an_isometric_transition_keeps_the_norm_of_every_gradient(c_in, c_out, factor, size):
    layer = IsometricDownsample(c_in, c_out, factor).double()
    size = tuple(max(n, factor) for n in size)
    x = torch.randn(2, c_in, *size, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, c_out or 2 * c_in, *(n // factor for n in size))
    for gradient in (torch.randn_like(y), torch.ones_like(y), y.detach()):
        (found,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        assert float(found.norm()) == pytest.approx(float(gradient.norm()), rel=1e-6)
        assert torch.allclose(layer(found), gradient, atol=1e-5)


def test_in_double_precision_it_is_an_isometry_to_rounding():
    layer = IsometricDownsample(3, dtype=torch.float64)
    matrix = dense(layer, (4, 6))
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)).double(), atol=1e-14)
    assert layer.bias is None
    assert isinstance(layer, nn.Conv2d)


def test_projecting_leaves_a_new_one_where_it_is_and_brings_a_trained_one_back():
    layer = IsometricDownsample(4, dtype=torch.float64)
    before = layer.weight.detach().clone()
    procrustes = Procrustes(layer)
    assert procrustes.layers[0].target == 1.0
    procrustes.project()
    assert torch.allclose(layer.weight, before, atol=1e-14)
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    procrustes.project()
    assert procrustes.report()[0].now == pytest.approx((1.0, 1.0), abs=1e-12)


def test_its_weight_comes_from_the_generator():
    def made(seed, **options):
        return IsometricDownsample(3, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(made(1).weight, made(1).weight)
    assert not torch.equal(made(1).weight, made(2).weight)
    state = torch.get_rng_state()
    made(3)
    assert torch.equal(torch.get_rng_state(), state)
    # The numbers are those of double precision, rounded.
    assert torch.equal(made(1).weight, made(1, dtype=torch.float64).weight.float())


def test_its_weight_is_uniform_among_orthonormal_rows():
    rows = torch.stack([IsometricDownsample(1, 1).weight.detach().flatten() for _ in range(4000)])
    assert torch.allclose(rows.norm(dim=1), torch.ones(4000), atol=1e-6)
    # Mean zero and covariance 1/4, to five standard deviations.
    assert float(rows.mean(0).abs().max()) < 5 * 0.5 / 4000**0.5
    assert torch.allclose(rows.T @ rows / 4000, torch.eye(4) / 4, atol=5 * 0.25 / 4000**0.5)


def test_it_can_be_copied_pickled_and_reset():
    generator = torch.Generator().manual_seed(7)
    layer = IsometricDownsample(3, generator=generator)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.weight, layer.weight)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    matrix = layer.weight.detach().flatten(1)
    assert torch.allclose(matrix @ matrix.T, torch.eye(6), atol=1e-6)


def test_on_the_meta_device_it_waits_for_its_values():
    state = torch.get_rng_state()
    with torch.device("meta"):
        inside = IsometricDownsample(3)
    asked = IsometricDownsample(3, device="meta")
    assert inside.weight.is_meta
    assert asked.weight.is_meta
    assert torch.equal(torch.get_rng_state(), state)
    layer = asked.to_empty(device="cpu")
    layer.reset_parameters()
    matrix = layer.weight.detach().flatten(1)
    assert torch.allclose(matrix @ matrix.T, torch.eye(6), atol=1e-6)


def test_a_device_that_is_asked_for_comes_before_the_one_around():
    with torch.device("meta"):
        layer = IsometricDownsample(3, device="cpu")
    matrix = layer.weight.detach().flatten(1)
    with torch.device("cpu"):
        assert torch.allclose(matrix @ matrix.T, torch.eye(6), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 13), "13 rows cannot be orthonormal in windows of 12 entries"),
        ((2, 19, 3), "windows of 18 entries"),
        ((2, None, 1), "4 rows cannot be orthonormal"),
        ((0,), "in_channels must be a positive integer, got 0"),
        ((True,), "in_channels"),
        ((3, 2.0), "out_channels must be a positive integer, got 2.0"),
        ((3, 2, -1), "factor"),
    ],
)
def test_what_cannot_be_isometric_is_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        IsometricDownsample(*arguments)
