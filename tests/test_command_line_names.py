"""Models, losses, data and weights that the command line finds by name."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from named_nets import RANDOM, Trap, fails, named_nets, record_calls
from torch import nn

from conditioning.__main__ import main
from conditioning.checkup import Checkup
from conditioning.cli.datasets import Amount, find_data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current directory with a module of networks."""
    yield from named_nets(tmp_path, monkeypatch)


@pytest.fixture
def seen(monkeypatch):
    """Instead of a checkup: what it was called with."""
    return record_calls(monkeypatch)


@pytest.mark.parametrize(
    "factory", ["nets:Net", "nets:net", "nets:Holder.net", "nets.py:Net", "./nets.py:net"]
)
def test_a_model_is_found_by_its_name(factory, seen):
    assert main(["checkup", factory, *RANDOM]) == 0
    assert type(seen[0]["model"]).__name__ == "Net"


def test_random_inputs_are_said_to_be_random(seen, capsys):
    main(["checkup", "nets:Net", *RANDOM, "--json", "a.json"])
    assert re.search(
        r"random inputs: norms are those of\s+the architecture", capsys.readouterr().out
    )
    assert Checkup.load("a.json").setting.notes[0].startswith("random inputs")
    main(["checkup", "nets:Net", *RANDOM, "--quiet"])
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert "random inputs" in shown.err
    inputs, targets = seen[0]["data"][0]
    assert inputs.shape == (64, 3)
    assert len(seen[0]["data"]) == 4
    assert targets.dtype == torch.int64
    assert set(targets.tolist()) == {0, 1}


def test_options_reach_the_checkup(seen):
    main([
        "checkup", "nets:Net", *RANDOM, "--batch-size", "8", "--batches", "3", "--budget", "7",
        "--max-matvecs", "500", "--learning-rate", "0.1", "--momentum", "0.9", "--seed", "5",
        "--blocks", "blocks.*", "stem", "--params", "head.*", "--quiet", "--dtype", "float64",
        "--eval",
    ])  # fmt: skip
    (call,) = seen
    assert [len(batch[0]) for batch in call["data"]] == [8, 8, 8]
    assert (call["seconds"], call["num_matvecs"], call["seed"]) == (7.0, 500, 5)
    assert (call["learning_rate"], call["momentum"]) == (0.1, 0.9)
    assert (call["blocks"], call["params"]) == (["blocks.*", "stem"], ["head.*"])
    assert call["progress"] is False
    assert not call["model"].training
    assert call["model"].stem.weight.dtype == call["data"][0][0].dtype == torch.float64


def test_the_defaults_are_those_of_the_checkup(seen):
    main(["checkup", "nets:Net", *RANDOM])
    (call,) = seen
    assert (call["seconds"], call["num_matvecs"], call["seed"]) == (60.0, None, 0)
    assert call["blocks"] is call["params"] is call["learning_rate"] is None
    assert call["model"].training
    main(["checkup", "nets:Net", *RANDOM, "--budget", "none", "--train"])
    assert seen[1]["seconds"] is None


def test_the_seed_fixes_weights_and_inputs(seen):
    for seed in ("1", "1", "2"):
        main(["checkup", "nets:Net", *RANDOM, "--seed", seed])
    first, again, other = ((c["model"].stem.weight, c["data"][0][0]) for c in seen)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_a_factory_may_return_loss_and_data_too(seen, capsys):
    main(["checkup", "nets:everything", "--json", "-"])
    (call,) = seen
    assert isinstance(call["loss_fn"], nn.MSELoss)
    assert [len(batch[0]) for batch in call["data"]] == [10]
    assert "built" not in capsys.readouterr().out


def test_options_win_over_what_the_factory_returns(seen):
    main(["checkup", "nets:everything", "--data", "nets:batch", "--loss", "cross_entropy"])
    assert seen[0]["loss_fn"].__name__ == "cross_entropy"
    assert seen[0]["data"][0][1].dtype == torch.int64
    main(["checkup", "nets:everything", "--data", "nets:batch"])
    assert isinstance(seen[1]["loss_fn"], nn.MSELoss)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nets:batch", [10]),
        ("nets:loader", [5, 5]),
        ("nets:data_set", [10]),
        ("nets.py:loader", [5, 5]),
    ],
)
def test_data_come_from_code(name, sizes, seen):
    main(["checkup", "nets:Net", "--data", name])
    assert [len(batch[0]) for batch in seen[0]["data"]] == sizes
    assert seen[0]["loss_fn"].__name__ == "cross_entropy"


