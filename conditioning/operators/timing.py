"""What products cost, in units of a gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from conditioning.operators.graphs import differentiate
from conditioning.operators.guards import isolated_randomness

if TYPE_CHECKING:
    from conditioning.operators.losses import LossOperator

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 20
# A call of so many seconds is taken as it is: short disturbances do not matter to it.
_LONG = 2.0
# Seconds for more rounds than the fewest, and after which not even those are made.
_SHORT, _ENOUGH = 0.05, 0.5


@dataclass(frozen=True)
class Engine:
    """How an operator multiplies.

    Attributes
    ----------
    name : str
        ``"retained"``, ``"linearized"`` or ``"compiled"``: what single vectors go through now.
    blocks : str
        The same for blocks of vectors, and whether one by one (``"loop"``) or at once
        (``"batched"``); ``"undecided"`` before the first block.
    gradients, gradients_in_blocks : float or None
        Cost of a product per vector, in gradients of the same batch; ``None`` if not measured.
    reason : str
        Why it is so.
    """

    name: str
    blocks: str
    gradients: float | None
    gradients_in_blocks: float | None
    reason: str

    def __str__(self) -> str:
        costs = [
            "not measured" if cost is None else f"{cost:.2f} gradients"
            for cost in (self.gradients, self.gradients_in_blocks)
        ]
        return f"{self.name} ({costs[0]}), blocks {self.blocks} ({costs[1]}): {self.reason}"


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
    """Call several functions in turns, a few times each, and more often where that costs nothing.

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
    for count in range(_MOST_ROUNDS):
        if spent > (_ENOUGH if count < _FEWEST_ROUNDS else _SHORT):
            break
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
