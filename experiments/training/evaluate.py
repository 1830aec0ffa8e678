"""Loss and error of a model in evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.training.recipe import Loss, Precision, casting, check_precision


def evaluate(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = nn.functional.cross_entropy,
    batch_size: int = 512,
    precision: Precision = "float32",
) -> tuple[float, float]:
    """Mean loss and share of right answers, in evaluation mode, which is left as it was.

    ``loss`` is a mean over the samples of a batch; ``precision`` is what a :class:`Recipe` has.
    """
    check_precision(precision)
    total, right = sums(
        model, inputs, targets, loss=loss, batch_size=batch_size, precision=precision
    ).tolist()
    return total / len(inputs), right / len(inputs)


@torch.no_grad()
def sums(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss,
    batch_size: int = 512,
    precision: Precision = "float32",
) -> Tensor:
    """Sum of the losses and number of right answers, of shape (2,) in float64 on the device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # Of each module: a part that was frozen in evaluation mode stays there.
    modes = [(module, module.training) for module in model.modules()]
    found = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    try:
        for first in range(0, len(inputs), batch_size):
            x = inputs[first : first + batch_size].to(device)
            y = targets[first : first + batch_size].to(device)
            with casting(precision, device):
                outputs = model(x)
                value = loss(outputs, y)
            # Nothing is read here, so that a GPU is not kept waiting.
            found[0] += value.double() * len(x)
            found[1] += (outputs.argmax(1) == y).sum()
    finally:
        for module, mode in modes:
            module.training = mode
    return found
