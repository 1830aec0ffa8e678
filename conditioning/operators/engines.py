"""Which way of multiplying a graph with vectors is cheapest: found out while products are made."""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError
from conditioning.operators.graphs import Graph
from conditioning.operators.guards import isolated_randomness
from conditioning.operators.parameters import FlatLayout
from conditioning.operators.timing import Engine, clock, race
from conditioning.operators.traced import (
    LinearProgram,
    Rows,
    Run,
    UntraceableError,
    compiled,
    in_chunks,
    one_by_one,
    trace,
)

NAMES = ("auto", "retained", "linearized", "compiled")
_BUILT = NAMES[2:]
_WAYS_OF_BLOCKS = ("loop", "batched", "undecided")

# Vectors in one batched backward pass: at least so many where memory allows; more where a graph is
# so small that what costs is the dispatch, up to these bytes and vectors.
_CHUNK = 16
_CHUNK_BYTES = 64 * 2**20
_LARGEST_CHUNK = 256
_FEWEST = 4

# Vectors that a traced graph takes at once: with wider blocks products do not get cheaper.
_WIDEST_TRACE = 64

# Seconds to build an engine: a constant, a part per node of the gradient's graph, and some
# multiplications to trace, check and time it. Measured on one core of a 2-core x86-64 machine
# (torch 2.13), in seconds: tracing 41 nodes 0.03, 350 nodes 0.5, 1307 nodes 2.2, and 244 nodes with
# convolutions 1; compiling, with imports and gcc, 9, 12 and 101 for the first three; blocks 2 to 5
# times as much to trace, and up to twice as much to compile.
_SECONDS = {"linearized": (0.03, 0.002), "compiled": (8.0, 0.05)}
_TRIALS = 8
# What is not faster by this share is not worth its memory.
_GAIN = 0.1


@dataclass
class _Way:
    """A way of multiplying rows that was built for one graph."""

    engine: str
    blocks: str
    rows: Rows


@dataclass
class _Ledger:
    """What was spent on and built for one graph; blocks and single vectors count apart."""

    spent: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    ways: dict[bool, _Way] = field(default_factory=dict)
    program: LinearProgram | None = None
    size: int | None = None


