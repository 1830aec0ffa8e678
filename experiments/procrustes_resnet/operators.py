"""Single layers: their singular values after each way to make them equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conditioning import Procrustes, SingularValues, singular_values, theory
from experiments.models.initialise import initialise_
from experiments.store import seed_from

Cell = Mapping[str, Any]

# Side of the input of each layer, and the layer: those of the paper at small channel numbers, the
# isometric transition, and the overlapping kernel with stride that other networks have.
LAYERS: Mapping[str, tuple[int, Callable[[], nn.Conv2d]]] = {
    "1×1, stride 2": (8, lambda: nn.Conv2d(16, 32, 1, stride=2, bias=False)),
    "2×2, stride 2": (8, lambda: nn.Conv2d(16, 32, 2, stride=2, bias=False)),
    "3×3, stride 2": (8, lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)),
    "3×3 stem": (12, lambda: nn.Conv2d(3, 64, 3, padding=1, bias=False)),
}
# The two transitions of the paper, at full size.
FULL = {"1×1, 64 → 128": (64, 128), "1×1, 128 → 256": (128, 256)}
METHODS = ("none", "reshape", "paper ×1", "paper ×10", "ours ×1", "ours ×10", "ours ×100")
# Where one matrix says everything, repetition changes nothing.
ONCE = ("none", "paper ×1", "ours ×1")
# Singular values that are kept for the figure.
_KEPT = 129


def methods_of(layer: str) -> tuple[str, ...]:
    """What is tried on a layer."""
    return METHODS if "3×3" in layer else ONCE


def measure(cell: Cell) -> dict[str, Any]:
    """One layer, one method, one draw."""
    side, make = LAYERS[cell["layer"]]
    layer = make().double()
    generator = torch.Generator().manual_seed(_seed(cell))
    initialise_(layer.weight, "he", generator)
    regularise_(layer, cell["method"], side)
    shape = (layer.in_channels, side, side)
    circular = singular_values(layer, shape, "circular")
    true = singular_values(layer, shape, "true", method="dense")
    energy = float(layer.weight.detach().square().sum()) / layer.out_channels
    expected = theory.expected_backward_gain(
        layer.weight.detach(),
        side,
        stride=layer.stride,
        padding=1 if layer.kernel_size[0] == 3 else 0,
    )
    return {
        "target": math.sqrt(layer.out_channels / layer.in_channels),
        "circular": _summary(circular),
        "true": _summary(true),
        # The formula that the gain of the circular operator is compared with.
        "energy": energy,
        "expected_gain": float(expected),
        "outputs": side // layer.stride[0],
    }


def _summary(found: SingularValues) -> dict[str, Any]:
    """Extreme values, those in between, and the gain from the values alone."""
    assert found.values is not None
    values = found.values.numpy()
    places = np.unique(np.linspace(0, len(values) - 1, _KEPT).round().astype(int))
    rank = found.rank if found.rank is not None else len(values)
    return {
        "largest": found.largest.to_dict(),
        "smallest": found.smallest.to_dict(),
        "least_nonzero": float(values[rank - 1]),
        "rank": rank,
        "rows": found.shape[0],
        "values": values[places],
        "gain": float(np.sqrt((values**2).sum() / found.shape[0])),
        "status": found.status,
    }


def full_size(cell: Cell) -> dict[str, Any]:
    """A transition of the paper, projected at every frequency and as one matrix."""
    c_in, c_out = FULL[cell["layer"]]
    layer = nn.Conv2d(c_in, c_out, 1, stride=2, bias=False)
    initialise_(layer.weight, "lecun", torch.Generator().manual_seed(_seed(cell)))
    other = nn.Conv2d(c_in, c_out, 1, stride=2, bias=False)
    other.load_state_dict(layer.state_dict())
    Procrustes(layer).project()
    paper_(other, 8, 1)
    values = torch.linalg.svdvals(layer.weight.detach().flatten(1).double())
    gap = torch.linalg.vector_norm(layer.weight.detach() - other.weight.detach())
    return {
        "largest": float(values.max()),
        "smallest": float(values.min()),
        "gap": float(gap / torch.linalg.vector_norm(layer.weight.detach())),
    }


def regularise_(layer: nn.Conv2d, method: str, side: int) -> None:
    """Apply one of the methods to a layer."""
    name, _, times = method.partition(" ×")
    if name == "ours":
        Procrustes(layer).project(sweeps=int(times))
    elif name == "paper":
        paper_(layer, side // layer.stride[0], int(times))
    elif name == "reshape":
        reshape_(layer)


def reshape_(layer: nn.Conv2d) -> None:
    """Make the singular values of the matrix ``(c_out, c_in k k)`` equal, as Lipschitz nets do."""
    matrix = layer.weight.detach().flatten(1)
    factor = _polar(matrix)
    # The squared Frobenius norm c_out keeps the norm of a random gradient.
    scaled = factor * math.sqrt(layer.out_channels / min(matrix.shape))
    with torch.no_grad():
        layer.weight.copy_(scaled.reshape(layer.weight.shape))


def paper_(layer: nn.Conv2d, side: int, times: int) -> None:
    """Project as the paper does: at each frequency of the output's grid, without the stride.

    From arXiv:1805.07477 and its authors' public code: the matrices of all frequencies of a
    stride-1 convolution are replaced by their polar factors, times the root of ``c_out / c_in``;
    of the inverse transform the real part is kept, cut to the support of the kernel.
    """
    kernel = tuple(layer.kernel_size)
    target = math.sqrt(layer.out_channels / layer.in_channels)
    weight = layer.weight.detach().double()
    for _ in range(times):
        symbol = torch.fft.fft2(weight, s=(side, side)).permute(2, 3, 0, 1)
        flat = target * _polar(symbol)
        weight = torch.fft.ifft2(flat.permute(2, 3, 0, 1)).real[..., : kernel[0], : kernel[1]]
    with torch.no_grad():
        layer.weight.copy_(weight)


def _polar(matrices: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    factor: Tensor = left @ right
    return factor


def _seed(cell: Cell) -> int:
    # All methods begin with one and the same kernel.
    return seed_from(["operator", cell["layer"], cell["seed"]])
