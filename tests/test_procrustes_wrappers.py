"""Projections after steps through wrappers of optimizers and models, and on several ranks."""

from __future__ import annotations

import copy
import datetime
import functools
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from projected import Net, batch, is_flat, loss_of, sgd, train, values_of
from torch import nn

from conditioning.procrustes import Procrustes
from tests.frameworks import Problem, fresh_accelerator, lightning_options, quiet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def net():
    return Net()


# ----------------------------------------------------------------------------- wrappers


class LikeAccelerate(torch.optim.Optimizer):
    """An optimizer around one, as accelerate has it: it does not run its own constructor."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=None):
        self.optimizer.zero_grad()


class LikeLightning:
    """An object around an optimizer, as Lightning has it: it has its methods and no base."""

    def __init__(self, optimizer) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        self._optimizer.step(closure)

    def zero_grad(self):
        self._optimizer.zero_grad()


@pytest.mark.parametrize(
    "wrap",
    [
        LikeAccelerate,
        LikeLightning,
        lambda optimizer: LikeAccelerate(LikeAccelerate(optimizer)),
        lambda optimizer: LikeLightning(LikeAccelerate(optimizer)),
    ],
    ids=["accelerate", "Lightning", "twice", "both"],
)
def test_wrappers_of_optimizers_are_looked_through(net, wrap):
    optimizer = wrap(sgd(net))
    procrustes = Procrustes(net.down).attach(optimizer)
    train(net, optimizer, 2)
    assert procrustes.num_projections == 2
    assert is_flat(net.down)


@quiet["dynamo"]
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(net, precision):
    with fresh_accelerator() as make:
        accelerator = make(mixed_precision=precision)
        model, optimizer = accelerator.prepare(net, sgd(net))
        procrustes = Procrustes(net.down).attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, torch.float32))
            optimizer.step()
        assert procrustes.num_projections == 2
        assert is_flat(net.down)


@quiet["lightning"]
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    problem, seen = Problem(), []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem.net

        def configure_optimizers(self):
            return sgd(self)

        def on_train_start(self):
            seen.append(Procrustes("net.stem", model=self).attach(self.optimizers()))

        def training_step(self, batch, _index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    lightning.Trainer(**lightning_options(tmp_path)).fit(Module(), problem.loader(3))
    assert seen[0].num_projections == 3
    assert values_of(problem.net.stem) == pytest.approx(1.0, rel=1e-5)


@quiet["dynamo"]
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_with_the_projected_weights(net, backend):
    torch._dynamo.reset()
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, backend=backend)
    for model, layer in ((compiled, net.down), (plain, plain.down)):
        optimizer = sgd(model)
        Procrustes(layer).attach(optimizer)
        train(model, optimizer, 3)
    assert is_flat(net.down)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# Of the compiler's own making.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@quiet["dynamo"]
def test_a_compiled_step_stops_for_the_projection(net):
    torch._dynamo.reset()
    optimizer = sgd(net)
    procrustes = Procrustes(["down", "mix"], model=net).attach(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net).backward()
        step()
    assert procrustes.num_projections == 3
    assert is_flat(net.down)


# ------------------------------------------------------------------------- two ranks

RANKS = 2


def _in_group(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(minutes=3),
    )  # fmt: skip
    try:
        for name, check in RANK_CHECKS.items():
            try:
                check(rank)
            except (Exception, pytest.fail.Exception):
                (path / f"{name}.{rank}").write_text(traceback.format_exc())
            dist.barrier()
    finally:
        dist.destroy_process_group()


def _ddp(rank, wrapped):
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net = Net()
    model = DistributedDataParallel(net)
    torch.manual_seed(rank)  # as data loaders and augmentation have it
    optimizer = sgd(model, momentum=0.9)
    layers = ["module.stem", "down", "mix"] if wrapped else ["stem", "down", "mix"]
    procrustes = Procrustes(layers, model=model if wrapped else net)
    procrustes.attach(optimizer, probability=0.5)
    projected = []
    for step in range(8):
        optimizer.zero_grad()
        images, labels = batch(seed=10 * step + rank)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        projected.append(procrustes.num_projections)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    both = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)
    counts = [None] * RANKS
    dist.all_gather_object(counts, projected)
    assert counts[0] == counts[1]
    assert 0 < projected[-1] < 8


def _sharded(_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from conditioning.errors import UnsupportedParameterError

    net = Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (RANKS,)))
    with pytest.raises(UnsupportedParameterError, match=r"'down' is a DTensor.*fully_shard"):
        Procrustes("down", model=net)


def _flat(_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    from conditioning.errors import UnsupportedParameterError

    for use_orig_params in (True, False):
        net = FullyShardedDataParallel(
            Net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        kinds = (UnsupportedParameterError, TypeError)
        with pytest.raises(kinds, match="FSDP|one flat parameter"):
            Procrustes("*.down", model=net)


RANK_CHECKS = {
    "ddp": functools.partial(_ddp, wrapped=True),
    "inside_ddp": functools.partial(_ddp, wrapped=False),
    "fully_sharded": _sharded,
    "flat_parameters": _flat,
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong on two ranks: starting processes is slow, so they run all checks."""
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_in_group, (path,), nprocs=RANKS)
    return {file.stem: file.read_text() for file in path.glob("*.[01]")}


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
@pytest.mark.parametrize("name", RANK_CHECKS)
def test_on_two_ranks(name, failures):
    assert name not in failures, failures[name]
