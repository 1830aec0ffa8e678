"""Bad models and data are refused by name, with a text that says what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import Apply, Snapshot, ZeroBranch, regression, small_mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from conditioning import errors
from conditioning.operators import GaussNewtonOperator, HessianOperator, JacobianOperator

MSE = nn.MSELoss()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class DetachedCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * slope


class OnceCube(DetachedCube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


class RightCube(DetachedCube):
    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


class SkewedProduct(torch.autograd.Function):
    """Its derivative by the first argument has a wrong derivative by the second."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, slope):
        x, y = ctx.saved_tensors
        return y.detach() * slope, x * slope


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool, stem: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3).double() if stem else nn.Identity()
        self.body = small_mlp()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x if x.requires_grad else x.clone().requires_grad_()
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Tokens(Dataset):
    def __getitem__(self, index):
        return torch.zeros(2), torch.zeros(1)

    def __len__(self):
        return 3


def compiled(thing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own imports use what it deprecates
        return torch.compile(thing, backend="eager")


def gated(model: nn.Module) -> nn.Sequential:
    return nn.Sequential(model, Apply(lambda x: SkewedProduct.apply(x[:, :1], x[:, 1:])))


def frozen() -> nn.Sequential:
    return small_mlp().requires_grad_(requires_grad=False)


def with_data(model: nn.Module, loss_fn=MSE, data=None, **options):
    return lambda kind: kind(model, loss_fn, regression() if data is None else data, **options)


OWN = torch.Generator()


def own_noise(x: Tensor) -> Tensor:
    return x + torch.randn(4, generator=OWN)


def nan_batch() -> tuple[Tensor, Tensor]:
    x, y = regression()
    return x * float("nan"), y


def root_of_zero(outputs: Tensor, _: Tensor) -> Tensor:
    return (outputs - outputs).square().sum().sqrt()


def noisy_batches():
    class Noisy(list):
        def __iter__(self):
            return iter([(x + torch.randn_like(x), y) for x, y in super().__iter__()])

    return Noisy([regression()])


def drops_last():
    loader = DataLoader(TensorDataset(*regression(7)), batch_size=3, shuffle=True, drop_last=True)
    return loader


REFUSED = {
    # name: (how to build, error, what the text says)
    "dropout": (
        lambda: with_data(small_mlp(nn.Dropout(0.1))),
        errors.RandomForwardError,
        r"1 \(Dropout\).*model\.eval\(\)",
    ),
    "dropout in a zero branch": (
        lambda: with_data(
            ZeroBranch(nn.Dropout(0.5)).double(), data=(torch.ones(4, 3).double(),) * 2
        ),
        errors.RandomForwardError,
        r"activation \(Dropout\)",
    ),
    "dropout between recurrent layers": (
        lambda: with_data(
            nn.GRU(3, 2, num_layers=2, dropout=0.3).double(),
            lambda outputs, targets: MSE(outputs[0], targets),
        ),
        errors.RandomForwardError,
        "GRU",
    ),
    "dropout in attention": (
        lambda: with_data(
            nn.TransformerEncoderLayer(3, 1, 4, dropout=0.2).double(), lambda o, _: o.square().sum()
        ),
        errors.RandomForwardError,
        r"self_attn \(MultiheadAttention\), dropout \(Dropout\)",
    ),
    "functional dropout": (
        lambda: with_data(small_mlp(Apply(lambda x: F.dropout(x, 0.5)))),
        errors.RandomForwardError,
        "F.dropout without",
    ),
    "noise of its own": (
        lambda: with_data(small_mlp(Apply(own_noise))),
        errors.RandomForwardError,
        "disagree",
    ),
    "augmenting data": (
        lambda: with_data(small_mlp(), data=noisy_batches()),
        errors.RandomForwardError,
        "augments",
    ),
    "loader that drops the last batch": (
        lambda: with_data(small_mlp(), data=drops_last()),
        errors.RandomForwardError,
        "drop_last=True",
    ),
    "batch norm": (
        lambda: with_data(small_mlp(nn.BatchNorm1d(4), nn.Dropout())),
        errors.BatchNormTrainingError,
        r"1 \(BatchNorm1d\).*model\.eval\(\).*2 \(Dropout\)",
    ),
    "instance norm": (
        lambda: with_data(
            nn.Sequential(
                nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
            ).double(),
            lambda outputs, _: outputs.pow(3).mean(),
        ),
        errors.BatchNormTrainingError,
        "InstanceNorm1d",
    ),
    "compiled module": (
        lambda: with_data(compiled(small_mlp())),
        errors.CompiledModelError,
        "_orig_mod",
    ),
    "part compiled in place": (
        lambda: with_data(compiled_in_place()),
        errors.CompiledModelError,
        r"the module '0' \(module.compile\(\)\)",
    ),
    "compiled loss": (
        lambda: with_data(small_mlp(), compiled(F.mse_loss)),
        errors.CompiledModelError,
        "mse_loss",
    ),
    "no derivative": (
        lambda: with_data(small_mlp(), lambda o, t: torch.cdist(o, t, p=1.0).mean()),
        errors.DoubleBackwardError,
        "cdist",
    ),
    "once differentiable": (
        lambda: with_data(
            small_mlp(Apply(OnceCube.apply)), lambda o, t: OnceCube.apply(o - t).sum()
        ),
        errors.DoubleBackwardError,
        "once_differentiable.*OnceCube",
    ),
    "non-finite loss": (
        lambda: with_data(small_mlp(), data=nan_batch()),
        errors.NonFiniteError,
        "loss is nan",
    ),
    "non-finite gradient": (
        lambda: with_data(small_mlp(), root_of_zero),
        errors.NonFiniteError,
        "gradient is not finite, first for 0.weight",
    ),
    "detached loss": (
        lambda: with_data(small_mlp(), lambda o, t: MSE(o, t).detach()),
        errors.LossWithoutGraphError,
        "detach",
    ),
    "number": (
        lambda: with_data(small_mlp(), lambda o, t: MSE(o, t).item()),
        errors.NonScalarLossError,
        r"\.item\(\)",
    ),
    "vector": (
        lambda: with_data(small_mlp(), nn.MSELoss(reduction="none")),
        errors.NonScalarLossError,
        r"shape \(6, 2\)",
    ),
    "complex": (
        lambda: with_data(small_mlp(), lambda o, _: (o * 1j).sum()),
        errors.NonScalarLossError,
        "complex",
    ),
    "frozen model": (
        lambda: with_data(frozen()),
        errors.NoTrainableParametersError,
        "requires_grad_",
    ),
    "no parameters": (
        lambda: with_data(nn.Tanh()),
        errors.NoTrainableParametersError,
        "no parameters",
    ),
    "one-shot data": (
        lambda: with_data(small_mlp(), data=iter([regression()])),
        errors.OneShotDataError,
        r"list\(data\)",
    ),
    "bare dataset": (
        lambda: with_data(small_mlp(), data=Tokens()),
        errors.BatchFormatError,
        "DataLoader",
    ),
    "inputs only": (
        lambda: with_data(small_mlp(), data=torch.zeros(2, 3)),
        errors.BatchFormatError,
        r"\(inputs, None\)",
    ),
    "three in a batch": (
        lambda: with_data(small_mlp(), data=[(1, 2, 3)]),
        errors.BatchFormatError,
        "length 3.*loss_fn=None",
    ),
    "no sample": (
        lambda: with_data(small_mlp(), data=regression(0)),
        errors.EmptyDataError,
        "no sample",
    ),
    "no size": (
        lambda: with_data(
            small_mlp(), lambda o, _: o.sum(), [(torch.zeros(3).double()[0], None)] * 2
        ),
        Exception,
        "batch_size_fn",
    ),
    "bad size": (
        lambda: with_data(small_mlp(), batch_size_fn=lambda _: 0),
        errors.InvalidArgumentError,
        "positive",
    ),
    "other dtype": (
        lambda: with_data(small_mlp().float()),
        errors.MixedDtypesError,
        r"torch.float64, the parameters are torch.float32.*inputs\.to",
    ),
    "reduction": (
        lambda: with_data(small_mlp(), reduction="none"),
        errors.InvalidArgumentError,
        "'mean' or 'sum'",
    ),
    "model": (
        lambda: with_data("resnet"),
        errors.InvalidArgumentError,
        "model should be callable",
    ),
    "budget": (
        lambda: with_data(small_mlp(), memory_budget=-1),
        errors.InvalidArgumentError,
        "bytes",
    ),
}


def compiled_in_place() -> nn.Sequential:
    model = small_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0].compile(backend="eager")
    return model


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(name, kind):
    make, error, text = REFUSED[name]
    build = make()
    with pytest.raises(error, match=f"(?s){text}"):
        build(kind)


