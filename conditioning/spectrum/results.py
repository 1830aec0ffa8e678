"""Results: frozen, printable as one line, and never without their error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from torch import Tensor

Status = Literal[
    "exact",
    "exhausted",
    "certified",
    "lower bound only",
    "depends on threshold",
    "not resolvable",
]


def _digits(value: float, width: float) -> int:
    if not (math.isfinite(value) and math.isfinite(width)) or width <= 0 or value == 0:
        return 6
    return min(max(math.ceil(math.log10(abs(value) / width)) + 1, 3), 12)


def _shown(value: float, digits: int) -> str:
    text = f"{value:#.{digits}g}" if math.isfinite(value) else f"{value}"
    return text.removesuffix(".")


def _plain(value: Any) -> Any:
    """JSON-ready form of a field: estimates become dicts, arrays become lists."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


class Result:
    """What every result can do: ``to_dict()`` gives plain Python, ready for JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Fields by name; estimates as nested dicts, arrays as lists."""
        return {
            item.name: _plain(getattr(self, item.name))
            for item in fields(self)  # type: ignore[arg-type]
            if item.repr
        }


@dataclass(frozen=True)
class Estimate(Result):
    """A number with its enclosure; ``float(e)`` is the number.

    Parameters
    ----------
    value, low, high : float
        ``low <= value <= high``. What the enclosure promises (certain, or with which
        probability) is said by the result that holds it.

    Examples
    --------
    >>> print(Estimate(1.594, 1.590, 1.598))
    1.594 [1.590, 1.598]
    """

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number without an error."""
        return cls(value, value, value)

    def __float__(self) -> float:
        return float(self.value)

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def brief(self) -> str:
        """For a sentence: three digits, and the ends only where they differ in these.

        Examples
        --------
        >>> Estimate(6.6034722, 6.6034719, 6.6034726).brief(), Estimate(2.0, 1.9, 2.2).brief()
        ('6.60', '2.00 [1.90, 2.20]')
        """
        ends = {_shown(end, 3) for end in (self.low, self.value, self.high)}
        return ends.pop() if len(ends) == 1 else str(self)

    def __str__(self) -> str:
        width = self.high - self.low
        if self.low == self.value == self.high:
            return f"{self.value:.6g}"
        if 0 < width < 1e-7 * abs(self.value):
            return (
                f"{self.value:.8g} \u00b1 {max(self.high - self.value, self.value - self.low):.0e}"
            )
        digits = _digits(self.value, width)
        ends = f"{_shown(self.low, digits)}, {_shown(self.high, digits)}"
        return f"{_shown(self.value, digits)} [{ends}]"


@dataclass(frozen=True)
class ConditionNumber(Result):
    """``max |lambda| / min {|lambda| : |lambda| > zero_threshold}``, enclosed.

    Attributes
    ----------
    value, low, high : float
        The condition number and its enclosure. ``high`` is infinite where no upper bound is
        known; ``value`` is then the certain lower bound. All three are NaN for a zero operator.
    largest, smallest : Estimate
        Of ``|lambda|``: the largest, and the smallest above ``zero_threshold`` (with
        ``percentile`` the given percentile over all eigenvalues).
    nullity : Estimate
        Number of eigenvalues at or below ``zero_threshold`` in magnitude.
    zero_threshold : float
        What counts as zero, absolute. It is ``zero_rtol * largest``, or four times the
        rounding of the products where that is more.
    percentile : float or None
        ``None`` for the plain condition number.
    status : str
        ``exact``, ``exhausted``, ``certified``, ``lower bound only``, ``depends on threshold``
        or ``not resolvable``.
    message : str
        What the status means here and what would improve it.
    num_matvecs : int
        Products spent.
    below_threshold, above_threshold : float
        The distance to the threshold on both sides, as the largest ``|lambda|`` counted as
        zero (0 when none is) and the smallest kept, both absolute.
    noise : float
        Rounding allowance that every end contains, absolute.
    failure_probability : float
        With which the enclosure may be wrong (0 where nothing was random).
    distinct : int or None
        Distinct eigenvalues seen, where all of them were.
    needed_matvecs : int or None
        With ``lower bound only``: products that certifying would take, about (18 kappa for a
        spectrum that fills both sides of zero, fewer beside outliers or on one side, at most n;
        with the ``low`` of kappa, so rather too few than too many).
    kappa_10 : Estimate or None
        Where the run was stopped early: the quotient by the 10th percentile of ``|lambda|``, from
        the same products and a few more, with the ``failure_probability``.
    """

    value: float
    low: float
    high: float
    largest: Estimate
    smallest: Estimate
    nullity: Estimate
    zero_threshold: float
    percentile: float | None
    status: Status
    message: str
    num_matvecs: int
    below_threshold: float
    above_threshold: float
    noise: float
    failure_probability: float
    distinct: int | None = None
    needed_matvecs: int | None = None
    kappa_10: Estimate | None = None

    @property
    def estimate(self) -> Estimate:
        """``value``, ``low`` and ``high`` as one estimate."""
        return Estimate(self.value, self.low, self.high)

    def __str__(self) -> str:
        name = "kappa" if self.percentile is None else f"kappa_{self.percentile:g}"
        if math.isnan(self.value):
            number = f"{name} is not defined"
        elif math.isinf(self.high):
            number = f"{name} >= {self.low:.4g}"
        else:
            number = f"{name} = {self.estimate}"
        return f"{number} ({self.status}, {self.num_matvecs} products): {self.message}"


@dataclass(frozen=True)
class Eigenvalues(Result):
    """Extreme eigenvalues with multiplicity.

    Attributes
    ----------
    values : tuple of Estimate
        In the order that ``which`` asks for. With status ``certified`` entry ``i`` encloses the
        ``i``-th eigenvalue of the operator, multiplicities counted. With ``LM`` its magnitude: the
        sign is that of the pair found, and another eigenvalue within the enclosure of the
        magnitude may have the other sign.
        With ``certify=False`` it does so too, but up to the largest eigenvalue.
    residual_norms : tuple of float
        ``||A v - value v||``; an eigenvalue lies within this of each value, whatever the status.
    vectors : Tensor of shape (n, k) or None
    which, method : str
    num_matvecs : int
    status : {"exact", "exhausted", "certified", "not certified", "not converged"}
        ``not certified``: the residuals are small, but nothing excludes an eigenvalue that was
        missed (power iteration always, Lanczos with ``certify=False``, or when the budget ends).
    message : str
    failure_probability : float
    """

    values: tuple[Estimate, ...]
    residual_norms: tuple[float, ...]
    vectors: Tensor | None = field(repr=False)
    which: str
    method: str
    num_matvecs: int
    status: str
    message: str
    failure_probability: float

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Estimate:
        return self.values[index]

    def numpy(self) -> np.ndarray:
        """The values alone, float64, shape ``(k,)``."""
        return np.array([float(v) for v in self.values])

    def __str__(self) -> str:
        shown = ", ".join(str(v) for v in self.values)
        return f"{shown} ({self.status}, {self.num_matvecs} products): {self.message}"
