r"""The basic-block ResNets of CIFAR with a factor tau on every branch, with and without BatchNorm.

From Zhang et al., *Stabilize Deep ResNet with A Sharp Scaling Factor tau*, arXiv:1903.07120, and
its authors' public code: He et al.'s nets of 6n + 2 layers with 16, 32, 64 channels, ReLU after
the addition, and shortcuts without weights where the shape changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError, ShapeError
from experiments.models.initialise import initialise_like_torch_
from experiments.models.residual_mlp import check_branch_scale
from experiments.models.sizes import check_sizes

LRule = Literal["all", "stage"]


def counted_blocks(n: int, num_stages: int = 3, rule: LRule = "all") -> int:
    """The depth ``L`` that tau is made from.

    Parameters
    ----------
    n : int
        Blocks in each stage.
    num_stages : int
    rule : {"all", "stage"}
        All residual blocks, as the authors do for CIFAR, or those of the largest stage, as they
        do for ImageNet.

    Raises
    ------
    InvalidArgumentError
        If a number is not a positive integer, or there is no such rule.

    Examples
    --------
    >>> counted_blocks(18)
    54
    """
    check_sizes({"n": n, "num_stages": num_stages})
    if rule not in get_args(LRule):
        msg = f"rule must be one of {', '.join(get_args(LRule))}, got {rule!r}."
        raise InvalidArgumentError(msg)
    return n * num_stages if rule == "all" else n


class _Shift(nn.Module):
    """A scalar added to every entry, zero at first."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class _Shortcut(nn.Module):
    """Every second pixel, BatchNorm if there is any, and new channels that are zero."""

    def __init__(self, channels: int, new: int, bn: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, dtype=dtype) if bn else nn.Identity()
        self.new = new

    def forward(self, x: Tensor) -> Tensor:
        kept = self.norm(x[:, :, ::2, ::2])
        return nn.functional.pad(kept, (0, 0, 0, 0, 0, self.new))


