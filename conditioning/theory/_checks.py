"""Validators shared by the prediction modules. They return clean float64 input or raise."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError


def real_tensor(value: Any, name: str) -> Tensor:
    """Return ``value`` as a detached, finite float64 tensor on its own device."""
    try:
        tensor = torch.as_tensor(value)
        if not hasattr(value, "dtype") and tensor.is_floating_point():
            # Python's numbers are float64; torch would take its default dtype.
            tensor = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{name} must be a tensor or convert to one, got {type(value).__name__}."
        raise InvalidArgumentError(msg) from error
    if tensor.is_complex():
        msg = f"{name} must be real, got {tensor.dtype}."
        raise InvalidArgumentError(msg)
    tensor = tensor.detach().to(torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        msg = f"{name} contains NaN or an infinity; every prediction from it would too."
        raise InvalidArgumentError(msg)
    return tensor


def square_matrix(value: Any, name: str, *, size: int | None = None) -> Tensor:
    """Return a ``(d, d)`` float64 matrix, with ``d = size`` where a size is given."""
    matrix = real_tensor(value, name)
    expected = "(d, d) with d >= 1" if size is None else f"({size}, {size})"
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] >= 1
    if not square or (size is not None and matrix.shape[0] != size):
        msg = f"{name} must have shape {expected}, got {tuple(matrix.shape)}."
        raise ShapeError(msg)
    return matrix


def symmetric_matrix(value: Any, name: str, *, size: int | None = None) -> Tensor:
    """Return a symmetric ``(d, d)`` float64 matrix, its rounding asymmetry averaged away."""
    matrix = square_matrix(value, name, size=size)
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > 1e-6 * float(matrix.abs().max()):
        msg = f"{name} must be symmetric, but it differs from its transpose by {asymmetry:.3g}."
        raise InvalidArgumentError(msg)
    return (matrix + matrix.T) / 2


def samples(inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of one shape ``(m, d)``, both with at least one sample."""
    rows = real_tensor(inputs, "inputs")
    wanted = real_tensor(targets, "targets")
    if rows.ndim != 2 or 0 in rows.shape or wanted.shape != rows.shape:
        msg = (
            "inputs and targets must both have shape (m, d), one sample per row, m >= 1, d >= 1; "
            f"got {tuple(rows.shape)} and {tuple(wanted.shape)}."
        )
        raise ShapeError(msg)
    return rows, wanted


def elementwise(activation: Callable[[Tensor], Tensor] | None, values: Tensor, name: str) -> Tensor:
    """Return ``activation(values)`` (``None`` is the identity) and check that it kept the shape."""
    if activation is None:
        return values
    if not callable(activation):
        msg = f"{name} must be None or an elementwise callable, got {type(activation).__name__}."
        raise InvalidArgumentError(msg)
    result = activation(values)
    if not isinstance(result, Tensor) or result.shape != values.shape:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        msg = f"{name} must act elementwise: shape {tuple(values.shape)} became {found}."
        raise ShapeError(msg)
    return result


def positive_int(value: int, name: str, *, at_least: int = 1) -> int:
    """Return ``value`` as an int that is ``at_least`` or more."""
    try:
        number = operator.index(value)
    except TypeError as error:
        msg = f"{name} must be an integer, got {type(value).__name__}."
        raise InvalidArgumentError(msg) from error
    if isinstance(value, bool) or number < at_least:
        msg = f"{name} must be an integer of at least {at_least}, got {value!r}."
        raise InvalidArgumentError(msg)
    return number


def finite_float(value: float, name: str) -> float:
    """Return ``value`` as a finite float."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        msg = f"{name} must be a real number, got {type(value).__name__}."
        raise InvalidArgumentError(msg) from error
    except OverflowError as error:
        msg = f"{name} must be finite, and it leaves the range of float64."
        raise InvalidArgumentError(msg) from error
    if not math.isfinite(number):
        msg = f"{name} must be finite, got {number}."
        raise InvalidArgumentError(msg)
    return number
