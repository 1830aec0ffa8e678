"""Ratios of times on a machine that others use too.

Variants take turns of a few steps within each round, in random order, and each is compared with the
bare step of the same round. What is quoted is the median of these ratios. Variants live in worker
processes, one or several in each; only one of them runs at a time.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

ROOT = Path(__file__).parent.parent


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


class WorkerError(RuntimeError):
    """A worker ended, or gave no answer in time."""


class Process:
    """A process that is asked and answers, a line of JSON each.

    Not of :mod:`multiprocessing`, in whose processes some of the tools refuse to work.

    Parameters
    ----------
    module : str
        What it runs.
    *arguments : str
    python : str
        The interpreter, of this environment or another.
    patience : float, optional
        Seconds after which a worker without an answer is ended.

    Raises
    ------
    WorkerError
        If it ends before its first answer.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: str = sys.executable,
        patience: float | None = None,
    ) -> None:
        self._title = " ".join([module.rpartition(".")[2], *arguments])
        self._patience = patience
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self.first: Any = self._answer()

    def _answer(self) -> Any:
        stream = self._process.stdout
        assert stream is not None
        # Between answers nothing is left in the buffer of the stream: select sees all.
        if self._patience is not None and not select.select([stream], [], [], self._patience)[0]:
            self.kill()
            msg = f"The worker {self._title} gave no answer in {self._patience:.0f} s: ended."
            raise WorkerError(msg)
        line = stream.readline()
        if not line:
            msg = f"The worker {self._title} ended (exit status {self._process.wait()})."
            raise WorkerError(msg)
        return json.loads(line)

    def ask(self, content: Any) -> Any:
        """Send something, and wait for the answer.

        Raises
        ------
        WorkerError
            If the process ends, or is not done in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:  # its end of the pipe is closed, or ours is
            msg = f"The worker {self._title} had ended (exit status {self._process.wait()})."
            raise WorkerError(msg) from error
        return self._answer()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Let it end by itself."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what it has not read is lost
                stream.close()
        self._process.wait()


class Worker(Process):
    """A process with some variants.

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
        super().__init__("benchmarks.worker", factory, problem, device, str(threads), *options)
        self.variants: list[str] = self.first

    def turn(self, name: str, steps: int) -> tuple[float, float, float]:
        """Time some steps of a variant.

        Returns
        -------
        wall, processor : float
            Seconds on the clock, and of the process on any processor.
        growth : float
            By how many MiB the most memory that the process ever held has grown.
        """
        wall, processor, growth = self.ask([name, steps])
        return wall, processor, growth


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
