"""A predicted spectrum: distinct eigenvalues and how often each occurs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory._checks import finite_float, real_tensor

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class DiscreteSpectrum:
    """Eigenvalues of a symmetric matrix, known in closed form, with multiplicities.

    Every number here is found from the distinct values alone, so a spectrum of
    millions of eigenvalues costs no more than its distinct ones.

    Parameters
    ----------
    values : Tensor of shape (k,), float64
        Distinct eigenvalues, ascending. Exact zeros are stored as ``0.0``.
    multiplicities : Tensor of shape (k,), int64
        How often each occurs.

    Raises
    ------
    ShapeError
        If the two are not vectors of one positive length.
    InvalidArgumentError
        If values are not strictly ascending and finite, or a multiplicity is below 1.
    """

    values: Tensor
    multiplicities: Tensor

    def __post_init__(self) -> None:
        """Check the invariants that every method relies on."""
        shapes = tuple(self.values.shape), tuple(self.multiplicities.shape)
        if len(shapes[0]) != 1 or shapes[0] != shapes[1] or shapes[0][0] == 0:
            msg = f"values and multiplicities must be vectors of one length k >= 1, got {shapes}."
            raise ShapeError(msg)
        real_tensor(self.values, "values")
        if bool((self.values.diff() <= 0).any()):
            msg = "values must be distinct and ascending; use DiscreteSpectrum.collect otherwise."
            raise InvalidArgumentError(msg)
        if self.multiplicities.dtype != torch.int64 or bool((self.multiplicities < 1).any()):
            msg = "multiplicities must be int64 and at least 1."
            raise InvalidArgumentError(msg)

    @classmethod
    def collect(cls, values: Tensor, multiplicities: Tensor, *, atol: float) -> DiscreteSpectrum:
        """Build a spectrum from values in any order, some of them equal up to rounding.

        Values within ``atol`` of zero become exactly zero. Neighbours closer than
        ``atol`` become one value, their mean. Entries of multiplicity 0 are dropped.

        Parameters
        ----------
        values : Tensor of shape (k,)
            Eigenvalues.
        multiplicities : Tensor of shape (k,), int64
            How often each occurs; 0 is allowed.
        atol : float
            Absolute rounding error of ``values``.

        Returns
        -------
        DiscreteSpectrum
            Distinct values, ascending.

        Raises
        ------
        ShapeError
            If nothing is left, or the shapes differ.
        InvalidArgumentError
            If a value is not finite or a multiplicity is negative.
        """
        values = real_tensor(values, "values")
        counts = multiplicities.to(torch.int64)
        if values.ndim != 1 or values.shape != counts.shape:
            msg = (
                "values and multiplicities must be vectors of one length, got "
                f"{tuple(values.shape)} and {tuple(counts.shape)}."
            )
            raise ShapeError(msg)
        if bool((counts < 0).any()):
            msg = "multiplicities must not be negative."
            raise InvalidArgumentError(msg)
        values, counts = values[counts > 0], counts[counts > 0]
        values = torch.where(values.abs() <= atol, torch.zeros_like(values), values)
        values, order = torch.sort(values)
        counts = counts[order]
        # Zero merges with no other value: all others are now further from it than atol.
        new = values.diff() > atol
        group = torch.cat([new.new_zeros(min(1, len(values))), new]).cumsum(0)
        size = int(group[-1]) + 1 if len(group) else 0
        merged = torch.zeros(size, dtype=torch.int64, device=counts.device)
        merged.index_add_(0, group, counts)
        first = torch.zeros(size, dtype=torch.float64, device=values.device)
        last = torch.zeros_like(first)
        first.scatter_reduce_(0, group, values, "amin", include_self=False)
        last.scatter_reduce_(0, group, values, "amax", include_self=False)
        return cls(first + (last - first) / 2, merged)

    @property
    def num_eigenvalues(self) -> int:
        """Number of eigenvalues, counted with multiplicity: the size of the matrix."""
        return int(self.multiplicities.sum())

    @property
    def num_distinct(self) -> int:
        """Number of distinct eigenvalues: a Krylov run closes after at most so many steps."""
        return len(self.values)

    @property
    def nullity(self) -> int:
        """Number of eigenvalues that are exactly zero."""
        return int(self.multiplicities[self.values == 0].sum())

    @property
    def index(self) -> float:
        """Fraction of eigenvalues that are negative."""
        return int(self.multiplicities[self.values < 0].sum()) / self.num_eigenvalues

    @property
    def largest(self) -> float:
        """Largest absolute value of an eigenvalue."""
        return float(self.values.abs().max())

    def expand(self) -> Tensor:
        """Return all eigenvalues with multiplicity, shape ``(num_eigenvalues,)``, ascending."""
        return self.values.repeat_interleave(self.multiplicities)

    def percentile(self, percentile: float) -> float:
        """Percentile of the absolute eigenvalues, interpolated linearly as NumPy does.

        Parameters
        ----------
        percentile : float
            Between 0 and 100.

        Returns
        -------
        float
            ``numpy.percentile(abs(expand()), percentile)``.

        Raises
        ------
        InvalidArgumentError
            If ``percentile`` is outside 0 .. 100.
        """
        q = finite_float(percentile, "percentile")
        if not 0 <= q <= 100:
            msg = f"percentile must be between 0 and 100, got {q}."
            raise InvalidArgumentError(msg)
        magnitudes, order = torch.sort(self.values.abs())
        ends = self.multiplicities[order].cumsum(0)
        position = q / 100 * (self.num_eigenvalues - 1)
        below = math.floor(position)
        ranks = torch.tensor([below, min(below + 1, self.num_eigenvalues - 1)]).to(ends)
        low, high = magnitudes[torch.searchsorted(ends, ranks, right=True)].tolist()
        return float(low + (high - low) * (position - below))

    def condition_number(self, *, percentile: float | None = None, nonzero: bool = False) -> float:
        r"""Condition number :math:`|\lambda|_{\max} / |\lambda|_{\min}`.

        Parameters
        ----------
        percentile : float, optional
            Put this percentile of :math:`|\lambda|` in place of the smallest; 10 gives
            the :math:`\kappa_{10}` of Li et al., arXiv:1611.01186 (experiments).
        nonzero : bool
            Leave exact zeros out first.

        Returns
        -------
        float
            Infinity when the denominator is exactly zero.

        Raises
        ------
        InvalidArgumentError
            If ``percentile`` is outside 0 .. 100, or ``nonzero`` leaves no eigenvalue.
        """
        spectrum = self
        if nonzero:
            keep = self.values != 0
            if not bool(keep.any()):
                msg = "every eigenvalue is zero: there is no condition number of nonzero ones."
                raise InvalidArgumentError(msg)
            spectrum = DiscreteSpectrum(self.values[keep], self.multiplicities[keep])
        smallest = (
            float(spectrum.values.abs().min())
            if percentile is None
            else spectrum.percentile(percentile)
        )
        return spectrum.largest / smallest if smallest > 0 else math.inf

    def __repr__(self) -> str:
        """One line: size, range, distinct values, zeros."""
        return (
            f"DiscreteSpectrum({self.num_eigenvalues} eigenvalues, {self.num_distinct} distinct, "
            f"{self.nullity} zero, from {float(self.values[0]):.6g} to "
            f"{float(self.values[-1]):.6g})"
        )


def rounding_atol(size: int, scale: float) -> float:
    """Absolute error to expect in an eigenvalue of a matrix of this size and norm."""
    return 8 * size * _EPS * scale
