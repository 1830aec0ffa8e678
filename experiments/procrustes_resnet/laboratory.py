"""What is measured: one function for each kind of cell, from a description to plain numbers."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from conditioning import GradientNorms, Procrustes
from conditioning.errors import ConditioningError, NonFiniteGradientWarning
from experiments.augment import pad_and_crop
from experiments.data import Dataset
from experiments.models import CifarResNet
from experiments.pictures import resized, split_pictures
from experiments.procrustes_resnet import operators
from experiments.procrustes_resnet.nets import NETS
from experiments.ratios import split_summary, windows_of
from experiments.store import code_fingerprint, fingerprint, seed_from
from experiments.training import Recipe, Trainer, deterministic_kernels

if TYPE_CHECKING:
    from experiments.procrustes_resnet import Sizes

Cell = Mapping[str, Any]


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
        self.sizes, self.device, self.checkpoints = sizes, device, checkpoints
        self.dataset = dataset
        self._kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "full size": operators.full_size,
            "operator": operators.measure,
            "init": self.initial,
            "train": self.train,
        }

    def describe(self) -> str:
        """Data and schedule, for the titles of figures."""
        epochs = f"{self.sizes.epochs:g} epoch{'s' if self.sizes.epochs != 1 else ''}"
        shown = [f"{self.dataset.name} {self.sizes.size}×{self.sizes.size}", epochs]
        return ", ".join([*shown, f"batch {self.sizes.batch}", f"lr {self.recipe.lr:g}"])

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; ``cell["part"]`` says which kind it is."""
        with deterministic_kernels():
            return self._kinds[cell["part"]](cell)

    # -- pieces ---------------------------------------------------------------------------------

    @functools.cached_property
    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and labels to train on, and to test on; standardised by the former."""
        return split_pictures(self.dataset)

    @functools.lru_cache(maxsize=4)  # noqa: B019 -- one object lives as long as the run
    def pictures(self, size: int) -> tuple[Tensor, Tensor]:
        """Images to train on and to test on, with sides of this length."""
        return resized(self.split[0], size), resized(self.split[2], size)

    def net(self, cell: Cell) -> CifarResNet:
        """The net of a cell; nets of one seed share their draws as far as their shapes agree."""
        return CifarResNet(
            cell["n"],
            **NETS[cell["net"]].options,
            in_channels=self.split[0].shape[1],
            num_classes=self.dataset.num_classes,
            generator=torch.Generator().manual_seed(_seed("net", cell)),
            device=self.device,
        )

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The paper's rates, scaled to the length."""
        per_epoch = len(self.split[0]) // self.sizes.batch
        return Recipe(
            num_steps=round(self.sizes.epochs * per_epoch), batch_size=self.sizes.batch, lr=0.1,
            momentum=0.9, weight_decay=1e-4, milestones=(0.5, 0.75),
            precision=self.sizes.precision,  # type: ignore[arg-type]
        )  # fmt: skip

    # -- the kinds ------------------------------------------------------------------------------

    def initial(self, cell: Cell) -> dict[str, Any]:
        """Ratios at initialisation, over a few batches in training mode."""
        net = self.net(cell).train()
        images, labels = self.pictures(self.sizes.initial_size)[0], self.split[1]
        generator = torch.Generator().manual_seed(_seed("batches", cell))
        norms = GradientNorms(net, activations=False, inputs=images[:2].to(self.device))
        with norms:
            for _ in range(self.sizes.initial_batches):
                chosen = torch.randperm(len(images), generator=generator)
                chosen = chosen[: self.sizes.initial_batch]
                net.zero_grad(set_to_none=True)
                outputs = net(images[chosen].to(self.device))
                nn.functional.cross_entropy(outputs, labels[chosen].to(self.device)).backward()
                norms.step()
        transitions = norms.blocks.transitions
        return {
            "blocks": norms.blocks.names,
            "transitions": transitions,
            "num_parameters": sum(p.numel() for p in net.parameters()),
            **split_summary(norms.ratios(), transitions),
        }

    def train(self, cell: Cell) -> dict[str, Any]:
        """A training: ratios along the way, errors on held-out images, spectra at its end."""
        kind, net, sizes = NETS[cell["net"]], self.net(cell), self.sizes
        (images, test), (_, labels, _, test_labels) = self.pictures(sizes.size), self.split
        sample = images[:2].to(self.device)
        norms = GradientNorms(net, activations=False, every=sizes.every, inputs=sample)
        trainer_of = functools.partial(
            Trainer, net, images, labels, self.recipe, seed=cell["seed"],
            transform=pad_and_crop() if sizes.augment else None,
            evaluation=(test, test_labels),
            evaluate_every=max(len(images) // sizes.batch // sizes.evaluations, 1),
        )  # fmt: skip
        procrustes = Procrustes.for_transitions(net, sample)
        if kind.projected:
            procrustes.project()
            trainer = trainer_of(stateful=[norms, procrustes])
            procrustes.attach(trainer.optimizer, probability=kind.probability, seed=cell["seed"])
        else:
            trainer = trainer_of(stateful=[norms])
        # A cell may take days. Its checkpoint is of use to the same program only.
        key = fingerprint([dict(cell), self.dataset.fingerprint, self.device, code_fingerprint()])
        checkpoint = self.checkpoints / f"{key[:16]}.pt"
        with warnings.catch_warnings():
            # A training that diverges is a result here.
            warnings.simplefilter("ignore", NonFiniteGradientWarning)
            with norms:
                result = trainer.run(checkpoint=checkpoint)
        procrustes.detach()
        # Others may still be about to read it.
        if trainer.ranks.first:
            checkpoint.unlink(missing_ok=True)
        frame = norms.ratios()
        transitions = norms.blocks.transitions
        finite = frame[np.isfinite(frame.to_numpy()).all(axis=1)]
        later = finite.loc[1:]
        last = result.losses[-max(len(result.losses) // 10, 1) :]
        return {
            "blocks": norms.blocks.names,
            "transitions": transitions,
            "status": result.status,
            "message": result.message,
            "num_steps": result.num_steps,
            "loss": float(np.mean(last)),
            "mean_loss": float(np.mean(result.losses)),
            "chance": math.log(self.dataset.num_classes),
            "num_parameters": sum(p.numel() for p in net.parameters()),
            "num_test": len(test),
            "training": split_summary(later if len(later) else frame.iloc[:1], transitions),
            "windows": [
                {"first": first, "last": end, **split_summary(some, transitions)}
                for first, end in windows_of(self.recipe.num_steps)
                if len(some := finite.loc[first:end])
            ],
            "steps": finite.index.to_numpy(),
            "downsampling_ratios": finite[
                [name for name in transitions if name != frame.columns[0]]
            ].to_numpy(),
            "evaluations": [
                {
                    "step": one.step,
                    "epochs": one.step / trainer.steps_per_epoch,
                    "loss": one.loss,
                    "error": one.error,
                }
                for one in result.evaluations
            ],
            "final_error": math.inf if result.final_error is None else result.final_error,
            "best_error": math.inf if result.best_error is None else result.best_error,
            "projections": procrustes.num_projections,
            "layers": _spectra(procrustes),
            "projected": _spectra_projected(procrustes),
        }


def _spectra(procrustes: Procrustes) -> list[dict[str, Any]]:
    """Ranges of the singular values of stem and transitions."""
    return [{"name": row.name, "target": row.target, "now": row.now} for row in procrustes.report()]


def _spectra_projected(procrustes: Procrustes) -> list[dict[str, Any]]:
    """The same after a projection; layers of which one is not exact are left out."""
    try:
        procrustes.project()
    except ConditioningError:
        return []  # a training that diverged
    exact = {layer.name for layer in procrustes.layers if layer.shape.route != "frequencies"}
    return [row for row in _spectra(procrustes) if row["name"] in exact]


def _seed(purpose: str, cell: Cell) -> int:
    return seed_from([purpose, cell["seed"]])
