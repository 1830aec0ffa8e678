"""The forms in which data comes: one batch, or a re-iterable of batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from conditioning.errors import (
    BatchFormatError,
    EmptyDataError,
    InvalidArgumentError,
    OneShotDataError,
)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists, mappings and dataclasses.

    A container whose tensors all come back as they are is returned as it is.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        if all(mapped[key] is tree[key] for key in mapped):
            return tree
        if type(tree) is dict:
            return mapped
        # Mapping types of other libraries (model outputs, encodings) take keywords or a dict.
        try:
            return type(tree)(**mapped)
        except TypeError:
            return type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, (tuple, list)):
        items = [map_tensors(function, value) for value in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if field.init]
        changed = {name: map_tensors(function, getattr(tree, name)) for name in names}
        if all(changed[name] is getattr(tree, name) for name in names):
            return tree
        return dataclasses.replace(tree, **changed)
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two batches hold equal tensors in the same order."""
    if one is other:
        return True
    left, right = tensors_in(one), tensors_in(other)
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def to_device(tree: Any, device: torch.device) -> Any:
    """Move the tensors of a batch; dtypes stay, and what is there already is not copied."""

    def move(tensor: Tensor) -> Tensor:
        # Autograd cannot save a tensor that was made under inference_mode.
        tensor = tensor.clone() if tensor.is_inference() else tensor
        return tensor.to(device, non_blocking=True)

    own = getattr(tree, "to", None)
    if callable(own) and not isinstance(tree, (Tensor, nn.Module)):
        return own(device)  # PackedSequence, graph batches, encodings
    return map_tensors(move, tree)


def call_with(function: Callable[..., Any], inputs: Any) -> Any:
    """Call ``function(*inputs)``, ``function(**inputs)`` or ``function(inputs)`` by type.

    Lists count as tuples, because a ``DataLoader`` turns one into the other; named
    tuples (a ``PackedSequence``) are one argument.
    """
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return function(*inputs)
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(inputs)


