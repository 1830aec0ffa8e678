"""The collectives that measurements on several ranks need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from conditioning.errors import RankMismatchError

# What a caller may say instead of a group: find out, or keep each rank to itself.
AUTO, LOCAL = "auto", None


def is_parallel(model: nn.Module) -> bool:
    """Whether the model's data is split over ranks: wrapped in DDP, or fully sharded."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.nn.parallel import DistributedDataParallel

    return any(isinstance(m, DistributedDataParallel) for m in model.modules()) or any(
        hasattr(p, "full_tensor") for p in model.parameters()
    )


def group_size(group: Any) -> int:
    """The number of ranks of a group."""
    return dist.get_world_size(group)


def _device(group: Any) -> torch.device:
    nccl = "nccl" in str(dist.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def sum_over_ranks(values: NDArray[np.float64], group: Any) -> NDArray[np.float64]:
    """Add up a vector over the ranks of a group; every rank gets the sum.

    Raises
    ------
    RankMismatchError
        If the ranks hold vectors of different length. Raised on every rank, so that none waits.
    """
    device = _device(group)
    sizes = torch.tensor([len(values), -len(values)], device=device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = int(sizes[0]), -int(sizes[1])
    if largest != smallest:
        msg = (
            f"The ranks recorded different numbers of readings ({smallest} ... {largest}): they "
            f"must run the same blocks equally often in a step, and sample the same steps. Give "
            f"process_group=None to measure each rank on its own."
        )
        raise RankMismatchError(msg)
    total = torch.from_numpy(values.copy()).to(device)
    dist.all_reduce(total, group=group)
    return total.cpu().numpy()


def gather_arrays(values: NDArray[np.float64], group: Any) -> list[NDArray[np.float64]]:
    """Give every rank the arrays of all ranks; they may differ in length."""
    gathered: list[Any] = [None] * group_size(group)
    dist.all_gather_object(gathered, values, group=group)
    return gathered
