"""Products from autograd graphs that are built once and used many times."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from conditioning.errors import DoubleBackwardError, InvalidArgumentError
from conditioning.operators.modules import join_names
from conditioning.operators.parameters import FlatLayout

Parts = Sequence[Tensor | None]

# Vectors in one batched backward pass: at least so many where memory allows; more where a graph is
# so small that what costs is the dispatch, up to these bytes and vectors.
_CHUNK = 16
_CHUNK_BYTES = 64 * 2**20
_LARGEST_CHUNK = 256
_FEWEST = 4
_ENGINES = ("loop", "batched", "undecided")

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for '?(?P<op>[\w:.]+)'? is not implemented"
    r"|once_differentiable"
    r"|[Cc]heckpoint\w* is (?:not compatible|incompatible) with \.grad\(\)"
    r"|does not currently support double backward"
    r"|[Dd]ouble.?backwards? (?:is|are)? ?not supported"
    r"|the derivative of .* is not implemented"
)

# Those of segments.py, which can be differentiated as often as is needed here.
_OWN_FUNCTIONS = {"_RunAgain", "_PullAgain"}

_REENTRANT = (
    "The model uses reentrant activation checkpointing, which has no second derivative. Call "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)
_REPLACE = (
    "Replace it by differentiable operations while the operator is used; where only the model has "
    "it, not the loss, GaussNewtonOperator may do."
)


class Graph(Protocol):
    """A linear map that lives on a retained graph."""

    def apply(self, tangents: list[Tensor], *, batched: bool) -> Parts:
        """Multiply; with ``batched`` every tensor has one leading axis more."""


class LossGraph(Protocol):
    """A linear map on a retained graph of a scalar loss."""

    loss: Tensor
    gradient: list[Tensor | None]
    custom: list[str]

    def apply(self, tangents: list[Tensor], *, batched: bool) -> Parts:
        """Multiply; with ``batched`` every tensor has one leading axis more."""


def differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` that keeps the graph and has ``None`` for what does not matter."""
    if not outputs:
        return (None,) * len(inputs)
    with translated_derivative_errors(outputs):
        return torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )


@contextlib.contextmanager
def translated_derivative_errors(outputs: Sequence[Tensor]) -> Iterator[None]:
    """Turn autograd's complaints about a missing second derivative into one named error."""
    try:
        yield
    except RuntimeError as error:
        found = _NO_SECOND_DERIVATIVE.search(str(error))
        if not found or isinstance(error, DoubleBackwardError):
            raise
        raise DoubleBackwardError(_advice(found, outputs)) from error


def _advice(found: re.Match[str], outputs: Sequence[Tensor]) -> str:
    text = found.group(0)
    if "heckpoint" in text:
        return _REENTRANT
    if found.group("op"):
        what = f"The operation {found.group('op')!r} has no second derivative in autograd."
    elif "once_differentiable" in text:
        return _once(_custom_functions(outputs))
    else:
        what = f"Autograd cannot differentiate this model twice: {text}."
    return f"{what} {_REPLACE}"


def _once(custom: list[str]) -> str:
    return (
        f"A custom autograd.Function is marked @once_differentiable, so it has no second "
        f"derivative (custom functions in the graph: {join_names(custom) or 'unknown'}). "
        f"{_REPLACE}"
    )


