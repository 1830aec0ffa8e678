r"""What a linear network sees of its data: second moments of principal components and targets.

Samples are rows: ``X`` is ``(m, d)``, ``Y`` is ``(m, classes)``, and

.. math:: \Sigma_{XX} = X^\top X / m, \quad \Sigma_{YX} = Y^\top X / m, \quad
          \Sigma_{YY} = Y^\top Y / m,

uncentred, as in *Demystifying ResNet* (arXiv 1611.01186), where samples are columns. The loss is
:math:`\|Y - X W^\top\|_F^2 / (2 m)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from experiments.data import Dataset
from experiments.errors import DataFormatError


@dataclass(frozen=True, eq=False)
class Moments:
    """Inputs, one-hot targets and their second moments, float64 on the CPU.

    Parameters
    ----------
    inputs : Tensor, shape (m, d)
        The principal components of the samples.
    targets : Tensor, shape (m, classes)
        One-hot rows, classes in increasing order.
    sigma_xx, sigma_yx, sigma_yy : Tensor
        Shapes ``(d, d)``, ``(classes, d)`` and ``(classes, classes)``.
    variances : Tensor, shape (d,)
        Of the components before whitening, decreasing.
    whitened : bool
        Whether ``sigma_xx`` is the identity.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    sigma_xx: torch.Tensor
    sigma_yx: torch.Tensor
    sigma_yy: torch.Tensor
    variances: torch.Tensor
    whitened: bool

    @property
    def difference(self) -> torch.Tensor:
        """``D = Σ_XX − Σ_YX``, which decides the Hessian at zero; a square matrix."""
        if self.sigma_xx.shape != self.sigma_yx.shape:
            msg = (
                f"D = Σ_XX − Σ_YX needs as many components as classes, got "
                f"{self.sigma_xx.shape[0]} and {self.sigma_yx.shape[0]}"
            )
            raise DataFormatError(msg)
        return self.sigma_xx - self.sigma_yx

    @property
    def best_map(self) -> torch.Tensor:
        """The linear map ``Σ_YX Σ_XX⁻`` of least loss, shape (classes, d)."""
        inverse: torch.Tensor = torch.linalg.pinv(self.sigma_xx, hermitian=True)
        return self.sigma_yx @ inverse

    @property
    def minimum_loss(self) -> float:
        """The least value of the loss over all linear maps."""
        explained = torch.sum(self.best_map * self.sigma_yx)
        return float((torch.trace(self.sigma_yy) - explained) / 2)

    def flipped(self, signs: Sequence[float]) -> Moments:
        """Give the same moments with other signs of the components.

        The signs are a convention that changes D: going through them shows what depends on it.
        """
        flips = torch.tensor(signs, dtype=torch.float64)
        if flips.shape != (self.inputs.shape[1],) or not bool((flips.abs() == 1).all()):
            msg = f"signs must be {self.inputs.shape[1]} numbers that are 1 or -1, got {signs}"
            raise DataFormatError(msg)
        return replace(
            self,
            inputs=self.inputs * flips,
            sigma_xx=self.sigma_xx * flips[:, None] * flips,
            sigma_yx=self.sigma_yx * flips,
        )

    def loss(self, linear_map: torch.Tensor) -> torch.Tensor:
        """Give the loss of a linear map of shape (classes, d), from the moments alone."""
        cross = torch.sum(linear_map * self.sigma_yx)
        square = torch.sum((linear_map @ self.sigma_xx) * linear_map)
        return (torch.trace(self.sigma_yy) - 2 * cross + square) / 2


def principal_moments(
    dataset: Dataset, num_components: int = 10, *, whiten: bool = True, center: bool = True
) -> Moments:
    """Reduce a data set to its leading principal components.

    Parameters
    ----------
    dataset : Dataset
        Its training samples are used.
    num_components : int
        How many components to keep, those of largest variance.
    whiten : bool
        Whether to give every component unit variance and no correlation.
    center : bool
        Whether to subtract the mean sample first.

    Returns
    -------
    Moments
        Components by decreasing variance, each with the sign that makes its loading of largest
        magnitude positive: neither is determined otherwise, and D depends on both.

    Raises
    ------
    DataFormatError
        The data have fewer components than asked for, or too few to be whitened.
    """
    samples = np.asarray(dataset.images, dtype=np.float64).reshape(len(dataset), -1)
    size = samples.shape[1]
    if not 1 <= num_components <= size:
        msg = f"num_components must lie in 1...{size} for {dataset.name}, got {num_components}"
        raise DataFormatError(msg)
    if center:
        samples = samples - samples.mean(axis=0)
    variances, loadings = scipy.linalg.eigh(
        samples.T @ samples / len(samples), subset_by_index=(size - num_components, size - 1)
    )
    variances, loadings = variances[::-1].copy(), loadings[:, ::-1]
    largest = loadings[np.abs(loadings).argmax(axis=0), np.arange(num_components)]
    components = samples @ (loadings * np.sign(largest))
    if whiten:
        # eigh resolves a variance no better than the rounding of the largest one.
        threshold = variances[0] * size * np.finfo(np.float64).eps
        rank = int((variances > threshold).sum())
        if rank < num_components:
            msg = (
                f"{dataset.name} has only {rank} components with variance among the first "
                f"{num_components}: whitening needs num_components <= {rank}"
            )
            raise DataFormatError(msg)
        components = _whitened(components)
    inputs = torch.from_numpy(np.ascontiguousarray(components))
    targets = torch.nn.functional.one_hot(torch.tensor(dataset.labels), dataset.num_classes).to(
        torch.float64
    )
    sigma_xx, sigma_yx, sigma_yy = second_moments(inputs, targets)
    return Moments(
        inputs=inputs,
        targets=targets,
        sigma_xx=sigma_xx,
        sigma_yx=sigma_yx,
        sigma_yy=sigma_yy,
        variances=torch.from_numpy(variances),
        whitened=whiten,
    )


def _whitened(components: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make the second moment the identity, changing the directions as little as possible."""
    count = len(components)
    components = components / np.sqrt((components**2).mean(axis=0))
    # The symmetric root moves uncorrelated columns by rounding only; the second pass removes
    # the rounding of the first.
    for _ in range(2):
        values, vectors = np.linalg.eigh(components.T @ components / count)
        components = components @ (vectors / np.sqrt(values)) @ vectors.T
    return components


def second_moments(
    inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give ``Σ_XX``, ``Σ_YX`` and ``Σ_YY`` of samples in rows."""
    count = len(inputs)
    xx, yy = inputs.T @ inputs / count, targets.T @ targets / count
    # A product with its own transpose need not round symmetrically.
    return (xx + xx.T) / 2, targets.T @ inputs / count, (yy + yy.T) / 2


def virtual_samples(
    inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compress samples to a few that a linear network cannot tell from them.

    Parameters
    ----------
    inputs : Tensor, shape (m, d)
    targets : Tensor, shape (m, classes)

    Returns
    -------
    inputs : Tensor, shape (k, d)
    targets : Tensor, shape (k, classes)
        With ``k = min(m, d + classes)`` and the same second moments, each divided by its own
        number of samples: so a linear network has the same mean squared loss on both, and the
        same derivatives of it.
    """
    count, width = inputs.shape
    _, triangle = torch.linalg.qr(torch.cat([inputs, targets], dim=1), mode="r")
    # R is determined up to signs of its rows; fixed, so that equal data give equal samples.
    signs = torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0).to(triangle.dtype)
    virtual = triangle * signs[:, None] * (len(triangle) / count) ** 0.5
    return virtual[:, :width].contiguous(), virtual[:, width:].contiguous()
