"""Initial weights, drawn in float64 from a generator: the same on every device and dtype."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError

Init = Literal["he", "lecun", "torch", "flat", "zero"]


def fan_in(weight: Tensor) -> int:
    """Number of inputs of one output: ``c_in``, times the kernel's positions for a convolution."""
    return weight[0].numel()


def initialise_(
    weight: Tensor, init: str, generator: torch.Generator | None = None, *, scale: float = 1.0
) -> None:
    r"""Fill the weight of a linear or convolutional layer.

    Parameters
    ----------
    weight : Tensor of shape (c_out, ...)
        Changed in place.
    init : {"he", "lecun", "torch", "flat", "zero"}
        ``he`` and ``lecun`` are normal with variance 2 and 1 over the fan-in; ``torch`` is what
        its layers do by default, uniform with variance 1/3 over the fan-in; ``flat`` is a random
        matrix of shape ``(c_out, fan-in)`` whose non-zero singular values all are
        :math:`\sqrt{c_{out} / \min(c_{out}, \mathrm{fan\,in})}`: it has the squared Frobenius
        norm ``c_out``, which preserves the norm of a random gradient in expectation.
    generator : torch.Generator, optional
        On the CPU; the global one by default.
    scale : float
        A factor on the result.

    Raises
    ------
    InvalidArgumentError
        If there is no such ``init``.
    """
    if init not in get_args(Init):
        msg = f"init must be one of {', '.join(get_args(Init))}, got {init!r}."
        raise InvalidArgumentError(msg)
    fan = fan_in(weight)
    drawn = torch.zeros(weight.shape, dtype=torch.float64)
    if init in ("he", "lecun"):
        gain = 2.0 if init == "he" else 1.0
        drawn.normal_(std=math.sqrt(gain / fan), generator=generator)
    elif init == "torch":
        bound = 1 / math.sqrt(fan)
        drawn.uniform_(-bound, bound, generator=generator)
    elif init == "flat":
        outputs = len(weight)
        gain = math.sqrt(outputs / min(outputs, fan))
        nn.init.orthogonal_(drawn, gain, generator=generator)
    with torch.no_grad():
        weight.copy_(drawn * scale)


def initialise_like_torch_(layer: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Fill weight and bias of a linear layer as its constructor does: uniform on ±1/√fan-in."""
    initialise_(layer.weight, "torch", generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(fan_in(layer.weight))
        drawn = torch.empty(layer.bias.shape, dtype=torch.float64)
        with torch.no_grad():
            layer.bias.copy_(drawn.uniform_(-bound, bound, generator=generator))
