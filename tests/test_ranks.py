"""Two ranks over gloo train as one process does, and the first of them keeps the files."""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import itertools
import math
import os
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from conditioning import GradientNorms
from experiments.augment import pad_and_crop
from experiments.errors import ExperimentError, StoreError
from experiments.models import ResidualMLP
from experiments.ranks import (
    RankFailedError,
    Ranks,
    alone,
    current,
    gather,
    launched,
    on_first,
    ranks,
)  # fmt: skip
from experiments.registry import Options
from experiments.store import CellsInMemory, CellStore
from experiments.sweep import run_cells
from experiments.training import Recipe, Trainer, TrainingError

SIZE = 2
RECIPE = Recipe(
    num_steps=14, batch_size=8, lr=0.1, momentum=0.9, weight_decay=1e-3, milestones=(0.5,)
)
CELLS = [{"part": part, "L": L} for part in ("alone", "together") for L in (2, 3)]


def _in_group(rank, path):
    """Run every check on this rank, and leave word of those that failed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=SIZE,
        timeout=datetime.timedelta(minutes=3),
    )  # fmt: skip
    try:
        for check in CHECKS:
            folder = path / check.__name__
            folder.mkdir(exist_ok=True)
            try:
                check(rank, folder)
            except Exception:
                (path / f"{check.__name__}.{rank}").write_text(traceback.format_exc())
            dist.barrier()
    finally:
        # Wrappers of models hold the group: they go first.
        gc.collect()
        dist.destroy_process_group()
    # What is left of gloo's threads is no part of the checks: taking a process down that still has
    # some was seen to abort it, once in many runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong on two ranks: starting processes is slow, so they run all checks."""
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_in_group, (path,), nprocs=SIZE)
    return {file.stem: file.read_text() for file in path.glob("*.[01]")}


def _model(dtype=torch.float64, bn=False):
    generator = torch.Generator().manual_seed(0)
    return ResidualMLP(6, 8, 3, 2, bn=bn, generator=generator, dtype=dtype)


def _data(count, dtype=torch.float64, seed=0):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, (x[:, 0] > 0).long()


def _noisy(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _trainer(recipe=RECIPE, *, dtype=torch.float64, bn=False, net=None, **options):
    net = _model(dtype, bn) if net is None else net
    options = {"transform": _noisy, "evaluation": _data(13, dtype, 1)} | options
    return Trainer(net, *_data(30, dtype), recipe, seed=3, **options)


def _weights(trainer):
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


def _agree(value):
    """Check that all ranks have the same, to the last bit."""
    texts = gather(repr(value.tolist() if isinstance(value, torch.Tensor) else value))
    assert len(texts) == SIZE
    assert len(set(texts)) == 1, texts


# -- training -----------------------------------------------------------------------------------


def _compare_with_one_process(dtype, tolerance):
    one, whole = _trainer(dtype=dtype), _trainer(dtype=dtype, ranks=None)
    found, expected = one.run(), whole.run()
    assert one.ranks.size == SIZE
    assert whole.ranks.size == 1
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(_weights(one), _weights(whole), **near)
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance)
    assert [(e.step, e.error) for e in found.evaluations] == [
        (e.step, e.error) for e in expected.evaluations
    ]
    for a, b in zip(found.evaluations, expected.evaluations, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=tolerance)
    _agree(_weights(one))
    _agree(found)


def a_training_is_that_of_one_process_in_float64(rank, path):
    _compare_with_one_process(torch.float64, 1e-12)


def a_training_is_that_of_one_process_in_float32(rank, path):
    _compare_with_one_process(torch.float32, 1e-5)


def each_rank_computes_its_part_only(rank, path):
    seen = {True: [], False: []}
    net = _model()
    net.register_forward_pre_hook(lambda module, args: seen[module.training].append(len(args[0])))
    _trainer(net=net).run()
    assert seen[True] == [4] * RECIPE.num_steps
    # 13 samples after each of 4 epochs of 3 steps, and at the end.
    assert seen[False] == [6 if rank == 0 else 7] * 5


