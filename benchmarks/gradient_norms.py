"""The overhead of ``GradientNorms``, as a ratio to the bare training step.

::

    python -m benchmarks.gradient_norms             # the library alone
    python -m benchmarks.gradient_norms --peers     # and W&B watch, TorchLens, torch.compile
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.problems import PROBLEMS
from benchmarks.timing import Entry, Timing, Worker, compare

RESULTS = Path(__file__).parent / "results"
STEPS = 10
#: What is promised: upper ends of the ratio.
GOALS = {"every 10 steps": 1.05, "every step": 1.10}
BARE, COMPILED = "bare", "compiled: bare"


def entries_for(problem: str, *, peers: bool, threads: int, device: str) -> list[Entry]:
    """Start the workers of one problem, and list their variants."""

    def start(factory: str, *options: str) -> Worker:
        return Worker(factory, problem, device, threads, *options)

    library = start("library")
    entries = [Entry(name, library, name, BARE, STEPS) for name in library.variants]
    if not peers:
        return entries
    # One step of TorchLens takes as long as a turn of the others.
    for package, steps in (("wandb", STEPS), ("torchlens", 1)):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: left out", file=sys.stderr)
            continue
        # In a process of its own, beside a bare step there: TorchLens wraps torch's functions.
        worker = start(package)
        labels = {name: name for name in worker.variants} | {BARE: f"bare ({package})"}
        entries += [Entry(labels[n], worker, n, labels[BARE], steps) for n in worker.variants]
    for label, every in (
        (COMPILED, "0"),
        ("compiled: every 10 steps", "10"),
        ("compiled: every step", "1"),
    ):
        entries.append(Entry(label, start("compiled", every), BARE, COMPILED, STEPS))
    return entries


def growth(entry: Entry, problem: str, threads: int, device: str) -> float | None:
    """By how many MiB a fresh process grows in its first steps, at its peak."""
    if entry.baseline == COMPILED:
        return None  # the compiler's own memory would be seen
    package = next((p for p in ("wandb", "torchlens") if p in entry.baseline), "library")
    worker = Worker(package, problem, device, threads)
    found = worker.turn(entry.name, 3)[2]
    worker.close()
    return found


def environment(threads: int, device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = {}
    for name in ("torch", "wandb", "torchlens"):
        if importlib.util.find_spec(name) is not None:
            packages[name] = importlib.metadata.version(name)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "torch threads": threads,
        "python": platform.python_version(),
        "packages": packages,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def verdicts(timings: Sequence[Timing], *, by_processor: bool) -> dict[str, str]:
    """Whether the goals are met: by the whole confidence interval, or not decided.

    Parameters
    ----------
    timings : sequence of Timing
    by_processor : bool
        Judge by the processor's time: on a single thread it is the time of a quiet machine.
    """
    found = {}
    for timing in timings:
        goal = GOALS.get(timing.label)
        if goal is None:
            continue
        ratio = timing.processor_ratio if by_processor else timing.ratio
        said = "not decided"
        if ratio.high <= goal:
            said = "holds"
        elif ratio.low > goal:
            said = "fails"
        found[f"{timing.label}: at most {goal:.2f}"] = said
    return found


def table(title: str, timings: Sequence[Timing], memory: dict[str, float | None]) -> str:
    """A table to read, one variant in a line."""
    width = max(len(timing.label) for timing in timings)
    lines = [
        title,
        f"  {'':{width}}  {'ratio [95 %]':21}  {'processor time':21}  {'ms a step':>9}  "
        f"{'peak, MiB':>9}",
    ]
    for timing in timings:
        peak = memory[timing.label]
        shown = "-" if peak is None else f"{peak:.0f}"
        lines.append(
            f"  {timing.label:{width}}  {timing.ratio!s:21}  {timing.processor_ratio!s:21}  "
            f"{timing.milliseconds:9.1f}  {shown:>9}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_norms",
                                     description="The overhead of GradientNorms.")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant")
    parser.add_argument("--problem", choices=PROBLEMS, action="append", help="default: all")
    parser.add_argument("--peers", action="store_true", help="also other tools, torch.compile")
    options = parser.parse_args(argv)

    threads, device = options.threads, options.device
    report: dict[str, Any] = {
        "environment": environment(threads, device),
        "rounds": options.rounds,
        "problems": {},
    }
    texts = []
    for problem in options.problem or PROBLEMS:
        title = PROBLEMS[problem](device).title
        load = os.getloadavg()[0]
        entries = entries_for(problem, peers=options.peers, threads=threads, device=device)
        timings = compare(entries, rounds=options.rounds, report=_say)
        for worker in {entry.worker for entry in entries}:
            worker.close()
        memory = {e.label: growth(e, problem, threads, device) for e in entries}
        goals = verdicts(timings, by_processor=device == "cpu" and threads == 1)
        report["problems"][problem] = {
            "title": title,
            "goals": goals,
            "load average before": round(load, 2),
            "timings": [asdict(t) | {"peak_mib": memory[t.label]} for t in timings],
        }
        texts.append(table(title, timings, memory))
        texts.append("\n".join(f"  {goal}: {said}" for goal, said in goals.items()))
        print("\n".join(texts[-2:]), flush=True)
    _write(options.out, report, texts)


def _say(text: str) -> None:
    print(f"\r{text}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def _write(folder: Path, report: dict[str, Any], texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = "gradient_norms"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    head = ", ".join(f"{key}: {value}" for key, value in report["environment"].items())
    (folder / f"{name}.txt").write_text("\n\n".join([head, *texts]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
