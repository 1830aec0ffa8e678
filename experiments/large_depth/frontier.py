"""Where nets stop being stable, measured and predicted, and where trained ones learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conditioning.theory import critical_beta
from experiments.sweep import Pair, parts

Array = NDArray[np.float64]


def crossing(betas: Sequence[float], logs: Sequence[float] | Array) -> float:
    """Where a curve over rising ``betas`` first falls below 0, linearly interpolated.

    NaN where it begins below 0, never gets there, or is not finite on the way.
    """
    values = np.asarray(logs, dtype=float)
    if np.isnan(values).any() or values[0] <= 0:
        return math.nan
    below = np.flatnonzero(values <= 0)
    if not len(below):
        return math.nan
    place = int(below[0])
    high, low = values[place - 1], values[place]
    share = high / (high - low) if math.isfinite(high) else math.nan
    return float(betas[place - 1] + share * (betas[place] - betas[place - 1]))


def crossings(
    measured: Sequence[Pair], betas: Sequence[float], block: str, key: str = "output"
) -> dict[float, list[float]]:
    """The critical beta of every net of a map, by H in rising order."""
    found: dict[float, list[float]] = {}
    for cell, result in parts(measured, "map", block=block):
        found.setdefault(cell["H"], []).extend(crossing(betas, row) for row in result[key])
    return dict(sorted(found.items()))


def mean_map(measured: Sequence[Pair], block: str, key: str) -> tuple[list[float], Array]:
    """Values of H, and mean decimal logarithms over nets of shape ``(H, betas)``."""
    rows: dict[float, list[Any]] = {}
    for cell, result in parts(measured, "map", block=block):
        rows.setdefault(cell["H"], []).extend(result[key])
    hursts = sorted(rows)
    return hursts, np.array([np.mean(np.asarray(rows[h], dtype=float), axis=0) for h in hursts])


def best_accuracies(measured: Sequence[Pair]) -> dict[int, dict[float, Array]]:
    """Test accuracies ``(betas,)`` by seed and H, at the rate of highest training accuracy."""
    found: dict[int, dict[float, Array]] = {}
    for cell, result in parts(measured, "accuracy"):
        train, test = (np.asarray(result[key], dtype=float) for key in ("train", "test"))
        best = train.argmax(-1)[..., None]
        chosen = np.take_along_axis(test, best, -1)[..., 0]
        found.setdefault(cell["seed"], {}).update(zip(cell["H"], chosen, strict=True))
    return {seed: dict(sorted(rows.items())) for seed, rows in sorted(found.items())}


def above_line(hursts: Sequence[float], betas: Sequence[float], depth: int) -> NDArray[np.bool_]:
    """Which cells of a map of res-1 nets lie above the predicted line, ``(H, betas)``."""
    line = np.array([critical_beta(depth, hurst, "res-1") for hurst in hursts])
    return np.asarray(np.asarray(betas)[None, :] > line[:, None])
