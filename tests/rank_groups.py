"""Checks in groups of processes over gloo; starting them is slow, so one group runs them all."""

from __future__ import annotations

import datetime
import gc
import os
import sys
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _in_group(rank, path, size, checks):
    """Run every check on this rank, and leave word of those that failed."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=1),
    )  # fmt: skip
    for check in checks:
        try:
            check(rank)
        except Exception:
            (path / f"{check.__name__}.{rank}").write_text(traceback.format_exc())
        dist.barrier()
    gc.collect()
    dist.destroy_process_group()
    # Taking a process down that still has some of gloo's threads was seen to abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def failures_of(path, size, checks):
    """Text of what went wrong, by the name of the check; of the lowest rank that failed in it."""
    mp.spawn(_in_group, (path, size, checks), nprocs=size)
    files = sorted(path.glob("*.[0-9]"), reverse=True)
    return {file.stem: f"On rank {file.suffix[1:]}:\n{file.read_text()}" for file in files}
