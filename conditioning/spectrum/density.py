"""Spectral density, trace and index: what random probes say of the whole spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from conditioning.errors import NonFiniteError
from conditioning.jacobi import Array
from conditioning.krylov import LanczosRun, make_generator, start_for
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.common import (
    METHODS,
    check_at_least,
    check_between,
    check_choice,
    check_counts,
    check_share,
    dense_fits,
    square,
)
from conditioning.spectrum.full import FullSpectrum, full_spectrum
from conditioning.spectrum.measure import Probe, SpectralMeasure
from conditioning.spectrum.results import Estimate, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SpectralDensity(Result):
    """The distribution of all ``n`` eigenvalues.

    Attributes
    ----------
    nodes, weights : ndarray of shape (m,)
        Quadrature nodes, ascending, and their shares of the spectrum (they sum to 1). All
        eigenvalues with equal shares when the status is ``exact``.
    size : int
        ``n``.
    num_probes, num_steps, num_matvecs : int
    status : {"exact", "estimated"}
    message : str
    failure_probability : float
        Of an enclosure by ``cdf`` or ``quantile``.
    """

    nodes: Array
    weights: Array
    size: int
    num_probes: int
    num_steps: int
    num_matvecs: int
    status: str
    message: str
    failure_probability: float
    _source: SpectralMeasure | FullSpectrum = field(repr=False, compare=False)

    def cdf(self, point: float) -> Estimate:
        """Share of eigenvalues up to ``point``, with an enclosure."""
        if isinstance(self._source, FullSpectrum):
            return self._source.cdf(point)
        value = float(self.weights[self.nodes <= point].sum())
        count = self._source.count_at(point, self.failure_probability)
        low, high = count.low / self.size, count.high / self.size
        return Estimate(float(np.clip(value, low, high)), low, high)

    def quantile(self, q: float, *, absolute: bool = False) -> Estimate:
        """The ``q``-quantile of the eigenvalues (of ``|lambda|`` with ``absolute``), enclosed.

        Raises
        ------
        InvalidArgumentError
            If ``q`` is not between 0 and 1.
        """
        check_share(q=q)
        if isinstance(self._source, FullSpectrum):
            return self._source.quantile(q, absolute=absolute)
        return self._source.quantile(q, self.failure_probability, absolute=absolute)

    def density(self, points: Array, width: float | None = None) -> Array:
        """Density at ``points``: nodes widened to Gaussians of standard deviation ``width``.

        The default width is a hundredth of the span of the nodes.
        """
        points = np.asarray(points, dtype=np.float64)
        span = float(self.nodes[-1] - self.nodes[0])
        width = (0.01 * span or 1e-3) if width is None else width
        distance = (points[..., None] - self.nodes) / width
        kernel = np.exp(-0.5 * distance**2) / (width * math.sqrt(2 * math.pi))
        return np.asarray(kernel @ self.weights)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw it: see ``conditioning.plots.plot_density``."""
        from conditioning.plots import plot_density

        return plot_density(self, ax)

    def __str__(self) -> str:
        ends = f"[{self.nodes[0]:.4g}, {self.nodes[-1]:.4g}]"
        return (
            f"spectral density of {self.size} eigenvalues on {ends} ({self.status}, "
            f"{self.num_matvecs} products): {self.message}"
        )


def spectral_density(
    operator: Any,
    num_probes: int = 10,
    num_steps: int = 80,
    seed: int | torch.Generator = 0,
    *,
    failure_probability: float = 1e-3,
    method: str = "auto",
) -> SpectralDensity:
    """Distribution of the eigenvalues by stochastic Lanczos quadrature.

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        Symmetric, ``(n, n)``.
    num_probes : int
        Gaussian start vectors: sampling error goes like ``1 / sqrt(n num_probes)``.
    num_steps : int
        Lanczos steps per probe: resolution.
    seed : int or torch.Generator
    failure_probability : float
        Of one enclosure by ``cdf`` or ``quantile``.
    method : {"auto", "dense", "lanczos"}
        ``auto`` is exact where all ``n`` columns cost no more than the probes would.

    Returns
    -------
    SpectralDensity

    References
    ----------
    G. H. Golub, J. H. Welsch, Math. Comp. 23 (1969) 221-230. L. Lin, Y. Saad, C. Yang,
    SIAM Review 58 (2016) 34-65.
    """
    taken = square(operator)
    size = taken.shape[0]
    check_counts(num_probes=num_probes, num_steps=num_steps)
    check_choice(METHODS, method=method)
    check_between(0, 0.5, failure_probability=failure_probability)
    spent = taken.num_matvecs
    if method == "dense" or (method == "auto" and size <= num_probes * num_steps):
        full = full_spectrum(taken)
        return SpectralDensity(
            full.values, np.full(size, 1 / size), size, 0, 0, full.num_matvecs, "exact",
            "all eigenvalues known", 0.0, full,
        )  # fmt: skip
    probes = _probes(taken, num_probes, num_steps, seed)
    measure = SpectralMeasure(probes, size)
    nodes, weights = measure.nodes(absolute=False)
    return SpectralDensity(
        nodes, weights, size, num_probes, max(p.jacobi.size for p in probes),
        taken.num_matvecs - spent, "estimated",
        f"{num_probes} probes of {num_steps} steps; an enclosure by cdf or quantile fails with "
        f"probability at most {failure_probability:g}",
        failure_probability, measure,
    )  # fmt: skip


