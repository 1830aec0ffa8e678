"""What is known of the singular values of a layer, and of which operator they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from conditioning.singular.scales import norm_of
from conditioning.spectrum import Estimate
from conditioning.spectrum.results import Result
from conditioning.spectrum.singular_bounds import SingularRange, SingularStatus


@dataclass(frozen=True)
class SingularValues(Result):
    r"""Singular values of one operator of a layer, of shape ``(m, n)``.

    Attributes
    ----------
    largest, smallest : Estimate
        Of the ``min(m, n)`` singular values.
    operator : {"true", "circular", "kernel"}
        The layer as it runs, the layer on circles, or the matrix of a window.
    layer : str
        ``conv 3x3, 16 -> 32, stride 2, zeros padding``.
    input_shape : tuple of int or None
        Of one input, without the batch; None for a kernel.
    shape : tuple of int
        ``(m, n)``: elements of the output and of the input. A kernel with several groups counts as
        the block diagonal matrix of theirs.
    values : Tensor of shape (min(m, n),) or None
        All of them, descending, float64, on the CPU; None where only the ends are known.
    rank : int or None
        How many are above ``noise``; None where ``values`` is.
    backward_gain, forward_gain : float or None
        Root mean square of :math:`\|W^T g\| / \|g\|` and of :math:`\|W x\| / \|x\|` for random
        directions: :math:`\|W\|_F / \sqrt m` and :math:`\|W\|_F / \sqrt n`. Known wherever the
        layer is a linear or convolutional one, and from ``values`` for others; else None.
    status : str
        As in :class:`conditioning.SingularRange`: ``exact`` where all are known.
    message : str
        What the status means here and what would improve it.
    num_matvecs : int
        Products spent, those with the operator and those with its transpose.
    noise : float
        Rounding allowance that every end contains, absolute.
    failure_probability : float
        With which an outer end may be wrong; 0 where nothing was random.
    """

    largest: Estimate
    smallest: Estimate
    operator: str
    layer: str
    input_shape: tuple[int, ...] | None
    shape: tuple[int, int]
    values: Tensor | None = field(repr=False, compare=False)
    rank: int | None
    backward_gain: float | None
    forward_gain: float | None
    status: SingularStatus
    message: str
    num_matvecs: int
    noise: float
    failure_probability: float

    @property
    def condition(self) -> Estimate:
        """``largest / smallest``; infinite where the smallest may be zero, NaN for zero by zero."""
        return self.range.condition

    @property
    def smallest_nonzero(self) -> Estimate | None:
        """The smallest that is not zero to rounding.

        None for a zero operator, and where zeros are there, or may be, without all values known.
        """
        if self.values is None:
            return self.smallest if self.smallest.low > 0 else None
        if not self.rank:
            return None
        value = float(self.values[self.rank - 1])
        return Estimate(value, max(value - self.noise, 0.0), value + self.noise)

    @property
    def backward_bounds(self) -> tuple[float, float]:
        r"""What every :math:`\|W^T g\| / \|g\|` lies between.

        From below by the smallest singular value, but by zero where there are more outputs than
        inputs: some gradients are then lost whatever the smallest is.
        """
        return (self.smallest.low if self.shape[0] <= self.shape[1] else 0.0), self.largest.high

    @property
    def forward_bounds(self) -> tuple[float, float]:
        r"""What every :math:`\|W x\| / \|x\|` lies between, see :attr:`backward_bounds`."""
        return (self.smallest.low if self.shape[1] <= self.shape[0] else 0.0), self.largest.high

    @property
    def range(self) -> SingularRange:
        """The ends alone, as of any operator."""
        return SingularRange(
            self.largest, self.smallest, self.shape, self.status, self.message, self.num_matvecs,
            self.noise, self.failure_probability,
        )  # fmt: skip

    def __str__(self) -> str:
        what = "kernel matrix" if self.operator == "kernel" else f"{self.operator} operator"
        where = "" if self.input_shape is None else f" on {self.input_shape}"
        return f"{self.layer}: {what}{where}, {self.shape[0]} x {self.shape[1]}: {self.range}"


def exact_result(
    values: Tensor,
    noise: float,
    *,
    operator: str,
    layer: str,
    input_shape: tuple[int, ...] | None,
    shape: tuple[int, int],
    scale: float = 1.0,
    note: str = "",
    num_matvecs: int = 0,
) -> SingularValues:
    """The result where all values are known, descending, to within ``noise``, times ``scale``."""
    norm = norm_of(values) * scale
    values, noise = values * scale, noise * scale
    top, low = float(values[0]), float(values[-1])
    rank = int((values > noise).sum())
    count = len(values)
    message = f"all {count} singular values known" if count > 1 else "the only singular value known"
    if top == 0:
        message += "; the operator is zero"
    elif rank == 0:
        message += "; none is above rounding"
    elif rank < count:
        least = float(values[rank - 1])
        message += f"; rank {rank}, and the smallest of those that are not zero is {least:.4g}"
    return SingularValues(
        Estimate(top, max(top - noise, 0.0), top + noise),
        Estimate(low, max(low - noise, 0.0), low + noise),
        operator, layer, input_shape, shape, values, rank, norm / math.sqrt(shape[0]),
        norm / math.sqrt(shape[1]), "exact", message + note, num_matvecs, noise, 0.0,
    )  # fmt: skip
