"""What is kept of a tensor: a few numbers that stay on its device until somebody asks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, UnsupportedParameterError

# Squares of float32 numbers below this underflow: a norm near it is summed again in float64.
_SMALLEST_SAFE = 1e-16
_LARGEST_SAFE = 1e18


@dataclass(frozen=True)
class Wanted:
    """What is to be kept of each tensor.

    Parameters
    ----------
    samples : bool
        Also the norm of each sample.
    batch_dim : int
        The axis of the samples.
    shares : bool
        Also how many entries are zero, and how many are not finite.
    """

    samples: bool = False
    batch_dim: int = 0
    shares: bool = False


@dataclass(slots=True)
class Reading:
    """Numbers that describe one tensor, as 0-d tensors on its device."""

    norm: Tensor
    numel: int
    zeros: Tensor | None = None
    nonfinite: Tensor | None = None
    samples: Tensor | None = None


@dataclass(slots=True)
class Port:
    """One tensor at the border of a block in one forward pass.

    A tensor that leaves one block and enters the next is one port, read once.
    """

    activation: Reading | None = None
    hooked: bool = False
    #: Blocks that returned it.
    left: set[int] = field(default_factory=set)
    #: One for each backward pass that came through, by the number of the pass.
    gradients: dict[tuple[int, int], Reading] = field(default_factory=dict)


def is_real_tensor(thing: Any) -> bool:
    """Whether it is a tensor that may carry a gradient."""
    return isinstance(thing, Tensor) and (thing.dtype.is_floating_point or thing.dtype.is_complex)


def _accumulated_in(dtype: torch.dtype, *, wide: bool) -> torch.dtype:
    return torch.float64 if wide or dtype == torch.float64 else torch.float32


def read(tensor: Tensor, wanted: Wanted, *, wide: bool = False) -> Reading:
    """Describe a tensor without waiting for its device.

    Parameters
    ----------
    tensor : Tensor
    wanted : Wanted
    wide : bool
        Sum squares in float64 whatever the dtype. On the CPU, where looking at a number costs
        nothing, this is decided from the norm itself.

    Raises
    ------
    UnsupportedParameterError
        If the tensor is sharded (a DTensor), or a nested tensor that cannot be read.
    InvalidArgumentError
        If samples are wanted of a tensor without the axis of the samples.
    """
    if hasattr(tensor, "full_tensor"):
        msg = (
            "The border of a block is a DTensor: norms of activations that are sharded by tensor "
            "parallelism are not supported. Track blocks whose inputs and outputs are ordinary "
            "tensors (the outputs of fully sharded modules are)."
        )
        raise UnsupportedParameterError(msg)
    data = tensor.detach()
    if data.is_nested:
        if data.layout == torch.strided:
            msg = (
                "The border of a block is a nested tensor with strided layout, whose entries "
                "cannot be read together. Use layout=torch.jagged, or track other blocks."
            )
            raise UnsupportedParameterError(msg)
        if wanted.samples:
            msg = "Norms of samples are not available for nested tensors: use statistic='batch'."
            raise UnsupportedParameterError(msg)
        data = data.values()
    if data.layout != torch.strided:
        data = data.to_dense()
    if data.dtype.is_complex:
        data = torch.view_as_real(data)
    reading = _norms(data, wanted, wide=wide)
    if not wide and data.device.type == "cpu" and unsafe(float(reading.norm), data.numel()):
        reading = _norms(data, wanted, wide=True)
    if wanted.shares:
        reading.zeros = (data == 0).sum()
        reading.nonfinite = (~torch.isfinite(data)).sum()
    return reading


def unsafe(norm: float, numel: int) -> bool:
    """Whether squares may have left the range of float32 in a norm."""
    return not _SMALLEST_SAFE * math.sqrt(max(numel, 1)) < norm < _LARGEST_SAFE


def _norms(data: Tensor, wanted: Wanted, *, wide: bool) -> Reading:
    dtype = _accumulated_in(data.dtype, wide=wide)
    if not wanted.samples:
        return Reading(torch.linalg.vector_norm(data, dtype=dtype), data.numel())
    if not -data.ndim <= wanted.batch_dim < data.ndim:
        msg = (
            f"A tensor of shape {tuple(data.shape)} at the border of a block has no axis "
            f"{wanted.batch_dim}: set batch_dim to the axis of the samples, or use "
            f"statistic='batch'."
        )
        raise InvalidArgumentError(msg)
    rows = data.movedim(wanted.batch_dim, 0).flatten(1) if data.ndim > 1 else data[:, None]
    samples = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return Reading(torch.linalg.vector_norm(samples), data.numel(), samples=samples)
