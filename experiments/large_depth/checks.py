"""Instruments against what they must agree with: autograd, torch's Adam, the covariance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

from conditioning import theory
from experiments.large_depth import noise, training
from experiments.large_depth.networks import propagate

CHECKS = ("gradient", "training", "embedding", "noise")
HURSTS = (0.05, 0.3, 0.5, 0.8, 0.97)


def measure(cell: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
    """Give the error of a check, ``cell["what"]``."""
    kinds: Mapping[str, Callable[[Generator], dict[str, Any]]] = {
        "gradient": gradient, "training": trained, "embedding": embedding, "noise": covariance,
    }  # fmt: skip
    return kinds[cell["what"]](generator)


def gradient(generator: Generator) -> dict[str, Any]:
    """Movements of outputs and gradients against a plain net and autograd, 40 layers."""
    depth, width, alpha = 40, 6, 0.3
    worst = 0.0
    for matrices in (1, 2):
        weights = noise.normal(depth, (matrices, 1, width, width), generator) / width**0.5
        inner = weights[:, 1] if matrices == 2 else None
        start, last = (noise.normal(1, (width,), generator)[0] for _ in range(2))
        found = propagate(
            weights[:, 0], inner, start[None, :, None], last[None], [alpha]
        )  # fmt: skip
        first = start.clone().requires_grad_()
        state = first
        for layer in range(depth):
            hidden = state if inner is None else inner[layer, 0] @ state
            state = state + alpha * weights[layer, 0, 0] @ hidden.relu()
        # With a squared loss and one output: the factor 2 (B h - y) has to drop out.
        ((last @ state - 1.7) ** 2).backward()
        end = 2 * (last @ state.detach() - 1.7) * last
        slope = first.grad
        assert slope is not None
        pairs = (
            (found.output, (state.detach() - start).norm() / start.norm()),
            (found.output_norm, state.detach().norm() / start.norm()),
            (found.gradient, (slope - end).norm() / end.norm()),
            (found.gradient_norm, slope.norm() / end.norm()),
        )
        for logarithm, true in pairs:
            worst = max(worst, float((logarithm.exp().flatten()[0] / true - 1).abs()))
    return {"error": worst}


def trained(generator: Generator) -> dict[str, Any]:
    """Lanes trained at once against nets trained by autograd and torch's Adam, float64."""
    lanes, depth, width, pixels, classes, count = 3, 5, 6, 8, 4, 50
    weights = training.Lanes(
        noise.normal(1, (lanes, width, pixels), generator)[0] / pixels**0.5,
        noise.normal(depth, (lanes, width, width), generator) / width**0.5,
        noise.normal(1, (lanes, classes, width), generator)[0] / width**0.5,
    )
    alphas = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    rates = torch.tensor([0.01, 0.1, 0.001], dtype=torch.float64)
    samples = torch.rand(pixels, count, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    schedule = training.Schedule(epochs=7, batch=20)
    theirs = [
        _plain(weights, lane, alphas, rates, samples, labels, schedule, generator.get_state())
        for lane in range(lanes)
    ]
    training.train(weights, alphas, rates, samples, labels, schedule, generator)
    worst = 0.0
    for lane, tensors in enumerate(theirs):
        ours = (weights.first[lane], weights.layers[:, lane], weights.last[lane])
        for mine, other in zip(ours, tensors, strict=True):
            worst = max(worst, float((mine - other).norm() / other.norm()))
    return {"error": worst}


def _plain(
    weights: training.Lanes, lane: int, alphas: Tensor, rates: Tensor, samples: Tensor,
    labels: Tensor, schedule: training.Schedule, state: Tensor,
) -> list[Tensor]:  # fmt: skip
    """One lane, trained by torch."""
    tensors = [
        part.clone().requires_grad_()
        for part in (weights.first[lane], weights.layers[:, lane], weights.last[lane])
    ]
    first, layers, last = tensors
    optimizer = torch.optim.Adam(tensors, lr=float(rates[lane]))
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer, schedule.decay_every, schedule.decay
    )  # fmt: skip
    generator = torch.Generator()
    generator.set_state(state)
    for _ in range(schedule.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order.split(schedule.batch):
            stream = samples.T[chosen] @ first.T
            for matrix in layers:
                stream = stream + alphas[lane] * stream.relu() @ matrix.T
            optimizer.zero_grad()
            functional.cross_entropy(stream @ last.T, labels[chosen]).backward()
            optimizer.step()
        scheduler.step()
    return [tensor.detach() for tensor in tensors]


def embedding(_: Generator) -> dict[str, Any]:
    """Covariance of the paths that the filter makes of unit impulses, against the exact one."""
    depth, worst = 64, 0.0
    lags = np.subtract.outer(np.arange(depth), np.arange(depth))
    for hurst in HURSTS:
        # Every real coordinate of the circle's spectrum has a variance of its own.
        basis = torch.eye(depth + 1, dtype=torch.complex128)
        real, imaginary = basis / 2**0.5, 1j * basis[:, 1:-1] / 2**0.5
        eigenvalues = noise.circulant_eigenvalues(hurst, depth)
        factor = noise.filtered(torch.cat([real, imaginary], dim=1), eigenvalues)
        exact = torch.from_numpy(theory.fgn_autocovariance(hurst, lags))
        worst = max(worst, float((factor @ factor.T - exact).abs().max()))
    return {"error": worst}


def covariance(generator: Generator) -> dict[str, Any]:
    """Sample autocovariances of drawn paths, in standard errors from the exact ones."""
    depth, count, lags = 50, 20000, (0, 1, 2, 10)
    scores = {}
    for hurst in HURSTS:
        paths = noise.fractional(hurst, depth, (count,), generator)
        for lag in lags:
            products = (paths[: depth - lag] * paths[lag:]).mean(0)
            exact = float(theory.fgn_autocovariance(hurst, lag))
            error = float(products.std() / count**0.5)
            scores[f"H={hurst} lag={lag}"] = float((products.mean() - exact) / error)
    return {"scores": scores}
