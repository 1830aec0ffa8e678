"""Products on several ranks over gloo are those of one process with all samples."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from rank_groups import failures_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conditioning import GaussNewtonOperator, HessianOperator, condition_number, spectral_density
from conditioning.errors import (
    BatchNormTrainingError,
    EmptyDataError,
    InvalidArgumentError,
    NonFiniteError,
    RandomForwardError,
    RankMismatchError,
    ShapeError,
    UnsupportedParameterError,
    UnusedParameterWarning,
)
from conditioning.operators import parallel, sharded
from conditioning.operators.guards import SavedBytes
from conditioning.spectrum import eigenvalues, index, trace

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
SIZE = 2
COUNT = 11  # samples in all: not divisible
LOSS = nn.functional.mse_loss


def _net(dtype=torch.float64, seed=0):
    """Uneven shards: five rows, one row, and a bias of one entry."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1)
    ).to(dtype)


def _data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), x.square().sum(1, keepdim=True).to(dtype)


def _batches(rank, size=SIZE):
    """Uneven over the ranks: the first has three batches, the last one has one."""
    x, y = _data()
    cuts = [7, 4] if size == 2 else [5, 3, 2, 1]
    mine = [part.split(cuts)[rank] for part in (x, y)]
    return list(zip(*(part.split(3 if rank == 0 else 20) for part in mine), strict=True))


def _own(rank):
    """This rank's samples as one batch."""
    return tuple(torch.cat(parts) for parts in zip(*_batches(rank), strict=True))


def _world():
    return dist.group.WORLD


def _truth(kind=HessianOperator, reduction="mean", net=None, loss=LOSS):
    """One process with all samples; several batches where the loss is a sum of means."""
    data = _data()
    if reduction == "sum":
        data = [batch for rank in range(SIZE) for batch in _batches(rank)]
    return kind(_net() if net is None else net, loss, data, reduction=reduction, process_group=None)


def _close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _same_on_all(tensor):
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, tensor)
    assert all(torch.equal(one, told[0]) for one in told)


def _block(n, k, seed=2):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- data-parallel --------------------------------------------------------------------------------


def products_are_those_of_all_samples(rank):
    for kind in (HessianOperator, GaussNewtonOperator):
        for reduction in ("mean", "sum"):
            truth = _truth(kind, reduction)
            dense = truth.dense()
            for data in (_batches(rank), _own(rank))[: 1 + (reduction == "mean")]:
                H = kind(_net(), LOSS, data, reduction=reduction, process_group=_world())
                for engine in ("loop", "batched"):
                    H.block_engine = engine
                    _close(H.dense(), dense)
                if kind is HessianOperator and reduction == "mean":
                    H.engine = "linearized"
                    _close(H @ dense[:, :1], dense @ dense[:, :1])
                    H.engine = "retained"
                vector = _block(len(dense), 1)[:, 0]
                _close(H @ vector, dense @ vector)
                _close(H.gradient(), truth.gradient())
                assert H.loss == pytest.approx(truth.loss, rel=1e-12)
                _same_on_all(H @ vector)
                assert (H.local_size, H.shape) == (len(dense), dense.shape)
                assert H.agree(rank == 1)
                assert not H.agree(False)


def buckets_overlap_and_change_nothing(rank):
    truth = _truth()
    n = truth.shape[0]
    order = []
    send = parallel.Reduction.send

    def noted(self, piece):
        order.append(len(piece))
        send(self, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "BUCKET_BYTES", 64)
        patch.setattr(parallel.Reduction, "send", noted)
        H = HessianOperator(_net(), LOSS, _batches(rank), process_group=_world())
        vector = _block(n, 1)[:, 0]
        _close(H @ vector, truth @ vector)
        handle = H._parameters[0].register_hook(lambda gradient: order.append("first layer"))
        order.clear()
        _close(H @ vector, truth @ vector)
        # The bucket of the later layers is under way before the backward pass is at the first;
        # where there are several batches, that is so in the last of them.
        assert order == ["first layer"] * (len(_batches(rank)) - 1) + [25, "first layer", 20]
        handle.remove()
        for engine in ("loop", "batched"):
            H.block_engine = engine
            order.clear()
            _close(H @ _block(n, 5), truth @ _block(n, 5))
            assert order == [25, 20] * 5