def test_empty_data_is_refused():
    for data in ([], DataLoader(TensorDataset(*regression(2)), batch_size=3, drop_last=True)):
        with pytest.raises(errors.EmptyDataError, match="no batch"):
            HessianOperator(small_mlp(), MSE, data)


@pytest.mark.parametrize("stem", [True, False])
def test_reentrant_checkpoint_is_refused_and_the_other_kind_works(stem):
    with pytest.raises(errors.DoubleBackwardError, match="use_reentrant=False"):
        HessianOperator(Checkpointed(reentrant=True, stem=stem), MSE, regression())
    model, data = Checkpointed(reentrant=False, stem=False), regression()
    expected = HessianOperator(model.body, MSE, data).dense()
    torch.testing.assert_close(HessianOperator(model, MSE, data).dense(), expected)


def test_detaching_backwards_are_refused():
    with pytest.raises(errors.AsymmetricOperatorError, match="custom autograd.Function"):
        HessianOperator(gated(small_mlp()), lambda o, _: o.sum(), regression())
    # These lose a term that is symmetric by itself: only differences of the gradient show it.
    for model in (small_mlp(Apply(DetachedCube.apply)), nn.Linear(3, 1).double()):
        with pytest.raises(errors.DoubleBackwardError, match="DetachedCube"):
            HessianOperator(model, lambda o, _: DetachedCube.apply(o).sum(), regression())


