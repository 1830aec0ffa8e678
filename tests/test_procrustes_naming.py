"""How layers are named, also in wrappers, and what is said where none is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conditioning.errors import InvalidArgumentError, LayerSelectionError
from conditioning.procrustes import Procrustes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 19, 3), nn.BatchNorm2d(19)),
        nn.ModuleDict({"down": nn.Conv2d(4, 8, 1, stride=2), "mix": nn.Conv2d(4, 4, 3)}),
        nn.ModuleDict({"down": nn.Conv2d(8, 16, 1, stride=2)}),
        nn.Linear(4, 3),
    )


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("1.down", ["1.down"]),
        ("*.down", ["1.down", "2.down"]),
        (["3", "?.down"], ["3", "1.down", "2.down"]),
        (["1.down", "*.down"], ["1.down", "2.down"]),
        ("*", ["0.0", "1.down", "1.mix", "2.down", "3"]),
        ("[01].*", ["0.0", "1.down", "1.mix"]),
        (("3",), ["3"]),
    ],
)
def test_names_and_globs_choose_layers(model, layers, names):
    assert [layer.name for layer in Procrustes(layers, model=model).layers] == names


def test_modules_choose_themselves(model):
    down, head = model[1]["down"], model[3]
    assert [x.name for x in Procrustes([down, head]).layers] == ["layer 0", "layer 1"]
    assert [x.name for x in Procrustes([head, down], model=model).layers] == ["3", "1.down"]
    assert [x.module for x in Procrustes(x for x in (down, head)).layers] == [down, head]
    assert [x.name for x in Procrustes(head).layers] == ["layer 0"]
    assert [x.name for x in Procrustes({"first": head}).layers] == ["first"]
    assert [x.name for x in Procrustes([down, "3"], model=model).layers] == ["1.down", "3"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("1.dwon", r"'1.dwon' matches no .* layer of the model. Near it: '1.down'"),
        (["3", "9.down"], r"'9.down' matches no .* Near it: '\d.down'"),
        ("conv*", "Near it: '0.0', '1.down', '1.mix', '2.down', '3'"),
        ([], "no layer to project. Name layers of these kinds: nn.Linear"),
        ({}, "no layer to project"),
        (7, "must be a mapping, modules or names, got a int"),
        (None, "got a NoneType"),
    ],
)
def test_what_is_not_found_is_told_with_what_is_near(model, layers, message):
    with pytest.raises(LayerSelectionError, match=message):
        Procrustes(layers, model=model)


def test_a_name_needs_a_model():
    with pytest.raises(LayerSelectionError, match=r"Procrustes\('down', model=model\)"):
        Procrustes("down")


def test_in_a_model_without_layers_nothing_is_near():
    with pytest.raises(LayerSelectionError, match=r"layer of the model\.$"):
        Procrustes("down", model=nn.Sequential(nn.ReLU()))


def test_a_network_without_transitions_is_told_so():
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        LayerSelectionError,
        match="Sequential: no composite .* repeated, .* Pass a batch .* or name",
    ):
        Procrustes.for_transitions(plain)
    with pytest.raises(
        LayerSelectionError, match=r"no residual .* ran\. Please name the layers: Procr"
    ):
        Procrustes.for_transitions(plain, torch.randn(2, 3))


class Block(nn.Module):
    """Nothing on its skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))


def test_a_network_of_identities_is_told_so():
    model = nn.Sequential(Block(3), Block(3))
    with pytest.raises(
        LayerSelectionError, match=r"of its 2 blocks \(Block\) none has a layer that"
    ):
        Procrustes.for_transitions(model)
    message = "the skips of its 2 residual blocks are identities"
    with pytest.raises(LayerSelectionError, match=message):
        Procrustes.for_transitions(model, torch.randn(2, 3))


@pytest.mark.parametrize("thing", ["resnet", None, [nn.Linear(2, 2)]], ids=repr)
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(InvalidArgumentError, match="model must be the nn.Module"):
        Procrustes.for_transitions(thing)
    if thing is not None:
        with pytest.raises(InvalidArgumentError, match=f"got a {type(thing).__name__}"):
            Procrustes("stem", model=thing)


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as some language models have."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out))

    def forward(self, x):
        return x @ self.weight


def test_a_pattern_that_matches_other_modules_says_which():
    model = nn.ModuleDict({"a": nn.ModuleDict({"c_attn": Conv1D(2, 3), "act": nn.ReLU()})})
    model["b"] = nn.ModuleDict({"c_attn": Conv1D(2, 3)})
    for pattern in ("*c_attn", "a*", "*"):
        count = "1 module" if pattern == "a*" else "2 modules"
        message = f"but {count} of class Conv1D, whose weight alone .* known are nn.Linear"
        with pytest.raises(LayerSelectionError, match=message):
            Procrustes(pattern, model=model)
    with pytest.raises(LayerSelectionError, match="1 module of class ReLU"):
        Procrustes("*act", model=model)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["data parallel", "compiled"],
)
def test_wrappers_are_looked_through(model, wrap):
    torch._dynamo.reset()
    wrapped = wrap(model)
    for layers in ("1.down", ["*.down"], [model[1]["down"]], "*"):
        found = Procrustes(layers, model=wrapped).layers
        expected = Procrustes(layers, model=model).layers
        assert [(x.name, x.module) for x in found] == [(x.name, x.module) for x in expected]
    # Also with what the wrapper adds.
    (name,) = (name for name, module in wrapped.named_modules() if module is model[3])
    assert Procrustes(name, model=wrapped).layers[0].module is model[3]
    # And around a layer.
    (alone,) = Procrustes(wrap(model[3])).layers
    assert alone.module is model[3]
    (named,) = Procrustes(wrap(model[3]), model=model).layers
    assert named.name == "3"
