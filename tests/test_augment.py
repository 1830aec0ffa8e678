"""Augmentation: every output is a crop of the padded input, at a place drawn from the generator."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

from experiments.augment import AugmentationError, pad_and_crop


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=6, shape=(2, 5, 7), dtype=torch.float32):
    # All entries differ and none is 0, so that a crop has one place only.
    return torch.arange(1, count * torch.Size(shape).numel() + 1).reshape(count, *shape).to(dtype)


def place(image, output, padding):
    """Where a crop was taken and whether it was mirrored, by trying all."""
    _, height, width = image.shape
    padded = nn.functional.pad(image, (padding,) * 4)
    found = [
        (top, left, mirrored)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for mirrored in (False, True)
        if torch.equal(
            output.flip(2) if mirrored else output,
            padded[:, top : top + height, left : left + width],
        )
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_each_output_is_one_crop_of_the_padded_input(dtype):
    x = images(3, (2, 4, 5), dtype)
    y = pad_and_crop(2)(x, seeded())
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    for image, output in zip(x, y, strict=True):
        place(image, output, 2)


def test_all_places_and_both_sides_are_equally_likely():
    count, padding = 4500, 1
    x = images(1).expand(count, -1, -1, -1)
    y = pad_and_crop(padding)(x, seeded(1))
    found = collections.Counter(place(x[0], output, padding) for output in y)
    assert len(found) == 18
    # χ² of 18 equally likely cells: 17 degrees of freedom, 99.9 % of draws are below 40.8.
    expected = count / 18
    assert sum((seen - expected) ** 2 / expected for seen in found.values()) < 40.8


def test_the_generator_decides_and_nothing_else():
    x, transform = images(), pad_and_crop()
    state = torch.random.get_rng_state()
    y = transform(x, seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(transform(x, seeded(3)), y)
    assert torch.equal(transform(x.double(), seeded(3)), y.double())
    assert not torch.equal(transform(x, seeded(4)), y)


def test_a_generator_draws_anew_for_each_batch():
    generator, x = seeded(), images()
    assert not torch.equal(pad_and_crop()(x, generator), pad_and_crop()(x, generator))


def test_without_flip_nothing_is_mirrored():
    x = images(40)
    y = pad_and_crop(1, flip=False)(x, seeded())
    found = [place(image, output, 1) for image, output in zip(x, y, strict=True)]
    assert not any(mirrored for _, _, mirrored in found)
    assert len(set(found)) == 9


def test_without_padding_and_flip_nothing_changes():
    x = images()
    assert torch.equal(pad_and_crop(0, flip=False)(x, seeded()), x)


def test_the_input_is_left_alone():
    x = images()
    before = x.clone()
    pad_and_crop()(x, seeded()).zero_()
    assert torch.equal(x, before)


def test_what_is_no_batch_of_images_is_refused():
    with pytest.raises(AugmentationError, match="padding must be at least 0, got -1"):
        pad_and_crop(-1)
    with pytest.raises(AugmentationError, match=r"got shape \(3, 8\), expected \(samples"):
        pad_and_crop()(torch.zeros(3, 8), seeded())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_images():
    x = images(50)
    y = pad_and_crop()(x.cuda(), seeded())
    assert y.device.type == "cuda"
    assert torch.equal(y.cpu(), pad_and_crop()(x, seeded()))
