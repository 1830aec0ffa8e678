"""Residual nets with branches scaled by a power of the depth: what is stable, what explodes.

Run it with ``python -m experiments large_depth``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.claims import Claim, Verdict
from experiments.errors import ExperimentError
from experiments.large_depth.statements import CLAIMS
from experiments.registry import Options, Preset
from experiments.sweep import measure_cells

NAME = "large_depth"
TITLE = "Scaling with depth: identity, explosion and the limits between them"
PAPER = (
    "P. Marion, A. Fermanian, G. Biau, J.-P. Vert, Scaling ResNets in the Large-depth Regime, "
    "arXiv:2206.06929 (2022), JMLR 26(56), 2025"
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Preset):
    """What is swept. ``seeds`` are trainings.

    Parameters
    ----------
    width : int
        d of nets that are only initialised.
    depths, smooth_depths : tuple of int
        L of nets with independent, and with smooth weights.
    nets, smooth_nets, together : int
        So many at each of those depths, in cells of so many.
    iid_betas, smooth_betas : tuple of float
        Scalings; those that claims are about, 1/4, 1/2 and 1, and 1/2, 1 and 2, are among them.
    law_width, law_depth, law_nets : int
        Nets whose norms are compared with the log-normal law.
    chain_width, chain_depth, chain_nets : int
        The same for the norms' Markov chain.
    growth_depths, growth_nets : tuple of int, int
        The same chain at the scaling 1/4, at the width of the nets.
    order_width, order_nets : int
    order_depths : tuple of int
        Each twice the one before; each is compared with the next, the last with twice itself.
    map_depth, map_nets, map_inputs : int
    map_hursts, map_betas : tuple of float
        Rising; 1/2 is among the former.
    train_width : int
        d of trained nets.
    regularity_depth, regularity_epochs : int
    regularity_rate : float
    train_depth, train_epochs : int
    train_hursts, train_betas, train_rates : tuple of float
    hursts_together : int
        So many values of H of trained nets make a cell.
    samples : int or None
        So many to train on, and to test on, at equal distances; None for all.
    batch : int
    """

    width: int
    depths: tuple[int, ...]
    smooth_depths: tuple[int, ...]
    nets: int
    smooth_nets: int
    together: int
    iid_betas: tuple[float, ...] = (0.25, 0.5, 1.0)
    smooth_betas: tuple[float, ...] = (0.5, 1.0, 2.0)
    law_width: int
    law_depth: int
    law_nets: int
    chain_width: int
    chain_depth: int
    chain_nets: int
    growth_depths: tuple[int, ...]
    growth_nets: int
    order_width: int
    order_nets: int
    order_depths: tuple[int, ...]
    map_depth: int
    map_nets: int
    map_inputs: int
    map_hursts: tuple[float, ...]
    map_betas: tuple[float, ...]
    train_width: int
    regularity_depth: int
    regularity_epochs: int
    regularity_rate: float = 0.01
    train_depth: int
    train_epochs: int
    train_hursts: tuple[float, ...]
    train_betas: tuple[float, ...]
    train_rates: tuple[float, ...]
    hursts_together: int
    samples: int | None = None
    batch: int = 128

    def __post_init__(self) -> None:
        """Reject sizes that make no sense."""
        swept: tuple[tuple[float, ...], ...] = (
            self.depths, self.smooth_depths, self.growth_depths, self.iid_betas, self.smooth_betas,
            self.map_hursts, self.map_betas, self.train_hursts, self.train_betas,
        )  # fmt: skip
        depths = (
            *self.depths, *self.smooth_depths, *self.order_depths, *self.growth_depths,
            self.map_depth, self.train_depth, self.regularity_depth, self.law_depth,
            self.chain_depth,
        )  # fmt: skip
        counts = (
            "width", "nets", "smooth_nets", "together", "law_width", "chain_width", "order_width",
            "order_nets", "map_nets", "map_inputs", "train_width", "regularity_epochs",
            "train_epochs", "hursts_together", "batch",
        )  # fmt: skip
        problems = {
            "order_depths must double": any(
                2 * a != b for a, b in itertools.pairwise(self.order_depths)
            ),
            "order_depths needs two depths or more": len(self.order_depths) < 2,
            "map_hursts must contain 0.5": 0.5 not in self.map_hursts,
            "values of H must lie in (0, 1)": not all(
                0 < hurst < 1 for hurst in (*self.map_hursts, *self.train_hursts)
            ),
            "values of H, betas and depths that are swept must rise": any(
                list(some) != sorted(set(some)) for some in swept
            ),
            "... and be two or more of each": any(len(some) < 2 for some in swept),
            "depths must be at least 8": min(depths, default=8) < 8,
            "iid_betas must contain 0.25, 0.5 and 1": not {0.25, 0.5, 1} <= {*self.iid_betas},
            "smooth_betas must contain 0.5, 1 and 2": not {0.5, 1, 2} <= {*self.smooth_betas},
            "train_rates and regularity_rate must be positive, one or more": not self.train_rates
            or not all(0 < rate < math.inf for rate in (*self.train_rates, self.regularity_rate)),
            "law_nets, chain_nets and growth_nets must be 2 or more": min(
                self.law_nets, self.chain_nets, self.growth_nets
            ) < 2,
            **{f"{name} must be at least 1": getattr(self, name) < 1 for name in counts},
            "samples must be None or at least 1": self.samples is not None and self.samples < 1,
        }  # fmt: skip
        found = [problem for problem, there in problems.items() if there]
        if found:
            msg = f"sizes of {NAME}: {'; '.join(found)}"
            raise ExperimentError(msg)


_HURSTS = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_DEPTHS = (10, 120, 230, 340, 450, 560, 670, 780, 890, 1000)

PRESETS = {
    "quick": Sizes(
        summary="initialisation at the paper's depths (L = 1000, d = 40); nets of depth 64 and 128 "
        "trained on digits; some 100 seconds on one core",
        seeds=4,
        width=40,
        depths=_DEPTHS,
        smooth_depths=(10, 120, 340, 670, 1000),
        nets=60,
        smooth_nets=50,
        together=10,
        law_width=10,
        law_depth=200,
        law_nets=3000,
        chain_width=100,
        chain_depth=1000,
        chain_nets=20000,
        growth_depths=(100, 300, 1000),
        growth_nets=5000,
        order_width=20,
        order_nets=24,
        order_depths=(16, 32, 64, 128, 256, 512),
        map_depth=1000,
        map_nets=24,
        map_inputs=1,
        map_hursts=_HURSTS,
        map_betas=tuple(round(0.05 * place, 2) for place in range(27)),
        train_width=12,
        regularity_depth=128,
        regularity_epochs=6,
        train_depth=64,
        train_epochs=6,
        train_hursts=(0.1, 0.3, 0.5, 0.7, 0.9),
        train_betas=(0.1, 0.3, 0.5, 0.7, 0.9),
        train_rates=(1e-3, 1e-2, 1e-1),
        hursts_together=5,
        samples=2000,
    ),
    "paper": Sizes(
        summary="the paper's sizes on MNIST, trained nets of depth 1000 included: a download, some "
        "hours on a GPU",
        data="mnist",
        seeds=5,
        width=40,
        depths=_DEPTHS,
        smooth_depths=_DEPTHS,
        nets=50,
        smooth_nets=50,
        together=10,
        law_width=100,
        law_depth=1000,
        law_nets=10000,
        chain_width=100,
        chain_depth=1000,
        chain_nets=20000,
        growth_depths=(100, 300, 1000),
        growth_nets=5000,
        order_width=40,
        order_nets=24,
        order_depths=(16, 32, 64, 128, 256, 512),
        map_depth=1000,
        map_nets=5,
        map_inputs=10,
        # 51 and 70 values, with 1/2 among the former.
        map_hursts=tuple(sorted({0.5, *(round(0.05 + 0.0184 * i, 4) for i in range(51))})),
        map_betas=tuple(round(1.3 * place / 69, 4) for place in range(70)),
        train_width=30,
        regularity_depth=1000,
        regularity_epochs=10,
        train_depth=1000,
        train_epochs=10,
        train_hursts=tuple(round(0.1 + 0.8 * place / 9, 4) for place in range(10)),
        train_betas=tuple(round(0.1 + 0.8 * place / 9, 4) for place in range(10)),
        train_rates=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        hursts_together=2,
    ),
}
BLOCKS = ("res-3", "res-1")
LIMITS = (("sde", "res-1"), ("ode", "res-1"), ("ode", "res-3"))
VARIANTS = ("process", "increments")
# How layers are drawn and scaled where their regularity is followed, as in the paper.
REGULAR = (("smooth", 1.0), ("independent", 1.0), ("independent", 0.5))
SHOWN_PATHS = (0.2, 0.5, 0.8)
# Weights of a cell of nets for the law are kept in so many numbers.
_LARGEST = 4e7


def claims() -> Sequence[Claim]:
    """What is tested, see ``statements``."""
    return CLAIMS


def cells(sizes: Sizes, seeds: int) -> list[dict[str, Any]]:
    """Every measurement of a preset, cheap ones first."""
    from experiments.large_depth.checks import CHECKS

    found: list[dict[str, Any]] = [{"part": "check", "what": what} for what in CHECKS]
    found += [{"part": "paths", "H": hurst} for hurst in SHOWN_PATHS]
    found += [
        {"part": "order", "limit": limit, "block": block, "first": 0, "nets": sizes.order_nets}
        for limit, block in LIMITS
    ]
    found += [{"part": "chain", "L": sizes.chain_depth, "d": sizes.chain_width}]
    found += [{"part": "growth", "L": depth, "d": sizes.width} for depth in sizes.growth_depths]
    found += [
        {"part": "iid", "L": depth, **group}
        for depth in sizes.depths
        for group in _groups(sizes.nets, sizes.together)
    ]
    found += [
        {"part": "smooth", "variant": variant, "L": depth, **group}
        for depth in sizes.smooth_depths
        for variant in VARIANTS
        for group in _groups(sizes.smooth_nets, sizes.together)
    ]
    per_net = 2 * sizes.law_width**2 * sizes.law_depth
    law = _groups(sizes.law_nets, max(1, int(_LARGEST / per_net)))
    found += [
        {"part": "law", "L": sizes.law_depth, "d": sizes.law_width, **group} for group in law
    ]  # fmt: skip
    found += [
        {"part": "regularity", "init": init, "beta": beta, "seed": seed}
        for init, beta in REGULAR
        for seed in range(seeds)
    ]
    found += [
        {"part": "map", "block": block, "H": hurst, "first": 0, "nets": sizes.map_nets}
        for block in BLOCKS
        for hurst in sizes.map_hursts
    ]
    count = sizes.hursts_together
    found += [
        {"part": "accuracy", "H": list(sizes.train_hursts[first : first + count]), "seed": seed}
        for seed in range(seeds)
        for first in range(0, len(sizes.train_hursts), count)
    ]
    return found


def _groups(nets: int, together: int) -> list[dict[str, int]]:
    return [
        {"first": first, "nets": min(together, nets - first)} for first in range(0, nets, together)
    ]


def _cost(cell: Mapping[str, Any], sizes: Sizes) -> float:
    """Seconds on one core, about."""
    kind, nets = cell["part"], float(cell.get("nets", 1))
    if kind in ("iid", "smooth"):
        faster = 1.0 if kind == "iid" else 0.7
        return 1.7e-4 * faster * float(cell["L"]) * (1 + nets / 4) * (sizes.width / 40) ** 2
    if kind == "growth":
        return 2e-7 * sizes.growth_nets * float(cell["L"])
    if kind == "law":
        return 4e-8 * nets * sizes.law_depth * sizes.law_width**2
    if kind == "map":
        columns = len(sizes.map_betas) * sizes.map_inputs
        per_net = (sizes.width / 40) ** 2 * (0.1 + columns / 600)
        return 1e-3 * sizes.map_depth * nets * per_net * (1 if cell["block"] == "res-3" else 0.5)
    if kind in ("regularity", "accuracy"):
        lanes, epochs, depth = 1.0, sizes.regularity_epochs, sizes.regularity_depth
        if kind == "accuracy":
            lanes = float(len(cell["H"]) * len(sizes.train_betas) * len(sizes.train_rates))
            epochs, depth = sizes.train_epochs, sizes.train_depth
        batches = math.ceil((sizes.samples or 1500) / sizes.batch) * epochs
        per_layer = 1.2e-4 + 1.2e-5 * lanes * (sizes.train_width / 12) ** 2 * sizes.batch / 128
        return batches * depth * per_layer
    if kind == "chain":
        return 2e-7 * sizes.chain_nets * sizes.chain_depth
    return 0.5 if kind == "order" else 0.1


def run(options: Options) -> list[Verdict]:
    """Measure, write tables and figures, decide."""
    from experiments.large_depth import figures, tables, verdicts
    from experiments.large_depth.laboratory import Laboratory

    sizes = PRESETS[options.preset]
    laboratory = Laboratory(options.dataset, sizes, options.device)
    measured = measure_cells(
        options, cells(sizes, options.seeds), laboratory.measure, title=NAME,
        cost=lambda cell: _cost(cell, sizes),
    )  # fmt: skip
    context = {
        "sizes": sizes,
        "data": options.dataset.name,
        "commonest": commonest_share(laboratory.split[3].tolist()),
    }
    decided = verdicts.decide_claims(measured, context)
    tables.write(options.out, measured, context)
    figures.draw(options.out, measured, context, decided)
    return decided


def commonest_share(labels: Sequence[int]) -> float:
    """Accuracy of always guessing the class that is most frequent among these."""
    return max(labels.count(label) for label in set(labels)) / len(labels)
