"""Hessian conditioning at zero for shortcuts of depth 1, 2, 3: Demystifying ResNet.

Run it with ``python -m experiments shortcut_depth``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.claims import Claim, Verdict
from experiments.moments import Moments, principal_moments
from experiments.registry import Options, Preset
from experiments.shortcut_depth.statements import CLAIMS
from experiments.sweep import measure_cells

NAME = "shortcut_depth"
TITLE = "Hessian conditioning at zero for shortcut depths 1, 2, 3"
PAPER = (
    "S. Li, J. Jiao, Y. Han, T. Weissman, Demystifying ResNet, arXiv:1611.01186 (2016), "
    "main theorem and figure 5"
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Preset):
    """What is swept."""

    two: tuple[int, ...]
    one: tuple[int, ...]
    initialisation: tuple[int, ...]
    smooth: tuple[int, ...]


PRESETS = {
    "quick": Sizes(
        summary="L up to 1024 at depth 2, up to 32 elsewhere, 3 seeds; a minute or two",
        seeds=3,
        two=(2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        one=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
        initialisation=(2, 4, 8, 16, 32),
        smooth=(1, 2),
    ),
    "paper": Sizes(
        summary="MNIST and 10 seeds, as in the paper; some minutes and a download",
        data="mnist",
        seeds=10,
        two=(2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        one=(1, 2, 3, 4, 5, 6, 8, 11, 12, 16, 24, 32),
        initialisation=(2, 4, 8, 16, 32),
        smooth=(1, 2, 4),
    ),
}
ACTIVATIONS = ("tanh", "gelu", "shifted_sigmoid", "shifted_softplus")
PLACES = ("pre", "mid", "post")


def claims() -> Sequence[Claim]:
    """What is tested, see ``statements``."""
    return CLAIMS


def cells(sizes: Sizes, seeds: int) -> list[dict[str, Any]]:
    """Every measurement of a preset, cheap ones first."""
    some = range(seeds)
    found: list[dict[str, Any]] = [{"part": "two", "L": depth} for depth in sizes.two]
    found += [{"part": "one", "L": depth} for depth in sizes.one]
    for units in sizes.smooth:
        for name in ACTIVATIONS:
            found += [{"part": "smooth", "R": units, place: name} for place in PLACES]
            found.append({"part": "smooth", "R": units, **dict.fromkeys(PLACES, name)})
    found += [{"part": "smooth", "R": units, "mid": "sigmoid"} for units in (1, 2, 4)]
    found += [
        {"part": "high order", "n": n, "R": units, "activation": activation, "seed": seed}
        for n in (2, 3, 4)
        for units in (1, 8)
        for activation in ("linear", "tanh")
        for seed in some
    ]
    found += [{"part": "isotropic", "s": 0.6, "L": depth} for depth in (2, 4, 8, 16, 32)]
    found.append({"part": "isotropic", "s": 1.1, "L": 11})
    found += [{"part": "zero targets", "L": depth} for depth in (2, 4, 8, 16, 32)]
    found += [{"part": "rotation", "L": depth, "seed": s} for depth in (2, 4, 8) for s in some]
    found += [{"part": "relu", "R": units, "seed": seed} for units in (1, 2, 4) for seed in some]
    from experiments.shortcut_depth.laboratory import INITIALISATIONS

    found += [
        {"part": "initialisation", "net": net, "L": depth, "seed": seed}
        for depth in sizes.initialisation
        for net in INITIALISATIONS
        for seed in some
    ]
    return found


def _cost(cell: Mapping[str, Any]) -> float:
    """Seconds, about: the dense Hessian's eigenvalues, and products where it is too large."""
    length = float(cell.get("L", cell.get("R", 1) * cell.get("n", 2)))
    if cell["part"] == "two" and length > 32:
        return 0.2 + length / 120
    rows = 2.0 if cell["part"] in ("smooth", "relu") else 0.3
    return 0.2 + rows * (length / 8) + 1.8 * (length / 32) ** 2


def run(options: Options) -> list[Verdict]:
    """Measure, write tables and figures, decide."""
    from experiments.shortcut_depth import figures, verdicts
    from experiments.shortcut_depth.laboratory import Laboratory

    sizes = PRESETS[options.preset]
    components = options.dataset.num_classes  # D has to be square
    whitened = principal_moments(options.dataset, components)
    raw = principal_moments(options.dataset, components, whiten=False)
    laboratory = Laboratory(whitened, raw, options.device)
    todo = cells(sizes, options.seeds)
    measured = measure_cells(options, todo, laboratory.measure, title=NAME, cost=_cost)
    context = {
        "data": options.dataset.name,
        "dim": components,
        "singular_values": np.linalg.svd(whitened.difference.numpy(), compute_uv=False),
        "kappa_over_signs": _kappa_over_signs(whitened),
    }
    figures.write_tables(options.out, measured, context)
    figures.draw(options.out, measured, context)
    return verdicts.decide_claims(measured, context)


def _kappa_over_signs(moments: Moments) -> tuple[float, float]:
    """Least and largest κ(D) over the signs of the components, which are a convention."""
    dim = moments.inputs.shape[1]
    # All of them where they are few, else a fixed sample; flipping every sign is not the same.
    signs = list(itertools.product((1.0, -1.0), repeat=dim)) if dim <= 10 else []
    if not signs:
        signs = list(np.random.default_rng(0).choice([-1.0, 1.0], (1024, dim)))
    cross = moments.sigma_yx.numpy()
    # Whitened moments: Σ_XX stays the identity, Σ_YX has its columns flipped.
    flipped = moments.sigma_xx.numpy() - cross * np.asarray(signs)[:, None, :]
    kappas = np.linalg.cond(flipped)
    return float(kappas.min()), float(kappas.max())