def images_are_augmented_as_in_one_process(rank, path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (20,), generator=generator)
    trained = []
    for where in ("auto", None):
        net = nn.Sequential(nn.Flatten(), nn.Linear(50, 2)).double()
        nn.init.zeros_(net[1].weight)
        nn.init.zeros_(net[1].bias)
        one = Trainer(net, x, y, RECIPE, transform=pad_and_crop(2), ranks=where)
        one.run()
        trained.append(_weights(one))
    torch.testing.assert_close(*trained, rtol=1e-12, atol=1e-12)


def gradient_norms_are_those_of_the_whole_batch(rank, path):
    frames = []
    for where in ("auto", None):
        net = _model()
        norms = GradientNorms(net, net.block_names)
        with norms:
            _trainer(net=net, stateful=[norms], ranks=where).run()
        frames.append(norms.ratios().to_numpy())
    assert len(frames[0]) == RECIPE.num_steps
    torch.testing.assert_close(*map(torch.from_numpy, frames), rtol=1e-10, atol=0.0)


def a_resumed_training_is_the_same_to_the_last_bit(rank, path):
    def made():
        net = _model(bn=True)
        net.head.insert(0, nn.Dropout(0.3))
        norms = GradientNorms(net, net.block_names)
        return _trainer(net=net, stateful=[norms]), norms

    whole, whole_norms = made()
    with whole_norms:
        result = whole.run()
    cut, cut_norms = made()
    with cut_norms:
        cut.run(8, checkpoint=path / "run.pt", checkpoint_every=4)
    dist.barrier()
    assert [p.name for p in path.iterdir()] == ["run.pt"]
    resumed, norms = made()
    # Only the first rank is given a file that is there.
    where = path / "run.pt" if rank == 0 else path / "elsewhere.pt"
    steps = []
    resumed.callbacks = (lambda _, step: steps.append(step.index),)
    with norms:
        assert resumed.run(checkpoint=where, checkpoint_every=100) == result
    assert steps == list(range(8, 14))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert norms.ratios().equals(whole_norms.ratios())


def ranks_draw_their_own_dropout_and_share_running_statistics(rank, path):
    seen = []

    class Watched(nn.Dropout):
        def forward(self, x):
            y = super().forward(x)
            if self.training:
                seen.append((y == 0).tolist())
            return y

    net = _model(bn=True)
    net.head.insert(0, Watched(0.5))
    one = _trainer(net=net)
    one.run()
    masks = gather(seen)
    assert len(masks[0]) == RECIPE.num_steps
    assert masks[0] != masks[1]
    _agree(torch.cat([b.flatten().double() for b in net.buffers()]))
    _agree(_weights(one))


def all_ranks_end_together_when_one_diverges(rank, path):
    for every in (1, 3):
        calls = itertools.count()

        def loss(outputs, targets, calls=calls):
            bad = rank == 1 and next(calls) == 4
            return nn.functional.cross_entropy(outputs, targets) * (math.nan if bad else 1.0)

        one = _trainer(loss=loss, sync_every=every, evaluation=None)
        result = one.run()
        assert (result.status, result.num_steps) == ("diverged", 4)
        assert result.message == "loss nan at step 4"
        _agree(result)


def float16_skips_the_same_steps_on_all_ranks(rank, path):
    def loss(outputs, targets):
        value = nn.functional.cross_entropy(outputs, targets)
        # The gradient overflows on one rank; the average over ranks does on both.
        nothing = (outputs - outputs.detach()).float().sum()
        return value + (1e4 * nothing if rank == 1 and index == 2 else 0.0)

    index = -1

    def counting(x, generator):
        nonlocal index
        index += 1
        return x

    recipe = Recipe(num_steps=6, batch_size=8, lr=0.1, precision="float16")
    told = []
    one = _trainer(
        recipe, dtype=torch.float32, loss=loss, transform=counting, evaluation=None,
        callbacks=[lambda _, step: told.append(step.skipped)],
    )  # fmt: skip
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    result = one.run()
    assert told == [False, False, True, False, False, False]
    assert (result.status, result.num_steps, result.num_skipped) == ("finished", 6, 1)
    assert one.scaler.get_scale() == 2.0**9
    _agree(_weights(one))


