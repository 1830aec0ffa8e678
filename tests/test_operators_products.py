"""Products against dense references that are computed another way."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from conftest import Problem, dense_gauss_newton, dense_hessian, outputs_of, regression, small_mlp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conditioning.errors import InvalidArgumentError, ParameterSelectionError, ShapeError
from conditioning.operators import GaussNewtonOperator, HessianOperator, JacobianOperator
from conditioning.operators.engines import Multiplier

LOSS_OPERATORS = [(HessianOperator, dense_hessian), (GaussNewtonOperator, dense_gauss_newton)]


def build(kind: type[HessianOperator], problem: Problem, **options: object) -> HessianOperator:
    return kind(problem.model, problem.loss_fn, problem.batch, problem.params, **options)


def tolerance(problem: Problem) -> float:
    mixed = any(p.dtype == torch.float32 for p in problem.model.parameters())
    return 1e-5 if mixed else 1e-12


@pytest.mark.parametrize(("kind", "truth"), LOSS_OPERATORS)
def test_dense_matrix_is_the_reference(kind, truth, problem):
    operator = build(kind, problem)
    expected = truth(problem)
    bound = tolerance(problem)
    assert operator.num_matvecs == 0
    torch.testing.assert_close(operator.dense(), expected, rtol=bound, atol=bound)
    assert operator.num_matvecs == len(expected)


def test_hessian_equals_reverse_over_reverse_of_torch_func(mlp_problem):
    operator = build(HessianOperator, mlp_problem)
    inputs, targets = mlp_problem.batch

    def loss(flat: Tensor) -> Tensor:
        outputs = torch.func.functional_call(mlp_problem.model, operator.unflatten(flat), (inputs,))
        return mlp_problem.loss_fn(outputs, targets)

    point = torch.cat([p.detach().reshape(-1) for p in mlp_problem.model.parameters()])
    expected = torch.func.jacrev(torch.func.jacrev(loss))(point)
    torch.testing.assert_close(operator.dense(), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(operator.gradient(), torch.func.grad(loss)(point))
    assert operator.loss == pytest.approx(float(loss(point)))


def test_hessian_of_linear_regression_is_closed_form():
    inputs = torch.randn(7, 3).double()
    model = nn.Linear(3, 1, bias=False).double()
    operator = HessianOperator(model, nn.MSELoss(), (inputs, torch.zeros(7, 1).double()))
    torch.testing.assert_close(operator.dense(), 2 * inputs.T @ inputs / 7)


def test_gauss_newton_is_positive_semidefinite_and_hessian_is_not(mlp_problem):
    eigenvalues = torch.linalg.eigvalsh(build(GaussNewtonOperator, mlp_problem).dense())
    assert eigenvalues.min() > -1e-12
    assert torch.linalg.eigvalsh(build(HessianOperator, mlp_problem).dense()).min() < -1e-3


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_block_equals_its_columns(kind, problem):
    operator = build(kind, problem)
    block = torch.randn(operator.shape[0], 6, dtype=operator.dtype)
    columns = torch.stack([operator @ column for column in block.T], dim=1)
    bound = tolerance(problem)
    torch.testing.assert_close(operator @ block, columns, rtol=bound, atol=bound)
    assert operator.block_engine in ("loop", "batched")


@pytest.mark.parametrize("choice", ["loop", "batched"])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_both_block_engines_agree_with_the_reference(kind, choice, problem):
    operator = build(kind, problem)
    truth = dict(LOSS_OPERATORS)[kind](problem)
    operator.block_engine = choice
    bound = tolerance(problem)
    torch.testing.assert_close(operator.dense(), truth, rtol=bound, atol=bound)


def test_a_chosen_block_engine_is_kept_and_gives_the_same_bits_each_time(mlp_problem):
    matrices = []
    for _ in range(2):
        operator = build(HessianOperator, mlp_problem)
        operator.block_engine = "batched"
        matrices.append(operator.dense())
        assert operator.block_engine == "batched"
    assert torch.equal(*matrices)
    jacobian = JacobianOperator(mlp_problem.model, mlp_problem.batch[0])
    jacobian.block_engine = "loop"
    for one in (operator, jacobian):
        with pytest.raises(InvalidArgumentError, match="loop, batched, undecided"):
            one.block_engine = "fast"


def test_small_graphs_take_more_vectors_along_and_large_ones_fewer():
    engine = Multiplier()
    for graph_bytes, vector_bytes, budget, chunk in (
        (1, 1, 2**30, 256), (2**20, 0, 2**30, 64), (2**26, 0, 2**31, 16), (2**26, 0, 2**28, 4),
        (10, 0, 5, 1), (1, 2**23, 2**30, 16), (1, 2**27 - 1, 2**30, 8),
    ):  # fmt: skip
        engine.limit(graph_bytes, vector_bytes, budget)
        assert engine.chunk == chunk


def test_empty_block_and_wrong_shapes(mlp_problem):
    operator = build(HessianOperator, mlp_problem)
    n = operator.shape[0]
    assert (operator @ torch.zeros(n, 0)).shape == (n, 0)
    with pytest.raises(ShapeError, match=rf"\({n},\)"):
        operator @ torch.zeros(n + 1)
    with pytest.raises(ShapeError, match="multiplies torch tensors"):
        operator @ np.zeros(n)


# Many batches.

PIECES = [1, 4, 2]


def pieces(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.split(PIECES) for t in data), strict=True))


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_uneven_batches_are_one_batch(kind, reduction, budget):
    torch.manual_seed(0)
    model, data = small_mlp(), regression(sum(PIECES))
    loss_fn = nn.MSELoss(reduction=reduction)
    whole = kind(model, loss_fn, data)
    parts = kind(model, loss_fn, pieces(data), reduction=reduction, memory_budget=budget)
    vector = torch.randn(whole.shape[0], 5).double()
    torch.testing.assert_close(parts @ vector, whole @ vector, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(parts.gradient(), whole.gradient())
    assert parts.loss == pytest.approx(whole.loss)
    assert (parts._kept is None) == (budget == 0)


@pytest.mark.parametrize("budget", [None, 0])
def test_shuffled_loader_is_one_batch(budget):
    torch.manual_seed(0)
    model, data = small_mlp(), regression(7)
    own = torch.Generator().manual_seed(3)
    before = own.get_state()
    for generator in (None, own):
        loader = DataLoader(TensorDataset(*data), batch_size=3, shuffle=True, generator=generator)
        operator = HessianOperator(model, nn.MSELoss(), loader, memory_budget=budget)
        whole = HessianOperator(model, nn.MSELoss(), data)
        state = torch.get_rng_state()
        torch.testing.assert_close(operator.dense(), whole.dense(), rtol=1e-12, atol=1e-13)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, own.get_state())


def test_a_batch_is_rebuilt_once_per_block_and_not_per_vector():
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return (outputs - targets).square().mean()

    data = pieces(regression(7))
    operator = HessianOperator(small_mlp(), loss_fn, data, memory_budget=0)
    operator @ torch.zeros(operator.shape[0])
    calls.clear()
    operator @ torch.randn(operator.shape[0], 9).double()
    assert len(calls) == len(data)


def test_one_graph_at_a_time_where_they_are_not_kept():
    class Token:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            living.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        counts.append(sum(token() is not None for token in living))
        return (Marked.apply(outputs) - targets).square().mean()

    living, counts = [], []
    data = pieces(regression(7))
    operator = HessianOperator(small_mlp(), loss_fn, data, memory_budget=0)
    operator @ torch.randn(operator.shape[0], 5).double()
    assert operator.loss > 0
    assert not any(counts)
    counts.clear()
    operator = HessianOperator(small_mlp(), loss_fn, data)
    operator @ torch.randn(operator.shape[0]).double()
    # A first pass drops its graphs, the second keeps them; the rest are checks, one at a time.
    assert counts[:6] == [0, 0, 0, 0, 1, 2]
    assert set(counts[6:]) == {3}


def test_own_weights_replace_the_batch_size():
    torch.manual_seed(0)
    model, data = small_mlp(), pieces(regression(7))
    plain = [HessianOperator(model, nn.MSELoss(), batch).dense() for batch in data]
    weights = [1.0, 0.5, 3.0]
    lookup = {id(x): w for (x, _), w in zip(data, weights, strict=True)}
    operator = HessianOperator(
        model, nn.MSELoss(), data, batch_size_fn=lambda batch: lookup[id(batch[0])]
    )
    expected = sum(w * h for w, h in zip(weights, plain, strict=True)) / sum(weights)
    torch.testing.assert_close(operator.dense(), expected)


def test_two_tensors_in_a_list_are_one_batch():
    data = regression()
    model = small_mlp()
    as_list = HessianOperator(model, nn.MSELoss(), list(data))
    as_tuple = HessianOperator(model, nn.MSELoss(), data)
    torch.testing.assert_close(as_list.dense(), as_tuple.dense(), rtol=0, atol=0)


# The free form, batch -> loss.


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def named_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self((batch["x"], batch["y"]))


def test_callables_that_return_their_loss():
    torch.manual_seed(0)
    owner, (x, y) = OwnLoss(), regression()
    net = owner.net
    expected = HessianOperator(net, nn.MSELoss(), (x, y)).dense()
    forms = [
        HessianOperator(owner, None, (x, y)),
        HessianOperator(owner.named_loss, None, {"x": x, "y": y}),
        HessianOperator(
            owner.named_loss, None, [{"x": x[:2], "y": y[:2]}, {"x": x[2:], "y": y[2:]}]
        ),
        HessianOperator(lambda batch: (net(x) - y).square().mean(), None, x),
        HessianOperator(lambda batch, m=net: (m(x) - y).square().mean(), None, None),
        HessianOperator(lambda batch: owner(batch), None, [(x, y)], params=owner),
    ]
    for operator in forms:
        torch.testing.assert_close(operator.dense(), expected, rtol=1e-12, atol=1e-13)
    assert forms[0].parameter_names[0] == "net.0.weight"
    assert forms[3].parameter_names == tuple(name for name, _ in net.named_parameters())


def test_plain_tensors_as_parameters_of_a_function():
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    operator = HessianOperator(
        lambda scale: scale * (weights**3).sum(), None, torch.tensor(2.0), weights
    )
    torch.testing.assert_close(operator.dense(), torch.diag(torch.tensor([12.0, 24.0])))


# Jacobians.


def test_jacobian_is_the_reference(problem):
    inputs, _ = problem.batch
    if not isinstance(inputs, Tensor) or not inputs.dtype.is_floating_point:
        pytest.skip("needs one floating-point input")
    operator = JacobianOperator(problem.model, inputs)
    leaf = inputs.clone().requires_grad_()
    problem.batch = (leaf, None)
    outputs = outputs_of(problem)
    expected = torch.stack(
        [
            torch.autograd.grad(entry, leaf, retain_graph=True)[0].reshape(-1)
            for entry in outputs.reshape(-1)
        ]
    )
    bound = tolerance(problem)
    torch.testing.assert_close(operator.dense(), expected, rtol=bound, atol=bound)
    block = torch.randn(operator.shape[0], 5, dtype=operator.dtype)
    torch.testing.assert_close(operator.rmatvec(block), expected.T @ block, rtol=bound, atol=bound)
    assert operator.num_matvecs == operator.shape[1] + 5


def test_jacobian_of_several_inputs_and_outputs():
    a, b, index = torch.randn(2).double(), torch.randn(3).double(), torch.tensor([0, 1])

    def function(a: Tensor, b: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return b[index] * a.relu_(), index, a.sum() ** 2 * torch.ones(1).double()

    operator = JacobianOperator(function, (a, b, index))
    expected = torch.cat(
        [
            torch.cat(
                torch.autograd.functional.jacobian(
                    lambda p, q, i=i: function(p.clone(), q, index)[i], (a, b)
                ),
                dim=1,
            )
            for i in (0, 2)
        ]
    )
    torch.testing.assert_close(operator.dense(), expected)
    keyed = JacobianOperator(function, {"a": a, "b": b, "index": index})
    torch.testing.assert_close(keyed.dense(), expected)


# What surrounds products.


def test_scipy_finds_the_extreme_eigenvalues(mlp_problem):
    operator = build(HessianOperator, mlp_problem)
    expected = torch.linalg.eigvalsh(operator.dense())
    found = eigsh(operator.to_scipy(), k=2, which="BE", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), expected[[0, -1]].numpy(), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, bound, mlp_problem):
    expected = dense_hessian(mlp_problem)
    mlp_problem.model.to(dtype)
    mlp_problem.batch = tuple(t.to(dtype) for t in mlp_problem.batch)
    operator = build(HessianOperator, mlp_problem)
    matrix = operator.dense()
    assert matrix.dtype == dtype
    torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=bound)


def test_unflatten_and_flatten_are_inverse(problem):
    operator = build(HessianOperator, problem)
    n = operator.shape[0]
    for vector in (torch.randn(n, dtype=operator.dtype), torch.randn(n, 3, dtype=operator.dtype)):
        parts = operator.unflatten(vector)
        assert tuple(parts) == operator.parameter_names
        assert torch.equal(operator.flatten(dict(reversed(parts.items()))), vector)
    owned = dict(problem.model.named_parameters())
    assert all(parts[name].shape == (*owned[name].shape, 3) for name in parts)
    with pytest.raises(ShapeError, match="missing"):
        operator.flatten({})
    with pytest.raises(ShapeError, match="shape"):
        operator.flatten({name: torch.zeros(1, 9, 9) for name in parts})
    with pytest.raises(ShapeError, match="Expected a tensor"):
        operator.unflatten(torch.zeros(n + 1))


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("budget", [None, 0])
def test_product_follows_an_optimizer_step(kind, budget, mlp_problem):
    data = [mlp_problem.batch, mlp_problem.batch]
    operator = kind(mlp_problem.model, mlp_problem.loss_fn, data, memory_budget=budget)
    before, loss = operator.dense(), operator.loss
    optimizer = torch.optim.SGD(mlp_problem.model.parameters(), lr=0.5)
    mlp_problem.loss_fn(outputs_of(mlp_problem), mlp_problem.batch[1]).backward()
    optimizer.step()
    after = operator.dense()
    assert not torch.allclose(before, after)
    assert operator.loss < loss
    torch.testing.assert_close(after, dict(LOSS_OPERATORS)[kind](mlp_problem))


def test_product_follows_new_buffers_and_new_storage():
    torch.manual_seed(0)
    model = small_mlp(nn.BatchNorm1d(4)).eval()
    problem = Problem(model, nn.MSELoss(), regression())
    operator = build(HessianOperator, problem)
    model[1].running_mean.add_(1)
    torch.testing.assert_close(operator.dense(), dense_hessian(problem))
    model[0].weight.data = torch.randn(4, 3).double()
    torch.testing.assert_close(operator.dense(), dense_hessian(problem))
    jacobian = JacobianOperator(model, problem.batch[0])
    old = jacobian.dense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.allclose(old, jacobian.dense())


@pytest.mark.parametrize("budget", [None, 0])
def test_replaced_or_converted_parameters_need_a_new_operator(budget, mlp_problem):
    model, data = mlp_problem.model, [mlp_problem.batch] * 2
    operators = [
        HessianOperator(model, nn.MSELoss(), data, params, memory_budget=budget)
        for params in ("0.*", "2.*")
    ]
    vectors = [torch.ones(operator.shape[0]) for operator in operators]
    model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight))
    operators[0] @ vectors[0]
    with pytest.raises(ParameterSelectionError, match=r"2\.weight\. Make a new operator"):
        operators[1] @ vectors[1]
    model.float()
    with pytest.raises(ParameterSelectionError, match=r"0\.weight, 0\.bias"):
        operators[0] @ vectors[0]


def test_graph_is_not_rebuilt_without_a_reason(mlp_problem):
    calls = []
    mlp_problem.model.register_forward_hook(lambda *_: calls.append(1))
    operator = build(HessianOperator, mlp_problem)
    calls.clear()
    operator @ torch.randn(operator.shape[0], 8)
    assert operator.loss
    operator.gradient()
    assert not calls
    operator.refresh()
    operator @ torch.randn(operator.shape[0])
    assert len(calls) == 1


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_no_reference_cycle_keeps_the_graph(kind, batches, mlp_problem):
    operator = kind(mlp_problem.model, mlp_problem.loss_fn, [mlp_problem.batch] * batches)
    operator @ torch.randn(operator.shape[0], 5)
    gc.collect()
    gc.disable()
    try:
        graphs = [weakref.ref(graph) for graph, _ in operator._kept]
        alive = weakref.ref(operator)
        del operator
        assert alive() is None
        assert [graph() for graph in graphs] == [None] * batches
    finally:
        gc.enable()


def test_products_under_inference_mode_and_no_grad(mlp_problem):
    expected = dense_hessian(mlp_problem)
    with torch.inference_mode():
        mlp_problem.batch = tuple(t + 0 for t in mlp_problem.batch)
        operator = build(HessianOperator, mlp_problem)
        torch.testing.assert_close(operator.dense(), expected)
    with torch.no_grad():
        torch.testing.assert_close(operator.dense(), expected)
        operator.refresh()
        torch.testing.assert_close(operator @ torch.eye(len(expected)).double(), expected)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    splits=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    columns=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_symmetric_linear_and_additive_for_any_network(widths, splits, columns, seed):
    torch.manual_seed(seed)
    layers = [
        layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())
    ]
    model = nn.Sequential(*layers).double()
    x = torch.randn(sum(splits), widths[0]).double()
    y = torch.randn(sum(splits), widths[-1]).double()
    batches = list(zip(x.split(splits), y.split(splits), strict=True))
    operator = HessianOperator(model, nn.MSELoss(), batches)
    whole = HessianOperator(model, nn.MSELoss(), (x, y), check=False)
    n = operator.shape[0]
    u, v = torch.randn(2, n, columns).double().unbind()
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(u.T @ (operator @ v), (operator @ u).T @ v, **close)
    torch.testing.assert_close(operator @ (2 * u + v), 2 * (operator @ u) + operator @ v, **close)
    torch.testing.assert_close(operator @ v, whole @ v, **close)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_on_cuda(kind, problem):
    expected = dict(LOSS_OPERATORS)[kind](problem)
    problem.model.cuda()  # the batch stays on the host and is moved
    operator = build(kind, problem)
    state = torch.cuda.get_rng_state()
    bound = max(1e-10, tolerance(problem))
    torch.testing.assert_close(operator.dense().cpu(), expected, rtol=bound, atol=bound)
    assert operator.device.type == "cuda"
    assert torch.equal(state, torch.cuda.get_rng_state())


@dataclasses.dataclass
class Outputs:
    """Outputs as some libraries return them."""

    logits: torch.Tensor
    hidden: torch.Tensor


class WithDataclass(nn.Module):
    """A linear model whose outputs are a dataclass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return Outputs(self.layer(x), x)


def test_outputs_in_a_dataclass_are_taken():
    torch.manual_seed(0)
    model, x, y = WithDataclass(), torch.randn(6, 3).double(), torch.randn(6, 2).double()

    def loss_fn(outputs, targets):
        return ((outputs.logits - targets) ** 2).mean()

    hessian = HessianOperator(model, loss_fn, (x, y)).dense()
    gauss_newton = GaussNewtonOperator(model, loss_fn, (x, y)).dense()
    assert torch.allclose(hessian, gauss_newton, atol=1e-12)  # the model is linear
    assert JacobianOperator(model, x).shape == (12 + 18, 18)
