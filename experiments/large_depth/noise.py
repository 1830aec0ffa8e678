r"""Weights as functions of the layer: independent, fractional Gaussian noise, smooth.

Every function returns unit-variance entries, layers first, float64, on the CPU: the same numbers
whatever device the nets run on. The layers divide by the root of the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from conditioning import theory
from experiments.errors import ExperimentError

Variant = Literal["process", "increments"]
# Of the Gaussian process on [0, 1]: kernel exp(-(s - t)^2 / (2 BANDWIDTH^2)).
BANDWIDTH = 0.1
# Points of [0, 1] whose values decide a path, and the bandwidth for which they still do.
_GRID, _LEAST_BANDWIDTH = 201, 0.05
# Draws are rounded to single precision, which takes half the time; sums are not.
_DRAWN = torch.float32
_TOGETHER = 2**18
# Eigenvalues below this share of the largest one are rounding.
_ROUNDING = 1e-13


def uniform(depth: int, shape: Sequence[int], generator: Generator) -> Tensor:
    """Independent entries, uniform on [-sqrt 3, sqrt 3], shape ``(depth, *shape)``."""
    found = torch.empty(depth, *shape, dtype=torch.float64)
    for block in found.split(_rows(shape)):
        draws = torch.rand(block.shape, generator=generator, dtype=_DRAWN)
        block.copy_(draws.sub_(0.5).mul_(2 * math.sqrt(3)))
    return found


def normal(depth: int, shape: Sequence[int], generator: Generator) -> Tensor:
    """Independent standard normal entries, shape ``(depth, *shape)``."""
    found = torch.empty(depth, *shape, dtype=torch.float64)
    for block in found.split(_rows(shape)):
        block.copy_(torch.randn(block.shape, generator=generator, dtype=_DRAWN))
    return found


def _rows(shape: Sequence[int]) -> int:
    """So many layers at once: draws that stay in the cache take half the time."""
    return max(1, _TOGETHER // max(1, math.prod(shape)))


# ------------------------------------------------------------------ fractional Gaussian noise


def circulant_row(hurst: float, depth: int) -> Tensor:
    """First row of the circulant matrix, of size ``2 depth``, whose corner is the covariance."""
    rho = torch.from_numpy(theory.fgn_autocovariance(hurst, np.arange(depth + 1)))
    return torch.cat([rho, rho[1:-1].flip(0)])


def circulant_eigenvalues(hurst: float, depth: int) -> Tensor:
    """Eigenvalues of that matrix, as ``rfft`` orders them, shape ``(depth + 1,)``.

    Raises
    ------
    ExperimentError
        One is negative by more than rounding: the embedding would not be a covariance. For
        fractional Gaussian noise none is (Craigmile, J. Time Ser. Anal. 24, 2003).
    """
    values: Tensor = torch.fft.rfft(circulant_row(hurst, depth)).real
    if float(values.min()) < -_ROUNDING * float(values.max()):
        msg = (
            f"the circulant embedding for H = {hurst} and {depth} layers has the negative "
            f"eigenvalue {float(values.min()):.3g}: use another depth"
        )
        raise ExperimentError(msg)
    return values.clamp_min(0.0)


def fractional(hurst: float, depth: int, shape: Sequence[int], generator: Generator) -> Tensor:
    """Fractional Gaussian noise along the layers, exact up to rounding, ``(depth, *shape)``.

    White noise on the circle, drawn as its spectrum, is filtered by the root of the circulant
    matrix; half of the circle is returned (Davies and Harte, Biometrika 74, 1987; Wood and Chan,
    J. Comput. Graph. Stat. 3, 1994).
    """
    eigenvalues, count = circulant_eigenvalues(hurst, depth), math.prod(shape)
    found = torch.empty(depth, count, dtype=torch.float64)
    for block in found.split(max(1, _TOGETHER // depth), dim=1):
        white = torch.randn(
            depth + 1, block.shape[1], generator=generator, dtype=torch.complex64
        )  # fmt: skip
        block.copy_(filtered(white, eigenvalues))
    return found.reshape(depth, *shape)


def filtered(white: Tensor, eigenvalues: Tensor) -> Tensor:
    """Paths ``(depth, count)`` from the spectra ``(depth + 1, count)`` of white noise.

    The spectra have complex normal entries of unit variance; of the first and the last, which
    are real for a real signal, the real part is taken.
    """
    depth = len(white) - 1
    # All coefficients of the circle's white noise have the variance 2 depth, the real ones too.
    roots = (2 * depth * eigenvalues).sqrt().to(white.real.dtype)
    roots[[0, -1]] *= math.sqrt(2)
    spectrum = white * roots[:, None]
    spectrum.imag[[0, -1]] = 0
    paths: Tensor = torch.fft.irfft(spectrum, n=2 * depth, dim=0)[:depth]
    return paths


def brownian_paths(noise: Tensor, hurst: float) -> Tensor:
    """Fractional Brownian motion on [0, 1] from its increments along the first axis."""
    return noise.cumsum(0) * float(len(noise) ** -hurst)


# ----------------------------------------------------------------------------- smooth paths


def smooth_factor(depth: int, variant: Variant = "process", bandwidth: float = BANDWIDTH) -> Tensor:
    """Factor ``F`` with ``F F^T`` the covariance over layers, shape ``(depth, rank)``.

    Parameters
    ----------
    depth : int
    variant : {"process", "increments"}
        The Gaussian process at k / L, k = 1 ... L, or its increments between k = 0 ... L, scaled
        to average unit variance.
    bandwidth : float
        Of the kernel on [0, 1], 0.05 or more.

    Raises
    ------
    ExperimentError
        There is no such variant, or the bandwidth is too small.

    Notes
    -----
    The process is that of its values at a fixed grid, much finer than the bandwidth, and their
    interpolation by the kernel: for this kernel nothing is missing beyond rounding (tested). So
    the same normal variables give the same path at every depth.
    """
    if variant not in ("process", "increments"):
        msg = f"variant must be 'process' or 'increments', got {variant!r}"
        raise ExperimentError(msg)
    if bandwidth < _LEAST_BANDWIDTH:
        msg = f"bandwidth must be at least {_LEAST_BANDWIDTH}, got {bandwidth}"
        raise ExperimentError(msg)
    first = 1 if variant == "process" else 0
    times = torch.arange(first, depth + 1, dtype=torch.float64) / depth
    grid = torch.linspace(0, 1, _GRID, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(_kernel(grid, grid, bandwidth))
    kept = values > _ROUNDING * values[-1]
    factor: Tensor = _kernel(times, grid, bandwidth) @ (vectors[:, kept] / values[kept].sqrt())
    if variant == "increments":
        # Differences of the factor, not of the covariance, whose entries would cancel.
        factor = factor.diff(dim=0)
        factor = factor / factor.square().sum(1).mean().sqrt()
    return factor


def _kernel(times: Tensor, others: Tensor, bandwidth: float) -> Tensor:
    kernel: Tensor = torch.exp(-((times[:, None] - others) ** 2) / (2 * bandwidth**2))
    return kernel


def smooth(factor: Tensor, shape: Sequence[int], generator: Generator) -> Tensor:
    """Independent smooth paths along the layers, shape ``(depth, *shape)``."""
    draws = torch.randn(
        factor.shape[1], math.prod(shape), generator=generator, dtype=_DRAWN
    )  # fmt: skip
    paths: Tensor = factor @ draws.double()
    return paths.reshape(len(factor), *shape)


# --------------------------------------------------------------------------- coarser grids


def coarser_increments(noise: Tensor, times: int) -> Tensor:
    """Increments of the same Brownian motion over ``times`` as long steps, of unit variance."""
    _divisible(noise, times)
    grouped = noise.reshape(len(noise) // times, times, *noise.shape[1:])
    return grouped.sum(1) / math.sqrt(times)


def coarser_samples(paths: Tensor, times: int) -> Tensor:
    """The same paths at every ``times``-th of the places k / L, k = 1 ... L."""
    _divisible(paths, times)
    return paths[times - 1 :: times]


def _divisible(paths: Tensor, times: int) -> None:
    if times < 1 or len(paths) % times:
        msg = f"{len(paths)} layers cannot be taken {times} at a time: use a divisor"
        raise ExperimentError(msg)
