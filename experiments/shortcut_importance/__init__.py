"""Why a shortcut in the filter helps: loss, critical points, basins, and success rates.

Run it with ``python -m experiments shortcut_importance``. It uses no data: inputs are Gaussian, and
the loss over all of them is known in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.claims import Claim, Verdict
from experiments.registry import Options, Preset
from experiments.shortcut_importance.setting import (
    CNN,
    COLD,
    LARGE,
    LARGE_SUM,
    PRIOR,
    SHORT,
    STRESS,
    UNIT,
    WARM,
)
from experiments.shortcut_importance.statements import CLAIMS
from experiments.sweep import measure_cells

NAME = "shortcut_importance"
USES_DATA = False
TITLE = "A shortcut and a step-size warm-up against spurious optima of a two-layer net"
PAPER = (
    "T. Liu, M. Chen, M. Zhou, S. Du, E. Zhou, T. Zhao, Towards Understanding the Importance of "
    "Shortcut Connections in Residual Networks, arXiv:1909.04653 (NeurIPS 2019)"
)


@dataclass(frozen=True, kw_only=True)
class Sizes(Preset):
    """What is swept. ``seeds`` is the number of random starts for each success rate.

    Parameters
    ----------
    filter_size : int
        ``p``.
    patches : tuple of int
        ``k``, ascending.
    max_steps : int
        Descents that are not decided by then are open.
    ratios : tuple of float
        ``(1^T a*)^2`` of the teachers whose critical points are looked at, over the threshold.
    monte_carlo_samples : int
        Inputs on which loss and gradients are compared with the closed forms.
    vectors : int
        Nets that run as vectors, for comparisons with three numbers each.
    vector_steps : int
        Their steps where the two are compared.
    arrival : int
        In ``k^2`` steps after the warm-up, where it is seen at which optimum they arrive.
    start_sizes, start_shares : tuple of float
        ``|a*|^2 / k`` and ``r`` of the teachers to which starts all over the ball are given.
    start_patches : tuple of int
    start_points : int
        So many starts across the ball.
    edge_shares : tuple of float
    edge_patches : tuple of int
        ``r`` and ``k`` of the teachers whose range of first angles is looked for.
    edge_offsets : tuple of float
        First angles beside the predicted limit, over pi, ascending.
    edge_seeds : int
        Random starts at each of these angles.
    below_angles : tuple of float
        First angles below a right one, over pi, ascending; the teachers are those of the edge.
    below_sizes : tuple of float
        ``|a*|^2 / k`` there.
    below_seeds : int
        Random starts at each of these angles.
    rate_patches : tuple of int
        ``k`` of the nets whose convergence is followed.
    followed : int
        How many of each are followed.
    plain_seeds, plain_steps : int
        Nets without normalisation, and their steps.
    sample_seeds, sample_group : int
        Nets trained on samples, and how many of them make a cell: what a killed run may lose.
    samples, sample_steps : int
        Samples of each, and steps after those of a warm-up.
    """

    filter_size: int
    patches: tuple[int, ...]
    max_steps: int
    ratios: tuple[float, ...]
    monte_carlo_samples: int
    vectors: int
    vector_steps: int
    arrival: int
    start_sizes: tuple[float, ...]
    start_shares: tuple[float, ...]
    start_patches: tuple[int, ...]
    start_points: int
    edge_shares: tuple[float, ...]
    edge_patches: tuple[int, ...]
    edge_offsets: tuple[float, ...]
    edge_seeds: int
    below_angles: tuple[float, ...]
    below_sizes: tuple[float, ...]
    below_seeds: int
    rate_patches: tuple[int, ...]
    followed: int
    plain_seeds: int
    plain_steps: int
    sample_seeds: int
    sample_group: int
    samples: int
    sample_steps: int


# Not symmetric: an edge in the middle between two of them is not the predicted one.
_OFFSETS = (
    -0.3, -0.2, -0.1, -0.05, -0.02, -0.01, -0.007, -0.004, -0.001, 0.002, 0.005, 0.008, 0.012,
    0.02, 0.05, 0.1,
)  # fmt: skip
_BELOW = (0.2, 0.3, 1 / 3, 0.4, 0.45, 0.48, 0.49, 0.499, 0.4995)
PRESETS = {
    "quick": Sizes(
        summary="k = 16 ... 100, 10,000 starts for each rate; one and a half minutes on two cores",
        seeds=10_000,
        filter_size=8,
        patches=(16, 25, 36, 49, 64, 81, 100),
        max_steps=30_000,
        ratios=(0.2, 0.5, 0.8, 0.95, 1.1, 1.4, 2.0),
        monte_carlo_samples=1_200_000,
        vectors=60,
        vector_steps=2000,
        arrival=25,
        start_sizes=(1 / 16, 1.0, 16.0, 64.0),
        start_shares=(0.01, 0.1, 0.3),
        start_patches=(16, 64),
        start_points=21,
        edge_shares=(1 / 256, 0.05, 0.2),
        edge_patches=(16, 25, 36),
        edge_offsets=_OFFSETS,
        edge_seeds=100,
        below_angles=_BELOW,
        below_sizes=(1.0, 64.0),
        below_seeds=200,
        rate_patches=(16, 25),
        followed=200,
        plain_seeds=200,
        plain_steps=25_000,
        sample_seeds=20,
        sample_group=5,
        samples=1000,
        sample_steps=240,
    ),
    "paper": Sizes(
        summary="100,000 starts for each rate, 100 trainings on 3000 samples each; about "
        "twenty minutes on two cores",
        seeds=100_000,
        filter_size=8,
        patches=(16, 25, 36, 49, 64, 81, 100),
        max_steps=110_000,
        ratios=(0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.01, 1.1, 1.25, 1.5, 2.0, 2.5),
        monte_carlo_samples=8_000_000,
        vectors=200,
        vector_steps=2000,
        arrival=25,
        start_sizes=(1 / 16, 1.0, 16.0, 64.0),
        start_shares=(0.01, 0.1, 0.3),
        start_patches=(16, 64),
        start_points=41,
        edge_shares=(1 / 256, 0.05, 0.2),
        edge_patches=(16, 25, 36, 49, 64, 81, 100),
        edge_offsets=_OFFSETS,
        edge_seeds=1000,
        below_angles=_BELOW,
        below_sizes=(1.0, 64.0),
        below_seeds=2000,
        rate_patches=(16, 25, 36, 64),
        followed=1000,
        plain_seeds=1000,
        plain_steps=25_000,
        sample_seeds=100,
        sample_group=5,
        samples=3000,
        sample_steps=440,
    ),
}
# So many starts of a rate make a cell: what a killed run may lose.
TOGETHER = 10_000
# Descents that are shown step by step.
SHOWN = 12


def claims() -> Sequence[Claim]:
    """What is tested, see ``statements``."""
    return CLAIMS


def cells(sizes: Sizes, seeds: int) -> list[dict[str, Any]]:
    """Every measurement of a preset, cheap ones first."""
    patches, first = list(sizes.patches), sizes.patches[0]
    vectors = min(sizes.vectors, seeds)
    found: list[dict[str, Any]] = [
        {"part": "gradients", "k": 5, "normalised": normalised} for normalised in (True, False)
    ]
    found += [
        {"part": "monte-carlo", "p": 6, "k": 5, "normalised": normalised,
         "samples": sizes.monte_carlo_samples}
        for normalised in (True, False)
    ]  # fmt: skip
    found += [{"part": "crossing", "k": k} for k in patches]
    found += [
        {"part": "critical", "k": k, "ratio": ratio} for k in patches for ratio in sizes.ratios
    ]
    found += [
        {"part": part, "teacher": LARGE.name, "method": method.name, "k": k, "seeds": vectors,
         "steps": steps}
        for part, some, steps in (
            ("reduction", patches[:2], sizes.vector_steps),
            ("fates", [first], sizes.arrival * first**2),
        )
        for k in some
        for method in (WARM, COLD, CNN)
    ]  # fmt: skip
    found += [
        {"part": "time", "method": WARM.name, "share": share, "patches": patches}
        for share in sizes.start_shares
    ]
    found += [
        {"part": "edge", "method": WARM.name, "share": share, "patches": list(sizes.edge_patches),
         "offsets": list(sizes.edge_offsets), "seeds": min(sizes.edge_seeds, seeds)}
        for share in sizes.edge_shares
    ]  # fmt: skip
    found += [
        {"part": "below", "method": WARM.name, "size": size, "shares": list(sizes.edge_shares),
         "patches": list(sizes.edge_patches), "angles": list(sizes.below_angles),
         "seeds": min(sizes.below_seeds, seeds)}
        for size in sizes.below_sizes
    ]  # fmt: skip
    found += [
        {"part": "follow", "teacher": teacher.name, "method": method.name, "k": k,
         "seeds": min(sizes.followed, seeds), "shown": SHOWN, "length": length}
        for teacher, method, k, length in (
            *((t, method, first, 20) for t in (LARGE, LARGE_SUM) for method in (WARM, COLD, CNN)),
            # Long enough for the rates of convergence.
            *((UNIT, WARM, k, 40) for k in sizes.rate_patches),
        )
    ]  # fmt: skip
    found.append(
        {"part": "plain", "methods": [COLD.name, CNN.name], "k": first,
         "squared_norms": [1, first**2, 64 * first], "seeds": min(sizes.plain_seeds, seeds),
         "steps": sizes.plain_steps}
    )  # fmt: skip
    found += [
        {"part": "starts", "method": method.name, "sizes": list(sizes.start_sizes),
         "shares": list(sizes.start_shares), "patches": list(sizes.start_patches),
         "points": sizes.start_points}
        for method in (WARM, SHORT, COLD)
    ]  # fmt: skip
    total = min(sizes.sample_seeds, seeds)
    found += [
        {"part": "samples", "method": method.name, "k": first, "squared_norm": 4,
         "samples": sizes.samples, "steps": sizes.sample_steps, "first": start,
         "seeds": min(sizes.sample_group, total - start)}
        for method in (WARM, CNN)
        for start in range(0, total, sizes.sample_group)
    ]  # fmt: skip
    found += [
        {"part": "rates", "teacher": teacher.name, "method": method.name, "patches": patches,
         "first": start, "seeds": min(TOGETHER, seeds - start)}
        for teacher in (*PRIOR, *STRESS)
        for method in (WARM, SHORT, COLD, CNN)
        for start in range(0, seeds, TOGETHER)
        # Without a shortcut there is no first angle.
        if not (teacher in STRESS and method is CNN)
    ]  # fmt: skip
    return found


def _cost(cell: Mapping[str, Any], sizes: Sizes) -> float:
    """Seconds on two cores, about."""
    part = cell["part"]
    if part == "rates":
        share = {WARM.name: 0.5, SHORT.name: 1.0, COLD.name: 2.0, CNN.name: 5.0}[cell["method"]]
        return share * float(cell["seeds"]) / 1e4
    if part == "samples":
        return 2e-8 * float(cell["seeds"] * cell["samples"] * cell["steps"] * cell["k"])
    if part in ("plain", "fates", "reduction"):
        return 1e-4 * float(cell["steps"])
    if part == "monte-carlo":
        return 2e-6 * sizes.monte_carlo_samples
    return {"follow": 1.0, "edge": 2.0, "below": 4.0, "starts": 1.0}.get(part, 0.15)


def run(options: Options) -> list[Verdict]:
    """Measure, write tables and figures, decide."""
    from experiments.shortcut_importance import figures, tables, verdicts
    from experiments.shortcut_importance.laboratory import Laboratory

    sizes = PRESETS[options.preset]
    laboratory = Laboratory(sizes, options.device)
    measured = measure_cells(
        options, cells(sizes, options.seeds), laboratory.measure, title=NAME,
        cost=lambda cell: _cost(cell, sizes), uses_data=False,
    )  # fmt: skip
    decided = verdicts.decide_claims(measured)
    tables.write(options.out, measured)
    figures.draw(options.out, measured, decided)
    return decided
