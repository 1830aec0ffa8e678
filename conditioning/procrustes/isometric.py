"""A transition that keeps the norm of every gradient: the isometric 2x2 convolution of stride 2."""

from __future__ import annotations

import math

import torch
from torch import nn

from conditioning.errors import InvalidArgumentError


class IsometricDownsample(nn.Conv2d):
    r"""Downsampling by windows that do not overlap, with orthonormal rows at the beginning.

    A convolution without bias whose kernel is as long as its stride. With orthonormal rows, the
    matrix of a window, and so the whole operator, has :math:`W W^T = I`: backward, it keeps the
    norm of every gradient, whatever the images' content, size and border; of its input it keeps
    what is not projected out. A 1x1 convolution of stride 2, in comparison, sees one input in four,
    and can keep the norms of random gradients in the mean only.

    It is an ``nn.Conv2d`` and trains as one, which moves it away from the isometry;
    ``Procrustes(layer).attach(optimizer)`` brings it back after each step.

    Parameters
    ----------
    in_channels : int
    out_channels : int, optional
        At most ``in_channels * factor**2``; twice ``in_channels`` by default.
    factor : int
        By which height and width shrink.
    generator : torch.Generator, optional
        Of the initial weight, on the CPU; the global one by default.
    dtype, device
        Of the weight.

    Raises
    ------
    InvalidArgumentError
        If there are more output channels than a window has entries: rows cannot be orthonormal.

    Examples
    --------
    >>> layer = IsometricDownsample(16).double()
    >>> x = torch.randn(1, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    >>> y = layer(x)
    >>> gradient, = torch.autograd.grad(y, x, y)
    >>> bool(torch.isclose(gradient.norm(), y.norm()))
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        factor: int = 2,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        out_channels = 2 * in_channels if out_channels is None else out_channels
        for name, size in (
            ("in_channels", in_channels), ("out_channels", out_channels), ("factor", factor),
        ):  # fmt: skip
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                msg = f"{name} must be a positive integer, got {size!r}."
                raise InvalidArgumentError(msg)
        if out_channels > in_channels * factor**2:
            msg = (
                f"{out_channels} rows cannot be orthonormal in windows of "
                f"{in_channels * factor**2} entries: at most in_channels * factor**2 output "
                f"channels keep the norm of every gradient."
            )
            raise InvalidArgumentError(msg)
        self._generator = generator
        super().__init__(
            in_channels, out_channels, factor, stride=factor, bias=False, dtype=dtype,
            device=device,
        )  # fmt: skip
        del self._generator

    def reset_parameters(self) -> None:
        """Draw a random matrix with orthonormal rows, uniformly."""
        if self.weight.is_meta:
            return
        rows, columns = self.out_channels, math.prod(self.weight.shape[1:])
        # A generator does not survive in a module, which must be copied and pickled.
        generator = getattr(self, "_generator", None)
        drawn = torch.empty(rows, columns, dtype=torch.float64, device="cpu")
        nn.init.orthogonal_(drawn, generator=generator)
        with torch.no_grad():
            self.weight.copy_(drawn.reshape(self.weight.shape))
