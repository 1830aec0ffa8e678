"""The Jacobians of the blocks, one after the other, as far as the budget reaches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from conditioning.blocks import Block, Blocks, block_jacobians
from conditioning.checkup.clock import Clock
from conditioning.checkup.readings import BlockReading, Missing
from conditioning.errors import ConditioningError
from conditioning.operators.batches import map_tensors

_MOST = 200  # products for each block
_FEWEST = 20  # with fewer nothing is learnt
_ENTRIES = 40_000  # of a stream: as few samples are taken as this needs
# A product with a Jacobian in forward and backward passes through the block, at first sight.
_FIRST_COST = 2.0


@dataclass
class Jacobians:
    """Readings with their Jacobians, and what is missing."""

    readings: tuple[BlockReading, ...]
    samples: int = 0
    """The first samples that they were taken on; 0 for all of the first batch."""

    missing: list[Missing] = field(default_factory=list)
    interrupted: bool = False


def read_jacobians(
    model: nn.Module,
    inputs: Any,
    blocks: Blocks,
    readings: Sequence[BlockReading],
    clock: Clock,
    *,
    num_samples: float,
    may_cut: bool,
    pass_seconds: float,
    share: float,
    seed: int,
) -> Jacobians:
    """Measure the extreme singular values of every block, in an order that covers the depth early.

    Parameters
    ----------
    model : nn.Module
    inputs : tensor, tuple or dict
        Of the first batch.
    blocks : Blocks
    readings : sequence of BlockReading
    clock : Clock
    num_samples : float
        Of the first batch, 0 where that cannot be told.
    may_cut : bool
        Whether samples do not see each other, so that some of them are as good as all.
    pass_seconds : float
        That a forward and backward pass through the whole model takes.
    share : float
        Of what is left of the budget.
    seed : int
    """
    result = Jacobians(tuple(readings))
    few, result.samples = _few_samples(inputs, blocks, num_samples) if may_cut else (inputs, 0)
    known = {block.label: block for block in blocks}
    names = list(dict.fromkeys(reading.name.split("#")[0] for reading in readings))
    order = [names[i] for i in spread(len(names))]
    order.sort(key=lambda name: known[name].kind != "transition")
    end, left = clock.deadline(share), []
    products = clock.matvecs_left(share)
    cost = _FIRST_COST * pass_seconds / max(len(order), 1)
    with clock.stage("Jacobians", total=len(order), unit=" blocks") as bar:
        for done, name in enumerate(order):
            calls = sum(reading.name.split("#")[0] == name for reading in readings)
            rest = (len(order) - done) * calls
            by_time = end.left / rest / cost if cost > 0 else math.inf
            # The last of the budget goes to whole blocks: a few products with many say nothing.
            by_time = max(by_time, min(_FEWEST, end.left / cost / calls if cost > 0 else _FEWEST))
            allowed = int(min(_MOST, max(products // rest, _FEWEST), by_time))
            if result.interrupted or allowed < _FEWEST or products < _FEWEST * calls or end():
                left.append(name)
                continue
            begin = clock.elapsed
            try:
                spent = _one(model, few, inputs, known[name], allowed, seed, result)
            except KeyboardInterrupt:
                result.interrupted = True
                left.append(name)
                continue
            if spent:
                products -= spent
                clock.num_matvecs += spent
                cost = (clock.elapsed - begin) / spent
            bar.update()
    if left:
        clock.reached |= not result.interrupted
        reason = "it was interrupted" if result.interrupted else clock.remedy
        what = f"Jacobians of {len(left)} of {len(order)} blocks"
        result.missing.append(Missing(what, reason))
    return result


def _one(
    model: nn.Module,
    few: Any,
    inputs: Any,
    block: Block,
    allowed: int,
    seed: int,
    result: Jacobians,
) -> int:
    """Measure one block and put it into the readings; the products that it took."""
    name = block.label

    def measured(chosen: Any) -> Any:
        return block_jacobians(
            model, chosen, Blocks([block]), max_matvecs=allowed, seed=seed, progress=False
        )

    try:
        try:
            found = measured(few)
        except ConditioningError:
            raise
        except Exception:
            if few is inputs:
                raise
            found = measured(inputs)  # some models take one size of batch only
    except Exception as error:
        # One block that cannot be measured is no reason to lose all others.
        text = str(error) if isinstance(error, ConditioningError) else f"{error!r}"
        result.missing.append(Missing(f"Jacobian of {name}", text))
        return 0
    by_call = {name + (f"#{j.call}" if j.call else ""): j for j in found}
    result.readings = tuple(
        replace(reading, jacobian=by_call.get(reading.name, reading.jacobian))
        for reading in result.readings
    )
    return int(found.num_matvecs)


def _few_samples(inputs: Any, blocks: Blocks, size: float) -> tuple[Any, int]:
    """The inputs of the first samples, as many as keep the widest stream small."""
    widest = max(
        (math.prod(s) for b in blocks for s in (b.input_shape, b.output_shape) if s), default=0
    )
    if size < 2 or widest <= _ENTRIES:
        return inputs, 0
    count = max(int(size * _ENTRIES / widest), 1)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:count] if tensor.ndim and len(tensor) == size else tensor

    return map_tensors(cut, inputs), count


def spread(count: int) -> Iterator[int]:
    """0 ... count - 1 in an order of which every beginning covers the range: ends, then middles."""
    seen: set[int] = set()
    step = max(count - 1, 1)
    while len(seen) < count:
        for place in range(0, count, step):
            if place not in seen:
                seen.add(place)
                yield place
        step = max(step // 2, 1)
