"""The best learning rate of each net at each depth, and what was reached with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.sweep import Pair, parts


@dataclass(frozen=True, eq=False)
class Sweep:
    """All learning rates and seeds of one net at one depth.

    Parameters
    ----------
    net : str
    depth : int
    rates : ndarray of shape (rates,)
        Increasing.
    losses, norms, shares : ndarray of shape (rates, seeds)
        Final loss, infinite where it diverged; mean Frobenius norm of the matrices; share of active
        units.
    """

    net: str
    depth: int
    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    norms: NDArray[np.float64]
    shares: NDArray[np.float64]

    @property
    def best(self) -> int:
        """Which learning rate has the least mean final loss; the least if all diverge."""
        return int(self.losses.mean(1).argmin())

    @property
    def rate(self) -> float:
        """The best learning rate; NaN if with each some seed diverges."""
        return float(self.rates[self.best]) if self.trains else float("nan")

    @property
    def best_range(self) -> tuple[float, float]:
        """First and last place in the grid of the best learning rate, if one seed is left out.

        Half a step farther on either side, since the best may lie between two; unbounded for a
        single seed, or where every rate diverges without one of them.
        """
        count = self.losses.shape[1]
        if count < 2 or not self.trains:
            return -np.inf, np.inf
        found = [self.best]
        for seed in range(count):
            means = np.delete(self.losses, seed, axis=1).mean(1)
            found.append(int(means.argmin()))
        return min(found) - 0.5, max(found) + 0.5

    @property
    def trains(self) -> bool:
        """Whether at some learning rate no seed diverges."""
        return bool(np.isfinite(self.losses.mean(1)).any())

    @property
    def edge(self) -> str:
        """``"lowest"`` or ``"highest"`` if the best learning rate is the first or last of the grid.

        A better one may then lie beyond.
        """
        if not self.trains:
            return ""
        return {0: "lowest", len(self.rates) - 1: "highest"}.get(self.best, "")

    @property
    def largest_finite(self) -> float:
        """The largest learning rate at which no seed diverges; NaN if there is none."""
        finite = np.isfinite(self.losses).all(1)
        return float(self.rates[finite][-1]) if finite.any() else float("nan")

    @property
    def final(self) -> NDArray[np.float64]:
        """Final losses at the best learning rate, one for each seed."""
        return np.asarray(self.losses[self.best])

    @property
    def run(self) -> str:
        """What it is, for a reader."""
        return f"{self.net} L={self.depth}"


def sweeps(measured: Sequence[Pair], part: str) -> dict[tuple[str, int], Sweep]:
    """By net and depth; the seeds of several cells are put together."""
    cells = parts(measured, part)
    found = {}
    for net, depth in dict.fromkeys((cell["net"], cell["L"]) for cell, _ in cells):
        results = [r for c, r in cells if (c["net"], c["L"]) == (net, depth)]

        def together(key: str, results: Sequence[Any] = results) -> NDArray[np.float64]:
            return np.concatenate([np.asarray(r[key], dtype=float) for r in results], axis=1)

        found[net, depth] = Sweep(
            net, depth, np.asarray(results[0]["rates"], dtype=float),
            together("losses"), together("norms"), together("shares"),
        )  # fmt: skip
    return found


def depths_of(found: Mapping[tuple[str, int], Sweep], net: str) -> list[int]:
    """The depths at which a net was swept."""
    return sorted(depth for name, depth in found if name == net)
