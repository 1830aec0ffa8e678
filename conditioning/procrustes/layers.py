"""Which layers are projected, and to which singular value."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from conditioning.blocks.wrappers import unwrapped, walk
from conditioning.errors import (
    InvalidArgumentError,
    LayerSelectionError,
    ParametrizedWeightError,
    UnsupportedLayerError,
    UnsupportedParameterError,
)
from conditioning.procrustes.routes import Shape
from conditioning.singular.geometry import SUPPORTED, Geometry, geometry_of

Target = str | float | Mapping[str, Any]
TARGETS = ("backward", "forward")


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer to project.

    Attributes
    ----------
    name : str
    module : nn.Module
    geometry : Geometry
    shape : Shape
    aim : {"backward", "forward", "given"}
    target : float
        The common singular value of its operator.
    """

    name: str
    module: nn.Module
    geometry: Geometry
    shape: Shape
    aim: str
    target: float

    @property
    def weight(self) -> nn.Parameter:
        """The weight, as the module holds it now."""
        weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return weight

    def restored(self, filters: Tensor) -> Tensor:
        """Filters as a weight of the layer."""
        return filters.reshape(self.weight.shape)


def named_layers(layers: Any, model: nn.Module | None) -> dict[str, nn.Module]:
    """Layers by name, from a mapping, from modules, or from names and globs in a model.

    Wrappers (data parallelism, compilation, checkpointing) are looked through, around the model
    and around layers; names are those without them, or with them.

    Raises
    ------
    LayerSelectionError
        If a name matches no layer of the model, or there is no layer at all.
    UnsupportedLayerError
        If one of them is no module.
    InvalidArgumentError
        If the model is none.
    """
    if model is not None:
        check_model(model)
    if isinstance(layers, (str, nn.Module)):
        layers = [layers]
    if isinstance(layers, Mapping):
        found = dict(layers)
    elif isinstance(layers, Iterable):
        found = {}
        for item in layers:
            if isinstance(item, str):
                found |= _matching(item, model)
            else:
                found[_name_of(item, model) or f"layer {len(found)}"] = item
    else:
        msg = f"layers must be a mapping, modules or names, got a {type(layers).__name__}."
        raise LayerSelectionError(msg)
    for name, module in found.items():
        if not isinstance(module, nn.Module):
            msg = f"{name!r} is a {type(module).__name__}, not a layer: pass the module itself."
            raise UnsupportedLayerError(msg)
    found = {name: unwrapped(module) for name, module in found.items()}
    if not found:
        msg = f"There is no layer to project. Name layers of these kinds: {SUPPORTED}."
        raise LayerSelectionError(msg)
    return found


def check_model(model: Any) -> None:
    """Raise ``InvalidArgumentError`` unless it is a module."""
    if not isinstance(model, nn.Module):
        msg = f"model must be the nn.Module that holds the layers, got a {type(model).__name__}."
        raise InvalidArgumentError(msg)


def _name_of(module: Any, model: nn.Module | None) -> str:
    if model is None or not isinstance(module, nn.Module):
        return ""
    inside = unwrapped(module)
    return next((name for name, _, inner in walk(model) if inner is inside), "")


def _matching(pattern: str, model: nn.Module | None) -> dict[str, nn.Module]:
    if model is None:
        msg = f"To find {pattern!r} the model is needed: Procrustes({pattern!r}, model=model)."
        raise LayerSelectionError(msg)
    modules = {name: inner for name, _, inner in walk(model)}
    # The second with what wrappers add to names, as state_dict() has them.
    for known in (modules, dict(model.named_modules())):
        if pattern in known:
            return {pattern: known[pattern]}
        matched = {n: m for n, m in known.items() if n and fnmatch.fnmatchcase(n, pattern)}
        found = {name: module for name, module in matched.items() if is_layer(module)}
        if found:
            return found
        if matched:
            break
    if matched:
        raise LayerSelectionError(_unsupported_message(pattern, matched))
    names = [name for name, module in modules.items() if is_layer(module)]
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
    shown = f" Near it: {', '.join(map(repr, near))}." if near else ""
    msg = f"{pattern!r} matches no linear or convolutional layer of the model.{shown}"
    raise LayerSelectionError(msg)


