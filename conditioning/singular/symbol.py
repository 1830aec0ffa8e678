r"""The matrices that a circular convolution is made of, one for each frequency.

A convolution of stride ``s`` over a circle of ``N`` positions, ``s`` a divisor of ``N``, is block
diagonal in frequencies: output frequency ``g`` mixes the input frequencies ``g + j N/s``,
``j = 0 ... s - 1``, that a stride cannot tell apart. Its block is

.. math:: B(g) = s^{-1/2} [A(g), A(g + N/s), \dots], \qquad A(f) = \sum_k w_k e^{-2 \pi i f k / N},

of shape ``(rows, columns * s)``, and its singular values are those of all blocks together; on
several axes ``s`` is the product of the strides. Without stride this is H. Sedghi, V. Gupta,
P. M. Long, *The Singular Values of Convolutional Layers*, arXiv:1805.10408.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Frequencies of a circular convolution: half of them, since the others are conjugates.

    Attributes
    ----------
    kernel, stride, sizes, dilation : tuple of int
        Of each axis; each stride divides its size, the number of input positions.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    sizes: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def smallest(cls, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Grid:
        """The smallest circles on which a flat spectrum is flat on every larger one, too.

        With ``L = floor((k - 1) / s)``, two windows share inputs only up to ``L`` apart, and two
        groups of ``s`` inputs share a window only up to ``L`` apart. So, up to a unitary matrix
        for each frequency, ``B(g) B(g)*`` and ``B(g)* B(g)`` are trigonometric polynomials with
        the ``2L + 1`` lags ``-L ... L``. As many frequencies determine them, and by Parseval the
        mean of their squared entries over these frequencies is that over all.
        """
        sizes = tuple(s * (2 * ((k - 1) // s) + 1) for k, s in zip(kernel, stride, strict=True))
        return cls(kernel, stride, sizes, (1,) * len(kernel))

    @property
    def aliases(self) -> int:
        """Input frequencies that one output frequency mixes."""
        return math.prod(self.stride)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Output positions of each axis."""
        return tuple(n // s for n, s in zip(self.sizes, self.stride, strict=True))

    def frequencies(self) -> Tensor:
        """Output frequencies of the half grid, ``(F, axes)``, int64."""
        *whole, last = self.outputs
        ranges = [*(range(m) for m in whole), range(last // 2 + 1)]
        return _all(ranges)

    def multiplicities(self, frequencies: Tensor) -> Tensor:
        """How often each frequency of the half grid counts: twice, unless it is its conjugate's."""
        last = frequencies[:, -1]
        own = (last == 0) | (2 * last == self.outputs[-1])
        return torch.where(own, 1, 2)


class Polyphase:
    """The transform between filters and their blocks, at all frequencies of a half grid or some.

    Parameters
    ----------
    grid : Grid
    frequencies : Tensor of shape (F, axes), optional
        Some of ``grid.frequencies()``, which are the default.
    dtype : torch.dtype
        Complex, of the blocks.
    device : torch.device or str

    Attributes
    ----------
    grid, dtype
    multiplicities : Tensor of shape (F,)
        int64; how often each block counts.
    """

    def __init__(
        self,
        grid: Grid,
        frequencies: Tensor | None = None,
        dtype: torch.dtype = torch.complex128,
        device: torch.device | str = "cpu",
    ) -> None:
        self.grid, self.dtype = grid, dtype
        chosen = grid.frequencies() if frequencies is None else frequencies
        self.multiplicities = grid.multiplicities(chosen).to(device)
        # exp(-2 pi i f k / N) over sqrt(s), (F, aliases, taps)
        self._waves = _waves(grid, chosen).to(device=device, dtype=dtype)

    def blocks(self, filters: Tensor) -> Tensor:
        """``B(g)``, ``(..., F, rows, columns * aliases)``, of ``(..., rows, columns, *kernel)``."""
        axes = len(self.grid.kernel)
        flat = filters.flatten(-axes).to(self.dtype)
        return torch.einsum("...rck,fjk->...frcj", flat, self._waves).flatten(-2)

    def filters(self, blocks: Tensor) -> Tensor:
        """The real filters with the support of the kernel that are nearest to given blocks.

        The inverse transform over all frequencies, cut to the kernel: an orthogonal projection,
        since the transform keeps angles.
        """
        split = blocks.unflatten(-1, (-1, self.grid.aliases))
        counted = split * self.multiplicities[:, None, None, None]
        flat = torch.einsum("...frcj,fjk->...rck", counted, self._waves.conj()).real
        filters: Tensor = (flat / math.prod(self.grid.outputs)).unflatten(-1, self.grid.kernel)
        return filters


def _waves(grid: Grid, frequencies: Tensor) -> Tensor:
    shifts = _all(range(0, n, m) for n, m in zip(grid.sizes, grid.outputs, strict=True))
    taps = _all(map(range, grid.kernel))
    sizes, dilation = (torch.tensor(t, device="cpu") for t in (grid.sizes, grid.dilation))
    inputs = frequencies[:, None, :] + shifts
    # Whole numbers modulo N before the division: no digit is lost on large grids.
    turns = (inputs[:, :, None, :] * (taps * dilation) % sizes).double() / sizes
    angle = -2 * math.pi * turns.sum(-1)
    return torch.polar(torch.full_like(angle, grid.aliases**-0.5), angle)


def _all(ranges: Iterable[range]) -> Tensor:
    """All points of a product of ranges, ``(count, axes)``, the last axis fastest."""
    points = list(itertools.product(*ranges))
    return torch.tensor(points, dtype=torch.int64, device="cpu")