class ScaledBlock(nn.Module):
    """``relu(shortcut(x) + tau * branch(x))``.

    Parameters
    ----------
    branch, shortcut : nn.Module
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor, tau: Tensor | float) -> Tensor:
        """Add branch and shortcut."""
        return torch.relu(self.shortcut(x) + tau * self.branch(x))


class ScaledResNet(nn.Module):
    r"""A ResNet-(6n+2) whose branches are multiplied by tau before the addition.

    Parameters
    ----------
    n : int
        Blocks in each stage: 3 is ResNet-20, 18 ResNet-110, 200 ResNet-1202.
    tau : float
        The factor on the branches, 1 for He et al.'s net. See :func:`counted_blocks` and
        :func:`conditioning.theory.scaling_factor`.
    in_channels, num_classes : int
        Of images and labels.
    widths : sequence of int
        Channels, one number for each stage; each at least that before it.
    bn : bool
        Whether there is BatchNorm. Without it every block has four scalar biases in its place,
        one before and one after each convolution.
    learnable : bool
        Whether tau is trained: one scalar for all blocks. Its gradient is divided by the number of
        blocks, so it is the mean over them.
    generator : torch.Generator, optional
        Source of randomness, on the CPU; the global one by default.
    dtype, device
        Of the parameters.

    Raises
    ------
    InvalidArgumentError
        If a size is not a positive integer, widths fall, or ``tau`` is not finite.

    Notes
    -----
    Convolutions have no bias and are drawn from N(0, 2/(k² c_out)), as the authors draw them.
    BatchNorm starts with weight 1 and bias 0. The factor stands behind the second BatchNorm:
    before it, it would do nothing.

    Examples
    --------
    >>> net = ScaledResNet(18, tau=54**-0.5)
    >>> net.name, sum(p.numel() for p in net.parameters())
    ('ResNet-110', 1727498)
    """

    def __init__(
        self,
        n: int,
        tau: float = 1.0,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        bn: bool = True,
        learnable: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"n": n, "in_channels": in_channels, "num_classes": num_classes}
        sizes |= {f"widths[{i}]": width for i, width in enumerate(widths)}
        check_sizes(sizes)
        if not widths or list(widths) != sorted(widths):
            msg = f"widths must name the channels of each stage and not fall, got {list(widths)}."
            raise InvalidArgumentError(msg)
        check_branch_scale(tau)
        self.n, self.num_stages, self.bn = n, len(widths), bn
        scalar = torch.tensor(float(tau), dtype=dtype)
        self.tau: nn.Parameter | float = nn.Parameter(scalar) if learnable else float(tau)

        def convolution(channels: int, outside: int, stride: int = 1) -> nn.Conv2d:
            with torch.device("meta"):
                conv = nn.Conv2d(channels, outside, 3, stride, 1, bias=False, dtype=dtype)
            conv.to_empty(device="cpu")
            drawn = torch.randn(conv.weight.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                conv.weight.copy_(drawn * math.sqrt(2 / (9 * outside)))
            return conv

        def norm(channels: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(channels, dtype=dtype)] if bn else []

        def shift() -> list[nn.Module]:
            return [] if bn else [_Shift(dtype)]

        channels = widths[0]
        first = convolution(in_channels, channels)
        self.stem = nn.Sequential(first, *norm(channels), nn.ReLU())
        self.stages = nn.ModuleList()
        for stage, width in enumerate(widths):
            blocks = nn.ModuleList()
            for index in range(n):
                stride = 2 if stage and not index else 1
                branch = nn.Sequential(
                    *shift(), convolution(channels, width, stride), *norm(width), *shift(),
                    nn.ReLU(), *shift(), convolution(width, width), *norm(width), *shift(),
                )  # fmt: skip
                change = stride > 1
                skip = _Shortcut(channels, width - channels, bn, dtype) if change else nn.Identity()
                blocks.append(ScaledBlock(branch, skip))
                channels = width
            self.stages.append(blocks)
        self.head = nn.Linear(channels, num_classes, dtype=dtype)
        initialise_like_torch_(self.head, generator)
        self.to(device=device)

    @property
    def depth(self) -> int:
        """Number of layers with weights as He et al. count them: ``6n + 2``."""
        return 2 * self.num_stages * self.n + 2

    @property
    def name(self) -> str:
        """What the papers call it, such as ``ResNet-110``."""
        return f"ResNet-{self.depth}"

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, in the order of the forward pass."""
        return [f"stages.{s}.{i}" for s in range(self.num_stages) for i in range(self.n)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters as :class:`experiments.training.Trainer` takes them.

        Scalars, that is tau and the biases that stand in for BatchNorm, learn at a tenth of the
        learning rate.
        """
        scalars = [module.bias for module in self.modules() if isinstance(module, _Shift)]
        scalars += [self.tau] if isinstance(self.tau, nn.Parameter) else []
        names = {id(one) for one in scalars}
        others = [one for one in self.parameters() if id(one) not in names]
        groups: list[dict[str, Any]] = [{"params": others}]
        return groups + ([{"params": scalars, "lr_factor": 0.1}] if scalars else [])

    def _factor(self) -> Tensor | float:
        if not isinstance(self.tau, nn.Parameter):
            return self.tau
        # The value is tau, the gradient its share: a hook would be lost in a copy of the model.
        fixed = self.tau.detach()
        return fixed + (self.tau - fixed) / (self.n * self.num_stages)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(m, in_channels, height, width)`` to logits ``(m, num_classes)``."""
        smallest = 2 ** (self.num_stages - 1)
        if x.ndim != 4 or min(x.shape[2:]) < smallest:
            msg = (
                f"{self.name} takes images (m, channels, height, width) of at least "
                f"{smallest}×{smallest}, got {tuple(x.shape)}."
            )
            raise ShapeError(msg)
        tau = self._factor()
        x = self.stem(x)
        for blocks in self.stages:
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, tau)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
