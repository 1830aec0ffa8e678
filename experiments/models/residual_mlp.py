r"""Residual networks of fully connected pre-activation blocks.

A block is :math:`x \mapsto x + \tau F(x)`, where ``F`` is (BatchNorm, ReLU, Linear) twice:
the fully connected form of the pre-activation block of He et al., arXiv:1603.05027.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError
from experiments.models.initialise import initialise_, initialise_like_torch_
from experiments.models.sizes import check_sizes


def check_branch_scale(scale: float | nn.Parameter) -> float | nn.Parameter:
    """Reject a factor on the branches that is no finite number and no scalar parameter."""
    if isinstance(scale, nn.Parameter):
        if scale.numel() != 1:
            msg = f"branch_scale must be a number or a parameter of one element, got {scale.shape}."
            raise InvalidArgumentError(msg)
    elif not math.isfinite(scale):
        msg = f"branch_scale must be finite, got {scale}."
        raise InvalidArgumentError(msg)
    return scale


class ResidualBranch(nn.Module):
    """A block ``x + branch_scale * branch(x)``, or without skip ``branch_scale * branch(x)``.

    Parameters
    ----------
    branch : nn.Module
        What the skip leads around.
    skip : bool
        Whether the input is added.
    branch_scale : float or nn.Parameter
        The factor. A parameter of one element may be shared by many blocks, and is then trained.
    projection : nn.Module, optional
        What the input goes through on the skip, where shapes change; the identity by default.
    """

    def __init__(
        self,
        branch: nn.Module,
        *,
        skip: bool = True,
        branch_scale: float | nn.Parameter = 1.0,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.projection = projection if skip else None
        self.skip = skip
        self.branch_scale = check_branch_scale(branch_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Add branch and skip."""
        y: Tensor = self.branch(x)
        # A factor of 1 is left out: it would cost a kernel for each block.
        if isinstance(self.branch_scale, nn.Parameter) or self.branch_scale != 1.0:
            y = self.branch_scale * y
        if not self.skip:
            return y
        return y + (x if self.projection is None else self.projection(x))


class ResidualMLP(nn.Module):
    """A linear stem, ``num_blocks`` residual blocks of one width, and BN, ReLU, Linear.

    Weights in blocks are He normal, without biases; stem and classifier are initialised as
    ``nn.Linear`` does it.

    Parameters
    ----------
    in_features : int
        Elements of an input; images are flattened.
    width : int
        Width of every block.
    num_blocks : int
        ``L``.
    num_classes : int
        Outputs.
    bn : bool
        Whether BatchNorm stands before each ReLU.
    skip : bool
        Whether blocks have a skip.
    branch_scale : float or nn.Parameter
        The factor on every branch.
    generator : torch.Generator, optional
        Source of randomness, on the CPU; the global one by default.
    dtype, device
        Of the parameters.

    Raises
    ------
    InvalidArgumentError
        If a size is not a positive integer or ``branch_scale`` is not finite.

    Examples
    --------
    >>> net = ResidualMLP(64, 32, num_blocks=8, num_classes=10)
    >>> net(torch.ones(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        num_blocks: int,
        num_classes: int,
        *,
        bn: bool = True,
        skip: bool = True,
        branch_scale: float | nn.Parameter = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "in_features": in_features,
            "width": width,
            "num_blocks": num_blocks,
            "num_classes": num_classes,
        }
        check_sizes(sizes)
        self.num_blocks, self.bn, self.skip = num_blocks, bn, skip

        def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
            # On "meta" the default initialisation draws nothing.
            layer = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=dtype)
            return layer.to_empty(device="cpu")

        def activation() -> list[nn.Module]:
            return [*([nn.BatchNorm1d(width, dtype=dtype)] if bn else []), nn.ReLU()]

        self.stem = linear(in_features, width, bias=True)
        initialise_like_torch_(self.stem, generator)
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            layers = [linear(width, width) for _ in range(2)]
            for layer in layers:
                initialise_(layer.weight, "he", generator)
            branch = nn.Sequential(*activation(), layers[0], *activation(), layers[1])
            self.blocks.append(ResidualBranch(branch, skip=skip, branch_scale=branch_scale))
        classifier = linear(width, num_classes, bias=True)
        initialise_like_torch_(classifier, generator)
        self.head = nn.Sequential(*activation(), classifier)
        if device is not None:
            self.to(device)

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, the one next to the input first."""
        return [f"blocks.{index}" for index in range(self.num_blocks)]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(m, ...)`` to ``(m, num_classes)``."""
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits
