"""Small runs of an experiment: whole in this process, or killed in one of its own."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.__main__ import main

ROOT = Path(__file__).parents[1]
CODE = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from {test} import SMALLEST
from experiments import {name}
from experiments.__main__ import main
from experiments.{name} import figures
figures.draw = lambda *_: None  # tables are compared
{name}.PRESETS["quick"] = SMALLEST
sys.exit(main(["{name}", "--device", "cpu", "--out", sys.argv[1], "--quiet"]))
"""


def run_small(name, preset, folder, monkeypatch):
    """Run an experiment by a preset, without figures; its exit status."""
    experiment = importlib.import_module(f"experiments.{name}")
    monkeypatch.setitem(experiment.PRESETS, "quick", preset)
    monkeypatch.setattr(f"experiments.{name}.figures.draw", lambda *_: None)
    return main([name, "--device", "cpu", "--out", str(folder), "--quiet"])


def kill_small(name, test, folder, cells, pause):
    """Run by ``SMALLEST`` of a test file, and kill it once so many cells are finished."""
    code = CODE.format(tests=str(ROOT / "tests"), test=test, name=name)
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)
    store, deadline = folder / "cells.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if store.exists() and store.read_bytes().count(b"\n") > cells:
            break
        time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
