"""What is measured: one function for each kind of cell, from a description to plain numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.augment import pad_and_crop
from experiments.data import Dataset
from experiments.errors import DataFormatError
from experiments.models import ScaledResNet, TauStack, counted_blocks
from experiments.pictures import resized, split_pictures
from experiments.store import code_fingerprint, fingerprint, seed_from
from experiments.tau_scaling import checks
from experiments.tau_scaling.chain import norms_through
from experiments.tau_scaling.descent import Lanes, descend
from experiments.tau_scaling.nets import NETS
from experiments.tau_scaling.rules import HALF, LINEAR, ONE, QUARTER, RULES, SHARP
from experiments.tau_scaling.stack import Stack
from experiments.training import Recipe, Trainer, deterministic_kernels

if TYPE_CHECKING:
    from experiments.tau_scaling import Sizes

Cell = Mapping[str, Any]
CHECKS = tuple(checks.KINDS)
# The factors of nets whose product of blocks is taken, and of those that are trained.
MULTIPLIED = (LINEAR, HALF, SHARP, QUARTER, ONE)
DESCENDING = (LINEAR, SHARP, QUARTER)
_FEATURES = 16
_OUTPUTS = 10
_SAMPLES = 4


class Laboratory:
    """The data on the device, and the measurements that use them.

    Parameters
    ----------
    dataset : Dataset
        Images, grey or colour, channels first or last. Where it defines no test samples, a fifth
        is held out, always the same.
    sizes : Sizes
        The preset.
    device : str
        Where models run.
    checkpoints : path
        Folder for trainings that take longer than an epoch.
    """

    def __init__(self, dataset: Dataset, sizes: Sizes, device: str, checkpoints: Path) -> None:
        self.dataset, self.sizes, self.device = dataset, sizes, device
        self.checkpoints = checkpoints
        self._kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "check": lambda cell: checks.KINDS[cell["what"]](device),
            "norms": self.norms,
            "product": self.product,
            "descent": self.descent,
            "images": self.images,
            "train": self.train,
        }

    def describe(self) -> str:
        """Data and schedule of the ResNets, for the titles of figures."""
        sizes = self.sizes
        epochs = f"{sizes.epochs:g} epoch{'s' if sizes.epochs != 1 else ''}"
        return f"{self.dataset.name} {sizes.size}×{sizes.size}, {epochs}, batch {sizes.batch}"

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; ``cell["part"]`` says which kind it is."""
        with deterministic_kernels():
            return self._kinds[cell["part"]](cell)

    # -- norms and products -----------------------------------------------------------------------

    def norms(self, cell: Cell) -> dict[str, Any]:
        """Logarithms of norms through nets, each (rules, nets)."""
        taus = [rule.tau(cell["L"]) for rule in RULES.values()]
        found = norms_through(
            taus,
            cell["L"],
            self.sizes.width,
            cell["seeds"],
            _seed("tau scaling: norms", cell),
            self.device,
        )
        return {name: values.cpu().numpy() for name, values in found.items()}

    def product(self, cell: Cell) -> dict[str, Any]:
        """The spectral norm of the product of all blocks, and norms through the same net."""
        depth, width = cell["L"], self.sizes.product_width
        generator = torch.Generator().manual_seed(_seed("tau scaling: product", cell))
        net = TauStack(_FEATURES, width, depth, _OUTPUTS, 1.0, generator=generator)
        x = torch.randn(_SAMPLES, _FEATURES, generator=generator, dtype=torch.float64)
        g = torch.randn(_SAMPLES, width, generator=generator, dtype=torch.float64)
        net, x, g = net.to(self.device), x.to(self.device), g.to(self.device)
        with torch.no_grad():
            inputs = torch.relu(x @ net.stem.T)
            blocks = net.blocks.detach()
        stack = Stack([RULES[rule].tau(depth) for rule in MULTIPLIED], blocks, inputs)
        norms = {}
        for index, rule in enumerate(MULTIPLIED):
            found = stack.spectral_norm(index, 0, _seed("tau scaling: start", cell))
            norms[rule] = {
                "value": found.largest.value, "low": found.largest.low,
                "high": found.largest.high, "status": found.status,
                "num_matvecs": found.num_matvecs,
            }  # fmt: skip
        return {
            "spectral_norm": norms,
            "forward": stack.log_norms[-1].cpu().numpy(),
            "backward": stack.backward(g).cpu().numpy(),
        }

    # -- descent ----------------------------------------------------------------------------------

    def descent(self, cell: Cell) -> dict[str, Any]:
        """Full-batch descent on random labels: losses of (steps, rules, seeds)."""
        sizes = self.sizes
        count, samples = cell["seeds"], sizes.descent_samples
        generator = torch.Generator().manual_seed(_seed("tau scaling: samples", cell))
        lanes = self._lanes(cell, _FEATURES, sizes.descent_width, _OUTPUTS)
        x = torch.randn(len(lanes), samples, _FEATURES, generator=generator)
        x /= torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        labels = torch.randint(_OUTPUTS, (len(lanes), samples), generator=generator)
        y = torch.nn.functional.one_hot(labels, _OUTPUTS).float()
        x, y = x.to(self.device), y.to(self.device)
        losses = descend(
            lanes, lambda _, chosen: (x[chosen], y[chosen]), _rate(_OUTPUTS, sizes.descent_width),
            sizes.descent_steps,
        )  # fmt: skip
        return {"losses": losses.reshape(len(losses), len(DESCENDING), count).cpu().numpy()}

    def images(self, cell: Cell) -> dict[str, Any]:
        """Stochastic descent on images: losses of batches, (steps, rules, seeds), and errors."""
        sizes, count = self.sizes, cell["seeds"]
        images, labels, test, test_labels = self.split
        x, held = (self._unit(part) for part in (images, test))
        y = torch.nn.functional.one_hot(labels, self.dataset.num_classes).float()
        x, y = x.to(self.device), y.to(self.device)
        lanes = self._lanes(cell, x.shape[1], sizes.image_width, y.shape[1])
        per_epoch = len(x) // sizes.image_batch
        num_steps = max(round(sizes.image_epochs * per_epoch), 1)
        generator = torch.Generator().manual_seed(_seed("tau scaling: order", cell))
        epochs = -(-num_steps // per_epoch)
        # Every net has its own batches.
        orders = [
            [torch.randperm(len(x), generator=generator) for _ in range(len(lanes))]
            for _ in range(epochs)
        ]
        order = torch.stack([torch.stack(one) for one in orders]).to(self.device)

        def batch(step: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
            epoch, place = divmod(step, per_epoch)
            first = place * sizes.image_batch
            some = order[epoch, chosen, first : first + sizes.image_batch]
            return x[some], y[some]

        losses = descend(lanes, batch, _rate(y.shape[1], sizes.image_width), num_steps)
        wrong = lanes.outputs(held.to(self.device)).argmax(-1).cpu() != test_labels
        errors = wrong.double().mean(1)
        shape = (len(DESCENDING), count)
        return {
            "losses": losses.reshape(num_steps, *shape).cpu().numpy(),
            "errors": errors.reshape(shape).numpy(),
        }

    def _lanes(self, cell: Cell, features: int, width: int, outputs: int) -> Lanes:
        """Nets of all factors and seeds, those of one factor together."""
        nets = []
        for rule in DESCENDING:
            for seed in range(cell["seeds"]):
                number = _seed("tau scaling: net", {**cell, "rule": rule, "seed": seed})
                generator = torch.Generator().manual_seed(number)
                nets.append(
                    TauStack(
                        features, width, cell["L"] - 1, outputs, RULES[rule].tau(cell["L"]),
                        generator=generator, dtype=torch.float32,
                    )
                )  # fmt: skip
        return Lanes.of(nets, self.device)

    # -- images -----------------------------------------------------------------------------------

    @functools.cached_property
    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and labels to train on, and to test on; standardised by the former.

        Raises
        ------
        DataFormatError
            There are fewer to train on than a batch takes.
        """
        parts = split_pictures(self.dataset)
        needed = max(self.sizes.batch, self.sizes.image_batch)
        if len(parts[0]) < needed:
            msg = (
                f"{self.dataset.name} leaves {len(parts[0])} images to train on, and a batch of "
                f"this preset takes {needed}: give more images, or another preset"
            )
            raise DataFormatError(msg)
        return parts

    @staticmethod
    def _unit(images: Tensor) -> Tensor:
        """Images as vectors of norm 1."""
        x = images.flatten(1)
        norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x / norms.clamp_min(1e-30)

    # -- ResNets ----------------------------------------------------------------------------------

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The authors' rates, scaled to the length."""
        per_epoch = len(self.split[0]) // self.sizes.batch
        num_steps = max(round(self.sizes.epochs * per_epoch), 1)
        return Recipe(
            num_steps=num_steps, batch_size=self.sizes.batch, lr=0.1, momentum=0.9,
            weight_decay=1e-4, milestones=(0.5, 0.75),
            precision=self.sizes.precision,  # type: ignore[arg-type]
        )  # fmt: skip

    def train(self, cell: Cell) -> dict[str, Any]:
        """A training: losses along the way, the error on held-out images, and where tau went."""
        kind, sizes = NETS[cell["net"]], self.sizes
        images, labels, test, test_labels = self.split
        # Nets of one size and seed share the weights of their convolutions, and their batches.
        number = _seed("tau scaling: resnet", [cell["n"], cell["seed"]])
        net = ScaledResNet(
            cell["n"], kind.rule.tau(counted_blocks(cell["n"], len(sizes.widths))),
            in_channels=images.shape[1], num_classes=self.dataset.num_classes,
            widths=sizes.widths, bn=kind.bn, learnable=not kind.bn,
            generator=torch.Generator().manual_seed(number),
            device=self.device,
        )  # fmt: skip
        trainer = Trainer(
            net, resized(images, sizes.size), labels, self.recipe, seed=number,
            transform=pad_and_crop() if sizes.augment else None,
            evaluation=(resized(test, sizes.size), test_labels),
            parameters=net.parameter_groups(),
        )  # fmt: skip
        # A cell may take days. Its checkpoint is of use to the same program only.
        key = fingerprint([dict(cell), self.dataset.fingerprint, self.device, code_fingerprint()])
        checkpoint = self.checkpoints / f"{key[:16]}.pt"
        result = trainer.run(checkpoint=checkpoint)
        # Others may still be about to read it.
        if trainer.ranks.first:
            checkpoint.unlink(missing_ok=True)
        last = result.losses[-max(len(result.losses) // 10, 1) :]
        return {
            "status": result.status,
            "message": result.message,
            "num_steps": result.num_steps,
            "losses": _thinned(result.losses),
            "stride": _stride(result.losses),
            "epochs": result.num_steps / trainer.steps_per_epoch,
            "loss": float(np.mean(last)),
            "chance": math.log(self.dataset.num_classes),
            "num_test": len(test),
            "final_error": math.inf if result.final_error is None else result.final_error,
            "best_error": math.inf if result.best_error is None else result.best_error,
            "tau": float(torch.as_tensor(net.tau).detach()),
        }


def _thinned(losses: Sequence[float], limit: int = 500) -> np.ndarray:
    """Losses of so many steps at most, at equal distances."""
    return np.asarray(losses[:: _stride(losses, limit)], float)


def _stride(losses: Sequence[float], limit: int = 500) -> int:
    return max(-(-len(losses) // limit), 1)


def _rate(outputs: int, width: int) -> float:
    """Learning rate for the mean loss: 2 d/m, of the order that the theorem gives."""
    return 2 * outputs / width


def _seed(purpose: str, cell: Any) -> int:
    described = dict(cell) if isinstance(cell, Mapping) else cell
    return seed_from([purpose, described])