def a_batch_that_cannot_be_shared_is_refused(rank, path):
    recipe = Recipe(num_steps=1, batch_size=7, lr=0.1)
    with pytest.raises(TrainingError, match="batches of 7 cannot be shared equally by 2 ranks"):
        _trainer(recipe)
    assert _trainer(recipe, ranks=None).run().num_steps == 1


def a_checkpoint_of_another_number_of_ranks_is_refused(rank, path):
    if rank == 0:
        _trainer(ranks=None).save(path / "one.pt")
    dist.barrier()
    with pytest.raises(TrainingError, match="number of ranks"):
        _trainer().load(path / "one.pt")


def a_checkpoint_that_cannot_be_read_ends_all_ranks(rank, path):
    kind, text = (TrainingError, "no checkpoint") if rank == 0 else (RankFailedError, "FileNotF")
    with pytest.raises(kind, match=text):
        _trainer().load(path / "absent.pt")


def the_model_is_left_without_a_wrapper(rank, path):
    net = _model()
    bare = []
    one = _trainer(net=net, callbacks=[lambda trainer, _: bare.append(trainer.model is net)])
    one.run()
    assert all(bare)
    own = {id(p) for p in net.parameters()}
    assert {id(p) for group in one.optimizer.param_groups for p in group["params"]} == own
    # A rank may go on by itself: nothing waits for the others.
    if rank == 0:
        net.zero_grad()
        net(_data(4)[0]).sum().backward()
        assert all(p.grad is not None for p in net.parameters())


# -- cells --------------------------------------------------------------------------------------


def _together(cell):
    return cell["part"] == "together"


def _measure(cell):
    """Trains: with the other rank where all measure together, else by itself."""
    size = current().size
    assert size == (SIZE if _together(cell) else 1)
    result = _trainer(Recipe(num_steps=cell["L"], batch_size=8, lr=0.1)).run()
    return {"losses": result.losses, "draw": torch.rand(2), "size": size, "none": None}


def _store(rank, path):
    return CellStore(path / "cells.jsonl", {"a": 1}) if rank == 0 else CellsInMemory()


def cells_are_measured_once_and_told_to_all(rank, path):
    calls = []

    def measure(cell):
        calls.append(cell)
        return _measure(cell)

    with _store(rank, path) as store:
        first = run_cells(CELLS[:1], measure, store, parallel=_together)
        results = run_cells(CELLS, measure, store, parallel=_together)
        assert results[:1] == first
        assert [cell in store for cell in CELLS] == [True] * len(CELLS)
    _agree(results)
    assert calls == (CELLS if rank == 0 else CELLS[2:])
    assert [one["size"] for one in results] == [1, 1, 2, 2]
    assert results[0]["losses"] == pytest.approx(results[2]["losses"], rel=1e-12)
    assert [p.name for p in path.iterdir()] == ["cells.jsonl"]
    assert (path / "cells.jsonl").read_bytes().count(b"\n") == 1 + len(CELLS)
    with _store(rank, path) as store:  # what is on the first rank's disk is told too
        _agree(run_cells(CELLS, None, store))


def a_cell_that_fails_ends_all_ranks(rank, path):
    def failing(cell):
        if cell == CELLS[1]:
            raise ZeroDivisionError("in the cell")
        return 1

    kind = ZeroDivisionError if rank == 0 else RankFailedError
    with _store(rank, path) as store:
        with pytest.raises(kind, match="in the cell"):
            run_cells(CELLS, failing, store)
        assert CELLS[0] in store
        assert len(store) == 1


