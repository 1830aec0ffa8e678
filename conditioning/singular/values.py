"""Singular values of a layer: of the layer as it runs, on circles, or of its kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from conditioning.errors import (
    AsymmetricOperatorError,
    DenseTooLargeError,
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
)
from conditioning.krylov import make_generator, random_start
from conditioning.memory import format_bytes
from conditioning.operators.base import dense_bytes
from conditioning.singular.fixed import FixedLayer, checked_shape
from conditioning.singular.operator import LayerOperator
from conditioning.singular.results import SingularValues, exact_result
from conditioning.singular.scales import norm_of
from conditioning.singular.structured import (
    Placement,
    circular_grid,
    circular_values,
    kernel_values,
    window_values,
    with_zeros,
)
from conditioning.spectrum import Estimate, singular_range
from conditioning.spectrum.common import check_choice
from conditioning.spectrum.full import solver_error
from conditioning.spectrum.singular_bounds import SingularOptions

OPERATORS = ("true", "circular", "kernel")

# Roughly what one core does in a second; only their ratio matters. The dense solver: the square of
# the smaller side times the larger. Products: bytes of a basis that are read, and multiplications.
_DENSE_RATE = 2.6e9
_BYTES_RATE = 1.4e10
_PRODUCT_RATE = 1e10
_PRODUCT_SECONDS = 1e-3
# All singular values are worth this many times the enclosures of two.
_DENSE_WORTH = 2
_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def singular_values(
    layer: nn.Module,
    input_shape: Sequence[int] | None = None,
    operator: str = "true",
    *,
    rtol: float = 1e-2,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    failure_probability: float = 1e-6,
    seed: int | torch.Generator = 0,
    method: str = "auto",
    memory_budget: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> SingularValues:
    r"""Singular values of a layer without its bias: all of them, or both ends enclosed.

    Parameters
    ----------
    layer : nn.Module
        A linear layer, a convolution (any stride, padding, padding mode, dilation and groups) or
        a transposed one, also with a parametrised weight. With ``operator="true"`` any affine
        module: a pooling layer, a low-rank adapter, a sequence of such.
    input_shape : sequence of int, optional
        Of one input, without the batch: ``(channels, height, width)``. Not needed for ``kernel``
        and for linear layers.
    operator : {"true", "circular", "kernel"}
        ``true`` is the layer as it runs on inputs of that shape, with its own padding.
        ``circular`` is the same convolution on circles of ``height`` and ``width`` positions,
        whatever its padding is; its output has ``height / stride`` of them, that of a transposed
        one ``height * stride``.
        ``kernel`` is the matrix of a window, ``(rows, columns * taps)``, of all groups.
    rtol : float
        Without all values: stop when ``high / low <= 1 + rtol`` at both ends.
    atol : float
        An enclosure that is narrower than this is good enough too.
    max_matvecs : int, optional
        A limit on the products of that route, 1000 by default. The dense route is taken only
        where its products, as many as the smaller side has entries, stay within a given limit.
    failure_probability : float
        Allowed to the outer ends of that route together.
    seed : int or torch.Generator
        Of its start vectors.
    method : {"auto", "dense", "lanczos"}
        Of the true operator. ``auto`` takes the cheapest exact route there is, ``dense`` makes
        the matrix, ``lanczos`` takes products only.
    memory_budget : int, optional
        Bytes for the matrix, the blocks or the Krylov bases. Default: half of what is free. One
        block, one vector and bases of 8 products are held even where they take more.
    dtype : torch.dtype
        Weights of any precision are taken to this one, float64 or float32.

    Returns
    -------
    SingularValues
        It names its operator, also in print. With status ``exact`` it holds all ``values``.

    Raises
    ------
    UnsupportedLayerError
        If the module is not affine; for ``circular`` and ``kernel`` also if it is no linear or
        convolutional layer.
    UnsupportedParameterError
        If a parameter is complex, integer, sparse, sharded (DTensor), or has no data yet.
    NonFiniteError
        If a parameter, an output or a product is not finite.
    ShapeError
        If the layer does not take inputs of that shape, a kernel is larger than they are, or
        the weight has no entries.
    InvalidArgumentError
        If ``input_shape`` is missing, an option is out of range, or on a circle the stride does
        not divide the size.
    DenseTooLargeError
        If ``method="dense"`` does not fit ``memory_budget``.
    RandomForwardError
        If a module is random, or normalises by the batch, in the mode that it is in.
    LossWithoutGraphError, AsymmetricOperatorError
        If the backward pass is cut off, or not the transpose of the forward pass.

    Notes
    -----
    The three operators have different singular values where windows overlap. ``circular`` tells
    what a layer does far from every border. At the border of zero padding, where windows are cut,
    the smallest singular values arise: for 3x3 kernels the largest of both agree to a few per
    cent, while the smallest may differ by a factor of 30. So no condition number of a layer with
    zero padding is made of the circular one. Where they must agree (windows that share no input,
    or circular padding that closes the circle), ``true`` uses what is cheaper.

    The routes to the true operator, of which ``auto`` takes the first that applies:

    1. No input is read twice (linear layers, kernels not larger than their stride): a direct sum
       of the matrix of a window, whole and cut. All values, no product.
    2. Circular padding that closes the circle: one matrix for each frequency. All values.
    3. The dense matrices of all groups, where they are expected to take no more than twice the
       time of the fourth route at its limit of products. All values.
    4. Golub-Kahan runs on the forward and backward pass of the layer, which enclose both ends
       (:func:`conditioning.singular_range`). Axes along which windows are independent are
       measured at one window.

    Only the third makes a matrix of ``m x n`` entries, and only within ``memory_budget``. The
    second holds ``3 * 16`` bytes for each entry of the blocks in work, at most 256 MiB in all. The
    fourth holds ``4 (m + n)`` bytes a product.

    Times on one core, by the first two routes: a linear layer 1024 -> 1024 0.3 s; a 3x3 kernel on
    circles with 64 channels at 56x56 0.5 s, with 256 at 14x14 1 s. By the third: 3x3 with 32
    channels at 8x8 3 s, depthwise 7x7 with 32 channels at 28x28 6 s. By the fourth: 3x3 with 64
    channels at 28x28 0.5, at 56x56 more than 2 minutes for the 1000 products of the default
    limit, after which the largest is certified and the smallest often bounded from above only
    (status ``one-sided``). The time of the fourth grows with the square of
    ``max_matvecs``: pass a smaller one, or a larger ``rtol`` or ``atol``, where the largest is
    what is wanted.

    Parametrised and hooked weights (spectral norm, weight norm) are those of the next forward
    pass in the mode that the layer is in. Weights of linear and convolutional layers that are
    extremely large or small are divided by a power of two first, and results multiplied by it.

    References
    ----------
    Circular: H. Sedghi, V. Gupta, P. M. Long, arXiv:1805.10408, extended to strides. The gain
    :math:`\|W\|_F / \sqrt m`: A. Zaeemzadeh, N. Rahnavard, M. Shah, arXiv:1805.07477.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    >>> true = singular_values(conv, (3, 12, 12))
    >>> true.operator, true.status, len(true.values)
    ('true', 'exact', 432)
    >>> circular = singular_values(conv, (3, 12, 12), operator="circular")
    >>> float(true.smallest) < float(circular.smallest)
    True
    >>> print(singular_values(torch.nn.AvgPool2d(2), (1, 4, 4)))  # doctest: +ELLIPSIS
    AvgPool2d: true operator on (1, 4, 4), 4 x 16: sigma_max = 0.5 ± ... (exact, ... products): ...
    """
    options = SingularOptions(
        rtol, atol, max_matvecs, failure_probability, "both", method, memory_budget
    )
    check_choice(OPERATORS, operator=operator)
    generator = make_generator(seed)
    fixed = FixedLayer(layer, dtype)
    if operator == "kernel":
        return _of_kernel(fixed)
    shape = _input_shape(fixed, input_shape)
    fixed.verify(shape)
    if operator == "circular":
        return _on_circles(fixed, shape, options)
    return _TrueOperator(fixed, shape, options).measure(generator)


def _of_kernel(fixed: FixedLayer) -> SingularValues:
    weight, geometry = fixed.weight, fixed.geometry
    assert geometry is not None
    rows, columns, groups = geometry.rows, geometry.columns * geometry.taps, geometry.groups
    shape = (groups * rows, groups * columns)
    if geometry.transposed:
        shape = shape[::-1]
    note = ""
    if geometry.overlapping:
        note = "; windows overlap, so the layer as it runs (operator='true') has others"
    values = with_zeros(kernel_values(geometry, weight), min(shape))
    return exact_result(
        values, _noise(values, fixed.dtype), operator="kernel", layer=geometry.describe(),
        input_shape=None, shape=shape, scale=fixed.scale, note=note,
    )  # fmt: skip


def _on_circles(
    fixed: FixedLayer, input_shape: tuple[int, ...], options: SingularOptions
) -> SingularValues:
    weight, geometry = fixed.weight, fixed.geometry
    assert geometry is not None
    if not geometry.num_axes:
        return replace(_TrueOperator(fixed, input_shape, options).by_windows(), operator="circular")
    grid = circular_grid(geometry, input_shape[1:])
    positions = math.prod(grid.outputs)
    shape = (
        geometry.groups * geometry.rows * positions,
        geometry.groups * geometry.columns * math.prod(grid.sizes),
    )
    values = with_zeros(circular_values(geometry, grid, weight, options.memory_budget), min(shape))
    note = ""
    if not Placement(geometry, input_shape[1:]).wraps:
        note = "; on circles, without borders: for the layer as it runs use operator='true'"
    return exact_result(
        values, _noise(values, fixed.dtype), operator="circular", layer=geometry.describe(),
        input_shape=input_shape, shape=shape[::-1] if geometry.transposed else shape,
        scale=fixed.scale, note=note,
    )  # fmt: skip


class _TrueOperator:
    """The layer as it runs, and the routes to its singular values."""

    def __init__(
        self, fixed: FixedLayer, input_shape: tuple[int, ...], options: SingularOptions
    ) -> None:
        self.fixed, self.input_shape, self.options = fixed, input_shape, options
        # First of all, since it lets the layer itself say what it takes.
        self.operator = LayerOperator(fixed, input_shape, memory_budget=options.memory_budget)
        self.geometry = fixed.geometry
        self.shape = self.operator.shape
        axes = 0 if self.geometry is None else self.geometry.num_axes
        self.sizes = input_shape[len(input_shape) - axes :]
        self.name = fixed.name if self.geometry is None else self.geometry.describe()

    def measure(self, generator: torch.Generator) -> SingularValues:
        """By the cheapest route."""
        times = 1
        if self.geometry is not None and self.options.method == "auto":
            placement = Placement(self.geometry, self.sizes)
            if placement.independent:
                return self.by_windows()
            if placement.wraps:
                grid = circular_grid(self.geometry, self.sizes)
                budget = self.options.memory_budget
                found = circular_values(self.geometry, grid, self.fixed.weight, budget)
                return self._exact(found)
            sizes, times = placement.single_windows()
            if sizes != self.sizes:
                self.operator = LayerOperator(
                    self.fixed, (self.input_shape[0], *sizes),
                    memory_budget=self.options.memory_budget,
                )  # fmt: skip
        if self._takes_dense():
            found, error = self._dense()
            return self._exact(found.repeat(times), error)
        return self._by_products(times, generator)

    def by_windows(self) -> SingularValues:
        """A direct sum of windows; a linear layer has one for each position."""
        assert self.geometry is not None
        found = window_values(Placement(self.geometry, self.sizes), self.fixed.weight)
        positions = 1 if self.geometry.num_axes else math.prod(self.input_shape[:-1])
        return self._exact(found.repeat(positions))

    def _exact(self, found: Tensor, error: float = 0.0) -> SingularValues:
        values = with_zeros(found, min(self.shape))
        return exact_result(
            values, error + _noise(values, self.fixed.dtype), operator="true", layer=self.name,
            input_shape=self.input_shape, shape=self.shape, scale=self.fixed.scale,
            num_matvecs=self.operator.num_matvecs,
        )  # fmt: skip

    # -- the dense route --------------------------------------------------------------------

    @property
    def _block(self) -> tuple[int, int]:
        """Shape of the matrix of one group."""
        groups = 1 if self.geometry is None else self.geometry.groups
        rows, columns = self.operator.shape
        return rows // groups, columns // groups

    @property
    def _dense_bytes(self) -> int:
        return dense_bytes(self._block, torch.float64) * (self.operator.shape[0] // self._block[0])

    @property
    def _lanczos_seconds(self) -> float:
        """Roughly what products up to the limit take on one core."""
        count = min(self.options.limit, 2 * min(self.operator.shape))
        # Each product reads a half basis four times, which is half grown in the mean.
        bases = count / 4 * sum(self.operator.shape) / 2 * 4 * 8
        each = bases / _BYTES_RATE + _PRODUCT_SECONDS
        if self.geometry is not None:
            windows = math.prod(Placement(self.geometry, self.sizes).windows)
            each += self.fixed.weight.numel() * windows / _PRODUCT_RATE
        return count * each

    def _takes_dense(self) -> bool:
        options, (small, large) = self.options, sorted(self._block)
        budget = options.bytes_on(self.fixed.device)
        fits = self._dense_bytes <= budget
        if options.method == "dense" and not fits:
            msg = (
                f"The dense matrix of the {self.name} on {self.input_shape} takes "
                f"{format_bytes(self._dense_bytes)}, the budget is {format_bytes(budget)}. Use "
                f"method='lanczos', a smaller input_shape, or raise memory_budget."
            )
            raise DenseTooLargeError(msg)
        if options.method != "auto":
            return options.method == "dense"
        affordable = options.max_matvecs is None or small + 1 <= options.max_matvecs
        seconds = small * large * min(self.operator.shape) / _DENSE_RATE
        return fits and affordable and seconds <= _DENSE_WORTH * self._lanczos_seconds

    def _dense(self) -> tuple[Tensor, float]:
        """All singular values of the groups, and the rounding of the products."""
        operator = self.operator
        rows, columns = self._block
        groups = operator.shape[0] // rows
        wide = rows < columns
        multiply = operator.rmatvec if wide else operator.matvec
        far, near = (columns, rows) if wide else (rows, columns)
        matrix = torch.empty(groups, far, near, **self.fixed.placement)
        step = operator._dense_block()
        for begin in range(0, near, step):
            end = min(begin + step, near)
            # The same entry in every group: their outputs do not meet.
            units = torch.zeros(groups, near, end - begin, **self.fixed.placement)
            units[:, range(begin, end), range(end - begin)] = 1
            matrix[:, :, begin:end] = multiply(units.flatten(0, 1)).unflatten(0, (groups, far))
        probe = random_start(groups * far, 0, self.fixed.device).to(self.fixed.dtype)
        other = operator.matvec if wide else operator.rmatvec
        expected = torch.einsum("gfn,gf->gn", matrix, probe.view(groups, far)).flatten()
        product = other(probe)
        if not bool(torch.isfinite(matrix).all() and torch.isfinite(product).all()):
            msg = (
                f"Products of the {self.name} are not finite (NaN or infinity): look for overflow."
            )
            raise NonFiniteError(msg)
        gap, size = norm_of(product - expected), norm_of(expected)
        if gap > 0.1 * size > 0:
            msg = (
                f"The backward pass of the {self.name} is not the transpose of its forward pass: "
                f"on a random vector they differ by {gap / size:.1e} of its size. Look for a "
                f"custom autograd.Function, .detach(), or hooks that change gradients."
            )
            raise AsymmetricOperatorError(msg)
        # For a normal probe the gap is in the mean the Frobenius norm of the error.
        return torch.linalg.svdvals(matrix).flatten(), 3 * gap

    # -- products only ----------------------------------------------------------------------

    def _by_products(self, times: int, generator: torch.Generator) -> SingularValues:
        options, scale = self.options, self.fixed.scale
        rank, norm = times * min(self.operator.shape), None
        if self.geometry is not None:
            placement = Placement(self.geometry, self.sizes)
            rank = min(rank, placement.most_rank)
            norm = placement.square_sum(self.fixed.weight) ** 0.5
            self.operator.check_transpose()
        zeros = min(self.shape) - rank
        found = singular_range(
            self.operator, options.rtol, options.max_matvecs, options.failure_probability,
            generator, atol=options.atol / scale, which="largest" if zeros else "both",
            method="lanczos", memory_budget=options.memory_budget,
        )  # fmt: skip
        message, status = found.message, found.status
        if scale != 1:
            message += f" (numbers in this message are in units of {scale:.4g})"
        noise, lost = found.noise, 0.0
        if self.fixed.rounded:
            # Every weight is off by up to half a rounding unit, and no value by more than all.
            size = found.largest.high * rank**0.5 if norm is None else norm
            lost = size * torch.finfo(self.fixed.dtype).eps
            noise += lost
            message += (
                f"; that weights are rounded to {self.fixed.dtype} may move values by "
                f"{lost * scale:.2g}"
            )
        largest, smallest = (
            Estimate(end.value * scale, max(end.low - lost, 0.0) * scale, (end.high + lost) * scale)
            for end in (found.largest, found.smallest)
        )
        if zeros:
            smallest = Estimate(0.0, 0.0, 0.0)
            message += f"; {zeros} are zero by the shape alone"
        elif found.smallest.low > 0 and smallest.low == 0:
            status = "not resolvable"
        affordable = self._dense_bytes <= options.bytes_on(self.fixed.device)
        if affordable and not zeros and not options.tight(smallest):
            message += f". All by method='dense': {format_bytes(self._dense_bytes)}"
        rows, columns = (None if norm is None else norm * scale / n**0.5 for n in self.shape)
        return SingularValues(
            largest, smallest, "true", self.name, self.input_shape, self.shape, None, None,
            rows, columns, status, message, found.num_matvecs, noise * scale,
            found.failure_probability,
        )  # fmt: skip


def _noise(values: Tensor, dtype: torch.dtype) -> float:
    """Rounding of a dense solver and of what it was given."""
    coarser = torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    # Values alone, many of them equal, come out of LAPACK with up to 12 sqrt(n) rounding units.
    return 8 * coarser * solver_error(values.numpy())


def _input_shape(fixed: FixedLayer, given: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one input, checked against what the layer is."""
    geometry = fixed.geometry
    if geometry is not None and not geometry.num_axes:
        shape = (geometry.in_channels,) if given is None else checked_shape(given)
        if shape[-1] != geometry.in_channels:
            msg = (
                f"The input_shape of a {geometry.describe()} layer ends in "
                f"{geometry.in_channels}, got {shape}."
            )
            raise ShapeError(msg)
        return shape
    if geometry is None:
        what, wanted = f"a {fixed.name}", "(channels, ...)"
    else:
        axes = ", ".join(_AXES[geometry.num_axes])
        what, wanted = f"a {geometry.describe()}", f"({geometry.in_channels}, {axes})"
    if given is None and isinstance(fixed.layer, nn.Linear):
        return (fixed.layer.in_features,)
    if given is None:
        msg = (
            f"The singular values of {what} depend on the size of its input: pass "
            f"input_shape={wanted}, without the batch"
            + (", or operator='kernel'." if geometry is not None else ".")
        )
        raise InvalidArgumentError(msg)
    shape = checked_shape(given)
    if geometry is not None and (
        len(shape) != 1 + geometry.num_axes or shape[0] != geometry.in_channels
    ):
        msg = f"The input of {what} is input_shape={wanted}, without the batch, got {shape}."
        raise ShapeError(msg)
    return shape
