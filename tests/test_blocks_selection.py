"""Blocks by name, glob, module or run; through wrappers; and what is said when nothing fits."""

from __future__ import annotations

import pytest
import torch
from architectures import ZOO, MlpBlock
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from conditioning.blocks import Block, Blocks, find_blocks, select_blocks
from conditioning.errors import BlockSelectionError, InvalidArgumentError

STAGES = ("stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def resnet():
    return ZOO["preact_resnet"]()


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        ("stages.1.0", ("stages.1.0",)),
        ("stages.*.*", STAGES),
        ("stages.?.[01]", STAGES),
        ("stages.0.*", STAGES[:2]),
        ("stages.*", ("stages.0", "stages.1")),
        ("**.conv1", tuple(f"{name}.conv1" for name in STAGES)),
        ("stages.**.shortcut", ("stages.1.0.shortcut",)),
        ("stages.0.0-1", ("stages.0",)),
        ("head.0-1", ("head.0-1",)),
        ("head.1-1", ("head.1",)),
        (["fc", "stem", "stages.0.1"], ("stem", "stages.0.1", "fc")),
        (["stages.0.*", "stages.0.0", ["stem"]], ("stem", *STAGES[:2])),
        ("stages", ("stages.0", "stages.1")),
        ("", ("",)),
    ],
)
def test_names_globs_and_runs_select_in_the_order_of_definition(resnet, blocks, names):
    assert select_blocks(resnet[0], blocks).names == names


def test_a_glob_for_the_parent_of_a_run_selects_one_in_each():
    model, _ = ZOO["gpt_tuples"]()
    chosen = select_blocks(model, "blocks.*.mlp.0-1")
    assert chosen.names == tuple(f"blocks.{i}.mlp.0-1" for i in range(3))
    assert chosen[0].parts == tuple(model.blocks[0].mlp[:2])


def test_nothing_named_means_what_is_found(resnet):
    model, inputs = resnet
    assert select_blocks(model).names == find_blocks(model).names
    kinds = [block.kind for block in select_blocks(model, None, inputs)]
    assert kinds == ["identity", "identity", "transition", "identity"]


def test_modules_select_themselves_and_lists_their_items(resnet):
    model, _ = resnet
    assert select_blocks(model, model.stages[1][0]).names == ("stages.1.0",)
    assert select_blocks(model, model.stages).names == ("stages.0", "stages.1")
    assert select_blocks(model, list(model.stages[0])).names == STAGES[:2]
    assert select_blocks(model, model.stages[0]).names == ("stages.0",)
    assert select_blocks(model, (m for m in (model.fc, model.stem))).names == ("stem", "fc")


def test_blocks_select_themselves(resnet):
    model, inputs = resnet
    found = find_blocks(model, inputs)
    assert select_blocks(model, found) is found
    assert select_blocks(model, found[2:3])[0] is found[2]
    assert select_blocks(model, [found[3], found[0]]).names == ("stages.0.0", "stages.1.1")


def test_selected_blocks_are_measured_and_ordered_as_they_run():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.unused = nn.Linear(3, 2), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.first(x))

    model = Backwards()
    assert select_blocks(model, "*").names == ("last", "first", "unused")
    chosen = select_blocks(model, "*", torch.randn(5, 3))
    assert chosen.names == ("first", "last", "unused")
    assert [block.kind for block in chosen] == ["plain", "plain", "unknown"]
    assert chosen["last"].note == "3 -> 2 features"
    assert chosen["unused"].note == "did not run on these inputs"
    assert chosen["first"].input_shape == (5, 3)


def test_a_stage_has_the_kind_of_what_it_holds(resnet):
    model, inputs = resnet
    chosen = select_blocks(model, ["stages.*", "stages.1.0"], inputs)
    assert [(b.name, b.kind) for b in chosen] == [
        ("stages.0", "identity"),
        ("stages.1", "transition"),
        ("stages.1.0", "transition"),
    ]
    assert chosen["stages.0"].note == "holds 2 residual blocks"


def test_a_stage_with_a_bare_layer_in_it_is_a_transition():
    model, inputs = ZOO["procrustes_layout"]()
    first, second = select_blocks(model, model.stages, inputs)
    assert (first.kind, second.kind) == ("transition", "identity")
    model, inputs = ZOO["residual_mlp"]()
    chain = nn.Sequential(model.blocks[0], nn.Linear(5, 5).double(), model.blocks[1])
    assert select_blocks(chain, chain, torch.randn(2, 5).double())[0].kind == "transition"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("stages.0.3", r"matches nothing in the StageNet. Near it: 'stages\.0\.\d'"),
        ("layer*", "matches nothing in the StageNet"),
        ("zzzzzzzz", "model.named_modules"),
        ("head.1-0", "matches nothing"),
        ("stages.0-1", "matches nothing"),  # a list does not run one item after the other
        ([], "blocks is empty"),
        (3, "not a int"),
        ([None], "not a NoneType"),
    ],
)
def test_what_selects_nothing_is_an_error_that_helps(resnet, blocks, message):
    with pytest.raises(BlockSelectionError, match=message):
        select_blocks(resnet[0], blocks)


