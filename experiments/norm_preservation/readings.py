"""Numbers of measured cells: which cells, their values over depth, and over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from conditioning.theory import depth_rate
from experiments.claims import Claim, Measured, Verdict, decide, log, over_runs
from experiments.norm_preservation.statements import CLAIMS
from experiments.readings import Curve, slope
from experiments.sweep import Pair

BY_ID = {claim.id: claim for claim in CLAIMS}
# At L = 2 the first block, which obeys no law, is half of the net.
FIRST_DEPTH = 4


def curves(
    cells: Iterable[Pair], value: Callable[[Mapping[str, Any]], float], key: str = "L"
) -> dict[int, dict[int, float]]:
    """For each seed a value at each depth."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for cell, result in cells:
        found[cell["seed"]][cell[key]] = value(result)
    return dict(found)


def rate_exponent(curve: Curve) -> float:
    """Exponent of a value in powers of ``log(2L)/L``."""
    return slope(curve, lambda depth: math.log(depth_rate(depth)), log)


def depths_of(by_seed: Mapping[int, Curve]) -> str:
    """The range of depths, for a reader."""
    depths = sorted({depth for curve in by_seed.values() for depth in curve})
    return f"L = {depths[0]} ... {depths[-1]}" if depths else ""


def decide_over_seeds(
    claim: Claim, by_seed: Mapping[int, Curve], value: Callable[[Curve], float], note: str = ""
) -> Verdict:
    """Decide a claim about a number that each seed's curve has."""
    found = [value(curve) for curve in by_seed.values()]
    return decide(claim, over_runs(found, run=f"all seeds, {depths_of(by_seed)}"), note=note)


def means(by_seed: Mapping[int, Curve], key: str = "L", label: str = "") -> list[Measured]:
    """At each depth the mean over seeds."""
    depths = sorted({depth for curve in by_seed.values() for depth in curve})
    return [
        over_runs([c[depth] for c in by_seed.values() if depth in c], run=f"{label}{key}={depth}")
        for depth in depths
    ]


def constants(curve: Curve) -> dict[int, float]:
    """Mean deviations as multiples of ``log(2L)/L``."""
    return {depth: value / depth_rate(depth) for depth, value in curve.items()}
