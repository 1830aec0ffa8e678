"""What every spectral function checks before it starts, and when the dense route is open."""

from __future__ import annotations

from typing import Any

import numpy as np

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator, as_operator, dense_bytes

DENSE_MAX = 8192  # columns: 1.6 GB of work space, a minute or two on two cores
METHODS = ("auto", "dense", "lanczos")


def square(operator: Any) -> LinearOperator:
    """The operator behind ``operator``, checked to be square and symmetric.

    Raises
    ------
    ShapeError
        If it is not.
    """
    taken = as_operator(operator)
    if taken.shape[0] != taken.shape[1] or taken.shape[0] == 0:
        msg = f"A spectrum needs a square operator with at least one row, got {taken.shape}."
        raise ShapeError(msg)
    if not taken.symmetric:
        msg = (
            f"{taken!r} is not symmetric. Spectra here are those of symmetric operators; for "
            f"singular values use singular_range."
        )
        raise ShapeError(msg)
    return taken


def dense_fits(operator: LinearOperator, memory_budget: int | None = None) -> bool:
    """Whether all ``n`` columns are few enough, and fit half of the free memory (or a budget)."""
    budget = available_bytes(operator.device) // 2 if memory_budget is None else memory_budget
    too_large = operator.agree(dense_bytes(operator.shape, operator.dtype) > budget)
    return operator.shape[0] <= DENSE_MAX and not too_large


def check_counts(**counts: Any) -> None:
    """Raise ``InvalidArgumentError`` unless every option is a positive integer."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            msg = f"{name} must be a positive integer, got {count!r}."
            raise InvalidArgumentError(msg)


def check_between(low: float, high: float, **numbers: float) -> None:
    """Raise ``InvalidArgumentError`` unless every option lies strictly between the ends."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float, np.number)) or not low < number < high:
            msg = f"{name} must lie between {low:g} and {high:g}, got {number!r}."
            raise InvalidArgumentError(msg)


def check_at_least(least: float, **numbers: float) -> None:
    """Raise ``InvalidArgumentError`` unless every option is at least this large."""
    for name, number in numbers.items():
        if not number >= least:
            msg = f"{name} must be at least {least:g}, got {number}."
            raise InvalidArgumentError(msg)


def check_share(**shares: float) -> None:
    """Raise ``InvalidArgumentError`` unless every option lies between 0 and 1, ends included."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            msg = f"{name} must lie between 0 and 1, got {share}."
            raise InvalidArgumentError(msg)


def check_choice(choices: tuple[str, ...], **options: str) -> None:
    """Raise ``InvalidArgumentError`` unless every option is one of the choices."""
    for name, option in options.items():
        if option not in choices:
            msg = f"{name} must be one of {', '.join(choices)}, got {option!r}."
            raise InvalidArgumentError(msg)


def check_zero_and_percentile(zero_rtol: float, percentile: float | None) -> None:
    """Raise ``InvalidArgumentError`` unless both mean something."""
    if not 0 <= zero_rtol < 1:
        msg = f"zero_rtol must lie in [0, 1), got {zero_rtol}."
        raise InvalidArgumentError(msg)
    if percentile is not None and not 0 <= percentile < 100:
        msg = f"percentile must be None or lie in [0, 100), got {percentile}."
        raise InvalidArgumentError(msg)