def test_a_wrong_second_derivative_in_torch_itself_is_refused():
    # In torch 2.13 autograd takes the norms that weight_norm computes for constants.
    model = small_mlp(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4).double()))
    data = regression()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(MSE(model(data[0]), data[1]), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    matrix = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    if torch.allclose(matrix, matrix.T):
        pytest.skip("this version of torch has it right")
    with pytest.raises(errors.AsymmetricOperatorError, match="weight_norm"):
        HessianOperator(model, MSE, data)


def test_spectral_norm_in_evaluation_mode_is_accepted():
    norm = nn.utils.parametrizations.spectral_norm
    model = small_mlp(norm(nn.Linear(4, 4).double())).eval()
    data = regression()
    before = Snapshot(model)
    matrix = HessianOperator(model, MSE, data).dense()
    torch.testing.assert_close(matrix, matrix.T)
    before.assert_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_right_custom_function_is_accepted(dtype):
    model = small_mlp(Apply(RightCube.apply)).to(dtype)
    data = tuple(t.to(dtype) for t in regression())
    operator = HessianOperator(model, MSE, data)
    plain = nn.Sequential(model[0], Apply(lambda x: x**3), *model[2:])
    torch.testing.assert_close(operator.dense(), HessianOperator(plain, MSE, data).dense())
    assert GaussNewtonOperator(model, lambda o, _: RightCube.apply(o).sum(), data).loss


def test_errors_of_the_model_pass_unchanged():
    data = (regression()[0], torch.full((6,), 9))
    with pytest.raises(IndexError, match="out of bounds"):
        HessianOperator(small_mlp(), nn.CrossEntropyLoss(), data)
    with pytest.raises(KeyError, match="mine"):
        HessianOperator(lambda batch: {}["mine"], None, data, params=small_mlp())
    with pytest.raises(errors.MixedDtypesError) as caught:
        HessianOperator(small_mlp().float(), MSE, regression())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_unused_parameters_are_named_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)}).double()
    with pytest.warns(errors.UnusedParameterWarning, match=r"b\.weight, b\.bias") as caught:
        operator = HessianOperator(
            lambda batch: MSE(model["a"](batch[0]), batch[1]), None, regression(), model
        )
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not operator.dense()[8:].any()
    with pytest.raises(errors.LossWithoutGraphError, match="influences the loss"):
        HessianOperator(
            lambda batch: MSE(model["a"](batch[0]), batch[1]), None, regression(), model["b"]
        )


