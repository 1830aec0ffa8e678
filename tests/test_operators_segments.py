"""Memory that is short: graphs that hold only what enters the blocks, and batches kept in part."""

from __future__ import annotations

import weakref

import pytest
import torch
from conftest import (
    PROBLEMS,
    Apply,
    Problem,
    Snapshot,
    dense_hessian,
    regression,
    small_mlp,
)
from torch import Tensor, nn

from conditioning.errors import DoubleBackwardError, LargeGraphWarning
from conditioning.operators import GaussNewtonOperator, HessianOperator

MSE = nn.MSELoss()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Token:
    pass


class Marked(torch.autograd.Function):
    """Tells whether the graph that it is part of is alive."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.token = Token()
        alive.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.sin(self.inner(x)))


class Listed(nn.Module):
    """Blocks in a list, called with a mask and a keyword, which return a number as well."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(depth))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x > -1
        for block in self.blocks:
            x, count = block(x, mask=mask)
            assert count.dtype == torch.long
        return self.head(x)


class Masked(Block):
    def forward(self, x: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        # In place on what enters, as the first layer of many blocks.
        return torch.where(mask, super().forward(x.mul_(0.5)), 0.0), mask.sum()


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3).double())
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5)
        return torch.tanh(self.inner(x)) * self.scale


def chain(depth: int = 5) -> nn.Sequential:
    return nn.Sequential(*[Block() for _ in range(depth)], nn.Linear(3, 2)).double()


