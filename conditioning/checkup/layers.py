"""Layers: the scale of every weight, and the singular values of those on transitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from conditioning.blocks.transitions import transition_layers
from conditioning.checkup.clock import Clock
from conditioning.checkup.readings import LayerReading, Missing
from conditioning.checkup.watch import Layer
from conditioning.errors import ConditioningError
from conditioning.procrustes.layers import is_layer
from conditioning.singular import SingularValues, singular_values
from conditioning.singular.geometry import geometry_of

_SHARE = 0.2  # of the time that is left
_MATVECS = 400  # for each layer whose values are not to be had at once


def weight_scale(layer: nn.Module) -> tuple[int, float]:
    """Inputs of one output, and the gain: the root of their number times the weight's rms."""
    weight = layer.weight.detach()  # type: ignore[operator]
    inputs = float(weight.numel()) / max(_channels(layer)[1], 1)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # A position of the output sees one tap in each stride only.
        inputs = inputs / math.prod(layer.stride)
    rms = float(torch.linalg.vector_norm(weight.double())) / math.sqrt(max(weight.numel(), 1))
    return max(round(inputs), 1), math.sqrt(inputs) * rms


def _channels(layer: nn.Module) -> tuple[int, int]:
    """Channels or features that a layer takes and returns."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return int(layer.in_channels), int(layer.out_channels)  # type: ignore[arg-type]


def _has_shape(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))


def read_layers(
    model: nn.Module, inputs: Any, ran: Sequence[Layer], clock: Clock
) -> tuple[tuple[LayerReading, ...], list[Missing]]:
    """The scale of all layers that ran, and the singular values of transitions.

    Parameters
    ----------
    model : nn.Module
    inputs : tensor, tuple or dict
        Of one forward pass, which tells where the skips are.
    ran : sequence of Layer
    clock : Clock
    """
    known = [layer for layer in ran if _has_shape(layer.module)]
    on_skips = _transitions(model, inputs, stem=False)
    before = _transitions(model, inputs, stem=True) - on_skips
    last = max((layer.order for layer in known), default=-1)
    end = clock.deadline(_SHARE)
    readings, left_out, missing = [], [], []
    wanted = sum(layer.name in on_skips for layer in known)
    with clock.stage("layers", total=wanted, unit=" layers") as bar:
        for layer in sorted(known, key=lambda layer: layer.order):
            role = "layer"
            found: SingularValues | str | None = None
            if layer.name in on_skips:
                role = "transition"
                found = None if end() or clock.is_out else _measured(layer)
                bar.update()
                if found is None:
                    left_out.append(layer.name)
                elif isinstance(found, str):
                    missing.append(Missing(f"singular values of {layer.name}", found))
            elif layer.name in before:
                role = "stem"
            elif layer.order == last:
                role = "head"
            readings.append(_reading(layer, role, found))
    if left_out:
        names = ", ".join(left_out[:4]) + (" ..." if len(left_out) > 4 else "")
        missing.append(
            Missing(f"singular values of {names}", "the budget ended before: give more seconds")
        )
    return tuple(readings), missing


def _transitions(model: nn.Module, inputs: Any, *, stem: bool) -> set[str]:
    try:
        return set(transition_layers(model, inputs, is_layer, stem=stem))
    except ConditioningError:
        return set()


def _measured(layer: Layer) -> SingularValues | str:
    try:
        return singular_values(layer.module, layer.input_shape, max_matvecs=_MATVECS)
    except ConditioningError as error:
        return str(error)


def _reading(layer: Layer, role: str, found: SingularValues | str | None) -> LayerReading:
    inputs, gain = weight_scale(layer.module)
    known = found if isinstance(found, SingularValues) else None
    return LayerReading(
        layer.name, type(layer.module).__name__, role, layer.order, inputs, gain,
        layer.followed_by, known.largest if known else None,
        (known.smallest_nonzero or known.smallest) if known else None,
        known.operator if known else "", geometry_of(layer.module).gains[0],
        known.status if known else "not measured" if role == "transition" else "",
    )  # fmt: skip
