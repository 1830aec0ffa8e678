"""The benchmark beside other tools: its protocol, true errors, tables, and that of the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import hessian, hessian_tables, references
from benchmarks.hessian_problems import CASES, HessianProblem
from benchmarks.references import true_error
from benchmarks.timing import Median, Process, WorkerError
from benchmarks.tool_worker import Server
from benchmarks.tools import KINDS, Counted, OutOfTimeError, Tool, Top

ROOT = Path(__file__).parent.parent
PRESET = hessian.Preset(True, rounds=2, block_rounds=2, starts=2, limit=5, tolerances=(1e-3,))


def small():
    """A smooth problem of 52 parameters."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), nn.Tanh())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    inputs = torch.randn(20, 4, generator=generator)
    return HessianProblem("small", model, nn.MSELoss(), inputs, inputs[:, :3].clone())


# -- problems and references -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_problems_are_the_same_function_in_both_precisions(case):
    problem = CASES[case].build(quick=True)
    loss, gradient = problem.fingerprint()
    double = problem.double()
    assert double.fingerprint() == pytest.approx((loss, gradient), rel=1e-4)
    assert next(problem.model.parameters()).dtype == torch.float32
    assert sum(g.numel() for g in problem.gradient()) == problem.size


def test_the_tiny_net_is_as_large_as_its_title_says():
    assert CASES["tiny"].build(quick=False).size == 1765


def test_fused_attention_is_the_same_function():
    one, other = (CASES[c].build(quick=True).double() for c in ("transformer", "fused"))
    assert one.fingerprint() == pytest.approx(other.fingerprint(), rel=1e-12)


def test_a_reference_is_found_by_two_ways(monkeypatch):
    found = references.reference(small())
    assert found["check"].startswith("eigvalsh")
    assert found["difference"] < 1e-12
    assert len(found["values"]) == references.K + references.MORE
    monkeypatch.setattr(references, "_DENSE", 0)
    again = references.reference(small())
    assert again["check"].startswith("scipy")
    assert again["difference"] < 1e-9
    np.testing.assert_allclose(again["values"], found["values"], rtol=1e-9)


def test_ways_that_do_not_agree_make_no_reference(monkeypatch):
    plain = references.plain_operator

    def wrong(problem):
        return plain(problem) * 1.001

    monkeypatch.setattr(references, "_DENSE", 0)
    monkeypatch.setattr(references, "plain_operator", wrong)
    with pytest.raises(references.Disagreement, match="differ by"):
        references.reference(small())


def test_a_kept_reference_is_used_for_the_same_function_only(tmp_path, monkeypatch):
    started = []

    class Fake:
        def __init__(self, *arguments, **_):
            started.append(arguments)
            self.first = {"values": [1.0]}

        def close(self):
            pass

    monkeypatch.setattr(references, "Process", Fake)
    settings = {"quick": True, "threads": 1}
    references.load_or_compute("tiny", tmp_path, **settings)
    references.load_or_compute("tiny", tmp_path, **settings)
    assert len(started) == 1
    path = tmp_path / references.FILE
    kept = json.loads(path.read_text())
    kept["tiny, quick"]["fingerprint"][1] *= 1 + 1e-6  # other weights or data
    path.write_text(json.dumps(kept))
    references.load_or_compute("tiny", tmp_path, **settings)
    assert len(started) == 2


# -- true errors -------------------------------------------------------------------------------

KNOWN = [5.0, -4.0, 3.0, 2.0, -1.0, 0.999, 0.5]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([5, -4, 3, 2, -1], 0),
        ([-1, 2, 3, -4, 5], 0),  # in any order
        ([5.05, -4, 3, 2, -1], 0.01),
        ([5, -4, 3, 2, 0.999], 0.001),  # a tie at the end
        ([5, 3, 2, -1, 0.999], 0.5),  # one was missed: 2 is in the place of 3 ... -1 in that of 2
        ([5, 5, -4, 3, 2], 1.0),  # a copy: 2 is in the place of -1
        ([5, 4, 3, 2, -1], 1 / 4),  # the sign: 4 can be no more than the neighbour of 5 or 3
        ([5, -4, 3, 2], np.inf),
        ([5, -4, 3, 2, np.nan], np.inf),
    ],
)
def test_the_true_error_is_that_of_magnitudes_and_values(values, error):
    found = true_error(values, KNOWN)
    if error in (0, 0.01, 0.001, np.inf):
        assert found == pytest.approx(error, rel=0.02)
    else:
        assert found >= error


