"""Blocks are found in networks of every style, each with the kind of its skip."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ZOO, MlpBlock, PreActBlock
from architectures_unusual import BLOCKS, UNUSUAL, chain
from torch import Tensor, nn

from conditioning.blocks import Blocks, find_blocks, record_calls, split_blocks
from conditioning.blocks.tape import record_tape
from conditioning.errors import BlockSelectionError

I, T, P = "identity", "transition", "plain"  # noqa: E741


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _numbered(pattern: str, count: int, kind: str) -> dict[str, str]:
    return {pattern.format(i): kind for i in range(count)}


STAGES = {"stages.0.0": I, "stages.0.1": I, "stages.1.0": T, "stages.1.1": I}
#: Names and kinds, in the order in which they run.
KINDS = {
    "preact_resnet": STAGES,
    "preact_resnet_inplace": STAGES,
    "preact_resnet_without_norm": STAGES,
    "postact_resnet": STAGES,
    "torchvision_layout": {
        "layer1.0": I, "layer1.1": I, "layer2.0": T, "layer2.1": I, "layer3.0": T, "layer4.0": T,
    },
    "bottleneck_resnet": {
        "layer1.0": T, "layer1.1": I, "layer2.0": T, "layer2.1": I, "layer3.0": T, "layer4.0": T,
    },
    "procrustes_layout": {
        "stages.0.0": I, "stages.0.1": I, "stages.0.2": T, "stages.1.0": I, "stages.1.1": I,
    },
    "bare_transition_attribute": {
        "stage1.0": I, "stage1.1": I, "transition1": T, "stage2.0": I, "stage2.1": I,
    },
    "inplace_relu_first": _numbered("stages.0.{}", 3, I),
    "nested_stages": {
        "body.0.0.0": I, "body.0.0.1": I, "body.0.1": I, "body.1.0": T, "body.1.1.0": I,
    },
    "convnext": {**_numbered("stages.0.{}", 3, I), "stages.1.0-1": T, "stages.1.2": I},
    "plain_mlp": dict.fromkeys(["0-1", "2-3", "4-5", "6-7", "8-9", "10"], P),
    "vgg": dict.fromkeys(
        [
            "features.0-2", "features.3-6", "features.7-9", "features.10-13",
            "classifier.0-2", "classifier.3",
        ], P,
    ),
    "densenet": dict.fromkeys(
        ["stages.0.0", "stages.0.1", "stages.0.2", "stages.1.0", "stages.1.1"], P
    ),
    "unet": dict.fromkeys(["down.0", "down.1", "middle", "up.0", "up.1"], P),
    "autoencoder": dict.fromkeys(["0.0-1", "0.2-3", "1.0-1", "1.2"], P),
    "lstm": {"lstm": P, "head": P},
    "residual_mlp": _numbered("blocks.{}", 4, I),
    "shared_block": {"blocks.0": I},
    "additions_in_the_model": _numbered("branches.{}", 3, P),
    "encoder_postnorm": _numbered("layers.{}", 3, I),
    "encoder_prenorm": _numbered("layers.{}", 3, I),
    "gpt_tuples": _numbered("blocks.{}", 3, I),
    "gpt_dicts": _numbered("blocks.{}", 3, I),
    "gpt_named_tuples": _numbered("blocks.{}", 3, I),
}  # fmt: skip
#: What structure alone cannot tell: layers between containers, branches of a loop.
BY_STRUCTURE = {
    "bare_transition_attribute": ("stage1.0", "stage1.1", "stage2.0", "stage2.1"),
    "convnext": ("stages.0.0", "stages.0.1", "stages.0.2", "stages.1.1", "stages.1.2"),
    "additions_in_the_model": (
        "embed", *(f"branches.{i}.{j}" for i in range(3) for j in ("0-1", "2")), "head",
    ),
}  # fmt: skip


def kinds(blocks: Blocks) -> list[tuple[str, str]]:
    return [(block.name, block.kind) for block in blocks]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_the_blocks_of_every_architecture_are_found_with_their_kinds(name, training):
    model, inputs = ZOO[name]()
    assert kinds(find_blocks(model.train(training), inputs)) == list(KINDS[name].items())


def test_every_architecture_is_tried():
    assert set(KINDS) == set(ZOO)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_ways_to_write_a_residual_network_are_seen_through(name):
    make, expected = UNUSUAL[name]
    assert kinds(find_blocks(*make())) == list(expected.items())


@pytest.mark.parametrize("name", BLOCKS)
def test_every_form_of_addition_is_seen(name):
    forward, parts, kind, note = BLOCKS[name]
    blocks = find_blocks(*chain(forward, **parts))
    assert kinds(blocks) == [("1", kind), ("2", kind), ("3", kind)]
    for block in blocks:
        assert block.note.startswith(note)
        assert bool(block.note) == bool(note)


@pytest.mark.parametrize("name", KINDS)
def test_without_inputs_nothing_is_run_and_no_skip_is_claimed(name):
    model, _ = ZOO[name]()

    def refuse(*_):
        raise AssertionError

    for module in model.modules():
        module.register_forward_pre_hook(refuse)
    blocks = find_blocks(model)
    assert blocks.names == BY_STRUCTURE.get(name, tuple(KINDS[name]))
    bare = {block.name for block in blocks if block.kind == "transition"}
    assert bare == {"procrustes_layout": {"stages.0.2"}, "convnext": {"stages.1.1"}}.get(
        name, {"stages.0.2"} if name == "densenet" else set()
    )
    assert {block.kind for block in blocks} <= {"unknown", "transition"}
    assert all(block.input_shape is None for block in blocks)


@pytest.mark.parametrize("name", ["preact_resnet", "preact_resnet_inplace", "convnext"])
def test_an_identity_block_changes_its_input_by_its_branch_alone(name):
    model, inputs = ZOO[name]()
    blocks = [block for block in find_blocks(model, inputs) if block.kind == "identity"]
    for block in blocks:
        last = block.module.conv2 if hasattr(block.module, "conv2") else block.module.reduce
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
    calls = record_calls(model, inputs, blocks)
    assert len(calls) == len(blocks)
    for call in calls:
        assert torch.equal(call.output, call.args[0])


def test_shapes_are_those_of_the_first_call_with_the_batch():
    model, inputs = ZOO["procrustes_layout"]()
    block = find_blocks(model, inputs)["stages.0.2"]
    assert block.input_shape == (4, 4, 8, 8)
    assert block.output_shape == (4, 8, 4, 4)
    assert block.shapes == "4x4x8x8 -> 4x8x4x4"
    assert block.note == "no skip; 4 -> 8 channels, stride 2"


def test_a_block_that_is_a_run_knows_its_parts():
    model, inputs = ZOO["vgg"]()
    block = find_blocks(model, inputs)["features.3-6"]
    assert block.module is model.features[3]
    assert block.last is model.features[6]
    assert block.parts == tuple(model.features[3:7])
    assert block.classes == "Conv2d+BatchNorm2d+ReLU+MaxPool2d"


@pytest.mark.parametrize(
    ("name", "block", "note"),
    [
        ("preact_resnet", "stages.1.0", "skip through convolution"),
        ("postact_resnet", "stages.1.0", "skip through convolution, batch_norm"),
        ("inplace_relu_first", "stages.0.1", "skip begins after relu_"),
        ("shared_block", "blocks.0", "4 calls"),
        ("encoder_postnorm", "layers.1", "2 additions"),
        ("additions_in_the_model", "branches.0", "a branch: the skip is added in the model"),
        ("densenet", "stages.0.0", "concatenated"),
        ("plain_mlp", "0-1", "3 -> 5 features"),
    ],
)
def test_the_note_says_what_was_seen(name, block, note):
    assert note in find_blocks(*ZOO[name]())[block].note


def test_blocks_print_as_a_table():
    model, inputs = ZOO["procrustes_layout"]()
    blocks = find_blocks(model, inputs)
    lines = str(blocks).splitlines()
    assert lines[0].split() == ["block", "class", "kind", "input", "->", "output", "note"]
    assert len(lines) == 1 + len(blocks)
    for line, block in zip(lines[1:], blocks, strict=True):
        for shown in (block.name, block.classes, block.kind, block.shapes, block.note):
            assert shown in line
    assert blocks.transitions == ("stages.0.2",)
    assert repr(blocks).startswith("Blocks(stages.0.0, stages.0.1,")
    assert "output" not in str(find_blocks(model))  # columns that hold nothing are left out


def test_blocks_become_a_frame():
    frame = find_blocks(*ZOO["torchvision_layout"]()).to_frame()
    assert list(frame.columns) == [
        "block", "class", "kind", "input_shape", "output_shape", "note",
    ]  # fmt: skip
    assert list(frame.block) == list(KINDS["torchvision_layout"])
    assert list(frame.kind) == list(KINDS["torchvision_layout"].values())


def test_blocks_are_a_sequence():
    blocks = find_blocks(*ZOO["residual_mlp"]())
    assert blocks[0] is blocks["blocks.0"]
    assert isinstance(blocks[1:], Blocks)
    assert blocks[1:].names == ("blocks.1", "blocks.2", "blocks.3")
    assert blocks[-1] in blocks
    with pytest.raises(KeyError, match="nothing"):
        blocks["nothing"]
    with pytest.raises(BlockSelectionError, match="one and the same name"):
        Blocks([blocks[0], blocks[0]])


@pytest.mark.parametrize("measured", [True, False])
def test_a_model_without_weights_says_what_to_do(measured):
    model = nn.Sequential(nn.ReLU(), nn.Embedding(4, 3))
    with pytest.raises(
        BlockSelectionError, match=r"the Sequential: .* no layer that ran has .*Name"
    ):
        find_blocks(model, torch.tensor([[1, 2]]) if measured else None)


class LeNet(nn.Module):
    """Layers as attributes, in no container, and defined in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2, self.fc1 = nn.Linear(5, 3), nn.Linear(24, 5)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.dropout = nn.Dropout()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))[:, :, ::2, ::2]
        return self.fc2(self.dropout(torch.relu(self.fc1(x.flatten(1)))))


