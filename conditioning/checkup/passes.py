"""One forward and one backward pass for each batch: norms, activations, layers, time steps."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conditioning.blocks import Blocks, split_blocks
from conditioning.checkup.clock import Clock
from conditioning.checkup.readings import (
    ActivationReading,
    BlockReading,
    Missing,
    RecurrentReading,
)
from conditioning.checkup.watch import Layer, Times, Use, Watch
from conditioning.errors import (
    BlockNotSeenWarning,
    ConditioningError,
    LossWithoutGraphError,
    NonFiniteGradientWarning,
)
from conditioning.norms import GradientNorms
from conditioning.operators.batches import Batches, call_with, map_tensors, to_device
from conditioning.operators.guards import BufferGuard, isolated_randomness
from conditioning.operators.scalar import scalar_loss
from conditioning.spectrum import Estimate
from conditioning.spectrum.full import NAN

_SHARE = 0.25  # of the time, for passes over further batches
_TENTH = 10
_QUANTITIES = ("act_in", "act_out", "grad_in", "grad_out", "ratio", "product")


def over_batches(values: Iterable[float]) -> Estimate:
    """Mean with the least and the largest; NaN if any is, or there is none."""
    numbers = np.array(list(values), dtype=np.float64)
    if not len(numbers) or np.isnan(numbers).any():
        return NAN
    with np.errstate(invalid="ignore"):
        return Estimate(float(numbers.mean()), float(numbers.min()), float(numbers.max()))


@dataclass
class Passes:
    """What the passes over the batches have shown."""

    loss: Estimate
    gradient_norm: Estimate
    product: Estimate
    mean_deviation: Estimate
    nonfinite: str
    blocks: tuple[BlockReading, ...]
    activations: tuple[ActivationReading, ...]
    recurrent: tuple[RecurrentReading, ...]
    layers: tuple[Layer, ...]
    num_batches: int
    num_samples: int
    complete: bool
    seconds: float  # of one pass over the batches
    interrupted: bool
    notes: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


@dataclass
class _Batch:
    loss: Tensor
    gradient_norm: Tensor
    points: list[Any]


def run_passes(
    model: nn.Module,
    loss_fn: Any,
    batches: Batches,
    blocks: Blocks | None,
    parameters: Sequence[Tensor],
    inputs: Any,
    clock: Clock,
) -> Passes:
    """Go over the batches once, as many of them as the time allows, the first at any rate.

    Raises
    ------
    ConditioningError
        If the first batch cannot be evaluated.
    """
    device = parameters[0].device
    watch = Watch(model)
    found: list[_Batch] = []
    notes: list[str] = []
    size, complete, interrupted = 0.0, True, False
    is_late = clock.deadline(_SHARE)
    modules = list(model.modules())
    tracker = None if blocks is None else GradientNorms(model, blocks, process_group=None)
    with (
        clock.stage("norms", unit=" batches") as bar,
        isolated_randomness(batches.generators()),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        begin = clock.elapsed
        try:
            for batch in batches:
                if found and is_late():
                    complete = False
                    break
                with BufferGuard(modules), torch.inference_mode(mode=False), torch.enable_grad():
                    found.append(_one(model, loss_fn, batch, tracker, watch, parameters, device))
                size += batches.size_or(batch, 1.0)
                bar.update()
        except KeyboardInterrupt:
            if not found:
                raise
            complete, interrupted = False, True
    seconds = clock.elapsed - begin
    for warning in caught:
        if issubclass(warning.category, BlockNotSeenWarning):
            notes.append(str(warning.message))
        elif not issubclass(warning.category, NonFiniteGradientWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    missing = [
        Missing(f"time steps of {name or 'the model'}", reason) for name, reason in watch.unwatched
    ]
    nonfinite = tracker.first_nonfinite() if tracker is not None else None
    shares = None if interrupted else _shares(model, inputs, blocks)
    interrupted |= shares is None
    readings = _blocks(found, blocks, shares or {})
    return Passes(
        over_batches(float(b.loss) for b in found),
        over_batches(float(b.gradient_norm) for b in found),
        over_batches(_product(b.points) for b in found) if readings else NAN,
        over_batches(_deviation(b.points) for b in found) if readings else NAN,
        _where(nonfinite, len(found)), readings, _activations(watch.uses.values()),
        tuple(_recurrent(watch.times.values())), tuple(watch.layers.values()), len(found),
        int(size), complete, seconds, interrupted, notes, missing,
    )  # fmt: skip


def _one(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    tracker: GradientNorms | None,
    watch: Watch,
    parameters: Sequence[Tensor],
    device: torch.device,
) -> _Batch:
    """Loss and gradient of one batch; ``.grad`` is left alone."""
    batch = to_device(batch, device)
    leaves: list[Tensor] = []

    def followed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        # What a model gets is no leaf, so that a first layer may work in place.
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1].clone()

    inputs = map_tensors(followed, batch if loss_fn is None else batch[0])
    with watch.one_pass():
        if tracker is not None:
            tracker.attach()
        try:
            with watch:
                outputs = call_with(model, inputs) if loss_fn is not None else model(inputs)
            loss = scalar_loss(outputs if loss_fn is None else loss_fn(outputs, batch[1]))
            gradients = torch.autograd.grad(
                loss, [*parameters, *leaves], allow_unused=True, materialize_grads=False
            )
            points = []
            if tracker is not None:
                tracker.step()
                points = tracker.points()
        finally:
            if tracker is not None:
                tracker.detach()
    own = [g for g in gradients[: len(parameters)] if g is not None]
    if not own:
        msg = (
            "None of the parameters influences the loss. Look for .detach() or torch.no_grad() on "
            "the way from the parameters to the loss."
        )
        raise LossWithoutGraphError(msg)
    squares = torch.stack([g.detach().double().square().sum() for g in own]).sum()
    return _Batch(loss.detach(), squares.sqrt(), points)


def _where(nonfinite: Any, num_batches: int) -> str:
    """Where NaN or an infinity came up first, as a sentence; empty if nowhere."""
    if nonfinite is None:
        return ""
    text = nonfinite.message.removeprefix(f"in step {nonfinite.step} ")
    text = text[0].upper() + text[1:]
    return f"{text} (batch {nonfinite.step + 1} of {num_batches})" if num_batches > 1 else text


def _shares(model: nn.Module, inputs: Any, blocks: Blocks | None) -> dict[str, float] | None:
    """Norm of the branch over that of the skip, by block, where they are added."""
    if blocks is None:
        return {}
    try:
        found = split_blocks(model, inputs, blocks)
    except ConditioningError:
        return {}  # no addition in any block
    except KeyboardInterrupt:
        return None
    shares: dict[str, float] = {}
    for split in found:
        shares[split.name] = max(split.ratio, shares.get(split.name, 0.0))
    return shares


def _blocks(
    found: Sequence[_Batch], blocks: Blocks | None, shares: dict[str, float]
) -> tuple[BlockReading, ...]:
    if blocks is None or not found:
        return ()
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for batch in found:
        for point in batch.points:
            for quantity, value in point.values.items():
                values[point.name][quantity].append(value)
    labels = {block.label: block for block in blocks}
    readings = []
    for depth, point in enumerate(found[0].points):
        block = labels[point.name.split("#")[0]]
        numbers = values[point.name]
        act_in, act_out, grad_in, grad_out, ratio, product = (
            over_batches(numbers[quantity]) for quantity in _QUANTITIES
        )
        readings.append(
            BlockReading(
                point.name, block.classes, point.kind, block.shapes, depth, act_in, act_out,
                grad_in, grad_out, ratio, product, shares.get(block.name), None,
            )
        )  # fmt: skip
    return tuple(readings)


def _outer(points: Sequence[Any]) -> list[Any]:
    """The points of blocks that lie in no other block."""
    return [point for point in points if point.level == 0]


def _product(points: Sequence[Any]) -> float:
    """The product at the first block to whose input a gradient comes."""
    products = [point.values["product"] for point in _outer(points)]
    return next((value for value in products if not math.isnan(value)), math.nan)


def _deviation(points: Sequence[Any]) -> float:
    ratios = np.array([point.values["ratio"] for point in points])
    known = ratios[~np.isnan(ratios)]
    return float(np.abs(1 - known).mean()) if len(known) else math.nan


def _activations(uses: Iterable[Use]) -> tuple[ActivationReading, ...]:
    readings = []
    for use in sorted(uses, key=lambda use: use.order):
        units = use.always_flat
        readings.append(
            ActivationReading(
                use.name, use.function, use.order, math.sqrt(float(use.squares) / use.count),
                float(use.flat) / use.count,
                0.0 if units is None else float(units.to(torch.float64).mean()),
                0 if units is None else units.numel(),
            )
        )  # fmt: skip
    return tuple(readings)


def _recurrent(times: Iterable[Times]) -> Iterator[RecurrentReading]:
    for entry in times:
        rows = [batch.cpu().numpy() for batch in entry.batches if len(batch) > 1]
        if not rows:
            continue
        tenth = [max(len(row) // _TENTH, 1) for row in rows]
        yield RecurrentReading(
            entry.name, _class_of(entry.module), max(len(row) for row in rows),
            over_batches(_rms(row[:k]) for row, k in zip(rows, tenth, strict=True)),
            over_batches(_rms(row[-k:]) for row, k in zip(rows, tenth, strict=True)),
            over_batches(_growth(row) for row in rows), recurrent_norm(entry.module),
        )  # fmt: skip


def _class_of(module: nn.Module) -> str:
    """The class of torch that a recurrent layer is, or is derived from."""
    known = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    return next((k.__name__ for k in known if isinstance(module, k)), type(module).__name__)


def _rms(row: Any) -> float:
    return float(np.sqrt(np.mean(np.square(row))))


def _growth(row: Any) -> float:
    """Factor a step back in time, by least squares through the logarithms."""
    times = np.arange(len(row), dtype=np.float64)
    kept = np.isfinite(row) & (row > 0)
    if not np.isfinite(row).all():
        return math.inf
    if kept.sum() < max(3, len(row) / 2):
        return math.nan  # a loss on a few of the steps says nothing about the others
    return float(np.exp(-np.polyfit(times[kept], np.log(row[kept]), 1)[0]))


def recurrent_norm(module: nn.Module) -> float:
    """Largest singular value of the recurrent weights, of each gate alone."""
    gates = {"LSTM": 4, "GRU": 3}
    count = gates.get(_class_of(module).removesuffix("Cell"), 1)
    largest = math.nan
    for name, weight in module.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            parts = weight.detach().double().cpu().chunk(count, dim=0)
            found = max(float(torch.linalg.matrix_norm(part, 2)) for part in parts)
            largest = found if math.isnan(largest) else max(largest, found)
    return largest
