"""Products with Hessians and their largest eigenvalues, beside other tools.

::

    make bench-hessian                        # with the other tools, in their own environment
    python -m benchmarks.hessian --quick      # small problems, few rounds
    python -m benchmarks.hessian --no-peers   # the library alone

Only one process is active at a time. Within a round all tools take a turn, in random order, and
each product is divided by the gradient that the same process has just computed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import hessian_tables
from benchmarks.hessian_problems import CASES
from benchmarks.references import Disagreement, K, load_or_compute, true_error
from benchmarks.reporting import RESULTS, environment, say
from benchmarks.timing import ROOT, Median, Process, WorkerError
from benchmarks.tools import KINDS

#: The interpreter of the environment with the other tools.
PEERS = ROOT / ".venv-peers" / "bin" / "python"
MISSING = "`make peers` installs the other tools into .venv-peers, --no-peers leaves them out."
BLOCK = 16
_TURN = 0.15  # seconds that a turn should take at least, on the clock


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Parameters
    ----------
    quick : bool
        Whether the problems are the small ones.
    rounds, block_rounds : int
        Turns of each tool with one vector, and of those with a block.
    starts : int
        Random starts of each solver.
    limit : float
        Seconds of a solver for one tolerance: a start that exceeds it is stopped, and no other
        begins after it.
    tolerances : tuple of float
    """

    quick: bool
    rounds: int
    block_rounds: int
    starts: int
    limit: float
    tolerances: tuple[float, ...] = (1e-3, 1e-6)


FULL = Preset(quick=False, rounds=7, block_rounds=5, starts=3, limit=24)
QUICK = Preset(quick=True, rounds=5, block_rounds=3, starts=1, limit=4)
#: What the quick preset compares; the processes of all engines alone take minutes to begin.
QUICK_TOOLS = [tool for tool in KINDS if tool == "auto" or KINDS[tool].peer]


class Participant:
    """One tool on one problem: its process, and what was found so far.

    A process that ends, or does not answer, takes nothing with it but what it was asked: the next
    question starts another one.

    Parameters
    ----------
    start : callable
        Makes the process; see :func:`starter`.
    """

    def __init__(self, start: Callable[[], Process]) -> None:
        self._start, self._process = start, None
        self.found: dict[str, Any] = {"fails": {}, "top": {}}

    def _ready(self) -> Process:
        if self._process is None:
            process: Process = self._start()
            self._process = process
            imported = process.ask({"do": "import"})
            if "fails" in imported:
                raise WorkerError(_with_hint(imported["fails"]))
            built = process.ask({"do": "build"})
            if "fails" in built:
                raise WorkerError(built["fails"])
            self.found |= {
                "version": imported["version"], "blocks": imported["blocks"],
                "solvers": imported["solvers"], "import_s": imported["wall"],
                "build_s": built["wall"],
            }  # fmt: skip
        return self._process

    def ask(self, what: str, **options: Any) -> dict[str, Any]:
        """An answer, or ``{"fails": text}``, whatever happens to the process."""
        try:
            found: dict[str, Any] = self._ready().ask({"do": what, **options})
        except WorkerError as error:
            self.close()
            return {"fails": str(error)}
        return found

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.close()
            self._process = None


def _with_hint(text: str) -> str:
    lacking = text.startswith(("ModuleNotFoundError", "PackageNotFoundError"))
    return f"{text}. {MISSING}" if lacking else text


def starter(tool: str, case: str, preset: Preset, threads: int) -> Callable[[], Process]:
    """How the process of a tool is started."""

    def start() -> Process:
        python = str(PEERS) if KINDS[tool].peer else sys.executable
        size = "quick" if preset.quick else "full"
        try:
            return Process(
                "benchmarks.tool_worker", tool, case, size, str(threads),
                python=python, patience=10 * preset.limit + 300,
            )  # fmt: skip
        except FileNotFoundError as error:
            msg = f"There is no {python}. {MISSING}"
            raise WorkerError(msg) from error

    return start


def time_products(
    participants: dict[str, Participant], preset: Preset, order: random.Random
) -> None:
    """First calls, then rounds; results go into ``found`` of each."""
    for vectors, rounds in ((1, preset.rounds), (BLOCK, preset.block_rounds)):
        steps: dict[str, int] = {}
        ratios: dict[str, list[tuple[float, float]]] = {}
        seconds: dict[str, list[tuple[float, float]]] = {}
        for name, one in participants.items():
            if "1" in one.found["fails"] or (vectors > 1 and not one.found.get("blocks")):
                continue
            first = one.ask("product", vectors=vectors, count=1)
            again = one.ask("product", vectors=vectors, count=1) if "wall" in first else first
            if "fails" in again:
                one.found["fails"][str(vectors)] = again["fails"]
                continue
            one.found.setdefault("first_s", {})[str(vectors)] = first["wall"]
            one.found.setdefault("peak_mib", {})[str(vectors)] = again["peak_mib"]
            steps[name] = int(np.clip(_TURN / again["wall"], 1, 50))
            ratios[name], seconds[name] = [], []
        for number in range(rounds):
            for name in order.sample(sorted(steps), len(steps)):
                one = participants[name]
                gradient = one.ask("gradient", count=int(np.clip(2 * steps[name], 3, 50)))
                turn = one.ask("product", vectors=vectors, count=steps[name])
                failed = gradient.get("fails") or turn.get("fails")
                if failed:
                    one.found["fails"][str(vectors)] = failed
                    del steps[name]
                    continue
                ratios[name].append(
                    (
                        turn["wall"] / gradient["wall"] / vectors,
                        turn["processor"] / gradient["processor"] / vectors,
                    )
                )
                seconds[name].append((gradient["wall"], turn["wall"] / vectors))
                one.found.setdefault("engine", {})[str(vectors)] = turn["engine"]
            say(f"  blocks of {vectors}: round {number + 1} of {rounds}")
        for name in steps:
            one, times = participants[name].found, np.median(seconds[name], axis=0)
            walls, processors = zip(*ratios[name], strict=True)
            one.setdefault("gradients", {})[str(vectors)] = asdict(Median.of(walls))
            one.setdefault("processor", {})[str(vectors)] = asdict(Median.of(processors))
            one.setdefault("gradient_s", {})[str(vectors)] = float(times[0])
            one.setdefault("product_s", {})[str(vectors)] = float(times[1])


