"""A process that takes turns: started by :class:`benchmarks.timing.Worker`, not by hand.

It is told on its standard input which variant to run for how many steps, and answers with a line of
JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

#: Enters what is measured, and gives the step to call.
Variant = Callable[[], AbstractContextManager[Callable[[], Any]]]


def take_turn(variant: Variant, steps: int, device: str) -> tuple[float, float]:
    """Seconds that some steps take, on the clock and of this process on any processor.

    Entering and leaving the variant are not counted.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with variant() as step:
        wait()
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        wait()
        return time.perf_counter() - wall, time.process_time() - processor


def held(device: str) -> float:
    """The most memory that this process has held so far, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def serve(begin: Callable[[], Any], handle: Callable[[Any], Any]) -> None:
    """Answer lines of JSON on the standard input with lines of JSON, until the input ends.

    Parameters
    ----------
    begin : callable
        Its result is the first answer, before anything was asked.
    handle : callable
        From what was asked to the answer.
    """
    # Whatever others print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(begin())
    for line in sys.stdin:
        answer(handle(json.loads(line)))


def main() -> None:
    """Take turns with the variants of a factory."""
    from benchmarks.variants import FACTORIES

    factory, problem, device, threads, *options = sys.argv[1:]
    torch.set_num_threads(int(threads))
    variants: dict[str, Variant] = {}

    def begin() -> list[str]:
        variants.update(FACTORIES[factory](problem, device, *options))
        return list(variants)

    def turn(asked: tuple[str, int]) -> list[float]:
        name, steps = asked
        before = held(device)
        wall, processor = take_turn(variants[name], steps, device)
        return [wall, processor, held(device) - before]

    serve(begin, turn)


if __name__ == "__main__":
    main()