def test_mixed_dtypes_are_named():
    model = nn.Sequential(nn.Linear(3, 4), Apply(lambda x: x.double()), nn.Linear(4, 2).double())
    data = regression()[0].float(), regression()[1]
    with pytest.warns(errors.MixedDtypeWarning, match=r"torch.float32, torch.float64") as caught:
        assert HessianOperator(model, MSE, data).dtype == torch.float64
    assert caught[0].filename == __file__


# The Jacobian.


@pytest.mark.parametrize(
    ("module", "error", "text"),
    [
        (nn.Dropout(), errors.RandomForwardError, "Dropout"),
        (nn.BatchNorm1d(3), errors.BatchNormTrainingError, "BatchNorm1d"),
        (lambda x: x.detach(), errors.LossWithoutGraphError, "depend"),
        (lambda x: x.shape, errors.BatchFormatError, "outputs"),
        (lambda x: x / 0, errors.NonFiniteError, "NaN"),
        (nn.Linear(3, 2).double(), errors.MixedDtypesError, "float64"),
        (OnceCube.apply, errors.DoubleBackwardError, "once_differentiable"),
        (compiled(nn.Linear(3, 2)), errors.CompiledModelError, "_orig_mod"),
    ],
)
def test_jacobian_refuses_by_name(module, error, text):
    state = torch.get_rng_state()
    with pytest.raises(error, match=text):
        JacobianOperator(module, torch.ones(4, 3))
    assert torch.equal(state, torch.get_rng_state())


def test_jacobian_needs_floating_point_inputs():
    with pytest.raises(errors.BatchFormatError, match="inputs"):
        JacobianOperator(nn.Embedding(3, 2), torch.ones(4, 3).long())


def test_a_sparse_gradient_is_named_with_its_cure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2)).double()
    batch = (torch.randint(7, (5, 3)), torch.randint(2, (5,)))
    with pytest.raises(
        errors.UnsupportedParameterError, match=r"0\.weight is sparse.*sparse=False"
    ):
        HessianOperator(model, nn.CrossEntropyLoss(), batch)
    model[0].sparse = False
    assert HessianOperator(model, nn.CrossEntropyLoss(), batch).shape == (54, 54)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda x, y: {"data": (x.numpy(), y.numpy())}, errors.BatchFormatError, "from_numpy"),
        (lambda x, y: {"data": ((x, y), (x, y))}, errors.BatchFormatError, "list of them"),
        (lambda x, y: {"loss_fn": nn.MSELoss}, errors.InvalidArgumentError, r"MSELoss\(\)"),
        (lambda x, y: {"params": 5}, errors.ParameterSelectionError, "name patterns"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments, error, text):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.randn(6, 2)
    fine = {"loss_fn": nn.MSELoss(), "data": (x, y)}
    with pytest.raises(error, match=text):
        HessianOperator(model, **{**fine, **arguments(x, y)})
