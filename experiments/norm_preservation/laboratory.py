"""What is measured: one function for each kind of cell, from a description to plain numbers."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from conditioning import GradientNorms, find_blocks, theory
from conditioning.blocks.jacobians import block_jacobians
from conditioning.errors import NonFiniteGradientWarning
from experiments.data import Dataset
from experiments.models import CifarResNet, ResidualBranch, ResidualMLP
from experiments.pictures import as_pictures, resized, standardised
from experiments.ratios import split_summary, summary, windows_of
from experiments.store import code_fingerprint, fingerprint, seed_from
from experiments.training import Recipe, Trainer, deterministic_kernels

if TYPE_CHECKING:
    import pandas as pd

    from conditioning.blocks import Blocks
    from experiments.norm_preservation import Sizes

WIDTH = 32
LINEAR_WIDTH = 32
# ‖log T‖; below π, so that the principal roots of T are those of this logarithm.
LOG_NORM = 2.0

MLPS: Mapping[str, Mapping[str, Any]] = {
    "skip, BN": {},
    "skip, scaled": {"bn": False, "branch_scale": "1/√L"},
    "skip": {"bn": False},
    "plain, BN": {"skip": False},
}
CONVS: Mapping[str, Mapping[str, Any]] = {
    "ResNet": {},
    "ResNet, shortcut × 0.01": {"shortcut_scale": 0.01},
    "ProcResNet": {"variant": "proc"},
    "ProcResNet, 2×2": {"variant": "proc", "transition_kernel": 2, "transition_init": "flat"},
}
Cell = Mapping[str, Any]


class Laboratory:
    """The data on the device, and the measurements that use them.

    Parameters
    ----------
    dataset : Dataset
        Vectors or images, grey or colour, channels first or last.
    sizes : Sizes
        The preset.
    device : str
        Where models run.
    checkpoints : path
        Folder for trainings that take longer than an epoch.
    """

    def __init__(self, dataset: Dataset, sizes: Sizes, device: str, checkpoints: Path) -> None:
        self.sizes, self.device, self.checkpoints = sizes, device, checkpoints
        self.data = dataset.fingerprint
        self.num_classes = dataset.num_classes
        self.labels = torch.from_numpy(dataset.labels)
        self.dataset = dataset
        self._kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "linear": self.linear,
            "mlp init": self.mlp_init,
            "mlp train": self.mlp_train,
            "conv init": self.conv_init,
            "conv train": self.conv_train,
            "jacobian": self.jacobian,
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; ``cell["part"]`` says which kind it is."""
        with deterministic_kernels():
            return self._kinds[cell["part"]](cell)

    # -- pieces ---------------------------------------------------------------------------------

    def mlp(self, cell: Cell, width: int = WIDTH) -> ResidualMLP:
        """The MLP of a cell, in float64: rounding is not to decide how a training goes."""
        options = dict(MLPS[cell["net"]])
        if "branch_scale" in options:
            options["branch_scale"] = 1 / math.sqrt(cell["L"])
        return ResidualMLP(
            self.vectors.shape[1], width, cell["L"], self.num_classes, **options,
            generator=_generator(cell), dtype=torch.float64, device=self.device,
        )  # fmt: skip

    def conv(self, cell: Cell) -> CifarResNet:
        """The convolutional net of a cell."""
        return CifarResNet(
            cell["n"], **CONVS[cell["net"]], in_channels=self.pictures.shape[1],
            num_classes=self.num_classes, generator=_generator(cell), device=self.device,
        )  # fmt: skip

    @functools.cached_property
    def vectors(self) -> Tensor:
        """All samples as vectors, each entry with mean 0 and variance 1."""
        vectors = self.dataset.images.reshape(len(self.dataset), -1)
        return standardised(torch.from_numpy(vectors).double(), dims=(0,))

    @functools.cached_property
    def pictures(self) -> Tensor:
        """All samples as images, each channel with mean 0 and variance 1."""
        pictures = torch.from_numpy(as_pictures(self.dataset.images, self.dataset.name))
        return standardised(pictures, dims=(0, 2, 3))

    def resized(self, size: int) -> Tensor:
        """All pictures with sides of this length."""
        return resized(self.pictures, size)

    def batches(
        self, inputs: Tensor, cell: Cell, size: int, count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Random samples, drawn from the seed of the cell."""
        generator = torch.Generator().manual_seed(seed_from(["batches", cell["seed"]]))
        for _ in range(count):
            chosen = torch.randperm(len(inputs), generator=generator)[:size]
            yield inputs[chosen].to(self.device), self.labels[chosen].to(self.device)

    # -- the kinds ------------------------------------------------------------------------------

    def linear(self, cell: Cell) -> dict[str, Any]:
        """A linear map as L equal residual blocks: the roots of its matrix."""
        depth, generator = cell["L"], _generator({"seed": cell["seed"]})
        drawn = torch.randn(LINEAR_WIDTH, LINEAR_WIDTH, dtype=torch.float64, generator=generator)
        logarithm = (drawn * (LOG_NORM / torch.linalg.matrix_norm(drawn, 2))).numpy()
        target = scipy.linalg.expm(logarithm)
        root = scipy.linalg.expm(scipy.linalg.logm(target).real / depth)
        branch = torch.from_numpy(root - np.eye(LINEAR_WIDTH))
        blocks = []
        for _ in range(depth):
            layer = nn.Linear(LINEAR_WIDTH, LINEAR_WIDTH, bias=False, dtype=torch.float64)
            layer.weight = nn.Parameter(branch.clone())
            blocks.append(ResidualBranch(layer))
        net = nn.Sequential(nn.Identity(), *blocks).to(self.device)
        x, g = torch.randn(2, 16, LINEAR_WIDTH, dtype=torch.float64, generator=generator)
        with GradientNorms(net, blocks, activations=False) as norms:
            (net(x.to(self.device).requires_grad_()) * g.to(self.device)).sum().backward()
        backward = g.numpy() @ target
        return {
            "log_norm": float(np.linalg.norm(logarithm, 2)),
            "delta": theory.matrix_root_deviation(torch.from_numpy(target), depth),
            "root_error": _relative(np.linalg.matrix_power(root, depth), target),
            "ratios": norms.ratios().to_numpy()[0],
            "product": float(np.prod(norms.ratios().to_numpy()[0])),
            "end_to_end": float(np.linalg.norm(backward) / np.linalg.norm(g.numpy())),
        }

    def mlp_init(self, cell: Cell) -> dict[str, Any]:
        """An MLP at initialisation, over a few batches."""
        net = self.mlp(cell, cell["width"])
        batches = list(self.batches(self.vectors, cell, cell["batch"], self.sizes.num_batches))
        found = summary(self._ratios_of(net, batches, net.block_names).to_numpy())
        if cell["net"] == "skip, BN":
            with torch.no_grad():
                variances = [net.stem(x).var(0, correction=0).cpu().numpy() for x, _ in batches]
            predicted = [_mean_field(v, cell["L"]) for v in variances]
            found["predicted"] = summary(np.stack(predicted))
        return found

    def mlp_train(self, cell: Cell) -> dict[str, Any]:
        """An MLP along its training."""
        net = self.mlp(cell)
        norms = GradientNorms(net, net.block_names, activations=False, every=self.sizes.mlp_every)
        return self._trained(net, norms, self.vectors, mlp_recipe(self.sizes), cell)

    def conv_init(self, cell: Cell) -> dict[str, Any]:
        """A convolutional net at initialisation."""
        net = self.conv(cell)
        pictures = self.resized(self.sizes.conv_size)
        batches = list(
            self.batches(pictures, cell, self.sizes.conv_batch, self.sizes.num_conv_batches)
        )
        blocks = find_blocks(net, batches[0][0])
        frame = self._ratios_of(net, batches, blocks)
        return {**_names(blocks), **split_summary(frame, blocks.transitions)}

    def conv_train(self, cell: Cell) -> dict[str, Any]:
        """A convolutional net along its training."""
        net = self.conv(cell)
        pictures = self.resized(self.sizes.train_size)
        norms = GradientNorms(
            net, activations=False, every=self.sizes.conv_every, inputs=pictures[:2].to(self.device)
        )
        recipe = conv_recipe(self.sizes, len(pictures))
        # A cell may take hours. Its checkpoint is of use to the same program only.
        key = fingerprint([dict(cell), self.data, self.device, code_fingerprint()])
        checkpoint = self.checkpoints / f"{key[:16]}.pt"
        found = self._trained(net, norms, pictures, recipe, cell, checkpoint)
        return {**_names(norms.blocks), **found}

    def jacobian(self, cell: Cell) -> dict[str, Any]:
        """Ratios of a batch beside the singular values of some blocks at the same batch."""
        if cell["net"] in MLPS:
            net: Any = self.mlp(cell)
            inputs, recipe, batch = self.vectors, mlp_recipe(self.sizes), 32
        else:
            net = self.conv(cell)
            inputs, batch = self.resized(8), 4
            recipe = conv_recipe(self.sizes, len(inputs))
        if cell["state"] == "trained":
            Trainer(net, inputs, self.labels, recipe, seed=cell["seed"]).run(30)
        batches = list(self.batches(inputs, cell, batch, 1))
        net.train()
        blocks = find_blocks(net, batches[0][0])
        places = np.unique(np.linspace(0, len(blocks) - 1, min(len(blocks), 6)).round().astype(int))
        ratios = self._ratios_of(net, batches, blocks).iloc[0]
        found = block_jacobians(
            net, batches[0][0], [blocks[place] for place in places],
            rtol=0.05, max_matvecs=self.sizes.max_matvecs, progress=False,
        )  # fmt: skip
        return {
            "blocks": [
                {
                    "name": one.name,
                    "kind": one.kind,
                    "ratio": float(ratios[one.name]),
                    "bounds": one.ratio_bounds,
                    "largest": one.largest.to_dict(),
                    "smallest": one.smallest.to_dict(),
                    "delta": one.delta.to_dict(),
                    "branch": None if one.branch is None else one.branch.to_dict(),
                    "status": one.status,
                    "products": one.num_matvecs,
                }
                for one in found
            ]
        }

    # -- measuring ------------------------------------------------------------------------------

    def _ratios_of(
        self, net: nn.Module, batches: list[tuple[Tensor, Tensor]], blocks: Any
    ) -> pd.DataFrame:
        """Ratios in training mode, a row for each batch; nothing is trained."""
        net.train()
        with GradientNorms(net, blocks, activations=False) as norms:
            for x, y in batches:
                net.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(net(x), y).backward()
                norms.step()
        return norms.ratios()

    def _trained(
        self,
        net: nn.Module,
        norms: GradientNorms,
        inputs: Tensor,
        recipe: Recipe,
        cell: Cell,
        checkpoint: Path | None = None,
    ) -> dict[str, Any]:
        trainer = Trainer(net, inputs, self.labels, recipe, seed=cell["seed"], stateful=[norms])
        with warnings.catch_warnings():
            # A training that diverges is a result here.
            warnings.simplefilter("ignore", NonFiniteGradientWarning)
            with norms:
                result = trainer.run(checkpoint=checkpoint)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        frame = norms.ratios()
        transitions = norms.blocks.transitions
        finite = frame[np.isfinite(frame.to_numpy()).all(axis=1)]
        windows = [
            {"first": first, "last": last, **split_summary(some, transitions)}
            for first, last in windows_of(recipe.num_steps)
            if len(some := finite.loc[first:last])
        ]
        last = result.losses[-max(len(result.losses) // 10, 1) :]
        return {
            "status": result.status,
            "message": result.message,
            "num_steps": result.num_steps,
            "loss": float(np.mean(last)),
            "chance": math.log(self.num_classes),
            "initial": split_summary(frame.iloc[:1], transitions),
            "training": split_summary(finite if len(finite) else frame.iloc[:1], transitions),
            "windows": windows,
        }


def _mean_field(variances: np.ndarray, num_blocks: int) -> np.ndarray:
    """Predicted ratios where the units of the stream begin with variances of their own.

    Gradients of units add up by their squares, so the squared ratio is a mean over units.
    """
    squares = [
        theory.initial_ratios(num_blocks, input_variance=float(v)).numpy() ** 2 for v in variances
    ]
    ratios: np.ndarray = np.sqrt(np.mean(squares, axis=0))
    return ratios


def mlp_recipe(sizes: Sizes) -> Recipe:
    """How MLPs are trained."""
    return Recipe(num_steps=sizes.mlp_steps, batch_size=64, lr=sizes.mlp_lr, momentum=0.9)


def conv_recipe(sizes: Sizes, num_samples: int) -> Recipe:
    """How convolutional nets are trained: the paper's rates, scaled to the length."""
    steps = sizes.conv_steps or sizes.conv_epochs * (num_samples // sizes.train_batch)
    return Recipe(
        num_steps=steps, batch_size=sizes.train_batch, lr=0.1, momentum=0.9, weight_decay=1e-4,
        milestones=(0.5, 0.75),
    )  # fmt: skip


def _names(blocks: Blocks) -> dict[str, Any]:
    return {"blocks": blocks.names, "transitions": blocks.transitions}


def _generator(cell: Cell) -> torch.Generator:
    # Nets of one seed and size share their draws, whatever else differs.
    return torch.Generator().manual_seed(seed_from(["net", cell["seed"]]))


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