MODELS = {
    "chain": chain,
    "listed": lambda: Listed().double(),
    "chain of chains": lambda: nn.Sequential(chain()[:4], chain()[:3], nn.Linear(3, 2)).double(),
    "layers": lambda: small_mlp(nn.Tanh(), nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "buffers": lambda: nn.Sequential(Averaging(), Averaging(), nn.Linear(3, 2)).double(),
    "drawn": lambda: nn.Sequential(Apply(lambda x: x + 0 * torch.rand(3)), *chain()).double(),
}


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("name", [*MODELS, "cnn", "transformer", "subset", "frozen"])
def test_a_graph_in_segments_has_the_same_products(kind, name):
    if name in MODELS:
        model, data, params = MODELS[name](), regression(), None
        arguments = model, MSE, data
    else:
        problem = PROBLEMS[name]()
        model, params = problem.model, problem.params
        arguments = model, problem.loss_fn, problem.batch
    whole = kind(*arguments, params)
    before = Snapshot(model)
    forwards = [module.forward for module in model.modules()]
    operator = kind(*arguments, params, memory_budget=0)
    assert operator._checkpointed
    vectors = torch.randn(whole.shape[0], 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(operator @ vectors, whole @ vectors, rtol=1e-12, atol=1e-13)
    before.assert_unchanged()
    assert forwards == [module.forward for module in model.modules()]


def test_segments_compute_in_the_precision_of_the_pass():
    precisions = []

    def note(x: Tensor) -> Tensor:
        precisions.append(
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else 0
        )
        return x

    x, y = regression()
    model = nn.Sequential(nn.Sequential(Block(), Apply(note)), Block(), nn.Linear(3, 2))

    def loss_fn(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return MSE(model(batch[0]).float(), batch[1])

    data = x.float(), y.float()
    whole, parts = (
        HessianOperator(loss_fn, None, data, model, memory_budget=budget) for budget in (None, 0)
    )
    assert parts._checkpointed
    precisions.clear()
    vector = torch.randn(whole.shape[0])
    expected, product = whole @ vector, parts @ vector
    assert set(precisions) == {torch.bfloat16}
    assert (product - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("budget", "living"), [(None, 4), (0, 0)])
def test_segments_hold_nothing_of_what_is_inside(budget, living):
    alive: list[weakref.ref] = []
    blocks = [nn.Sequential(Block(), Apply(lambda x: Marked.apply(x, alive))) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(3, 2)).double()
    operator = HessianOperator(model, MSE, regression(), memory_budget=budget)
    operator @ torch.randn(operator.shape[0]).double()
    assert sum(token() is not None for token in alive) == living


def test_several_batches_are_cut_only_where_one_does_not_fit(monkeypatch):
    model, data = chain(), [regression(2), regression(4)]
    whole = HessianOperator(model, MSE, data, memory_budget=0)
    assert not whole._checkpointed
    monkeypatch.setattr("conditioning.operators.losses.available_bytes", lambda _: 10)
    parts = HessianOperator(model, MSE, data)
    assert parts._checkpointed
    vector = torch.randn(whole.shape[0]).double()
    torch.testing.assert_close(parts @ vector, whole @ vector, rtol=1e-12, atol=1e-13)


def test_a_model_without_blocks_is_built_whole_with_a_warning():
    problem = PROBLEMS["lstm"]()
    with pytest.warns(LargeGraphWarning, match="no blocks.*smaller batches") as caught:
        operator = HessianOperator(problem.model, problem.loss_fn, problem.batch, memory_budget=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    torch.testing.assert_close(operator.dense(), dense_hessian(problem))


class Reader(Block):
    """Adds what somebody has left there."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.strength * self.left


class Leaving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(3, 3), nn.Sequential(Reader(), Block())

    def forward(self, x: Tensor) -> Tensor:
        self.blocks[0].left = torch.sin(self.first(x))
        return self.blocks(x)


@pytest.mark.parametrize("strength", [1.0, 0.0])  # of zero, no gradient tells
def test_a_tensor_that_slips_past_the_inputs_of_a_block_is_noticed(strength):
    model, (x, _) = Leaving().double(), regression()
    model.blocks[0].strength.data.fill_(strength)
    with pytest.warns(LargeGraphWarning, match="none of its inputs") as caught:
        operator = HessianOperator(model, MSE, (x, x.sin()), memory_budget=0)
    assert [w.filename for w in caught] == [__file__]
    vector = torch.randn(operator.shape[0]).double()
    expected = HessianOperator(model, MSE, (x, x.sin())) @ vector
    torch.testing.assert_close(operator @ vector, expected)


class Counting(Block):
    """What it does depends on what it did before, and is forgotten where it is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.calls * super().forward(x)


def test_a_block_that_runs_otherwise_the_second_time_is_noticed():
    block, data = Counting(), regression()
    model = nn.Sequential(block, block, nn.Linear(3, 2)).double()
    with pytest.warns(LargeGraphWarning, match="gradient comes out different"):
        operator = HessianOperator(model, MSE, data, memory_budget=0)
    whole = HessianOperator(model, MSE, data)
    vector = torch.ones(operator.shape[0]).double()
    torch.testing.assert_close(operator @ vector, whole @ vector)


class Coarse(torch.autograd.Function):
    """The sine, with a derivative that loses its own derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].detach().cos()


class Once(Coarse):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("function", [Coarse, Once])
def test_functions_without_a_second_derivative_are_noticed_inside_a_block(function):
    blocks = [nn.Sequential(Block(), Apply(function.apply)) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(3, 2)).double()
    with pytest.raises(DoubleBackwardError, match=function.__name__):
        HessianOperator(model, MSE, regression(), memory_budget=0)


def test_complex_tensors_between_blocks():
    def there(x: Tensor) -> Tensor:
        return torch.fft.fft(x)

    def back(z: Tensor) -> Tensor:
        return (z * z).real

    parts = [nn.Sequential(Block(), Apply(there)), nn.Sequential(Apply(back), Block())]
    model = nn.Sequential(*parts, nn.Linear(3, 2)).double()
    data = regression()
    operator = HessianOperator(model, MSE, data, memory_budget=0)
    assert operator._checkpointed
    torch.testing.assert_close(operator.dense(), dense_hessian(Problem(model, MSE, data)))


# Several batches, some of which fit.


class Reshuffled:
    """Goes through the samples in another order each time, by a generator that nobody knows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self._generator = x, y, torch.Generator().manual_seed(0)

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self._generator)
        return zip(self.x[order].split(2), self.y[order].split(2), strict=True)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_as_many_graphs_are_kept_as_fit(kind):
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return MSE(outputs, targets)

    model, data = small_mlp(), regression(8)
    batches = list(zip(*(t.split(2) for t in data), strict=True))
    whole = kind(model, MSE, data)
    one = kind(model, MSE, batches)._bytes_per_size * 2
    operator = kind(model, loss_fn, batches, memory_budget=int(2.5 * one))
    for _ in range(2):
        calls.clear()
        vectors = torch.randn(whole.shape[0], 3).double()
        torch.testing.assert_close(operator @ vectors, whole @ vectors, rtol=1e-12, atol=1e-13)
        assert len(calls) == 2
    with torch.no_grad():
        model[0].bias += 1
    calls.clear()
    vector = torch.randn(whole.shape[0]).double()
    torch.testing.assert_close(operator @ vector, whole @ vector, rtol=1e-12, atol=1e-13)
    assert len(calls) == 4


def test_a_graph_is_used_only_for_the_batch_that_it_was_built_from():
    model, data = small_mlp(), regression(8)
    batches = list(zip(*(t.split(2) for t in data), strict=True))
    budget = int(2.5 * HessianOperator(model, MSE, batches)._bytes_per_size * 2)
    operator = HessianOperator(model, MSE, Reshuffled(*data), memory_budget=budget)
    whole = HessianOperator(model, MSE, data)
    torch.testing.assert_close(operator.dense(), whole.dense(), rtol=1e-12, atol=1e-13)
    assert not operator._some
