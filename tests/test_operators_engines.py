"""Engines against dense references, what they are refused for, and when they are built."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from conftest import (
    PROBLEMS,
    HostReads,
    Snapshot,
    dense_gauss_newton,
    dense_hessian,
    regression,
    small_mlp,
)
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError
from conditioning.operators import GaussNewtonOperator, HessianOperator, engines, timing, traced

MSE = nn.MSELoss()
KINDS = [(HessianOperator, dense_hessian), (GaussNewtonOperator, dense_gauss_newton)]


def build(problem, kind=HessianOperator, **options):
    return kind(problem.model, problem.loss_fn, problem.batch, problem.params, **options)


def bound_for(problem):
    mixed = any(p.dtype == torch.float32 for p in problem.model.parameters())
    return 1e-5 if mixed else 1e-12


def refusals(operator):
    return operator._engine._refused


def truth_and_columns(operator):
    """The matrix from products with single vectors."""
    eye = torch.eye(operator.shape[0], dtype=operator.dtype)
    return torch.stack([operator @ column for column in eye], dim=1)


@pytest.mark.parametrize("engine", ["retained", "linearized"])
def test_products_read_nothing_back(engine, problem):
    operator = build(problem, engine=engine)
    vectors = torch.randn(operator.shape[0], 5, dtype=operator.dtype)
    operator @ vectors, operator @ vectors[:, 0]  # builds what is built once
    with HostReads() as reads:
        operator @ vectors, operator @ vectors[:, 0]
    assert reads.count == 0


# What is right.


@pytest.mark.parametrize(
    ("kind", "truth", "blocks"),
    [(*KINDS[0], "loop"), (*KINDS[0], "batched"), (*KINDS[1], "batched")],
)
def test_the_linearized_engine_is_the_reference(kind, truth, blocks, problem):
    operator = build(problem, kind, engine="linearized")
    operator.block_engine = blocks
    expected, bound = truth(problem), bound_for(problem)
    torch.testing.assert_close(operator.dense(), expected, rtol=bound, atol=bound)
    vector = torch.randn(operator.shape[0], dtype=operator.dtype)
    torch.testing.assert_close(
        operator @ vector, expected.to(vector.dtype) @ vector, rtol=bound, atol=10 * bound
    )
    shown = operator.engine
    if not expected.any():
        assert shown.name == "retained"
        assert "the matrix is zero" in shown.reason
    else:
        assert (shown.name, shown.blocks) == ("linearized", f"linearized {blocks}")
        assert not refusals(operator)


class Convolutions(nn.Module):
    """Strides, dilation, padding, groups, a transposed layer, and kernels that miss the border."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
            nn.Tanh(),
            nn.Conv2d(3, 2, 2, stride=3, bias=False),
        )

    def forward(self, x):
        return self.layers(x).flatten(1)


def problem_of(model, batch):
    @dataclasses.dataclass
    class Own:
        model: nn.Module
        loss_fn: nn.Module
        batch: tuple[Tensor, Tensor]
        params: None = None

    return Own(model, nn.MSELoss(), batch)


def test_convolutions_use_the_gradient_of_the_kernel():
    torch.manual_seed(0)
    problem = problem_of(
        Convolutions().double(), (torch.randn(3, 2, 8, 8).double(), torch.randn(3, 18).double())
    )
    operator = build(problem, engine="linearized")
    torch.testing.assert_close(operator.dense(), dense_hessian(problem), rtol=1e-11, atol=1e-12)
    assert not refusals(operator)
    (ledger,) = operator._engine._ledgers.values()
    targets = [node.target for node in ledger.program.graph.nodes]
    # Two convolutions have neither groups nor are they transposed.
    assert targets.count(torch.ops.aten.convolution_backward.default) >= 2 + 4
    assert operator.engine.name == "linearized"


def test_batch_statistics_are_covered():
    torch.manual_seed(0)
    problem = problem_of(small_mlp(nn.BatchNorm1d(4)), regression())
    problem.model[1].track_running_stats = False
    problem.model[1].running_mean = problem.model[1].running_var = None
    operator = build(problem, engine="linearized")
    torch.testing.assert_close(operator.dense(), dense_hessian(problem), rtol=1e-9, atol=1e-11)
    assert operator.engine.blocks.startswith("linearized")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, bound, mlp_problem):
    expected = dense_hessian(mlp_problem)
    mlp_problem.model.to(dtype)
    mlp_problem.batch = tuple(t.to(dtype) for t in mlp_problem.batch)
    operator = build(mlp_problem, engine="linearized")
    matrix = operator.dense()
    assert matrix.dtype == dtype
    assert operator.engine.blocks.startswith("linearized")
    torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("budget", [None, 0])