# -- tools and their process ---------------------------------------------------------------------


def test_this_library_answers_all_that_is_asked():
    server = Server("auto", small())
    assert server.handle({"do": "product", "vectors": 1, "count": 1}) == {
        "fails": "RuntimeError: The tool was not built."
    }
    assert server.handle({"do": "import"})["blocks"] is True
    assert server.handle({"do": "build"})["wall"] > 0
    assert server.handle({"do": "gradient", "count": 2})["processor"] > 0
    for vectors in (1, 3):
        assert server.handle({"do": "product", "vectors": vectors, "count": 2})["peak_mib"] >= 0
    asked = {"do": "top", "k": 5, "tolerance": 1e-6, "seed": 0, "solver": ""}
    found = server.handle(asked | {"seconds": 60})
    known = references.reference(small())["values"]
    assert found["converged"] is True
    assert true_error(found["values"], known) < 1e-5
    stopped = server.handle(asked | {"seconds": -1})
    assert stopped == {"fails": "stopped after -1 s (0 products)"}
    assert server.handle(asked | {"seconds": 60})["products"] == found["products"]


@pytest.mark.parametrize("name", ["auto", "pyhessian"])
def test_products_of_tools_are_the_same(name):
    pytest.importorskip("pyhessian" if name == "pyhessian" else "torch")
    problem = small()
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(1))
    expected = references.plain_operator(problem.double()).matvec(vector.double().numpy())
    modes = [module.training for module in problem.model.modules()]
    with pytest.warns(UserWarning, match="create_graph") if name == "pyhessian" else _nothing():
        found = KINDS[name].make(problem).product(vector)
    if not isinstance(found, torch.Tensor):
        found = torch.cat([part.reshape(-1) for part in found])
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert [module.training for module in problem.model.modules()] == modes


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_tool_that_is_not_there_is_a_failure_that_says_what_installs_it():
    if not KINDS["curvlinops"].peer:
        pytest.fail("curvlinops lives in the other environment")
    found = Server("curvlinops", small()).handle({"do": "import"})
    assert found["fails"].startswith("PackageNotFoundError")
    assert "`make peers`" in hessian._with_hint(found["fails"])
    assert hessian._with_hint("ValueError: no") == "ValueError: no"


