"""All eigenvalues, by a dense solver: what everything else is checked against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import NonFiniteError
from conditioning.jacobi import Array
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.common import check_share, check_zero_and_percentile, square
from conditioning.spectrum.results import ConditionNumber, Estimate, Result, Status

NAN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class FullSpectrum(Result):
    """All eigenvalues of a symmetric operator, from one dense matrix.

    Attributes
    ----------
    values : ndarray of shape (n,)
        Ascending.
    error : float
        Every value is within this of an eigenvalue, in order (Weyl): half the Frobenius norm of
        the antisymmetric part, which is what the products got wrong, plus the backward error of
        the eigensolver.
    num_matvecs : int
    """

    values: Array
    error: float
    num_matvecs: int

    @property
    def size(self) -> int:
        """``n``."""
        return len(self.values)

    def condition_number(
        self, zero_rtol: float = 1e-10, percentile: float | None = None
    ) -> ConditionNumber:
        """The condition number, as by :func:`conditioning.condition_number`.

        Raises
        ------
        InvalidArgumentError
            If an option is out of range.
        """
        check_zero_and_percentile(zero_rtol, percentile)
        magnitudes = np.sort(np.abs(self.values))
        scale, error = float(magnitudes[-1]), self.error
        if scale <= error:
            return zero_operator(self.size, percentile, self.num_matvecs, scale, error, "exact")
        wanted = zero_rtol * scale
        threshold = max(wanted, 4 * error)
        dropped, kept = magnitudes[magnitudes <= threshold], magnitudes[magnitudes > threshold]
        below = float(dropped[-1]) if len(dropped) else 0.0
        above = float(kept[0]) if len(kept) else math.nan
        lowest = above if percentile is None else float(np.percentile(magnitudes, percentile))
        smallest = Estimate(lowest, max(lowest - error, 0.0), lowest + error)
        largest = Estimate(scale, scale - error, scale + error)
        status, message = self._judge(
            percentile, lowest, threshold, wanted, (len(dropped), below, above)
        )
        low = largest.low / smallest.high
        value, high = low, math.inf
        if status != "not resolvable":
            value = largest.value / lowest
            high = largest.high / smallest.low if smallest.low > 0 else math.inf
        return ConditionNumber(
            value, low, high, largest, smallest,
            Estimate(*[float(len(dropped))] * 3), threshold, percentile, status, message,
            self.num_matvecs, below, above, error, 0.0,
        )  # fmt: skip

    def _judge(
        self,
        percentile: float | None,
        lowest: float,
        threshold: float,
        wanted: float,
        sides: tuple[int, float, float],
    ) -> tuple[Status, str]:
        """Status and message, from what lies on the two sides of the threshold."""
        zeros, below, above = sides
        scale = float(np.abs(self.values).max())
        if percentile is not None and lowest <= threshold:
            return "not resolvable", (
                f"the {percentile:g}th percentile of |lambda| is {lowest:.3g}, within the zero "
                f"threshold {threshold:.3g}: more than that share of the spectrum is zero."
            )
        if percentile is None and (not above > 0 or below > wanted):
            return "not resolvable", (
                f"{zeros} of {self.size} eigenvalues lie below {threshold / scale:.1e} "
                f"max|lambda|, four times the rounding of the products, and above zero_rtol: zero "
                f"or small cannot be told apart. Use float64."
            )
        if percentile is None and below > threshold / 10 and above < threshold * 10:
            return "depends on threshold", (
                f"eigenvalues on both sides of the zero threshold {threshold:.3g}: {below:.3g} "
                f"counts as zero, {above:.3g} does not. Choose zero_rtol, or quote percentile=10."
            )
        kept = f"the smallest kept is {above / scale:.2g} max|lambda|"
        if not zeros:
            return "exact", f"all {self.size} eigenvalues known, none counts as zero, {kept}"
        return "exact", (
            f"all {self.size} eigenvalues known, {zeros} count as zero (up to "
            f"{below / scale:.1g} max|lambda|), {kept}"
        )

    def index(self, zero_rtol: float = 1e-10) -> Estimate:
        """Fraction of eigenvalues below ``-zero_rtol * max |lambda|``."""
        cut = max(zero_rtol * float(np.abs(self.values).max()), self.error)
        # What rounding leaves open may be on either side of the cut.
        ends = (cut, cut + self.error, cut - self.error)
        return Estimate(*[float((self.values < -end).mean()) for end in ends])

    def cdf(self, point: float) -> Estimate:
        """Share of eigenvalues up to ``point``."""
        ends = (point, point - self.error, point + self.error)
        return Estimate(*[float((self.values <= end).mean()) for end in ends])

    def quantile(self, q: float, *, absolute: bool = False) -> Estimate:
        """The ``q``-quantile of the eigenvalues, or of ``|lambda|`` with ``absolute``.

        Raises
        ------
        InvalidArgumentError
            If ``q`` is not between 0 and 1.
        """
        check_share(q=q)
        value = float(np.quantile(np.abs(self.values) if absolute else self.values, q))
        low = value - self.error
        return Estimate(value, max(low, 0.0) if absolute else low, value + self.error)

    def __str__(self) -> str:
        return (
            f"all {self.size} eigenvalues on [{self.values[0]:.6g}, {self.values[-1]:.6g}], each "
            f"to within {self.error:.1g} ({self.num_matvecs} products)"
        )


def full_spectrum(operator: Any, memory_budget: int | None = None) -> FullSpectrum:
    """All eigenvalues of a symmetric operator, from its dense matrix.

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        Symmetric, ``(n, n)``.
    memory_budget : int, optional
        Bytes that the matrix and its work space may take. Default: half of what is free.

    Returns
    -------
    FullSpectrum

    Raises
    ------
    DenseTooLargeError
        If the matrix does not fit; says what it would take.
    NonFiniteError
        If it contains NaN or an infinity.
    """
    taken = square(operator)
    spent = taken.num_matvecs
    matrix, error = symmetric_part(taken, memory_budget)
    values = torch.linalg.eigvalsh(matrix).cpu().numpy()
    return FullSpectrum(values, error + solver_error(values), taken.num_matvecs - spent)


def symmetric_part(operator: LinearOperator, memory_budget: int | None) -> tuple[Tensor, float]:
    """The dense matrix in float64, symmetrised, and how far from symmetric it was."""
    matrix = operator.dense(memory_budget).to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        msg = "The dense matrix is not finite. Check the loss and the parameters for overflow."
        raise NonFiniteError(msg)
    skew = float(torch.linalg.matrix_norm(matrix - matrix.T)) / 2
    return (matrix + matrix.T) / 2, skew


def solver_error(values: Array) -> float:
    """Backward error of a dense symmetric eigensolver, as a multiple of the rounding unit."""
    eps = float(np.finfo(np.float64).eps)
    return 4 * math.sqrt(len(values)) * eps * float(np.abs(values).max())


def zero_operator(
    size: int,
    percentile: float | None,
    num_matvecs: int,
    scale: float,
    error: float,
    status: Status,
) -> ConditionNumber:
    """What is said of an operator whose products all vanish."""
    message = (
        f"zero operator: every product vanished, all {size} eigenvalues are zero, so there is no "
        f"condition number. At a stationary point of order above 1 the first nonzero "
        f"derivative is of higher order, and on a kink (ReLU, max, masks) autograd's derivative is "
        f"a convention; evaluate elsewhere."
    )
    return ConditionNumber(
        math.nan, math.nan, math.nan, Estimate(scale, 0.0, scale + error), NAN,
        Estimate(*[float(size)] * 3), error, percentile, status, message, num_matvecs, scale,
        math.nan, error, 0.0, 1 if status == "exhausted" else None,
    )  # fmt: skip