def solve(
    participants: dict[str, Participant],
    preset: Preset,
    known: Sequence[float] | None,
    order: random.Random,
) -> None:
    """Top eigenvalues: every solver in turn, from the same seeds; into ``found`` of each."""
    asked = [
        (name, solver)
        for name, one in participants.items()
        if KINDS[name].solves and "1" not in one.found["fails"]
        for solver in one.found["solvers"]
    ]
    for tolerance in preset.tolerances:
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in asked}
        for seed in range(preset.starts):
            for key in order.sample(asked, len(asked)):
                left = preset.limit - sum(run.get("wall", preset.limit) for run in runs[key])
                if left <= 0 or (runs[key] and left < runs[key][-1].get("wall", left)):
                    continue
                found = participants[key[0]].ask(
                    "top", k=K, tolerance=tolerance, seed=seed, seconds=left, solver=key[1]
                )
                if "values" in found and known is not None:
                    found["error"] = true_error(found["values"], known)
                runs[key].append(found)
            say(f"  top {K} at {tolerance:g}: start {seed + 1} of {preset.starts}")
        for (name, solver), found in runs.items():
            cell = participants[name].found["top"].setdefault(solver, {})
            cell[f"{tolerance:g}"] = summary(found)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over starts, and the worst error.

    ``converged`` counts the starts of which the tool said that all values have converged, ``None``
    if it says nothing of the kind.
    """
    done = [run for run in runs if "values" in run]
    failed = [run["fails"] for run in runs if "fails" in run]
    if not done:
        return {"starts": 0, "fails": failed[0] if failed else "not run"}
    errors = [run["error"] for run in done if "error" in run]
    flags = [run["converged"] for run in done]
    return {
        "starts": len(done),
        "products": float(np.median([run["products"] for run in done])),
        "seconds": float(np.median([run["wall"] for run in done])),
        "error": max(errors) if errors else None,
        "converged": None if None in flags else sum(flags),
        "said": done[0]["said"],
        "values": [run["values"] for run in done],
        "fails": failed[0] if failed else None,
    }


def measure(
    case: str, tools: Sequence[str], preset: Preset, threads: int, folder: Path
) -> dict[str, Any]:
    """All of one problem: reference, products, eigenvalues."""
    begun, load = time.perf_counter(), os.getloadavg()[0]
    problem = CASES[case].build(quick=preset.quick)
    report: dict[str, Any] = {
        "name": CASES[case].name, "title": problem.title, "size": problem.size,
        "load average before": round(load, 2),
    }  # fmt: skip
    known = None
    try:
        report["reference"] = load_or_compute(case, folder, quick=preset.quick, threads=threads)
        known = report["reference"]["values"]
    except (Disagreement, WorkerError) as error:
        report["reference"] = {"fails": str(error)}
    del problem
    order = random.Random(0)
    participants = {t: Participant(starter(t, case, preset, threads)) for t in tools}
    try:
        time_products(participants, preset, order)
        solve(participants, preset, known, order)
    finally:
        for one in participants.values():
            one.close()
    report["tools"] = {tool: one.found for tool, one in participants.items()}
    report["seconds"] = round(time.perf_counter() - begun, 1)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hessian", description="Hessians, beside other tools."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="small problems, few rounds")
    parser.add_argument("--no-peers", action="store_true", help="the library alone")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--tool", choices=KINDS, action="append", help="default: all")
    parser.add_argument(
        "--resume", action="store_true", help="keep the problems that a run before has finished"
    )
    options = parser.parse_args(argv)
    chosen = options.tool or (QUICK_TOOLS if options.quick else list(KINDS))
    tools = [tool for tool in chosen if not (options.no_peers and KINDS[tool].peer)]
    if any(KINDS[tool].peer for tool in tools) and not PEERS.is_file():
        parser.error(f"There is no {PEERS}. {MISSING}")
    preset = QUICK if options.quick else FULL
    name = "hessian_quick" if options.quick else "hessian"
    path = options.out / f"{name}.json"
    before = json.loads(path.read_text("utf-8")) if options.resume and path.is_file() else {}
    report: dict[str, Any] = {
        "environment": environment(options.threads, "cpu"),
        "preset": {**asdict(preset), "block": BLOCK, "k": K},
        "problems": before.get("problems", {}),
    }
    for case in options.case or CASES:
        if case in report["problems"]:
            continue
        say(case)
        report["problems"][case] = measure(case, tools, preset, options.threads, options.out)
        print(hessian_tables.text(report["problems"][case]), flush=True)
        hessian_tables.write(options.out, name, report)  # after each: a run may be interrupted


if __name__ == "__main__":
    main()
