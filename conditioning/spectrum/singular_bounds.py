"""The matrix-free route of ``singular_range``: Golub-Kahan runs until both ends are enclosed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from conditioning.errors import InvalidArgumentError
from conditioning.jacobi import JacobiMatrix
from conditioning.krylov import random_start
from conditioning.krylov.bidiagonal import BidiagonalRun
from conditioning.memory import available_bytes, format_bytes
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.common import (
    METHODS,
    check_at_least,
    check_between,
    check_choice,
    check_counts,
)
from conditioning.spectrum.measure import inverse_weight
from conditioning.spectrum.results import Estimate, Result

DEFAULT_MATVECS = 1000
SingularStatus = Literal["exact", "exhausted", "certified", "one-sided", "not resolvable"]
ENDS = ("both", "largest")

_MAX_STARTS = 8
# A smallest singular value up to this many rounding allowances is zero for all one can tell.
_ZERO = 10
# An enclosure holds two of them: further products would hardly narrow one of this width.
_FINEST = 4


@dataclass(frozen=True)
class SingularRange(Result):
    """The extreme singular values of an operator of shape ``(m, n)``.

    Attributes
    ----------
    largest, smallest : Estimate
        Of the ``min(m, n)`` singular values. ``smallest.low`` is 0 where nothing bounds it from
        below, ``largest.high`` is infinite where nothing bounds it from above.
    shape : tuple of int
    status : str
        ``exact``, ``exhausted``, ``certified``, ``one-sided`` or ``not resolvable``.
    message : str
        What the status means here and what would improve it.
    num_matvecs : int
        Products spent, those with the operator and those with its transpose.
    noise : float
        Rounding allowance that every end contains, absolute.
    failure_probability : float
        With which an outer end (``largest.high``, ``smallest.low``) may be wrong; 0 where nothing
        was random. The inner ends are certain.
    """

    largest: Estimate
    smallest: Estimate
    shape: tuple[int, int]
    status: SingularStatus
    message: str
    num_matvecs: int
    noise: float
    failure_probability: float

    @property
    def condition(self) -> Estimate:
        """``largest / smallest``; infinite where the smallest may be zero, NaN for zero by zero."""
        return Estimate(
            *(
                up / down if down > 0 else (math.inf if up > 0 else math.nan)
                for up, down in (
                    (self.largest.value, self.smallest.value),
                    (self.largest.low, self.smallest.high),
                    (self.largest.high, self.smallest.low),
                )
            )
        )

    def __str__(self) -> str:
        ends = f"sigma_max = {self.largest}, sigma_min = {self.smallest}"
        return f"{ends} ({self.status}, {self.num_matvecs} products): {self.message}"


@dataclass(frozen=True)
class SingularOptions:
    """The options of ``singular_range``, checked."""

    rtol: float
    atol: float
    max_matvecs: int | None
    failure_probability: float
    which: str
    method: str
    memory_budget: int | None

    def __post_init__(self) -> None:
        check_between(0, 1, rtol=self.rtol)
        check_at_least(0, atol=self.atol)
        check_between(0, 0.5, failure_probability=self.failure_probability)
        check_choice(ENDS, which=self.which)
        check_choice(METHODS, method=self.method)
        if self.max_matvecs is not None:
            check_counts(max_matvecs=self.max_matvecs)
            # One product with each side, and one that measures their noise.
            check_at_least(3, max_matvecs=self.max_matvecs)
        if self.memory_budget is not None:
            check_at_least(1, memory_budget=self.memory_budget)

    @property
    def limit(self) -> int:
        """Products at most."""
        return DEFAULT_MATVECS if self.max_matvecs is None else self.max_matvecs

    def bytes_on(self, device: torch.device) -> int:
        """Memory for the basis or the dense matrix."""
        return available_bytes(device) // 2 if self.memory_budget is None else self.memory_budget

    def tight(self, end: Estimate) -> bool:
        """Whether an enclosure is as narrow as was asked for."""
        return end.high <= end.low * (1 + self.rtol) or end.high - end.low <= self.atol


@dataclass(frozen=True)
class _Seen:
    """What is kept of a run."""

    jacobi: JacobiMatrix
    size: int
    guard: float
    complete: bool
    vanished: bool

    @classmethod
    def of(cls, run: BidiagonalRun) -> _Seen:
        jacobi = run.jacobi
        # Taking a vanishing residual for larger keeps the bounds, and the range of float64.
        floor = 1e-25 * jacobi.scale
        if jacobi.residual_norm < floor:
            jacobi = replace(jacobi, residual_norm=floor)
        size = min(run.shape)
        return cls(jacobi, size, float(run.guard), run.complete, run.only_zeros)

    def inner(self) -> tuple[float, float]:
        """Certain: the smallest singular value is at most, the largest at least this."""
        jacobi = self.jacobi
        middle = int(np.abs(jacobi.ritz_values).argmin())
        smallest = abs(float(jacobi.ritz_values[middle]))
        if jacobi.size % 2:
            # One vector more on the smaller side than on the other: its image is the residual.
            smallest += float(jacobi.residual_norms[middle])
        return smallest, jacobi.scale

    def outer(self, inverse_mass: float) -> tuple[float, float]:
        """No singular value of a given share lies below the first or above the second."""
        jacobi, (smallest, largest) = self.jacobi, self.inner()
        if self.vanished:
            return 0.0, largest
        if self.complete:
            radius = float(jacobi.residual_norms.max())
            return smallest - radius, largest + radius
        # Every singular value is two eigenvalues, which have the half of its share each.
        return _left_end(jacobi, 2 * inverse_mass), jacobi.right_end(2 * inverse_mass)


def _left_end(jacobi: JacobiMatrix, inverse_mass: float) -> float:
    """An ``x`` such that no point of ``[0, x]`` can carry a given mass.

    Below the smallest Ritz value no polynomial of even index has a root, and
    ``inverse_mass`` bounds whole intervals: two meshes find where the exclusion ends.
    """
    if jacobi.size % 2:
        return 0.0
    end = float(np.abs(jacobi.ritz_values).min())
    points = end * (1 - np.geomspace(1, 1e-10, 160))
    for _ in range(2):
        between = jacobi.inverse_mass(points)[1]
        failing = np.flatnonzero(between <= inverse_mass)
        if not len(failing):
            return float(points[-1])
        first = int(failing[0])
        if points[first] == 0:
            return 0.0
        points = np.linspace(points[first], points[first + 1], 40)
    return float(points[0])


class SingularSearch:
    """Golub-Kahan runs from fresh start vectors until both ends are enclosed."""

    def __init__(
        self,
        operator: LinearOperator,
        options: SingularOptions,
        spent: int,
        generator: torch.Generator,
    ) -> None:
        self.operator = operator
        self.options = options
        self.spent = spent
        self.generator = generator
        self.seen: list[_Seen] = []  # of the runs that have closed
        self.excluded = self._outer = (0.0, math.inf)
        self.largest = Estimate(0.0, 0.0, math.inf)
        self.smallest = Estimate(math.inf, 0.0, math.inf)
        self.steps = self.starts = 0
        self.closed = self.complete = self.vanished = False
        self.noise = self.rounding = 0.0
        bytes_per_step = 4 * sum(operator.shape)
        self.by_memory = max(options.bytes_on(operator.device) // bytes_per_step, 8)
        self.current = self._start()

    @property
    def used(self) -> int:
        """Products so far."""
        return self.operator.num_matvecs - self.spent

    def _start(self) -> BidiagonalRun:
        start = random_start(min(self.operator.shape), self.generator, self.operator.device)
        first = not self.seen
        run = BidiagonalRun(self.operator, start, measure_noise=first, max_steps=self.by_memory)
        run.noise = self.rounding
        return run

    def run(self, room: int) -> SingularRange | None:
        """Go on up to ``room`` products; None if that did not settle the ends."""
        while True:
            run = self.current
            left = room - self.used - (0 if run.num_steps or self.seen else 1)
            target = min(_next_check(run.num_steps), run.num_steps + left, self.by_memory)
            target -= target % 2
            if target > run.num_steps:
                run.extend(target - run.num_steps)
            elif not run.closed:
                return None
            self._note(run)
            if self._settled():
                return self.conclude()
            if run.closed and not run.reopen():
                if run.complete or len(self.seen) + 1 >= _MAX_STARTS:
                    return self.conclude()
                self.seen.append(_Seen.of(run))
                self.excluded = self._outer
                self.current = self._start()

    def _note(self, run: BidiagonalRun) -> None:
        """Work out both ends from what the runs know now."""
        self.steps, self.closed, self.complete = run.num_steps, run.closed, run.complete
        self.rounding = max(self.rounding, run.noise)
        seen = [*self.seen, _Seen.of(run)]
        self.starts, self.vanished = len(seen), all(one.vanished for one in seen)
        inner = [one.inner() for one in seen]
        self._outer = _excluded(self.excluded, seen, self.options.failure_probability)
        # Rounding shows more and more of itself: every end takes what is known of it now.
        guard = self.noise = max(one.guard for one in seen)
        smallest, largest = min(low for low, _ in inner), max(high for _, high in inner)
        self.smallest = _estimate(smallest, self._outer[0] - guard, smallest + guard)
        self.largest = _estimate(largest, largest - guard, self._outer[1] + guard)

    def _zero(self) -> bool:
        """Whether the smallest is zero for all that the products can tell."""
        return self.smallest.high <= _ZERO * self.noise

    def _tight(self, end: Estimate) -> bool:
        """Whether an enclosure is as narrow as asked for, or as rounding allows."""
        return self.options.tight(end) or end.high - end.low <= _FINEST * self.noise

    def _settled(self) -> bool:
        if not self._tight(self.largest) and not self.vanished:
            return False
        return self.options.which == "largest" or self._tight(self.smallest) or self._zero()

    def conclude(self) -> SingularRange:
        """The result, with what its status means."""
        if not self.steps:
            msg = f"max_matvecs={self.options.limit} leaves no product for a Krylov run."
            raise InvalidArgumentError(msg)
        status, message = self._judge()
        failure = 0.0 if self.complete else self.options.failure_probability
        return SingularRange(
            self.largest, self.smallest, self.operator.shape, status, message, self.used,
            self.noise, failure,
        )  # fmt: skip

    def _judge(self) -> tuple[SingularStatus, str]:
        options = self.options
        starts = "" if self.starts == 1 else f", from {self.starts} start vectors"
        if self.vanished:
            return "exhausted", "zero operator: every product vanished"
        if self._settled() and self.closed:
            message = f"the Krylov space closed after {self.steps} products{starts}"
            if options.which == "both" and self._zero():
                message += "; the smallest is zero to rounding"
            return "exhausted", message
        if math.isinf(self.largest.high):
            return "one-sided", f"nothing bounds the largest from above yet; {self._more()}"
        if options.which == "largest":
            message = f"the largest, with probability at least 1 - {options.failure_probability:g}"
            return "certified", message + self._width()
        if self._zero() and not options.tight(self.smallest):
            return "not resolvable", (
                f"the smallest is at most {self.smallest.high:.2g}, the rounding of the products: "
                f"zero and small cannot be told apart{self._finer()}"
            )
        if self.smallest.low <= 0 and not options.tight(self.smallest):
            return "one-sided", (
                f"the smallest is at most {self.smallest.high:.3g}, nothing bounds it from below "
                f"yet; {self._more()}"
            )
        return "certified", (
            f"no singular value outside, with probability at least "
            f"1 - {options.failure_probability:g}{starts}" + self._width()
        )

    def _width(self) -> str:
        options = self.options
        ends = [self.largest] if options.which == "largest" else [self.largest, self.smallest]
        if all(options.tight(end) for end in ends):
            return ""
        why = "which is rounding" + self._finer() if self._settled() else self._more()
        return f"; wider than rtol={options.rtol:g}, {why}"

    def _more(self) -> str:
        if self.steps + 1 >= self.by_memory:
            size = format_bytes(4 * sum(self.operator.shape))
            return f"the bases filled memory_budget ({size} a product)"
        return f"max_matvecs ended the run after {self.used} products"

    def _finer(self) -> str:
        coarse = torch.finfo(self.operator.dtype).eps > 1e-10
        return ". Use float64" if coarse else ""


def _excluded(
    before: tuple[float, float], seen: list[_Seen], failure_probability: float
) -> tuple[float, float]:
    """Outer ends by several runs together, or by fewer of them before.

    A singular value is missed only if it has a small share of every start vector, and
    these are independent. Each further start is another chance to be wrong, so the numbers
    of starts share the allowance.
    """
    count, size = len(seen), seen[0].size
    allowed = failure_probability / (2 * count * (count + 1))
    inverse_mass = inverse_weight(size, allowed ** (1 / count))
    ends = [one.outer(inverse_mass) for one in seen]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return max(before[0], low), min(before[1], high)


def _estimate(value: float, low: float, high: float) -> Estimate:
    low = min(max(low, 0.0), value)
    return Estimate(float(value), float(low), float(max(high, value)))


def _next_check(num_steps: int) -> int:
    """Even step counts at which a run is judged."""
    return (num_steps // 10 + 1) * 10 if num_steps < 100 else num_steps + num_steps // 20 * 2
