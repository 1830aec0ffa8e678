"""The command line of the experiments, on a small one that is registered here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from experiments import registry
from experiments.__main__ import main
from experiments.errors import ExperimentError, MissingDependencyError, UnknownNameError

ROOT = Path(__file__).resolve().parent.parent

# An experiment that can be told to be slow, to be interrupted, or to break. Its claim on the mean
# rests on random draws: equal tables after a resumed run mean that the draws were the same.
FAKE = '''
"""A small experiment."""

import os
import time
from dataclasses import dataclass

import torch

from experiments.claims import Claim, Measured, Tolerance, decide, decide_every, over_runs
from experiments.registry import Preset
from experiments.sweep import run_cells

NAME = "tiny"
TITLE = "A tiny experiment"
PAPER = "Nobody, Nowhere, 2026"


@dataclass(frozen=True)
class Depths(Preset):
    depths: tuple[int, ...] = (2, 4)


PRESETS = {
    "paper": Depths(summary="everything", depths=(2, 4, 8, 16)),
    "quick": Depths(summary="a second", seeds=3),
}
FLAT = Claim("flat", "section 1", "κ is 2", 2.0, Tolerance.within(rtol=1e-9), "rounding", "dense")
MEAN = Claim("mean", "section 2", "draws have mean κ(D)", "κ(D)", Tolerance.within(atol=9), "wide",
             "drawn")
WRONG = Claim("wrong", "section 3", "κ is 3", 3.0, Tolerance.within(atol=0.1), "near", "dense")


def claims():
    return [FLAT, MEAN, WRONG]


def run(options):
    preset = PRESETS[options.preset]
    cells = [{"L": L, "seed": s} for L in preset.depths for s in range(options.seeds)]

    def measure(cell):
        time.sleep(float(os.environ.get("TINY_SECONDS", "0")))
        if os.environ.get("TINY_INTERRUPT") == f"{cell['L']},{cell['seed']}":
            raise KeyboardInterrupt
        return {"kappa": 2.0, "draw": torch.randn((), dtype=torch.float64)}

    with options.open_store() as store:
        results = run_cells(cells, measure, store, progress=options.progress, title=NAME)
    if os.environ.get("TINY_BREAK"):
        raise ZeroDivisionError
    return [
        decide(WRONG, Measured(results[0]["kappa"])),
        decide(MEAN, over_runs([result["draw"] for result in results], expected=0.5)),
        decide_every(FLAT, [Measured(result["kappa"]) for result in results]),
    ]
'''
DRIVER = """
import sys
from experiments import registry
from experiments.__main__ import main
registry.register("tiny", "tiny_experiment")
registry.register("taught", "taught_experiment")
sys.exit(main())
"""
# An experiment that trains a cell on all ranks and another one on the first alone. It writes and
# prints as if there were one process.
TAUGHT = '''
"""A small training."""

import os

import torch

from experiments.claims import Claim, Measured, Tolerance, decide
from experiments.errors import ExperimentError
from experiments.ranks import current
from experiments.registry import Preset
from experiments.sweep import run_cells
from experiments.training import Recipe, Trainer

NAME = "taught"
TITLE = "A tiny training"
PAPER = "Nobody, Nowhere, 2026"
PRESETS = {"quick": Preset(summary="a second")}
RIGHT = Claim("right", "section 1", "nothing is wrong", 0.0, Tolerance.within(atol=1.0), "a share",
              "by training")


def claims():
    return [RIGHT]


def run(options):
    torch.set_num_threads(1)
    pixels = torch.from_numpy(options.dataset.images).reshape(len(options.dataset), -1).double()
    labels = torch.from_numpy(options.dataset.labels)

    def measure(cell):
        if os.environ.get("TAUGHT_FAILS") == f"{cell['ranks']} {current().rank}":
            raise ExperimentError("the net has had enough")
        net = torch.nn.Linear(pixels.shape[1], options.dataset.num_classes).double()
        recipe = Recipe(num_steps=9, batch_size=4, lr=0.1)
        trainer = Trainer(net, pixels, labels, recipe, evaluation=(pixels, labels))
        result = trainer.run(checkpoint=options.out / f"{cell['ranks']}.pt")
        return {"loss": result.losses[-1], "error": result.final_error, "size": current().size}

    cells = [{"ranks": "one"}, {"ranks": "all"}]
    with options.open_store() as store:
        one, shared = run_cells(
            cells, measure, store, progress=options.progress,
            parallel=lambda cell: cell["ranks"] == "all",
        )
    print(f"trained by {one['size']} and by {shared['size']}")
    (options.out / "table.txt").write_text(str(shared))
    return [decide(RIGHT, Measured(shared["error"]))]
'''


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to run in, with the small experiment and a small data set."""
    (tmp_path / "tiny_experiment.py").write_text(FAKE, encoding="utf-8")
    (tmp_path / "taught_experiment.py").write_text(TAUGHT, encoding="utf-8")
    (tmp_path / "driver.py").write_text(DRIVER)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "small.npz", x=rng.random((20, 4)), y=np.arange(20) % 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_MODULES", {"tiny": "tiny_experiment"})
    monkeypatch.delitem(sys.modules, "tiny_experiment", raising=False)
    for name in ("TINY_SECONDS", "TINY_INTERRUPT", "TINY_BREAK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def start(workplace, *arguments, command=(), **environment):
    path = os.pathsep.join([str(ROOT), str(workplace)])
    return subprocess.Popen(
        [sys.executable, *(command or ("-W", "error")), "driver.py", *arguments],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "100"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def test_without_arguments_experiments_and_claims_are_listed(workplace, capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for words in ("tiny: A tiny experiment", "Nobody, Nowhere", "flat: κ is 2", "--preset quick"):
        assert words in text


def test_an_experiment_that_cannot_be_imported_does_not_hide_the_others(workplace, capsys):
    registry.register("absent", "no_such_package_anywhere.absent")
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "absent: experiment absent needs no_such_package_anywhere: pip install" in text
    assert "tiny: A tiny experiment" in text
    with pytest.raises(MissingDependencyError):
        registry.find("absent")


def test_what_is_registered_must_be_an_experiment(workplace, capsys):
    registry.register("json", "json")
    with pytest.raises(ExperimentError, match="lacks NAME, TITLE, PAPER, PRESETS, claims, run"):
        registry.find("json")


def test_a_run_prints_the_table_and_writes_the_verdicts(workplace, capsys):
    assert main(["tiny"]) == 0
    shown = capsys.readouterr()
    assert "preset quick, data digits, device" in shown.out
    assert "3 claims: 2 hold, 1 fail, 0 not decided" in shown.out
    document = json.loads(Path("figures/tiny/verdicts.json").read_text("utf-8"))
    assert [claim["id"] for claim in document["claims"]] == ["flat", "mean", "wrong"]
    assert [claim["verdict"] for claim in document["claims"]] == ["holds", "holds", "fails"]
    assert document["claims"][1]["num_runs"] == 6
    assert document["preset"] == "quick"
    assert document["environment"]["seeds"] == 3
    assert document["environment"]["data"] == "digits"
    assert str(workplace) not in json.dumps(document)


def test_every_option_reaches_the_experiment(workplace, capsys):
    words = "tiny --preset paper --data small.npz --device cpu --seeds 2 --out o --fresh --quiet"
    assert main(words.split()) == 0
    assert capsys.readouterr().err == ""
    document = json.loads(Path("o/verdicts.json").read_text("utf-8"))
    assert document["preset"] == "paper"
    assert document["environment"]["data"] == "small"
    assert document["environment"]["device"] == "cpu"
    assert document["claims"][1]["num_runs"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tinny", "did you mean 'tiny'?"),
        ("tiny --data digit", "did you mean 'digits'?"),
        ("tiny --data nowhere.npz", "does not exist"),
        ("tiny --preset quik", "did you mean 'quick'?"),
        ("tiny --device gpu", "unknown device 'gpu'"),
        ("tiny --device cuda:99", "torch sees"),
        ("tiny --seeds 0", "at least 1"),
        ("tiny --resume", "without --resume"),
        ("compare a.json b.json", "no such file"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(workplace, capsys, words, message):
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert not Path("figures/tiny/verdicts.json").exists()


@pytest.mark.parametrize("words", ["tiny --resume --fresh", "tiny --seeds many", "tiny --nothing"])
def test_a_wrong_option_shows_the_usage(workplace, capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code == 2
    assert "usage: python -m experiments" in capsys.readouterr().err


def test_an_interrupted_run_tells_how_to_continue_and_does(workplace, capsys, monkeypatch):
    assert main(["tiny", "--out", "whole"]) == 0
    table = capsys.readouterr().out
    monkeypatch.setenv("TINY_INTERRUPT", "4,1")
    assert main(["tiny", "--out", "cut", "--fresh"]) == 130
    shown = capsys.readouterr().err
    assert "interrupted after 4 of 6 cells" in shown
    assert "continue with: python -m experiments tiny --out cut --resume" in shown
    assert not Path("cut/verdicts.json").exists()
    monkeypatch.delenv("TINY_INTERRUPT")
    assert main(["tiny", "--out", "cut", "--resume"]) == 0
    shown = capsys.readouterr()
    assert "continuing with 4 finished cells" in shown.err
    assert shown.out == table.replace("whole", "cut")
    assert Path("cut/verdicts.json").read_bytes() == Path("whole/verdicts.json").read_bytes()


def test_a_plain_run_continues_an_unfinished_one_only(workplace, capsys, monkeypatch):
    monkeypatch.setenv("TINY_BREAK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["tiny"])
    monkeypatch.delenv("TINY_BREAK")
    capsys.readouterr()
    assert main(["tiny"]) == 0
    assert "continuing with 6 finished cells" in capsys.readouterr().err
    assert main(["tiny"]) == 0
    assert "continuing" not in capsys.readouterr().err
    assert main(["tiny", "--resume"]) == 0
    assert "continuing with 6 finished cells" in capsys.readouterr().err
    assert main(["tiny", "--seeds", "4", "--resume"]) == 2
    assert "seeds was 3 and is 4" in capsys.readouterr().err
    assert main(["tiny", "--seeds", "4"]) == 0
    assert "starting anew because seeds was 3 and is 4" in capsys.readouterr().err


def test_a_run_killed_in_the_middle_ends_with_the_same_table(workplace):
    whole = start(workplace, "tiny", "--preset", "paper", "--data", "small.npz", "--out", "whole")
    killed = start(
        workplace, "tiny", "--preset", "paper", "--data", "small.npz", "--out", "cut",
        "--seeds", "1", TINY_SECONDS="0.3",
    )  # fmt: skip
    cells = workplace / "cut" / "cells.jsonl"
    deadline = time.monotonic() + 60
    while not (cells.exists() and cells.read_bytes().count(b"\n") >= 3):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    finished = cells.read_bytes().count(b"\n") - 1
    assert 2 <= finished < 4

    resumed = start(
        workplace, "tiny", "--preset", "paper", "--data", "small.npz", "--out", "cut",
        "--seeds", "1", "--resume",
    )  # fmt: skip
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert f"continuing with {finished} finished cells" in err
    whole_out, whole_err = whole.communicate(timeout=60)
    assert whole.returncode == 0, whole_err
    assert out == whole_out.replace("whole", "cut")
    verdicts = [workplace / name / "verdicts.json" for name in ("cut", "whole")]
    assert verdicts[0].read_bytes() == verdicts[1].read_bytes()


def test_a_terminal_without_greek_gets_no_traceback(workplace):
    process = start(workplace, PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "flat: ? is 2" in out


def test_listing_does_not_import_what_only_a_run_needs():
    code = (
        "import sys; from experiments.__main__ import main; import experiments.registry as r;"
        "r._MODULES.clear(); main([]);"
        "heavy = {'torch', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'pyhessian'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


@pytest.mark.slow
@needs_gloo
def test_torchrun_shares_a_training_and_speaks_once(workplace):
    words = ("taught", "--data", "small.npz", "--device", "cpu")
    out, err = finished(start(workplace, *words, "--out", "several", command=TORCHRUN))
    assert out.count("preset quick") == out.count("claims: 1 hold") == 1
    assert "1 seeds, 2 ranks" in out
    assert out.count("trained by 1 and by 2") == 1
    assert err.count("2/2 cells") == 1
    finished(start(workplace, *words, "--out", "single"))
    names = ["all.pt", "cells.jsonl", "one.pt", "table.txt", "verdicts.json"]
    cells = {}
    for folder in ("several", "single"):
        assert sorted(p.name for p in (workplace / folder).iterdir()) == names
        lines = (workplace / folder / "cells.jsonl").read_text("utf-8").splitlines()
        cells[folder] = [json.loads(line)["result"] for line in lines[1:3]]
        assert json.loads(lines[3]) == {"finished": True, "num_cells": 2}
    assert cells["several"][0] == cells["single"][0]
    assert cells["several"][1] == {
        "loss": pytest.approx(cells["single"][1]["loss"], rel=1e-12),
        "error": cells["single"][1]["error"],
        "size": 2,
    }


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("one 0", "error: the net has had enough"),
        ("all 1", "error on rank 1: the net has had enough"),
    ],
)
def test_under_torchrun_a_failing_rank_ends_all(workplace, fails, message):
    words = ("taught", "--data", "small.npz", "--device", "cpu", "--quiet")
    process = start(workplace, *words, command=TORCHRUN, TAUGHT_FAILS=fails)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count(message) == 1
    assert not (workplace / "figures" / "taught" / "verdicts.json").exists()


def finished(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def test_two_runs_are_compared(workplace, capsys):
    for folder in ("a", "b"):
        assert main(["tiny", "--out", folder]) == 0
    capsys.readouterr()
    assert main(["compare", "a/verdicts.json", "b"]) == 0
    assert "0 verdicts changed" in capsys.readouterr().out
    path = Path("b/verdicts.json")
    path.write_text(path.read_text("utf-8").replace('"holds"', '"fails"'), "utf-8")
    assert main(["compare", "a", "b"]) == 1
    assert "2 verdicts changed" in capsys.readouterr().out


def test_every_claim_needs_its_verdict(workplace):
    experiment = registry.find("tiny")
    options = registry.options_for(experiment, device="cpu", progress=False)

    class Forgetful:
        NAME, TITLE, PAPER = experiment.NAME, experiment.TITLE, experiment.PAPER
        PRESETS = experiment.PRESETS
        claims = staticmethod(experiment.claims)

        @staticmethod
        def run(options):
            return experiment.run(options)[:1]

    with pytest.raises(ExperimentError, match="without a verdict: flat, mean"):
        registry.run(Forgetful, options)


def test_devices():
    assert registry.resolve_device("cpu") == "cpu"
    assert registry.resolve_device("auto") in ("cpu", "cuda")
    for device in ("gpu", "cuda:", "cuda:x", "mps", ""):
        with pytest.raises(UnknownNameError):
            registry.resolve_device(device)


def test_an_experiment_without_data_says_so(workplace, capsys, monkeypatch):
    assert main(["tiny", "--data", "small.npz"]) == 0
    assert "takes no data set" not in capsys.readouterr().err
    monkeypatch.setattr(registry.find("tiny"), "USES_DATA", False, raising=False)
    assert main(["tiny", "--data", "small.npz", "--quiet", "--fresh"]) == 0
    shown = capsys.readouterr()
    assert "note: tiny takes no data set" in shown.err
    assert "preset quick, device" in shown.out
