"""Spectra, index, norms and learning rates along training: the rest of Demystifying ResNet.

Run it with ``python -m experiments shortcut_training``. What holds at zero and at initialisation is
tested by ``shortcut_depth``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from experiments.claims import Claim, Verdict
from experiments.models.shortcut_kinds import (
    ONE,
    ORTHOGONAL,
    SHORTCUT_KINDS,
    TWO,
    TWO_XAVIER,
    XAVIER,
)
from experiments.moments import principal_moments
from experiments.registry import Options, Preset
from experiments.shortcut_training.statements import CLAIMS
from experiments.sweep import measure_cells

NAME = "shortcut_training"
TITLE = "Shortcut depth along training: spectra, index, weight norms, best learning rates"
PAPER = (
    "S. Li, J. Jiao, Y. Han, T. Weissman, Demystifying ResNet, arXiv:1611.01186 (2016), "
    "figures 2 to 10"
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Preset):
    """What is swept.

    Parameters
    ----------
    depths : tuple of int
        L of the linear nets; multiples of 6, so that shortcuts of depth 1, 2 and 3 fit.
    num_steps : int
        Of gradient descent, for linear and ReLU nets.
    rates, relu_rates : tuple of three ints
        Learning rates: powers of ten of the first and the last, and how many in each decade.
    precision : {"float32", "float64"}
        Of the linear nets of the sweep. In float32 losses are resolved to some 1e-10 above the
        least one. Nets with a ReLU are trained in float32, Hessians are taken in float64.
    relu_depths : tuple of int
    relu_samples : int or None
        So many samples at equal distances; None for all.
    start_depths : tuple of int
        Powers of 2.
    path_depths : tuple of int
        Depths at which the Hessian is followed; the first of them with all seeds and a
        closer look at the escape from zero, the others with one seed and at every other level.
    path_rate : float
        The small learning rate of these.
    path_steps : int
        How long they may take.
    levels, decades : int, float
        Spectra are taken at so many losses, from that of the identity map down so many decades.
    around : int
        Spectra around the escape of the 2-shortcut net.
    together : int
        So many seeds of ReLU nets, or of nets that are followed, make a cell: what a killed run
        may lose.
    """

    depths: tuple[int, ...]
    num_steps: int
    rates: tuple[int, int, int]
    precision: Literal["float32", "float64"]
    relu_depths: tuple[int, ...]
    relu_samples: int | None
    relu_rates: tuple[int, int, int]
    start_depths: tuple[int, ...]
    path_depths: tuple[int, ...]
    path_rate: float
    path_steps: int
    levels: int
    decades: float
    around: int
    together: int


PRESETS = {
    "quick": Sizes(
        summary="6 linear nets, L up to 96, 21 learning rates, 1000 steps; 4 seeds; two to three "
        "minutes on two cores",
        seeds=4,
        depths=(6, 12, 24, 48, 96),
        num_steps=1000,
        rates=(-4, 1, 4),
        precision="float32",
        relu_depths=(6, 12, 24),
        relu_samples=300,
        relu_rates=(-1, 1, 2),
        start_depths=(2, 4, 8, 16),
        path_depths=(12, 16),
        path_rate=0.02,
        path_steps=4000,
        levels=7,
        decades=3.0,
        around=3,
        together=4,
    ),
    "paper": Sizes(
        summary="MNIST and 10 seeds, as in the paper; ReLU nets on 2000 images at 21 learning "
        "rates; an hour on two cores and a download",
        data="mnist",
        seeds=10,
        depths=(6, 12, 24, 48, 96),
        num_steps=1000,
        rates=(-4, 1, 4),
        precision="float64",
        relu_depths=(6, 12, 24),
        relu_samples=2000,
        relu_rates=(-4, 1, 4),
        start_depths=(2, 4, 8, 16, 32),
        path_depths=(12, 16),
        path_rate=0.02,
        path_steps=10000,
        levels=25,
        decades=3.0,
        around=15,
        together=2,
    ),
}
# The nets of each part.
SWEPT = tuple(SHORTCUT_KINDS)
RELU = (TWO, ORTHOGONAL, XAVIER)
STARTED = (TWO, ORTHOGONAL, XAVIER)
# Those whose Hessians are compared along training, and those of which one seed is shown beside.
COMPARED = (TWO, ORTHOGONAL)
SHOWN = (XAVIER, ONE)


def claims() -> Sequence[Claim]:
    """What is tested, see ``statements``."""
    return CLAIMS


def cells(sizes: Sizes, seeds: int) -> list[dict[str, Any]]:
    """Every measurement of a preset, cheap ones first."""
    found: list[dict[str, Any]] = [
        {"part": "check", "net": net, "L": 6, "seed": 0, "mid": mid}
        for mid, nets in ((None, SWEPT), ("relu", RELU))
        for net in nets
    ]
    found += [
        {"part": "start", "net": net, "L": depth, "seed": seed}
        for depth in sizes.start_depths
        for net in STARTED
        for seed in range(seeds)
    ]
    first, *others = sizes.path_depths
    for net in (*COMPARED, *SHOWN):
        look = {"around": sizes.around if net == TWO else 0, "every": 1}
        found += [
            {"part": "path", "net": net, "L": first, **group, **look}
            for group in _groups(seeds if net in COMPARED else 1, sizes.together)
        ]
    found += [
        {"part": "path", "net": net, "L": depth, "first": 0, "seeds": 1, "around": 0, "every": 2}
        for depth in others
        for net in COMPARED
    ]
    found += [
        {"part": "relu", "net": net, "L": depth, **group}
        for depth in sizes.relu_depths
        for net in RELU
        for group in _groups(seeds, sizes.together)
    ]
    found += [
        {"part": "sweep", "net": net, "L": depth, "first": 0, "seeds": seeds}
        for depth in sizes.depths
        for net in SWEPT
    ]
    return found


def _groups(seeds: int, together: int) -> list[dict[str, int]]:
    return [
        {"first": first, "seeds": min(together, seeds - first)}
        for first in range(0, seeds, together)
    ]


def _cost(cell: Mapping[str, Any], sizes: Sizes) -> float:
    """Seconds on two cores, about."""
    depth, seeds = float(cell["L"]), float(cell.get("seeds", 1))
    if cell["part"] == "sweep":
        # The 2-shortcut net from full Xavier soon diverges where it is deep.
        if cell["net"] == TWO_XAVIER and depth >= 24:
            return 0.1
        first, last, per_decade = sizes.rates
        lanes = 0.8 * (last - first) * per_decade * seeds
        return 1e-6 * depth * sizes.num_steps * (35 + 0.65 * lanes)
    if cell["part"] == "relu":
        first, last, per_decade = sizes.relu_rates
        lanes = 0.7 * (last - first) * per_decade * seeds
        return 3e-8 * depth * sizes.num_steps * lanes * (sizes.relu_samples or 60000)
    spectra: float = 0.3 * (depth / 12) ** 2.3
    if cell["part"] == "path":
        count = sizes.levels / float(cell["every"]) + float(cell["around"])
        return 2.0 + spectra * count * seeds
    return spectra if cell["part"] == "start" else 0.1


def run(options: Options) -> list[Verdict]:
    """Measure, write tables and figures, decide."""
    from experiments.shortcut_training import figures, tables, verdicts
    from experiments.shortcut_training.laboratory import Laboratory

    sizes = PRESETS[options.preset]
    # As many components as classes, as in the paper.
    moments = principal_moments(options.dataset, options.dataset.num_classes)
    laboratory = Laboratory(moments, sizes, options.device)
    measured = measure_cells(
        options, cells(sizes, options.seeds), laboratory.measure, title=NAME,
        cost=lambda cell: _cost(cell, sizes),
    )  # fmt: skip
    context = {
        "data": options.dataset.name,
        "least_loss": moments.minimum_loss,
        "scale": laboratory.scale,
        "levels": laboratory.levels,
        "depth": sizes.path_depths[0],
        "singular_values": torch.linalg.svdvals(moments.difference).tolist(),
    }
    decided = verdicts.decide_claims(measured, context)
    tables.write(options.out, measured, context)
    figures.draw(options.out, measured, context, decided)
    return decided
