"""Each way of projecting, against the operator of the layer built entry by entry."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conditioning.procrustes import Procrustes, routes
from conditioning.procrustes.layers import prepared
from conditioning.singular.geometry import geometry_of
from conditioning.singular.symbol import Grid


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dense(layer, sizes):
    """The operator of a layer on a circle, entry by entry; of a transposed one, its transpose.

    Parameters
    ----------
    sizes : tuple of int
        Positions on each axis on the side with more of them; strides divide them.
    """
    g = geometry_of(layer)
    filters = g.filters(layer.weight.detach()).double().numpy()
    outputs = [n // s for n, s in zip(sizes, g.stride, strict=True)]
    shape = (g.groups, g.rows, *outputs, g.groups, g.columns, *sizes)
    matrix = np.zeros(shape)
    for group in range(g.groups):
        for at in itertools.product(*map(range, outputs)):
            for tap in itertools.product(*map(range, g.kernel)):
                place = tuple(
                    (a * s + t * d) % n
                    for a, s, t, d, n in zip(at, g.stride, tap, g.dilation, sizes, strict=True)
                )
                block = matrix[(group, slice(None), *at, group, slice(None), *place)]
                block += filters[(group, slice(None), slice(None), *tap)]
    return torch.from_numpy(matrix.reshape(g.groups * g.rows * math.prod(outputs), -1))


def values_of(layer, sizes):
    """Singular values of that, without those that are zero because of its shape."""
    g = geometry_of(layer)
    outputs = math.prod(n // s for n, s in zip(sizes, g.stride, strict=True))
    values = torch.linalg.svdvals(dense(layer, sizes))
    return values[: g.groups * g.rank_per_position * outputs]


def test_the_dense_operator_is_the_one_that_torch_computes():
    layer = nn.Conv2d(
        4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, bias=False, dtype=torch.float64
    )
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    around = nn.functional.pad(x, (0, 2, 0, 2), mode="circular")
    expected = layer(around)[:, :, :3, :5].reshape(-1)
    assert torch.allclose(dense(layer, (6, 5)) @ x.reshape(-1), expected, atol=1e-13)


def projected(layer, **options):
    procrustes = Procrustes(layer, **options)
    procrustes.project()
    (one,) = procrustes.layers
    return one


# What is not said is 1.
WINDOWS = {
    "linear, wide": (lambda: nn.Linear(7, 5), [()]),
    "linear, tall": (lambda: nn.Linear(5, 7), [()]),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), [(1, 1), (3, 4)]),
    "1x1, stride 2": (lambda: nn.Conv2d(4, 6, 1, stride=2), [(2, 2), (4, 6)]),
    "1x1, stride 3, groups": (lambda: nn.Conv2d(4, 6, 1, stride=3, groups=2), [(3, 6)]),
    "2x2, stride 2": (lambda: nn.Conv2d(3, 6, 2, stride=2), [(2, 2), (4, 6)]),
    "2x2, stride 2, tall": (lambda: nn.Conv2d(2, 11, 2, stride=2), [(2, 4)]),
    "2x3, stride 2x3, padded": (
        lambda: nn.Conv2d(2, 5, (2, 3), stride=(2, 3), padding=1), [(4, 6)]
    ),
    "2x2, stride 3": (lambda: nn.Conv2d(2, 5, 2, stride=3), [(3, 3), (6, 3)]),
    "2, stride 2, dilation 3": (lambda: nn.Conv1d(2, 3, 2, stride=2, dilation=3), [(8,), (10,)]),
    "3, stride 6, dilation 2": (lambda: nn.Conv1d(2, 3, 3, stride=6, dilation=2), [(6,), (12,)]),
    "2, stride 4, dilation 2": (lambda: nn.Conv1d(3, 4, 2, stride=4, dilation=2), [(4,), (12,)]),
    "transposed, 2x2, stride 2": (lambda: nn.ConvTranspose2d(6, 3, 2, stride=2), [(2, 4)]),
    "transposed, tall, groups": (
        lambda: nn.ConvTranspose1d(4, 8, 2, stride=2, groups=2), [(2,), (6,)]
    ),
    "depthwise, stride 2": (lambda: nn.Conv2d(3, 6, 2, stride=2, groups=3), [(4, 2)]),
    "three axes": (lambda: nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 2)), [(1, 2, 2), (2, 2, 4)]),
}  # fmt: skip
TAPS = {
    "stem": (lambda: nn.Conv2d(2, 19, 3, padding=1), [(3, 3), (3, 5), (5, 4)]),
    "stem, exactly": (lambda: nn.Conv1d(2, 8, 4), [(4,), (5,), (7,), (12,)]),
    "stem, even": (lambda: nn.Conv2d(1, 9, 2), [(2, 3), (4, 4)]),
    "stem, stride 2": (lambda: nn.Conv2d(1, 12, 3, stride=2), [(4, 4), (6, 4)]),
    "stem, 7, stride 2": (lambda: nn.Conv1d(2, 15, 7, stride=2), [(8,), (10,), (14,)]),
    "stem, 5, stride 3": (lambda: nn.Conv1d(2, 11, 5, stride=3), [(6,), (9,)]),
    "stem, 3x2, stride 2x1": (lambda: nn.Conv2d(2, 13, (3, 2), stride=(2, 1)), [(4, 3), (6, 2)]),
    "stem, stride on one axis": (lambda: nn.Conv2d(1, 5, (1, 4), stride=(1, 2)), [(2, 4), (1, 6)]),
    "stem, windows on one axis": (lambda: nn.Conv2d(1, 7, (2, 3), stride=(2, 1)), [(2, 3), (4, 5)]),
    "stem, dilation": (lambda: nn.Conv1d(2, 7, 3, dilation=2), [(5,), (6,), (7,)]),
    "stem, stride 4, dilation 2": (lambda: nn.Conv1d(2, 7, 3, stride=4, dilation=2), [(8,), (12,)]),
    "stem, stride 2, dilation 3": (lambda: nn.Conv1d(2, 7, 3, stride=2, dilation=3), [(8,), (12,)]),
    "to few channels": (lambda: nn.Conv2d(19, 2, 3), [(3, 3), (5, 4)]),
    "to few channels, stride 2": (lambda: nn.Conv1d(9, 2, 4, stride=2), [(4,), (6,), (10,)]),
    "to one channel in each group": (lambda: nn.Conv1d(8, 2, 3, groups=2), [(3,), (5,)]),
    "transposed, to few": (lambda: nn.ConvTranspose2d(11, 1, 3, stride=2), [(4, 6)]),
    "transposed, to many": (lambda: nn.ConvTranspose1d(2, 9, 4), [(4,), (7,)]),
    "stem, three axes": (lambda: nn.Conv3d(1, 9, 2), [(2, 2, 3)]),
    "stem with groups": (lambda: nn.Conv1d(2, 8, 3, groups=2), [(3,), (4,)]),
}
FREQUENCIES = {
    "3x3": (lambda: nn.Conv2d(3, 4, 3, padding=1), (5, 5), [(7, 5), (6, 8)]),
    "3, square": (lambda: nn.Conv1d(4, 4, 3), (5,), [(6,), (7,), (16,)]),
    "3, stride 2": (lambda: nn.Conv1d(3, 5, 3, stride=2), (6,), [(8,), (10,), (14,)]),
    "4, stride 2": (lambda: nn.Conv1d(2, 4, 4, stride=2), (6,), [(8,), (10,), (18,)]),
    "3x3, stride 2": (lambda: nn.Conv2d(2, 4, 3, stride=2), (6, 6), [(8, 6)]),
    "5, stride 3": (lambda: nn.Conv1d(2, 5, 5, stride=3), (9,), [(12,), (15,)]),
    "3x2, stride 1x2": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2)), (5, 2), [(5, 4), (6, 6)]),
    "3, stride 2, dilation 3": (
        lambda: nn.Conv1d(3, 5, 3, stride=2, dilation=3), (10,), [(14,), (12,)]
    ),
    "3, stride 4, dilation 2": (
        lambda: nn.Conv1d(3, 5, 3, stride=4, dilation=2), (12,), [(16,), (20,)]
    ),
    "transposed, 3, stride 2": (lambda: nn.ConvTranspose1d(5, 3, 3, stride=2), (6,), [(8,)]),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (5,), [(6,), (9,)]),
    "three axes": (lambda: nn.Conv3d(3, 2, (1, 2, 2)), (1, 3, 3), [(2, 4, 3)]),
}  # fmt: skip
ALL = {name: made[0] for name, made in (WINDOWS | TAPS | FREQUENCIES).items()}


@pytest.mark.parametrize("target", ["backward", "forward", 0.7])
@pytest.mark.parametrize("name", [*WINDOWS, *TAPS])
def test_one_step_makes_the_operator_flat_on_every_circle(name, target):
    make, circles = (WINDOWS | TAPS)[name]
    layer = make().double()
    one = projected(layer, target=target)
    assert one.shape.route == ("window" if name in WINDOWS else "taps")
    for sizes in circles:
        values = values_of(layer, sizes)
        assert float((values / one.target - 1).abs().max()) < 1e-10
    assert target != 0.7 or one.target == 0.7


@pytest.mark.parametrize("name", FREQUENCIES)
def test_many_sweeps_make_the_operator_flat_on_the_smallest_circle_and_on_larger_ones(name):
    make, smallest, larger = FREQUENCIES[name]
    layer = make().double()
    one = projected(layer, sweeps=400, target=1.3)
    assert one.shape.route == "frequencies"
    gap = float((values_of(layer, smallest) / 1.3 - 1).abs().max())
    assert gap < 0.02
    for sizes in larger:
        # Between the points of the smallest circle the symbol is a polynomial through them.
        assert float((values_of(layer, sizes) / 1.3 - 1).abs().max()) < 3 * gap + 1e-12


@pytest.mark.parametrize("name", FREQUENCIES)
def test_each_sweep_brings_the_operator_nearer_to_a_flat_one(name):
    make, smallest, _ = FREQUENCIES[name]
    layer = make().double()
    procrustes = Procrustes(layer, target=1.0)
    gaps, spreads = [], []
    for _ in range(12):
        values = values_of(layer, smallest)
        gaps.append(float((values - 1).square().sum()))
        spreads.append(float(values.max() / values.min()))
        procrustes.project()
    # What alternating projections promise, in the Frobenius norm.
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(gaps))
    assert spreads[-1] < 0.5 * (spreads[0] - 1) + 1


def test_sweeps_of_one_call_are_as_good_as_calls():
    one, other = (nn.Conv1d(3, 4, 3, stride=2).double() for _ in range(2))
    with torch.no_grad():
        other.weight.copy_(one.weight)
    procrustes = Procrustes(one, target=1.0)
    for _ in range(7):
        procrustes.project()
    Procrustes(other, target=1.0, sweeps=7).project()
    assert torch.allclose(one.weight, other.weight, atol=1e-12)


def by_hand(weight, stride, sizes, target):
    """One alternating projection with the full transform, aliases folded one by one, and SVDs."""
    axes = tuple(range(2, weight.ndim))
    transform = torch.fft.fftn(weight, s=sizes, dim=axes)  # rows, columns, *sizes
    outputs = [n // s for n, s in zip(sizes, stride, strict=True)]
    flat = torch.zeros_like(transform)
    for at in itertools.product(*map(range, outputs)):
        aliases = [
            tuple(a + j * m for a, j, m in zip(at, shift, outputs, strict=True))
            for shift in itertools.product(*map(range, stride))
        ]
        block = torch.cat([transform[(..., *f)] for f in aliases], dim=1)
        left, _, right = torch.linalg.svd(block, full_matrices=False)
        parts = (target * math.prod(stride) ** 0.5 * (left @ right)).split(weight.shape[1], dim=1)
        for f, part in zip(aliases, parts, strict=True):
            flat[(..., *f)] = part
    back = torch.fft.ifftn(flat, dim=axes)
    assert float(back.imag.abs().max()) < 1e-12
    return back.real[(..., *(slice(k) for k in weight.shape[2:]))]


@pytest.mark.parametrize("method", ["eigh", "newton-schulz", "svd"])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((3, 3), (1, 1)), ((3,), (2,)), ((4, 3), (2, 1)), ((5,), (3,)), ((3, 3), (2, 2))],
    ids=str,
)
def test_a_sweep_is_the_alternating_projection_with_the_full_transform(kernel, stride, method):
    make = nn.Conv1d if len(kernel) == 1 else nn.Conv2d
    layer = make(3, 4, kernel, stride=stride).double()
    before = layer.weight.detach().clone()
    sizes = tuple(s * (2 * ((k - 1) // s) + 1) for k, s in zip(kernel, stride, strict=True))
    once, twice = (projected_by(layer, before, method, sweeps) for sweeps in (1, 2))
    expected = by_hand(before, stride, sizes, 0.8)
    assert torch.allclose(once, expected, atol=1e-11)
    assert torch.allclose(twice, by_hand(expected, stride, sizes, 0.8), atol=1e-11)


def projected_by(layer, weight, method, sweeps):
    with torch.no_grad():
        layer.weight.copy_(weight)
    Procrustes(layer, target=0.8, method=method).project(sweeps)
    return layer.weight.detach().clone()


@pytest.mark.parametrize(("c_in", "c_out"), [(8, 6), (6, 8), (5, 5)])
def test_for_kernels_of_size_one_the_papers_route_by_frequencies_is_one_polar_factor(c_in, c_out):
    layer = nn.Conv2d(c_in, c_out, 1)
    before = layer.weight.detach().clone()
    one = projected(layer)
    expected = by_hand(before.double(), (1, 1), (4, 4), one.target)
    assert float((layer.weight.detach() - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(("c_in", "c_out"), [(64, 128), (128, 256)])
@pytest.mark.parametrize("method", ["eigh", "newton-schulz", "svd"])
def test_the_papers_transitions_have_only_singular_values_of_root_two(c_in, c_out, method):
    layer = nn.Conv2d(c_in, c_out, 1, stride=2, bias=False)
    projected(layer, method=method)
    values = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
    assert values.numpy() == pytest.approx(math.sqrt(2), abs=1e-5)


@pytest.mark.parametrize("method", ["eigh", "newton-schulz", "svd"])
def test_the_papers_stem_has_only_singular_values_of_4_619(method):
    layer = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    one = projected(layer, method=method)
    assert one.target == pytest.approx(math.sqrt(64 / 3))
    assert values_of(layer, (5, 5)).numpy() == pytest.approx(4.619, abs=1e-3)


def test_a_kernel_of_two_with_stride_two_becomes_an_isometry_backward():
    layer = nn.Conv2d(4, 8, 2, stride=2, bias=False)
    assert projected(layer).target == 1.0
    matrix = dense(layer, (4, 4))
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)).double(), atol=1e-5)


# ------------------------------------------------------------------------- nearest of all

WINDOW_LAYERS = {name: make for name, (make, _) in WINDOWS.items()}
TAPS_LAYERS = {name: make for name, (make, _) in TAPS.items()}


def random_like(layer, scale):
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn_like(layer.weight))
    return layer


def gap(one, other):
    return float(torch.linalg.vector_norm(one - other))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(WINDOW_LAYERS)), st.integers(0, 2**31), st.floats(0.01, 100))
def test_of_all_flat_windows_the_projected_one_is_nearest(name, seed, scale):
    torch.manual_seed(seed)
    layer = random_like(WINDOW_LAYERS[name]().double(), scale)
    before = layer.weight.detach().clone()
    one = projected(layer)
    nearest = layer.weight.detach().clone()
    g, distance = one.geometry, gap(before, nearest)
    for step in (1.0, 0.1, 1e-3):
        # Any flat matrices, made without the code: orthogonal factors of random ones.
        noise = g.matrices(nearest) + step * torch.randn_like(g.matrices(nearest))
        tall = noise if g.rows >= g.columns * g.taps else noise.mT
        q, r = torch.linalg.qr(tall)
        q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[:, None, :]
        flat = one.target * (q if tall is noise else q.mT)
        assert distance <= gap(g.matrices(before), flat) * (1 + 1e-10)
    # And it is flat itself.
    values = torch.linalg.svdvals(g.matrices(nearest))
    assert values.numpy() == pytest.approx(one.target, rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TAPS_LAYERS)), st.integers(0, 2**31), st.floats(0.01, 100))
def test_of_all_kernels_with_orthogonal_taps_the_projected_one_is_nearest(name, seed, scale):
    torch.manual_seed(seed)
    layer = random_like(TAPS_LAYERS[name]().double(), scale)
    before = layer.weight.detach().clone()
    one = projected(layer)
    nearest = one.geometry.filters(layer.weight.detach()).clone()
    distance = gap(one.geometry.filters(before), nearest)
    vertical = one.shape.columns * one.geometry.taps <= one.shape.rows
    for step in (1.0, 0.1, 1e-3):
        flat = orthogonal_taps(nearest + step * torch.randn_like(nearest), nearest, vertical)
        assert distance <= gap(one.geometry.filters(before), flat) * (1 + 1e-10)


def orthogonal_taps(filters, like, vertical):
    """Orthogonal columns (or rows) of all taps, as long as those of other filters."""
    flat, known = filters.flatten(3), like.flatten(3)
    if not vertical:
        flat, known = flat.transpose(1, 2), known.transpose(1, 2)
    matrix, lengths = flat.flatten(2), known.flatten(2).norm(dim=1, keepdim=True)
    q, r = torch.linalg.qr(matrix)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[:, None, :] * lengths
    split = q.unflatten(2, known.shape[2:])
    return (split if vertical else split.transpose(1, 2)).reshape(like.shape)


@pytest.mark.parametrize("name", [*WINDOWS, *TAPS])
def test_projecting_twice_is_projecting_once(name):
    layer = (WINDOWS | TAPS)[name][0]().double()
    projected(layer)
    once = layer.weight.detach().clone()
    projected(layer)
    assert torch.allclose(layer.weight, once, atol=1e-13)


# ----------------------------------------------------------------------- equal layers

EQUAL = {
    "dilation": ({}, {"dilation": 3}),
    "stride and dilation with a common factor": ({"stride": 2}, {"stride": 4, "dilation": 2}),
    "stride equal to dilation": ({}, {"stride": 3, "dilation": 3}),
    "stride and dilation without one": ({"stride": 2}, {"stride": 2, "dilation": 5}),
    "a kernel shorter than its stride": ({"stride": 3}, {"stride": 7}),
    "that with a common factor": ({"stride": 3}, {"stride": 9, "dilation": 2}),
}


@pytest.mark.parametrize("pair", EQUAL)
def test_layers_with_the_same_windows_are_projected_alike(pair):
    for channels in ((3, 4), (2, 9)):
        one, other = (nn.Conv1d(*channels, 3, **options).double() for options in EQUAL[pair])
        with torch.no_grad():
            other.weight.copy_(one.weight)
        shapes = [layer.shape for layer in prepared({"a": one, "b": other}, 1.0)]
        assert shapes[0] == shapes[1]
        Procrustes([one, other], target=1.1, sweeps=3).project()
        assert torch.equal(one.weight, other.weight)


# ------------------------------------------------------------- gains and measured values

LAYERS = {name: (make, circles[-1]) for name, (make, circles) in (WINDOWS | TAPS).items()}


@pytest.mark.parametrize("target", ["backward", "forward"])
@pytest.mark.parametrize("name", LAYERS)
def test_random_signals_keep_their_norm_in_the_mean(name, target):
    make, sizes = LAYERS[name]
    layer = make().double()
    projected(layer, target=target)
    matrix = dense(layer, sizes)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        matrix = matrix.T
    # E|W^T g|^2 / E|g|^2 is the squared Frobenius norm over the number of rows.
    size = matrix.shape[0 if target == "backward" else 1]
    assert float(matrix.square().sum()) / size == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize("target", ["backward", "forward"])
@pytest.mark.parametrize("name", FREQUENCIES)
def test_so_they_do_after_many_sweeps(name, target):
    make, sizes, _ = FREQUENCIES[name]
    layer = make().double()
    projected(layer, target=target, sweeps=300)
    matrix = dense(layer, sizes)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        matrix = matrix.T
    size = matrix.shape[0 if target == "backward" else 1]
    assert float(matrix.square().sum()) / size == pytest.approx(1.0, rel=0.01)


def own_circle(name):
    """The circle whose singular values are those that are measured; None if there is none."""
    g = geometry_of((WINDOWS | TAPS | FREQUENCIES)[name][0]())
    if not g.overlapping:
        # Wide enough for dilated windows to be as they are on the line.
        axes = zip(g.stride, g.dilation, g.kernel, strict=True)
        return tuple(s * (1 + d * (k - 1)) for s, d, k in axes)
    grid = Grid.smallest(g.kernel, g.window_stride)
    axes = zip(grid.sizes, g.stride, g.window_stride, strict=True)
    sizes = tuple(n * s // w for n, s, w in axes)
    common = any(math.gcd(n, d) > s for n, s, d in zip(sizes, g.stride, g.dilation, strict=True))
    return None if common else sizes


MEASURED = [name for name in (*WINDOWS, *TAPS, *FREQUENCIES) if own_circle(name) is not None]


@pytest.mark.parametrize("name", MEASURED)
def test_the_singular_values_that_are_measured_are_those_of_the_operator(name):
    layer = (WINDOWS | TAPS | FREQUENCIES)[name][0]().double()
    (one,) = prepared({"x": layer}, "backward")
    found = routes.singular_values(one.geometry.filters(layer.weight), one.shape)
    truth = values_of(layer, own_circle(name))
    assert found.dtype == torch.float64
    assert float(found.max()) == pytest.approx(float(truth.max()), rel=1e-10)
    assert float(found.min()) == pytest.approx(float(truth.min()), rel=1e-10)


def test_a_deficient_block_or_two_is_no_deficient_kernel():
    """The sum of the taps, which is the block at frequency zero, has rank one."""
    layer = nn.Conv1d(2, 3, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-9, 10, (3, 2, 3)))  # sums without rounding
        layer.weight[..., 2] = 1 - layer.weight[..., 0] - layer.weight[..., 1]
    assert int(torch.linalg.matrix_rank(layer.weight.sum(-1))) == 1
    projected(layer, sweeps=300, target=1.0)
    assert float((values_of(layer, (5,)) - 1).abs().max()) < 0.05
