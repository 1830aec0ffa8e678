"""``python -m conditioning``: what it says of bad input, what it writes, and what it returns."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkups import checkup as made
from named_nets import RANDOM, fails, named_nets, record_calls

import conditioning
from conditioning.__main__ import main
from conditioning.checkup import Checkup

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
    ("arguments", "match"),
    [
        ("", "required: COMMAND"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("checkup", "required: FACTORY"),
        ("checkup nets", "should have the form PACKAGE.MODULE:NAME or FILE.py:NAME"),
        ("checkup nets:", "should have the form"),
        ("checkup nts:Net", "There is no module 'nts' to import"),
        ("checkup torch.nts:Net", "There is no module 'torch.nts'"),
        ("checkup none.py:Net", "There is no file 'none.py'"),
        ("checkup nets:Nett", r"nets has no 'Nett': did you mean 'Net' or 'net'"),
        ("checkup nets:zzz", "nets has no 'zzz': it defines Block, Net, .* more"),
        ("checkup nets:number", "nets:number is a int; expected an nn.Module"),
        ("checkup nets:with_width", r"needs arguments \(width\)\. Write a function without"),
        ("checkup nets:broken", "nets:broken raised ValueError: no weights here"),
        ("checkup nets:loader", "nets:loader gives DataLoader; expected an nn.Module"),
        ("checkup nets:pair", r"nets:pair gives \(Net, MSELoss\); expected"),
        ("checkup nets:Net", "There are no data: pass --data"),
        ("checkup nets:Net --data nothing", "'nothing' is no data: expected FILE.npz"),
        ("checkup nets:Net --data d.npz", "There is no data file 'd.npz'"),
        ("checkup nets:Net --data nets:number", "nets:number gives a int; expected a DataLoader"),
        ("checkup nets:Net --data nets:Nett", "did you mean"),
        ("checkup nets:Net --data nets:with_width", "needs arguments"),
        ("checkup nets:Net --data nets:empty", "nets:empty holds no batch"),
        ("checkup nets:Net --data nets:loader --batch-size 3", "makes batches of its own"),
        ("checkup nets:Net --data nets:batch --loss nets:number", "expected a function of outputs"),
        ("checkup nets:Net --data nets:batch --loss hinge", "should have the form"),
        ("checkup nets:Net --data nets:batch --classes 3", "--classes is for random inputs"),
        ("checkup nets:Net --data nets:batch --input-shape 3", "not allowed with argument"),
        ("checkup nets:Net --tokens 7,5 --input-shape 3", "not allowed with argument"),
        ("checkup nets:Net --input-shape 3", "pass --classes N, or --loss mse"),
        ("checkup nets:Net --input-shape 3x3 --classes 2", "expected sizes such as 3,32,32"),
        ("checkup nets:Net --input-shape 3,-1 --classes 2", "expected sizes such as 3,32,32"),
        ("checkup nets:Net --input-shape 9 --loss mse", r"run on inputs of shape \(2, 9\)"),
        ("checkup nets:Text --tokens 7", "such as 50257,128, got '7'"),
        ("checkup nets:Net --input-shape 3 --classes 0", "expected a positive integer, got '0'"),
        ("checkup nets:Net --input-shape 3 --classes 2 --device tpu9", "none that torch knows"),
        ("checkup nets:Net --input-shape 3 --classes 2 --budget -3", "expected a number above 0"),
        ("checkup nets:Net --input-shape 3 --classes 2 --learning-rate x", "a number above 0"),
        ("checkup nets:Net --input-shape 3 --classes 2 --eval --train", "not allowed with"),
        ("checkup nets:Net --input-shape 3 --classes 2 --dtype int8", "invalid choice: 'int8'"),
        ("checkup nets:Net --input-shape 3 --classes 2 --chekpoint x", "unrecognized arguments"),
        ("checkup nets:Net --html a.pdf", "--html needs a file that ends in .html or .htm, got"),
        ("checkup nets:Net --json a.html", "--json needs a file that ends in .json, got 'a.html'"),
        ("checkup nets:Net --text a", "--text needs a file that ends in .txt, got 'a'"),
        ("checkup nets:Net --html -", "Only --json can go to the standard output"),
        ("show none.json", "'none.json' cannot be read: No such file or directory"),
        ("show nets.py", "'nets.py': This is no JSON"),
        ("compare nets.py nets.py", "'nets.py': This is no JSON"),
        ("compare none.json", "required: B.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, match, seen, capsys):
    said = fails(capsys, *arguments.split())
    assert re.search(match, said), said
    assert not seen


def test_no_gpu_is_said(seen, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, match in ((None, "built without CUDA"), ("12.4", "no GPU is seen")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert match in fails(capsys, "checkup", "nets:Net", *RANDOM, "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "there are 2 GPUs" in fails(capsys, "checkup", "nets:Net", *RANDOM, "--device", "cuda:2")


def test_imports_that_fail_are_no_missing_modules(seen, capsys):
    Path("failing.py").write_text("raise RuntimeError('at import')\n")
    Path("wanting.py").write_text("import not_there_at_all\n")
    for place in ("failing", "failing.py"):
        assert "RuntimeError: at import" in fails(capsys, "checkup", f"{place}:Net")
    said = fails(capsys, "checkup", "wanting:Net")
    assert "Importing wanting raised ModuleNotFoundError: No module named 'not_there" in said


def test_outputs_are_checked_before_the_run(seen, capsys):
    Path("file").write_text("")
    Path("folder.html").mkdir()
    for path, match in (
        ("file/a.html", "file' is no folder"), ("folder.html", "it is a folder"),
    ):  # fmt: skip
        assert match in fails(capsys, "checkup", "nets:broken", *RANDOM, "--html", path)


@pytest.mark.skipif(os.name == "nt", reason="permissions are others")
def test_write_protection_is_seen_before_the_run(seen, capsys, monkeypatch):
    # For root nothing is protected: what the system says of the user is imitated.
    Path("old.txt").write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for path, match in (("new.txt", "is write-protected"), ("old.txt", "it is write-protected")):
        assert match in fails(capsys, "checkup", "nets:broken", *RANDOM, "--text", path)


def test_an_error_of_the_model_is_one_line_unless_it_is_debugged(capsys):
    arguments = ["checkup", "nets:Net", "--input-shape", "9", "--classes", "2"]
    said = fails(capsys, *arguments)
    assert said.startswith(
        "Examining Net on a batch of the shapes 64x9, 64 raised RuntimeError: mat1"
    )
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_errors_of_the_checkup_are_one_line(capsys):
    said = fails(capsys, "checkup", "nets:Net", *RANDOM, "--blocks", "layer9.*")
    assert "'layer9.*' matches nothing in the Net" in said


def test_outputs_that_the_loss_cannot_read_are_said(capsys):
    Path("d.npz").unlink(missing_ok=True)
    np.savez("d.npz", x=np.zeros((8, 3), np.float32), y=np.zeros((8, 5), np.float32))
    said = fails(capsys, "checkup", "nets:Net", "--data", "d.npz")
    assert "The model returns the shape (8, 2), the targets have (8, 5)" in said


def test_json_alone_goes_to_the_standard_output(seen, capsys):
    assert main(["checkup", "nets:everything", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert Checkup.from_json(shown.out).blocks == made().blocks
    assert "CifarResNet: no problem" in shown.err
    assert "built" in shown.err


def test_files_are_written_and_named(seen, capsys, monkeypatch):
    monkeypatch.setattr(Checkup, "to_html", lambda self: "<p>page</p>")
    outputs = ["--json", "out/a.json", "--text", "out/a.txt", "--html", "out/a.html"]
    assert main(["checkup", "nets:Net", *RANDOM, *outputs]) == 0
    shown = capsys.readouterr().out
    assert "written: out/a.json, out/a.txt, out/a.html" in shown
    assert Path("out/a.html").read_text().strip() == "<p>page</p>"
    assert Path("out/a.txt").read_text().strip() in shown
    assert Checkup.load("out/a.json").hessian == made().hessian


@pytest.mark.parametrize(
    ("report", "options", "code"),
    [
        (made(findings=False), [], 0),
        (made(), [], 1),
        (made(), ["--exit-zero"], 0),
        (dataclasses.replace(made(findings=False), nonfinite="in the loss"), [], 1),
        (made(status="out of budget", findings=False), [], 0),
        (made(status="interrupted"), [], 130),
        (made(status="interrupted"), ["--exit-zero"], 130),
    ],
)
def test_exit_codes(report, options, code, monkeypatch):
    monkeypatch.setattr("conditioning.cli.commands.checkup", lambda *_, **__: report)
    assert main(["checkup", "nets:Net", *RANDOM, "--json", "a.json", *options]) == code
    assert Checkup.load("a.json").status == report.status


def test_an_interruption_before_anything_was_measured(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("conditioning.cli.commands.checkup", interrupted)
    assert main(["checkup", "nets:Net", *RANDOM, "--json", "a.json"]) == 130
    assert capsys.readouterr().err.startswith("interrupted")
    assert not Path("a.json").exists()


def test_compare_prints_text_or_json(capsys):
    made().save("a.json")
    made(ratio=0.5).save("b.json")
    assert main(["compare", "a.json", "b.json"]) == 0
    assert capsys.readouterr().out.strip() == str(made().compare(made(ratio=0.5)))
    assert main(["compare", "a.json", "b.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"]


def test_compare_exits_with_one_if_a_problem_is_new():
    made(findings=False).save("a.json")
    made().save("b.json")
    assert main(["compare", "a.json", "b.json"]) == 1
    assert main(["compare", "a.json", "b.json", "--exit-zero"]) == 0
    assert main(["compare", "b.json", "a.json"]) == 0


def test_show_prints_or_writes(capsys, monkeypatch):
    monkeypatch.setattr(Checkup, "to_html", lambda self: "<p>page</p>")
    made().save("a.json")
    assert main(["show", "a.json"]) == 0
    assert capsys.readouterr().out.strip() == str(made())
    assert main(["show", "a.json", "--html", "b.html", "--text", "b.txt"]) == 0
    assert capsys.readouterr().out == ""
    assert Path("b.html").read_text().strip() == "<p>page</p>"
    assert Path("b.txt").read_text().strip() == str(made())
    assert main(["show", "a.json", "--json", "-"]) == 0
    assert Checkup.from_json(capsys.readouterr().out) == made()


def test_version_and_help(capsys):
    for option, expected in (("--version", conditioning.__version__), ("--help", "exit codes")):
        with pytest.raises(SystemExit) as ended:
            main([option])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


# -- the real thing -----------------------------------------------------------------------------


def test_a_real_checkup(capsys):
    code = main([
        "checkup", "nets:Net", *RANDOM, "--batch-size", "8", "--batches", "2", "--budget", "none",
        "--max-matvecs", "200", "--dtype", "float64", "--json", "a.json",
    ])  # fmt: skip
    report = Checkup.load("a.json")
    assert code == (1 if report.problems else 0)
    assert [block.name for block in report.blocks] == ["blocks.0", "blocks.1"]
    assert report.setting.dtype == "float64"
    assert report.setting.num_samples == 16
    assert report.setting.loss == "cross_entropy"
    assert "2 blocks: Block" in capsys.readouterr().out


def command(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "conditioning", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_as_a_process_it_returns_its_code():
    made().save("a.json")
    made(findings=False).save("b.json")
    with command("compare", "b.json", "a.json") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert out.startswith("CifarResNet, before and after")


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send")
def test_ctrl_c_writes_what_is_known():
    with command(
        "checkup", "nets:Slow", *RANDOM, "--budget", "none", "--json", "a.json"
    ) as process:
        # The norms of four batches need few backward passes, the spectra hundreds.
        running, deadline = Path("running"), time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            if running.exists() and running.stat().st_size > 25:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    report = Checkup.load("a.json")
    assert report.status == "interrupted"
    assert "The checkup was interrupted" in out
