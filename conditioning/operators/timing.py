"""What products cost, in units of a gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from conditioning.operators.graphs import differentiate
from conditioning.operators.guards import isolated_randomness

if TYPE_CHECKING:
    from conditioning.operators.losses import LossOperator

_ROUNDS = 3
# A call of so many seconds is taken as it is: short disturbances do not matter to it.
_LONG = 2.0


def clock(device: torch.device) -> float:
    """Seconds of work on the CPU by all threads, which other processes do not change.

    On other devices the seconds of the clock.
    """
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Do something, and tell the seconds that it took."""

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock(device)

    begin = finish()
    result = work()
    return result, finish() - begin


def race(
    rivals: Sequence[Callable[[], Any]], device: torch.device
) -> tuple[list[Any], list[float]]:
    """Call several functions in turns, a few times each.

    Returns
    -------
    results : list
        Of the first calls. They pay for what is made once, and count only where they are long.
    seconds : list of float
        Of the fastest call of each.
    """
    first = [timed(work, device) for work in rivals]
    best = [seconds if seconds > _LONG else float("inf") for _, seconds in first]
    spent = 0.0
    for _ in range(_ROUNDS):
        if spent + sum(best) > _LONG and max(best) < float("inf"):
            break
        for index, work in enumerate(rivals):
            seconds = timed(work, device)[1]
            best[index] = min(best[index], seconds)
            spent += seconds
    return [result for result, _ in first], best


def time_operator(
    operator: LossOperator, gradient: float | None, products: dict[bool, float]
) -> float:
    """Return the seconds of a gradient of the first batch; note those of a product with a vector.

    What is known already is not timed again.
    """
    with isolated_randomness(operator._batches.generators()):
        batch = next(iter(operator._batches))
        if gradient is None:
            gradient = race([lambda: _gradient(operator, batch)], operator.device)[1][0]
        one = torch.ones(1, operator.local_size, dtype=operator.dtype, device=operator.device)
        if operator._fresh_graphs() is None and operator._keep:
            # So that there is a graph to speak of; of this process alone, which may be alone.
            operator._over_batches(lambda graph: [operator._rows(graph, one)])
        if False not in products:
            kept = operator._fresh_graphs()
            graph = kept[0][0] if kept else operator._build(batch)
            products[False] = race([lambda: operator._rows(graph, one)], operator.device)[1][0]
    return gradient


def _gradient(operator: LossOperator, batch: Any) -> None:
    with torch.inference_mode(mode=False):
        differentiate([operator._plain_loss(batch)], operator._parameters)