def _probes(
    operator: LinearOperator, num_probes: int, num_steps: int, seed: int | torch.Generator
) -> list[Probe]:
    generator = make_generator(seed)
    probes: list[Probe] = []
    noise = 0.0
    # One basis is held at a time. Where products are float32 anyway it may be float32 as well.
    needed = 8 * max(operator.local_size, 1) * (min(num_steps, operator.shape[0]) + 4)
    large = operator.agree(needed > available_bytes(operator.device) // 2)
    short = large and operator.dtype.itemsize <= 4
    for i in range(num_probes):
        run = LanczosRun(
            operator, start_for(operator, generator), measure_noise=i == 0, max_steps=num_steps,
            basis_dtype=torch.float32 if short else torch.float64,
        )  # fmt: skip
        run.noise = noise
        run.extend(num_steps)
        noise = run.noise
        probes.append(Probe(run.jacobi, run.start_norm**2, run.guard))
        run.release()
    return probes


def index(
    operator: Any,
    num_probes: int = 4,
    num_steps: int = 100,
    zero_rtol: float = 1e-10,
    seed: int | torch.Generator = 0,
    *,
    failure_probability: float = 1e-3,
    method: str = "auto",
) -> Estimate:
    """Fraction of negative eigenvalues (those below ``-zero_rtol * max |lambda|``).

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        Symmetric, ``(n, n)``.
    num_probes, num_steps : int
        Lanczos runs of the matrix-free route.
    zero_rtol : float
    seed : int or torch.Generator
    failure_probability : float
        Of the enclosure.
    method : {"auto", "dense", "lanczos"}
        ``auto`` is exact up to n = 8192 where the memory allows.

    Returns
    -------
    Estimate
        Between 0 and 1; exact (to what rounding leaves open) on the dense route.
    """
    taken = square(operator)
    size = taken.shape[0]
    check_counts(num_probes=num_probes, num_steps=num_steps)
    check_choice(METHODS, method=method)
    check_between(0, 0.5, failure_probability=failure_probability)
    if method == "dense" or (method == "auto" and dense_fits(taken)):
        return full_spectrum(taken).index(zero_rtol)
    probes = _probes(taken, num_probes, num_steps, seed)
    cut = max(zero_rtol * max(p.jacobi.scale for p in probes), 4 * max(p.guard for p in probes))
    if cut == 0:
        return Estimate(0.0, 0.0, 0.0)  # every product vanished
    measure = SpectralMeasure(probes, size)
    nodes, weights = measure.nodes(absolute=False)
    count = measure.count_at(-cut, failure_probability)
    low, high = count.low / size, count.high / size
    value = float(weights[nodes < -cut].sum())
    return Estimate(float(np.clip(value, low, high)), low, high)


def trace(
    operator: Any,
    num_probes: int = 64,
    seed: int | torch.Generator = 0,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Trace by Hutchinson's estimator, with a Student interval.

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        Square, ``(n, n)``.
    num_probes : int
        Random sign vectors, one product each. With ``num_probes >= n`` the trace is exact.
    seed : int or torch.Generator
    confidence : float
        Of the interval. It is asymptotic: the estimates of single probes are taken as normal.

    Returns
    -------
    Estimate

    References
    ----------
    M. F. Hutchinson, Comm. Statist. Simulation Comput. 19 (1990) 433-450.
    """
    taken = square(operator)
    size = taken.shape[0]
    check_counts(num_probes=num_probes)
    check_at_least(2, num_probes=num_probes)  # one alone has no spread
    check_between(0, 1, confidence=confidence)
    if num_probes >= size:
        diagonal = torch.diagonal(taken.dense()).to(torch.float64)
        value = float(diagonal.sum())
        _check_finite(value)
        eps = torch.finfo(taken.dtype).eps
        error = eps * math.sqrt(size) * float(diagonal.abs().sum())
        return Estimate(value, value - error, value + error)
    from scipy.special import stdtrit  # slow to import, scipy.stats slower still

    generator = make_generator(seed)
    samples = []
    for begin in range(0, num_probes, 16):
        count = min(16, num_probes - begin)
        bits = torch.randint(0, 2, (size, count), generator=generator, device=generator.device)
        signs = taken.local_part((2 * bits - 1).to(taken.device, torch.float64))
        product = taken.matmat(signs).to(torch.float64)
        samples.append(taken.sum_over_shards((signs * product).sum(dim=0)))
    values = torch.cat(samples).cpu().numpy()
    value = float(values.mean())
    _check_finite(value)
    error = float(values.std(ddof=1) / math.sqrt(num_probes))
    error *= float(stdtrit(num_probes - 1, (1 + confidence) / 2))
    # A diagonal operator has no spread: what is left is rounding.
    error += torch.finfo(taken.dtype).eps * math.sqrt(size) * float(np.abs(values).mean())
    return Estimate(value, value - error, value + error)


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        msg = "A product of the operator is not finite: check the loss for NaN and overflow."
        raise NonFiniteError(msg)
