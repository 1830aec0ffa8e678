"""What counts as a loss: one real number with a graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from conditioning.errors import LossWithoutGraphError, NonScalarLossError


def scalar_loss(loss: Any) -> Tensor:
    """Return the loss as a 0-d tensor, if it is one real number with a graph."""
    if not isinstance(loss, Tensor):
        hint = (
            " Leave out .item() and float()."
            if isinstance(loss, (int, float))
            else " Pass a callable that returns its loss, such as lambda batch: model(**batch).loss"
            if hasattr(loss, "loss")
            else ""
        )
        msg = f"The loss should be a tensor with one element, got {type(loss).__name__}.{hint}"
        raise NonScalarLossError(msg)
    if loss.numel() != 1:
        msg = (
            f"The loss should be one number, got shape {tuple(loss.shape)}. Reduce it (loss.mean() "
            f"or loss.sum(); reduction='mean' in torch's losses)."
        )
        raise NonScalarLossError(msg)
    if loss.dtype.is_complex:
        msg = (
            f"The loss is complex ({loss.dtype}), the Hessian here is that of a real number. "
            f"Return its real part or absolute value."
        )
        raise NonScalarLossError(msg)
    if not loss.requires_grad:
        msg = (
            "The loss has no autograd graph. Look for .detach(), .item(), .data, torch.no_grad(), "
            "an integer or comparison on the way from the parameters to the loss, or parameters "
            "whose requires_grad is off."
        )
        raise LossWithoutGraphError(msg)
    return loss.reshape(())
