"""``python -m conditioning``: input that is nearly right is taken with a note, or has a remedy."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from named_nets import RANDOM, fails, named_nets, record_calls
from torch import nn

from conditioning.__main__ import main
from conditioning.checkup import Checkup
from conditioning.cli.losses import cross_entropy

NET = "from nets import Net\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current directory with a module of networks."""
    before = set(sys.modules)
    yield from named_nets(tmp_path, monkeypatch)
    for name in set(sys.modules) - before:
        if name.startswith("_examined_") or name == "script":
            del sys.modules[name]


@pytest.fixture
def seen(monkeypatch):
    """Instead of a checkup: what it was called with."""
    return record_calls(monkeypatch)


def notes():
    return Checkup.load("a.json").setting.notes


def weights():
    sys.path.insert(0, str(Path.cwd()))
    import nets

    return nets.Net().state_dict()


# -- scripts ------------------------------------------------------------------------------------

SCRIPT = NET + "import argparse\nargparse.ArgumentParser().parse_args()\n"


@pytest.mark.parametrize("name", ["script.py:Net", "script:Net"])
def test_a_script_that_reads_options_sees_none(name, seen, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m conditioning", "checkup", name, *RANDOM])
    Path("script.py").write_text(SCRIPT)
    assert main() == 0
    assert sys.argv[1] == "checkup"


def test_a_factory_that_reads_options_sees_none(seen, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python -m conditioning", "checkup", "script.py:f", *RANDOM])
    Path("script.py").write_text(
        NET + "import argparse\ndef f():\n    argparse.ArgumentParser().parse_args()\n"
        "    return Net()\n"
    )
    assert main() == 0


@pytest.mark.parametrize("name", ["script.py:Net", "script:Net"])
def test_a_script_that_ends_the_program_is_said(name, seen, capsys):
    Path("script.py").write_text(NET + "raise SystemExit(3)\n")
    said = fails(capsys, "checkup", name, *RANDOM)
    assert re.search(r"Importing script.* ended the program \(SystemExit: 3\)\. Put what", said)


def test_a_factory_that_ends_the_program_is_said(seen, capsys):
    Path("script.py").write_text("def f():\n    raise SystemExit('no data')\n")
    said = fails(capsys, "checkup", "script.py:f", *RANDOM)
    assert said.startswith("script.py:f ended the program (SystemExit: no data).")


@pytest.mark.parametrize("name", ["tqdm", "colorsys"])
def test_a_file_does_not_take_the_place_of_a_module(name, seen):
    Path("sub").mkdir()
    Path(f"sub/{name}.py").write_text("import other\n" + NET)
    Path("sub/other.py").write_text("")
    sys.path.insert(0, str(Path.cwd()))
    assert main(["checkup", f"sub/{name}.py:Net", *RANDOM]) == 0
    __import__(name)
    assert "sub" not in Path(sys.modules[name].__file__).parts
    del sys.modules["other"]


# -- options ------------------------------------------------------------------------------------


def test_the_usage_is_one_that_works(capsys):
    for command, usage in (
        ("checkup", "checkup FACTORY [options]"), ("compare", "compare A.json B.json [options]"),
        ("show", "show A.json [options]"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: python -m conditioning {usage}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["checkup", "--blocks", "a", "b", "nets:Net"], "FACTORY; it comes before --blocks"),
        (["checkup", "nets:Net", "--blcks", "a"], r"arguments: --blcks a \(.* checkup --help"),
        (["compare", "a.json", "b.json", "c.json"], r"arguments: c.json \(.* compare --help"),
        (["checkup", "nets:broken", "--momentum", "2"], "--momentum: expected a number from 0"),
        (["checkup", "nets:broken", "--momentum", "x"], "--momentum: expected a number from 0"),
        (["checkup", "nets:broken", "--max-matvecs", "3"], "--max-matvecs: .* at least 50"),
        (["checkup", "nets:broken", "--max-matvecs", "x"], "--max-matvecs: .* at least 50"),
        (["checkup", "nets:broken", "--json", ""], "--json needs the name of a file, got an empty"),
        (["checkup", "nets:broken", "--html", ""], "--html needs the name of a file, got an empty"),
    ],
)
def test_options_are_refused_before_anything_runs(arguments, match, seen, capsys):
    said = fails(capsys, *arguments)
    assert re.search(match, said), said


def test_the_least_number_of_products_is_that_of_the_checkup(seen, capsys):
    from conditioning.checkup.clock import Clock
    from conditioning.cli.parser import LEAST_MATVECS

    Clock(None, LEAST_MATVECS, progress=False)
    with pytest.raises(ValueError, match="at least 50"):
        Clock(None, LEAST_MATVECS - 1, progress=False)


# -- checkpoints --------------------------------------------------------------------------------


def test_what_a_lightning_module_holds_besides_the_model_is_noted(seen):
    held = weights()
    wrapped = {f"net.inner.{k}": v for k, v in held.items()}
    torch.save({"state_dict": wrapped | {"loss.weight": torch.ones(2)}}, "w.pt")
    assert main(["checkup", "nets:Net", *RANDOM, "--checkpoint", "w.pt", "--json", "a.json"]) == 0
    assert torch.equal(seen[0]["model"].head.weight, held["head.weight"])
    assert "of the checkpoint not used: loss.weight" in notes()


def test_two_models_in_one_checkpoint_are_not_chosen_from(seen, capsys):
    held = weights()
    both = {f"{name}.{k}": v for name in ("net", "ema") for k, v in held.items()}
    torch.save(both, "w.pt")
    said = fails(capsys, "checkup", "nets:Net", *RANDOM, "--checkpoint", "w.pt")
    assert "more than once, below net, ema" in said


def test_weights_of_another_dtype_are_noted(seen):
    torch.save({k: v.half() for k, v in weights().items()}, "w.pt")
    main(["checkup", "nets:Net", *RANDOM, "--checkpoint", "w.pt", "--json", "a.json"])
    assert "weights of float16 in the checkpoint, as float32" in notes()
    assert seen[0]["model"].head.weight.dtype == torch.float32


def test_an_error_that_is_no_sentence_has_its_type(seen, capsys):
    Path("w.pt").write_text("text of some length, of which the first byte is no opcode")
    said = fails(capsys, "checkup", "nets:Net", *RANDOM, "--checkpoint", "w.pt")
    assert not re.search(r"read: \S+\. Save", said), said


# -- data ---------------------------------------------------------------------------------------


def test_integer_inputs_are_cast_where_the_model_needs_it(seen):
    np.savez("d.npz", x=np.arange(24).reshape(8, 3), y=np.arange(8) % 2)
    assert main(["checkup", "nets:Net", "--data", "d.npz", "--json", "a.json"]) == 0
    inputs, targets = seen[0]["data"][0]
    assert inputs.dtype == torch.float32
    assert sorted(inputs.flatten().tolist()) == list(range(24))
    assert targets.dtype == torch.int64
    assert "integer inputs were made float32" in notes()


ONE_HOT = """
import torch
class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(7, 7)
    def forward(self, x):
        return self.head(torch.nn.functional.one_hot(x, 7).float())
"""


@pytest.mark.parametrize("model", ["nets:Text", "script.py:Tokens"])
def test_tokens_stay_integers(model, seen):
    Path("script.py").write_text(ONE_HOT)
    tokens = np.arange(12).reshape(4, 3) % 7
    np.savez("d.npz", x=tokens, y=tokens)
    assert main(["checkup", model, "--data", "d.npz"]) == 0
    assert seen[0]["data"][0][0].dtype == torch.int64


def test_labels_in_another_form_are_the_same_labels():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = nn.functional.cross_entropy(logits, labels)
    for form in (labels[:, None], labels.float(), labels.double()):
        assert torch.equal(cross_entropy(logits, form), expected)
    text = torch.randn(6, 4, 3)
    tokens = torch.randint(3, (6, 4))
    expected = cross_entropy(text, tokens)
    assert torch.equal(cross_entropy(text, tokens[..., None]), expected)
    image, pixels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    assert torch.equal(cross_entropy(image, pixels[:, None]), cross_entropy(image, pixels))
    shares = torch.randn(6, 3).softmax(1)
    assert torch.equal(cross_entropy(logits, shares), nn.functional.cross_entropy(logits, shares))


def test_whole_numbers_that_may_be_labels_get_a_hint(capsys):
    x = np.zeros((8, 3), np.float32)
    np.savez("d.npz", x=x, y=np.arange(8.0) % 2)
    said = fails(capsys, "checkup", "nets:Net", "--data", "d.npz")
    assert "If they are labels, pass --loss cross_entropy." in said
    np.savez("d.npz", x=x, y=np.full(8, 0.5))
    assert "labels" not in fails(capsys, "checkup", "nets:Net", "--data", "d.npz")


def test_a_batch_without_tensors_has_no_shapes(capsys, monkeypatch):
    Path("script.py").write_text(NET + "def f():\n    return Net(), None, [{'words': 'a b'}]\n")

    def raising(*_, **__):
        raise RuntimeError("no words here")

    monkeypatch.setattr("conditioning.cli.commands.checkup", raising)
    said = fails(capsys, "checkup", "script.py:f")
    assert said.startswith("Examining Net raised RuntimeError: no words here")