def graphs_that_are_not_kept_give_the_same(rank):
    truth = _truth()
    block = _block(truth.shape[0], 5)
    x, y = _own(rank)
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    H = HessianOperator(_net(), LOSS, data, process_group=_world(), memory_budget=0)
    _close(H @ block, truth @ block)
    _close(H @ block[:, 0], truth @ block[:, 0])
    S = HessianOperator(_fully_sharded(_net()), LOSS, data, memory_budget=0, check=False)
    _close(S.whole(S @ S.local_part(block)), truth @ block)
    assert not H._keep
    assert not S._keep


def graphs_in_segments_give_the_same(rank):
    H = HessianOperator(_net(), LOSS, _own(rank), process_group=_world(), memory_budget=0)
    assert H._checkpointed
    block = _block(H.shape[0], 2)
    _close(H @ block, _truth() @ block)
    _close(H @ block[:, 0], _truth() @ block[:, 0])  # goes off by parameter where it can


def one_rank_alone_may_ask_for_the_engine(rank):
    H = HessianOperator(_net(), LOSS, _own(rank), process_group=_world(), check=False)
    if rank == 0:
        assert H.engine.gradients > 0
    block = _block(H.shape[0], 1)
    _close(H @ block, _truth() @ block)


def a_model_in_ddp_is_taken_out_of_it(rank):
    truth = _truth()
    wrapped = DistributedDataParallel(_net())
    H = HessianOperator(wrapped, LOSS, _batches(rank))
    assert H.parameter_names == truth.parameter_names
    _close(H.dense(), truth.dense())
    x, y = _own(rank)
    bare = HessianOperator(
        lambda batch: LOSS(wrapped(batch[0]), batch[1]), None, (x, y), process_group=_world(),
        params=wrapped.module,
    )  # fmt: skip
    _close(bare.dense(), truth.dense())
    assert "forward" not in vars(wrapped)
    alone = HessianOperator(wrapped, LOSS, (x, y), process_group=None)
    _close(alone.dense(), HessianOperator(_net(), LOSS, (x, y)).dense())
    # DDP trains as before.
    LOSS(wrapped(x), y).backward()
    _same_on_all(torch.cat([p.grad.flatten() for p in wrapped.parameters()]))


def float32_and_bfloat16_are_summed_in_single_precision(rank):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        x, y = _own(rank)
        H = HessianOperator(
            _net(dtype), LOSS, (x.to(dtype), y.to(dtype)), process_group=_world(), check=False
        )
        truth = HessianOperator(
            _net(dtype).double(), LOSS, tuple(t.to(dtype).double() for t in _data())
        )
        dense = truth.dense()
        found = H.dense().double()
        assert H.dense().dtype == dtype
        assert float((found - dense).norm() / dense.norm()) < tolerance


def spectra_are_the_same_on_all_ranks(rank):
    truth = _truth()
    H = HessianOperator(_net(), LOSS, _batches(rank), process_group=_world())
    for function in (eigenvalues, condition_number):
        found = function(H, seed=0)
        assert repr(found) == repr(_told_by_first(found))
    top = eigenvalues(H, k=2, which="LA", seed=0)
    exact = torch.linalg.eigvalsh(truth.dense())
    assert top.values[0].value == pytest.approx(float(exact[-1]), rel=1e-6)


def _told_by_first(thing):
    told = [thing]
    dist.broadcast_object_list(told)
    return told[0]


def parameters_after_a_step_are_seen(rank):
    net = _net()
    H = HessianOperator(net, LOSS, _batches(rank), process_group=_world())
    H @ _block(H.shape[0], 1)[:, 0]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    _close(H.dense(), _truth(net=net).dense())


def a_nan_on_one_rank_is_an_error_on_all(rank):
    x, y = _own(rank)
    with pytest.raises(NonFiniteError, match="The loss is nan") as found:
        HessianOperator(
            _net(), LOSS, (x, y * (math.nan if rank == 1 else 1)), process_group=_world()
        )
    assert ("On rank 1" in str(found.value)) == (rank == 0)


