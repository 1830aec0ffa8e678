"""One projection of the three layers of ProcResNet-166: our way, by SVD, and as published.

The layers are the stem, 3×3 from 3 to 64 channels, and the 1×1 transitions 64 → 128 and 128 → 256.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from conditioning import Procrustes

OURS = "one matrix for each layer"
SVD = "the same by torch.linalg.svd"
SVD_ALL = "torch.linalg.svd at all frequencies"
PAPER = "as published: all frequencies, Newton-Schulz"

# Channels in and out, kernel, stride, side of the output: the grid of the published route.
LAYERS = ((3, 64, 3, 1, 32), (64, 128, 1, 2, 16), (128, 256, 1, 2, 8))
NEWTON_SCHULZ_STEPS = 10


def three_layers(device: str) -> dict[str, Callable[[], None]]:
    """Functions that project the layers, each its own copies."""
    return {
        OURS: _ours(device),
        SVD: _each(device, lambda weight, _: _single(weight)),
        SVD_ALL: _each(device, _svd_everywhere),
        PAPER: _each(device, published),
    }


def _layers(device: str) -> list[nn.Conv2d]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(c_in, c_out, k, stride=s, padding=k // 2, bias=False, device=device)
        for c_in, c_out, k, s, _ in LAYERS
    ]


def _ours(device: str) -> Callable[[], None]:
    regulariser = Procrustes({str(i): layer for i, layer in enumerate(_layers(device))})

    def route() -> None:
        _leave(layer.module.weight for layer in regulariser.layers)
        regulariser.project()

    return route


def _each(device: str, projected: Callable[[Tensor, int], Tensor]) -> Callable[[], None]:
    layers = _layers(device)

    @torch.no_grad()
    def route() -> None:
        _leave(layer.weight for layer in layers)
        for layer, (c_in, c_out, _, _, side) in zip(layers, LAYERS, strict=True):
            layer.weight.copy_(math.sqrt(c_out / c_in) * projected(layer.weight, side))

    return route


@torch.no_grad()
def _leave(weights: object) -> None:
    """A step of training: what is projected has left the set."""
    for weight in weights:  # type: ignore[attr-defined]
        weight += 0.01 * weight.std() * torch.randn_like(weight)


def _single(weight: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return (left @ right).reshape(weight.shape) / math.sqrt(weight[0, 0].numel())


def _svd_everywhere(weight: Tensor, side: int) -> Tensor:
    symbol = torch.fft.fft2(weight, s=(side, side)).permute(2, 3, 0, 1)
    left, _, right = torch.linalg.svd(symbol, full_matrices=False)
    return _cropped(left @ right, weight)


def published(weight: Tensor, side: int) -> Tensor:
    """The route of arXiv:1805.07477's public code, on the side of the input channels.

    Every frequency of the output's grid, complex matrices as real ones of twice the size, ten
    coupled Newton-Schulz steps for the inverse root of the Gram matrix.
    """
    symbol = torch.fft.fft2(weight, s=(side, side)).permute(2, 3, 0, 1)
    upper = torch.cat([symbol.real, symbol.imag], -1)
    embedded = torch.cat([upper, torch.cat([-symbol.imag, symbol.real], -1)], -2)
    gram = embedded.mT @ embedded
    size = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(1.0)
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    y, z = gram / size, one
    for _ in range(NEWTON_SCHULZ_STEPS):
        step = 0.5 * (3.0 * one - z @ y)
        y, z = y @ step, step @ z
    flat = embedded @ (z / size.sqrt())
    rows, columns = symbol.shape[-2:]
    return _cropped(torch.complex(flat[..., :rows, :columns], flat[..., :rows, columns:]), weight)


def _cropped(flat: Tensor, weight: Tensor) -> Tensor:
    height, width = weight.shape[2:]
    spread = torch.fft.ifft2(flat.permute(2, 3, 0, 1))
    return spread.real[..., :height, :width]


def operations(published_route: bool) -> int:
    """Multiplications and additions of one projection of all layers, to leading order.

    An eigendecomposition of an ``n x n`` matrix with its vectors counts ``9 n^3`` (G. H. Golub,
    C. F. Van Loan, *Matrix Computations*, 4th edition, section 8.3), a product ``2 l m n``.
    """
    total = 0
    for c_in, c_out, kernel, _, side in LAYERS:
        rows, columns, copies = c_out, c_in * kernel**2, 1
        if published_route:
            rows, columns, copies = 2 * c_out, 2 * c_in, side**2
        gram = multiply = 2 * rows * columns**2
        # Three products in each Newton-Schulz step; one and the eigenvectors for the root.
        root = 6 * NEWTON_SCHULZ_STEPS * columns**3 if published_route else 11 * columns**3
        total += copies * (gram + root + multiply)
    return total
