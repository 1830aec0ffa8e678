"""What Procrustes regularisation costs: one projection, and a training step.

::

    python -m benchmarks.procrustes
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gradient_norms import verdicts
from benchmarks.polar_routes import OURS, operations
from benchmarks.problems import PROBLEMS
from benchmarks.reporting import RESULTS, environment, say, table, write
from benchmarks.timing import Entry, Worker, compare
from benchmarks.variants import BARE
from conditioning import Procrustes

STEPS = 10
#: What is promised: upper ends of the ratio to the bare training step.
GOALS = {"every step": 1.03, "probability 0.5": 1.03}


def _projection(rounds: int, threads: int, device: str) -> tuple[dict[str, Any], str]:
    worker = Worker("projection", "-", device, threads)
    # A turn of the slow ones takes as long as many of the others.
    steps = {
        name: 20 if name == OURS or name.startswith("the same") else 1 for name in worker.variants
    }
    entries = [Entry(name, worker, name, OURS, steps[name]) for name in worker.variants]
    timings = compare(entries, rounds=rounds, report=say)
    worker.close()
    ours, theirs = operations(published_route=False), operations(published_route=True)
    counted = (
        f"  multiplications and additions: {ours / 1e6:.3g} million, as published "
        f"{theirs / 1e9:.3g} thousand million, {theirs / ours:.0f} times as many"
    )
    title = "One projection of the stem and the two transitions of ProcResNet-166"
    text = f"{table(title, timings)}\n{counted}".replace("ms a step", "ms a call")
    return {
        "title": title,
        "operations": {"ours": ours, "published": theirs},
        "timings": [asdict(timing) for timing in timings],
    }, text


def share_of_a_step(problem: str, device: str, steps: int = 30) -> float:
    """Time inside projections over the time of the rest of the steps, of one process.

    What the clock says of the steps themselves scatters by more than a projection takes.
    """
    made = PROBLEMS[problem](device)
    regulariser = Procrustes.for_transitions(made.model, made.inputs).attach(made.optimizer)
    for _ in range(3):
        made.step()
    before = regulariser.report()
    begun = time.perf_counter()
    for _ in range(steps):
        made.step()
    if device == "cuda":
        torch.cuda.synchronize()
    total = time.perf_counter() - begun
    after = regulariser.report()
    spent = after.seconds * after.num_projections - before.seconds * before.num_projections
    return spent / (total - spent)


def _training(problem: str, rounds: int, threads: int, device: str) -> tuple[dict[str, Any], str]:
    title = PROBLEMS[problem](device).title
    worker = Worker("procrustes", problem, device, threads)
    entries = [Entry(name, worker, name, BARE, STEPS) for name in worker.variants]
    timings = compare(entries, rounds=rounds, report=say)
    worker.close()
    goals = verdicts(timings, by_processor=device == "cpu" and threads == 1, goals=GOALS)
    share = share_of_a_step(problem, device)
    said = "\n".join(
        [f"  inside projections: {100 * share:.2f} % of a step"]
        + [f"  {goal}: {value}" for goal, value in goals.items()]
    )
    text = f"{table(f'{title}: stem and transitions projected after steps', timings)}\n{said}"
    return {
        "title": title,
        "goals": goals,
        "inside projections": share,
        "timings": [asdict(timing) for timing in timings],
    }, text


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.procrustes", description="The cost of Procrustes."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {
        "environment": environment(options.threads, options.device),
        "load average before": round(os.getloadavg()[0], 2),
    }
    shared = (options.threads, options.device)
    torch.set_num_threads(options.threads)
    report["projection"], first = _projection(options.rounds, *shared)
    print(first, flush=True)
    report["training"], second = _training("resnet20", options.rounds, *shared)
    print(second, flush=True)
    write(options.out, "procrustes", report, [first, second])


if __name__ == "__main__":
    main()