def _nodes(outputs: Sequence[Tensor | None]) -> Iterator[Any]:
    """Every node of the graph behind some tensors."""
    stack: list[Any] = [t.grad_fn for t in outputs if t is not None and t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def _custom_functions(outputs: Sequence[Tensor]) -> list[str]:
    """Names of the user's own functions in a graph."""
    kind = torch.autograd.function.BackwardCFunction
    nodes = [type(node) for node in _nodes(outputs) if isinstance(node, kind)]
    return sorted({node.__name__.removesuffix("Backward") for node in nodes} - _OWN_FUNCTIONS)


def refuse_dead_ends(outputs: Sequence[Tensor], gradients: Parts) -> list[str]:
    """Find nodes that would drop out of a second derivative without an error.

    Autograd runs only the nodes that lead to what is differentiated by. Reentrant
    checkpoints hide their parameters, and a once-differentiable function cuts the graph,
    so neither is run, and the rows would be zero or wrong.

    Returns
    -------
    list of str
        Names of the custom functions in the graph.

    Raises
    ------
    DoubleBackwardError
        If there is such a node.
    """
    custom = _custom_functions(outputs)
    if "CheckpointFunction" in custom:
        raise DoubleBackwardError(_REENTRANT)
    if custom and any(node.name() == "torch::autograd::Error" for node in _nodes(gradients)):
        raise DoubleBackwardError(_once(custom))
    return custom


class BlockEngine:
    """Multiplies blocks of vectors, one by one or many in one batched backward pass.

    Which is faster depends on the model and the machine, so the first block is timed
    both ways, and the two results have to agree.

    Attributes
    ----------
    choice : str
        ``"loop"``, ``"batched"``, or ``"undecided"`` before the first block. Set, it is not timed.
    chunk : int
        The most vectors in one batched backward pass.
    """

    def __init__(self) -> None:
        self.choice = "undecided"
        self.chunk = _CHUNK

    def choose(self, choice: str) -> None:
        """Fix the choice, or leave it to be timed with the next block.

        Raises
        ------
        InvalidArgumentError
            If there is no such engine.
        """
        if choice not in _ENGINES:
            msg = f"block_engine should be one of {', '.join(_ENGINES)}, got {choice!r}."
            raise InvalidArgumentError(msg)
        self.choice = choice

    def limit(self, graph_bytes: int, vector_bytes: int, budget: int) -> None:
        """Bound the memory: a batched pass takes about a graph's size, and itself, per vector."""
        held = max(graph_bytes + vector_bytes, 1)
        wanted = max(_CHUNK, min(_LARGEST_CHUNK, _CHUNK_BYTES // held))
        self.chunk = max(1, min(wanted, int(budget // held)))
        if self.chunk < _FEWEST:
            self.choice = "loop"

    def multiply(
        self, graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor
    ) -> Tensor:
        """Rows of ``block`` ``(k, n)`` times the map, as rows of ``(k, m)``."""
        # A caller's inference_mode would forbid autograd to save what is made here.
        with torch.inference_mode(mode=False):
            block = block.clone() if block.is_inference() else block
            if len(block) == 0:
                return torch.zeros(0, codomain.numel, dtype=codomain.dtype, device=codomain.device)
            if len(block) >= _FEWEST and self.choice != "loop":
                if self.choice == "undecided":
                    return self._calibrate(graph, domain, codomain, block)
                result = self._batched(graph, domain, codomain, block)
                if result is not None:
                    return result
                self.choice = "loop"
            return _loop(graph, domain, codomain, block)

    def _batched(
        self, graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor
    ) -> Tensor | None:
        results = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vmap tells where it loops inside
                for chunk in block.split(self.chunk):
                    parts = graph.apply(domain.split(chunk), batched=True)
                    results.append(codomain.join(parts, (len(chunk),)))
        except (RuntimeError, NotImplementedError):
            # No batching rule, or not enough memory; a real fault shows up in the loop as well.
            return None
        return torch.cat(results)

    def _calibrate(
        self, graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor
    ) -> Tensor:
        head = block[: min(8, self.chunk)]
        one_by_one, loop_seconds = _timed(lambda: _loop(graph, domain, codomain, head))
        together, seconds = _timed(lambda: self._batched(graph, domain, codomain, head))
        if together is not None and loop_seconds < seconds < 4 * loop_seconds:
            # The first batched pass pays for imports and compilation: it gets a second try.
            together, seconds = _timed(lambda: self._batched(graph, domain, codomain, head))
        self.choice = "loop"
        if together is not None and one_by_one is not None:
            tolerance = 10 * max(domain.eps, codomain.eps) ** 0.5
            distance = torch.linalg.vector_norm((together - one_by_one).double())
            agree = bool(distance <= tolerance * torch.linalg.vector_norm(one_by_one.double()))
            if agree and seconds < loop_seconds:
                self.choice = "batched"
        rest = self.multiply(graph, domain, codomain, block[len(head) :])
        assert one_by_one is not None
        return torch.cat([one_by_one, rest])


def _loop(graph: Graph, domain: FlatLayout, codomain: FlatLayout, block: Tensor) -> Tensor:
    rows = [codomain.join(graph.apply(domain.split(row), batched=False)) for row in block]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _timed(work: Callable[[], Tensor | None]) -> tuple[Tensor | None, float]:
    def finish() -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = finish()
    result = work()
    return result, finish() - begin
