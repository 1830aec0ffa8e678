r"""The network of the theory of the scaling factor tau: ReLU after the addition, no biases.

From Zhang et al., *Stabilize Deep ResNet with A Sharp Scaling Factor tau*, arXiv:1903.07120, and
Allen-Zhu, Li, Song, arXiv:1811.03962.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError
from experiments.models.residual_mlp import check_branch_scale
from experiments.models.sizes import check_sizes


class TauStack(nn.Module):
    r"""``B relu(W_L h)`` on top of ``num_blocks`` blocks ``relu(h + tau W_l h)``.

    The first state is ``relu(A x)``. ``A`` and ``W_L`` are drawn from N(0, 2/m), the matrices of
    blocks from N(0, variance/m) and ``B`` from N(0, 1/out_features), with ``m`` the width.

    Parameters
    ----------
    in_features, width, num_blocks, out_features : int
        Sizes; ``num_blocks`` counts the residual blocks, ``L - 1`` in the paper.
    tau : float
        The factor on every branch.
    variance : float
        Of a block's matrix, times the width.
    generator : torch.Generator, optional
        Source of randomness, on the CPU; the global one by default.
    dtype, device
        Of the parameters.

    Attributes
    ----------
    stem, last, head : nn.Parameter
        ``A`` and ``B``, which the theory does not train and which are frozen, and ``W_L``.
    blocks : nn.Parameter of shape (num_blocks, m, m)
        All matrices of blocks.

    Raises
    ------
    InvalidArgumentError
        If a size is not a positive integer, or a number is not finite.

    Examples
    --------
    >>> net = TauStack(16, 32, num_blocks=8, out_features=10, tau=8**-0.5)
    >>> net(torch.ones(5, 16)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        num_blocks: int,
        out_features: int,
        tau: float,
        *,
        variance: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "in_features": in_features, "width": width, "num_blocks": num_blocks,
            "out_features": out_features,
        }  # fmt: skip
        check_sizes(sizes)
        check_branch_scale(tau)
        if not (math.isfinite(variance) and variance >= 0):
            msg = f"variance must be finite and not negative, got {variance}."
            raise InvalidArgumentError(msg)
        self.tau = float(tau)

        def normal(variance: float, *shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (drawn * math.sqrt(variance)).to(device=device, dtype=dtype)

        self.stem = nn.Parameter(normal(2 / width, width, in_features), requires_grad=False)
        self.blocks = nn.Parameter(normal(variance / width, num_blocks, width, width))
        self.last = nn.Parameter(normal(2 / width, width, width))
        self.head = nn.Parameter(normal(1 / out_features, out_features, width), requires_grad=False)

    def states(self, x: Tensor) -> list[Tensor]:
        """States ``h_0 ... h_{L-1}`` of samples ``(n, in_features)``, each ``(n, width)``."""
        found = [torch.relu(x @ self.stem.T)]
        for weight in self.blocks:
            found.append(torch.relu(found[-1] + self.tau * (found[-1] @ weight.T)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in_features)`` to ``(n, out_features)``."""
        return torch.relu(self.states(x)[-1] @ self.last.T) @ self.head.T