def test_layers_that_are_attributes_are_the_blocks_of_a_plain_network():
    model = LeNet()
    assert find_blocks(model).names == ("fc2", "fc1", "conv1", "conv2", "unused")
    measured = find_blocks(model, torch.randn(2, 3, 8, 8))
    assert kinds(measured) == [("conv1", P), ("conv2", P), ("fc1", P), ("fc2", P)]


def test_several_composite_attributes_of_one_class_are_blocks_and_two_are_towers():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), torch.tanh(self.b(x))], -1)

    class Model(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            for i in range(count):
                setattr(self, f"mixed{i}", Branches())

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x

    inputs = torch.randn(2, 3)
    assert kinds(find_blocks(Model(3), inputs)) == [(f"mixed{i}", P) for i in range(3)]
    assert find_blocks(Model(2), inputs).names == ("mixed0.a", "mixed0.b", "mixed1.a", "mixed1.b")


def test_a_table_is_no_block_and_a_reparametrised_layer_is_one():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(nn.Embedding(4, 3), layer, nn.ReLU(), nn.Linear(3, 2))
    assert find_blocks(model, torch.tensor([[1, 2]])).names == ("1-2", "3")


def test_gates_of_recurrent_cells_are_no_skips():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList([nn.GRUCell(4, 4), nn.GRUCell(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            states: list[Tensor | None] = [None, None]
            for step in x.unbind(1):
                for i, cell in enumerate(self.cells):
                    states[i] = step = cell(step, states[i])
            return step

    found = find_blocks(Recurrent(), torch.randn(2, 5, 4))
    assert kinds(found) == [("cells.0", P), ("cells.1", P)]


def test_an_addition_that_the_output_can_go_around_is_no_skip():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x) * (x + self.a(x))

    model = nn.Sequential(Gated(), Gated(), Gated())
    assert kinds(find_blocks(model, torch.randn(2, 3))) == [("0", P), ("1", P), ("2", P)]


def test_a_sum_of_two_branches_alone_is_no_residual_block():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = nn.Sequential(nn.Linear(3, 3), Sum(), nn.Linear(3, 3), nn.ReLU())
    assert {block.kind for block in find_blocks(model, torch.randn(2, 3))} == {"plain"}


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        lambda x: torch.relu(x) - 0.1 * torch.relu(-x),
        lambda x: x + torch.arange(3.0),
        lambda x: x + x,
        lambda x: x * torch.cos(x) + x.flip(-1) * torch.sin(x),
    ],
    ids=["mean removed", "GELU", "leaky ReLU", "positions", "doubled", "rotation"],
)
def test_additions_within_an_elementwise_function_are_no_skips(operation):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(operation(self.a(x)))

    model = nn.Sequential(*(Layer() for _ in range(3)))
    assert kinds(find_blocks(model, torch.randn(2, 3))) == [("0", P), ("1", P), ("2", P)]


def test_a_recurrent_network_of_many_steps_is_searched_to_the_end():
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)
            self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0])

    # Every gate of every step has all steps before as ancestors: quadratic work would show.
    assert find_blocks(Steps(), torch.randn(2, 300, 3)).names == (
        "cell", "head.0-1", "head.2",
    )  # fmt: skip


