"""Measured cells as arrays over depths, factors and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from experiments.claims import Measured, over_runs
from experiments.readings import slope
from experiments.sweep import Pair, parts
from experiments.tau_scaling.laboratory import DESCENDING, MULTIPLIED
from experiments.tau_scaling.rules import RULES

Array = NDArray[np.float64]
# Below this depth effects of order 1/√L show: at 1/√L the law at large width lies 0.06 below its
# limit in ln|h| at L = 30, and 0.03 here.
LEAST = 100
# A value for each seed at each depth.
Curves = dict[int, Array]


def norms(measured: Sequence[Pair], quantity: str, rule: str) -> Curves:
    """A logarithm of ``chain.norms_through`` at each depth, of all seeds."""
    place = list(RULES).index(rule)
    found: dict[int, list[Array]] = {}
    for cell, result in parts(measured, "norms"):
        found.setdefault(cell["L"], []).append(np.asarray(result[quantity], float)[place])
    return {depth: np.concatenate(rows) for depth, rows in sorted(found.items())}


def spread(measured: Sequence[Pair], rule: str) -> Curves:
    """Logarithm of the ratio of the largest to the smallest gradient of a block."""
    high, low = (norms(measured, name, rule) for name in ("steepest", "flattest"))
    return {depth: high[depth] - low[depth] for depth in high}


def spectral_norms(measured: Sequence[Pair], rule: str, end: str = "value") -> Curves:
    """Logarithms of the spectral norm of the product, or of an end of its enclosure."""
    assert rule in MULTIPLIED
    found: dict[int, list[float]] = {}
    for cell, result in parts(measured, "product"):
        found.setdefault(cell["L"], []).append(float(result["spectral_norm"][rule][end]))
    return {depth: np.log(np.asarray(rows)) for depth, rows in sorted(found.items())}


def losses(measured: Sequence[Pair], part: str, rule: str) -> dict[int, Array]:
    """Losses along descents at each depth, (steps, seeds)."""
    place = DESCENDING.index(rule)
    return {
        cell["L"]: np.asarray(result["losses"], float)[:, place]
        for cell, result in parts(measured, part)
    }


def last_losses(measured: Sequence[Pair], part: str, rule: str) -> Curves:
    """Means over the last tenth of the steps, of all seeds."""
    return {
        depth: rows[-max(len(rows) // 10, 1) :].mean(0)
        for depth, rows in losses(measured, part, rule).items()
    }


def steps_to(rows: Array, level: float) -> Array:
    """First step at which a loss is below a level, for each seed; infinite where none is."""
    below = rows <= level
    return np.where(below.any(0), below.argmax(0), np.inf)


def slopes(curves: Curves, run: str, *, least: int = LEAST, log: bool = False) -> Measured:
    """Slope over the logarithm of the depth, one for each seed."""
    depths = [depth for depth in curves if depth >= least]
    count = min((len(curves[depth]) for depth in depths), default=0)
    found = [
        slope(
            {depth: float(curves[depth][seed]) for depth in depths},
            lambda depth: float(np.log(depth)),
            _log if log else float,
        )
        for seed in range(count)
    ]
    return over_runs(found, run=f"{run}, L = {min(depths)} ... {max(depths)}" if depths else run)


def _log(value: float) -> float:
    return float(np.log(value)) if value > 0 else float("nan")
