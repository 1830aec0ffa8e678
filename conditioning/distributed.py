"""The collectives that measurements on several ranks need."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


def inside_ddp() -> bool:
    """Whether this is called inside the forward pass of a ``DistributedDataParallel``."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.nn.parallel import DistributedDataParallel

    active = getattr(DistributedDataParallel, "_get_active_ddp_module", None)
    return active is not None and active() is not None


def group_size(group: Any) -> int:
    """The number of ranks of a group."""
    return dist.get_world_size(group)


def _device(group: Any) -> torch.device:
    nccl = "nccl" in str(dist.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def sum_over_ranks(
    values: NDArray[np.float64], group: Any, layout: Sequence[Any] = ()
) -> NDArray[np.float64]:
    """Add up a vector over the ranks of a group; every rank gets the sum.

    Parameters
    ----------
    values : ndarray
    group : ProcessGroup
    layout : sequence, optional
        What the entries mean; it has to be the same on all ranks.

    Raises
    ------
    RankMismatchError
        If the ranks hold vectors of different length or layout. Raised on every rank, so that
        none waits.
    """
    device = _device(group)
    text = repr((len(values), *layout)).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    ends = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    if int(ends[0]) != -int(ends[1]):
        msg = (
            "The ranks did not record the same calls of the same blocks in this step: each must "
            "run the same blocks equally often, and sample the same steps. Give process_group=None "
            "to measure each rank on its own."
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