def test_of_a_loader_the_first_batches_are_taken(seen):
    main(["checkup", "nets:Net", "--data", "nets:loader", "--batches", "1"])
    assert len(seen[0]["data"]) == 1


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels"), ("X_train", "target_train")])
def test_data_come_from_npz(keys, seen):
    x, y = np.random.rand(300, 3), np.random.randint(2, size=300)
    np.savez("d.npz", **dict(zip(keys, (x, y), strict=True)))
    main(["checkup", "nets:Net", "--data", "d.npz", "--json", "a.json"])
    inputs = torch.cat([batch[0] for batch in seen[0]["data"]])
    assert inputs.shape == (256, 3)
    assert inputs.dtype == torch.float32
    # Drawn, not the first ones: a file may be sorted.
    rows = {tuple(row) for row in x.astype(np.float32).tolist()}
    assert {tuple(row) for row in inputs.tolist()} <= rows
    assert not np.allclose(inputs[:64], x[:64])
    assert "256 of 300 samples, drawn at random" in Checkup.load("a.json").setting.notes


def test_rows_stay_together_and_bytes_are_scaled():
    x = np.arange(200, dtype=np.uint8).reshape(200, 1)
    np.savez("d.npz", x=x, y=np.arange(200))
    given = find_data("d.npz", Amount(50, 3, 0))
    assert len(given.batches) == 3
    for inputs, targets in given.batches:
        assert torch.allclose(inputs[:, 0] * 255, targets.float())
    assert any("divided by 255" in note for note in given.notes)


def test_a_last_batch_that_is_not_full_is_left_out():
    torch.save((torch.randn(10, 3), torch.randn(10)), "d.pt")
    given = find_data("d.pt", Amount(4, None, 0))
    assert [len(inputs) for inputs, _ in given.batches] == [4, 4]
    assert any("last 2 samples" in note for note in given.notes)


@pytest.mark.parametrize(
    ("content", "loss"),
    [
        (lambda x: (x, torch.zeros(10, dtype=torch.int32)), "cross_entropy"),
        (lambda x: {"inputs": x, "targets": torch.randn(10, 2)}, "mse"),
        (lambda x: [(x, torch.zeros(10, dtype=torch.int64))] * 2, "cross_entropy"),
    ],
)
def test_data_come_from_pt_and_say_which_loss(content, loss, seen):
    torch.save(content(torch.randn(10, 3)), "d.pt")
    main(["checkup", "nets:Net", "--data", "d.pt"])
    assert seen[0]["loss_fn"].__name__ == loss
    assert seen[0]["data"][0][1].dtype in (torch.int64, torch.float32)


@pytest.mark.parametrize("loss", ["nets:huber", "torch.nn:CrossEntropyLoss", "cross_entropy"])
def test_losses_come_by_name(loss, seen):
    main(["checkup", "nets:Net", "--data", "nets:batch", "--loss", loss])
    inputs, targets = seen[0]["data"][0]
    assert seen[0]["loss_fn"](seen[0]["model"](inputs), targets).ndim == 0
    main(["checkup", "nets:Net", "--data", "nets:batch", "--loss", "none"])
    assert seen[1]["loss_fn"] is None


def test_a_squared_error_of_random_inputs_has_targets_of_the_outputs_shape(seen):
    main(["checkup", "nets:Net", "--input-shape", "3", "--loss", "mse"])
    inputs, targets = seen[0]["data"][0]
    assert targets.shape == (64, 2)
    assert targets.dtype == torch.float32
    assert seen[0]["loss_fn"](seen[0]["model"](inputs), targets).ndim == 0


@pytest.mark.parametrize("classes", [(), ("--classes", "7")])
def test_tokens_are_random_sequences(classes, seen):
    assert main(["checkup", "nets:Text", "--tokens", "7,5", *classes]) == 0
    inputs, targets = seen[0]["data"][0]
    assert inputs.shape == (64, 5)
    assert inputs.max() == 6
    if classes:
        assert targets.shape == (64,)
    else:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        logits = seen[0]["model"](inputs)
        expected = nn.functional.cross_entropy(logits.transpose(1, 2), targets)
        assert torch.allclose(seen[0]["loss_fn"](logits, targets), expected)


def other_weights():
    torch.manual_seed(99)
    sys.path.insert(0, str(Path.cwd()))
    import nets

    return nets.Net().state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model_state_dict": w, "optimizer": {"state": {}}},
        lambda w: {"model": w},
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
        lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
        lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
        lambda w: {k.replace("blocks.", "blocks._orig_mod."): v for k, v in w.items()},
        lambda w: {"state_dict": {f"net.{k}": v for k, v in w.items()}},  # Lightning
    ],
)
def test_checkpoints_are_unwrapped(wrap, seen):
    weights = other_weights()
    torch.save(wrap(weights), "w.pt")
    assert main(["checkup", "nets:Net", *RANDOM, "--checkpoint", "w.pt", "--json", "a.json"]) == 0
    assert torch.equal(seen[0]["model"].head.weight, weights["head.weight"])
    assert torch.equal(seen[0]["model"].blocks[1].inner.bias, weights["blocks.1.inner.bias"])
    assert "weights from w.pt" in Checkup.load("a.json").setting.notes


