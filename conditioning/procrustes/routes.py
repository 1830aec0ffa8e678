r"""How a weight is projected: which matrices have to have equal singular values, and how exactly.

What is asked for is that all non-zero singular values of the operator of a layer are equal, on
circles of any size (circular padding). There are three cases.

``window``
    Windows share no input: the operator is the matrix of a window, again and again. One polar
    factor, whatever the padding; only windows that reach over the border lose columns.
``taps``
    Windows overlap, and the matrix with all taps side by side can have orthogonal columns: at
    least as many rows as columns times taps, as in the stem of an image network. With a stride,
    ``n`` taps meet each input, and their number depends on its phase; columns of squared length
    ``1/n`` make :math:`W^T W` the identity. One polar factor, too. The same the other way round,
    with rows for columns, where :math:`W W^T` becomes the identity.
``frequencies``
    All other overlapping kernels: alternating projections between operators with equal singular
    values, one polar factor for each frequency, and kernels of the given support. Each sweep
    brings the singular values closer, and what is left is reported. The smallest circle that
    decides about all larger ones is taken, so the cost does not depend on the size of the images:
    3x3 kernels have 13 frequencies without and 5 with stride 2.

A. Zaeemzadeh, N. Rahnavard, M. Shah, arXiv:1805.07477, project at all frequencies of the output's
size, without regard to strides; that is the same for kernels of size 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from conditioning.procrustes.polar import polar
from conditioning.singular.geometry import Geometry
from conditioning.singular.symbol import Grid, Polyphase

Route = Literal["window", "taps", "frequencies"]


@dataclass(frozen=True)
class Shape:
    """What layers must have in common to be projected together.

    Attributes
    ----------
    rows, columns : int
        Of the convolution in one group.
    kernel, stride : tuple of int
        The stride is that of windows without gaps.
    """

    rows: int
    columns: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, geometry: Geometry) -> Shape:
        """The shape of a layer."""
        return cls(geometry.rows, geometry.columns, geometry.kernel, geometry.window_stride)

    @property
    def route(self) -> Route:
        """How such layers are projected."""
        if self.kernel == self.stride:
            return "window"
        taps = math.prod(self.kernel)
        if self.columns * taps <= self.rows or self.rows * taps <= self.columns:
            return "taps"
        return "frequencies"

    @property
    def rank(self) -> int:
        """Non-zero singular values for each output position."""
        return min(self.rows, self.columns * math.prod(self.stride))


def project(
    filters: Tensor, shape: Shape, targets: Tensor, sweeps: int, method: str, rounding: float
) -> tuple[Tensor, Tensor | None]:
    """Nearest filters whose operators have all non-zero singular values equal, or nearer to it.

    Parameters
    ----------
    filters : Tensor of shape (count, rows, columns, *kernel)
        In single or double precision.
    shape : Shape
        Theirs.
    targets : Tensor of shape (count,)
        The singular values.
    sweeps : int
        Alternating projections, where one polar factor is not enough.
    method, rounding
        As :func:`polar` takes them.

    Returns
    -------
    filters : Tensor
    deficient : Tensor of shape (count,) or None
        bool: whether the nearest filters are not unique, because singular values are zero.
    """
    if shape.route == "window":
        found = polar(filters.flatten(2), method, rounding=rounding)
        return (targets[:, None, None] * found.factors).reshape(filters.shape), found.deficient
    if shape.route == "taps":
        return _taps(filters, shape, targets, method, rounding)
    transform = _transform(shape, *_complex(filters))
    # A block or two may be singular, of which any polar factor will do: the next sweep sees others.
    deficient = None
    for sweep in range(sweeps):
        found = polar(transform.blocks(filters), method, rounding=rounding)
        if sweep == 0 and found.deficient is not None:
            deficient = found.deficient.all(-1)
        flat = targets[:, None, None, None] * found.factors
        filters = transform.filters(flat.to(transform.dtype))
    return filters, deficient


def _taps(
    filters: Tensor, shape: Shape, targets: Tensor, method: str, rounding: float
) -> tuple[Tensor, Tensor | None]:
    """Orthogonal columns (or rows), those of each tap as long as its phase needs it."""
    flat = filters.flatten(3)
    taps = flat.shape[-1]
    if shape.columns * taps <= shape.rows:
        lengths = _lengths(shape, flat)
        # The nearest Q D to W, Q with orthonormal columns, has the polar factor of W D as Q.
        weighted = (flat * lengths).flatten(2)
        polars = polar(weighted, method, rounding=rounding)
        found = polars.factors.to(flat.dtype).unflatten(-1, (shape.columns, taps)) * lengths
    else:
        length = taps**-0.5
        tall = flat.movedim(-1, 1).flatten(1, 2)
        polars = polar(length * tall, method, rounding=rounding)
        split = polars.factors.to(flat.dtype).unflatten(1, (taps, shape.rows))
        found = length * split.movedim(1, -1)
    return (targets[:, None, None, None] * found).reshape(filters.shape), polars.deficient


def _lengths(shape: Shape, like: Tensor) -> Tensor:
    """Length of the columns of each tap: one over the root of the taps that share its phase."""
    axes = (
        [math.ceil((k - tap % s) / s) for tap in range(k)]
        for k, s in zip(shape.kernel, shape.stride, strict=True)
    )
    lengths = tuple(math.prod(each) ** -0.5 for each in itertools.product(*axes))
    return constant(lengths, like.dtype, like.device)


def singular_values(filters: Tensor, shape: Shape) -> Tensor:
    """All non-zero singular values of the operators, on a circle that decides about all larger.

    Returns
    -------
    Tensor of shape (count, values)
        float64, on the CPU.
    """
    exact = filters.detach().double()
    found: Tensor
    if shape.route == "window":
        found = torch.linalg.svdvals(exact.flatten(2))
    else:
        transform = _transform(shape, torch.complex128, exact.device)
        found = torch.linalg.svdvals(transform.blocks(exact)).flatten(1)
    return found.cpu()


def penalty(filters: Tensor, shape: Shape, targets: Tensor) -> Tensor:
    r"""Mean of :math:`(\sigma^2 / \sigma_{target}^2 - 1)^2` over the singular values of each.

    Differentiable, also where singular values are equal or zero: it takes Gram matrices only.

    Returns
    -------
    Tensor of shape (count,)
    """
    if shape.route == "window":
        matrices, weights = filters.flatten(2)[:, None], filters.new_ones(1)
    else:
        transform = _transform(shape, *_complex(filters))
        matrices = transform.blocks(filters)
        weights = transform.multiplicities.to(filters.dtype)
    tall = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mH
    gram = (tall.mH @ tall) / targets.square()[:, None, None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gap = gram - identity
    # Not abs().square(), whose second derivative at zero is not a number.
    squares = (gap * gap.conj()).real if gap.is_complex() else gap.square()
    means: Tensor = squares.sum((-2, -1)) / gram.shape[-1]
    return (means * weights).sum(-1) / weights.sum()


def _complex(filters: Tensor) -> tuple[torch.dtype, torch.device]:
    double = filters.dtype == torch.float64
    return torch.complex128 if double else torch.complex64, filters.device


def _transform(shape: Shape, dtype: torch.dtype, device: torch.device) -> Polyphase:
    found: Polyphase = _kept(_new_transform, shape, dtype, device)
    return found


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, copied there once: each copy makes the host wait for a GPU."""
    found: Tensor = _kept(_new_constant, values, dtype, device)
    return found


def _new_transform(shape: Shape, dtype: torch.dtype, device: torch.device) -> Polyphase:
    return Polyphase(Grid.smallest(shape.kernel, shape.stride), dtype=dtype, device=device)


def _new_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _kept(make: Callable[..., Any], *arguments: Any) -> Any:
    # The compiler warns of caches, and looks through them.
    return make(*arguments) if torch.compiler.is_compiling() else _cached(make, *arguments)


@lru_cache(maxsize=256)
def _cached(make: Callable[..., Any], *arguments: Any) -> Any:
    # A tensor made in inference mode would be of no use to penalty().
    with torch.inference_mode(mode=False):
        return make(*arguments)


def stacked(weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> Tensor:
    """Filters of layers of one shape, ``(count, rows, columns, *kernel)``, all groups of all."""
    return torch.cat([g.filters(w) for w, g in zip(weights, geometries, strict=True)])
