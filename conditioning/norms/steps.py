"""From the slots of one step to numbers: pairing, one transfer to the host, sums over ranks."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conditioning.distributed import gather_arrays, group_size, sum_over_ranks
from conditioning.norms.readings import Port, Reading, unsafe
from conditioning.norms.recorder import Slot

#: Where numbers are kept: at the border where a block's input enters, or its output leaves.
SIDES = ("grad_in", "grad_out", "act_in", "act_out")


@dataclass(frozen=True)
class Call:
    """One backward pass through one call of one block.

    Parameters
    ----------
    block : int
        Position among the tracked blocks.
    call : int
        The how-manieth of this block in the step.
    visit : int
        The how-manieth of this block in its forward pass: above 0 where a block is shared.
    pass_id : int
        The forward pass.
    order : int
        Place in the order of execution, over all blocks.
    backward : int
        The how-manieth backward pass of its forward pass: above 0 where losses are
        differentiated one after the other.
    values : dict of str to float
        By quantity; norms, and shares or statistics over samples where wanted.
    """

    block: int
    call: int
    visit: int
    pass_id: int
    order: int
    backward: int
    values: dict[str, float]


@dataclass(slots=True)
class _Pending:
    """A call whose numbers are still on the device."""

    slot: Slot
    number: int  # of the backward pass, as autograd counts
    sides: dict[str, list[Reading]]
    backward: int = 0
    call: int = 0
    visit: int = 0


def has_gradient(slot: Slot) -> bool:
    """Whether a backward pass came through this call of the block."""
    # What a run without gradients returned may be the input of a block that is differentiated.
    return slot.mode != "unrecorded" and any(port.gradients for port in slot.outputs)


def _first_backward(slot: Slot) -> int:
    return min(number for port in slot.outputs for number, _ in port.gradients)


def _restore_order(slots: Sequence[Slot]) -> list[Slot]:
    """Slots that gradients came through, each at its place in the forward pass.

    Reentrant checkpointing runs a block without gradients first and again during the backward
    pass, last segment first: the slots of the second run take the place, and the activations, of
    those of the first. Other checkpointing also runs blocks again, but gradients do not pass
    through what it computes then.
    """
    live = [slot for slot in slots if slot.finished and has_gradient(slot)]
    first_runs: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots:
        if slot.mode == "unrecorded" and slot.finished:
            first_runs[slot.block].append(slot)
    second_runs: dict[int, list[Slot]] = defaultdict(list)
    for slot in live:
        if slot.mode == "recomputed":
            second_runs[slot.block].append(slot)
    for block, again in second_runs.items():
        again.sort(key=lambda slot: (-_first_backward(slot), slot.order))
        for slot, first in zip(again, first_runs[block], strict=False):
            slot.order, slot.pass_id = first.order, first.pass_id
    return sorted(live, key=lambda slot: (slot.pass_id, slot.order))


def _ranks_of_backwards(
    slots: Sequence[Slot], nested: dict[int, int]
) -> dict[tuple[int, int, int], int]:
    """For each forward pass, autograd's numbers of backward passes, counted from 0.

    A reentrant checkpoint begins a backward pass inside another one: both are the same.
    """
    outer = nested | {
        number: slot.inside
        for slot in slots
        for port in slot.outputs
        for number, _ in port.gradients
        if 0 <= slot.inside != number
    }

    def outermost(number: int) -> int:
        while number in outer:
            number = outer[number]
        return number

    found: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for slot in slots:
        for port in slot.outputs:
            for number, repeat in port.gradients:
                found[slot.pass_id][outermost(number), repeat].append(number)
    return {
        (pass_id, number, key[1]): rank
        for pass_id, groups in found.items()
        for rank, (key, numbers) in enumerate(sorted(groups.items()))
        for number in numbers
    }


def _pending(slots: Sequence[Slot], nested: dict[int, int]) -> list[_Pending]:
    ranks = _ranks_of_backwards(slots, nested)
    calls: dict[int, int] = defaultdict(int)
    visits: dict[tuple[int, int], int] = defaultdict(int)
    found = []
    for slot in slots:
        passes = sorted({number for port in slot.outputs for number in port.gradients})
        visit = visits[slot.pass_id, slot.block]
        visits[slot.pass_id, slot.block] += 1
        for number in passes:
            sides = {
                "grad_in": [p.gradients[number] for p in slot.inputs if number in p.gradients],
                "grad_out": [p.gradients[number] for p in slot.outputs if number in p.gradients],
                "act_in": _activations(slot.inputs),
                "act_out": _activations(slot.outputs),
            }
            call = calls[slot.block]
            calls[slot.block] += 1
            backward = ranks[(slot.pass_id, *number)]
            found.append(_Pending(slot, number[0], sides, backward, call, visit))
    return found


def _activations(ports: Iterable[Port]) -> list[Reading]:
    return [port.activation for port in ports if port.activation is not None]


@dataclass
class _Ledger:
    """0-d tensors of any device and dtype, brought to the host together."""

    tensors: list[Tensor] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> None:
        if id(tensor) not in self.places:
            self.places[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)

    def read(self) -> NDArray[np.float64]:
        values = np.empty(len(self.tensors))
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for place, tensor in enumerate(self.tensors):
            groups[tensor.device, tensor.dtype].append(place)
        for places in groups.values():
            stacked = torch.stack([self.tensors[place] for place in places])
            values[places] = stacked.cpu().double().numpy()
        return values


def measure(
    slots: Sequence[Slot],
    scales: dict[int, Tensor],
    nested: dict[int, int],
    group: Any = None,
) -> tuple[list[list[Call]], bool]:
    """Turn slots into calls, with one transfer from each device.

    Parameters
    ----------
    slots : sequence of Slot
    scales : dict of int to Tensor
        The loss scale of each backward pass; empty without a scaler.
    nested : dict of int to int
        Backward passes that ran inside others.
    group : ProcessGroup, optional
        Ranks to combine: squares of gradient norms are added and divided by the number of ranks
        squared (each rank's loss is a mean that the average over ranks divides again); squares
        of activation norms are added.

    Returns
    -------
    steps : list of list of Call
        One list, or several where the loss scale fell in between: then the optimizer skipped a
        step.
    wide : bool
        Whether a norm left the range in which squares can be summed in float32.
    """
    pending = _pending(_restore_order(slots), nested)
    readings = {
        id(reading): reading for item in pending for side in item.sides.values() for reading in side
    }
    ledger = _Ledger()
    for reading in readings.values():
        for tensor in (reading.norm, reading.zeros, reading.nonfinite):
            if tensor is not None:
                ledger.add(tensor)
    for scale in scales.values():
        ledger.add(scale)
    host = ledger.read()
    wide = any(
        unsafe(host[ledger.places[id(r.norm)]], r.numel) and r.norm.dtype != torch.float64
        for r in readings.values()
    )
    layout = [
        (i.slot.block, i.visit, i.slot.pass_id, i.backward, [len(i.sides[s]) for s in SIDES])
        for i in pending
    ]
    sums = _sums(list(readings.values()), ledger, host, group, layout)
    ranks = group_size(group) if group is not None else 1
    scale_of = {number: host[ledger.places[id(scale)]] for number, scale in scales.items()}
    samples = _samples(list(readings.values()), group)
    calls = [
        Call(
            item.slot.block, item.call, item.visit, item.slot.pass_id, item.slot.order,
            item.backward, _values(item, sums, samples, ranks, scale_of.get(item.number, 1.0)),
        )
        for item in pending
    ]  # fmt: skip
    boundaries = _skipped_after(pending, scale_of)
    steps = [
        [call for call in calls if low < call.pass_id <= high]
        for low, high in zip([-math.inf, *boundaries], [*boundaries, math.inf], strict=True)
    ]
    return [step for step in steps if step], wide


def _sums(
    readings: list[Reading],
    ledger: _Ledger,
    host: NDArray[np.float64],
    group: Any,
    layout: Sequence[Any],
) -> dict[int, NDArray[np.float64]]:
    """For each reading, over all ranks: norm, zeros, non-finite, entries."""

    def number(tensor: Tensor | None) -> float:
        return math.nan if tensor is None else float(host[ledger.places[id(tensor)]])

    table = np.array(
        [[number(r.norm), number(r.zeros), number(r.nonfinite), r.numel] for r in readings]
    ).reshape(-1, 4)
    if group is not None:
        table[:, 0] **= 2
        table = sum_over_ranks(table.reshape(-1), group, layout).reshape(-1, 4)
        table[:, 0] **= 0.5
    return {id(reading): row for reading, row in zip(readings, table, strict=True)}


def _samples(readings: list[Reading], group: Any) -> dict[int, NDArray[np.float64]]:
    found = {}
    for reading in readings:
        if reading.samples is None:
            continue
        values = reading.samples.cpu().double().numpy()
        found[id(reading)] = (
            values if group is None else np.concatenate(gather_arrays(values, group))
        )
    return found


def _values(
    item: _Pending,
    sums: dict[int, NDArray[np.float64]],
    samples: dict[int, NDArray[np.float64]],
    ranks: int,
    scale: float,
) -> dict[str, float]:
    values: dict[str, float] = {}
    rows: dict[str, NDArray[np.float64]] = {}
    for side in SIDES:
        readings = item.sides[side]
        if not readings:
            continue
        factor = 1 / (scale * ranks) if side.startswith("grad") else 1.0
        table = np.array([sums[id(reading)] for reading in readings])
        total = table.sum(axis=0)
        values[side] = math.hypot(*table[:, 0]) * factor
        if not math.isnan(total[1]):
            values[f"{side}_zeros"] = total[1] / max(total[3], 1)
            values[f"{side}_nonfinite"] = total[2] / max(total[3], 1)
        parts = [samples[id(reading)] for reading in readings if id(reading) in samples]
        if parts and len({part.shape for part in parts}) == 1:
            rows[side] = np.sqrt(np.sum(np.square(parts), axis=0)) * factor
    values["ratio"] = divide(values.get("grad_in"), values.get("grad_out"))
    if "grad_in" in rows and "grad_out" in rows and len(rows["grad_in"]) == len(rows["grad_out"]):
        with np.errstate(divide="ignore", invalid="ignore"):
            rows["ratio"] = rows["grad_in"] / rows["grad_out"]
    for name, row in rows.items():
        values |= _statistics(name, row)
    return values


def _statistics(name: str, row: NDArray[np.float64]) -> dict[str, float]:
    kept = row[~np.isnan(row)]  # 0 / 0: a sample without any gradient has no ratio
    if not len(kept):
        return dict.fromkeys((f"{name}_{what}" for what in ("mean", "std", "min", "max")), math.nan)
    with np.errstate(invalid="ignore"):
        spread = float(np.std(kept, ddof=1)) if len(kept) > 1 else math.nan
        return {
            f"{name}_mean": float(np.mean(kept)),
            f"{name}_std": spread,
            f"{name}_min": float(np.min(kept)),
            f"{name}_max": float(np.max(kept)),
        }


def divide(numerator: float | None, denominator: float | None) -> float:
    """Quotient of two norms; NaN where either is missing, or both are zero or infinite."""
    if numerator is None or denominator is None or math.isnan(numerator + denominator):
        return math.nan
    if denominator == 0:
        return math.nan if numerator == 0 else math.inf
    return (
        math.nan if math.isinf(numerator) and math.isinf(denominator) else numerator / denominator
    )


def _skipped_after(pending: list[_Pending], scale_of: dict[int, float]) -> list[int]:
    """Forward passes after which the loss scale fell: an overflow made the optimizer skip."""
    scales: dict[int, float] = {}
    for item in pending:
        if item.number in scale_of:
            scales.setdefault(item.slot.pass_id, scale_of[item.number])
    passes = sorted(scales)
    return [
        before for before, after in itertools.pairwise(passes) if scales[after] < scales[before]
    ]
