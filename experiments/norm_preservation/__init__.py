"""Whether residual blocks preserve the norm of the gradient, and more so the deeper the net.

Run it with ``python -m experiments norm_preservation``.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.claims import Claim, Verdict
from experiments.norm_preservation.statements import CLAIMS
from experiments.registry import Options, Preset
from experiments.sweep import measure_cells

NAME = "norm_preservation"
TITLE = "Gradient norms of residual and Procrustes nets, block by block"
PAPER = (
    "A. Zaeemzadeh, N. Rahnavard, M. Shah, Norm-Preservation: Why Residual Networks Can Become "
    "Extremely Deep?, arXiv:1805.07477, IEEE TPAMI 43(11), 2021"
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Preset):
    """What is swept.

    Parameters
    ----------
    linear : tuple of int
        Depths L of the linear nets.
    mlp, wide, trained : tuple of int
        Depths L of the MLPs at initialisation, of the wide ones, and of those that are trained.
    mlp_steps, mlp_every, mlp_lr
        Optimizer steps of their training, after how many the ratios are sampled, learning rate.
    num_batches, num_conv_batches : int
        Batches that ratios at initialisation are averaged over.
    conv, conv_trained : tuple of int
        Blocks per stage n of the convolutional nets at initialisation, and of the trained ones.
    conv_size, conv_batch : int
        Side of their images and samples in a batch, at initialisation.
    train_size, train_batch, conv_every : int
        The same for their training, and after how many steps the ratios are sampled.
    conv_steps : int
        Optimizer steps; 0 means ``conv_epochs`` epochs.
    conv_epochs : int
        Epochs, if ``conv_steps`` is 0.
    some_seeds : int
        Of the ``seeds``, how many for linear nets, wide ones but those of the law, and the two
        main convolutional ones. These three count for the preset's own number of seeds: another
        one, as asked for by ``--seeds``, is used for every cell.
    train_seeds : int
        The same for what is trained, and for the other convolutional nets.
    jacobian_seeds : int
        The same for the cells with Jacobians.
    max_matvecs : int
        Products for each Jacobian.
    """

    linear: tuple[int, ...]
    mlp: tuple[int, ...]
    wide: tuple[int, ...]
    trained: tuple[int, ...]
    mlp_steps: int
    mlp_every: int
    mlp_lr: float
    num_batches: int
    conv: tuple[int, ...]
    conv_trained: tuple[int, ...]
    conv_size: int
    conv_batch: int
    num_conv_batches: int
    train_size: int
    train_batch: int
    conv_every: int
    conv_steps: int
    conv_epochs: int
    some_seeds: int
    train_seeds: int
    jacobian_seeds: int
    max_matvecs: int


PRESETS = {
    "quick": Sizes(
        summary="MLPs up to 64 blocks, ResNet-164 and ProcResNet-166 at initialisation, 56 and 58 "
        "layers trained for 50 steps; 8 seeds, but 5 of convolutional and linear nets, 3 of "
        "trained ones, 1 of Jacobians (--seeds N: N of each); a minute or two on two cores",
        seeds=8,
        linear=(2, 4, 8, 16, 32, 64, 128, 256),
        mlp=(2, 4, 8, 16, 32, 64),
        wide=(4, 8, 16, 32),
        trained=(2, 4, 8, 16, 32),
        mlp_steps=100,
        mlp_every=10,
        mlp_lr=0.02,
        num_batches=2,
        conv=(2, 6, 18),
        conv_trained=(6,),
        conv_size=32,
        conv_batch=8,
        num_conv_batches=1,
        train_size=16,
        train_batch=16,
        conv_every=1,
        conv_steps=50,
        conv_epochs=0,
        some_seeds=5,
        train_seeds=3,
        jacobian_seeds=1,
        max_matvecs=150,
    ),
    "paper": Sizes(
        summary="CIFAR-10: 20 to 632 layers at initialisation, 20 to 112 trained for 20 epochs; "
        "10 seeds, but 3 of trained nets and of Jacobians (--seeds N: N of each); hours, best on "
        "a GPU",
        data="cifar10",
        seeds=10,
        linear=(2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        mlp=(2, 4, 8, 16, 32, 64, 128),
        wide=(2, 4, 8, 16, 32, 64, 128),
        trained=(2, 4, 8, 16, 32, 64),
        mlp_steps=400,
        mlp_every=10,
        mlp_lr=0.01,
        num_batches=8,
        conv=(2, 6, 12, 18, 30, 70),
        conv_trained=(2, 6, 12),
        conv_size=32,
        conv_batch=64,
        num_conv_batches=8,
        train_size=32,
        train_batch=128,
        conv_every=10,
        conv_steps=0,
        conv_epochs=20,
        some_seeds=10,
        train_seeds=3,
        jacobian_seeds=3,
        max_matvecs=600,
    ),
}

# The convolutional nets that are trained, of those at initialisation.
_TRAINED = ("ResNet", "ProcResNet")
# (net, L or n) of the cells with Jacobians: those with skip and BN, with a small branch, and both
# convolutional nets with the fewest blocks that show all kinds.
_JACOBIANS: tuple[tuple[str, str, int], ...] = (
    ("skip, BN", "L", 8),
    ("skip, scaled", "L", 64),
    ("ResNet", "n", 2),
    ("ProcResNet", "n", 1),
)


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
    from experiments.norm_preservation.laboratory import CONVS, MLPS

    every = range(seeds)
    some, few, fewest = (
        range(min(seeds, part) if seeds == sizes.seeds else seeds)
        for part in (sizes.some_seeds, sizes.train_seeds, sizes.jacobian_seeds)
    )
    found: list[dict[str, Any]] = [
        {"part": "linear", "L": depth, "seed": seed} for depth in sizes.linear for seed in some
    ]
    found += [
        {"part": "mlp init", "net": net, "L": depth, "width": 32, "batch": 64, "seed": seed}
        for net, depth, seed in itertools.product(MLPS, sizes.mlp, every)
    ]
    found += [
        {"part": "mlp init", "net": net, "L": depth, "width": 128, "batch": 256, "seed": seed}
        for net, seeds_of in (("skip, BN", every), ("skip", some), ("plain, BN", some))
        for depth, seed in itertools.product(sizes.wide, seeds_of)
    ]
    found += [
        {"part": "jacobian", "net": net, size: number, "state": state, "seed": seed}
        for net, size, number in _JACOBIANS
        for state in ("initial", "trained")
        for seed in fewest
    ]
    found += [
        {"part": "conv init", "net": net, "n": n, "seed": seed}
        for n, net in itertools.product(sizes.conv, CONVS)
        for seed in (some if net in _TRAINED else few)
    ]
    found += [
        {"part": "mlp train", "net": net, "L": depth, "seed": seed}
        for depth, net, seed in itertools.product(sizes.trained, MLPS, few)
    ]
    found += [
        {"part": "conv train", "net": net, "n": n, "seed": seed}
        for n, net, seed in itertools.product(sizes.conv_trained, _TRAINED, few)
    ]
    return found


def _cost(cell: Mapping[str, Any], sizes: Sizes) -> float:
    """Seconds on one core, about."""
    part, depth = cell["part"], float(cell.get("L", cell.get("n", 1)))
    if part == "mlp init":
        return 0.01 + 0.0003 * depth * float(cell["batch"]) * sizes.num_batches / 8
    if part == "mlp train":
        return 0.2 + 0.0006 * depth * sizes.mlp_steps
    if part == "conv init":
        area = sizes.conv_batch * sizes.conv_size**2 / 16384
        return 0.1 + 0.07 * depth * area * sizes.num_conv_batches
    if part == "conv train":
        steps = sizes.conv_steps or sizes.conv_epochs * 50_000 // sizes.train_batch
        return 0.03 * depth * steps * sizes.train_batch * sizes.train_size**2 / 8192
    return 0.1 if part == "linear" else 3.0


def run(options: Options) -> list[Verdict]:
    """Measure, write tables and figures, decide."""
    from experiments.norm_preservation import figures, verdicts
    from experiments.norm_preservation.laboratory import Laboratory

    sizes = PRESETS[options.preset]
    checkpoints = options.out / "checkpoints"
    if options.mode == "fresh":
        shutil.rmtree(checkpoints, ignore_errors=True)
    laboratory = Laboratory(options.dataset, sizes, options.device, checkpoints)
    todo = cells(sizes, options.seeds)
    measured = measure_cells(
        options,
        todo,
        laboratory.measure,
        title=NAME,
        cost=lambda cell: _cost(cell, sizes),
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    figures.write_tables(options.out, measured)
    decided = verdicts.decide_claims(measured)
    figures.draw(options.out, measured, options.dataset.name, decided)
    return decided
