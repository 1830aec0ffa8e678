"""Jacobians of blocks: enclosures against dense values, what a block is given, bad input."""

from __future__ import annotations

import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import Apply, Snapshot
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from conditioning import errors
from conditioning.blocks import find_blocks
from conditioning.blocks.jacobians import block_jacobians


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class PreActivation(nn.Module):
    """Two convolutions with BN before them; a projection where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(x), inplace=self.project is not None)
        skip = x if self.project is None else self.project(hidden)
        return skip + self.conv2(functional.relu(self.norm2(self.conv1(hidden))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.blocks = nn.ModuleList(
            [PreActivation(3, 3), PreActivation(3, 6, 2), PreActivation(6, 6)]
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def resnet(training):
    model = ResNet().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.train(training), torch.randn(3, 2, 6, 6).double()


def encoder(norm_first=True, **options):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    return model, torch.randn(2, 4, 8).double()


def mlp():
    layers = [nn.Linear(5, 9), nn.ReLU(inplace=True), nn.Linear(9, 9), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(9, 3)).double(), torch.randn(6, 5).double()


MODELS = {
    "resnet, batch statistics": lambda: resnet(True),
    "resnet, running statistics": lambda: resnet(False),
    "transformer": encoder,
    "transformer, norms after": lambda: encoder(norm_first=False),
    "mlp": mlp,
}


def inputs_and_functions(model, x, blocks):
    """What every block gets in a plain forward pass, and what it computes, by other means."""
    seen = {}
    handles = [
        block.module.register_forward_pre_hook(
            lambda _, args, name=block.name: seen.update({name: args[0].detach().clone()})
        )
        for block in blocks
    ]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(x.clone())
    model.load_state_dict(state)
    for handle in handles:
        handle.remove()
    for block in blocks:

        def function(value, parts=block.parts):
            value = value.clone()
            for part in parts:
                value = part(value)
            return value

        yield block, seen[block.name], function


@pytest.mark.parametrize("name", MODELS)
def test_every_enclosure_contains_the_dense_value(name, capsys):
    model, x = MODELS[name]()
    blocks = find_blocks(model, x)
    before = Snapshot(model)
    found = block_jacobians(model, x)
    before.assert_unchanged()
    assert [block.name for block in found] == list(blocks.names)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    enclosures = 0
    for result, (block, value, function) in zip(
        found, inputs_and_functions(model, x, blocks), strict=True
    ):
        with sdpa_kernel(SDPBackend.MATH):
            matrix = torch.autograd.functional.jacobian(function, value)
        model.load_state_dict(state)
        matrix = matrix.reshape(-1, value.numel())
        values = torch.linalg.svdvals(matrix)
        largest, smallest = float(values[0]), float(values[-1])
        assert result.shape == tuple(matrix.shape)
        assert result.kind == block.kind
        expected = [
            (result.largest, largest),
            (result.smallest, smallest),
            (result.delta, max(largest - 1, 1 - smallest)),
        ]
        if function(value).shape == value.shape:
            identity = torch.eye(len(matrix), dtype=matrix.dtype)
            expected.append((result.branch, float(torch.linalg.matrix_norm(matrix - identity, 2))))
        else:
            assert result.branch is None
        for estimate, truth in expected:
            assert estimate.low - 1e-13 <= truth <= estimate.high + 1e-13
            assert estimate.high - estimate.low <= 0.0101 * max(truth, 1)
            enclosures += 1
        gradients = torch.randn(len(matrix), 20).double()
        ratios = (matrix.T @ gradients).norm(dim=0) / gradients.norm(dim=0)
        low, high = result.ratio_bounds
        assert low <= float(ratios.min())
        assert float(ratios.max()) <= high
    with capsys.disabled():
        print(f"\n  {name}: {enclosures} enclosures hold, {found.num_matvecs} products")


def test_the_theory_holds_on_measured_blocks():
    for training in (True, False):
        for block in block_jacobians(*resnet(training)):
            if block.branch is not None:
                assert block.delta.low <= block.branch.high


# ------------------------------------------------------------------- what a block is given


class Layer(nn.Module):
    """Takes a mask first, and positions by keyword; returns a tuple with its weights first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, mask: Tensor, hidden: Tensor, *, positions: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden + torch.tanh(self.linear(hidden + positions)) * mask.detach()
        return hidden, positions.sum() * hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        mask, positions = (x > 0).to(x.dtype).mean(1, keepdim=True), torch.cos(x)
        for layer in self.layers:
            x, _ = layer(mask, x, positions=positions)
        return x


