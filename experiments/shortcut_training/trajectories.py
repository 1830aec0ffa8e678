"""Nets followed through their training: where they are, and the spectrum of the Hessian there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conditioning import HessianOperator, full_spectrum
from experiments.models import ShortcutNet, half_mean_squared_error
from experiments.shortcut_training.descent import Objective, unstack

# Of κ₁₀ and of the index: eigenvalues below this share of the largest count as zero.
ZERO_RTOL = 1e-12
_STEPS_BETWEEN_CHECKS = 100


@dataclass(frozen=True, eq=False)
class Path:
    """A training, step by step.

    Parameters
    ----------
    losses : ndarray of shape (steps,)
        Above the least value, at the beginning of each step.
    gradients : ndarray of shape (steps,)
        Norm of the gradient there.
    weights : sequence of Tensor
        Weights ``(R, n, d, d)`` there.
    """

    losses: NDArray[np.float64]
    gradients: NDArray[np.float64]
    weights: Sequence[Tensor]


def follow(
    objective: Objective, weights: Tensor, rate: float, max_steps: int, until: float
) -> list[Path]:
    """Train nets by gradient descent and keep every step: ``8 n`` bytes a step and net.

    Parameters
    ----------
    objective : Objective
    weights : Tensor of shape (n, R, lanes, d, d)
        Transposed, see :func:`~experiments.shortcut_training.descent.stack`; left as it is.
    rate : float
        Learning rate.
    max_steps : int
    until : float
        A net's path ends where its loss above the least value is no larger, at the latest after
        ``max_steps``, or where its loss is not finite.
    """
    weights = weights.clone()
    ones = weights.new_ones(weights.shape[2])
    losses, gradients, kept = [], [], []
    for step in range(max_steps + 1):
        loss, gradient = objective(weights, ones)
        losses.append(loss)
        gradients.append(gradient.square().sum((0, 1, 3, 4)).sqrt())
        kept.append(weights.clone())
        if step % _STEPS_BETWEEN_CHECKS == 0 and not bool((loss > until).any()):
            break
        weights -= rate * gradient
    rows = torch.stack(losses).cpu().numpy(), torch.stack(gradients).cpu().numpy()
    found = []
    for lane in range(weights.shape[2]):
        values, norms = rows[0][:, lane], rows[1][:, lane]
        count = min(_first(values <= until) + 1, _first(~np.isfinite(values)), len(values))
        path = [unstack(at[:, :, lane : lane + 1])[0] for at in kept[:count]]
        found.append(Path(values[:count], norms[:count], path))
    return found


def _first(condition: NDArray[np.bool_]) -> int:
    """Index of the first true entry, or the length if there is none."""
    return int(condition.argmax()) if condition.any() else len(condition)


def at_levels(losses: NDArray[np.float64], levels: Sequence[float]) -> list[int]:
    """The first step, and for each level the first step at or below it, if there is one."""
    firsts = [_first(losses <= level) for level in levels]
    return sorted({0, *(step for step in firsts if step < len(losses))})


def around(losses: NDArray[np.float64], level: float, count: int) -> list[int]:
    """``count`` steps from 3/4 to 5/4 of the time at which a level is reached."""
    centre = _first(losses <= level)
    if count == 0 or centre == len(losses):
        return []
    steps = np.linspace(0.75 * centre, min(1.25 * centre, len(losses) - 1), count)
    return sorted({round(float(step)) for step in steps})


def hessian_record(
    net: ShortcutNet, weights: Tensor, samples: tuple[Tensor, Tensor]
) -> Mapping[str, Any]:
    """The spectrum of the Hessian at some weights, in the numbers that the paper follows.

    Parameters
    ----------
    net : ShortcutNet
        Its weights are replaced.
    weights : Tensor of shape (R, n, d, d)
    samples : tuple of Tensor
        Inputs and targets; a few with the moments of all do for a linear net.

    Returns
    -------
    mapping
        ``n``, the number of eigenvalues; with their enclosures ``kappa10`` (a condition number),
        ``largest`` and ``tenth`` (largest and 10th percentile of ``|λ|``) and ``index``;
        ``negative``, the most negative eigenvalue, as near as ``largest``.
    """
    with torch.no_grad():
        for parameter, weight in zip(net.parameters(), weights.flatten(0, 1), strict=True):
            parameter.copy_(weight)
    hessian = HessianOperator(net, half_mean_squared_error, samples, check=False)
    # Which is faster is not timed: equal runs are to give equal digits.
    hessian.block_engine = "batched"
    spectrum = full_spectrum(hessian)
    kappa10 = spectrum.condition_number(ZERO_RTOL, percentile=10)
    return {
        "n": hessian.shape[0],
        "kappa10": kappa10.to_dict(),
        "largest": kappa10.largest.to_dict(),
        "tenth": kappa10.smallest.to_dict(),
        "negative": float(spectrum.values[0]),
        "index": spectrum.index(ZERO_RTOL).to_dict(),
    }
