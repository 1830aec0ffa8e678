"""Hessian and Gauss-Newton matrix: one survey each, within a share of the budget."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conditioning.checkup.clock import Clock
from conditioning.checkup.readings import DensityCurve, Missing, SpectrumReading, StepSize
from conditioning.errors import ConditioningError, ConditioningWarning
from conditioning.jacobi import Array
from conditioning.operators import GaussNewtonOperator, HessianOperator
from conditioning.operators.losses import LossOperator
from conditioning.spectrum import Estimate, SpectrumSurvey, survey
from conditioning.spectrum.common import dense_fits

_FEWEST = 12  # products of the smallest survey
_MOST = 2000
_BLOCK = 16
_CURVE = 400  # points of a density that are kept
# Seconds of a dense eigensolver per cube of rows, on one slow core: for the plan only.
_EIGH = 4e-10


@dataclass(frozen=True)
class Surveyed:
    """A spectrum, or why there is none."""

    reading: SpectrumReading | None
    missing: list[Missing]
    notes: list[str]
    interrupted: bool = False


def read_spectrum(
    kind: type[LossOperator],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    clock: Clock,
    share: float,
    seed: int,
) -> Surveyed:
    """Survey the spectrum of one operator.

    Parameters
    ----------
    kind : HessianOperator or GaussNewtonOperator
    arguments, options
        For it.
    clock : Clock
    share : float
        Of what is left of the budget.
    seed : int

    Returns
    -------
    Surveyed
    """
    name = "Hessian" if kind is HessianOperator else "Gauss-Newton"
    notes: list[str] = []
    begin = time.monotonic()
    end = clock.deadline(share)
    with clock.stage(name, unit=" products") as bar:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConditioningWarning)
                operator = kind(*arguments, **options)
            notes += [str(warning.message) for warning in caught]
            room, dense = _plan(operator, clock, share)
            bar.total = room
            found = survey(
                operator, room, dense=dense, seed=seed, should_stop=end, progress=bar.update
            )
        except ConditioningError as error:
            return Surveyed(None, [Missing(f"spectrum of the {name} matrix", str(error))], notes)
        except torch.OutOfMemoryError as error:
            reason = f"out of memory ({str(error).splitlines()[0]}): pass a smaller batch"
            return Surveyed(None, [Missing(f"spectrum of the {name} matrix", reason)], notes)
    clock.num_matvecs += operator.num_matvecs
    reading = _reading(name, found, time.monotonic() - begin)
    return Surveyed(reading, _uncertain(reading), notes, found.interrupted)


def _plan(operator: LossOperator, clock: Clock, share: float) -> tuple[int, bool]:
    """How many products there is room for, and whether all eigenvalues are."""
    size = operator.shape[0]
    # The operator's own checks count.
    limit = max(clock.matvecs_left(share) - operator.num_matvecs, _FEWEST)
    seconds = clock.seconds_left(share)
    if math.isinf(seconds):
        dense = size <= limit and dense_fits(operator)
        return max(size if dense else min(limit, _MOST), _FEWEST), dense
    generator = torch.Generator(device=operator.device).manual_seed(0)
    block = torch.randn(
        size, min(_BLOCK, size), generator=generator, device=operator.device, dtype=torch.float64
    )
    # The first product warms up.
    single = min(_timed(operator, block[:, 0]), _timed(operator, block[:, 0]))
    limit = max(limit - 2, _FEWEST)
    room = min(int(seconds / max(1.3 * single, 1e-6)), _MOST, limit)
    if size > 1 and size + 2 * block.shape[1] <= limit and dense_fits(operator):
        # The first block also finds out which engine is the faster one.
        together = min(_timed(operator, block), _timed(operator, block)) / block.shape[1]
        whole = size * together + _EIGH * size**3
        if whole <= seconds / 2:
            return max(size, _FEWEST), True
        room = min(room, limit - 2 * block.shape[1])
    # Products are most of the cost of a step, reorthogonalisation is the rest.
    return max(room, _FEWEST), False


def _timed(operator: LossOperator, vectors: torch.Tensor) -> float:
    begin = time.monotonic()
    result = operator @ vectors.to(operator.dtype)
    result.flatten()[0].item()  # waits for the device
    return time.monotonic() - begin


def _reading(name: str, found: SpectrumSurvey, seconds: float) -> SpectrumReading:
    nodes, weights = _thinned(found.nodes, found.weights)
    status = "estimated" if found.num_probes else "exact"
    return SpectrumReading(
        name, found.size, found.largest, found.smallest, found.condition, found.condition10,
        found.index, found.trace,
        DensityCurve(
            nodes, weights, {f"{q:g}": e for q, e in found.quantiles.items()}, status,
            found.message,
        ),
        found.num_matvecs, seconds, found.message,
    )  # fmt: skip


def _thinned(nodes: Array, weights: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Neighbours put together, at their centre of mass, where there are many; both ends stay."""
    if len(nodes) > _CURVE:
        groups = np.array_split(np.arange(1, len(nodes) - 1), _CURVE - 2)
        groups = [np.array([0]), *groups, np.array([len(nodes) - 1])]
        masses = np.array([weights[group].sum() for group in groups])
        # Gauss weights far out may be zero to rounding.
        floor = np.finfo(np.float64).tiny
        centres = [np.average(nodes[group], weights=weights[group] + floor) for group in groups]
        nodes, weights = np.array(centres), masses
    return tuple(map(float, nodes)), tuple(map(float, weights))


def _uncertain(reading: SpectrumReading) -> list[Missing]:
    """What the survey could not measure or enclose."""
    missing = []
    if math.isnan(reading.trace.value):
        reason = f"{reading.num_matvecs} products were not enough for it: give more seconds"
        missing.append(Missing(f"trace of the {reading.matrix} matrix", reason))
    for what, found in (
        ("condition number", reading.condition),
        ("10th-percentile condition number", reading.condition10),
    ):
        if found.status not in ("exact", "exhausted", "certified"):
            missing.append(
                Missing(f"{what} of the {reading.matrix} matrix ({found.status})", found.message)
            )
        elif found.high / found.low > 2:
            missing.append(
                Missing(
                    f"{what} of the {reading.matrix} matrix to less than a factor of 2",
                    f"known to lie in [{found.low:.4g}, {found.high:.4g}]; more products would "
                    f"narrow it",
                )
            )
    return missing


def step_size(hessian: SpectrumReading, learning_rate: float | None, momentum: float) -> StepSize:
    """The largest stable step of gradient descent, and the given one over it."""
    factor = 2 * (1 + momentum)

    def over(value: float) -> float:
        return factor / value if value > 0 else math.inf

    top = hessian.largest
    stable = Estimate(over(top.value), over(top.high), over(top.low))
    quotient = None
    if learning_rate is not None:
        quotient = Estimate(
            *(max(learning_rate * end / factor, 0.0) for end in (top.value, top.low, top.high))
        )
    return StepSize(stable, learning_rate, momentum, quotient)


__all__ = ["GaussNewtonOperator", "HessianOperator", "read_spectrum", "step_size"]