def test_the_stream_is_the_first_tensor_that_the_output_depends_on():
    model, x = Model().double(), torch.randn(4, 6).double()
    found = block_jacobians(model, x, "layers.*")
    assert [block.name for block in found] == ["layers.0", "layers.1"]
    mask, positions = (x > 0).double().mean(1, keepdim=True), torch.cos(x)
    matrix = torch.autograd.functional.jacobian(
        lambda hidden: model.layers[0](mask, hidden, positions=positions)[0], x
    ).reshape(24, 24)
    # The mask is detached in the layer: its first tensor is no stream.
    values = torch.linalg.svdvals(matrix)
    assert float(values[0]) in found[0].largest
    assert float(values[-1]) in found[0].smallest
    branch = torch.linalg.matrix_norm(matrix - torch.eye(24).double(), 2)
    assert float(branch) in found[0].branch


class Gated(nn.Module):
    """A stream that is not the first tensor, in or out; both inputs have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, mask: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return mask * 3, hidden + mask * torch.tanh(self.linear(hidden))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_the_stream_is_where_the_skip_was_seen(by_keyword):
    parts = [Gated(), Gated()]

    mask = torch.randn(2, 6).double()

    def run(given: tuple[Tensor, Tensor]) -> Tensor:
        mask, x = given
        for part in parts:
            x = (part(mask=mask, hidden=x) if by_keyword else part(mask, x))[1]
        return x

    model, x = Apply(run, *parts).double(), torch.randn(2, 6).double()
    blocks = find_blocks(model, ((mask, x),))
    assert [(b.kind, b.input_index, b.output_index) for b in blocks] == [("identity", 1, 1)] * 2
    found = block_jacobians(model, ((mask, x),), blocks)
    for part, block in zip(parts, found, strict=True):
        matrix = torch.autograd.functional.jacobian(
            lambda hidden, part=part: part(mask, hidden)[1], x
        ).reshape(12, 12)
        assert float(torch.linalg.matrix_norm(matrix, 2)) in block.largest
        assert float(torch.linalg.matrix_norm(matrix - torch.eye(12).double(), 2)) in block.branch
        x = part(mask, x)[1].detach()


def test_without_a_measurement_a_tensor_of_the_outputs_shape_is_the_stream():
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.linear = nn.Linear(2, 6), nn.Linear(6, 6)

        def forward(self, time: Tensor, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x) + self.time(time))

    model, inputs = Timed().double(), (torch.randn(3, 2).double(), torch.randn(3, 6).double())
    matrix = torch.autograd.functional.jacobian(lambda x: model(inputs[0], x), inputs[1])
    largest = torch.linalg.matrix_norm(matrix.reshape(18, 18), 2)
    for blocks in (find_blocks(model), find_blocks(model, inputs)):
        (found,) = block_jacobians(model, inputs, blocks[:1] if blocks.names == ("",) else "")
        assert found.shape == (18, 18)
        assert float(largest) in found.largest


def test_a_tensor_that_is_passed_several_times_is_differentiated_in_all_places():
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    model = Apply(lambda x: attention(x, x, value=x)[0], attention)
    x = torch.randn(2, 3, 4).double()
    (found,) = block_jacobians(model, x, attention)
    matrix = torch.autograd.functional.jacobian(model, x).reshape(24, 24)
    assert found.shape == (24, 24)
    assert float(torch.linalg.matrix_norm(matrix, 2)) in found.largest


def test_a_shared_block_has_one_entry_for_each_call():
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = Apply(lambda x: shared(shared(x)), shared).double()
    x = torch.randn(3, 4).double()
    found = block_jacobians(model, x, shared)
    assert [(block.call, block.label) for block in found] == [
        (0, "parts.0"),
        (1, "parts.0 (call 2)"),
    ]
    for block, value in zip(found, (x, shared(x).detach()), strict=True):
        matrix = torch.autograd.functional.jacobian(shared, value).reshape(12, 12)
        assert float(torch.linalg.matrix_norm(matrix, 2)) in block.largest
    assert found["parts.0"] is found[0]


def test_a_batch_of_independent_samples_has_the_extremes_over_them():
    model, x = mlp()
    whole = block_jacobians(model, x, "0-1", rtol=1e-6)[0]
    alone = [block_jacobians(model, row[None], "0-1", rtol=1e-6)[0] for row in x]
    assert whole.largest.value == pytest.approx(max(one.largest.value for one in alone), rel=1e-5)
    assert whole.smallest.value == pytest.approx(min(one.smallest.value for one in alone), abs=1e-5)


def test_a_branch_that_is_zero_is_the_identity_exactly():
    layers = [nn.Linear(40, 40) for _ in range(2)]
    for layer in layers:
        nn.init.zeros_(layer.weight)
    model = Apply(lambda x: layers[1](torch.relu(layers[0](x + layers[0](x)))) + x, *layers)
    found = block_jacobians(model, torch.randn(30, 40), "")
    assert found[0].delta.value < 1e-6
    assert found[0].delta.high < 0.01
    assert found[0].branch.value == 0
    assert found[0].num_matvecs < 30


def test_mixed_precision_inside_a_block_is_in_the_enclosure():
    model, x = mlp()
    exact = block_jacobians(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = block_jacobians(model.float(), x.float(), find_blocks(model, x.float()))
    for one, other in zip(exact, coarse, strict=True):
        assert other.largest.value == pytest.approx(one.largest.value, rel=0.05)


def test_wrapped_and_compiled_models_are_looked_through():
    model, x = encoder()
    plain = block_jacobians(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own imports use what it deprecates
        compiled = torch.compile(model, backend="eager")
    assert block_jacobians(compiled, x).to_dict() == plain.to_dict()


# ------------------------------------------------------------------------------ results


def test_results_print_convert_and_slice():
    model, x = mlp()
    found = block_jacobians(model, x)
    frame = found.to_frame()
    assert list(frame["block"]) == ["0-1", "2-3", "4"]
    assert list(frame["depth"]) == [0, 1, 2]
    for quantity in ("sigma_max", "sigma_min", "delta"):
        assert (frame[f"{quantity}_low"] <= frame[quantity]).all()
        assert (frame[quantity] <= frame[f"{quantity}_high"]).all()
    assert frame["branch"].isna().tolist() == [True, False, True]
    lines = str(found).splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:3] == ["block", "kind", "shape"]
    assert "|J - I| = " in str(found[1])
    assert len(found[1:]) == 2
    assert found["4"].shape == (18, 54)
    assert json.loads(json.dumps(found.to_dict()))["blocks"][0]["name"] == "0-1"
    with pytest.raises(KeyError):
        found["5"]


def test_a_budget_bounds_the_products_of_every_block():
    model, x = resnet(False)
    for limit, text in ((10, "max_matvecs ended the run"), (60, "wider than rtol")):
        found = block_jacobians(model, x, max_matvecs=limit)
        assert all(block.num_matvecs <= limit for block in found)
        assert text in found[0].message
    assert all(block.branch is None for block in block_jacobians(model, x, branch=False))


def test_a_bar_is_shown_for_many_blocks_on_a_terminal(capsys, monkeypatch):
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(5)])
    block_jacobians(model, torch.randn(2, 3))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    block_jacobians(model, torch.randn(2, 3), progress=False)
    assert capsys.readouterr().err == ""
    found = block_jacobians(model, torch.randn(2, 3))
    assert "Jacobians" in capsys.readouterr().err
    assert len(found) == 5


# ---------------------------------------------------------------------------- bad input


def test_dropout_is_refused_with_the_name_of_block_and_module():
    model, x = encoder()
    with pytest.raises(errors.RandomForwardError, match=r"In block 'layers\.0'.*dropout1"):
        block_jacobians(model.train(), x)


class Counting(nn.Module):
    """Returns something else at every call of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_block_that_keeps_state_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), Counting())
    with pytest.raises(errors.RandomForwardError, match="In block '1'"):
        block_jacobians(model, torch.ones(2, 3), "1")


