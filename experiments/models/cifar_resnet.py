r"""The pre-activation bottleneck ResNets of CIFAR, and Procrustes ResNets.

From Zaeemzadeh, Rahnavard, Shah, *Norm-Preservation: Why Residual Networks Can Become Extremely
Deep?*, arXiv:1805.07477, and its authors' public code: three stages of ``n`` blocks,
16, 32, 64 channels inside the blocks and four times as many outside.

ResNet-(9n+2)
    A 3×3 stem to 16 channels with BN and ReLU. The first block of every stage has a projection on
    its skip (BN, ReLU, 1×1 convolution), with stride 2 in stages 2 and 3.
ProcResNet-(9n+4)
    A bare 3×3 stem to 64 channels, identity skips only, and between the stages one bare
    convolution of stride 2 that doubles the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError, ShapeError
from experiments.models.initialise import Init, initialise_, initialise_like_torch_
from experiments.models.residual_mlp import ResidualBranch, check_branch_scale
from experiments.models.sizes import check_sizes

Variant = Literal["resnet", "proc"]
StrideOn = Literal["3x3", "1x1"]
EXPANSION = 4


class CifarResNet(nn.Module):
    r"""A ResNet-(9n+2) or ProcResNet-(9n+4).

    Children in order: ``stem``, ``stage1``, (``down1``,) ``stage2``, (``down2``,) ``stage3``,
    ``head``; those in brackets only in a ProcResNet.

    Parameters
    ----------
    n : int
        Blocks in each stage: 18 is ResNet-164 or ProcResNet-166.
    variant : {"resnet", "proc"}
        Which of the two.
    in_channels, num_classes : int
        Of images and labels.
    widths : sequence of int
        Channels inside the blocks, one number for each stage; any number of stages.
    bn : bool
        Whether there is BatchNorm; no layer has a bias in its place.
    skip : bool
        Whether blocks have a skip. Without, there are no projections either.
    branch_scale : float or nn.Parameter
        The factor on every branch. A parameter is shared by all blocks, and trained with the rest.
    init : {"he", "torch", ...}
        Of the convolutions in blocks, projections included, and of a ResNet's stem, see
        :func:`experiments.models.initialise.initialise_`. The authors use ``"he"`` in the first
        of their two implementations and ``"torch"`` in the second.
    shortcut_scale : float
        A factor on the initial projections. The authors' first implementation has 0.01.
    transition_init : {"lecun", "flat", "torch", ...}
        Of the stem and the transitions of a ProcResNet. ``"flat"`` is the spectrum that its
        regularisation aims at: all non-zero singular values equal.
    transition_kernel : {1, 2}
        Size of the transitions' kernels. 1 is the paper's. With 2 and ``"flat"`` the backward
        pass of a transition is an isometry, because its windows do not overlap.
    stride_on : {"3x3", "1x1"}
        Which convolution of a ResNet's block has the stride; the authors have both.
    generator : torch.Generator, optional
        Source of randomness, on the CPU; the global one by default.
    dtype, device
        Of the parameters.

    Raises
    ------
    InvalidArgumentError
        If a size or an option is not among those above.

    Examples
    --------
    >>> net = CifarResNet(18, "proc")
    >>> net.name, sum(p.numel() for p in net.parameters())
    ('ProcResNet-166', 1715018)
    >>> net.transition_names
    ['down1', 'down2']
    """

    def __init__(
        self,
        n: int,
        variant: Variant = "resnet",
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        bn: bool = True,
        skip: bool = True,
        branch_scale: float | nn.Parameter = 1.0,
        init: Init = "he",
        shortcut_scale: float = 1.0,
        transition_init: Init = "lecun",
        transition_kernel: int = 1,
        stride_on: StrideOn = "3x3",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"n": n, "in_channels": in_channels, "num_classes": num_classes}
        sizes |= {f"widths[{i}]": width for i, width in enumerate(widths)}
        check_sizes(sizes)
        if not widths:
            msg = "widths must name the channels of at least one stage, got none."
            raise InvalidArgumentError(msg)
        for name, value, known in (
            ("variant", variant, get_args(Variant)),
            ("stride_on", stride_on, get_args(StrideOn)),
            ("transition_kernel", transition_kernel, (1, 2)),
        ):
            if value not in known:
                msg = f"{name} must be one of {', '.join(map(str, known))}, got {value!r}."
                raise InvalidArgumentError(msg)
        self.n, self.variant, self.num_stages = n, variant, len(widths)
        self.bn, self.skip = bn, skip
        proc = variant == "proc"
        # "meta" keeps the constructors from drawing numbers that are thrown away.
        with torch.device("meta"):
            channels = EXPANSION * widths[0] if proc else widths[0]
            stem: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
            self.stem = nn.Sequential(*stem, *([] if proc else _activation(channels, bn)))
            for stage, width in enumerate(widths, start=1):
                outside = EXPANSION * width
                if proc and stage > 1:
                    kernel = transition_kernel
                    down = nn.Conv2d(channels, outside, kernel, stride=2, bias=False)
                    self.add_module(f"down{stage - 1}", down)
                    channels = outside
                blocks = []
                for index in range(n):
                    stride = 2 if stage > 1 and index == 0 and not proc else 1
                    projection = None
                    if channels != outside or stride > 1:
                        projection = nn.Sequential(
                            *_activation(channels, bn),
                            nn.Conv2d(channels, outside, 1, stride=stride, bias=False),
                        )
                    strides = (stride, 1) if stride_on == "1x1" else (1, stride)
                    blocks.append(
                        ResidualBranch(
                            _bottleneck(channels, width, strides, bn),
                            skip=skip,
                            projection=projection,
                        )
                    )
                    channels = outside
                self.add_module(f"stage{stage}", nn.Sequential(*blocks))
            self.head = nn.Sequential(
                *_activation(channels, bn),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(channels, num_classes),
            )
        # The dtype first: weights are drawn in float64.
        self.to_empty(device="cpu").to(dtype=dtype)
        self._initialise(init, transition_init, shortcut_scale, generator)
        for module in self.modules():
            if isinstance(module, ResidualBranch):
                # Not before, because to_empty() would also empty a parameter of the caller.
                module.branch_scale = check_branch_scale(branch_scale)
        self.to(device=device)

    def _initialise(
        self,
        init: Init,
        transition_init: Init,
        shortcut_scale: float,
        generator: torch.Generator | None,
    ) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                initialise_like_torch_(module, generator)
            elif isinstance(module, nn.Conv2d):
                bare = self.variant == "proc" and name.startswith(("stem", "down"))
                initialise_(
                    module.weight,
                    transition_init if bare else init,
                    generator,
                    scale=shortcut_scale if ".projection." in name else 1.0,
                )

    @property
    def depth(self) -> int:
        """Number of layers as the paper counts them: ``9n + 2``, or ``9n + 4``."""
        extra = self.num_stages - 1 if self.variant == "proc" else 0
        return 3 * self.num_stages * self.n + 2 + extra

    @property
    def name(self) -> str:
        """What the paper calls it, such as ``ProcResNet-166``."""
        return f"{'ProcResNet' if self.variant == 'proc' else 'ResNet'}-{self.depth}"

    @property
    def block_names(self) -> list[str]:
        """Names of blocks and bare transitions, in the order of the forward pass."""
        names = []
        for stage in range(1, self.num_stages + 1):
            if self.variant == "proc" and stage > 1:
                names.append(f"down{stage - 1}")
            names += [f"stage{stage}.{index}" for index in range(self.n)]
        return names

    @property
    def transition_names(self) -> list[str]:
        """Names of those that are no identity skips, because they change the shape."""
        if self.variant == "proc":
            return [name for name in self.block_names if name.startswith("down")]
        return [f"stage{stage}.0" for stage in range(1, self.num_stages + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(m, in_channels, height, width)`` to logits ``(m, num_classes)``."""
        smallest = 2 ** (self.num_stages - 1)
        if x.ndim != 4 or min(x.shape[2:]) < smallest:
            msg = (
                f"{self.name} takes images (m, channels, height, width) of at least "
                f"{smallest}×{smallest}, got {tuple(x.shape)}."
            )
            raise ShapeError(msg)
        for child in self.children():
            x = child(x)
        return x


def _activation(channels: int, bn: bool) -> list[nn.Module]:
    return [*([nn.BatchNorm2d(channels)] if bn else []), nn.ReLU()]


def _bottleneck(channels: int, width: int, strides: tuple[int, int], bn: bool) -> nn.Sequential:
    """1×1 down to ``width`` channels, 3×3, 1×1 up again, each after BN and ReLU."""
    first, second = strides
    return nn.Sequential(
        *_activation(channels, bn),
        nn.Conv2d(channels, width, 1, stride=first, bias=False),
        *_activation(width, bn),
        nn.Conv2d(width, width, 3, stride=second, padding=1, bias=False),
        *_activation(width, bn),
        nn.Conv2d(width, EXPANSION * width, 1, bias=False),
    )
