"""Data sets as images for convolutional nets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from experiments.errors import DataFormatError

if TYPE_CHECKING:
    from experiments.data import Dataset


def standardised(samples: Tensor, dims: tuple[int, ...], by: int | None = None) -> Tensor:
    """Mean 0 and variance 1 over ``dims``; what is constant becomes 0.

    With ``by``, of the first so many samples; the rest is shifted and scaled alike.
    """
    some = samples if by is None else samples[:by]
    mean = some.mean(dims, keepdim=True)
    spread = (some - mean).square().mean(dims, keepdim=True).sqrt()
    constant = spread <= 1e-6 * spread.max()
    return torch.where(constant, 0.0, (samples - mean) / spread.clamp_min(1e-30))


def as_pictures(images: np.ndarray, name: str) -> np.ndarray:
    """Images as (samples, channels, height, width).

    Raises
    ------
    DataFormatError
        They are neither images nor vectors of a square number of pixels.
    """
    shape = images.shape
    if images.ndim == 4 and shape[1] not in (1, 2, 3, 4) and shape[3] in (1, 2, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 2:
        side = math.isqrt(shape[1])
        if side * side != shape[1]:
            msg = (
                f"{name} holds vectors of {shape[1]} numbers, which is no square image: "
                "convolutional nets need images of shape (samples, [channels,] height, width)"
            )
            raise DataFormatError(msg)
        images = images.reshape(-1, 1, side, side)
    elif images.ndim != 4:
        msg = f"{name} has shape {shape}, expected (samples, [channels,] height, width)"
        raise DataFormatError(msg)
    return np.ascontiguousarray(images, dtype=np.float32)


def resized(pictures: Tensor, size: int) -> Tensor:
    """All pictures with sides of this length."""
    if tuple(pictures.shape[2:]) == (size, size):
        return pictures
    return nn.functional.interpolate(
        pictures, size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )


def split_pictures(
    dataset: Dataset, test_share: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of :meth:`experiments.data.Dataset.split`, all standardised by the first."""
    parts = dataset.split(test_share)
    images, test = (torch.from_numpy(as_pictures(part, dataset.name)) for part in parts[::2])
    both = standardised(torch.cat([images, test]), dims=(0, 2, 3), by=len(images))
    labels, test_labels = (torch.from_numpy(part) for part in parts[1::2])
    return both[: len(images)], labels, both[len(images) :], test_labels
