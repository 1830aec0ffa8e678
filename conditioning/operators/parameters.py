"""Which parameters an operator acts on, and how they make one flat vector."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.errors import (
    MixedDevicesError,
    MixedDtypeWarning,
    NoTrainableParametersError,
    ParameterSelectionError,
    ShapeError,
    UnsupportedParameterError,
)
from conditioning.operators.modules import join_names

_WILDCARDS = frozenset("*?[")

ParameterChoice = nn.Module | Tensor | str | Iterable[Any] | Mapping[str, Tensor] | None


class FlatLayout:
    """Several named tensors as one flat vector, and back.

    Parameters
    ----------
    names : sequence of str
    tensors : sequence of Tensor
        Give shapes, dtypes and the device. They are not kept.

    Attributes
    ----------
    numel : int
        Length of the flat vector.
    dtype : torch.dtype
        The dtype to which all the tensors' dtypes promote.
    device : torch.device
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self.names = tuple(names)
        self.shapes = tuple(tuple(t.shape) for t in tensors)
        self.sizes = [t.numel() for t in tensors]
        self.dtypes = tuple(t.dtype for t in tensors)
        self.numel = sum(self.sizes)
        self.device = tensors[0].device
        self.dtype = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self._mixed = any(dtype != self.dtype for dtype in self.dtypes)
        self.eps = max(torch.finfo(dtype).eps for dtype in self.dtypes)

    def misfits(self, tensors: Sequence[Tensor]) -> list[str]:
        """Names of tensors that no longer have the shape, dtype or device of this layout."""
        then = zip(self.names, tensors, self.shapes, self.dtypes, strict=True)
        return [
            name
            for name, tensor, shape, dtype in then
            if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, self.device)
        ]

    def split(self, flat: Tensor) -> list[Tensor]:
        """``(..., n)`` into tensors ``(..., *shape)``, each in its own dtype."""
        lead = flat.shape[:-1]
        parts = [
            part.reshape((*lead, *shape))
            for part, shape in zip(flat.split(self.sizes, dim=-1), self.shapes, strict=True)
        ]
        if not self._mixed:
            return parts
        return [part.to(dtype) for part, dtype in zip(parts, self.dtypes, strict=True)]

    def join(
        self,
        parts: Sequence[Tensor | None],
        lead: tuple[int, ...] = (),
        out: Tensor | None = None,
    ) -> Tensor:
        """Tensors ``(*lead, *shape)`` into one ``(*lead, n)``; ``None`` stands for zeros."""
        flat = []
        for name, part, size in zip(self.names, parts, self.sizes, strict=True):
            if part is None:
                flat.append(torch.zeros(*lead, size, dtype=self.dtype, device=self.device))
                continue
            if part.layout != torch.strided:
                msg = (
                    f"The gradient of {name} is sparse, which has no second derivative here. Set "
                    f"sparse=False on its module (nn.Embedding) while the operator is used."
                )
                raise UnsupportedParameterError(msg)
            if part.requires_grad:
                part = part.detach()
            flat.append(self._cast(part.reshape(*lead, size)))
        if len(flat) == 1:
            return flat[0].clone() if out is None else out.copy_(flat[0])
        return torch.cat(flat, dim=-1, out=out)

    def _cast(self, part: Tensor) -> Tensor:
        # A call that changes nothing costs microseconds, which add up over small parameters.
        if part.dtype == self.dtype and part.device == self.device:
            return part
        return part.to(dtype=self.dtype, device=self.device)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """``(n,)`` into ``{name: (*shape)}``; ``(n, k)`` into ``{name: (*shape, k)}``.

        Raises
        ------
        ShapeError
            If the vector has another length.
        """
        if vector.ndim not in (1, 2) or vector.shape[0] != self.numel:
            msg = (
                f"Expected a tensor of shape ({self.numel},) or ({self.numel}, k), "
                f"got {tuple(vector.shape)}."
            )
            raise ShapeError(msg)
        tail = vector.shape[1:]
        return {
            name: part.reshape((*shape, *tail))
            for name, part, shape in zip(
                self.names, vector.split(self.sizes, dim=0), self.shapes, strict=True
            )
        }

    def flatten(self, mapping: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`unflatten`.

        Raises
        ------
        ShapeError
            If a name is missing or unknown, or a tensor has another shape.
        """
        missing = [name for name in self.names if name not in mapping]
        unknown = [str(name) for name in mapping if name not in self.names]
        if missing or unknown:
            msg = (
                f"Expected exactly the names {join_names(list(self.names))}; "
                f"missing: {join_names(missing) or 'none'}; "
                f"unknown: {join_names(unknown) or 'none'}."
            )
            raise ShapeError(msg)
        tails = set()
        parts = []
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            tensor = mapping[name]
            tail = tuple(tensor.shape[len(shape) :])
            tails.add(tail)
            if tuple(tensor.shape[: len(shape)]) != shape or len(tail) > 1 or len(tails) > 1:
                msg = (
                    f"{name!r} should have shape {shape}, or {shape} with one trailing axis that "
                    f"all tensors share, got {tuple(tensor.shape)}."
                )
                raise ShapeError(msg)
            parts.append(
                tensor.detach().reshape(size, *tail).to(dtype=self.dtype, device=self.device)
            )
        return torch.cat(parts, dim=0)


def select_parameters(
    owners: Mapping[str, nn.Module],
    params: ParameterChoice,
    *,
    closed: bool = True,
    sharded: bool = False,
) -> dict[str, Tensor]:
    """Select the parameters that an operator acts on, by name, in ``named_parameters`` order.

    Parameters
    ----------
    owners : mapping of str to Module
        The modules that own parameters; the key prefixes the names.
    params : None, Module, Tensor, str, or iterable
        See :class:`HessianOperator`.
    closed : bool
        Whether a parameter that no owner has is an error. It is not one for a
        plain function, whose modules can be found only in part.
    sharded : bool
        Whether parameters that are sharded over ranks will do.

    Raises
    ------
    ParameterSelectionError
        If a name matches nothing, a parameter is foreign or frozen, or nothing is left.
    NoTrainableParametersError
        If nothing that was selected requires a gradient.
    UnsupportedParameterError
        If a parameter is integer, complex, sparse, sharded, or has no data yet.
    MixedDevicesError
        If the parameters live on several devices.
    """
    owned: dict[str, Tensor] = {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, owner in owners.items()
        if not prefix.endswith(":")
        for name, parameter in owner.named_parameters(remove_duplicate=False)
    }
    chosen = _choose(owned, params, closed=closed)
    # A tied weight has several names: the first one counts.
    ordered: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in (owned | chosen).items():
        if id(parameter) not in ordered and any(parameter is c for c in chosen.values()):
            ordered[id(parameter)] = (name, parameter)
    selected = dict(ordered.values())
    _validate(selected, sharded=sharded)
    return selected


def _choose(
    owned: dict[str, Tensor], params: ParameterChoice, *, closed: bool
) -> dict[str, Tensor]:
    if params is None:
        chosen = {name: p for name, p in owned.items() if p.requires_grad}
        if not chosen:
            msg = (
                f"None of the model's {len(owned)} parameters requires a gradient. Call "
                f"parameter.requires_grad_() on those to differentiate by."
                if owned
                else "The model has no parameters. Pass params=, or use JacobianOperator for "
                "derivatives by the inputs."
            )
            raise NoTrainableParametersError(msg)
        return chosen
    if isinstance(params, nn.Module):
        own: dict[str, Tensor] = dict(params.named_parameters())
        chosen = _by_identity(owned, own, closed=closed)
        trainable = {name: p for name, p in chosen.items() if p.requires_grad}
        if not trainable:
            msg = (
                f"No parameter of the selected {type(params).__name__} requires a gradient "
                f"({len(own)} in all). Call requires_grad_() on it, or select another part."
            )
            raise NoTrainableParametersError(msg)
        return trainable
    if isinstance(params, Mapping):
        return _refuse_frozen(_by_identity(owned, dict(params), closed=closed))
    if not isinstance(params, (str, Tensor, Iterable)):
        msg = (
            f"params should be None, a module, parameters, or name patterns such as 'layer3.*', "
            f"got {type(params).__name__}."
        )
        raise ParameterSelectionError(msg)
    items = [params] if isinstance(params, (str, Tensor)) else list(params)
    if not items:
        msg = "params selects nothing: it is empty. Pass None for all trainable parameters."
        raise ParameterSelectionError(msg)
    chosen = {}
    tensors: dict[str, Tensor] = {}
    for index, item in enumerate(items):
        if isinstance(item, str):
            chosen |= _by_pattern(owned, item)
        elif isinstance(item, Tensor):
            tensors[f"parameter_{index}"] = item
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            tensors[str(item[0])] = item[1]  # named_parameters() gives such pairs
        else:
            msg = (
                f"params should hold parameters or name patterns such as 'layer3.*', got "
                f"{type(item).__name__}."
            )
            raise ParameterSelectionError(msg)
    return chosen | _refuse_frozen(_by_identity(owned, tensors, closed=closed))


def _by_identity(
    owned: dict[str, Tensor], wanted: dict[str, Tensor], *, closed: bool
) -> dict[str, Tensor]:
    names: dict[int, str] = {}
    for name, parameter in owned.items():
        names.setdefault(id(parameter), name)
    foreign = [f"{given} {tuple(p.shape)}" for given, p in wanted.items() if id(p) not in names]
    if foreign and closed:
        msg = (
            f"Not a parameter of this model: {join_names(foreign)}. Was the model copied or "
            f"rebuilt after the selection was made?"
        )
        raise ParameterSelectionError(msg)
    return {names.get(id(p), given): p for given, p in wanted.items()}


def _by_pattern(owned: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    exact = pattern in owned
    matched = (
        {pattern: owned[pattern]}
        if exact
        else {name: p for name, p in owned.items() if fnmatch.fnmatchcase(name, pattern)}
    )
    if not matched:
        near = difflib.get_close_matches(pattern, owned, n=4, cutoff=0.3) or list(owned)[:4]
        hint = ""
        if not _WILDCARDS & set(pattern) and any(n.startswith(f"{pattern}.") for n in owned):
            hint = f" To select the whole module write '{pattern}.*'."
        msg = f"No parameter is named {pattern!r}. Near: {join_names(near) or 'none'}.{hint}"
        raise ParameterSelectionError(msg)
    trainable = {name: p for name, p in matched.items() if p.requires_grad}
    # A wildcard means "what can be trained there"; a full name means just that parameter.
    return trainable or _refuse_frozen(matched)


def _refuse_frozen(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    frozen = [name for name, p in chosen.items() if not p.requires_grad]
    if frozen:
        msg = (
            f"Selected, but frozen (requires_grad is False): {join_names(frozen)}. Call "
            f"requires_grad_() on them, or leave them out."
        )
        raise ParameterSelectionError(msg)
    return chosen


def _validate(selected: dict[str, Tensor], *, sharded: bool) -> None:
    for name, parameter in selected.items():
        fault = _fault(parameter, sharded=sharded)
        if fault:
            msg = f"Parameter {name!r} {fault}. Leave it out with params=."
            raise UnsupportedParameterError(msg)
    devices = {str(p.device) for p in selected.values()}
    if len(devices) > 1:
        msg = (
            f"The parameters live on several devices: {', '.join(sorted(devices))}. Move the model "
            f"to one, or select the parameters of one device with params=."
        )
        raise MixedDevicesError(msg)


def warn_of_mixed_dtypes(layout: FlatLayout, stacklevel: int) -> None:
    """Say once that a flat vector over several dtypes is as good as the coarsest."""
    dtypes = sorted({str(dtype) for dtype in layout.dtypes})
    if len(dtypes) > 1:
        msg = (
            f"The parameters have several dtypes ({', '.join(dtypes)}). Vectors are {layout.dtype} "
            f"and are cast per parameter, so products are as good as the coarsest of them. For "
            f"one precision call model.to(dtype)."
        )
        warnings.warn(msg, MixedDtypeWarning, stacklevel=stacklevel)


def _fault(parameter: Tensor, *, sharded: bool) -> str | None:
    """Say what makes a parameter unusable, or ``None``."""
    if isinstance(parameter, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "is not initialised yet (lazy module): run the model once on a batch"
    if hasattr(parameter, "placements") and not sharded:
        return "is sharded over devices (DTensor), and products would need collectives"
    if parameter.layout != torch.strided:
        return f"is sparse ({parameter.layout})"
    if parameter.device.type == "meta":
        return "is on the meta device and has no data"
    if not parameter.dtype.is_floating_point:
        kind = "complex" if parameter.dtype.is_complex else "not floating-point"
        return f"is {kind} ({parameter.dtype}), and the Hessian here is a real matrix"
    return None
