"""The collectives that measurements on several ranks need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from conditioning import errors
from conditioning.errors import InvalidArgumentError, RankMismatchError

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


class Group:
    """Some ranks that measure together, and the collectives that they need for it.

    Parameters
    ----------
    group : ProcessGroup

    Attributes
    ----------
    rank, size : int
        Of this process in the group, and how many there are.
    device : torch.device
        Where the group's collectives take small tensors from.

    Raises
    ------
    InvalidArgumentError
        If this process does not belong to the group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            msg = "This process is not a rank of the process_group: only its ranks may call."
            raise InvalidArgumentError(msg)
        self.device = _device(group)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Add up a few numbers over the ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, value: float) -> list[float]:
        """Give every rank the numbers of all."""
        return self.sums([value if rank == self.rank else 0.0 for rank in range(self.size)])

    def any(self, flag: bool) -> bool:
        """Whether a rank says so: what depends on memory or time is decided alike on all."""
        return self.sums([float(flag)])[0] > 0

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Add up a tensor in place over the ranks; what is returned waits for the sum."""
        home = tensor.to(self.device) if self.device.type == "cpu" else tensor
        work = dist.all_reduce(home, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor if home is tensor else tensor.copy_(home)

        return wait

    def start_comparison(self, what: int | Tensor) -> Callable[[], bool]:
        """Compare an integer over the ranks; waits, then says if all have the same."""
        mark = torch.as_tensor(what, dtype=torch.int64).to(self.device)
        ends = torch.stack([mark, ~mark])
        work = dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

        def wait() -> bool:
            work.wait()
            highest, lowest = ends.tolist()
            return bool(highest == ~lowest)

        return wait

    def all_gather(self, local: Tensor) -> Tensor:
        """Put flat tensors of one length behind each other."""
        local = local.contiguous()
        whole = local.new_empty(self.size * len(local))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, local, group=self.group)
        return whole

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """Add up flat tensors over the ranks, and keep this rank's part of equal parts."""
        local = whole.new_empty(len(whole) // self.size)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(local, whole.contiguous(), group=self.group)
        return local

    def compare(self, marks: Mapping[str, Any]) -> list[str]:
        """Names of what is not the same on all ranks."""
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, dict(marks), group=self.group)
        names = dict.fromkeys(name for one in told for name in one)
        return [name for name in names if any(one.get(name) != told[0].get(name) for one in told)]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank what one of them met, so that none waits for it.

        Raises
        ------
        Exception
            This rank's own; else one of the kind that another rank met, naming that rank.
        """
        if not self.any(error is not None):
            return
        told: list[Any] = [None] * self.size
        mine = None if error is None else (type(error).__name__, str(error))
        dist.all_gather_object(told, mine, group=self.group)
        if error is not None:
            raise error
        rank, (name, text) = next((r, one) for r, one in enumerate(told) if one is not None)
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, errors.ConditioningError):
            msg = f"On rank {rank}: {text}"
            raise kind(msg)
        msg = f"Rank {rank} failed ({name}: {text}); see its own traceback."
        raise RankMismatchError(msg)


def group_for(process_group: Any, models: Sequence[nn.Module]) -> Group | None:
    """The ranks that a choice of a process group stands for; ``None`` for this process alone.

    Parameters
    ----------
    process_group : "auto", ProcessGroup or None
        ``"auto"``: all ranks, where a model is wrapped in DDP or sharded.
    models : sequence of Module

    Raises
    ------
    InvalidArgumentError
        If it is something else, or nothing is initialised.
    """
    if process_group is LOCAL:
        return None
    if isinstance(process_group, str):
        if process_group != AUTO:
            msg = f"process_group is 'auto', a ProcessGroup or None, got {process_group!r}."
            raise InvalidArgumentError(msg)
        return Group(dist.group.WORLD) if any(map(is_parallel, models)) else None
    if not (dist.is_available() and dist.is_initialized()):
        msg = "process_group is given, but torch.distributed is not initialised."
        raise InvalidArgumentError(msg)
    return Group(process_group)


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers, on its device: one pass, nothing is read back.

    It tells tensors that are meant to be equal apart; it is no protection against intent.
    """
    flat = tensor.detach().reshape(-1).contiguous()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.view(kinds[flat.dtype.itemsize]).sum(dtype=torch.int64)


def digest(*things: Any) -> int:
    """A 62-bit number of what some things read as."""
    return int.from_bytes(hashlib.sha256(repr(things).encode()).digest()[:8], "big") >> 2
