"""Loss functions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from conditioning.cli.objects import call, find_object
from conditioning.errors import FactoryError
from conditioning.operators.batches import tensors_in

NAMES = ("cross_entropy", "mse", "none")


def find_loss(name: str) -> Callable[..., Tensor] | None:
    """The loss function that a name stands for.

    Parameters
    ----------
    name : {"cross_entropy", "mse", "none"} or str
        ``none``: the model returns its loss. Otherwise ``PACKAGE.MODULE:NAME`` or
        ``FILE.py:NAME``: a function of outputs and targets, a loss module, or the class of one.

    Raises
    ------
    ObjectNotFoundError, FactoryError
        If there is none of that name, or it cannot be called.
    """
    if name == "none":
        return None
    if name == "cross_entropy":
        return cross_entropy
    if name == "mse":
        return mse
    found = find_object(name)
    if isinstance(found, type) and issubclass(found, nn.Module):
        found = call(found, name, "a loss function")
    if not callable(found):
        msg = f"{name} is a {type(found).__name__}; expected a function of outputs and targets."
        raise FactoryError(msg)
    return found  # type: ignore[no-any-return]


def loss_for(batches: Any) -> Callable[..., Tensor]:
    """Cross-entropy where the targets of the first batch are integers, else the squared error."""
    targets = next(iter(batches))[1]
    tensors = tensors_in(targets)
    return mse if tensors and tensors[0].is_floating_point() else cross_entropy


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy; the classes may be the second axis, or the last one as in text models."""
    logits = _logits(outputs)
    if not targets.is_floating_point() and targets.ndim == logits.ndim:
        # A class axis of length one, as a column of a table has it.
        axis = -1 if targets.shape[:-1] == logits.shape[:-1] else 1
        targets = targets.squeeze(axis)
    if targets.is_floating_point() and targets.shape != logits.shape and _is_whole(targets):
        targets = targets.long()
    usual = (logits.shape[0], *logits.shape[2:]) == tuple(targets.shape)
    if not usual and logits.shape[:-1] == targets.shape:
        logits, targets = logits.flatten(0, -2), targets.flatten()
    return nn.functional.cross_entropy(logits, targets)


def mse(outputs: Any, targets: Tensor) -> Tensor:
    """Mean squared error; an output of one column fits targets without one."""
    values = _logits(outputs)
    if values.shape == (*targets.shape, 1):
        targets = targets.unsqueeze(-1)
    if values.shape != targets.shape:
        msg = (
            f"The model returns the shape {tuple(values.shape)}, the targets have "
            f"{tuple(targets.shape)}: a squared error needs equal ones."
        )
        if targets.ndim < values.ndim and _is_whole(targets):
            msg += " If they are labels, pass --loss cross_entropy."
        raise FactoryError(msg)
    return nn.functional.mse_loss(values, targets)


def _is_whole(targets: Tensor) -> bool:
    return bool((targets == targets.round()).all())


def _logits(outputs: Any) -> Tensor:
    """The tensor that is meant, also in the outputs of Hugging Face models."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        msg = (
            f"The model returns a {type(outputs).__name__}, of which no part is called logits: "
            f"pass --loss PACKAGE.MODULE:NAME, a function of these outputs and the targets."
        )
        raise FactoryError(msg)
    return outputs