def a_failure_on_one_rank_ends_all(rank):
    class Failing(nn.Linear):
        broken = False

        def forward(self, x):
            if self.broken:
                raise ZeroDivisionError("here")
            return super().forward(x)

    torch.manual_seed(0)
    net = Failing(3, 1).double()
    H = HessianOperator(net, LOSS, _own(rank), process_group=_world())
    vector = _block(4, 1)[:, 0]
    H.refresh()
    Failing.broken = rank == 1
    kind = ZeroDivisionError if rank == 1 else RankMismatchError
    with pytest.raises(kind, match="here" if rank else "Another rank failed"):
        H @ vector
    with pytest.raises(kind):
        H.loss  # noqa: B018
    with pytest.raises(kind):
        HessianOperator(net, LOSS, _own(rank), process_group=_world())
    Failing.broken = False
    _close(H @ vector, _truth(net=net) @ vector)  # and all go on together


def ranks_that_differ_are_told(rank):
    with pytest.raises(RankMismatchError, match=r"parameter 0\.weight, parameter 0\.bias"):
        HessianOperator(_net(seed=rank), LOSS, _own(rank), process_group=_world())
    with pytest.raises(RankMismatchError, match="parameter"):
        HessianOperator(
            _net(torch.float32 if rank else torch.float64), LOSS, _own(rank), process_group=_world()
        )
    with pytest.raises(RankMismatchError, match="choice of parameters"):
        HessianOperator(
            _net(), LOSS, _own(rank), params="0.*" if rank else None, process_group=_world()
        )
    reduction = "sum" if rank else "mean"
    with pytest.raises(RankMismatchError, match="reduction"):
        HessianOperator(_net(), LOSS, _own(rank), reduction=reduction, process_group=_world())
    net = nn.Sequential(_net(), nn.BatchNorm1d(1).double()).eval()
    net[1].running_mean.fill_(rank)
    with pytest.raises(RankMismatchError, match=r"buffer 1\.running_mean"):
        HessianOperator(net, LOSS, _own(rank), process_group=_world())
    H = HessianOperator(_net(), LOSS, _own(rank), process_group=_world())
    n = H.shape[0]
    for block in (_block(n, 1 + rank), _block(n, 1, seed=rank), _block(n, 8, seed=rank)):
        with pytest.raises(RankMismatchError, match="one seed for all ranks"):
            H.matmat(block)
    with pytest.raises(RankMismatchError, match="in one order"):
        H.gradient() if rank else H.matvec(_block(n, 1)[:, 0])
    _close(H.dense(), _truth().dense())


def what_a_group_is_is_checked(rank):
    with pytest.raises(InvalidArgumentError, match="'auto', a ProcessGroup or None"):
        HessianOperator(_net(), LOSS, _own(rank), process_group="all")
    first = dist.new_group([0])
    if rank == 1:
        with pytest.raises(InvalidArgumentError, match="not a rank"):
            HessianOperator(_net(), LOSS, _own(rank), process_group=first)
    else:
        H = HessianOperator(_net(), LOSS, _own(0), process_group=first)
        _close(H.dense(), HessianOperator(_net(), LOSS, _own(0)).dense())


# -- sharded --------------------------------------------------------------------------------------


def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def _fully_sharded(net, *parts, **options):
    from torch.distributed.fsdp import fully_shard

    for part in (*parts, net):
        fully_shard(part, mesh=_mesh(), **options)
    return net


def _distributed(net):
    from torch.distributed.tensor import Shard, distribute_tensor

    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                whole = distribute_tensor(p.detach(), _mesh(), [Shard(0)])
                module._parameters[name] = nn.Parameter(whole, requires_grad=p.requires_grad)
    return net


