"""Options of the Jacobian: by which inputs, of which outputs, and batch statistics."""

from __future__ import annotations

import pytest
import torch
from conftest import Snapshot
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conditioning import errors
from conditioning.operators import JacobianOperator


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reference(function, *arguments):
    """Dense Jacobian of one tensor by several, side by side, from autograd."""
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.functional.jacobian(function, arguments)
    parts = zip(found, arguments, strict=True)
    return torch.cat([part.reshape(-1, argument.numel()) for part, argument in parts], dim=1)


class TwoStreams(nn.Module):
    """Takes two streams and a mask, changes one in place, returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3).double()

    def forward(self, x: Tensor, *, mask: Tensor, extra: Tensor) -> tuple[Tensor, None, Tensor]:
        extra.mul_(2)
        return torch.tanh(self.mix(x)) * mask + x * extra, None, extra.sum() * x


@pytest.fixture
def streams():
    x, extra = torch.randn(2, 4, 3).double().unbind()
    arguments = {"x": x, "mask": (torch.rand(4, 3) > 0.3).double(), "extra": extra}
    return TwoStreams(), arguments


def test_by_default_everything_is_differentiated_by_everything(streams):
    module, arguments = streams
    assert JacobianOperator(module, arguments).shape == (24, 36)


@pytest.mark.parametrize("wrt", [0, 2, [0, 2], (2, 0), range(3)])
@pytest.mark.parametrize("outputs", [0, 1])
def test_selected_inputs_and_outputs_match_autograd(streams, wrt, outputs):
    module, arguments = streams
    chosen = [wrt] if isinstance(wrt, int) else sorted(wrt)
    names = [list(arguments)[i] for i in chosen]

    def function(*values: Tensor) -> Tensor:
        given = arguments | dict(zip(names, values, strict=True))
        copies = {name: value.clone() for name, value in given.items()}
        return [t for t in module(**copies) if t is not None][outputs]

    before = {name: value.clone() for name, value in arguments.items()}
    operator = JacobianOperator(module, arguments, wrt=wrt, outputs=outputs)
    expected = reference(function, *[arguments[name] for name in names])
    torch.testing.assert_close(operator.dense(), expected)
    vector = torch.randn(operator.shape[0]).double()
    torch.testing.assert_close(operator.rmatvec(vector), expected.T @ vector)
    # Constants that the module changes in place are as they were, for every evaluation.
    operator.refresh()
    torch.testing.assert_close(operator.dense(), expected)
    assert all(torch.equal(before[name], arguments[name]) for name in arguments)


def test_a_transformer_layer_is_differentiated_by_its_stream_alone():
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True).double().eval()
    x, memory = torch.randn(2, 4, 8).double(), torch.randn(2, 5, 8).double()
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)

    def function(tgt: Tensor, memory: Tensor, tgt_mask: Tensor) -> Tensor:
        return layer(tgt, memory, tgt_mask=tgt_mask)

    operator = JacobianOperator(function, (x, memory, mask), wrt=0)
    expected = reference(lambda x: layer(x, memory, tgt_mask=mask), x)
    assert operator.shape == (64, 64)
    torch.testing.assert_close(operator.dense(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"wrt": 3}, {"wrt": -1}, {"wrt": []}, {"wrt": [0, 0]}, {"wrt": "x"}, {"wrt": 0.5},
        {"outputs": 2}, {"outputs": ()}, {"outputs": [0, None]},
    ],
)  # fmt: skip
def test_a_choice_of_what_there_is_not_is_refused(streams, options):
    name = next(iter(options))
    with pytest.raises(errors.InvalidArgumentError, match=name):
        JacobianOperator(*streams, **options)


def test_outputs_that_depend_on_parameters_alone_are_no_jacobian(streams):
    module, arguments = streams
    with pytest.raises(errors.LossWithoutGraphError, match="do not depend"):
        JacobianOperator(module, arguments, wrt=1, outputs=1)  # it does not see the mask
    constant = nn.Parameter(torch.ones(2))
    with pytest.raises(errors.LossWithoutGraphError, match="do not depend"):
        JacobianOperator(lambda x: x.detach() * constant, torch.ones(2))


# Batch statistics.


def normalised(kind):
    size = {nn.BatchNorm1d: (6, 4), nn.BatchNorm2d: (3, 4, 2, 2), nn.InstanceNorm2d: (3, 4, 2, 2)}
    norm = kind(4, affine=True, track_running_stats=True)
    linear = nn.Linear(4, 4) if kind is nn.BatchNorm1d else nn.Conv2d(4, 4, 1)
    model = nn.Sequential(linear, norm, nn.Tanh()).double()
    return model, torch.randn(size[kind]).double()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d])
def test_batch_statistics_give_the_jacobian_of_the_whole_batch(kind):
    model, x = normalised(kind)
    before = Snapshot(model)
    operator = JacobianOperator(model, x, batch_statistics=True)
    matrix = operator.dense()
    before.assert_unchanged()
    torch.testing.assert_close(matrix, reference(model, x))
    blocks = matrix.reshape(len(x), -1, len(x), x[0].numel())
    couples = bool((blocks[0, :, 1].abs() > 1e-6).any())
    assert couples == (kind is not nn.InstanceNorm2d)
    # In evaluation mode the option changes nothing.
    model.eval()
    torch.testing.assert_close(
        JacobianOperator(model, x, batch_statistics=True).dense(),
        JacobianOperator(model, x).dense(),
    )


def test_without_the_option_normalisation_in_training_mode_is_refused():
    with pytest.raises(errors.BatchNormTrainingError, match="BatchNorm1d"):
        JacobianOperator(*normalised(nn.BatchNorm1d))


def test_batch_statistics_do_not_allow_randomness():
    model, x = normalised(nn.BatchNorm1d)
    model.append(nn.Dropout())
    with pytest.raises(errors.RandomForwardError, match="Dropout"):
        JacobianOperator(model, x, batch_statistics=True)
