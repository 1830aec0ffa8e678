"""Converged pairs put aside, and power iteration with deflation, which finds them one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditioning.jacobi import Array
from conditioning.krylov import power_iteration, start_for
from conditioning.krylov.vectors import inner, norm
from conditioning.operators.base import LinearOperator

KEYS: dict[str, Callable[[Array], Array]] = {
    "LM": np.abs,
    "LA": lambda values: values,
    "SA": lambda values: -values,
    "SM": lambda values: -np.abs(values),
}


@dataclass
class Locked:
    """Converged Ritz pairs, kept orthonormal, best first."""

    vectors: Tensor
    values: Array
    residuals: Array

    def add(self, vectors: Tensor, values: Array, residuals: Array, key: Any, k: int) -> None:
        """Put pairs aside, and keep the ``k`` best."""
        order = np.argsort(-key(np.concatenate([self.values, values])), kind="stable")[:k]
        self.values = np.concatenate([self.values, values])[order]
        self.residuals = np.concatenate([self.residuals, residuals])[order]
        both = torch.cat([self.vectors, vectors], dim=1)
        self.vectors = both[:, torch.as_tensor(order, device=both.device)]


class _Projected(LinearOperator):
    """What is left of an operator beside its locked pairs, shifted."""

    def __init__(self, operator: LinearOperator, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__(operator.shape, torch.float64, operator.device, symmetric=True)
        self._operator = operator
        self._image = apply

    @property
    def local_size(self) -> int:
        """Of the operator behind it."""
        return self._operator.local_size

    @property
    def is_sharded(self) -> bool:
        """As the operator behind it."""
        return self._operator.is_sharded

    def local_part(self, vector: Tensor) -> Tensor:
        """Of the operator behind it."""
        return self._operator.local_part(vector)

    def sum_over_shards(self, partial: Tensor) -> Tensor:
        """Of the operator behind it."""
        return self._operator.sum_over_shards(partial)

    def matvec(self, vector: Tensor) -> Tensor:
        """One product, in the space beside the locked pairs."""
        return self._image(vector)


def power_pairs(
    operator: LinearOperator,
    locked: Locked,
    k: int,
    which: str,
    rtol: float,
    max_matvecs: int,
    generator: torch.Generator,
    spent: int,
) -> tuple[str, str]:
    """Power iteration, one pair after the other; LA and SA by a shift that makes them dominant."""
    key = KEYS[which]
    shift = 0.0

    def apply(vector: Tensor) -> Tensor:
        basis = locked.vectors
        inside = vector - basis @ inner(operator, basis, vector)
        image = operator.matvec(inside).to(torch.float64) + shift * inside
        return image - basis @ inner(operator, basis, image)

    projected = _Projected(operator, apply)

    def left() -> int:
        used = operator.num_matvecs - spent
        return max_matvecs - min(k, max_matvecs // 2) - used  # one each for the residuals

    if which != "LM":
        start = start_for(operator, generator)
        top = power_iteration(projected, start, max(min(left() // 4, 50), 1), 1e-2)
        # Any bound of the spectrum will do; a Ritz value plus residual is at hand.
        bound = 1.1 * abs(top.value) + top.residual_norm
        shift = bound if which == "LA" else -bound
    converged = True
    for _ in range(k):
        if left() < 1:
            break
        start = start_for(operator, generator)
        start = start - locked.vectors @ inner(operator, locked.vectors, start)
        found = power_iteration(projected, start, left(), rtol)
        converged &= found.converged
        vector = found.vector - locked.vectors @ inner(operator, locked.vectors, found.vector)
        vector = vector / norm(operator, vector)
        value, residual = np.array([found.value - shift]), np.array([found.residual_norm])
        locked.add(vector[:, None], value, residual, key, k)
    if not converged or len(locked.values) < k:
        return "not converged", (
            f"{max_matvecs} products were not enough for {k} pairs at rtol={rtol:g}. Use "
            f"method='lanczos', which needs far fewer, or raise max_matvecs."
        )
    return "not certified", (
        "residuals reached rtol; power iteration does not prove that no eigenvalue was missed"
    )
