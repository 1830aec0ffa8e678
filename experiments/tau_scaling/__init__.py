"""A factor tau on every branch: which one keeps norms bounded at any depth, and what it trains.

Run it with ``python -m experiments tau_scaling``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.claims import Claim, Verdict
from experiments.registry import Options, Preset
from experiments.sweep import measure_cells
from experiments.tau_scaling.nets import FREE_TAU, NETS, Net
from experiments.tau_scaling.statements import CLAIMS

NAME = "tau_scaling"
TITLE = "The factor tau on residual branches: norms, descent and ResNets at any depth"
PAPER = (
    "H. Zhang, D. Yu, M. Yi, W. Chen, T.-Y. Liu, Stabilize Deep ResNet with A Sharp Scaling "
    "Factor tau, arXiv:1903.07120, Machine Learning 111, 2022"
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Preset):
    """What is swept.

    Parameters
    ----------
    depths : tuple of int
        Residual blocks of the nets whose norms are followed.
    width : int
        Of these nets.
    together : int
        So many of them make a cell: what a killed run may lose.
    product_depths, product_width : tuple of int, int
        Of the nets whose product of blocks is taken.
    product_seeds : int
        Of the ``seeds``, how many for these. It counts for the preset's own number of
        seeds: another one, as asked for by ``--seeds``, is used for every cell.
    descent_depths, descent_width, descent_samples, descent_steps : tuple of int, int, int, int
        Of full-batch descent on random labels.
    image_depths, image_width, image_batch, image_epochs : tuple of int, int, int, float
        Of stochastic descent on images.
    descent_seeds : int
        Of both, as ``product_seeds``.
    trained, trained_free : tuple of int
        Blocks per stage n of the ResNets of 6n + 2 layers, with and without BatchNorm.
    widths : tuple of int
        Their channels.
    size, batch, epochs : int, int, float
        Side of the images, samples in a batch and length of their training.
    augment : bool
        Random crops after padding by 4, and flips.
    precision : {"float32", "bfloat16", "float16"}
        Of that training.
    train_seeds : int
        As ``product_seeds``.
    """

    depths: tuple[int, ...]
    width: int
    together: int
    product_depths: tuple[int, ...]
    product_width: int
    product_seeds: int
    descent_depths: tuple[int, ...]
    descent_width: int
    descent_samples: int
    descent_steps: int
    image_depths: tuple[int, ...]
    image_width: int
    image_batch: int
    image_epochs: float
    descent_seeds: int
    trained: tuple[int, ...]
    trained_free: tuple[int, ...]
    widths: tuple[int, ...]
    size: int
    batch: int
    epochs: float
    augment: bool
    precision: str
    train_seeds: int


_PAPER_SIZES: dict[str, Any] = {
    "data": "cifar10", "seeds": 16, "depths": (10, 30, 100, 300, 1000, 3000, 10000),
    "width": 1024, "together": 4, "product_depths": (30, 100, 300, 1000), "product_width": 256,
    "product_seeds": 10, "descent_depths": (10, 100, 400), "descent_width": 128,
    "descent_samples": 64, "descent_steps": 400, "image_depths": (10, 100, 1000),
    "image_width": 128, "image_batch": 256, "image_epochs": 10.0, "descent_seeds": 5,
    "widths": (16, 32, 64), "size": 32, "batch": 128, "augment": True, "precision": "bfloat16",
}  # fmt: skip

PRESETS = {
    "quick": Sizes(
        summary="L up to 10000 for norms and 120 for descent; ResNet-20 to -56 on small images, "
        "three epochs; 16 seeds, but 8 of products and 4 of what is trained (--seeds "
        "N: N of each); three minutes on two cores",
        seeds=16,
        depths=(10, 30, 100, 300, 1000, 3000, 10000),
        width=256,
        together=8,
        product_depths=(30, 100, 300, 1000),
        product_width=128,
        product_seeds=8,
        descent_depths=(10, 35, 120),
        descent_width=64,
        descent_samples=32,
        descent_steps=350,
        image_depths=(10, 30, 100),
        image_width=64,
        image_batch=16,
        image_epochs=5.0,
        descent_seeds=4,
        trained=(3, 7),
        trained_free=(3, 9),
        widths=(8, 16, 32),
        size=8,
        batch=64,
        epochs=3.0,
        augment=False,
        precision="float32",
        train_seeds=4,
    ),
    "short": Sizes(
        summary="CIFAR-10: ResNet-20, -32 and -56, 10 epochs instead of 200; 4 seeds; an hour on "
        "a GPU",
        trained=(3, 5, 9),
        trained_free=(3, 5, 9),
        epochs=10.0,
        train_seeds=4,
        **_PAPER_SIZES,
    ),
    "paper": Sizes(
        summary="CIFAR-10: ResNet-20 to -110, the authors' 200 epochs; 4 seeds; days on a GPU, "
        "less under torchrun",
        trained=(3, 5, 9, 18),
        trained_free=(3, 5, 9, 18),
        epochs=200.0,
        train_seeds=4,
        **_PAPER_SIZES,
    ),
    "1202": Sizes(
        summary="as paper, with ResNet-1202 beside ResNet-110; two seeds of each ResNet, whose "
        "intervals are wide; weeks on a GPU, less under torchrun",
        trained=(18, 200),
        trained_free=(18, 200),
        epochs=200.0,
        train_seeds=2,
        **_PAPER_SIZES,
    ),
}


def claims() -> Sequence[Claim]:
    """What is tested, see ``statements``."""
    return CLAIMS


def cells(sizes: Sizes, seeds: int) -> list[dict[str, Any]]:
    """Every measurement of a preset, cheap ones first.

    Parameters
    ----------
    sizes : Sizes
        The preset.
    seeds : int
        How many seeds. Where it is the preset's own number, costly cells take fewer, as the
        preset says; any other number is used for all.
    """
    from experiments.tau_scaling.laboratory import CHECKS

    product, descent, train = (
        min(seeds, part) if seeds == sizes.seeds else seeds
        for part in (sizes.product_seeds, sizes.descent_seeds, sizes.train_seeds)
    )
    found: list[dict[str, Any]] = [{"part": "check", "what": what} for what in CHECKS]
    found += [
        {"part": "product", "L": depth, "seed": seed}
        for depth in sizes.product_depths
        for seed in range(product)
    ]
    found += [
        {"part": part, "L": depth, "seeds": descent}
        for part, depths in (("descent", sizes.descent_depths), ("images", sizes.image_depths))
        for depth in depths
    ]
    found += [
        {"part": "train", "net": net, "n": n, "seed": seed}
        for net, kind in NETS.items()
        for n in _sizes(sizes, net, kind)
        for seed in range(train)
    ]
    found += [
        {"part": "norms", "L": depth, "first": first, "seeds": min(sizes.together, seeds - first)}
        for depth in sizes.depths
        for first in range(0, seeds, sizes.together)
    ]
    return found


def _sizes(sizes: Sizes, net: str, kind: Net) -> tuple[int, ...]:
    """Blocks per stage; what is to fail without BatchNorm is trained where it is deepest."""
    if kind.bn:
        return sizes.trained
    return sizes.trained_free if net == FREE_TAU else sizes.trained_free[-1:]


def _cost(cell: Mapping[str, Any], sizes: Sizes) -> float:
    """Seconds on two cores, about."""
    if cell["part"] == "train":
        steps = sizes.epochs * (22.0 if sizes.batch < 128 else 390.0)
        return 0.007 * steps * (1.0 + float(cell["n"])) * sizes.batch * sizes.size**2 / 4096
    if cell["part"] == "check":
        return 1.0
    depth = float(cell["L"])
    if cell["part"] == "product":
        return 4e-3 * depth
    if cell["part"] == "norms":
        return 5e-7 * depth * float(cell["seeds"]) * sizes.width
    if cell["part"] == "descent":
        flops = sizes.descent_samples * sizes.descent_width**2 * sizes.descent_steps
    else:
        flops = round(1437 * sizes.image_width**2 * sizes.image_epochs)
    return 1e-9 * flops * depth * float(cell["seeds"])


def run(options: Options) -> list[Verdict]:
    """Measure, write tables and figures, decide."""
    from experiments.tau_scaling import figures, tables, verdicts
    from experiments.tau_scaling.laboratory import Laboratory

    sizes = PRESETS[options.preset]
    checkpoints = options.out / "checkpoints"
    if options.mode == "fresh":
        shutil.rmtree(checkpoints, ignore_errors=True)
    laboratory = Laboratory(options.dataset, sizes, options.device, checkpoints)
    measured = measure_cells(
        options,
        cells(sizes, options.seeds),
        laboratory.measure,
        title=NAME,
        cost=lambda cell: _cost(cell, sizes),
        parallel=lambda cell: cell["part"] == "train",
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    tables.write(options.out, measured, options.dataset.name)
    decided = verdicts.decide_claims(measured)
    figures.draw(options.out, measured, laboratory.describe(), decided)
    return decided
