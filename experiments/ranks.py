"""Several processes under ``torchrun``: one of them keeps the files, all of them train.

An experiment is started with ``torchrun --nproc-per-node N -m experiments NAME ...``. Every rank
runs the same program; only the first one reads and writes the store, checkpoints and results, and
tells the others. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from experiments.errors import ExperimentError

T = TypeVar("T")

# A rank may wait for as long as the first one measures alone. A rank that dies is noticed at once,
# because its connections close, so this bounds nothing but the waiting.
_PATIENCE = datetime.timedelta(days=30)
_alone: ContextVar[bool] = ContextVar("alone", default=False)
# The default group and the gloo group beside it: objects go over the network, not over the GPU.
_control: tuple[Any, Any] = (None, None)


class RankFailedError(ExperimentError, RuntimeError):
    """Another rank failed, so this one cannot go on; that one says why."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Parameters
    ----------
    rank : int
        From 0.
    size : int
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that keeps files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Give this rank's contiguous part of ``count`` samples; sizes differ by at most one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)


def launched() -> Ranks:
    """What the environment says: set by ``torchrun``, else one process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def current() -> Ranks:
    """Which rank of the process group this is; one of one without a group or in :func:`alone`."""
    # Where torch has not been imported, nobody has started a group.
    if _alone.get() or "torch.distributed" not in sys.modules:
        return Ranks()
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work as if there were no other rank: what is called inside must not wait for them."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextlib.contextmanager
def ranks(device: str = "cpu") -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, if it did and nobody has joined them yet.

    Parameters
    ----------
    device : str
        ``"cpu"``: the ranks talk over gloo. ``"cuda"``: over nccl, and each takes the GPU of its
        ``LOCAL_RANK`` as its current one.

    Yields
    ------
    Ranks
        Which one this is.

    Raises
    ------
    ExperimentError
        The device names one GPU for all ranks, there are fewer GPUs than ranks, or this torch
        has no ``torch.distributed``.

    Notes
    -----
    After an exception the group is left as it is: taking it down could wait for a rank that is
    still inside a collective operation. The end of the process closes its connections, and
    ``torchrun`` ends the other ranks.
    """
    if launched().size == 1 or current().size > 1:
        yield current()
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        msg = "this torch was built without torch.distributed: run without torchrun"
        raise ExperimentError(msg)
    if dist.is_initialized():
        yield current()
        return
    if device == "cpu":
        dist.init_process_group("gloo", timeout=_PATIENCE)
    else:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device != "cuda":
            msg = f"every rank needs a GPU of its own, not {device}: use --device cuda"
            raise ExperimentError(msg)
        if local >= count:
            msg = (
                f"{local + 1} ranks or more were started here and this machine has {count} GPUs: "
                "start one for each GPU, or use --device cpu"
            )
            raise ExperimentError(msg)
        torch.cuda.set_device(local)
        dist.init_process_group("nccl")
    yield current()
    # So that none is gone while another still needs it.
    # Wrappers of models hold the group: they go first.
    gc.collect()
    dist.barrier(group=_control_group())
    dist.destroy_process_group()


def _control_group() -> Any:
    """A gloo group of all ranks: the default one where it is, else one beside it."""
    global _control
    import torch.distributed as dist

    default = dist.group.WORLD
    if _control[0] is not default:
        beside = "gloo" not in str(dist.get_backend())
        made = dist.new_group(backend="gloo", timeout=_PATIENCE) if beside else default
        _control = (default, made)
    return _control[1]


def on_first(function: Callable[[], T]) -> T:
    """Call a function on the first rank, and give every rank what it returns.

    Every rank has to call this at the same place. With one process it is a plain call.

    Parameters
    ----------
    function : callable
        Its result must be something that can be pickled.

    Raises
    ------
    RankFailedError
        On the other ranks, when the function raised an exception on the first one, where that
        exception is raised.
    """
    here = current()
    if here.size == 1:
        return function()
    if here.first:
        try:
            value = function()
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # the others may be gone
                _broadcast((False, f"{type(error).__name__}: {error}"))
            raise
        _broadcast((True, value))
        return value
    try:
        done, told = _broadcast(None)
    except RuntimeError as error:
        msg = f"rank {here.rank} lost its connection to rank 0, whose own message says why"
        raise RankFailedError(msg) from error
    if not done:
        msg = f"rank 0 failed: {told}"
        raise RankFailedError(msg)
    answer: T = told
    return answer


def _broadcast(value: Any) -> Any:
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control_group())
    return box[0]


def gather(value: T) -> list[T]:
    """Give every rank the values of all ranks, in their order."""
    here = current()
    if here.size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * here.size
    dist.all_gather_object(found, value, group=_control_group())
    return found