def _unsupported_message(pattern: str, matched: Mapping[str, nn.Module]) -> str:
    """What a pattern matches, if none of it is a layer."""
    learning = [m for m in matched.values() if any(p.ndim > 1 for p in m.parameters(False))]
    modules = learning or list(matched.values())
    kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in modules))
    count = f"{len(modules)} module{'s' if len(modules) > 1 else ''} of class {kinds}"
    return (
        f"{pattern!r} matches no linear or convolutional layer of the model, but {count}, whose "
        f"weight alone does not say what they compute: known are {SUPPORTED}, and subclasses with "
        f"the same forward."
    )


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear or convolutional layer."""
    try:
        geometry_of(module)
    except UnsupportedLayerError:
        return False
    return True


def prepared(layers: Mapping[str, nn.Module], target: Target) -> tuple[Layer, ...]:
    """Check the layers and find what each is projected to; a shared weight comes once.

    Raises
    ------
    UnsupportedLayerError, ParametrizedWeightError, UnsupportedParameterError
        If a layer's weight cannot be projected.
    InvalidArgumentError
        If a target is no positive number, or two layers that share a weight differ.
    """
    targets = _targets(layers, target)
    found: dict[int, Layer] = {}
    for name, module in layers.items():
        geometry = _checked(name, module)
        wanted = targets[name]
        if isinstance(wanted, str):
            aim, value = wanted, geometry.gains[TARGETS.index(wanted)]
        else:
            aim, value = "given", float(wanted)
        layer = Layer(name, module, geometry, Shape.of(geometry), aim, value)
        other = found.setdefault(id(module.weight), layer)
        if (other.shape, other.target) != (layer.shape, layer.target):
            msg = (
                f"{other.name!r} and {name!r} share one weight, but it would have to be projected "
                f"in two ways: leave one of them out, or give both one target."
            )
            raise InvalidArgumentError(msg)
    return tuple(found.values())


def _targets(layers: Mapping[str, nn.Module], target: Target) -> dict[str, str | float]:
    if isinstance(target, Mapping):
        unknown = sorted(set(target) - set(layers))
        if unknown:
            msg = (
                f"target names {', '.join(map(repr, unknown))}, but the layers are "
                f"{', '.join(map(repr, layers))}."
            )
            raise LayerSelectionError(msg)
        found = {name: target.get(name, "backward") for name in layers}
    else:
        found = dict.fromkeys(layers, target)
    for value in found.values():
        number = isinstance(value, Real) and not isinstance(value, bool)
        named = isinstance(value, str) and value in TARGETS
        if not named and not (number and math.isfinite(value) and value > 0):
            msg = (
                f"target must be 'backward', 'forward' or a positive number (the common singular "
                f"value), got {value!r}."
            )
            raise InvalidArgumentError(msg)
    return found


def _checked(name: str, module: nn.Module) -> Geometry:
    try:
        geometry = geometry_of(module)
    except UnsupportedLayerError as error:
        inside = [n for n, m in module.named_modules() if n and is_layer(m)]
        more = f" Inside it are: {', '.join(inside[:5])}." if inside else ""
        msg = f"{name!r} cannot be projected. {error}{more}"
        raise UnsupportedLayerError(msg) from None
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module, "weight") or weight is None:
        msg = (
            f"The weight of {name!r} is computed from other parameters (a parametrization, "
            f"weight_norm, spectral_norm, or one flat parameter for a whole model), so what is "
            f"written into it is lost. Remove that (torch.nn.utils.parametrize."
            f"remove_parametrizations), or leave the layer out."
        )
        raise ParametrizedWeightError(msg)
    if hasattr(weight, "full_tensor"):
        msg = (
            f"The weight of {name!r} is a DTensor, which is split over ranks: its singular values "
            f"need all of it. Leave the layer out of fully_shard, or out of the projection."
        )
        raise UnsupportedParameterError(msg)
    if isinstance(weight, UninitializedParameter) or weight.is_meta:
        msg = f"The weight of {name!r} has no values yet: initialise the model first."
        raise UnsupportedParameterError(msg)
    shape = (geometry.groups * geometry.rows, geometry.columns, *geometry.kernel)
    if weight.shape != shape:
        msg = (
            f"The weight of {name!r} has shape {tuple(weight.shape)}, which is not that of a "
            f"{geometry.describe()}: a wrapper keeps it elsewhere or in parts (FSDP, ZeRO), or it "
            f"was cut. Leave the layer out of that wrapper, or out of the projection."
        )
        raise UnsupportedParameterError(msg)
    if weight.numel() == 0:
        msg = (
            f"The weight of {name!r} has no entries, so there is nothing to project: leave it out."
        )
        raise UnsupportedParameterError(msg)
    if not weight.dtype.is_floating_point or weight.layout != torch.strided:
        msg = (
            f"The weight of {name!r} is {weight.dtype}, {weight.layout}: real, dense "
            f"floating-point weights can be projected."
        )
        raise UnsupportedParameterError(msg)
    return geometry