def test_a_block_that_reads_more_than_its_arguments_is_refused():
    state = {}
    reader = Apply(lambda x: x * state.get("factor", 1))

    def whole(x: Tensor) -> Tensor:
        state["factor"] = 3
        result = reader(x)
        state.clear()
        return result

    with pytest.raises(errors.RandomForwardError, match="Called alone"):
        block_jacobians(Apply(whole, reader), torch.ones(2, 3), reader)


def test_blocks_without_a_jacobian_are_rows_that_say_why():
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.Linear(4, 4), Apply(lambda x: x.detach()), Apply(lambda x: x / 0)
    )
    found = block_jacobians(model, torch.tensor([[0, 1, 4]]), ["0", "1", "2", "3"])
    assert [block.status for block in found] == ["undefined", "exact", "undefined", "undefined"]
    assert "floating" in found[0].message
    assert "depend" in found[2].message
    assert "NaN or an infinity" in found[3].message
    assert math.isnan(found[0].delta.value)
    assert "undefined: " in str(found)
    assert np.isnan(found.to_frame()["sigma_max"].to_numpy()).tolist() == [True, False, True, True]


def test_blocks_that_match_nothing_or_do_not_run_are_refused():
    model, x = mlp()
    with pytest.raises(errors.BlockSelectionError):
        block_jacobians(model, x, "layer.*")
    unused = Apply(lambda x: x, nn.Linear(3, 3))
    with pytest.raises(errors.BlockSelectionError, match="None of the blocks ran"):
        block_jacobians(unused, torch.ones(2, 3), "parts.0")


@pytest.mark.parametrize(
    "options", [{"rtol": 0}, {"max_matvecs": 9}, {"max_matvecs": 50.0}, {"failure_probability": 1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(options))):
        block_jacobians(*mlp(), **options)
