"""Matrices with a chosen spectrum, for tests that know the answer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from conditioning.jacobi import Array


def planted(
    values: Array | list[float], seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A dense symmetric matrix with these eigenvalues and Haar eigenvectors."""
    values = np.asarray(values, dtype=np.float64)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(gaussian)
    matrix = (basis * torch.from_numpy(values)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def diagonal(values: Array | list[float]) -> Tensor:
    """The same spectrum as a diagonal matrix: to an isotropic start vector all are alike."""
    return torch.diag(torch.as_tensor(np.asarray(values, dtype=np.float64)))


KINDS = ("clusters", "pairs", "rank-deficient", "hidden", "dynamic-range")


def random_spectrum(kind: str, rng: np.random.Generator) -> Array:
    """One spectrum of the kinds on which certificates go wrong."""
    n = int(rng.integers(60, 220))
    signs = rng.choice([-1.0, 1.0], n)
    if kind == "clusters":
        centres = rng.uniform(0.3, 10, int(rng.integers(2, 8)))
        return rng.choice(centres, n) * (1 + 1e-6 * rng.integers(0, 2) * rng.standard_normal(n))
    if kind == "pairs":
        half = rng.uniform(0.2, 5, n // 2)
        return np.concatenate([half, -half])
    if kind == "rank-deficient":
        zeros = int(rng.integers(1, n // 2))
        values = rng.uniform(0.5, 10, n) * signs
        values[:zeros] = 0
        return values
    if kind == "hidden":
        values = rng.uniform(1, 10, n) * signs
        values[0] = 10 ** rng.uniform(-3, -0.5)
        return values
    if kind == "dynamic-range":
        values = 10 ** rng.uniform(-10, 0, n) * signs
        values[0], values[1] = 1.0, 3e-10
        return np.where(np.abs(values) < 2e-10, 2e-10, values)
    raise ValueError(kind)
