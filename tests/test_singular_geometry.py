"""The geometry of a layer says what its weight does, and refuses what it does not know."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from conditioning.errors import UnsupportedLayerError
from conditioning.singular import Geometry, geometry_of, singular_values

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def test_a_linear_layer_has_no_axes():
    geometry = geometry_of(nn.Linear(3, 5))
    assert geometry == Geometry(3, 5)
    assert (geometry.num_axes, geometry.taps, geometry.overlapping) == (0, 1, False)
    assert geometry.describe() == "linear, 3 -> 5"


def test_a_convolution_keeps_its_settings():
    layer = nn.Conv3d(
        4, 6, (1, 2, 3), stride=(1, 2, 3), padding=(0, 1, 2), dilation=(3, 2, 1), groups=2,
        padding_mode="reflect",
    )  # fmt: skip
    geometry = geometry_of(layer)
    assert (geometry.kernel, geometry.stride, geometry.dilation) == (
        (1, 2, 3),
        (1, 2, 3),
        (3, 2, 1),
    )
    assert geometry.padding == ((0, 0), (1, 1), (2, 2))
    assert (geometry.rows, geometry.columns, geometry.groups, geometry.taps) == (3, 2, 2, 6)
    assert geometry.padding_mode == "reflect"
    for part in ("conv 1x2x3", "4 -> 6", "stride 1x2x3", "dilation 3x2x1", "2 groups", "reflect"):
        assert part in geometry.describe()


def test_words_for_padding_become_numbers():
    same = geometry_of(nn.Conv2d(1, 1, (2, 3), padding="same", dilation=(3, 1)))
    assert same.padding == ((1, 2), (1, 1))
    assert geometry_of(nn.Conv1d(1, 1, 3, padding="valid")).padding == ((0, 0),)


def test_a_transposed_convolution_is_one_from_its_output_to_its_input():
    geometry = geometry_of(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2))
    assert geometry.transposed
    assert (geometry.rows, geometry.columns) == (2, 3)
    assert geometry.output_padding == (1, 1)
    assert "transposed conv 3x3, 4 -> 6, stride 2, 2 groups" in geometry.describe()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("table", [CONVOLUTIONS, TRANSPOSED])
def test_filters_and_matrices_hold_the_weight_of_each_group(axes, table):
    layer = table[axes](4, 6, 2, groups=2)
    geometry = geometry_of(layer)
    filters, matrices = geometry.filters(layer.weight), geometry.matrices(layer.weight)
    assert filters.shape == (2, geometry.rows, geometry.columns, *geometry.kernel)
    assert matrices.shape == (2, geometry.rows, geometry.columns * geometry.taps)
    assert torch.equal(filters[1, 0, 1], layer.weight[geometry.rows, 1])


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "overlapping"),
    [(1, 1, 1, False), (2, 2, 1, False), (3, 2, 1, True), (3, 4, 1, False), (2, 1, 1, True),
     (2, 2, 3, False), (2, 2, 2, True), (3, 2, 2, True), (3, 3, 2, False), (1, 1, 5, False)],
)  # fmt: skip
def test_windows_overlap_where_some_input_is_read_twice(kernel, stride, dilation, overlapping):
    geometry = geometry_of(nn.Conv1d(1, 1, kernel, stride=stride, dilation=dilation))
    assert geometry.overlapping == overlapping
    read = [w * stride + t * dilation for w in range(60) for t in range(kernel)]
    assert (len(set(read)) < len(read)) == overlapping


@pytest.mark.parametrize("channels", [(2, 6), (6, 2), (4, 4)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(1, 2, 1), (2, 2, 1), (3, 2, 1), (2, 2, 2), (3, 1, 2)]
)
@pytest.mark.parametrize("table", [CONVOLUTIONS, TRANSPOSED])
def test_the_rank_on_a_circle_is_the_rank_for_each_position(
    table, kernel, stride, dilation, channels
):
    torch.manual_seed(0)
    layer = table[1](*channels, kernel, stride=stride, dilation=dilation)
    geometry = geometry_of(layer)
    positions = 8
    size = positions if geometry.transposed else positions * stride
    found = singular_values(layer, (channels[0], size), "circular")
    assert found.rank == positions * geometry.rank_per_position


def test_a_flat_spectrum_at_a_gain_keeps_the_norm_one_way():
    for layer, shape in (
        (nn.Conv2d(4, 8, 1, stride=2), (4, 6, 6)),
        (nn.Conv2d(4, 8, 2, stride=2), (4, 6, 6)),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), (8, 3, 3)),
        (nn.Linear(3, 7), (3,)),
    ):
        geometry = geometry_of(layer)
        nn.init.orthogonal_(layer.weight)
        for index, gain in enumerate(geometry.gains):
            flat = singular_values(layer, shape)
            scale = gain / float(flat.largest)
            after = (flat.backward_gain, flat.forward_gain)[index] * scale
            assert after == pytest.approx(1, abs=1e-6)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Conv2d):
    pass


def test_a_subclass_counts_only_where_it_computes_the_same():
    assert geometry_of(Renamed(1, 2, 3)).kernel == (3, 3)
    for layer in (
        Doubled(1, 2, 3),
        nn.ReLU(),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Bilinear(2, 2, 2),
    ):
        with pytest.raises(UnsupportedLayerError, match=type(layer).__name__):
            geometry_of(layer)


def test_parametrised_layers_keep_their_geometry():
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    assert geometry_of(layer).kernel == (3, 3)
    assert math.prod(geometry_of(layer).kernel) == 9
