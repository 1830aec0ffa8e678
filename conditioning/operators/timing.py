"""What products cost, in units of a gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditioning.operators.batches import map_tensors, to_device
from conditioning.operators.graphs import differentiate
from conditioning.operators.guards import BufferGuard, differentiable, isolated_randomness

if TYPE_CHECKING:
    from conditioning.operators.losses import LossOperator

_REPEATS = 3


def timed(work: Callable[[], Tensor | None]) -> tuple[Tensor | None, float]:
    """Do something, and tell the seconds that it took."""

    def finish() -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = finish()
    result = work()
    return result, finish() - begin


def fastest(work: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Seconds of the fastest of a few runs."""
    return min(timed(work)[1] for _ in range(repeats))


def time_operator(
    operator: LossOperator, gradient: float | None, products: dict[bool, float]
) -> float:
    """Return the seconds of a gradient of the first batch; note those of a product with a vector.

    What is known already is not timed again.
    """
    with isolated_randomness(operator._batches.generators()):
        batch = next(iter(operator._batches))
        if gradient is None:
            gradient = fastest(lambda: _gradient(operator, batch))
        one = torch.ones(1, operator.local_size, dtype=operator.dtype, device=operator.device)
        if operator._fresh_graphs() is None and operator._keep:
            operator._matmat(one.T)  # so that there is a graph to speak of
        if False not in products:
            kept = operator._fresh_graphs()
            graph = kept[0][0] if kept else operator._build(batch)
            products[False] = fastest(lambda: operator._rows(graph, one))
    return gradient


def _gradient(operator: LossOperator, batch: Any) -> None:
    modules, device = operator._modules, operator.device
    with torch.inference_mode(mode=False), differentiable(modules, device), BufferGuard(modules):
        # A model that works in place from its first layer on would change the caller's data.
        batch = map_tensors(torch.clone, to_device(batch, device))
        differentiate([operator._loss_of(*operator._forward(batch), batch)], operator._parameters)