def sharded_products_are_those_of_all_samples(rank):
    cases = [
        (HessianOperator, "mean", lambda net: _fully_sharded(net, net[0], net[2])),
        (HessianOperator, "sum", _distributed),
        (GaussNewtonOperator, "mean", _distributed),
    ]
    for kind, reduction, shard in cases:
        truth = _truth(kind, reduction)
        dense = truth.dense()
        H = kind(shard(_net()), LOSS, _batches(rank), reduction=reduction)
        assert H.shape == dense.shape
        assert H.parameter_names == truth.parameter_names
        total = H.sum_over_shards(torch.tensor(H.local_size))
        assert 0 < H.local_size < len(dense) == int(total)
        vectors = _block(len(dense), 6)
        part = H.local_part(vectors)
        _close(H.whole(part), vectors)
        assert H.block_engine == "batched"
        _close(H.dense(), dense)
        assert H.block_engine == "batched"  # no operation made it a loop
        H.block_engine = "loop"
        _close(H.whole(H @ part), dense @ vectors)
        _close(H.whole(H @ part[:, 0]), dense @ vectors[:, 0])
        _close(H.whole(H.gradient()), truth.gradient())
        assert H.loss == pytest.approx(truth.loss, rel=1e-12)
        _close(H.flatten(H.unflatten(part[:, 0])), part[:, 0])


def nothing_is_left_in_a_sharded_model(rank):
    net = _fully_sharded(_net(), *[])
    state = {n: p for n, p in net.named_parameters()}
    hooks = [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in net.modules()]
    H = HessianOperator(net, LOSS, _batches(rank))
    H.dense()
    assert all(state[n] is p for n, p in net.named_parameters())
    assert all(type(m._parameters) is dict for m in net.modules())
    assert hooks == [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in net.modules()]
    assert all(p.grad is None for p in net.parameters())
    # It trains, and what it has learned is seen.
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    reference = _net()
    its = torch.optim.Adam(reference.parameters(), lr=0.01)
    for _ in range(2):
        x, y = _data()
        LOSS(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        LOSS(reference(x), y).backward()
        its.step()
        its.zero_grad()
        _close(H.dense(), _truth(net=reference).dense(), 1e-9)
    net.eval()
    net(_data()[0])  # leaves the root gathered
    H.refresh()
    _close(H.dense(), _truth(net=reference).dense(), 1e-9)
    _close(HessianOperator(net, LOSS, _batches(rank)).dense(), _truth(net=reference).dense(), 1e-9)


def each_parameter_may_be_gathered_alone(rank):
    """As large ones are: here those that are small as well."""
    room, sharded._TOGETHER = sharded._TOGETHER, 0
    try:
        sharded_products_are_those_of_all_samples(rank)
        unusual_models_are_sharded_as_well(rank)
        unused_parameters_are_told_when_sharded(rank)
        no_gathered_weight_is_kept_unless_small(rank)
    finally:
        sharded._TOGETHER = room


def no_gathered_weight_is_kept_unless_small(rank):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )
    batch = (torch.randn(4, 64), torch.randn(4, 2))
    # The first weight is not read by a backward pass, as the input needs no gradient.
    read = sum(net[i].weight.numel() * 4 for i in (2, 4))

    def held(operator):
        counter = SavedBytes(batch)  # weights count
        next(iter(operator._batches))
        with counter:
            operator._build(batch)
        return counter.total

    whole = held(HessianOperator(net, LOSS, batch, process_group=None))
    alone = held(HessianOperator(_fully_sharded(net), LOSS, batch))
    assert whole > read
    # Small ones may be, as far as they have room together.
    assert alone == (whole - read if sharded._TOGETHER == 0 else whole)