def test_safetensors_are_read(seen, capsys):
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights = other_weights()
    save_file(weights, "w.safetensors")
    assert main(["checkup", "nets:Net", *RANDOM, "--checkpoint", "w.safetensors"]) == 0
    assert torch.equal(seen[0]["model"].head.weight, weights["head.weight"])
    capsys.readouterr()
    Path("bad.safetensors").write_bytes(b"no")
    assert "cannot be read as safetensors" in fails(
        capsys, "checkup", "nets:Net", *RANDOM, "--checkpoint", "bad.safetensors"
    )


def test_safetensors_may_be_missing(seen, capsys, monkeypatch):
    Path("w.safetensors").write_bytes(b"no")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    said = fails(capsys, "checkup", "nets:Net", *RANDOM, "--checkpoint", "w.safetensors")
    assert "pip install safetensors" in said


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: Trap(), r"holds Python objects .* run code .* torch\.save\(model\.state_dict\(\)"),
        (lambda: nn.Linear(3, 2), r"holds Python objects \(torch\.nn\.modules\.linear\.Linear\)"),
        (lambda: [1, 2], "holds a list, but no state dict"),
        (lambda: {"epoch": 3, "loss": 0.1}, "holds a dict of epoch, loss, but no state dict"),
        (lambda: {}, "holds a dict of nothing"),
        (
            lambda: {"stem.weight": torch.zeros(4, 3), "fc.bias": torch.zeros(2)},
            r"missing: stem\.bias, .*; unexpected: fc\.bias",
        ),
        (
            lambda: other_weights() | {"stem.weight": torch.zeros(4, 5)},
            r"of another shape: stem\.weight \(4x5, the model's is 4x3\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(content, match, seen, capsys):
    torch.save(content(), "w.pt")
    said = fails(capsys, "checkup", "nets:Net", *RANDOM, "--checkpoint", "w.pt")
    assert re.search(match, said), said
    assert not Path("trapped").exists()
    assert not seen


def test_files_that_torch_did_not_write_are_no_checkpoints(seen, capsys):
    Path("w.pt").write_text("hello")
    Path("p.pt").write_bytes(pickle.dumps(Trap()))
    Path("e.pt").write_bytes(b"")
    for name in ("w.pt", "p.pt", "e.pt"):
        said = fails(capsys, "checkup", "nets:Net", *RANDOM, "--checkpoint", name)
        assert name in said
        assert "torch.save(model.state_dict(), FILE)" in said
    assert not Path("trapped").exists()
    said = fails(capsys, "checkup", "nets:Net", *RANDOM, "--checkpoint", "none.pt")
    assert said == "There is no checkpoint 'none.pt'."


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": np.zeros((4, 3))}, "holds x, but no targets: expected y or labels"),
        ({"y": np.zeros(4)}, "holds y, but no inputs: expected x or X or images"),
        ({"x": np.zeros((4, 3)), "y": np.array(list("abcd"))}, "y of .* holds <U1"),
        ({"x": np.zeros((4, 3)), "y": np.zeros(5)}, r"\(4, 3\) .* \(5,\) do not go together"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0)}, "do not go together"),
        ({"x": np.array([{}, {}]), "y": np.zeros(2)}, "without pickled objects"),
    ],
)
def test_arrays_of_the_wrong_form_are_refused(arrays, match, seen, capsys):
    np.savez("d.npz", **arrays)
    said = fails(capsys, "checkup", "nets:Net", "--data", "d.npz")
    assert re.search(match, said), said


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.zeros(3), "expected a tuple of two tensors"),
        ((torch.zeros(3), 1), "expected a tuple of two tensors"),
        ({"x": torch.zeros(3)}, "expected a tuple of two tensors"),
        ([], "expected a tuple of two tensors"),
        ((torch.zeros(3, 3), torch.zeros(4)), "do not go together"),
        (Trap(), "without running code"),
    ],
)
def test_tensors_of_the_wrong_form_are_refused(content, match, seen, capsys):
    torch.save(content, "d.pt")
    assert match in fails(capsys, "checkup", "nets:Net", "--data", "d.pt")
    assert not Path("trapped").exists()


def test_files_that_are_no_data_are_refused(seen, capsys):
    for name in ("d.npz", "d.pt"):
        Path(name).write_text("hello")
        assert "cannot be read" in fails(capsys, "checkup", "nets:Net", "--data", name)
    np.save("one.npy", np.zeros(3))
    Path("one.npy").rename("one.npz")
    assert "cannot be read" in fails(capsys, "checkup", "nets:Net", "--data", "one.npz")