def test_a_model_on_the_meta_device_is_measured_without_data():
    model, inputs = ZOO["torchvision_layout"]()
    blocks = find_blocks(model.to("meta"), inputs.to("meta"))
    assert kinds(blocks) == list(KINDS["torchvision_layout"].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_measured_alike(dtype):
    model, inputs = ZOO["encoder_prenorm"]()
    blocks = find_blocks(model.to(dtype), inputs.to(dtype))
    assert kinds(blocks) == list(KINDS["encoder_prenorm"].items())


def test_copies_of_a_model_have_blocks_of_their_own():
    model, inputs = ZOO["residual_mlp"]()
    twin = copy.deepcopy(model)
    one, other = find_blocks(model, inputs), find_blocks(twin, inputs)
    assert one.names == other.names
    assert all(block.module in list(twin.modules()) for block in other)
    assert not any(block.module in list(model.modules()) for block in other)


def test_a_class_that_is_a_block_in_one_place_is_one_in_another():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(MlpBlock(5), MlpBlock(5))
            self.extra = MlpBlock(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(self.blocks(x))

    model = Model()
    expected = ("blocks.0", "blocks.1", "extra")
    assert find_blocks(model).names == expected
    assert find_blocks(model, torch.randn(2, 5)).names == expected


def test_parts_that_do_not_run_are_no_blocks():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 4))
            self.unused = nn.Sequential(PreActBlock(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    assert find_blocks(Model(), torch.randn(2, 4, 4, 4)).names == ("used.0", "used.1")
    assert find_blocks(Model()).names == ("used.0", "used.1", "unused.0")


class WithoutASkip(nn.Module):
    """Adds a tensor that no operation made, in the place of one that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        gone = (x * 2.0).sum()
        del gone
        return y + torch.tensor([[1.0] * 8] * 5)


def test_a_new_tensor_is_not_taken_for_one_that_was_at_its_address():
    for _ in range(20):
        model = nn.Sequential(*[WithoutASkip() for _ in range(4)])
        assert {block.kind for block in find_blocks(model, torch.randn(5, 8))} == {"plain"}


def test_a_record_holds_no_storage_when_it_is_done():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    tape = record_tape(model, torch.randn(2, 3), list(model))
    assert tape.ops
    assert not tape._held
    # While it records, data goes as it would without: only the address is held.
    with tape:
        tensor = torch.randn(1000) * 2
        held = tape._held[tensor.untyped_storage()._cdata]
        del tensor
        assert held.expired()


def experts(target):
    def forward(self, x: Tensor) -> Tensor:
        y = target(x)
        for places, layer in ((torch.tensor([0, 2]), self.a), (torch.tensor([1, 2]), self.b)):
            y.index_add_(0, places, layer(x[places]))
        return y

    return forward


SUMS = {
    "lerp": (lambda self, x: torch.lerp(x, self.a(x), 0.3), I, "skip times 0.7"),
    "lerp to the skip": (lambda self, x: self.a(x).lerp(x, 0.25), I, "skip times 0.25"),
    "lerp to the end": (lambda self, x: torch.lerp(x, self.a(x), 1.0), P, ""),
    "experts": (experts(torch.clone), I, ""),
    "experts without a skip": (experts(torch.zeros_like), P, ""),
    "a permuted skip": (lambda self, x: self.a(x).index_add(0, torch.tensor([2, 1, 0]), x), P, ""),
}


@pytest.mark.parametrize("name", SUMS)
def test_weighted_and_scattered_sums_are_seen_and_measured(name):
    forward, kind, note = SUMS[name]

    class Summing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    model = nn.Sequential(*[Summing() for _ in range(3)]).double()
    x = torch.randn(3, 4).double()
    blocks = find_blocks(model, x)
    assert {block.kind for block in blocks} == {kind}
    if kind == P:
        return
    assert note in blocks[0].note
    scale = float(note.rpartition(" ")[2]) if note else 1.0
    split = list(split_blocks(model, x, blocks[:1]))[-1]
    with torch.no_grad():
        branch = model[0](x) - scale * x
    assert split.skip == pytest.approx(scale * float(x.norm()))
    assert split.branch == pytest.approx(float(branch.norm()))
