"""Whether transitions with equal singular values keep the gradient's norm, and what that helps.

Run it with ``python -m experiments procrustes_resnet``.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.claims import Claim, Verdict
from experiments.procrustes_resnet.statements import CLAIMS
from experiments.registry import Options, Preset
from experiments.sweep import measure_cells

NAME = "procrustes_resnet"
TITLE = "Procrustes regularisation of transitions and stem, against plain ResNets"
PAPER = (
    "A. Zaeemzadeh, N. Rahnavard, M. Shah, Norm-Preservation: Why Residual Networks Can Become "
    "Extremely Deep?, arXiv:1805.07477, IEEE TPAMI 43(11), 2021"
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Preset):
    """What is swept.

    Parameters
    ----------
    initial : tuple of int
        Blocks per stage n of the nets at initialisation.
    initial_batches, initial_batch, initial_size : int
        Batches that their ratios are averaged over, samples in each, side of the images.
    trained : tuple of int
        Blocks per stage of the nets that are trained; 9n + 2 or 9n + 4 layers.
    deep : tuple of int
        Of ``trained``, those of which only the nets in :data:`DEEP_NETS` are trained.
    size, batch : int
        Side of the images and samples in a batch of the trainings.
    epochs : float
        How long they are.
    every : int
        After how many steps ratios are sampled.
    evaluations : int
        On test images, in an epoch.
    augment : bool
        Random crops after padding by 4, and flips.
    precision : {"float32", "bfloat16", "float16"}
        Of the trainings.
    train_seeds : int
        Of the ``seeds``, how many for what is trained. It counts for the preset's own number of
        seeds: another one, as asked for by ``--seeds``, is used for every cell.
    deep_seeds, operator_seeds : int
        The same for the nets of ``deep``, and for single layers.
    """

    initial: tuple[int, ...]
    initial_batches: int
    initial_batch: int
    initial_size: int
    trained: tuple[int, ...]
    deep: tuple[int, ...]
    size: int
    batch: int
    epochs: float
    every: int
    evaluations: int
    augment: bool
    precision: str
    train_seeds: int
    deep_seeds: int
    operator_seeds: int


PRESETS = {
    "quick": Sizes(
        summary="20 to 40 layers, two epochs on small images; 5 seeds, but 4 of trained nets, 3 of "
        "deep ones and of single layers (--seeds N: N of each); two minutes on two cores",
        seeds=5,
        initial=(2, 6),
        initial_batches=1,
        initial_batch=32,
        initial_size=16,
        trained=(2, 4),
        deep=(4,),
        size=12,
        batch=32,
        epochs=2.0,
        every=2,
        evaluations=2,
        augment=False,
        precision="float32",
        train_seeds=4,
        deep_seeds=3,
        operator_seeds=3,
    ),
    "short": Sizes(
        summary="CIFAR-10: 56 and 58 layers, 30 epochs instead of the paper's 300; 3 seeds; a few "
        "hours on a GPU",
        data="cifar10",
        seeds=3,
        initial=(2, 6, 18),
        initial_batches=8,
        initial_batch=64,
        initial_size=32,
        trained=(6,),
        deep=(),
        size=32,
        batch=128,
        epochs=30.0,
        every=100,
        evaluations=1,
        augment=True,
        precision="bfloat16",
        train_seeds=3,
        deep_seeds=3,
        operator_seeds=5,
    ),
    "paper": Sizes(
        summary="CIFAR-10: 164 and 166 layers, the paper's 300 epochs; 3 seeds; days on a GPU, "
        "less under torchrun",
        data="cifar10",
        seeds=3,
        initial=(2, 6, 18, 30),
        initial_batches=8,
        initial_batch=64,
        initial_size=32,
        trained=(18,),
        deep=(),
        size=32,
        batch=128,
        epochs=300.0,
        every=500,
        evaluations=1,
        augment=True,
        precision="bfloat16",
        train_seeds=3,
        deep_seeds=3,
        operator_seeds=5,
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
    from experiments.procrustes_resnet import operators
    from experiments.procrustes_resnet.nets import DEEP_NETS, INITIAL_NETS, NETS

    train, deep, operator = (
        range(min(seeds, part) if seeds == sizes.seeds else seeds)
        for part in (sizes.train_seeds, sizes.deep_seeds, sizes.operator_seeds)
    )
    found: list[dict[str, Any]] = [
        {"part": "full size", "layer": layer, "seed": seed}
        for layer, seed in itertools.product(operators.FULL, operator)
    ]
    found += [
        {"part": "operator", "layer": layer, "method": method, "seed": seed}
        for layer in operators.LAYERS
        for method, seed in itertools.product(operators.methods_of(layer), operator)
    ]
    found += [
        {"part": "init", "net": net, "n": n, "seed": seed}
        for n, net, seed in itertools.product(sizes.initial, INITIAL_NETS, range(seeds))
    ]
    found += [
        {"part": "train", "net": net, "n": n, "seed": seed}
        for n, net in itertools.product(sizes.trained, NETS)
        if n not in sizes.deep or net in DEEP_NETS
        for seed in (deep if n in sizes.deep else train)
    ]
    return found


def _cost(cell: Mapping[str, Any], sizes: Sizes) -> float:
    """Seconds on one core, about."""
    if cell["part"] == "train":
        steps = sizes.epochs * (45.0 if sizes.batch < 128 else 390.0)
        return 0.006 * steps * (1.0 + float(cell["n"])) * sizes.batch * sizes.size**2 / 4608
    if cell["part"] == "init":
        return 0.1 * float(cell["n"]) * sizes.initial_batches * sizes.initial_size**2 / 256
    return 0.1


def run(options: Options) -> list[Verdict]:
    """Measure, write tables and figures, decide."""
    from experiments.procrustes_resnet import figures, verdicts
    from experiments.procrustes_resnet.laboratory import Laboratory

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
        parallel=lambda cell: cell["part"] == "train",
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    figures.write_tables(options.out, measured)
    decided = verdicts.decide_claims(measured)
    figures.draw(options.out, measured, laboratory.describe(), decided)
    return decided
