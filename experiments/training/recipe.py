"""What a training does: steps, rates and precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from experiments.errors import ExperimentError

Loss = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, torch.Generator], Tensor]
Precision = Literal["float32", "bfloat16", "float16"]


class TrainingError(ExperimentError, ValueError):
    """A recipe, data or a checkpoint that no training can be made of."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stochastic gradient descent with a piecewise constant learning rate.

    Parameters
    ----------
    num_steps : int
        Optimizer steps.
    batch_size : int
        Samples in a step, of all ranks together. Each epoch visits the samples in a new order,
        and leaves out the few at its end that do not fill a batch.
    lr, momentum, nesterov, weight_decay
        As ``torch.optim.SGD`` takes them.
    milestones : sequence of float
        Shares of ``num_steps`` at which the learning rate is multiplied by ``factor``.
    factor : float
        That factor.
    divergence : float
        A loss above this ends the training as diverged, as one that is not finite always does.
    precision : {"float32", "bfloat16", "float16"}
        Of the forward pass and the loss: one of the two short ones runs them under
        ``torch.autocast``, while parameters and the optimizer keep the model's dtype. With
        ``"float16"`` the loss is scaled, and a step whose gradients overflow is left out.
        ``"float32"`` changes nothing: the model runs in the dtype that it has.
    """

    num_steps: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    divergence: float = math.inf
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Reject what could not be meant."""
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.num_steps < 0 or self.batch_size < 1:
            msg = (
                "a recipe needs num_steps >= 0 and batch_size >= 1, got "
                f"{self.num_steps} and {self.batch_size}"
            )
            raise TrainingError(msg)
        if not (math.isfinite(self.lr) and self.lr >= 0):
            msg = f"lr must be a finite number >= 0, got {self.lr}"
            raise TrainingError(msg)
        check_precision(self.precision)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        passed = sum(step >= share * self.num_steps for share in self.milestones)
        return self.lr * self.factor**passed


def check_precision(precision: str) -> None:
    """Reject a precision that there is not."""
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        msg = f"precision must be one of {known}, got {precision!r}"
        raise TrainingError(msg)


def casting(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a forward pass and its loss have this precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def deterministic_kernels() -> contextlib.AbstractContextManager[Any]:
    """The context in which a GPU computes the same numbers each time, in full precision."""
    # What is left out here is switched off.
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def checked_groups(
    model: nn.Module, groups: Iterable[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Groups of a model's parameters for its optimizer; all in one for None."""
    if groups is None:
        return [{"params": list(model.parameters())}]
    found = [{**group, "params": list(group["params"])} for group in groups]
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in own for group in found for parameter in group["params"]):
        msg = "parameters must be those of the model: another model's would be changed by no step"
        raise TrainingError(msg)
    for group in found:
        factor = group.get("lr_factor", 1.0)
        if "lr" in group or not 0 <= factor < math.inf:
            msg = (
                "the recipe sets the learning rate: a group multiplies it by a finite lr_factor "
                f">= 0, got {sorted(set(group) - {'params'})} and {factor}"
            )
            raise TrainingError(msg)
    return found
