"""Products from autograd graphs that are built once and used many times."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from conditioning.errors import DoubleBackwardError
from conditioning.operators.modules import join_names

Parts = Sequence[Tensor | None]

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

    def size(self) -> int:
        """Count the nodes of the graph that a product goes through."""


class LossGraph(Graph, Protocol):
    """A linear map on a retained graph of a scalar loss."""

    loss: Tensor
    gradient: list[Tensor | None]
    custom: list[str]


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
        return _once(custom_functions(outputs))
    else:
        what = f"Autograd cannot differentiate this model twice: {text}."
    return f"{what} {_REPLACE}"


def _once(custom: list[str]) -> str:
    return (
        f"A custom autograd.Function is marked @once_differentiable, so it has no second "
        f"derivative (custom functions in the graph: {join_names(custom) or 'unknown'}). "
        f"{_REPLACE}"
    )


def nodes_behind(outputs: Sequence[Tensor | None]) -> Iterator[Any]:
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


def custom_functions(outputs: Sequence[Tensor]) -> list[str]:
    """Names of the user's own functions in a graph, those inside segments as well."""
    kind = torch.autograd.function.BackwardCFunction
    nodes = [node for node in nodes_behind(outputs) if isinstance(node, kind)]
    names = {type(node).__name__.removesuffix("Backward") for node in nodes} - _OWN_FUNCTIONS
    return sorted(names.union(*(getattr(node, "custom", ()) for node in nodes)))


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
    custom = custom_functions(outputs)
    if "CheckpointFunction" in custom:
        raise DoubleBackwardError(_REENTRANT)
    if custom and any(node.name() == "torch::autograd::Error" for node in nodes_behind(gradients)):
        raise DoubleBackwardError(_once(custom))
    return custom
