"""Random changes of images that keep what they show."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.errors import ExperimentError


class AugmentationError(ExperimentError, ValueError):
    """Images or settings that an augmentation cannot use."""


def pad_and_crop(
    padding: int = 4, flip: bool = True
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Shift each image at random, and mirror every second one: the usual CIFAR augmentation.

    Parameters
    ----------
    padding : int
        Zeros added on each side; a crop of the original size is then taken at a random place, all
        (2 · padding + 1)² places being equally likely. In images that have been standardised,
        zero is the mean colour.
    flip : bool
        Whether to exchange left and right with probability ½, independently of the shift.

    Returns
    -------
    callable
        Takes images (samples, channels, height, width) of any dtype on any device, and a
        generator of the CPU; returns images of the same shape, dtype and device. What is drawn
        depends on the generator and the number of samples alone, and the images are moved in a
        handful of operations for the whole batch.

    Raises
    ------
    AugmentationError
        ``padding`` is negative, or a batch is no batch of images.

    Examples
    --------
    >>> transform = pad_and_crop(padding=1)
    >>> transform(torch.ones(2, 3, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 8, 8])
    """
    if padding < 0:
        msg = f"padding must be at least 0, got {padding}"
        raise AugmentationError(msg)

    def transform(inputs: Tensor, generator: torch.Generator) -> Tensor:
        if inputs.ndim != 4:
            msg = f"got shape {tuple(inputs.shape)}, expected (samples, channels, height, width)"
            raise AugmentationError(msg)
        count, channels, height, width = inputs.shape
        device = inputs.device
        top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
        mirrored = torch.randint(2 if flip else 1, (count,), generator=generator)
        # One transfer for the three of them.
        drawn = torch.stack([top, left, mirrored]).to(device, non_blocking=True)
        top, left, mirrored = drawn[:, :, None]
        row, column = (torch.arange(n, device=device) for n in (height, width))
        rows = top + row
        columns = left + torch.where(mirrored.bool(), column.flip(0), column)
        padded = nn.functional.pad(inputs, (padding,) * 4)
        sample = torch.arange(count, device=device)
        channel = torch.arange(channels, device=device)
        return padded[
            sample[:, None, None, None],
            channel[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]

    return transform
