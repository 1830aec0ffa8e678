"""One forward pass is recorded and leaves no trace, also when it fails."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from architectures import ZOO
from conftest import Snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conditioning.blocks import find_blocks, record_calls, select_blocks, split_blocks
from conditioning.errors import BatchFormatError, BlockSelectionError
from conditioning.operators.batches import call_with, tensors_in


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _hooks(model: nn.Module) -> list[list[tuple[str, int]]]:
    """What the modules hold beside parameters and buffers: attributes, and hooks by number."""
    return [
        [(key, len(value) if "hooks" in key else id(value)) for key, value in vars(module).items()]
        for module in model.modules()
    ]


FUNCTIONS = {
    "find_blocks": find_blocks,
    "select_blocks": lambda model, inputs: select_blocks(model, "*", inputs),
    "record_calls": lambda model, inputs: record_calls(model, inputs, select_blocks(model, "*")),
    "split_blocks": split_blocks,
}
WITHOUT = {
    "split_blocks": {"lstm", "plain_mlp", "vgg", "densenet", "unet", "autoencoder"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ZOO)
def test_the_model_is_left_as_it_was(name, function, training):
    model, inputs = ZOO[name]()
    model.train(training)
    outputs = tensors_in(call_with(model, inputs))
    sum(t.square().sum() for t in outputs[:1]).backward()  # gradients, and moved statistics
    given = [t.clone() for t in tensors_in(inputs)]
    before, hooks = Snapshot(model), _hooks(model)
    if name in WITHOUT.get(function, ()):
        with pytest.raises(BlockSelectionError):
            FUNCTIONS[function](model, inputs)
    else:
        FUNCTIONS[function](model, inputs)
    before.assert_unchanged()
    assert _hooks(model) == hooks
    assert all(torch.equal(a, b) for a, b in zip(given, tensors_in(inputs), strict=True))


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3))
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_failing_model_is_left_as_it_was_and_its_error_is_passed_on(function):
    model, inputs = Fails(), torch.randn(5, 3)
    before, hooks = Snapshot(model), _hooks(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        FUNCTIONS[function](model, inputs)
    before.assert_unchanged()
    assert _hooks(model) == hooks


@pytest.mark.parametrize("function", FUNCTIONS)
def test_training_under_autocast_goes_on_with_gradients(function):
    model, inputs = ZOO["residual_mlp"]()
    model, inputs = model.float(), inputs.float()
    with torch.autocast("cpu", torch.bfloat16):
        FUNCTIONS[function](model, inputs)
        # Casts of the weights are kept within the context: those made here have no graph.
        loss = model(inputs).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_gradient_mode_around_it_will_do(context):
    with context():
        model, inputs = ZOO["inplace_relu_first"]()
        assert len(find_blocks(model, inputs)) == 3
        assert len(split_blocks(model, inputs)) == 3
        calls = record_calls(model, inputs, find_blocks(model))
        assert len(calls) == 3
        assert not any(call.output.is_inference() for call in calls)


def test_tensors_made_under_inference_mode_are_taken():
    model, _ = ZOO["inplace_relu_first"]()
    with torch.inference_mode():
        inputs = torch.randn(2, 3, 8, 8).double()
    assert len(find_blocks(model, inputs)) == 3


def test_calls_hold_what_went_in_and_out():
    model, inputs = ZOO["residual_mlp"]()
    calls = record_calls(model, inputs, find_blocks(model))
    assert [call.block.name for call in calls] == [f"blocks.{i}" for i in range(4)]
    x = model.embed(inputs)
    for call in calls:
        assert torch.equal(call.args[0], x)
        x = call.block.module(x)
        assert torch.equal(call.output, x)
        assert not call.output.requires_grad
        assert call.kwargs == {}


def test_calls_of_a_shared_block_are_counted():
    model, inputs = ZOO["shared_block"]()
    calls = record_calls(model, inputs, find_blocks(model))
    assert [call.call for call in calls] == [0, 1, 2, 3]
    for one, other in pairwise(calls):
        assert torch.equal(one.output, other.args[0])


def test_copies_are_from_before_in_place_changes():
    model, inputs = ZOO["inplace_relu_first"]()
    calls = record_calls(model, inputs, find_blocks(model))
    for one, other in pairwise(calls):
        # The next block rectifies what it gets in place: the copy still has both signs.
        assert torch.equal(one.output, other.args[0])
        assert (one.output < 0).any()


def test_keywords_and_structured_outputs_are_kept_as_they_are():
    for name, kind in (("gpt_tuples", tuple), ("gpt_dicts", dict)):
        model, inputs = ZOO[name]()
        call = record_calls(model, inputs, find_blocks(model))[1]
        assert call.args == ()
        assert set(call.kwargs) == {"hidden"}
        assert type(call.output) is kind
    model, inputs = ZOO["gpt_named_tuples"]()
    output = record_calls(model, inputs, find_blocks(model))[0].output
    assert output.hidden.shape == (3, 5, 4)


def test_a_run_is_recorded_from_its_first_input_to_its_last_output():
    model, inputs = ZOO["vgg"]()
    model.eval()
    calls = record_calls(model, inputs, find_blocks(model, inputs))
    assert len(calls) == 6
    for call in calls:
        output = nn.Sequential(*call.block.parts)(*copy.deepcopy(call.args))
        assert torch.allclose(output, call.output)


def test_a_block_that_does_not_run_has_no_call():
    model, inputs = ZOO["residual_mlp"]()
    model.spare = nn.Linear(2, 2)
    calls = record_calls(model, inputs, select_blocks(model, ["spare", "head"]))
    assert [call.block.name for call in calls] == ["head"]


def test_hooks_of_the_user_see_the_pass_and_are_outside_the_block():
    model, inputs = ZOO["residual_mlp"]()
    block = model.blocks[1]
    block.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    block.register_forward_hook(lambda _, args, output: 2 * output)
    call = record_calls(model, inputs, select_blocks(model, block))[0]
    # The caller's view: calling the module again runs its hooks again.
    assert torch.allclose(block(call.args[0]), call.output)
    assert find_blocks(model, inputs)["blocks.1"].kind == "identity"


@pytest.mark.parametrize(
    "inputs", ["text", 3, 1.5, np.zeros((2, 3)), nn.Linear(1, 1), DataLoader([1])]
)
def test_inputs_that_are_no_batch_are_refused(inputs):
    with pytest.raises(BatchFormatError, match="expected one batch as the model takes it"):
        find_blocks(nn.Sequential(nn.Linear(3, 3)), inputs)


def test_an_uninitialised_model_is_refused():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(BlockSelectionError, match=r"0 \(LazyLinear\) is not initialised"):
        find_blocks(model, torch.randn(2, 3))
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_a_model_that_catches_an_error_inside_is_still_followed():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.broken = nn.Linear(3, 3), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.broken(x)
            except RuntimeError:
                return x + self.inner(x)

    model = nn.Sequential(nn.Linear(3, 3), Careful(), Careful())
    assert [b.kind for b in find_blocks(model, torch.randn(2, 3))] == ["identity"] * 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_of_a_model_on_a_gpu_are_found():
    model, inputs = ZOO["torchvision_layout"]()
    model, inputs = model.float().cuda(), inputs.float().cuda()
    before = Snapshot(model)
    state = torch.cuda.get_rng_state()
    with torch.autocast("cuda", torch.float16):
        blocks = find_blocks(model, inputs)
        splits = split_blocks(model, inputs)
    assert len(blocks) == len(splits) == 6
    assert [b.kind for b in blocks].count("transition") == 3
    assert torch.equal(state, torch.cuda.get_rng_state())
    before.assert_unchanged()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_fused_attention_layers_are_taken_apart():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    inputs = {"src": torch.randn(2, 3, 4), "src_key_padding_mask": mask}
    calls = record_calls(model, inputs, select_blocks(model, "layers.*"))
    # The fused form would hand on nested tensors without the padding.
    assert not any(tensor.is_nested for call in calls for tensor in tensors_in(call.args))
    assert [call.output.shape for call in calls] == [(2, 3, 4)] * 2
    assert len(record_calls(model, inputs, select_blocks(model, "layers.*.linear1"))) == 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_first_layer_that_works_in_place_changes_no_inputs():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    inputs = torch.randn(5, 3)
    given = inputs.clone()
    for function in (find_blocks, lambda m, x: record_calls(m, x, find_blocks(m))):
        function(model, inputs)
        assert torch.equal(inputs, given)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_parts_run_as_they_were_written():
    ran = []

    def backend(graph, _):
        def run(*args):
            ran.append(1)
            return graph(*args)

        return run

    model, inputs = ZOO["nested_stages"]()
    model.body[0] = torch.compile(model.body[0], backend=backend)
    model.body[1].compile(backend=backend)
    model.eval()
    compiled = model.body[1]._compiled_call_impl, vars(model.body[0])["forward"]
    with torch.no_grad():
        model(inputs)
        assert ran
        ran.clear()
        # A compiled graph hides hooks that come after it, and additions that it fuses.
        assert len(record_calls(model, inputs, find_blocks(model))) == 5
        assert len(find_blocks(model, inputs)) == 5
        assert not ran
        model(inputs)
        assert ran
    after = model.body[1]._compiled_call_impl, vars(model.body[0])["forward"]
    assert all(one is other for one, other in zip(compiled, after, strict=True))
