"""A process with one tool on one problem: asked by :mod:`benchmarks.hessian`, not by hand.

It runs in this environment or in that of other tools, so it imports nothing but torch by itself.
"""

from __future__ import annotations

import importlib.metadata
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hessian_problems import CASES, HessianProblem
from benchmarks.tools import KINDS, OutOfTimeError, Tool, Wanted
from benchmarks.worker import serve

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory that this process holds from now on, above what it holds now, in MiB."""

    def __init__(self) -> None:
        try:
            _RESET.write_text("5")  # of Linux: forget the peak so far
            self._base = self._read("VmRSS")
            self._exact = True
        except OSError:
            self._base = self._largest()
            self._exact = False

    @staticmethod
    def _read(name: str) -> float:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
        raise OSError(name)

    @staticmethod
    def _largest() -> float:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def growth(self) -> float:
        """MiB; without Linux's counter a lower bound, since an earlier peak hides a later one."""
        return (self._read("VmHWM") if self._exact else self._largest()) - self._base


def message(error: BaseException) -> str:
    """The name of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:240]}".rstrip(": ")


def clocked(step: Callable[[], Any], count: int = 1) -> tuple[float, float]:
    """Seconds for each of ``count`` calls, on the clock and of this process on any processor."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count


class Server:
    """Does what it is asked, and answers failures as text.

    Parameters
    ----------
    tool : str
        A key of ``KINDS``.
    problem : HessianProblem
    """

    def __init__(self, tool: str, problem: HessianProblem) -> None:
        self._kind, self._problem = KINDS[tool], problem
        self._tool: Tool | None = None
        self._memory = PeakMemory()
        self._vectors: dict[int, Tensor] = {}

    def handle(self, asked: dict[str, Any]) -> dict[str, Any]:
        """``{"do": name, ...}`` to the answer of that method, or ``{"fails": text}``."""
        options = {key: value for key, value in asked.items() if key != "do"}
        try:
            found: dict[str, Any] = getattr(self, f"do_{asked['do']}")(**options)
        except OutOfTimeError as stopped:
            return {"fails": f"stopped after {options['seconds']:.3g} s ({stopped})"}
        except Exception as error:  # whatever another tool raises is a result here
            return {"fails": message(error)}
        return found

    @property
    def tool(self) -> Tool:
        """The tool, once it is built."""
        if self._tool is None:
            msg = "The tool was not built."
            raise RuntimeError(msg)
        return self._tool

    def do_import(self) -> dict[str, Any]:
        """Import the tool, and what it imports when it is first used: on three parameters."""
        version = importlib.metadata.version(self._kind.package)
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        model, loss = torch.nn.Linear(3, 1, bias=False), torch.nn.MSELoss()

        def use() -> None:
            toy = self._kind.make(HessianProblem("toy", model, loss, inputs, inputs[:, :1] ** 2))
            toy.product(torch.ones(3))
            if toy.blocks:
                toy.product(torch.eye(3))

        wall, _ = clocked(use)
        return {
            "wall": wall, "version": version, "blocks": self._kind.make.blocks,
            "solvers": list(self._kind.make.solvers),
        }  # fmt: skip

    def do_build(self) -> dict[str, Any]:
        """Construct it; a gradient before warms up what all tools need."""
        self._problem.gradient()
        self._memory = PeakMemory()

        def build() -> None:
            self._tool = self._kind.make(self._problem)

        wall, processor = clocked(build)
        return {"wall": wall, "processor": processor, "peak_mib": self._memory.growth()}

    def do_gradient(self, count: int) -> dict[str, Any]:
        wall, processor = clocked(self._problem.gradient, count)
        return {"wall": wall, "processor": processor}

    def do_product(self, vectors: int, count: int) -> dict[str, Any]:
        """Seconds of a product with ``vectors`` vectors; the memory since before the tool was."""
        if vectors not in self._vectors:
            shape = (self._problem.size, vectors)[: 1 if vectors == 1 else 2]
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self._vectors[vectors] = drawn / torch.linalg.vector_norm(drawn, dim=0)
        wall, processor = clocked(lambda: self.tool.product(self._vectors[vectors]), count)
        return {
            "wall": wall, "processor": processor, "peak_mib": self._memory.growth(),
            "engine": self.tool.engine(),
        }  # fmt: skip

    def do_top(
        self, k: int, tolerance: float, seed: int, seconds: float, solver: str
    ) -> dict[str, Any]:
        found: list[Any] = []
        wanted = Wanted(k, tolerance, seed, seconds, solver)
        wall, processor = clocked(lambda: found.append(self.tool.top(wanted)))
        top = found[0]
        return {
            "wall": wall, "processor": processor, "peak_mib": self._memory.growth(),
            "values": top.values, "converged": top.converged, "products": top.products,
            "said": top.said,
        }  # fmt: skip


def main() -> None:
    """Serve until the input ends."""
    warnings.simplefilter("ignore")  # of other tools, about themselves
    tool, case, quick, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    servers: list[Server] = []

    def begin() -> dict[str, Any]:
        problem = CASES[case].build(quick=quick == "quick")
        servers.append(Server(tool, problem))
        return {"title": problem.title, "size": problem.size}

    serve(begin, lambda asked: servers[0].handle(asked))


if __name__ == "__main__":
    main()
