"""Sizes of numbers near the ends of what floating point holds, where squares leave it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The reciprocal of a power of two this far out is a normal number, too.
_FARTHEST = {torch.float64: 1000, torch.float32: 120}
# Within this many powers of two of 1, squares and sums of squares are safe in float32.
_SAFE = 40


def power_of_two(tensor: Tensor) -> float:
    """A power of two near the largest entry, to divide by without rounding; 1 for zeros."""
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    farthest = _FARTHEST.get(tensor.dtype, 120)
    return 2.0 ** min(max(math.frexp(largest)[1] - 1, -farthest), farthest)


def scale_of(tensor: Tensor) -> float:
    """``power_of_two``, but 1 wherever squares are safe as they are."""
    found = power_of_two(tensor)
    return found if abs(math.log2(found)) > _SAFE else 1.0


def norm_of(tensor: Tensor) -> float:
    """The Frobenius norm, of entries whose squares may be too large or too small."""
    unit = power_of_two(tensor)
    return unit * float(torch.linalg.vector_norm(tensor.detach() / unit))
