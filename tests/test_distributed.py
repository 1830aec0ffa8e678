"""Two ranks over gloo have the norms of the whole batch, the same on both."""

from __future__ import annotations

import datetime
import functools
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_norms_settings import Residual
from torch import nn

from conditioning import GradientNorms
from conditioning.distributed import gather_arrays, is_parallel, sum_over_ranks
from conditioning.errors import RankMismatchError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
RANKS = 2


def _in_group(rank, path):
    """Run every check on this rank, and leave word of those that failed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(minutes=3),
    )  # fmt: skip
    try:
        for name, check in CHECKS.items():
            try:
                check(rank)
            except Exception:
                (path / f"{name}.{rank}").write_text(traceback.format_exc())
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong on two ranks: starting processes is slow, so they run all checks."""
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_in_group, (path,), nprocs=RANKS)
    return {file.stem: file.read_text() for file in path.glob("*.[01]")}


def _batches():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()


def _model():
    torch.manual_seed(0)
    return Residual().double()


def _whole(**options):
    """The norms of one process with all samples."""
    model = _model()
    with GradientNorms(model, "blocks.*", process_group=None, **options) as norms:
        model(_batches()).square().mean().backward()
        norms.step()
    return norms


def _compare(norms, whole):
    one, two = norms.to_frame(), whole.to_frame()
    keys = ["block", "quantity"]
    one, two = (f.set_index(keys).sort_index() for f in (one, two))
    assert one.index.tolist() == two.index.tolist()
    np.testing.assert_allclose(one.value, two.value, rtol=1e-12)


def _ddp(rank, statistic):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model())
    assert is_parallel(model)
    options = {"statistic": statistic, "shares": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientNorms(model, "blocks.*", **options) as norms:
        model(_batches().chunk(RANKS)[rank]).square().mean().backward()
        optimizer.step()
    _compare(norms, _whole(**options))


def _fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = _model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientNorms(model, "blocks.*") as norms:
        for _ in range(2):
            model(_batches().chunk(RANKS)[rank]).square().mean().backward()
            optimizer.step()
    assert norms.num_steps == 2
    _compare_first(norms)


def _compare_first(norms):
    frame = norms.to_frame()
    whole = _whole().to_frame()
    for step in (0, 1):
        found = frame[frame.step == step].set_index(["block", "quantity"]).sort_index().value
        truth = whole.set_index(["block", "quantity"]).sort_index().value
        np.testing.assert_allclose(found, truth, rtol=1e-12)


def _local(rank):
    from torch.nn.parallel import DistributedDataParallel

    shard = _batches().chunk(RANKS)[rank]
    model = DistributedDataParallel(_model())
    with GradientNorms(model, "blocks.*", process_group=None) as norms:
        model(shard).square().mean().backward()
        norms.step()
    alone = _model()
    with GradientNorms(alone, "blocks.*") as expected:  # nothing is wrapped: its own norms
        alone(shard).square().mean().backward()
        expected.step()
    _compare(norms, expected)


def _mismatch(rank):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model())
    shard = _batches().chunk(RANKS)[rank]
    norms = GradientNorms(model, "blocks.*").attach()
    for _ in range(rank + 1):
        model.module(shard).square().mean().backward()
    with pytest.raises(RankMismatchError, match="process_group=None"):
        norms.step()
    norms.detach()


class _Dropping(Residual):
    """Leaves out one block, a different one on each rank."""

    def forward(self, x):
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = x if index == 1 + dist.get_rank() else block(x)
        return x


def _routes(rank):
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = DistributedDataParallel(_Dropping().double(), find_unused_parameters=True)
    norms = GradientNorms(model, "blocks.*").attach()
    model(_batches().chunk(RANKS)[rank]).square().mean().backward()
    with pytest.raises(RankMismatchError, match="same blocks"):
        norms.step()
    norms.detach()


def _inner_module(rank):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model())
    with GradientNorms(model.module, "blocks.*") as norms:
        model(_batches().chunk(RANKS)[rank]).square().mean().backward()
        norms.step()
    _compare(norms, _whole())


def _sums(rank):
    values = np.arange(3.0) + rank
    np.testing.assert_array_equal(sum_over_ranks(values, None), 2 * np.arange(3.0) + 1)
    np.testing.assert_array_equal(values, np.arange(3.0) + rank)
    parts = gather_arrays(np.arange(rank + 1.0), None)
    assert [len(part) for part in parts] == [1, 2]


def _ranks_are_alive(rank):
    assert dist.get_rank() == rank


CHECKS = {
    "ddp": functools.partial(_ddp, statistic="batch"),
    "ddp_samples": functools.partial(_ddp, statistic="sample"),
    "fully_sharded": _fsdp,
    "each_rank_alone": _local,
    "ranks_that_differ_are_told": _mismatch,
    "ranks_that_take_other_routes_are_told": _routes,
    "the_module_inside_ddp": _inner_module,
    "sums_and_gathers": _sums,
    "nothing_hangs_afterwards": _ranks_are_alive,
}


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name, failures):
    assert name not in failures, failures[name]


def test_a_single_process_is_not_parallel():
    assert not is_parallel(nn.Linear(2, 2))
