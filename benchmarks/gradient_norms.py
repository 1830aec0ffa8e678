"""The overhead of ``GradientNorms``, as a ratio to the bare training step.

::

    python -m benchmarks.gradient_norms             # the library alone
    python -m benchmarks.gradient_norms --peers     # and W&B watch, TorchLens, torch.compile
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.problems import PROBLEMS
from benchmarks.reporting import RESULTS, environment, say, table, write
from benchmarks.timing import Entry, Timing, Worker, compare

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


def verdicts(
    timings: Sequence[Timing], *, by_processor: bool, goals: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Whether the goals are met: by the whole confidence interval, or not decided.

    Parameters
    ----------
    timings : sequence of Timing
    by_processor : bool
        Judge by the processor's time: on a single thread it is the time of a quiet machine.
    goals : mapping of str to float
        Upper ends of the ratio, by label; ``GOALS`` by default.
    """
    found = {}
    for timing in timings:
        goal = (GOALS if goals is None else goals).get(timing.label)
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
        timings = compare(entries, rounds=options.rounds, report=say)
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
    write(options.out, "gradient_norms", report, texts)


if __name__ == "__main__":
    main()
