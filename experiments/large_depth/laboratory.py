"""What is measured: one function for each kind of cell, from a description to plain numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from conditioning.theory import scaling_factor
from experiments.data import Dataset, spread_out
from experiments.errors import DataFormatError
from experiments.large_depth import checks, noise, training
from experiments.large_depth.networks import (
    Movement,
    distance,
    norm_chain,
    propagate,
    trajectory,
)
from experiments.store import seed_from

if TYPE_CHECKING:
    from experiments.large_depth import Sizes

Cell = Mapping[str, Any]
# Size of the inputs of nets that are only initialised.
PIXELS = 64
# Distances, in layers, over which the exponent of the increments is taken.
LAGS = (1, 2, 4)
# How the layers of a trained net are drawn.
SMOOTH, INDEPENDENT = "smooth", "independent"


class Laboratory:
    """The data on the device, and the measurements.

    Parameters
    ----------
    dataset : Dataset
        Where it defines no test samples, a fifth is held out, always the same.
    sizes : Sizes
        The preset.
    device : str
        Where nets run; random numbers are drawn on the CPU.
    """

    def __init__(self, dataset: Dataset, sizes: Sizes, device: str) -> None:
        self.dataset, self.sizes, self.device = dataset, sizes, device
        self._kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "check": lambda cell: checks.measure(cell, _generator(cell)),
            "paths": self.paths,
            "chain": self.chain,
            "growth": self.growth,
            "order": self.order,
            "iid": self.independent,
            "smooth": self.smooth,
            "law": self.law,
            "map": self.map,
            "regularity": self.regularity,
            "accuracy": self.accuracy,
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; ``cell["part"]`` says which kind it is."""
        return self._kinds[cell["part"]](cell)

    # -- nets at initialisation -----------------------------------------------------------------

    def _propagate(
        self,
        weights: Tensor,
        generator: Generator,
        alphas: list[float],
        inputs: int = 1,
        draw: Callable[..., Tensor] = noise.normal,
    ) -> Movement:
        """Nets with weights ``(L, matrices, nets, d, d)`` of unit variance."""
        nets, width = weights.shape[2:4]
        first = draw(1, (nets, width, PIXELS), generator)[0] / PIXELS**0.5
        samples = torch.rand(nets, PIXELS, inputs, generator=generator, dtype=torch.float64)
        last = draw(1, (nets, width), generator)[0]
        scaled = weights.div_(width**0.5).to(self.device)
        inner = scaled[:, 1] if weights.shape[1] == 2 else None
        start, last = (first @ samples).to(self.device), last.to(self.device)
        return propagate(scaled[:, 0], inner, start, last, alphas)

    def independent(self, cell: Cell) -> dict[str, Any]:
        """res-3 nets with independent uniform entries; those of all scalings share the weights."""
        shape, generator = (2, cell["nets"], self.sizes.width, self.sizes.width), _generator(cell)
        weights = noise.uniform(cell["L"], shape, generator)
        alphas = [scaling_factor(cell["L"], beta) for beta in self.sizes.iid_betas]
        return _logs(self._propagate(weights, generator, alphas, draw=noise.uniform))

    def smooth(self, cell: Cell) -> dict[str, Any]:
        """res-3 nets with smooth weights; those of all scalings share the weights.

        Nets of all depths are twins, too: the same paths on another grid, the same inputs.
        """
        drawn_from = {key: value for key, value in cell.items() if key != "L"}
        shape, generator = (
            (2, cell["nets"], self.sizes.width, self.sizes.width),
            _generator(drawn_from),
        )
        weights = noise.smooth(_smooth_factor(cell["L"], cell["variant"]), shape, generator)
        alphas = [scaling_factor(cell["L"], beta) for beta in self.sizes.smooth_betas]
        return _logs(self._propagate(weights, generator, alphas))

    def law(self, cell: Cell) -> dict[str, Any]:
        """Norms of res-3 nets with independent entries at beta = 1/2."""
        depth, width = self.sizes.law_depth, self.sizes.law_width
        generator = _generator(cell)
        weights = noise.uniform(depth, (2, cell["nets"], width, width), generator)
        alphas = [scaling_factor(depth, 0.5)]
        moved = self._propagate(weights, generator, alphas, draw=noise.uniform)
        return {"output": moved.output_norm[:, 0, 0], "gradient": moved.gradient_norm[:, 0, 0]}

    def chain(self, cell: Cell) -> dict[str, Any]:
        """The same norms as a Markov chain, sorted."""
        width, nets = self.sizes.chain_width, self.sizes.chain_nets
        depth = self.sizes.chain_depth
        alpha, rng = scaling_factor(depth, 0.5), np.random.default_rng(seed_from(cell))
        return {"logs": np.sort(norm_chain(depth, width, alpha, nets, rng))}

    def growth(self, cell: Cell) -> dict[str, Any]:
        """Norms of that chain at beta = 1/4."""
        depth, width = cell["L"], self.sizes.width
        alpha, rng = scaling_factor(depth, 0.25), np.random.default_rng(seed_from(cell))
        return {"logs": norm_chain(depth, width, alpha, self.sizes.growth_nets, rng)}

    def map(self, cell: Cell) -> dict[str, Any]:
        """Decimal logarithms at every scaling, means over inputs, shape (nets, betas)."""
        sizes, generator = self.sizes, _generator(cell)
        matrices = 2 if cell["block"] == "res-3" else 1
        shape = (matrices, cell["nets"], sizes.width, sizes.width)
        weights = noise.fractional(cell["H"], sizes.map_depth, shape, generator)
        alphas = [scaling_factor(sizes.map_depth, beta) for beta in sizes.map_betas]
        moved = self._propagate(weights, generator, alphas, sizes.map_inputs)
        return {
            "output": moved.output.mean(2) / math.log(10),
            "gradient": moved.gradient.mean(2) / math.log(10),
        }

    def paths(self, cell: Cell) -> dict[str, Any]:
        """One path of fractional Brownian motion, for the figure."""
        depth = self.sizes.map_depth
        increments = noise.fractional(cell["H"], depth, (1,), _generator(cell))
        return {"path": noise.brownian_paths(increments, cell["H"])[:, 0]}

    def order(self, cell: Cell) -> dict[str, Any]:
        """Distances of nets of depth L and 2 L that see the same paths, shape (depths, nets)."""
        sizes, generator = self.sizes, _generator(cell)
        finest, width = 2 * sizes.order_depths[-1], sizes.order_width
        shape = (2 if cell["block"] == "res-3" else 1, cell["nets"], width, width)
        stochastic = cell["limit"] == "sde"
        if stochastic:
            paths, beta = noise.normal(finest, shape, generator), 0.5
        else:
            paths, beta = noise.smooth(_smooth_factor(finest, "process"), shape, generator), 1.0
        coarser = noise.coarser_increments if stochastic else noise.coarser_samples
        start = noise.normal(1, (cell["nets"], width, 1), generator)[0].to(self.device)
        found = {}
        for depth in (*sizes.order_depths, finest):
            weights = coarser(paths, finest // depth).div(width**0.5).to(self.device)
            inner = weights[:, 1] if shape[0] == 2 else None
            alpha = scaling_factor(depth, beta)
            found[depth] = trajectory(weights[:, 0], inner, start, alpha)
        gaps = [distance(found[depth], found[2 * depth]).cpu() for depth in sizes.order_depths]
        return {"distances": torch.stack(gaps)}

    # -- trained nets ---------------------------------------------------------------------------

    @functools.cached_property
    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels ``(pixels, samples)`` and labels to train on, and to test on, float32."""
        data = self.dataset
        parts = data.split()
        if min(len(parts[1]), len(parts[3])) < 1 or data.num_classes < 2:
            msg = (
                f"{data.name} has {len(data)} samples of {data.num_classes} classes: training "
                "needs samples to train on, others to test on, and two classes or more"
            )
            raise DataFormatError(msg)
        some = [spread_out(len(part), self.sizes.samples) for part in parts]
        images, labels, test, test_labels = (
            part[chosen] for part, chosen in zip(parts, some, strict=True)
        )
        found = (
            torch.from_numpy(np.ascontiguousarray(images.reshape(len(images), -1).T)).float(),
            torch.from_numpy(labels),
            torch.from_numpy(np.ascontiguousarray(test.reshape(len(test), -1).T)).float(),
            torch.from_numpy(test_labels),
        )
        return tuple(part.to(self.device) for part in found)  # type: ignore[return-value]

    def _train(
        self, layers: Tensor, alphas: Tensor, rates: Tensor, epochs: int, generator: Generator
    ) -> tuple[training.Lanes, Tensor, Tensor]:
        """Nets with layers ``(L, lanes, d, d)``; lanes that differ in more than these are twins."""
        pixels, labels, _, _ = self.split
        lanes, width = layers.shape[1:3]
        first = noise.normal(1, (width, len(pixels)), generator)[0] / len(pixels) ** 0.5
        last = noise.normal(1, (self.dataset.num_classes, width), generator)[0] / width**0.5
        weights = training.Lanes(
            first.float().repeat(lanes, 1, 1).to(self.device),
            layers.float().to(self.device),
            last.float().repeat(lanes, 1, 1).to(self.device),
        )
        alphas, rates = alphas.float().to(self.device), rates.float().to(self.device)
        schedule = training.Schedule(epochs=epochs, batch=self.sizes.batch)
        losses = training.train(weights, alphas, rates, pixels, labels, schedule, generator)
        return weights, alphas, losses

    def regularity(self, cell: Cell) -> dict[str, Any]:
        """How rough the layers of a net are before and after training."""
        sizes, generator = self.sizes, _generator(cell)
        depth, shape = sizes.regularity_depth, (1, sizes.train_width, sizes.train_width)
        if cell["init"] == SMOOTH:
            layers = noise.smooth(_smooth_factor(depth, "process"), shape, generator)
        else:
            layers = noise.uniform(depth, shape, generator)
        before = layers / sizes.train_width**0.5
        alphas = torch.full((1,), scaling_factor(depth, cell["beta"]))
        rates = torch.full((1,), sizes.regularity_rate)
        epochs = sizes.regularity_epochs
        weights, alphas, losses = self._train(before.clone(), alphas, rates, epochs, generator)
        after = weights.layers.double().cpu()
        _, _, test, labels = self.split
        return {
            "before": path_exponent(before),
            "after": path_exponent(after),
            "change": path_exponent(after - before),
            "if_smooth": self._if_smooth(before, after - before, generator),
            "moved": float((after - before).norm() / before.norm()),
            "loss": float(losses[-1]),
            "accuracy": float(training.accuracy(weights, alphas, test, labels)),
            # One weight, for the figure.
            "weight_before": before[:, 0, 0, 0],
            "weight_after": after[:, 0, 0, 0],
        }

    def _if_smooth(self, before: Tensor, change: Tensor, generator: Generator) -> float:
        """How the exponent of ``before`` changes with a smooth path of the norm of the change."""
        factor = _smooth_factor(len(before), "process")
        path = noise.smooth(factor, before.shape[1:], generator)
        added = path * (change.norm() / path.norm())
        return path_exponent(before + added) - path_exponent(before)

    def accuracy(self, cell: Cell) -> dict[str, Any]:
        """Accuracies of all nets, shape (H, betas, rates); those of one H are twins."""
        sizes, generator = self.sizes, _generator(cell)
        depth, width = sizes.train_depth, sizes.train_width
        betas, rates = sizes.train_betas, sizes.train_rates
        shape = (len(cell["H"]), len(betas), len(rates))
        layers = torch.stack(
            [noise.fractional(hurst, depth, (width, width), generator) for hurst in cell["H"]], 1
        ).repeat_interleave(len(betas) * len(rates), 1)
        scales = torch.tensor([scaling_factor(depth, beta) for beta in betas])
        alphas = scales[:, None].expand(shape).flatten()
        lanes = torch.tensor(rates).expand(shape).flatten()
        weights, alphas, losses = self._train(
            layers / width**0.5, alphas, lanes, sizes.train_epochs, generator
        )
        pixels, labels, test, test_labels = self.split
        return {
            "train": training.accuracy(weights, alphas, pixels, labels).reshape(shape).cpu(),
            "test": training.accuracy(weights, alphas, test, test_labels).reshape(shape).cpu(),
            "loss": losses[-1].double().reshape(shape).cpu(),
            "samples": len(test_labels),
        }


def path_exponent(paths: Tensor) -> float:
    r"""Exponent ``p`` of increments over m layers, whose mean square grows as ``m^(2p)``.

    1 for smooth paths, 1/2 for Brownian motion, 0 for independent layers, ``H`` for fractional
    Brownian motion (the variogram's slope at the shortest lags). NaN where a weight is not finite.
    """
    squares = [float((paths[lag:] - paths[:-lag]).square().mean()) for lag in LAGS]
    if not all(0 < square < math.inf for square in squares):
        return math.nan
    slope = np.polyfit(np.log(LAGS), np.log(squares), 1)[0]
    return float(slope / 2)


@functools.lru_cache(maxsize=2)
def _smooth_factor(depth: int, variant: noise.Variant) -> Tensor:
    return noise.smooth_factor(depth, variant)


def _generator(cell: Cell) -> Generator:
    """What a cell draws depends on the cell alone."""
    return torch.Generator().manual_seed(seed_from(cell))


def _logs(moved: Movement) -> dict[str, Any]:
    """Natural logarithms of the relative movements, shape (nets, scalings)."""
    return {"output": moved.output[:, :, 0], "gradient": moved.gradient[:, :, 0]}
