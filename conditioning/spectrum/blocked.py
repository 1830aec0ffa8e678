"""Extreme eigenvalues from one block Lanczos run, which needs no second run for further copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conditioning.jacobi import Array
from conditioning.krylov import BlockRun, start_for
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.pairs import KEYS
from conditioning.spectrum.results import Estimate
from conditioning.spectrum.search import SLACK, vectors_that_fit


@dataclass
class BlockSearch:
    """Extends a block run until the ``k`` wanted pairs have converged and are enclosed.

    The block has at least ``k`` columns. What it claims is in ``conditioning.krylov.block``.
    """

    operator: LinearOperator
    k: int
    which: str
    rtol: float
    failure_probability: float
    certify: bool

    def run(
        self, width: int, products: int, generator: torch.Generator, budget: int | None
    ) -> tuple[str, str]:
        """Find the pairs within so many products; status and message.

        ``"open"``: the block closed, or its memory or the products ended, before that.
        """
        operator = self.operator
        # The block and its product are float64 vectors beside the basis, twice.
        room = vectors_that_fit(operator, budget) - 4 * width
        single = operator.dtype.itemsize <= 4 and room < products
        self._run = run = BlockRun(
            operator,
            start_for(operator, generator, width),
            basis_dtype=torch.float32 if single else torch.float64,
        )
        last = min(products, 2 * room if single else room)
        while not run.closed and run.num_matvecs + width <= last:
            run.extend(1)
            if self._judge():
                return self._said(width)
        if run.num_matvecs + width > last and not run.closed:
            return "open", f"a block of {width} took {run.num_matvecs} products"
        return "open", f"a block of {width} closed after {run.num_matvecs} products"

    def _judge(self) -> bool:
        values, vectors, tails = self._run.ritz()
        keys = KEYS[self.which](values)
        best = np.argsort(-keys, kind="stable")[: self.k]
        if len(best) < self.k:
            return False
        residuals = np.linalg.norm(tails[:, best], axis=0)
        guard = self._run.guard
        tolerance = max(self.rtol * float(np.abs(values).max()), 4 * guard)
        if residuals.max() > tolerance:
            return False
        high = self._outer_keys()
        self.values, self.residuals = values[best], residuals + guard
        self._turn = vectors[:, best]
        low = keys[best] - guard
        self.high = np.maximum(high, keys[best] + guard)
        self.estimates = tuple(
            Estimate(float(value), *sorted((float(_signed(a, value, self.which)),
                                            float(_signed(b, value, self.which)))))
            for value, a, b in zip(self.values, low, self.high, strict=True)
        )  # fmt: skip
        slack = SLACK * np.abs(keys[best]) + min(tolerance, SLACK * float(np.abs(values).max()))
        return not self.certify or bool((high - keys[best] <= slack).all())

    def _outer_keys(self) -> Array:
        """Upper bounds of the ``k`` largest keys."""
        if self.which != "LM":
            low, high = self._run.bounds(self.k, self.which, self.failure_probability)
            return high if self.which == "LA" else -low
        share = self.failure_probability / 2
        above = self._run.bounds(self.k, "LA", share)[1]
        below = -self._run.bounds(self.k, "SA", share)[0]
        # No more than i - 1 eigenvalues exceed above[i - 1], no more than j - 1 the other way: so
        # the (i + j - 1)-th magnitude is at most the larger of the two.
        return np.array(
            [
                min(max(above[i], below[m - i]) for i in range(m + 1))
                for m in range(self.k)
            ]
        )  # fmt: skip

    def _said(self, width: int) -> tuple[str, str]:
        how = f"one block of {width} vectors, {self._run.num_steps} steps"
        if not self.certify:
            return "not certified", (
                f"{self.k} pairs reached rtol={self.rtol:g}; the enclosures hold, but were not "
                f"brought to 1 % (certify=False); {how}"
            )
        return "certified", (
            f"every enclosure is within 1 %, copies counted, with probability at least 1 - "
            f"{self.failure_probability:g}; {how}"
        )

    def vectors(self) -> Tensor:
        """Ritz vectors of the pairs, shape ``(n, k)``."""
        return self._run.combine(torch.from_numpy(self._turn.copy()))


def _signed(key: float, value: float, which: str) -> float:
    """The eigenvalue with this key: on the side of ``value`` for magnitudes."""
    return -key if which == "SA" or (which == "LM" and value < 0) else key
