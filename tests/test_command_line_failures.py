"""``python -m conditioning`` when something goes wrong: nothing measured is lost, no traceback."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkups import checkup as made
from named_nets import RANDOM, fails, named_nets, record_calls

from conditioning.__main__ import main
from conditioning.checkup import Checkup
from conditioning.cli.datasets import Amount, find_data


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current directory with a module of networks."""
    yield from named_nets(tmp_path, monkeypatch)


@pytest.fixture
def seen(monkeypatch):
    """Instead of a checkup: what it was called with."""
    return record_calls(monkeypatch)


def no_page(_):
    raise ZeroDivisionError("no width")


# -- what was measured is printed and written, whatever else fails ------------------------------


def test_a_file_that_cannot_be_written_costs_no_other(seen, capsys, monkeypatch):
    write = Path.write_text

    def full(path, *arguments, **options):
        if path.suffix in (".json", ".html"):
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Checkup, "to_html", lambda self: "<p>page</p>")
    outputs = ["--json", "a.json", "--text", "a.txt", "--html", "a.html"]
    assert main(["checkup", "nets:Net", *RANDOM, *outputs]) == 2
    shown = capsys.readouterr()
    assert "CifarResNet: no problem" in shown.out
    assert "CifarResNet: no problem" in Path("a.txt").read_text()
    assert shown.err == (
        "error: 'a.json' cannot be written: No space left on device. "
        "'a.html' cannot be written: No space left on device.\n"
    )


def test_a_page_that_cannot_be_drawn_costs_no_other(seen, capsys, monkeypatch):
    monkeypatch.setattr(Checkup, "to_html", no_page)
    outputs = ["--html", "a.html", "--text", "a.txt"]
    assert main(["checkup", "nets:Net", *RANDOM, *outputs]) == 2
    assert Path("a.txt").exists()
    assert "'a.html' cannot be made: ZeroDivisionError: no width" in capsys.readouterr().err


class Closed(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, _):
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BrokenPipeError(), 0, ""),
        (OSError(28, "No space left on device"), 2, "The report cannot be printed: No space"),
    ],
)
def test_files_are_written_though_nobody_reads_the_text(
    error, code, said, seen, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", Closed(error))
    assert main(["checkup", "nets:Net", *RANDOM, "--json", "a.json"]) == code
    assert Checkup.load("a.json").blocks == made().blocks
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no such device")
def test_a_full_standard_output_is_one_line(capsys, monkeypatch):
    made().save("a.json")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["show", "a.json"]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == (
        "error: The report cannot be printed: No space left on device.\n"
    )


# -- errors that nobody thought of --------------------------------------------------------------


def test_a_defect_is_one_line_and_no_finding(capsys, monkeypatch):
    made().save("a.json")
    monkeypatch.setattr(Checkup, "__str__", no_page)
    assert main(["show", "a.json"]) == 2
    assert capsys.readouterr().err == (
        "internal error ZeroDivisionError: no width (--debug shows where)\n"
    )
    assert main(["show", "a.json", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_terminal_without_the_signs_gets_others(capsys, monkeypatch):
    made().save("a.json")
    raw = io.BytesIO()
    monkeypatch.setattr(Checkup, "__str__", lambda self: "1.0 \u00b1 0.1")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["show", "a.json"]) == 0
    assert raw.getvalue().strip() == b"1.0 ? 0.1"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--device", "xpu"), "--device xpu cannot be used: .* Leave it out"),
        (("--device", "meta"), "--device meta cannot be used: .* Leave it out"),
        (("--seed", "99999999999999999999"), "--seed: expected an integer from -2"),
        (("--seed", "x"), "--seed: expected an integer from -2"),
        (("--batch-size", "100000000000"), "no memory for inputs of 400000000000x3: lower"),
    ],
)
def test_options_beyond_the_machine_are_one_line(options, match, seen, capsys):
    said = fails(capsys, "checkup", "nets:Net", *RANDOM, *options)
    assert re.search(match, said), said
    assert not seen


def test_tokens_beyond_the_memory_are_one_line(seen, capsys):
    options = ("--tokens", "7,9", "--batch-size", "100000000000")
    assert "no memory for inputs of 400000000000x9" in fails(
        capsys, "checkup", "nets:Text", *options
    )


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_ends_of_the_seeds_are_taken(seed, seen):
    assert main(["checkup", "nets:Net", *RANDOM, "--seed", str(seed)]) == 0
    assert seen[0]["seed"] == seed


def test_bytes_in_another_order_are_the_same_numbers():
    x, y = np.random.rand(8, 3).astype("<f4"), np.arange(8)
    np.savez("d.npz", x=x.astype(">f4"), y=y.astype(">i8"))
    ((inputs, targets),) = find_data("d.npz", Amount(8, 1, 0)).batches
    assert torch.equal(inputs, torch.from_numpy(x))
    assert torch.equal(targets, torch.from_numpy(y))


def test_numbers_that_torch_does_not_have_are_refused(seen, capsys):
    np.savez("d.npz", x=np.zeros((4, 3), np.longdouble), y=np.zeros(4))
    if np.dtype(np.longdouble).itemsize > 8:
        assert "at most 64 bits" in fails(capsys, "checkup", "nets:Net", "--data", "d.npz")


# -- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send")
def test_a_second_ctrl_c_does_not_cost_the_report(capsys, monkeypatch):
    def interrupted(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
        return made(status="interrupted")

    def page(_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return "<p>page</p>"

    monkeypatch.setattr("conditioning.cli.commands.checkup", interrupted)
    monkeypatch.setattr(Checkup, "to_html", page)
    before = signal.getsignal(signal.SIGINT)
    outputs = ["--json", "a.json", "--html", "a.html", "--text", "a.txt"]
    assert main(["checkup", "nets:Net", *RANDOM, *outputs]) == 130
    shown = capsys.readouterr()
    assert "The checkup was interrupted" in shown.out
    assert shown.err == ""
    assert all(Path(f"a.{form}").exists() for form in ("json", "html", "txt"))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send")
def test_a_later_ctrl_c_ends_what_goes_on(capsys, monkeypatch):
    monkeypatch.setattr("conditioning.cli.interrupts._SECOND", 0.05)

    def stubborn(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    monkeypatch.setattr("conditioning.cli.commands.checkup", stubborn)
    assert main(["checkup", "nets:Net", *RANDOM]) == 130
    assert capsys.readouterr().err == "interrupted before there was a report\n"


def test_in_another_thread_signals_are_left_alone(seen):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["checkup", "nets:Net", *RANDOM])))
    thread.start()
    thread.join()
    assert codes == [0]
