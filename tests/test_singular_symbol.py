"""The blocks of a circular convolution against the dense matrix of one, wrapped by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conditioning.singular.symbol import Grid, Polyphase


def circulant(filters, grid):
    """The matrix of a convolution on circles, entry by entry."""
    rows, columns = filters.shape[:2]
    outputs = [n // s for n, s in zip(grid.sizes, grid.stride, strict=True)]
    matrix = torch.zeros(rows, *outputs, columns, *grid.sizes, dtype=torch.float64)
    for place in itertools.product(*map(range, outputs)):
        for tap in itertools.product(*map(range, grid.kernel)):
            read = [
                (p * s + t * d) % n
                for p, s, t, d, n in zip(
                    place, grid.stride, tap, grid.dilation, grid.sizes, strict=True
                )
            ]
            matrix[(slice(None), *place, slice(None), *read)] += filters[(..., *tap)]
    return matrix.reshape(rows * math.prod(outputs), -1)


def values_of(transform, filters):
    found = torch.linalg.svdvals(transform.blocks(filters))
    return found.repeat_interleave(transform.multiplicities, dim=0).flatten().sort().values


def random_filters(grid, rows=3, columns=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, *grid.kernel, dtype=torch.float64, generator=generator)


def assert_same_values(grid, rows, columns, seed=0):
    filters = random_filters(grid, rows, columns, seed)
    found = values_of(Polyphase(grid), filters)
    dense = torch.linalg.svdvals(circulant(filters, grid)).sort().values
    assert len(found) == len(dense)
    assert (found - dense).abs().max() < 1e-10


@pytest.mark.parametrize("channels", [(3, 2), (2, 5)])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_have_the_singular_values_of_the_dense_matrix(kernel, stride, channels):
    grid = Grid((kernel, kernel), (stride, stride), (6, 4), (1, 1))
    assert_same_values(grid, *channels)


@st.composite
def grids(draw):
    axes = draw(st.integers(1, 3))
    most = {1: 12, 2: 4, 3: 2}[axes]
    each = [
        (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, most)),
         draw(st.integers(1, 3)))
        for _ in range(axes)
    ]  # fmt: skip
    kernel, stride, outputs, dilation = zip(*each, strict=True)
    sizes = tuple(s * m for s, m in zip(stride, outputs, strict=True))
    return Grid(kernel, stride, sizes, dilation)


@settings(max_examples=60, deadline=None)
@given(grids(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_blocks_of_any_geometry_have_the_singular_values_of_the_dense_matrix(
    grid, rows, columns, seed
):
    assert_same_values(grid, rows, columns, seed)


@settings(max_examples=60, deadline=None)
@given(grids())
def test_every_frequency_counts_once(grid):
    total = grid.multiplicities(grid.frequencies()).sum()
    assert total == math.prod(grid.outputs)
    half = len(grid.frequencies())
    assert half == math.prod(grid.outputs[:-1]) * (grid.outputs[-1] // 2 + 1)


def test_frequencies_in_pieces_are_those_of_the_whole():
    grid = Grid((3, 2), (2, 1), (8, 5), (1, 2))
    filters = random_filters(grid)
    whole = Polyphase(grid).blocks(filters)
    parts = [Polyphase(grid, part).blocks(filters) for part in grid.frequencies().split(4)]
    assert (torch.cat(parts) - whole).abs().max() < 1e-14


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_inverse_gives_the_filters_back(kernel, stride):
    grid = Grid.smallest(kernel, (stride,) * len(kernel))
    transform = Polyphase(grid)
    filters = random_filters(grid)
    assert (transform.filters(transform.blocks(filters)) - filters).abs().max() < 1e-14


def test_the_inverse_is_the_orthogonal_projection_on_the_support():
    grid = Grid((3,), (2,), (12,), (1,))
    transform = Polyphase(grid)
    blocks = transform.blocks(random_filters(grid))
    generator = torch.Generator().manual_seed(1)
    # Blocks of a real operator with a wider support.
    wide = Polyphase(Grid((9,), (2,), (12,), (1,)))
    other = wide.blocks(torch.randn(3, 2, 9, dtype=torch.float64, generator=generator))
    rest = other - transform.blocks(transform.filters(other))
    weights = transform.multiplicities[:, None, None]
    assert abs((weights * (rest.conj() * blocks)).sum().real) < 1e-12
    assert float(rest.abs().max()) > 0.1


def test_single_precision_blocks_are_near_the_double_ones():
    grid = Grid((3, 3), (2, 2), (64, 64), (1, 1))
    filters = random_filters(grid)
    fine = Polyphase(grid).blocks(filters)
    coarse = Polyphase(grid, dtype=torch.complex64).blocks(filters.float())
    assert coarse.dtype == torch.complex64
    assert (coarse - fine).abs().max() < 1e-5


def orthonormal_filters(rows, columns, stride, length, seed=0):
    """Filters of one axis, a flat spectrum on every circle: a product of lossless factors."""
    generator = torch.Generator().manual_seed(seed)
    size = max(rows, columns * stride)
    start = torch.randn(size, size, dtype=torch.float64, generator=generator)
    terms = torch.linalg.qr(start)[0][None]  # coefficients of the powers of a delay
    for _ in range(length):
        vector = torch.randn(size, dtype=torch.float64, generator=generator)
        kept = torch.outer(vector, vector) / vector.dot(vector)
        still, late = terms @ (torch.eye(size, dtype=torch.float64) - kept), terms @ kept
        zero = torch.zeros_like(terms[:1])
        terms = torch.cat([still, zero]) + torch.cat([zero, late])
    # Entry (r, c s + j) at delay l is tap l s + j.
    return terms[:, :rows, : columns * stride].unflatten(2, (columns, stride)).permute(
        1, 2, 0, 3
    ).flatten(2)  # fmt: skip


def gap_of(filters, grid):
    """Mean over frequencies of the squared entries of the smaller Gram matrix less identity."""
    transform = Polyphase(grid)
    blocks = transform.blocks(filters)
    if blocks.shape[-2] > blocks.shape[-1]:
        blocks = blocks.mH
    gram = blocks @ blocks.mH
    gaps = (gram - torch.eye(gram.shape[-1])).abs().square().sum((-2, -1))
    counts = transform.multiplicities
    return float((gaps * counts).sum() / counts.sum())


SIZES = [(3, 2, 1, 1), (2, 5, 1, 2), (2, 3, 2, 1), (9, 2, 2, 2), (2, 1, 3, 1), (5, 1, 3, 2)]


@pytest.mark.parametrize(("rows", "columns", "stride", "length"), SIZES)
@pytest.mark.parametrize("axes", [1, 2])
def test_a_flat_spectrum_on_the_smallest_grid_is_flat_on_a_larger_one(
    rows, columns, stride, length, axes
):
    filters = orthonormal_filters(rows, columns, stride, length)
    if axes == 2:
        # Wide with wide and tall with tall, or zeros would join the values.
        pair = (1, 2) if rows < columns * stride else (2, 1)
        other = orthonormal_filters(*pair, 1, 1, seed=1)
        filters = torch.einsum("abk,cdl->acbdkl", filters, other).flatten(0, 1).flatten(1, 2)
    kernel, strides = tuple(filters.shape[2:]), (stride, 1)[:axes]
    smallest = Grid.smallest(kernel, strides)
    assert smallest.outputs == (2 * length + 1, 3)[:axes]
    for more in (0, 1, 2, 7):
        sizes = tuple(n + more * s for n, s in zip(smallest.sizes, strides, strict=True))
        found = values_of(Polyphase(Grid(kernel, strides, sizes, (1,) * axes)), filters)
        assert (found - found.mean()).abs().max() < 1e-12
    assert gap_of(filters / float(found.mean()), smallest) < 1e-24


@st.composite
def shapes(draw):
    axes = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    return kernel, stride, draw(st.integers(1, 7)), draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 100), st.integers(1, 4))
def test_the_mean_gap_on_the_smallest_grid_is_that_on_larger_ones(shape, seed, more):
    # As a sum of squares it is zero on both or on none: flat on one is flat on the other.
    kernel, stride, rows, columns = shape
    smallest = Grid.smallest(kernel, stride)
    filters = random_filters(smallest, rows, columns, seed)
    sizes = tuple(n + more * s for n, s in zip(smallest.sizes, stride, strict=True))
    larger = Grid(kernel, stride, sizes, smallest.dilation)
    assert gap_of(filters, smallest) == pytest.approx(gap_of(filters, larger), rel=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2), (7, 2), (5, 3)])
@pytest.mark.parametrize("channels", [(2, 3), (7, 1)])
def test_one_position_less_than_the_smallest_grid_is_not_enough(kernel, stride, channels):
    smallest = Grid.smallest((kernel,), (stride,))
    filters = random_filters(smallest, *channels)
    less = Grid((kernel,), (stride,), (smallest.sizes[0] - stride,), (1,))
    assert gap_of(filters, less) != pytest.approx(gap_of(filters, smallest), rel=1e-3)


@pytest.mark.parametrize(
    ("kernel", "stride", "sizes"),
    [((3,), (1,), (5,)), ((3, 3), (2, 2), (6, 6)), ((4, 2), (2, 2), (6, 2)), ((1,), (1,), (1,))],
)
def test_the_smallest_grid_holds_every_lag_once(kernel, stride, sizes):
    assert Grid.smallest(kernel, stride).sizes == sizes


def test_the_default_device_does_not_matter():
    grid = Grid((3, 2), (2, 1), (8, 5), (1, 2))
    filters = random_filters(grid)
    expected = Polyphase(grid).blocks(filters)
    torch.set_default_device("meta")
    try:
        found = Polyphase(grid).blocks(filters)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
