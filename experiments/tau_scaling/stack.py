"""Nets with matrices: norms of all samples, and the spectral norm of the product of all blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from conditioning import singular_range
from conditioning.operators import FunctionOperator
from conditioning.spectrum import SingularRange

# So many blocks are multiplied before a run.
_MERGED = 10


class Stack:
    r"""Blocks with common matrices at several factors tau, and what they make of some samples.

    Parameters
    ----------
    taus : sequence of float
        R factors.
    blocks : Tensor of shape (L, m, m)
        Entries from N(0, 1/m): ``TauStack(...).blocks``.
    inputs : Tensor of shape (S, m)
        States :math:`h_0`, one for each sample.

    Attributes
    ----------
    log_norms : Tensor of shape (L + 1, R, S)
        Natural logarithms of :math:`|h_l|/|h_0|`.
    open : Tensor of shape (L, R, S, m)
        Whether a coordinate passed the ReLU.
    """

    def __init__(self, taus: Sequence[float], blocks: Tensor, inputs: Tensor) -> None:
        self.blocks = blocks
        self.tau = torch.tensor(taus, dtype=blocks.dtype, device=blocks.device)[:, None, None]
        h = inputs / torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        h = h.expand(len(taus), *inputs.shape)
        log_norm = torch.zeros_like(h[..., :1])
        logs, masks = [log_norm], []
        for weight in blocks:
            h = torch.relu(h + self.tau * (h @ weight.T))
            masks.append(h > 0)
            norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
            h, log_norm = h / norm, log_norm + norm.log()
            logs.append(log_norm)
        self.log_norms = torch.stack(logs)[..., 0]
        self.open = torch.stack(masks)

    def backward(self, gradients: Tensor) -> Tensor:
        """Natural logarithms of ``|g_0|/|g_L|`` for gradients of shape (S, m); (R, S)."""
        g = gradients / torch.linalg.vector_norm(gradients, dim=-1, keepdim=True)
        g = g.expand(len(self.tau), *gradients.shape)
        log_norm = torch.zeros_like(g[..., :1])
        for weight, mask in zip(reversed(self.blocks), reversed(self.open), strict=True):
            d = g * mask
            g = d + self.tau * (d @ weight)
            norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
            g, log_norm = g / norm, log_norm + norm.log()
        return log_norm[..., 0]

    def product(self, rule: int, sample: int) -> FunctionOperator:
        """The product of the blocks' Jacobians at a sample, as an operator of shape (m, m).

        Raises
        ------
        OverflowError
            If its norm leaves the range in which products are reliable.
        """
        if self.log_norms[-1, rule, sample] > math.log(1e150):
            msg = f"tau = {float(self.tau[rule]):.3g}: the product's norm is beyond 1e150"
            raise OverflowError(msg)
        tau, masks = float(self.tau[rule]), self.open[:, rule, sample].to(self.blocks.dtype)
        eye = torch.eye(self.blocks.shape[-1], dtype=masks.dtype, device=masks.device)
        # D (I + tau W), several blocks in one matrix: a run of Lanczos takes dozens of products.
        steps = [
            functools.reduce(lambda below, above: above @ below, some)
            for some in (
                mask[:, :, None] * torch.add(eye, weight, alpha=tau)
                for mask, weight in zip(
                    masks.split(_MERGED), self.blocks.split(_MERGED), strict=True
                )
            )
        ]

        def apply(steps: Sequence[Tensor], v: Tensor) -> Tensor:
            for step in steps:
                v = step @ v
            return v

        transposed = [step.T for step in reversed(steps)]
        width = self.blocks.shape[-1]
        return FunctionOperator(
            functools.partial(apply, steps), (width, width), self.blocks.dtype,
            self.blocks.device, symmetric=False, rmatvec=functools.partial(apply, transposed),
        )  # fmt: skip

    def spectral_norm(self, rule: int, sample: int, seed: int, rtol: float = 1e-2) -> SingularRange:
        """Enclose the product's spectral norm by Lanczos bidiagonalisation, matrix-free."""
        return singular_range(
            self.product(rule, sample), rtol, seed=seed, which="largest", method="lanczos"
        )