class Multiplier:
    """Multiplies graphs with rows of vectors, and finds the cheapest way of doing so.

    Begins with the retained graph. Another engine is built once the seconds spent on a graph reach
    what building it takes (the rule for renting skis: in all never more than about twice the
    best that could have been done), timed against the one in use on the same vectors, and
    kept if it agrees and is faster. What was found holds for later graphs as well, which are
    checked again, but not timed. So whatever is rebuilt too often to pay is never built.

    Attributes
    ----------
    wanted : str
        ``"auto"``, or the engine that was asked for.
    choice : str
        How blocks of vectors go through the retained graph: ``"loop"``, ``"batched"``, or
        ``"undecided"`` before the first block.
    chunk : int
        The most vectors in one batched pass.
    """

    def __init__(self, wanted: str = "auto") -> None:
        self.choice = "undecided"
        self.chunk = _CHUNK
        self._pinned = False
        self._ledgers: weakref.WeakKeyDictionary[Graph, _Ledger] = weakref.WeakKeyDictionary()
        self.choose_engine(wanted)

    def choose_engine(self, wanted: str) -> None:
        """Fix the engine, or leave it to be found.

        Raises
        ------
        InvalidArgumentError
            If there is no such engine.
        """
        if wanted not in NAMES:
            msg = f"engine should be one of {', '.join(NAMES)}, got {wanted!r}."
            raise InvalidArgumentError(msg)
        self.wanted = wanted
        self._refused: dict[tuple[str, bool], str] = {}
        self._build_seconds: dict[tuple[str, bool], float] = {}
        self._adopted: dict[bool, str] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.seconds: dict[bool, float] = {}
        self._ledgers.clear()

    def choose(self, choice: str) -> None:
        """Fix how blocks are multiplied, or leave it to be timed with the next block.

        Raises
        ------
        InvalidArgumentError
            If there is no such way.
        """
        if choice not in _WAYS_OF_BLOCKS:
            msg = f"block_engine should be one of {', '.join(_WAYS_OF_BLOCKS)}, got {choice!r}."
            raise InvalidArgumentError(msg)
        self.choice = choice
        self._pinned = choice != "undecided"
        self.choose_engine(self.wanted)

    def limit(self, graph_bytes: int, vector_bytes: int, budget: int) -> None:
        """Bound the memory: a batched pass takes about a graph's size, and itself, per vector."""
        held = max(graph_bytes + vector_bytes, 1)
        wanted = max(_CHUNK, min(_LARGEST_CHUNK, _CHUNK_BYTES // held))
        self.chunk = max(1, min(wanted, int(budget // held)))
        if self.chunk < _FEWEST:
            self.choice = "loop"

    def _in_blocks(self) -> str:
        """How other engines multiply blocks where that is not timed."""
        return self.choice if self._pinned else "batched"

    @property
    def engine(self) -> str:
        """``"auto"``, or what is to be used, as far as it is fixed."""
        return "retained" if self.wanted == "auto" and self._pinned else self.wanted

    def describe(self, gradient_seconds: float | None) -> Engine:
        """Say what is in use, with costs in units of a gradient."""
        ways = next(iter(self._ledgers.values())).ways if self._ledgers else {}
        single, many = ways.get(False), ways.get(True)
        costs = [
            None
            if gradient_seconds is None or in_blocks not in self.seconds
            else self.seconds[in_blocks] / gradient_seconds
            for in_blocks in (False, True)
        ]
        return Engine(
            single.engine if single else "retained",
            self.choice if many is None else f"{many.engine} {many.blocks}",
            costs[0],
            costs[1],
            self._reason(),
        )

    def _reason(self) -> str:
        parts = sorted(set(self._refused.values()))
        if self.wanted != "auto":
            return "; ".join(["asked for", *parts])
        if self._pinned:
            return "block_engine is set, so that results are equal from run to run"
        taken = sorted(set(self._adopted.values()))
        parts = [f"{name} was timed and is faster" for name in taken] + parts
        return "; ".join(parts) or "too little time spent for another engine to pay"

    def multiply(
        self,
        graph: Graph,
        domain: FlatLayout,
        codomain: FlatLayout,
        block: Tensor,
        *,
        eps: float = 0.0,
        budget: Callable[[], float] | None = None,
    ) -> Tensor:
        """Rows of ``block`` ``(k, n)`` times the map, as rows of ``(k, m)``.

        ``eps`` is the rounding unit of what the graph computes in. ``budget`` tells the bytes
        that another engine may take; ``None`` is for graphs that will not be used again.
        """
        if torch.is_inference_mode_enabled() or block.is_inference():
            # It would forbid autograd to save what is made here.
            with torch.inference_mode(mode=False):
                block = block.clone() if block.is_inference() else block
                return self._multiplied(graph, domain, codomain, block, eps, budget)
        return self._multiplied(graph, domain, codomain, block, eps, budget)

    def _multiplied(
        self,
        graph: Graph,
        domain: FlatLayout,
        codomain: FlatLayout,
        block: Tensor,
        eps: float,
        budget: Callable[[], float] | None,
    ) -> Tensor:
        if len(block) == 0:
            return torch.zeros(0, codomain.numel, dtype=codomain.dtype, device=codomain.device)
        engine = self.engine
        if engine == "retained" or budget is None:
            return self._retained(graph, domain, codomain, block)
        job = _Job(self, graph, domain, codomain, block, eps, budget)
        return job.asked_for(engine) if engine != "auto" else job.cheapest()

    # The retained graph.

    def _retained(
        self, graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor
    ) -> Tensor:
        if len(block) >= _FEWEST and self.choice == "undecided":
            if self.wanted == "auto":
                return self._calibrate(graph, domain, codomain, block)
            # Not timed, so that results are equal from run to run: by size.
            self.choice = "batched" if self.chunk > _CHUNK else "loop"
        if len(block) >= _FEWEST and self.choice == "batched":
            result = self._batched(graph, domain, codomain, block)
            if result is not None:
                return result
            self.choice = "loop"
        return _loop(graph, domain, codomain, block)

    def _batched(
        self, graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor
    ) -> Tensor | None:
        result = _empty(block, codomain)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vmap tells where it loops inside
                for chunk, rows in zip(
                    block.split(self.chunk), result.split(self.chunk), strict=True
                ):
                    parts = graph.apply(domain.split(chunk), batched=True)
                    codomain.join(parts, (len(chunk),), rows)
        except (RuntimeError, NotImplementedError):
            # No batching rule, or not enough memory; a real fault shows up in the loop as well.
            return None
        return result

    def _calibrate(
        self, graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor
    ) -> Tensor:
        head = block[: min(8, self.chunk)]
        one_by_one, together = (
            functools.partial(function, graph, domain, codomain, head)
            for function in (_loop, self._batched)
        )
        (expected, found), seconds = race([one_by_one, together], domain.device)
        self.choice = "loop"
        if found is not None and seconds[1] < seconds[0]:
            tolerance = 10 * max(domain.eps, codomain.eps) ** 0.5
            if _distance(found, expected) <= tolerance:
                self.choice = "batched"
        self.seconds[True] = seconds[self.choice == "batched"] / len(head)
        if len(head) == len(block):
            return cast("Tensor", expected)
        return torch.cat([expected, self._retained(graph, domain, codomain, block[len(head) :])])


@dataclass
class _Job:
    """One multiplication, and what it leads to."""

    multiplier: Multiplier
    graph: Graph
    domain: FlatLayout
    codomain: FlatLayout
    block: Tensor
    eps: float
    budget: Callable[[], float]

    def __post_init__(self) -> None:
        ledgers = self.multiplier._ledgers
        self._ledger = ledgers.get(self.graph) or ledgers.setdefault(self.graph, _Ledger())
        self._many = len(self.block) >= _FEWEST and self.multiplier.chunk >= _FEWEST

    def asked_for(self, engine: str) -> Tensor:
        """Multiply by a certain engine, or by the retained graph if that does not work."""
        ledger, many = self._ledger, self._many
        if many not in ledger.ways and (engine, many) not in self.multiplier._refused:
            expected = self._retained(self.block)
            for way in self._built(engine, [self.multiplier._in_blocks() if many else "loop"]):
                if self._agrees(way, self._safely(way, self.block), expected):
                    ledger.ways[many] = way
        return self._current(self.block)

    def cheapest(self) -> Tensor:
        """Multiply by what is known to be cheapest; build what has come to pay."""
        ledger, many = self._ledger, self._many
        begin = clock(self.domain.device)
        result = self._current(self.block)
        ledger.spent[many] += (seconds := clock(self.domain.device) - begin)
        for engine in self._candidates():
            if ledger.spent[many] >= self._price(engine) + _TRIALS * seconds:
                self._try(engine)
                break
        return result

    def _current(self, block: Tensor) -> Tensor:
        way = self._ledger.ways.get(self._many)
        if way is not None:
            try:
                return way.rows(block)
            except Exception as error:
                self._refuse(way.engine, _first_line(error))
                del self._ledger.ways[self._many]
        return self._retained(block)

    def _retained(self, block: Tensor) -> Tensor:
        return self.multiplier._retained(self.graph, self.domain, self.codomain, block)

    def _candidates(self) -> Sequence[str]:
        way = self._ledger.ways.get(self._many)
        later = _BUILT if way is None else _BUILT[_BUILT.index(way.engine) + 1 :]
        return [e for e in later if (e, self._many) not in self.multiplier._refused]

    def _price(self, engine: str) -> float:
        """Seconds to build an engine, as far as that is known."""
        known = self.multiplier._build_seconds.get((engine, self._many))
        if known is not None:
            return known
        if self._ledger.size is None:
            self._ledger.size = self.graph.size()
        fixed, each = _SECONDS[engine]
        return (fixed + each * self._ledger.size) * (2 if self._many else 1)

    def _refuse(self, engine: str, why: str) -> None:
        what = f"{engine} in blocks" if self._many else engine
        self.multiplier._refused[engine, self._many] = f"not {what}: {why}"

    def _try(self, engine: str) -> None:
        """Build an engine, and keep it if it agrees and pays."""
        many, multiplier = self._many, self.multiplier
        was = self._ledger.ways.get(many)
        # Both ways where that costs little; the slower one is not worth a compilation.
        last = was.blocks if was else multiplier._in_blocks()
        kinds = ["loop"] if not many else [last] if engine == "compiled" else ["loop", "batched"]
        built = self._built(engine, kinds)
        if not built:
            return
        head = self.block[: self._width()] if many else self.block[:1]
        rivals = [functools.partial(self._safely, way, head) for way in built]
        if multiplier._adopted.get(many) == engine and len(built) == 1:
            if self._agrees(built[0], rivals[0](), self._retained(head)):
                self._ledger.ways[many] = built[0]
            return
        (first, *found), (now, *seconds) = race(
            [functools.partial(self._current, head), *rivals], self.domain.device
        )
        expected = first if was is None else self._retained(head)
        agreeing = [
            (cost, way)
            for cost, way, rows in zip(seconds, built, found, strict=True)
            if self._agrees(way, rows, expected)
        ]
        if not agreeing:
            return
        best, way = min(agreeing, key=lambda pair: pair[0])
        if best > (1 - _GAIN) * now:
            self._refuse(engine, f"{best / now:.2f} of the time, less than {_GAIN:.0%} gained")
            multiplier.seconds[many] = now / len(head)
            return
        multiplier._adopted[many] = engine
        multiplier.seconds[many] = best / len(head)
        self._ledger.ways[many] = way

    def _width(self) -> int:
        return min(self.multiplier.chunk, _WIDEST_TRACE, len(self.block))

    def _built(self, engine: str, kinds: Sequence[str]) -> list[_Way]:
        """Build an engine; an empty list, and the reason noted, where that fails."""
        begin = time.perf_counter()  # a compiler is a process of its own
        try:
            with isolated_randomness(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ways = [_Way(engine, kind, self._rows(engine, kind)) for kind in kinds]
        except Exception as error:
            self._refuse(engine, _first_line(error))
            return []
        self.multiplier._build_seconds[engine, self._many] = time.perf_counter() - begin
        return ways

    def _rows(self, engine: str, kind: str) -> Rows:
        domain, ledger = self.domain, self._ledger
        generator = torch.Generator(device=domain.device).manual_seed(0)
        shape = (self._width(), domain.numel)
        probe = torch.randn(shape, dtype=domain.dtype, device=domain.device, generator=generator)
        if ledger.program is None:
            ledger.program = trace(self._product, probe[0], self.budget())
        program = ledger.program
        if kind == "loop":
            return one_by_one(self._finished(engine, program, probe[0]))
        # What is left of a block goes through a narrow trace, and then one by one.
        rows = one_by_one(program)
        widths = [len(probe)] if len(probe) <= _CHUNK else [_CHUNK, len(probe)]
        for width in widths:
            run: Run = program.for_blocks(probe[:width], self.budget())
            if width == len(probe):
                run = self._finished(engine, cast("LinearProgram", run), probe)
            rows = in_chunks(run, rows, width)
        return rows

    def _product(self, vector: Tensor) -> Tensor:
        parts = self.graph.apply(self.domain.split(vector), batched=False)
        if all(part is None for part in parts):
            msg = "the matrix is zero"
            raise UntraceableError(msg)
        return self.codomain.join(parts)

    def _finished(self, engine: str, program: LinearProgram, probe: Tensor) -> Run:
        if engine != "compiled":
            return program
        key = program.signature()
        known = self.multiplier._compiled
        if key not in known:
            known[key] = compiled(program, probe)
        return program.by(known[key])

    def _safely(self, way: _Way, block: Tensor) -> Tensor | None:
        try:
            return way.rows(block)
        except Exception as error:
            self._refuse(way.engine, _first_line(error))
            return None

    def _agrees(self, way: _Way, found: Tensor | None, expected: Tensor) -> bool:
        """Whether a way gave what the retained graph gives, up to rounding."""
        if found is None:
            return False
        eps = max(self.eps, self.domain.eps, self.codomain.eps)
        bound = min(1e4 * eps, eps**0.5)
        gap = max(_distance(row, right) for row, right in zip(found, expected, strict=True))
        if not gap <= bound:
            self._refuse(way.engine, f"its products are off by {gap:.1e} of their norm")
            return False
        return True


def _loop(graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor) -> Tensor:
    flat = getattr(graph, "apply_flat", None)  # of those that save the cutting
    result = _empty(block, codomain)
    for row, out in zip(block, result, strict=True):
        if flat is not None:
            parts = flat(row, domain)
        else:
            parts = graph.apply(domain.split(row), batched=False)
        codomain.join(parts, out=out)
    return result


def _empty(block: Tensor, codomain: FlatLayout) -> Tensor:
    # Filled in place: a vector of millions of entries is not copied twice.
    shape = (len(block), codomain.numel)
    return torch.empty(shape, dtype=codomain.dtype, device=codomain.device)


def _distance(rows: Tensor, expected: Tensor) -> float:
    """Distance in units of the expected norm."""
    gap = float(torch.linalg.vector_norm((rows - expected).double()))
    scale = float(torch.linalg.vector_norm(expected.double()))
    return gap / scale if scale else (0.0 if gap == 0 else float("inf"))


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0][:200]
    return line if isinstance(error, UntraceableError) else f"{type(error).__name__}: {line}"
