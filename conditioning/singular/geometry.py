"""How the weight of a layer acts: every linear or convolutional layer as one convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from conditioning.errors import UnsupportedLayerError

Sizes = tuple[int, ...]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d and their transposed forms"


@dataclass(frozen=True)
class Geometry:
    r"""A layer as a convolution, up to its bias.

    A transposed convolution is the transpose of a convolution from its output to its input; what
    ``rows``, ``columns`` and ``filters`` say is about that one. A linear layer is a convolution
    without axes.

    Attributes
    ----------
    in_channels, out_channels : int
        Of the layer.
    kernel, stride, dilation : tuple of int
        One number for each axis.
    padding : tuple of (int, int)
        Before and after, for each axis.
    padding_mode : str
    output_padding : tuple of int
        Of a transposed convolution; zeros otherwise.
    groups : int
    transposed : bool
    """

    in_channels: int
    out_channels: int
    kernel: Sizes = ()
    stride: Sizes = ()
    dilation: Sizes = ()
    padding: tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"
    output_padding: Sizes = ()
    groups: int = 1
    transposed: bool = False

    @property
    def num_axes(self) -> int:
        """Spatial axes; 0 for a linear layer."""
        return len(self.kernel)

    @property
    def rows(self) -> int:
        """Output channels of the convolution in one group."""
        return (self.in_channels if self.transposed else self.out_channels) // self.groups

    @property
    def columns(self) -> int:
        """Input channels of the convolution in one group."""
        return (self.out_channels if self.transposed else self.in_channels) // self.groups

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def window_stride(self) -> Sizes:
        r"""The stride of windows without gaps that have the same singular values, zeros aside.

        With ``g = gcd(s, d)`` the windows of stride ``s`` and dilation ``d`` visit every ``g``-th
        position only, and there they are those of stride ``s/g`` without dilation, up to the order
        of positions: ``s/g`` and ``d/g`` have no common factor. Where a kernel is shorter than
        its stride, the positions between two windows do not matter either.
        """
        return tuple(
            min(k, s // math.gcd(s, d))
            for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    @property
    def rank_per_position(self) -> int:
        """Non-zero singular values in one group for each output position of the convolution."""
        return min(self.rows, self.columns * math.prod(self.window_stride))

    @property
    def overlapping(self) -> bool:
        """Whether windows share inputs, so that the matrix of a window is not the whole story."""
        return self.window_stride != self.kernel

    @property
    def gains(self) -> tuple[float, float]:
        r"""Common singular value with which the backward, or the forward, pass keeps the norm.

        An operator of shape ``(n_out, n_in)`` whose ``r`` non-zero singular values all are
        :math:`\sigma` has :math:`\mathrm E\|W^T g\|^2 / \|g\|^2 = \sigma^2 r / n_{out}` for a
        random ``g``, and ``n_in`` in place of ``n_out`` for the forward pass. So the first is
        :math:`\sqrt{n_{out} / r}`, the second :math:`\sqrt{n_{in} / r}`.
        """
        rank = self.rank_per_position
        onto_rows = math.sqrt(self.rows / rank)
        onto_columns = math.sqrt(self.columns * math.prod(self.stride) / rank)
        return (onto_columns, onto_rows) if self.transposed else (onto_rows, onto_columns)

    def filters(self, weight: Tensor) -> Tensor:
        """The weight of the layer as ``(groups, rows, columns, *kernel)``."""
        return weight.reshape(self.groups, self.rows, self.columns, *self.kernel)

    def matrices(self, weight: Tensor) -> Tensor:
        """The matrix of a window in each group, ``(groups, rows, columns * taps)``."""
        return weight.reshape(self.groups, self.rows, self.columns * self.taps)

    def describe(self) -> str:
        """``conv 3x3, 16 -> 32, stride 2``, for a reader."""
        if not self.kernel:
            return f"linear, {self.in_channels} -> {self.out_channels}"
        name = "transposed conv" if self.transposed else "conv"
        words = [
            f"{name} {'x'.join(map(str, self.kernel))}",
            f"{self.in_channels} -> {self.out_channels}",
        ]
        for what, sizes in (("stride", self.stride), ("dilation", self.dilation)):
            if set(sizes) != {1}:
                shown = sizes[:1] if len(set(sizes)) == 1 else sizes
                words.append(f"{what} {'x'.join(map(str, shown))}")
        if self.groups > 1:
            words.append(f"{self.groups} groups")
        if any(any(ends) for ends in self.padding):
            words.append(f"{self.padding_mode} padding")
        return ", ".join(words)


def geometry_of(layer: nn.Module) -> Geometry:
    """Geometry of a linear or convolutional layer.

    Raises
    ------
    UnsupportedLayerError
        If it is something else, or a subclass that computes something else.
    """
    if isinstance(layer, nn.Linear) and _unchanged(layer, ("forward",)):
        return Geometry(layer.in_features, layer.out_features)
    transposed = isinstance(layer, _TRANSPOSED)
    known = _TRANSPOSED if transposed else _CONVOLUTIONS
    methods = ("forward",) if transposed else ("forward", "_conv_forward")
    if isinstance(layer, known) and _unchanged(layer, methods):
        kernel = tuple(layer.kernel_size)
        return Geometry(
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            kernel=kernel,
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            padding=_padding(layer.padding, kernel, tuple(layer.dilation)),
            padding_mode=layer.padding_mode,
            output_padding=tuple(layer.output_padding),
            groups=layer.groups,
            transposed=transposed,
        )
    msg = (
        f"A {type(layer).__name__} is not a layer whose weight alone says what it computes: "
        f"known are {SUPPORTED}, and subclasses with the same forward."
    )
    raise UnsupportedLayerError(msg)


def base_of(layer: nn.Module) -> type[nn.Module]:
    """The class of torch that a linear or convolutional layer computes as."""
    known = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
    return next(cls for cls in known if isinstance(layer, cls))


def _unchanged(layer: nn.Module, methods: tuple[str, ...]) -> bool:
    """Whether a subclass computes what its base does."""
    base = base_of(layer)
    return all(getattr(type(layer), name) is getattr(base, name) for name in methods)


def _padding(padding: Any, kernel: Sizes, dilation: Sizes) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((p, p) for p in padding)