class Batches:
    """Data as batches that can be gone through again and again.

    Parameters
    ----------
    data : object
        One batch or a re-iterable of batches.
    paired : bool
        Whether a batch has to be ``(inputs, targets)``.
    batch_size_fn : callable, optional
        ``batch -> number`` that weights the batches of a mean.

    Raises
    ------
    OneShotDataError
        If the data is an iterator or generator.
    EmptyDataError
        If it holds nothing.
    BatchFormatError
        If it is neither a batch nor a re-iterable.

    Attributes
    ----------
    single : bool
        Whether there is one batch only.
    """

    def __init__(
        self, data: Any, *, paired: bool, batch_size_fn: Callable[[Any], float] | None = None
    ) -> None:
        self._paired = paired
        self._batch_size_fn = batch_size_fn
        _refuse_one_shot(data)
        self.single = _is_pair(data) if paired else _is_loose_batch(data)
        self._data: Iterable[Any] = [data] if self.single else data
        if paired and not self.single:
            _refuse_lone_inputs(data)
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            msg = (
                f"{type(data).__name__} yields single samples without a batch axis. Wrap it: "
                f"torch.utils.data.DataLoader(dataset, batch_size=...)."
            )
            raise BatchFormatError(msg)
        if not self.single and _is_empty(data):
            _raise_empty()
        if isinstance(data, list) and len(data) == 1:
            self.single = True

    def __iter__(self) -> Iterator[Any]:
        """Go through the batches once, checking their form."""
        count = 0
        for batch in self._data:
            if self._paired and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
                msg = (
                    f"Batch {count} is a {type(batch).__name__}{length}, expected (inputs, "
                    f"targets). With other batches pass loss_fn=None and a callable "
                    f"batch -> loss as the model."
                )
                raise BatchFormatError(msg)
            if self._paired and any(isinstance(part, np.ndarray) for part in batch):
                msg = (
                    f"Batch {count} holds NumPy arrays, expected tensors: torch.from_numpy(array) "
                    f"makes one of each."
                )
                raise BatchFormatError(msg)
            count += 1
            yield batch
        if count == 0:
            _raise_empty()

    def size(self, batch: Any) -> float:
        """How much a batch counts in a mean.

        Raises
        ------
        BatchFormatError
            If it cannot be told, and matters.
        EmptyDataError
            If the batch holds no sample.
        """
        if self._batch_size_fn is not None:
            size = float(self._batch_size_fn(batch))
            if not 0 < size < float("inf"):
                msg = f"batch_size_fn should return a positive number, got {size}."
                raise InvalidArgumentError(msg)
            return size
        tensors = [t for t in self._sized(batch) if t.ndim >= 1]
        if tensors:
            if len(tensors[0]) == 0:
                msg = (
                    f"A batch holds no sample (shape {tuple(tensors[0].shape)}). Leave it out "
                    f"of the data."
                )
                raise EmptyDataError(msg)
            return float(len(tensors[0]))
        if self.single:
            return 1.0
        msg = (
            "The size of a batch cannot be told: neither targets nor inputs are a tensor with a "
            "batch axis. Pass batch_size_fn=, or reduction='sum'."
        )
        raise BatchFormatError(msg)

    def size_or(self, batch: Any, default: float) -> float:
        """Return the size where it can be told, for estimates of memory only."""
        try:
            return self.size(batch)
        except BatchFormatError:
            return default

    def _sized(self, batch: Any) -> list[Tensor]:
        """Tensors that may tell a batch's size, the most telling first."""
        if not self._paired:
            return tensors_in(batch)
        inputs, targets = batch
        return [*([targets] if isinstance(targets, Tensor) else []), *tensors_in(inputs)]

    def generators(self) -> list[torch.Generator]:
        """Random generators of their own that going through the data advances."""
        sampler = getattr(self._data, "sampler", None)
        inner = getattr(getattr(self._data, "batch_sampler", None), "sampler", None)
        found = [getattr(thing, "generator", None) for thing in (self._data, sampler, inner)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _is_pair(data: Any) -> bool:
    """Whether data is one ``(inputs, targets)``, rather than a list of such batches."""
    if isinstance(data, tuple):
        return len(data) == 2
    return isinstance(data, list) and len(data) == 2 and all(isinstance(d, Tensor) for d in data)


def _is_loose_batch(data: Any) -> bool:
    """Whether data is one batch of the free form, rather than an iterable of batches."""
    if isinstance(data, (Tensor, Mapping, tuple)):
        return True
    return not (hasattr(data, "__iter__") or isinstance(data, Dataset))


def _refuse_one_shot(data: Any) -> None:
    if isinstance(data, Iterator) or (
        hasattr(data, "__iter__") and hasattr(data, "__next__") and iter(data) is data
    ):
        msg = (
            f"The data is a one-shot {type(data).__name__}: the second product would find it "
            f"empty. Pass list(data), or the DataLoader itself."
        )
        raise OneShotDataError(msg)


def _refuse_lone_inputs(data: Any) -> None:
    if isinstance(data, (Tensor, Mapping, tuple, str)) or not (
        hasattr(data, "__iter__") or isinstance(data, Dataset)
    ):
        length = f" of length {len(data)}" if isinstance(data, tuple) else ""
        msg = (
            f"The data is a {type(data).__name__}{length}, expected one batch (inputs, targets) or "
            f"a re-iterable of such batches (DataLoader, list). Inputs without targets: (inputs, "
            f"None). Several inputs: ((a, b), targets) or ({{'name': a}}, targets)."
        )
        raise BatchFormatError(msg)


def _is_empty(data: Any) -> bool:
    try:
        return len(data) == 0
    except TypeError:  # a DataLoader over an IterableDataset has a length that cannot be asked for
        return False


def _raise_empty() -> None:
    msg = "The data holds no batch. A DataLoader with drop_last may have dropped its only one."
    raise EmptyDataError(msg)
