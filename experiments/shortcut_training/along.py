"""What the spectra along a training say at given losses: interpolated between those taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.readings import number
from experiments.sweep import Pair, parts

Record = Mapping[str, Any]
# A net with shortcuts starts within this of the loss of the identity map.
_SLACK = 1.01


def kappa10(record: Record) -> float:
    """κ₁₀; its certain lower bound where it is not resolved."""
    found = record["kappa10"]
    value = number(found["value"])
    return value if np.isfinite(value) else number(found["low"])


def index(record: Record) -> float:
    """Fraction of negative eigenvalues."""
    return float(record["index"]["value"])


def paths(measured: Sequence[Pair], net: str, depth: int) -> list[Mapping[str, Any]]:
    """The trainings of a net at a depth, one for each seed."""
    return [p for _, result in parts(measured, "path", net=net, L=depth) for p in result["paths"]]


def at_loss(
    path: Mapping[str, Any], level: float, value: Callable[[Record], float], *, log: bool = True
) -> float:
    """A value where the loss comes down to a level; NaN if it does not.

    Straight lines in the logarithm of the loss, between the logarithms of the values with ``log``.
    """
    losses = np.array([record["loss"] for record in path["records"]])
    if not losses.min() <= level <= losses[0] * _SLACK:
        return float("nan")
    values = np.array([value(record) for record in path["records"]])
    # Spectra are taken where the loss first comes down to a level, so losses decrease but for ties.
    order = np.argsort(losses, kind="stable")
    values = np.log(values) if log else values
    found = float(np.interp(np.log(level), np.log(losses[order]), values[order]))
    return float(np.exp(found)) if log else found


def at_level(
    found: Sequence[Mapping[str, Any]],
    level: float,
    value: Callable[[Record], float],
    *,
    log: bool = True,
) -> list[float]:
    """The same for several trainings; NaN for those that do not come down to the level."""
    return [at_loss(path, level, value, log=log) for path in found]


def half_drop(path: Mapping[str, Any]) -> float:
    """Step at which the index has done half of its drop, interpolated between the spectra."""
    steps = np.array([record["step"] for record in path["records"]], dtype=float)
    values: NDArray[np.float64] = np.array([index(record) for record in path["records"]])
    half = (values[0] + values.min()) / 2
    after = int((values <= half).argmax())
    if after == 0 or values[0] == values.min():
        return float("nan")
    before = after - 1
    share = (values[before] - half) / (values[before] - values[after])
    return float(steps[before] + share * (steps[after] - steps[before]))
