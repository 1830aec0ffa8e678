"""Ratios of times on a machine that others use too.

Variants take turns of a few steps within each round, in random order, and each is compared with the
bare step of the same round. What is quoted is the median of these ratios. Variants live in worker
processes, one or several in each; only one of them runs at a time.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom


@dataclass(frozen=True)
class Median:
    """The median of paired ratios, and a 95 % confidence interval from order statistics.

    With fewer than six ratios the interval has less than that: it is from the least to the largest.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Median:
        ordered = np.sort(ratios)
        rank = max(int(binom.ppf(0.025, len(ordered), 0.5)), 1)
        return cls(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank]))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Worker:
    """A process with some variants.

    Not of :mod:`multiprocessing`, in whose processes some of the tools refuse to work.

    Parameters
    ----------
    factory, problem : str
        A key of ``FACTORIES`` and one of ``PROBLEMS``.
    device : str
    threads : int
        Of torch, in the process.
    *options : str
        For the factory.
    """

    def __init__(
        self, factory: str, problem: str, device: str, threads: int, *options: str
    ) -> None:
        arguments = [factory, problem, device, str(threads), *options]
        self._title = " ".join(arguments)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.variants: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            msg = f"The worker {self._title} ended."
            raise RuntimeError(msg)
        return json.loads(line)

    def turn(self, name: str, steps: int) -> tuple[float, float, float]:
        """Time some steps of a variant.

        Returns
        -------
        wall, processor : float
            Seconds on the clock, and of the process on any processor.
        growth : float
            By how many MiB the most memory that the process ever held has grown.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, steps]) + "\n")
        self._process.stdin.flush()
        wall, processor, growth = self._answer()
        return wall, processor, growth

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Entry:
    """One variant in a comparison.

    Parameters
    ----------
    label : str
        What tables say.
    worker : Worker
    name : str
        Of the variant in its worker.
    baseline : str
        Label of the entry that it is divided by.
    steps : int
        Steps in a turn.
    """

    label: str
    worker: Worker
    name: str
    baseline: str
    steps: int


@dataclass(frozen=True)
class Timing:
    """What a variant costs.

    Parameters
    ----------
    label, baseline : str
    ratio : Median
        Time of a step over that of the baseline's in the same round.
    processor_ratio : Median
        The same with the processor's time, which does not count waiting for a core.
    milliseconds : float
        Median time of a step, for reference.
    """

    label: str
    baseline: str
    ratio: Median
    processor_ratio: Median
    milliseconds: float


def compare(
    entries: Sequence[Entry],
    *,
    rounds: int,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> list[Timing]:
    """Time entries against their baselines.

    Parameters
    ----------
    entries : sequence of Entry
    rounds : int
        How often each has a turn.
    seed : int
        Of the order within the rounds.
    report : callable
        Is told how far it got.
    """
    order = random.Random(seed)
    seconds: dict[str, list[tuple[float, float]]] = {entry.label: [] for entry in entries}
    for entry in entries:  # first calls compile kernels and fill caches
        entry.worker.turn(entry.name, min(entry.steps, 3))
    for number in range(rounds):
        for entry in order.sample(list(entries), len(entries)):
            wall, processor, _ = entry.worker.turn(entry.name, entry.steps)
            seconds[entry.label].append((wall / entry.steps, processor / entry.steps))
        report(f"round {number + 1} of {rounds}")
    timings = []
    for entry in entries:
        mine, theirs = np.array(seconds[entry.label]), np.array(seconds[entry.baseline])
        ratio, processor_ratio = (Median.of((mine / theirs)[:, k].tolist()) for k in (0, 1))
        milliseconds = 1e3 * float(np.median(mine[:, 0]))
        timings.append(Timing(entry.label, entry.baseline, ratio, processor_ratio, milliseconds))
    return timings
