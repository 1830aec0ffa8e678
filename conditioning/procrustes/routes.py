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
    with rows for columns, where :math:`W W^T` becomes the identity. It gives the nearest of the
    kernels whose taps are orthogonal to each other. Others are flat, too (one with a single tap,
    say), and where a kernel is much nearer to one of those, or has no unique nearest one of
    orthogonal taps, it is projected as in the third case.
``frequencies``
    All other overlapping kernels: alternating projections between operators with equal singular
    values, one polar factor for each frequency, and kernels of the given support. No sweep takes
    the kernel further from flat operators, in the Frobenius norm; the ratio of the largest to the
    least singular value may rise for a while. The smallest circle is taken on which a flat
    spectrum is flat on every larger one, too, so the cost does not depend on the size of the
    images: 3x3 kernels have 15 frequencies without and 6 with stride 2. Where sweeps end before
    the spectrum is flat, it spreads further on larger circles, which is where it is measured.
    Of layers with as many rows as columns times strides few kernels are flat, and sweeps can come
    to rest far from them, though on the smallest circle much less is to be seen.

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
Sizes = tuple[int, ...]

# How finely spectra are measured: positions on a circle, the work that may take (a second on one
# core), and entries of blocks at a time.
_POSITIONS = 1024
_WORK = 6e8
_ENTRIES = 2**22


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
    """Filters nearby whose operators have all non-zero singular values equal, or nearer to it.

    The nearest ones for windows, and nearest among those with orthogonal taps for taps. Filters
    of flat operators stay as they are, up to a factor.

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
    if shape.route == "frequencies":
        return _sweeps(filters, shape, targets, sweeps, method, rounding)
    after, deficient = _taps(filters, shape, targets, method, rounding)
    others = _nearer_to_others(filters, after, shape, targets)
    others = others if deficient is None else others | deficient
    if not bool(others.any()):
        return after, None
    swept, singular = _sweeps(filters[others], shape, targets[others], sweeps, method, rounding)
    after, deficient = after.to(swept.dtype), torch.zeros_like(others)
    after[others] = swept
    if singular is not None:
        deficient[others] = singular
    return after, deficient


def _nearer_to_others(filters: Tensor, after: Tensor, shape: Shape, targets: Tensor) -> Tensor:
    """Whether flat operators are much nearer than the projected ones, whose taps are orthogonal."""
    # Of one scale: all flat operators with one target have the same norm.
    norm = torch.linalg.vector_norm(after.flatten(1), dim=1)
    factor = norm / torch.linalg.vector_norm(filters.flatten(1), dim=1)
    scaled = filters * factor.reshape(-1, *[1] * (filters.ndim - 1))
    moved = torch.linalg.vector_norm((after - scaled).flatten(1), dim=1) / norm
    # Small moves, as those in training are, never change between the two. NaN is no reason, either.
    far: Tensor = moved > 0.1
    if not bool(far.any()):
        return far
    # (sigma^2 - 1)^2 is 4 (sigma - 1)^2 near one.
    distance = penalty(scaled, shape, targets).sqrt() / 2
    # Random kernels and random changes are three times as far from orthogonal taps.
    found: Tensor = far & (distance < 0.1 * moved)
    return found


def _sweeps(
    filters: Tensor, shape: Shape, targets: Tensor, sweeps: int, method: str, rounding: float
) -> tuple[Tensor, Tensor | None]:
    """Alternating projections."""
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


def circle(shape: Shape, groups: int = 1, own: Sequence[int] | None = None) -> Sizes | None:
    """Output positions of the circle on which a layer is measured; ``None`` if any has the same.

    A multiple of the smallest one, of about a thousand positions in all if that takes no more than
    a second: what is flat on the smallest circle is flat on all, but what is not flat there
    spreads further in between.

    Parameters
    ----------
    shape : Shape
    groups : int
        Of such convolutions.
    own : sequence of int, optional
        Output positions of the layer, which are taken unless that takes too long.
    """
    if shape.route == "window":
        return None
    smallest = Grid.smallest(shape.kernel, shape.stride).outputs
    open_axes = [k > s for k, s in zip(shape.kernel, shape.stride, strict=True)]
    if own is not None:
        sizes = tuple(int(n) if free else 1 for n, free in zip(own, open_axes, strict=True))
        if _work(sizes, shape, groups) <= 10 * _WORK:
            return sizes
    wanted = round(_POSITIONS ** (1 / sum(open_axes)))
    sizes = smallest
    for outputs in range(wanted, 0, -1):
        # Positions between those of the smallest circle are the least that is needed.
        sizes = tuple(
            m * max(outputs // m, 2 if 2 * m <= wanted else 1) if free else 1
            for m, free in zip(smallest, open_axes, strict=True)
        )
        if _work(sizes, shape, groups) <= _WORK:
            break
    return sizes


def _work(outputs: Sizes, shape: Shape, groups: int) -> float:
    """Multiplications for eigenvalues of Gram matrices, up to a factor."""
    short, long = sorted((shape.rows, shape.columns * math.prod(shape.stride)))
    frequencies = math.prod(outputs) / 2
    transform = short * long * math.prod(shape.kernel)
    return groups * frequencies * (short * short * long + transform + 1000)


def singular_values(filters: Tensor, shape: Shape, outputs: Sizes | None = None) -> Tensor:
    """All non-zero singular values of the operators on a circle.

    On the smallest one they say whether the operators are flat on circles of all sizes. If they
    are not, their range is larger on others: see :func:`circle`.

    Parameters
    ----------
    filters : Tensor of shape (count, rows, columns, *kernel)
    shape : Shape
    outputs : tuple of int, optional
        Output positions; those of the smallest circle by default. Without meaning where windows
        do not overlap.

    Returns
    -------
    Tensor of shape (count, values)
        float64, on the CPU. Not numbers where the filters are not finite.
    """
    exact = filters.detach().double()
    if not bool(torch.isfinite(exact).all()):
        return torch.full((len(exact), 1), math.nan, dtype=torch.float64, device="cpu")
    if shape.route == "window":
        values: Tensor = torch.linalg.svdvals(exact.flatten(2))
        return values.cpu()
    grid = Grid.smallest(shape.kernel, shape.stride)
    if outputs is not None:
        sizes = tuple(m * s for m, s in zip(outputs, shape.stride, strict=True))
        grid = Grid(shape.kernel, shape.stride, sizes, grid.dilation)
    # Tensors that are made without a device are to be on this one, whatever the default is.
    with torch.device("cpu"):
        frequencies = grid.frequencies()
        entries = exact.numel() // math.prod(shape.kernel) * grid.aliases
        parts = frequencies.split(max(_ENTRIES // entries, 1))
        found = [
            _values(Polyphase(grid, part, torch.complex128, exact.device).blocks(exact))
            for part in parts
        ]
    return torch.cat(found, dim=1)


def _values(blocks: Tensor) -> Tensor:
    """Singular values of blocks ``(count, F, m, n)``, ``(count, F * min(m, n))``, on the CPU."""
    tall = blocks if blocks.shape[-2] >= blocks.shape[-1] else blocks.mH
    # So that squares stay within range.
    size = tall.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    tall = tall / size
    squares = torch.linalg.eigvalsh(tall.mH @ tall)
    values: Tensor = squares.clamp_min(0).sqrt()
    # Several times faster than decompositions of the blocks, but squares lose small ones.
    lost = squares[..., 0] < 1e-8 * squares[..., -1]
    if bool(lost.any()):
        values[lost] = torch.linalg.svdvals(tall[lost]).flip(-1)
    return (size * values).flatten(1).cpu()


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
    # What is made without a device is to be on this one, whatever the default is.
    with torch.inference_mode(mode=False), torch.device("cpu"):
        return make(*arguments)


def stacked(weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> Tensor:
    """Filters of layers of one shape, ``(count, rows, columns, *kernel)``, all groups of all."""
    return torch.cat([g.filters(w) for w, g in zip(weights, geometries, strict=True)])
