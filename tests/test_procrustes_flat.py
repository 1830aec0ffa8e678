"""On which circle spectra are measured, and layers that are flat already."""

from __future__ import annotations

import math

import pytest
import torch
from test_procrustes_routes import ALL, FREQUENCIES, gap, projected, values_of
from torch import nn

from conditioning.procrustes import Procrustes, routes
from conditioning.procrustes.layers import prepared
from conditioning.singular.symbol import Grid


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------- how finely it is measured


@pytest.mark.parametrize("name", ["3x3", "3, stride 2", "5, stride 3", "groups"])
def test_on_any_circle_the_values_measured_are_those_of_the_operator(name):
    layer = FREQUENCIES[name][0]().double()
    (one,) = prepared({"x": layer}, "backward")
    outputs = (8,) * len(one.shape.kernel)
    found = routes.singular_values(one.geometry.filters(layer.weight), one.shape, outputs)
    truth = values_of(layer, tuple(8 * s for s in one.geometry.stride))
    assert float(found.max()) == pytest.approx(float(truth.max()), rel=1e-10)
    assert float(found.min()) == pytest.approx(float(truth.min()), rel=1e-10)


def test_small_singular_values_are_measured_with_all_their_digits():
    layer = nn.Conv1d(3, 3, 2).double()
    with torch.no_grad():
        layer.weight[0] *= 1e-9
    (one,) = prepared({"x": layer}, "backward")
    found = routes.singular_values(one.geometry.filters(layer.weight), one.shape, (6,))
    truth = values_of(layer, (6,))
    assert float(truth.min()) < 1e-8 * float(truth.max())
    assert float(found.min()) == pytest.approx(float(truth.min()), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e200])
def test_weights_of_any_size_are_measured(scale):
    layer = nn.Conv1d(3, 4, 3).double()
    (one,) = prepared({"x": layer}, "backward")
    filters = one.geometry.filters(layer.weight.detach())
    expected = scale * routes.singular_values(filters, one.shape)
    assert torch.allclose(routes.singular_values(scale * filters, one.shape), expected, atol=0.0)


def test_weights_that_are_not_finite_have_no_values():
    layer = nn.Conv1d(2, 3, 3)
    (one,) = prepared({"x": layer}, "backward")
    filters = one.geometry.filters(layer.weight.detach()) * math.inf
    assert bool(routes.singular_values(filters, one.shape).isnan().all())


SHAPES = [((3, 3), (1, 1)), ((3, 3), (2, 2)), ((7, 7), (2, 2)), ((5,), (1,)), ((3, 2), (1, 2))]


@pytest.mark.parametrize("channels", [(4, 4), (64, 64), (256, 256), (1024, 512)])
@pytest.mark.parametrize(("kernel", "stride"), SHAPES, ids=str)
def test_the_circle_is_a_multiple_of_the_smallest_and_finer(kernel, stride, channels):
    shape = routes.Shape(*channels, kernel, stride)
    found, smallest = routes.circle(shape), Grid.smallest(kernel, stride).outputs
    for outputs, least, k, s in zip(found, smallest, kernel, stride, strict=True):
        assert outputs % least == 0
        assert outputs >= 2 * least if k > s else outputs == 1
    if channels == (4, 4):
        assert 500 < math.prod(found) <= 1024


def test_the_circle_is_the_layers_own_where_that_is_known_and_not_too_large():
    shape = routes.Shape(8, 8, (3, 3), (1, 1))
    assert routes.circle(shape, own=(7, 12)) == (7, 12)
    assert routes.circle(routes.Shape(8, 8, (1, 3), (1, 1)), own=(7, 12)) == (1, 12)
    wide = routes.Shape(1024, 1024, (3, 3), (1, 1))
    assert routes.circle(wide, own=(224, 224)) == routes.circle(wide) == (10, 10)
    assert routes.circle(routes.Shape(8, 8, (2,), (2,)), own=(9,)) is None


# --------------------------------------------------------------------- flat in other ways


def single_tap(c_in, c_out):
    """A stem that is flat though its taps, but one, are zero: as nn.init.dirac_ makes them."""
    layer = nn.Conv2d(c_in, c_out, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :, 1, 1] = nn.init.orthogonal_(torch.empty(c_out, c_in).double())
        layer.weight.mul_(math.sqrt(max(c_out / c_in, 1)))
    return layer


@pytest.mark.parametrize("method", ["eigh", "newton-schulz", "svd"])
@pytest.mark.parametrize("channels", [(2, 20), (20, 2)])
def test_a_flat_layer_without_orthogonal_taps_stays_as_it_is(channels, method):
    layer = single_tap(*channels)
    before = layer.weight.detach().clone()
    assert float(Procrustes(layer).penalty().detach()) < 1e-28
    one = projected(layer, method=method)
    assert one.shape.route == "taps"
    assert torch.allclose(layer.weight, before, atol=1e-12)


def test_one_that_is_nearly_flat_goes_to_what_is_flat_nearby():
    layer = single_tap(2, 20)
    with torch.no_grad():
        layer.weight.add_(1e-3 * torch.randn_like(layer.weight))
    before = layer.weight.detach().clone()
    one = projected(layer, sweeps=30)
    assert gap(before, layer.weight.detach()) < 0.05 * float(before.norm())
    assert float((values_of(layer, (7, 7)) / one.target - 1).abs().max()) < 1e-4


def test_the_size_of_a_weight_does_not_decide_where_it_goes():
    for make in (lambda: single_tap(2, 20), lambda: nn.Conv2d(2, 20, 3, bias=False).double()):
        layer, other = make(), make()
        with torch.no_grad():
            layer.weight.add_(1e-3 * torch.randn_like(layer.weight))
            other.weight.copy_(1e3 * layer.weight)
        Procrustes([layer, other], target=1.0).project()
        assert torch.allclose(layer.weight, other.weight, atol=1e-9)


def test_of_groups_each_goes_its_own_way():
    layer = nn.Conv1d(2, 8, 3, groups=2, bias=False).double()
    with torch.no_grad():
        layer.weight[:4] = 0
        layer.weight[0, 0, 1] = 2.0
    before = layer.weight.detach().clone()
    one = projected(layer)
    assert torch.allclose(layer.weight[:4], before[:4], atol=1e-12)
    assert gap(layer.weight[4:].detach(), before[4:]) > 0.1
    assert values_of(layer, (7,)).numpy() == pytest.approx(one.target, rel=1e-10)


def test_projected_stems_that_train_keep_orthogonal_taps():
    layer = nn.Conv2d(3, 64, 3, bias=False).double()
    procrustes = Procrustes(layer)
    procrustes.project()
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        with torch.no_grad():
            layer.weight.add_(scale * layer.weight.std() * torch.randn_like(layer.weight))
        procrustes.project()
        columns = layer.weight.detach().flatten(1)
        gram = columns.T @ columns
        assert torch.allclose(gram, torch.eye(27).double() * gram[0, 0], atol=1e-9)


@pytest.mark.parametrize("name", ["1x1", "stem", "3x3"])
def test_the_default_device_does_not_matter(name):
    layer = ALL[name]()
    routes._cached.cache_clear()
    with torch.device("meta"):
        procrustes = Procrustes(layer)
        procrustes.project()
        assert procrustes.report()[0].now[0] > 0.1
        assert procrustes.penalty().device.type == "cpu"
    routes._cached.cache_clear()
