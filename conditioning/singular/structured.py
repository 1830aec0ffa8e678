r"""Singular values of a layer without its products: from the weight and from where it acts.

Along each axis a layer says which input position every tap of every window reads. Where no position
is read twice, windows are independent, and the operator is a direct sum of the matrix of a window,
with fewer columns for windows that reach over a border of zeros. Where the layer wraps around, it
is block diagonal in frequencies. What is left needs products; an axis along which windows are whole
and independent is then no more than a repetition.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError
from conditioning.memory import available_bytes
from conditioning.singular.geometry import Geometry, Sizes
from conditioning.singular.symbol import Grid, Polyphase

_PADDING = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
_CHUNK_BYTES = 2**28  # more at once is not faster


@dataclass(frozen=True)
class Placement:
    """Where a layer reads at a given size.

    Attributes
    ----------
    geometry : Geometry
    sizes : tuple of int
        Input positions of the layer along each axis.
    """

    geometry: Geometry
    sizes: Sizes

    @property
    def read_sizes(self) -> Sizes:
        """Positions that the convolution reads: of the output of a transposed one."""
        g = self.geometry
        if not g.transposed:
            return self.sizes
        return tuple(
            (n - 1) * s - sum(ends) + d * (k - 1) + more + 1
            for n, s, ends, d, k, more in zip(
                self.sizes, g.stride, g.padding, g.dilation, g.kernel, g.output_padding,
                strict=True,
            )
        )  # fmt: skip

    @property
    def windows(self) -> Sizes:
        """Windows along each axis: output positions of the convolution."""
        return tuple(len(self.positions(axis)) for axis in range(self.geometry.num_axes))

    def positions(self, axis: int) -> np.ndarray:
        """Position that each tap of each window reads, ``(windows, taps)``; -1 for a zero."""
        g = self.geometry
        size, (before, after) = self.read_sizes[axis], g.padding[axis]
        kernel, stride, dilation = g.kernel[axis], g.stride[axis], g.dilation[axis]
        span = dilation * (kernel - 1)
        if g.transposed:
            count = self.sizes[axis]
            places = np.arange(count)[:, None] * stride + np.arange(kernel) * dilation - before
            return np.where((places >= 0) & (places < size), places, -1)
        if g.padding_mode == "zeros":
            padded = np.pad(np.arange(size), (before, after), constant_values=-1)
        else:
            mode = _PADDING[g.padding_mode]
            padded = np.pad(np.arange(size), (before, after), mode=mode)  # type: ignore[call-overload]
        starts = np.arange(0, len(padded) - span, stride)
        return np.asarray(padded[starts[:, None] + np.arange(kernel) * dilation])

    @property
    def independent(self) -> bool:
        """Whether no input is read twice, along any axis."""
        return all(_unique(self.positions(axis)) for axis in range(self.geometry.num_axes))

    @property
    def wraps(self) -> bool:
        """Whether the layer is a convolution over a circle."""
        g = self.geometry
        return g.padding_mode == "circular" and all(
            sum(ends) == d * (k - 1) and n % s == 0
            for ends, d, k, n, s in zip(
                g.padding, g.dilation, g.kernel, self.sizes, g.stride, strict=True
            )
        )

    def single_windows(self) -> tuple[Sizes, int]:
        """Input sizes with one window only along axes where it is repeated, and how often it is."""
        g, sizes, times = self.geometry, list(self.sizes), 1
        for axis, (k, s, d, ends) in enumerate(
            zip(g.kernel, g.stride, g.dilation, g.padding, strict=True)
        ):
            if k <= s and (d == 1 or k == 1) and ends == (0, 0):
                times *= self.windows[axis]
                sizes[axis] = 1 if g.transposed else k
        return tuple(sizes), times

    @property
    def most_rank(self) -> int:
        """What the rank is at most: windows that read something, and positions that are read."""
        g = self.geometry
        places = [self.positions(axis) for axis in range(g.num_axes)]
        windows = math.prod(int((p >= 0).any(1).sum()) for p in places)
        read = math.prod(len(np.unique(p[p >= 0])) for p in places)
        return g.groups * min(g.rows * windows, g.columns * read)

    def square_sum(self, weight: Tensor) -> float:
        """Sum of the squared entries of the operator.

        A tap counts once for every window in which it reads something. Taps that read the same
        position in one window, as padding by reflection makes them, are added before.
        """
        g = self.geometry
        flat = g.filters(weight).reshape(-1, g.taps).to(device="cpu", dtype=torch.float64)
        gram = flat.T @ flat
        meetings = torch.ones(1, 1, dtype=gram.dtype, device="cpu")
        for axis in range(g.num_axes):
            places = self.positions(axis)
            same = (places[:, :, None] == places[:, None, :]) & (places[:, :, None] >= 0)
            meetings = torch.kron(meetings, torch.from_numpy(same.sum(0)).to(gram.dtype))
        return float((gram * meetings).sum())


def window_values(placement: Placement, weight: Tensor) -> Tensor:
    """Singular values of a layer with independent windows, all that are not zero and some zeros."""
    g = placement.geometry
    filters = g.filters(weight)
    kinds = [_whole_and_cut(placement.positions(axis)) for axis in range(g.num_axes)]
    values = []
    for chosen in itertools.product(*kinds):
        kept, times = filters, math.prod(count for _, count in chosen)
        for axis, (taps, _) in enumerate(chosen):
            kept = kept.index_select(
                3 + axis, torch.tensor(taps, dtype=torch.int64, device=kept.device)
            )
        if kept.numel():
            found = torch.linalg.svdvals(kept.flatten(2)).flatten()
            values.append(found.repeat(times))
    return torch.cat([weight.new_zeros(0), *values])


def kernel_values(geometry: Geometry, weight: Tensor) -> Tensor:
    """Singular values of the matrix of a window, those of all groups together."""
    values: Tensor = torch.linalg.svdvals(geometry.matrices(weight))
    return values.flatten()


def circular_grid(geometry: Geometry, sizes: Sizes) -> Grid:
    """The frequencies of a layer on circles of given input sizes.

    Raises
    ------
    InvalidArgumentError
        If a stride does not divide its size.
    """
    g = geometry
    read = tuple(n * s for n, s in zip(sizes, g.stride, strict=True)) if g.transposed else sizes
    for n, s in zip(read, g.stride, strict=True):
        if n % s:
            msg = (
                f"On a circle the stride must divide the size, and {s} does not divide {n}. Use "
                f"operator='true' for the layer as it runs, or another input_shape."
            )
            raise InvalidArgumentError(msg)
    return Grid(g.kernel, g.stride, read, g.dilation)


def circular_values(
    geometry: Geometry, grid: Grid, weight: Tensor, memory_budget: int | None = None
) -> Tensor:
    """Singular values of a layer on circles, multiplicities counted."""
    filters = geometry.filters(weight)
    complex_dtype = torch.complex128 if weight.dtype == torch.float64 else torch.complex64
    budget = available_bytes(weight.device) // 4 if memory_budget is None else memory_budget
    entries = geometry.groups * geometry.rows * geometry.columns + geometry.taps
    # The blocks, what the solver works on, and the waves.
    per_frequency = 3 * entries * grid.aliases * complex_dtype.itemsize
    step = max(1, min(budget, _CHUNK_BYTES) // per_frequency)
    values = []
    for frequencies in grid.frequencies().split(step):
        transform = Polyphase(grid, frequencies, complex_dtype, weight.device)
        found = torch.linalg.svdvals(transform.blocks(filters))
        values.append(found.repeat_interleave(transform.multiplicities, dim=-2).flatten())
    return torch.cat(values)


def _unique(positions: np.ndarray) -> bool:
    read = positions[positions >= 0]
    return len(np.unique(read)) == len(read)


def _whole_and_cut(positions: np.ndarray) -> list[tuple[list[int], int]]:
    """Which taps of a window read anything, and how many windows there are of each kind."""
    kinds = Counter(tuple(bool(reads) for reads in window) for window in positions >= 0)
    return [([tap for tap, reads in enumerate(kind) if reads], n) for kind, n in kinds.items()]


def with_zeros(values: Tensor, count: int) -> Tensor:
    """Singular values in descending order, on the CPU in float64, as many as there are.

    There may be more than ``count`` of them where several parts with zeros of their own were
    measured: what is over is zero, since no rank is larger than ``count``.
    """
    values = values.detach().to(device="cpu", dtype=torch.float64)
    zeros = values.new_zeros(max(count - len(values), 0))
    return torch.cat([values.sort(descending=True).values[:count], zeros])
