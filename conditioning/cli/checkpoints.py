"""Weights from a file, without running code from it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.errors import CheckpointError
from conditioning.operators.modules import join_names

_INSIDE = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")  # data-parallel models, compiled ones
_ADVICE = "Save the weights alone: torch.save(model.state_dict(), FILE)"


def load_checkpoint(model: nn.Module, path: str | Path) -> list[str]:
    """Load the weights of a model from a file.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    path : str or Path
        What ``torch.save`` or safetensors wrote: a state dict, alone or below the key
        ``state_dict``, ``model_state_dict`` or ``model``. What data-parallel, compiling and
        Lightning wrappers put in front of names is taken away.

    Returns
    -------
    list of str
        What a reader should know: entries that are not the model's, another dtype.

    Raises
    ------
    CheckpointError
        If the file cannot be read without running code from it, holds no state dict, or one of
        other names or shapes than the model's; the text lists them.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"There is no checkpoint {str(path)!r}."
        raise CheckpointError(msg)
    known = model.state_dict()
    found = _state_dict(_read(path), path)
    weights, rest = _renamed(found, known, path)
    _compare(weights, known, path)
    model.load_state_dict(weights)
    notes = [f"of the checkpoint not used: {join_names(rest)}"] if rest else []
    kinds = {
        (_dtype(weights[key]), _dtype(known[key]))
        for key in known
        if weights[key].dtype != known[key].dtype
    }
    return notes + [f"weights of {old} in the checkpoint, as {new}" for old, new in sorted(kinds)]


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            msg = f"{str(path)!r} was not written by torch.save. {_ADVICE}."
            raise CheckpointError(msg) from error
        msg = (
            f"{str(path)!r} holds Python objects ({_culprit(error)}) besides tensors, and reading "
            f"them would run code from the file. {_ADVICE}."
        )
        raise CheckpointError(msg) from error
    except Exception as error:  # torch raises anything at all on what it did not write
        msg = f"{str(path)!r} cannot be read: {_first_line(error)}. {_ADVICE}."
        raise CheckpointError(msg) from error


def _culprit(error: Exception) -> str:
    """What torch refused to unpickle, by the name in its message."""
    words = [word.strip("`.,'\"") for word in str(error).split() if "GLOBAL" not in word]
    named = [word for word in words if word.count(".") and word.replace(".", "").isidentifier()]
    ours = [word for word in named if not word.startswith(("torch.load", "torch.serialization"))]
    return ours[0] if ours else "of unknown classes"


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0].rstrip(".")
    # Some errors hold a byte or a key, and no sentence.
    return line if " " in line else f"{type(error).__name__} {line}".strip()


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        msg = f"Reading {str(path)!r} needs safetensors: pip install safetensors."
        raise CheckpointError(msg) from error
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{str(path)!r} cannot be read as safetensors: {_first_line(error)}."
        raise CheckpointError(msg) from error


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )


def _state_dict(content: Any, path: Path) -> Mapping[str, Any]:
    if _is_state_dict(content):
        return content  # type: ignore[no-any-return]
    if isinstance(content, Mapping):
        for key in _INSIDE:
            if _is_state_dict(content.get(key)):
                return content[key]  # type: ignore[no-any-return]
        keys = join_names([str(key) for key in content]) or "nothing"
        held = f"a dict of {keys}"
    else:
        held = f"a {type(content).__name__}"
    msg = (
        f"{str(path)!r} holds {held}, but no state dict, neither alone nor below "
        f"{', '.join(_INSIDE)}. {_ADVICE}."
    )
    raise CheckpointError(msg)


def _renamed(
    weights: Mapping[str, Any], known: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], list[str]]:
    """The weights under the model's names, without what wrappers have added, and what is left."""
    found = dict(weights)
    for _ in _WRAPPERS:  # a compiled model in a data-parallel one, or the other way round
        for start in _WRAPPERS:
            if all(key.startswith(start) for key in found) and not set(found) & set(known):
                found = {key.removeprefix(start): value for key, value in found.items()}
    if not any("_orig_mod." in key for key in known):
        found = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
    if not known or set(known) <= set(found):
        return found, []
    # A LightningModule keeps the model as one of its attributes, next to losses and metrics.
    one = next(iter(known))
    starts = [key.removesuffix(one) for key in found if key.endswith(f".{one}")]
    complete = [start for start in starts if all(f"{start}{key}" in found for key in known)]
    if len(complete) > 1:
        msg = (
            f"{str(path)!r} holds the weights of such a model more than once, below "
            f"{join_names([start.rstrip('.') for start in complete])}. {_ADVICE}."
        )
        raise CheckpointError(msg)
    if not complete:
        return found, []
    (start,) = complete
    used = {f"{start}{key}" for key in known}
    return {key: found[f"{start}{key}"] for key in known}, [k for k in found if k not in used]


def _compare(weights: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> None:
    missing = [key for key in known if key not in weights]
    unexpected = [key for key in weights if key not in known]
    reshaped = [
        f"{key} ({_shape(weights[key])}, the model's is {_shape(known[key])})"
        for key in known
        if key in weights and _shape(weights[key]) != _shape(known[key])
    ]
    faults = [
        f"{what}: {join_names(names)}"
        for what, names in (
            ("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped),
        )
        if names
    ]  # fmt: skip
    if faults:
        msg = f"{str(path)!r} does not fit the model; {'; '.join(faults)}."
        raise CheckpointError(msg)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "scalar" if isinstance(value, Tensor) else "no tensor"