class _Unusual(nn.Module):
    """Tied and frozen weights, attention, a recurrent layer, a loss with all parameters."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.full((3,), 0.5))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.frozen(self.lstm(x)[0])
        return (x @ self.embedding.weight.T) * self.scale.mean()


def _decayed(net):
    def loss(outputs, targets):
        decay = sum(p.square().square().sum() for p in net.parameters() if p.requires_grad)
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten()) + 0.01 * decay

    return loss


def unusual_models_are_sharded_as_well(rank):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(7, (4, 5), generator=generator)
    mine = tokens[2 * rank : 2 * rank + 2]
    torch.manual_seed(0)
    net = _Unusual().double()
    truth = HessianOperator(net, _decayed(net), (tokens, tokens), process_group=None)
    dense = truth.dense()
    _fully_sharded(net, net.attention, net.lstm)
    H = HessianOperator(net, _decayed(net), (mine, mine))
    assert H.parameter_names == truth.parameter_names
    flat = net.lstm._flat_weights
    _close(H.dense(), dense, 1e-11)
    assert all(a is b for a, b in zip(net.lstm._flat_weights, flat, strict=True))
    part = HessianOperator(net, _decayed(net), (mine, mine), params=net.attention)
    torch.manual_seed(0)
    net = _Unusual().double()
    truth = HessianOperator(
        net, _decayed(net), (tokens, tokens), params=net.attention, process_group=None
    )
    _close(part.dense(), truth.dense(), 1e-11)


def parameters_that_are_not_sharded_are_shared_out(rank):
    net = _net()
    _fully_sharded(net, ignored_params={net[0].weight, net[4].bias})
    assert not hasattr(net[0].weight, "placements")
    H = HessianOperator(net, LOSS, _batches(rank))
    _close(H.dense(), _truth().dense())
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    halved = _net()
    with torch.no_grad():
        halved[0].weight.mul_(0.5)
    _close(H.dense(), _truth(net=halved).dense())
    net[0].weight.data.add_(rank)
    with pytest.raises(RankMismatchError, match=r"0\.weight"):
        HessianOperator(net, LOSS, _batches(rank))


def sharded_spectra_are_those_of_one_process(rank):
    H = HessianOperator(_fully_sharded(_net()), LOSS, _batches(rank))
    truth = _truth()
    exact = torch.linalg.eigvalsh(truth.dense())
    top = eigenvalues(H, k=3, which="LA", seed=0)
    assert [v.value for v in top.values] == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-6)
    assert repr(top) == repr(_told_by_first(top))
    found, expected = condition_number(H, seed=0), condition_number(truth, seed=0)
    assert repr(found) == repr(_told_by_first(found))
    assert found.status == expected.status
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    few = {"num_probes": 3, "seed": 0}
    assert trace(H, **few).value == pytest.approx(trace(truth, **few).value, rel=1e-9)
    few["num_steps"] = 12
    assert index(H, **few).value == pytest.approx(index(truth, **few).value, rel=1e-6)
    found, expected = spectral_density(H, **few), spectral_density(truth, **few)
    assert found.quantile(0.5).value == pytest.approx(expected.quantile(0.5).value, rel=1e-6)
    assert repr(found) == repr(_told_by_first(found))
    assert H.least(10 + rank) == 10


def sharded_errors_are_raised_on_all_ranks(rank):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, y = _own(rank)
    net = _fully_sharded(_net())
    with pytest.raises(NonFiniteError, match="this or another rank"):
        HessianOperator(net, LOSS, (x, y * (math.nan if rank == 1 else 1)))
    with pytest.raises(UnsupportedParameterError, match="sharded over devices"):
        HessianOperator(net, LOSS, (x, y), process_group=None)
    H = HessianOperator(net, LOSS, (x, y))
    with pytest.raises(ShapeError, match=f"\\({H.local_size},\\)"):
        H @ torch.zeros(H.shape[0], dtype=torch.float64)
    with pytest.raises(RankMismatchError, match="in one order"):
        H.gradient() if rank else H.matvec(torch.zeros(H.local_size))
    with pytest.raises(InvalidArgumentError, match="set 'loop' or 'batched'"):
        H.block_engine = "undecided"
    assert H.engine.name == "retained"
    with pytest.raises(InvalidArgumentError, match="retained graph only"):
        H.engine = "compiled"
    with pytest.raises(InvalidArgumentError, match="retained graph only"):
        HessianOperator(net, LOSS, (x, y), engine="linearized")
    with pytest.raises(ShapeError, match="sharded"):
        H.to_scipy()
    for options, text in (
        ({"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}, "mixed precision"),
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, "offloading"),
    ):
        with pytest.raises(UnsupportedParameterError, match=text):
            HessianOperator(_fully_sharded(_net(), **options), LOSS, (x, y))
    from torch.distributed.device_mesh import init_device_mesh

    for mesh, placements in (
        (_mesh(), [Shard(1)]),
        (init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)]),
    ):
        net = _net()
        whole = distribute_tensor(net[0].weight.detach(), mesh, placements)
        net[0].weight = nn.Parameter(whole)
        with pytest.raises(UnsupportedParameterError, match=r"weight .*Shard\(0\) and Replicate"):
            HessianOperator(net, LOSS, (x, y))
    first = dist.new_group([0])
    if rank == 0:
        with pytest.raises(InvalidArgumentError, match="other ranks than the mesh"):
            HessianOperator(_fully_sharded_alone(), LOSS, (x, y), process_group=first)
    dist.barrier()
    noisy = nn.Sequential(_net(), nn.Dropout(0.5))
    with pytest.raises(RandomForwardError, match="Dropout"):
        HessianOperator(_fully_sharded(noisy), LOSS, (x, y))
    normed = nn.Sequential(_net(), nn.BatchNorm1d(1).double())
    with pytest.raises(BatchNormTrainingError, match="BatchNorm"):
        HessianOperator(_fully_sharded(normed), LOSS, (x, y))
    drawing = _fully_sharded(_Drawing().double())
    with pytest.raises(RandomForwardError, match="Two evaluations"):
        HessianOperator(drawing, LOSS, (x, y))
    with pytest.raises(EmptyDataError, match="holds no batch"):
        HessianOperator(_fully_sharded(_net()), LOSS, [] if rank else [(x, y)])


def _fully_sharded_alone():
    from torch.distributed.tensor import DTensor, Shard

    net = _net()
    weight = DTensor.from_local(
        net[0].weight.detach(), _mesh_without_checks(), [Shard(0)], run_check=False
    )
    net[0].weight = nn.Parameter(weight)
    return net


def _mesh_without_checks():
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(_world(), "cpu")


class _Drawing(nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class _Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = _net(), nn.Linear(2, 2).double()

    def forward(self, x):
        return self.used(x)


def unused_parameters_are_told_when_sharded(rank):
    with pytest.warns(UnusedParameterWarning, match="idle.weight, idle.bias"):
        H = HessianOperator(_fully_sharded(_Idle()), LOSS, _own(rank))
    n = _truth().shape[0]
    dense = H.dense()
    _close(dense[:n, :n], _truth().dense())
    assert not dense[n:].any()


CHECKS = [
    products_are_those_of_all_samples,
    buckets_overlap_and_change_nothing,
    graphs_that_are_not_kept_give_the_same,
    graphs_in_segments_give_the_same,
    one_rank_alone_may_ask_for_the_engine,
    a_model_in_ddp_is_taken_out_of_it,
    float32_and_bfloat16_are_summed_in_single_precision,
    spectra_are_the_same_on_all_ranks,
    parameters_after_a_step_are_seen,
    a_nan_on_one_rank_is_an_error_on_all,
    a_failure_on_one_rank_ends_all,
    ranks_that_differ_are_told,
    what_a_group_is_is_checked,
    sharded_products_are_those_of_all_samples,
    nothing_is_left_in_a_sharded_model,
    no_gathered_weight_is_kept_unless_small,
    each_parameter_may_be_gathered_alone,
    unusual_models_are_sharded_as_well,
    parameters_that_are_not_sharded_are_shared_out,
    sharded_spectra_are_those_of_one_process,
    sharded_errors_are_raised_on_all_ranks,
    unused_parameters_are_told_when_sharded,
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return failures_of(tmp_path_factory.mktemp("ranks"), SIZE, CHECKS)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_on_two_ranks(name, failures):
    assert name not in failures, failures[name]


def four_ranks_give_the_same(rank):
    truth = _truth()
    block = _block(truth.shape[0], 5)
    data = _batches(rank, 4)
    _close(HessianOperator(_net(), LOSS, data, process_group=_world()) @ block, truth @ block)
    # The layer of one row is on one rank, and three have nothing of it.
    H = HessianOperator(_fully_sharded(_net()), LOSS, data, check=False)
    _close(H.whole(H @ H.local_part(block)), truth @ block)


def test_on_four_ranks(tmp_path):
    assert failures_of(tmp_path, 4, [four_ranks_give_the_same]) == {}


def test_a_group_needs_ranks():
    with pytest.raises(InvalidArgumentError, match="not initialised"):
        HessianOperator(_net(), LOSS, _data(), process_group=object())