def other_cells_on_another_rank_are_noticed(rank, path):
    cells = CELLS[:2] if rank == 0 else CELLS[1:3]
    kind = pytest.raises(StoreError, match="different cells") if rank else contextlib.nullcontext()
    with _store(rank, path) as store, kind:
        run_cells(cells, lambda cell: 1, store) if rank else on_first(lambda: (keys(cells), {}))


def keys(cells):
    from experiments.store import canonical

    return [canonical(cell) for cell in cells]


def only_the_first_rank_reports(rank, path):
    shown = io.StringIO()
    with _store(rank, path) as store, contextlib.redirect_stderr(shown):
        run_cells(CELLS, lambda cell: 1, store)
    assert ("cells: 4/4 cells" in shown.getvalue()) == (rank == 0)


def only_the_first_rank_opens_the_store(rank, path):
    options = Options("fake", "quick", "digits", "cpu", 1, path / str(rank))
    with options.open_store(uses_data=False) as store:
        assert isinstance(store, CellsInMemory) == (rank == 1)
        kind = StoreError if rank == 0 else RankFailedError
        with pytest.raises(kind, match="another run"):
            options.open_store(uses_data=False)
        store.mark_finished()
    dist.barrier()
    assert [p.name for p in path.iterdir()] == ["0"]
    assert '"ranks": 2' in (path / "0" / "cells.jsonl").read_text()


def what_the_first_rank_says_reaches_all(rank, path):
    assert current() == Ranks(rank, SIZE)
    assert on_first(lambda: {"from": rank}) == {"from": 0}
    assert gather(rank) == [0, 1]
    with alone():
        assert current() == Ranks()
        assert on_first(lambda: rank) == rank
        assert gather(rank) == [rank]
    with ranks() as here:  # somebody else has started the group, and ends it
        assert here == Ranks(rank, SIZE)
    assert dist.is_initialized()


CHECKS = [
    a_training_is_that_of_one_process_in_float64,
    a_training_is_that_of_one_process_in_float32,
    each_rank_computes_its_part_only,
    images_are_augmented_as_in_one_process,
    gradient_norms_are_those_of_the_whole_batch,
    a_resumed_training_is_the_same_to_the_last_bit,
    ranks_draw_their_own_dropout_and_share_running_statistics,
    all_ranks_end_together_when_one_diverges,
    float16_skips_the_same_steps_on_all_ranks,
    a_batch_that_cannot_be_shared_is_refused,
    a_checkpoint_of_another_number_of_ranks_is_refused,
    a_checkpoint_that_cannot_be_read_ends_all_ranks,
    the_model_is_left_without_a_wrapper,
    cells_are_measured_once_and_told_to_all,
    a_cell_that_fails_ends_all_ranks,
    other_cells_on_another_rank_are_noticed,
    only_the_first_rank_reports,
    only_the_first_rank_opens_the_store,
    what_the_first_rank_says_reaches_all,
]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_on_two_ranks(name, failures):
    assert name not in failures, failures[name]


# -- one process --------------------------------------------------------------------------------


def test_one_process_is_the_first_and_only_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == current() == Ranks(0, 1)
    with ranks("cuda") as here:
        assert here == Ranks()
        assert here.first
    assert not dist.is_initialized()
    answer = object()  # nothing is copied
    assert on_first(lambda: answer) is answer
    assert gather(answer) == [answer]


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 3), (2, 4), (0, 2)])
def test_shares_are_contiguous_and_even(count, size):
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert list(itertools.chain.from_iterable(range(count)[s] for s in shares)) == list(
        range(count)
    )
    sizes = [s.stop - s.start for s in shares]
    assert max(sizes) - min(sizes) <= 1


def test_ranks_cannot_share_a_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ExperimentError, match="use --device cuda"), ranks("cuda:1"):
        pass
    with pytest.raises(ExperimentError, match="this machine has 0"), ranks("cuda"):
        pass
    assert not dist.is_initialized()
