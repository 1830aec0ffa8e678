"""Data by name: arrays and tensors in files, loaders that code makes, or random inputs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from conditioning.cli.losses import mse
from conditioning.cli.objects import call, find_object
from conditioning.errors import DataFileError, FactoryError
from conditioning.operators.batches import map_tensors, tensors_in, to_device
from conditioning.operators.modules import join_names

BATCH_SIZE, NUM_BATCHES = 64, 4
_INPUTS = ("x", "X", "images", "data", "inputs")
_TARGETS = ("y", "labels", "targets", "target")
_RANDOM = (
    "random inputs: norms are those of the architecture, the spectrum is not that of your task"
)


@dataclass(frozen=True)
class Amount:
    """How much of the data is looked at, and which of it."""

    batch_size: int | None
    num_batches: int | None
    seed: int

    @property
    def samples(self) -> int:
        """At most so many."""
        return (self.batch_size or BATCH_SIZE) * self.batches

    @property
    def batches(self) -> int:
        """At most so many."""
        return self.num_batches or NUM_BATCHES


@dataclass(frozen=True)
class Given:
    """Batches, and what a reader of the checkup should know about them."""

    batches: list[Any]
    notes: tuple[str, ...] = ()


def fitted(given: Given, model: nn.Module) -> Given:
    """The batches on the model's device; real numbers in its dtype.

    Integer inputs too, if the model runs on them as real numbers only.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return given

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor

    batches = [to_device(map_tensors(cast, batch), parameter.device) for batch in given.batches]
    first = batches[0][0] if isinstance(batches[0], (tuple, list)) else None
    if (
        not isinstance(first, Tensor)
        or first.is_floating_point()
        or first.is_complex()
        or any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in model.modules())
        or _runs(model, first)
        or not _runs(model, first.to(parameter.dtype))
    ):
        return Given(batches, given.notes)
    batches = [(batch[0].to(parameter.dtype), *batch[1:]) for batch in batches]
    name = str(parameter.dtype).removeprefix("torch.")
    return Given(batches, (*given.notes, f"integer inputs were made {name}"))


def _runs(model: nn.Module, inputs: Tensor) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).eval()(inputs[:2])
    except Exception:  # models fail in all ways; what matters is said when it is examined
        return False
    return True


def find_data(name: str, amount: Amount) -> Given:
    """The data that a name stands for.

    Parameters
    ----------
    name : str
        ``FILE.npz`` with inputs as ``x``, ``X``, ``images``, ``data`` or ``inputs`` and targets
        as ``y``, ``labels``, ``targets`` or ``target`` (or both with ``_train`` behind them);
        ``FILE.pt`` with a tuple of two tensors, a list of batches, or a dict with these names;
        ``PACKAGE.MODULE:NAME`` or ``FILE.py:NAME``: a loader, a data set, a batch, or a function
        without arguments that returns one.
    amount : Amount

    Raises
    ------
    DataFileError
        If a file cannot be read or does not hold this.
    ObjectNotFoundError, FactoryError
        If there is nothing of that name, or it is no data.
    """
    suffix = Path(name).suffix.lower()
    if suffix in (".npz", ".pt", ".pth") and not Path(name).is_file():
        msg = f"There is no data file {name!r}."
        raise DataFileError(msg)
    if suffix == ".npz":
        return _from_pair(*_read_npz(Path(name)), amount)
    if suffix in (".pt", ".pth"):
        return from_object(_read_pt(Path(name)), name, amount)
    if ":" not in name:
        msg = (
            f"{name!r} is no data: expected FILE.npz, FILE.pt, PACKAGE.MODULE:NAME or FILE.py:NAME."
        )
        raise DataFileError(msg)
    found = find_object(name)
    if not _is_data(found) and callable(found):
        found = call(found, name, "a DataLoader or a batch (inputs, targets)")
    return from_object(found, name, amount)


def _is_data(value: Any) -> bool:
    return isinstance(value, (DataLoader, Dataset, tuple, list))