def test_several_batches(budget, mlp_problem):
    whole = build(mlp_problem).dense()
    pairs = zip(*(t.split([1, 3, 2]) for t in mlp_problem.batch), strict=True)
    mlp_problem.batch = list(pairs)
    operator = build(mlp_problem, engine="linearized", memory_budget=budget)
    torch.testing.assert_close(operator.dense(), whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(truth_and_columns(operator), whole, rtol=1e-12, atol=1e-13)
    assert operator.engine.name == ("retained" if budget == 0 else "linearized")


def test_products_follow_parameters_that_change_in_place_and_new_data(mlp_problem):
    operator = build(mlp_problem, engine="linearized")
    for step in range(3):
        torch.testing.assert_close(operator.dense(), dense_hessian(mlp_problem))
        torch.testing.assert_close(truth_and_columns(operator), dense_hessian(mlp_problem))
        with torch.no_grad():
            if step == 0:
                for p in mlp_problem.model.parameters():
                    p.mul_(1.5)
            else:
                mlp_problem.batch[0].add_(1)
                operator.refresh()
    assert operator.engine.name == "linearized"
    assert len(operator._engine._ledgers) == 1  # those of the graphs before are gone


def test_the_same_bits_each_time_and_no_trace_left(mlp_problem):
    matrices = []
    mlp_problem.model(mlp_problem.batch[0]).sum().backward()
    snapshot = Snapshot(mlp_problem.model)
    for name in ("retained", "retained", "linearized", "linearized"):
        operator = build(mlp_problem, engine=name)
        matrices.append((operator.dense(), truth_and_columns(operator)))
        assert operator.engine.name == name
    snapshot.assert_unchanged()
    for one, two in (matrices[:2], matrices[2:]):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_rests_of_blocks_are_filled_up_or_done_one_by_one(mlp_problem):
    operator = build(mlp_problem, engine="linearized")
    operator.block_engine = "batched"
    expected = dense_hessian(mlp_problem)
    for width in (70, 16, 4, 17, 30, 1, 3, 40):
        block = torch.randn(operator.shape[0], width).double()
        torch.testing.assert_close(operator @ block, expected @ block)
    assert operator.engine.blocks == "linearized batched"


# What is refused.


def test_wrong_names(mlp_problem):
    with pytest.raises(InvalidArgumentError, match="auto, retained, linearized, compiled"):
        build(mlp_problem, engine="fast")
    operator = build(mlp_problem)
    with pytest.raises(InvalidArgumentError, match="got 'fast'"):
        operator.engine = "fast"


def test_an_engine_that_cannot_be_built_gives_way_to_the_retained_graph(mlp_problem, monkeypatch):
    def broken(*_):
        msg = "no compiler here\nand a long story"
        raise OSError(msg)

    monkeypatch.setattr(engines, "compiled", broken)
    operator = build(mlp_problem, engine="compiled")
    torch.testing.assert_close(operator.dense(), dense_hessian(mlp_problem))
    torch.testing.assert_close(truth_and_columns(operator), dense_hessian(mlp_problem))
    assert operator.engine.name == "retained"
    assert "not compiled: OSError: no compiler here" in operator.engine.reason
    assert "long story" not in str(operator.engine)


def test_a_wrong_engine_is_refused(mlp_problem, monkeypatch):
    def slightly_wrong(program, vector):
        return lambda *arguments: [program(arguments[-1]) * (1 + 1e-9)]

    monkeypatch.setattr(engines, "compiled", slightly_wrong)
    operator = build(mlp_problem, engine="compiled")
    torch.testing.assert_close(operator.dense(), dense_hessian(mlp_problem), rtol=1e-13, atol=1e-15)
    assert "off by 1.0e-09" in operator.engine.reason
    assert operator.engine.name == "retained"


class Hidden(torch.autograd.Function):
    """The square, with a backward whose own derivative a trace cannot see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        return HiddenSlope.apply(slope, *ctx.saved_tensors)


class HiddenSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slope, x):
        ctx.save_for_backward(slope, x)
        return 2 * slope * x

    @staticmethod
    def backward(ctx, tangent):
        slope, x = ctx.saved_tensors
        tangent = torch.tensor(tangent.tolist(), dtype=tangent.dtype)
        return 2 * tangent * x, 2 * tangent * slope


def test_a_trace_that_would_freeze_the_vector_is_refused():
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    operator = HessianOperator(
        lambda scale: scale * Hidden.apply(weights).square().sum(),
        None, torch.tensor(2.0), weights, engine="linearized",
    )  # fmt: skip
    expected = torch.diag(torch.tensor([24.0, 96.0]))
    torch.testing.assert_close(truth_and_columns(operator), expected)
    torch.testing.assert_close(operator.dense(), expected)
    assert operator.engine.name == "retained"
    assert "not linearized" in operator.engine.reason


def test_constants_that_do_not_fit_are_refused(mlp_problem):
    operator = build(mlp_problem, engine="linearized", memory_budget=10)
    torch.testing.assert_close(truth_and_columns(operator), dense_hessian(mlp_problem))
    assert "do not fit 10 B" in operator.engine.reason


def test_an_engine_that_fails_later_is_dropped(mlp_problem):
    operator = build(mlp_problem, engine="linearized")
    vector = torch.randn(operator.shape[0]).double()
    expected = operator @ vector
    (ledger,) = operator._engine._ledgers.values()

    def out_of_memory(_):
        msg = "not enough memory"
        raise RuntimeError(msg)

    ledger.ways[False].rows = out_of_memory
    torch.testing.assert_close(operator @ vector, expected)
    assert operator.engine.name == "retained"
    assert "not enough memory" in operator.engine.reason


# When they are built.


def test_short_runs_stay_with_the_retained_graph(mlp_problem, monkeypatch):
    monkeypatch.setattr(engines, "trace", lambda *_: pytest.fail("a trace does not pay here"))
    operator = build(mlp_problem)
    for _ in range(5):
        operator.dense()
    assert operator.engine.name == "retained"
    assert "too little time" in operator.engine.reason


def test_setting_the_block_engine_keeps_to_the_retained_graph(mlp_problem, monkeypatch):
    monkeypatch.setattr(engines, "_SECONDS", {"linearized": (0, 0), "compiled": (0, 0)})
    monkeypatch.setattr(engines, "_TRIALS", 0)
    monkeypatch.setattr(engines, "trace", lambda *_: pytest.fail("a trace is not wanted here"))
    operator = build(mlp_problem)
    operator.block_engine = "loop"
    operator.dense()
    operator @ torch.randn(operator.shape[0])
    assert operator.engine.blocks == "loop"
    assert "equal from run to run" in operator.engine.reason


@pytest.mark.parametrize("fast", [True, False])
def test_what_is_built_is_timed_once_and_kept_only_if_it_is_faster(fast, mlp_problem, monkeypatch):
    """The clock is replaced: products take a second each, those of the new engine as said."""
    clock = [0.0]
    built = []
    cost = {"retained": 1.0, "linearized": 0.5 if fast else 0.95}

    def slow_trace(multiply, vector, budget):
        built.append(clock[0])
        program = traced.trace(free, vector, budget)
        own = program._multiply
        program._multiply = lambda row: (tick(cost["linearized"]), own(row))[1]
        clock[0] += 3
        return program

    def tick(seconds):
        clock[0] += seconds

    operator = build(mlp_problem)
    graph = operator._fresh_graphs()[0][0]
    layout, free_of_charge = operator._layout, graph.apply_flat

    def free(vector):
        return layout.join(free_of_charge(vector, layout))

    def paid(vector, layout):
        tick(cost["retained"])
        return free_of_charge(vector, layout)

    monkeypatch.setattr(graph, "apply_flat", paid)
    monkeypatch.setattr(engines, "trace", slow_trace)
    monkeypatch.setattr(engines, "_SECONDS", {"linearized": (4, 0), "compiled": (1e9, 0)})
    monkeypatch.setattr(engines, "_TRIALS", 0)
    monkeypatch.setattr(timing.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(operator, "_gradient_seconds", 0.5)
    vector, expected = torch.randn(operator.shape[0]).double(), dense_hessian(mlp_problem)
    for product in range(8):
        torch.testing.assert_close(operator @ vector, expected @ vector)
        assert len(built) == (product >= 3)
    assert built == [4.0]
    shown = operator.engine
    if fast:
        assert (shown.name, shown.gradients) == ("linearized", 1.0)
        assert "was timed and is faster" in shown.reason
    else:
        assert (shown.name, shown.gradients) == ("retained", 2.0)
        assert "0.95 of the time" in shown.reason


@pytest.mark.parametrize(
    ("name", "in_one_piece"),
    [("mlp", True), ("frozen", True), ("mixed_dtypes", False), ("unused", False)],
)
def test_a_small_gradient_is_kept_in_one_piece(name, in_one_piece, monkeypatch):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is mixed, or unused
        operator = build(PROBLEMS[name](), engine="retained")
    vector = torch.randn(operator.shape[0], dtype=operator.dtype)
    together = operator @ vector
    ((graph, _),) = operator._fresh_graphs()
    assert (graph._flat is not None) == in_one_piece
    monkeypatch.setattr(graph, "_flat", None)
    torch.testing.assert_close(operator @ vector, together, rtol=1e-13, atol=1e-15)


def test_a_block_is_traced_without_holding_what_is_done_with(monkeypatch):
    """It takes as much memory as a product, not that of all intermediate results at once."""
    peaks, counts = [], []

    class Watched(traced._Recorder):
        def __torch_dispatch__(self, *arguments):
            result = super().__torch_dispatch__(*arguments)
            peaks[-1] = max(peaks[-1], len(self._alive))
            return result

        def module(self, outputs):
            found = super().module(outputs)
            counts.append(len(found.graph.nodes))
            return found

    def watched(*arguments, **options):
        peaks.append(0)
        return Watched(*arguments, **options)

    monkeypatch.setattr(traced, "_Recorder", watched)
    layers = [layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.Tanh())]
    batch = torch.randn(5, 4), torch.randn(5, 4)
    operator = HessianOperator(nn.Sequential(*layers), MSE, batch, engine="linearized")
    operator @ torch.randn(operator.shape[0], 6)
    assert operator.engine.blocks == "linearized batched"
    (*_, block), (*_, nodes) = peaks, counts
    held = len(operator._engine._ledgers[operator._kept[0][0]].program.constants)
    ends = 2 * len(operator.parameter_names)  # parts of the block, and of the result
    assert block < held + ends + 12 < nodes / 2


def test_it_is_not_built_for_graphs_that_change_too_often(mlp_problem, monkeypatch):
    built = []
    honest = traced.trace
    monkeypatch.setattr(engines, "_SECONDS", {"linearized": (0, 0), "compiled": (1e9, 0)})
    monkeypatch.setattr(engines, "_TRIALS", 0)
    monkeypatch.setattr(engines, "_GAIN", -1e9)  # whatever is built is adopted
    monkeypatch.setattr(engines, "trace", lambda *a: (built.append(1), honest(*a))[1])
    operator = build(mlp_problem)
    vector = torch.randn(operator.shape[0]).double()
    operator @ vector
    assert built == [1]
    operator._engine._build_seconds["linearized", False] = 1e3
    for _ in range(3):
        with torch.no_grad():
            mlp_problem.model[0].weight.mul_(1.1)
        torch.testing.assert_close(operator @ vector, dense_hessian(mlp_problem) @ vector)
    assert built == [1]
    operator._engine._build_seconds["linearized", False] = 0.0
    operator @ vector
    assert built == [1, 1]
    assert operator.engine.name == "linearized"


def test_auto_never_changes_a_result_beyond_rounding(mlp_problem, monkeypatch):
    monkeypatch.setattr(engines, "_SECONDS", {"linearized": (0, 0), "compiled": (1e9, 0)})
    monkeypatch.setattr(engines, "_TRIALS", 0)
    operator, expected, bound = build(mlp_problem), dense_hessian(mlp_problem), 1e-12
    for _ in range(2):
        torch.testing.assert_close(operator.dense(), expected, rtol=bound, atol=bound)
        torch.testing.assert_close(truth_and_columns(operator), expected, rtol=bound, atol=bound)
    assert operator._engine._adopted or refusals(operator)


def test_the_cost_is_shown_in_gradients(mlp_problem):
    operator = build(mlp_problem)
    shown = operator.engine
    assert shown.gradients > 0
    assert shown.gradients_in_blocks is None
    operator @ torch.randn(operator.shape[0], 8).double()
    assert operator.engine.gradients_in_blocks > 0
    assert operator.engine.blocks in ("loop", "batched")
    assert f"retained ({shown.gradients:.2f} gradients)" in str(shown)
    assert "\n" not in str(shown)
    assert operator.num_matvecs == 8


# The compiler.


@pytest.mark.slow
def test_the_compiled_engine_is_the_reference_and_leaves_no_setting(
    mlp_problem, monkeypatch, tmp_path
):
    # A file that was cut off in a cache that others use would make it fall back.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    before = dynamo.save_config(), inductor.save_config()
    snapshot = Snapshot(mlp_problem.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        operator = build(mlp_problem, engine="compiled")
        operator.block_engine = "batched"
        first = operator.dense()
        columns = truth_and_columns(operator)
        with torch.no_grad():
            mlp_problem.model[0].weight.mul_(2)
            mlp_problem.model[0].weight.div_(2)
        again = operator.dense()
    assert not caught
    snapshot.assert_unchanged()
    assert (dynamo.save_config(), inductor.save_config()) == before
    expected = dense_hessian(mlp_problem)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(columns, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(first, again)
    shown = operator.engine
    assert (shown.name, shown.blocks) == ("compiled", "compiled batched"), shown.reason
    assert len(operator._engine._compiled) == 2  # nothing was compiled again for the new graph