def test_without_the_other_environment_the_run_says_what_makes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hessian, "PEERS", tmp_path / "python")
    with pytest.raises(SystemExit):
        hessian.main(["--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert "`make peers` installs" in said
    assert "--no-peers" in said
    with pytest.raises(WorkerError, match="make peers"):
        hessian.starter("curvlinops", "tiny", PRESET, 1)()


def test_a_deadline_stops_and_vectors_are_counted():
    counted = Counted(lambda v: v)
    counted(torch.ones(3))
    counted(torch.ones(3, 4))
    assert counted.count == 5
    with pytest.raises(OutOfTimeError, match="0 products"):
        Counted(lambda v: v, seconds=-1)(torch.ones(3))


def test_the_peak_of_memory_is_that_of_what_came_after():
    # In a process of its own, as it is used: one that ran other tests has memory in stock.
    code = (
        "import torch; from benchmarks.tool_worker import PeakMemory; memory = PeakMemory(); "
        "block = torch.ones(64 * 2**18); del block; print(memory.growth(), memory._exact)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    growth, exact = run.stdout.split()
    assert 55 <= float(growth) <= 120 or exact == "False"


ECHO = """
import json, sys, time
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked == "end":
        sys.exit(3)
    time.sleep(30 if asked == "sleep" else 0)
    print(json.dumps(asked), flush=True)
"""


def test_a_process_answers_ends_or_is_ended(tmp_path, monkeypatch):
    (tmp_path / "echoing.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = Process("echoing", python=sys.executable, patience=20)
    assert process.first == "ready"
    assert process.ask({"a": [1, 2.5]}) == {"a": [1, 2.5]}
    with pytest.raises(WorkerError, match="exit status 3"):
        process.ask("end")
    with pytest.raises(WorkerError, match="ended"):
        process.ask("again")
    process.close()
    slow = Process("echoing", patience=20)
    slow._patience = 0.1
    with pytest.raises(WorkerError, match=r"no answer in 0 s: ended"):
        slow.ask("sleep")
    assert slow._process.poll() is not None
    with pytest.raises(WorkerError, match="had ended"):
        slow.ask("again")


# -- a run -----------------------------------------------------------------------------------------


class Scripted(Tool):
    """Fails, or finds what it is told."""

    blocks = True

    def __init__(self, problem):
        self.problem = problem

    def product(self, vectors):
        if vectors.ndim == 2 and vectors.shape[1] == hessian.BLOCK:
            msg = "no blocks today\nand more"
            raise ValueError(msg)
        return vectors

    def top(self, wanted):
        values = [5.0, -4.0, 3.0, 2.0, -1.0 - 0.01 * wanted.seed]
        return Top(values, wanted.seed == 0, 10 + 2 * wanted.seed, "said")


class Local:
    """A process that is none; ends when it is told to."""

    def __init__(self, tool, end_at=None):
        self.server, self.end_at = Server(tool, small()), end_at

    def ask(self, content):
        if content["do"] == self.end_at:
            msg = "The worker ended (exit status -9)."
            raise WorkerError(msg)
        return self.server.handle(content)

    def close(self):
        pass


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setitem(KINDS, "auto", hessian_tables.KINDS["auto"])
    kind = type(KINDS["auto"])("scripted", Scripted, "torch")
    monkeypatch.setitem(KINDS, "scripted", kind)
    monkeypatch.setattr(hessian, "_TURN", 1e-4)
    monkeypatch.setattr(hessian, "say", lambda _: None)


def run(tools):
    import random

    participants = {name: hessian.Participant(start) for name, start in tools.items()}
    hessian.time_products(participants, PRESET, random.Random(0))
    hessian.solve(participants, PRESET, KNOWN, random.Random(0))
    return {name: one.found for name, one in participants.items()}


def test_a_failure_takes_nothing_with_it(scripted):
    starts = []

    def dying():
        starts.append(1)
        return Local("scripted", end_at="top")

    found = run({"scripted": lambda: Local("scripted"), "compiled": dying})
    good, bad = found["scripted"], found["compiled"]
    assert good["fails"] == {str(hessian.BLOCK): "ValueError: no blocks today"}
    assert good["gradients"]["1"]["value"] > 0
    assert set(good["gradients"]) == {"1"}
    cell = good["top"][""]["0.001"]
    assert cell["starts"] == 2
    assert cell["products"] == 11
    assert cell["converged"] == 1
    assert cell["error"] == pytest.approx(0.011, rel=0.2)  # the worst of both
    assert bad["top"] == {}  # engines are not asked for eigenvalues
    assert bad["gradients"]["1"]["value"] > 0


def test_a_process_that_ends_is_started_again_for_what_comes_after(scripted):
    ends = ["product", None]

    def start():
        return Local("scripted", end_at=ends.pop(0))

    one = hessian.Participant(start)
    assert one.ask("product", vectors=1, count=1) == {"fails": "The worker ended (exit status -9)."}
    assert one.ask("product", vectors=1, count=1)["wall"] > 0


def test_an_engine_that_is_not_there_is_a_failure_with_its_reason(scripted):
    class Unknown(KINDS["auto"].make):
        choice = "perpetual"

    KINDS["scripted"] = type(KINDS["auto"])("unknown", Unknown, "torch")
    found = run({"scripted": lambda: Local("scripted")})["scripted"]
    assert "engine" in found["fails"]["1"] or "perpetual" in found["fails"]["1"]


# -- tables --------------------------------------------------------------------------------------


def tool(cost, block, **top):
    def entry(value):
        return {"value": value, "low": value, "high": value}

    found = {
        "fails": {}, "version": "1.0", "blocks": block is not None, "build_s": 0.1,
        "gradients": {"1": entry(cost)}, "product_s": {"1": 0.02}, "gradient_s": {"1": 0.01},
        "first_s": {"1": 0.05}, "peak_mib": {"1": 12.0}, "engine": {"1": None}, "top": top,
    }  # fmt: skip
    if block is not None:
        found["gradients"]["16"] = entry(block)
    return found


def cell(products, seconds, error, converged, starts=3):
    return {
        "starts": starts, "products": products, "seconds": seconds, "error": error,
        "converged": converged, "said": "", "values": [], "fails": None,
    }  # fmt: skip


@pytest.fixture
def report():
    stopped = {"starts": 0, "fails": "stopped after 40 s (99 products)"}
    tools = {
        "auto": tool(1.94, 0.852, **{"": {"0.001": cell(61, 0.2044, 5e-7, 3)}}),
        "linearized": tool(1.5, 0.3),
        "compiled": tool(1.02, 0.2),
        "pyhessian": tool(1.7, None, **{"": {"0.001": stopped}}),
        "curvlinops": {"fails": {"1": "NotImplementedError: no forward AD"}, "top": {}},
        "eigenthings": tool(
            2.8, None, **{"lanczos, max_iter=60": {"0.001": cell(60, 1.5, 0.53, 1)}}
        ),
    }
    where = {
        "device": "a processor", "cores": 2, "torch threads": 1, "date": "2026-01-01",
        "packages": {"torch": "2.13.0"},
    }  # fmt: skip
    problem = {
        "name": "LSTM", "title": "an LSTM", "size": 100, "load average before": 0.1, "tools": tools,
        "reference": {"status": "certified", "check": "eigsh", "difference": 1e-15, "values": []},
    }  # fmt: skip
    preset = {"quick": False, "block": 16, "k": 5, "tolerances": [1e-3]}
    return {"environment": where, "preset": preset, "problems": {"lstm": problem}}


def test_the_table_says_what_was_measured(report):
    table = hessian_tables.rst(report)
    cells = [
        line[7:].strip() for line in table.splitlines() if line.startswith(("   * -", "     -"))
    ]
    assert cells[6:] == [
        "LSTM", "gradients for a product", "1.94 (0.852)", "1.7", "fails", "2.8",
        "", "once an engine is built", "compiled: 1.02 (0.2)", "", "", "",
        "", "five largest, tolerance 0.001", "61, 0.204 s, 5e-07",
        "stopped after 40 s (99 products)", "fails", "60, 1.5 s, 0.53\\*",
    ]  # fmt: skip
    for said in ("a processor, 2 cores, 1 thread,", "torch 2.13.0", "2026-01-01", "PyHessian 1.0"):
        assert said in " ".join(table.split())


def test_the_text_has_all_failures_with_their_reasons(report):
    text = hessian_tables.text(report["problems"]["lstm"])
    assert "fails: NotImplementedError: no forward AD" in text
    assert "fails: stopped after 40 s (99 products)" in text
    assert "3 of 3" in text
    assert "1 of 3" in text
    assert "1.940 [1.940, 1.940]" in text


def test_the_table_is_inserted_between_its_marks(report):
    table = hessian_tables.rst(report)
    page = f"before\n{hessian_tables.BEGIN}old\n{hessian_tables.END}after\n"
    once = hessian_tables.inserted(page, table)
    assert table in once
    assert "old" not in once
    assert hessian_tables.inserted(once, table) == once
    with pytest.raises(ValueError, match="marks"):
        hessian_tables.inserted("no marks", table)


def test_the_readme_has_the_table_of_the_committed_results():
    page = (ROOT / "README.rst").read_text("utf-8")
    table = hessian_tables.rst(hessian_tables.committed())
    assert hessian_tables.inserted(page, table) == page


def test_a_table_of_small_problems_or_of_a_busy_machine_says_so(report):
    said = " ".join(hessian_tables.rst(report).split())
    assert "Provisional" not in said
    assert "Small problems" not in said
    report["preset"]["quick"] = True
    report["problems"]["lstm"]["load average before"] = 4.0
    said = " ".join(hessian_tables.rst(report).split())
    assert "Small problems" in said
    assert "load average up to 4.0" in said


def test_the_full_results_are_shown_before_the_quick_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(hessian_tables.reporting, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.hessian"):
        hessian_tables.committed()
    for name in ("hessian_quick", "hessian"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
        assert hessian_tables.committed() == {"name": name}


def test_the_table_is_restructured_text_without_a_complaint(report):
    docutils = pytest.importorskip("docutils.core")
    settings = {"report_level": 1, "halt_level": 2, "warning_stream": False}
    html = docutils.publish_string(
        hessian_tables.rst(report), writer="html", settings_overrides=settings
    ).decode()
    assert html.count("<tr") == 4
    assert "0.53*" in html


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (2e-6, "2e-06"), (0.13249, "0.132"), (1.4549, "1.45"), (1234.4, "1234"),
     (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_have_three_digits(value, shown):
    assert hessian_tables.number(value) == shown


def test_medians_are_shown_with_their_intervals():
    assert hessian_tables._median({"value": 1, "low": 0.5, "high": 2}) == str(Median(1, 0.5, 2))
    assert hessian_tables._median(None) == "-"