def test_modules_and_blocks_of_another_model_are_refused(resnet):
    model, _ = resnet
    other, _ = ZOO["preact_resnet"]()
    for foreign in (other.stem, find_blocks(other), find_blocks(other)[0], [other.fc]):
        with pytest.raises(BlockSelectionError, match="not part of the StageNet"):
            select_blocks(model, foreign)


def test_a_block_of_several_modules_needs_its_parts():
    one, other = nn.Linear(2, 2), nn.ReLU()
    with pytest.raises(BlockSelectionError, match="pass its modules as parts"):
        Block("run", one, other)
    assert Block("run", one, other, parts=(one, other)).classes == "Linear+ReLU"


def test_a_shared_module_is_selected_by_all_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model.again = model[0]
    assert select_blocks(model, "again").names == ("0",)
    assert select_blocks(model, ["again", "0", model[0]]).names == ("0",)


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def _compiled_blocks(model: nn.Module) -> nn.Module:
    for stage in model.stages:
        for i, block in enumerate(stage):
            stage[i] = torch.compile(block, backend="eager")
    return model


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _checkpointed(model: nn.Module) -> nn.Module:
    for stage in model.stages:
        for i, block in enumerate(stage):
            stage[i] = checkpoint_wrapper(block)
    return model


WRAPPERS = {
    "torch.compile": (_compiled, "_orig_mod.stages.1.0"),
    "compiled blocks": (_compiled_blocks, "stages.1.0._orig_mod"),
    "module.compile": (_compiled_in_place, "stages.1.0"),
    "checkpoint wrapper": (_checkpointed, "stages.1.0._checkpoint_wrapped_module"),
    "DataParallel": (nn.DataParallel, "module.stages.1.0"),
    "both": (lambda model: nn.DataParallel(_checkpointed(model)), "module.stages.1.0"),
}


# The compiler itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("ran_before", [True, False])
def test_wrappers_are_looked_through(resnet, name, ran_before):
    model, inputs = resnet
    block = model.stages[1][0]
    wrap, full_name = WRAPPERS[name]
    wrapped = wrap(model)
    if ran_before:
        wrapped(inputs)
    found = find_blocks(wrapped, inputs)
    assert found.names == STAGES
    assert [b.kind for b in found] == ["identity", "identity", "transition", "identity"]
    assert {b.classes for b in found} == {"PreActBlock"}
    assert find_blocks(wrapped).names == STAGES
    for selector in (full_name, "stages.1.0", block):
        assert select_blocks(wrapped, selector).names == ("stages.1.0",)
    assert torch.isfinite(wrapped(inputs)).all()


def test_the_module_of_a_block_is_what_the_model_calls(resnet):
    model, _ = resnet
    _checkpointed(model)
    block = select_blocks(model, "stages.0.0")[0]
    assert block.module is model.stages[0][0]


def test_a_scripted_model_is_refused_and_a_scripted_part_is_not():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    with pytest.raises(BlockSelectionError, match="TorchScript"):
        find_blocks(scripted, torch.randn(2, 3))
    model, inputs = ZOO["residual_mlp"]()
    model.embed = torch.jit.script(model.embed)
    assert len(find_blocks(model, inputs)) == 4


def test_a_whole_model_may_be_the_block(resnet):
    model, inputs = resnet
    (block,) = select_blocks(model, model, inputs)
    assert (block.name, block.label, block.kind) == ("", "(model)", "transition")
    assert "(model)" in str(Blocks([block]))


def test_a_named_layer_has_the_kind_that_it_has_among_all():
    model, inputs = ZOO["bare_transition_attribute"]()
    found = find_blocks(model, inputs)
    named = select_blocks(model, list(found.names), inputs)
    assert [block.kind for block in named] == [block.kind for block in found]
    assert select_blocks(model, "transition1", inputs)[0].kind == "transition"
    assert select_blocks(model, "stem", inputs)[0].kind == "plain"


def test_stem_and_head_of_a_chain_are_no_transitions():
    layers = [nn.Linear(3, 5), *(MlpBlock(5) for _ in range(3)), nn.Linear(5, 2)]
    assert find_blocks(nn.Sequential(*layers)).names == ("1", "2", "3")


def test_a_module_of_its_own_class_between_units_is_a_block_too():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x):
            return 1e-3 * self.linear(x)

    layers = [nn.Linear(3, 5), MlpBlock(5), MlpBlock(5), Other(), MlpBlock(5), nn.Linear(5, 2)]
    model = nn.Sequential(*layers)
    assert find_blocks(model).names == ("1", "2", "3", "4")
    assert find_blocks(model, torch.randn(2, 3)).names == ("1", "2", "3", "4")


def test_what_is_no_model_is_told():
    for wrong in ("model", None, [nn.Linear(2, 2)]):
        with pytest.raises(InvalidArgumentError, match=r"nn\.Module"):
            find_blocks(wrong)
    with pytest.raises(BlockSelectionError, match="inputs="):
        select_blocks(nn.Linear(2, 2), torch.ones(1, 2))