def from_object(value: Any, name: str, amount: Amount) -> Given:
    """The first batches of a loader or list, or batches of a pair of tensors or of a data set.

    Raises
    ------
    FactoryError
        If it is none of these, or holds nothing.
    DataFileError
        If the two tensors of a pair do not go together.
    """
    pair = _pair(value)
    if pair is not None:
        return _from_pair(*pair, amount)
    if isinstance(value, Dataset) and not isinstance(value, IterableDataset):
        drawn = torch.Generator().manual_seed(amount.seed)
        size = amount.batch_size or BATCH_SIZE
        loader: Any = DataLoader(value, size, shuffle=True, generator=drawn)
        return Given(_first(loader, amount.batches, name))
    if isinstance(value, Mapping):  # a batch of a model that returns its loss
        return Given([value])
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__iter__"):
        msg = (
            f"{name} gives a {type(value).__name__}; expected a DataLoader, a data set, a list of "
            f"batches, or one batch (inputs, targets)."
        )
        raise FactoryError(msg)
    if amount.batch_size is not None:
        msg = f"{name} makes batches of its own: leave --batch-size out."
        raise FactoryError(msg)
    return Given(_first(value, amount.batches, name))


def _pair(value: Any) -> tuple[Tensor, Tensor] | None:
    """Inputs and targets as two tensors, where a batch is made of just these."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return None
    inputs, targets = (torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in value)
    both = isinstance(inputs, Tensor) and isinstance(targets, Tensor)
    return (inputs, targets) if both else None


def _first(batches: Any, number: int, name: str) -> list[Any]:
    # A batch of inputs that are no plain tensor, such as a dict, next to its targets.
    if isinstance(batches, tuple) and len(batches) == 2 and not isinstance(batches[0], tuple):
        return [batches]
    found = list(itertools.islice(iter(batches), number))
    if not found:
        msg = f"{name} holds no batch."
        raise FactoryError(msg)
    return found


def _from_pair(inputs: Tensor, targets: Tensor, amount: Amount) -> Given:
    if not inputs.ndim or not targets.ndim or len(inputs) != len(targets) or not len(inputs):
        msg = (
            f"Inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)} "
            f"do not go together: both need one row for each sample."
        )
        raise DataFileError(msg)
    notes = []
    if not targets.is_floating_point():
        targets = targets.long()
    if inputs.dtype == torch.uint8:
        inputs = inputs.float() / 255
        notes.append("inputs of 8 bits were divided by 255")
    elif not inputs.is_floating_point() and not inputs.is_complex():
        inputs = inputs.long()
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        notes.append("the inputs contain NaN or infinities")
    total = len(inputs)
    if total > amount.samples:
        # Files may be sorted by class.
        generator = torch.Generator().manual_seed(amount.seed)
        kept = torch.randperm(total, generator=generator)[: amount.samples]
        inputs, targets = inputs[kept], targets[kept]
        notes.append(f"{amount.samples} of {total} samples, drawn at random")
    size = amount.batch_size or BATCH_SIZE
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    if len(batches) > 1 and len(batches[-1][0]) < size:
        # Norms over batches of unlike size are no sample of one quantity.
        notes.append(f"the last {len(batches[-1][0])} samples, no full batch, were left out")
        batches = batches[:-1]
    return Given(list(batches), tuple(notes))


def _read_npz(path: Path) -> tuple[Tensor, Tensor]:
    try:
        # Opened here, because numpy does not close a file that turns out to be no archive. Never
        # allow pickles: a data file must not be able to run code.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        msg = f"{str(path)!r} cannot be read as .npz without pickled objects: {reason}."
        raise DataFileError(msg) from error
    inputs, targets = (_array(arrays, names, path) for names in (_INPUTS, _TARGETS))
    return inputs, targets


def _array(arrays: Mapping[str, Any], names: tuple[str, ...], path: Path) -> Tensor:
    for end in ("", "_train"):
        for name in names:
            if f"{name}{end}" in arrays:
                found = arrays[f"{name}{end}"]
                if found.dtype.kind not in "uifb" or found.dtype.itemsize > 8:
                    msg = (
                        f"{name}{end} of {str(path)!r} holds {found.dtype}, expected numbers of "
                        f"at most 64 bits."
                    )
                    raise DataFileError(msg)
                # Files from other machines may have their bytes in another order.
                native = found.dtype.newbyteorder("=")
                return torch.from_numpy(np.array(found, dtype=native, order="C"))
    what = "inputs" if names is _INPUTS else "targets"
    msg = (
        f"{str(path)!r} holds {join_names(list(arrays)) or 'nothing'}, but no {what}: expected "
        f"{' or '.join(names)}, or one of these with _train behind it."
    )
    raise DataFileError(msg)


def _read_pt(path: Path) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything at all on what it did not write
        msg = (
            f"{str(path)!r} cannot be read without running code from it, or is no file of "
            f"torch.save. Save plain tensors: torch.save((inputs, targets), FILE)."
        )
        raise DataFileError(msg) from error
    if isinstance(content, Mapping):
        inputs, targets = (
            next((content[key] for key in (*names, *(f"{n}_train" for n in names))
                  if isinstance(content.get(key), Tensor)), None)
            for names in (_INPUTS, _TARGETS)
        )  # fmt: skip
        content = (inputs, targets)
    batches = content if isinstance(content, list) and _pair(content) is None else [content]
    if not batches or any(_pair(batch) is None for batch in batches):
        msg = (
            f"{str(path)!r} holds no inputs and targets: expected a tuple of two tensors, a list "
            f"of these, or a dict of tensors with the keys {' or '.join(_INPUTS)} and "
            f"{' or '.join(_TARGETS)}."
        )
        raise DataFileError(msg)
    return content


def random_inputs(
    shape: tuple[int, ...], classes: int | None, amount: Amount, model: nn.Module, loss_fn: Any
) -> Given:
    """Normal inputs with random targets: labels, or, for a squared error, normal numbers.

    Raises
    ------
    DataFileError
        If labels are wanted and ``classes`` is not known.
    FactoryError
        If the model cannot be run on such inputs.
    """
    generator = torch.Generator().manual_seed(amount.seed)
    with _room(amount, shape):
        inputs = torch.randn(amount.samples, *shape, generator=generator)
    if classes is not None and loss_fn is not mse:
        targets = torch.randint(classes, (amount.samples,), generator=generator)
    elif loss_fn is mse:
        size = _output_shape(model, inputs[:2])
        targets = torch.randn(amount.samples, *size, generator=generator)
    else:
        msg = "Random inputs need random targets too: pass --classes N, or --loss mse."
        raise DataFileError(msg)
    return Given(_from_pair(inputs, targets, amount).batches, (_RANDOM,))


def random_tokens(sizes: tuple[int, ...], classes: int | None, amount: Amount) -> Given:
    """Uniform tokens of a vocabulary, in sequences of a length.

    Targets are the next tokens, or with ``classes`` one label for each sequence.
    """
    generator = torch.Generator().manual_seed(amount.seed)
    vocabulary, length = sizes
    with _room(amount, (length,)):
        text = torch.randint(vocabulary, (amount.samples, length + 1), generator=generator)
    targets = text[:, 1:].contiguous()
    if classes is not None:
        targets = torch.randint(classes, (amount.samples,), generator=generator)
    given = _from_pair(text[:, :-1].contiguous(), targets, amount)
    return Given(given.batches, (_RANDOM.replace("inputs", "tokens", 1),))


@contextlib.contextmanager
def _room(amount: Amount, shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # of torch's allocator
        size = "x".join(map(str, (amount.samples, *shape)))
        msg = f"There is no memory for inputs of {size}: lower --batch-size or --batches."
        raise DataFileError(msg) from error


def _output_shape(model: nn.Module, inputs: Tensor) -> tuple[int, ...]:
    """Shape of the outputs for one sample."""
    runner = copy.deepcopy(model).eval()
    (inputs,) = fitted(Given([inputs]), runner).batches
    try:
        with torch.no_grad():
            outputs = tensors_in(runner(inputs))
    except Exception as error:
        msg = (
            f"The model cannot be run on inputs of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {error}."
        )
        raise FactoryError(msg) from error
    if not outputs or not outputs[0].ndim or math.prod(outputs[0].shape) == 0:
        msg = "The model returns no tensor with a row for each sample."
        raise FactoryError(msg)
    return tuple(outputs[0].shape[1:])
