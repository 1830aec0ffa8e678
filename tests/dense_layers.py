"""The matrices of layers, by applying them to unit vectors: dense truth for singular values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from conditioning.singular import geometry_of


def matrix_of(layer, shape):
    """The layer applied to every unit vector, in float64, less its response to zero."""
    with torch.no_grad():
        units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        response = layer(torch.zeros(1, *shape, dtype=torch.float64))
        return (layer(units) - response).flatten(1).T


def circular_matrix_of(layer, shape):
    """The same on circles: inputs are repeated far enough, and one period is kept."""
    g = geometry_of(layer)
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    run = (F.conv1d, F.conv2d, F.conv3d)[g.num_axes - 1]
    back = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[g.num_axes - 1]
    with torch.no_grad():
        if g.transposed:
            whole = back(
                units, layer.weight, stride=g.stride, dilation=g.dilation, groups=g.groups,
                output_padding=0,
            )  # fmt: skip
            for axis, (n, s) in enumerate(zip(shape[1:], g.stride, strict=True), 2):
                folded = torch.zeros_like(whole.narrow(axis, 0, 1)).repeat_interleave(n * s, axis)
                index = torch.arange(whole.shape[axis]) % (n * s)
                whole = folded.index_add(axis, index, whole)
            return whole.flatten(1).T
        for axis, (n, k, d, s) in enumerate(
            zip(shape[1:], g.kernel, g.dilation, g.stride, strict=True), 2
        ):
            index = torch.arange(n - s + d * (k - 1) + 1) % n
            units = units.index_select(axis, index)
        return run(
            units, layer.weight, stride=g.stride, dilation=g.dilation, groups=g.groups
        ).flatten(1).T  # fmt: skip


def kernel_matrix_of(layer):
    g = geometry_of(layer)
    rows = layer.weight.detach().reshape(g.groups, g.rows, -1)
    matrix = torch.block_diag(*rows)
    return matrix.T if g.transposed else matrix


def assert_all_known(result, matrix, slack=1e-12):
    expected = torch.linalg.svdvals(matrix)
    assert result.status == "exact"
    assert result.shape == tuple(matrix.shape)
    assert result.values.shape == expected.shape
    assert result.values.dtype == torch.float64
    error = (result.values - expected).abs().max()
    assert error < slack
    assert error <= result.noise
    assert float(expected[0]) in result.largest
    assert float(expected[-1]) in result.smallest
    norm = float(torch.linalg.matrix_norm(matrix))
    assert result.backward_gain == pytest.approx(norm / matrix.shape[0] ** 0.5, rel=1e-12)
    assert result.forward_gain == pytest.approx(norm / matrix.shape[1] ** 0.5, rel=1e-12)
