"""A small problem in the forms that training frameworks want it in, with the true norms."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from conditioning import GradientNorms
from tests.architectures import MlpBlock
from tests.boundaries import boundaries

NAMES = ("blocks.0", "blocks.1", "blocks.2")
WIDTH, SAMPLES, CLASSES = 6, 8, 3
RTOL = 1e-4  # float32, and samples in another order
RTOL_BFLOAT16 = 0.03

# Warnings of others, for their sake: dynamo silences the first one itself, which does not help
# where warnings are errors.
quiet = {
    "dynamo": pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    "lightning": pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
        "ignore:The .*_dataloader. does not have many workers",
    ),
    "transformers": pytest.mark.filterwarnings(
        "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"
    ),
}


class Net(nn.Module):
    """Residual blocks between a stem and a head; it computes its loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(MlpBlock(WIDTH) for _ in NAMES)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        if labels is None:
            return x
        return {"loss": nn.functional.cross_entropy(x, labels), "logits": x}


class Rows(Dataset):
    """Samples as the Hugging Face Trainer wants them."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, label = self.data[index]
        return {"x": x, "labels": label}


class Problem:
    """A network and its data, which are one batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.data = TensorDataset(torch.randn(SAMPLES, WIDTH), torch.randint(CLASSES, (SAMPLES,)))
        self.rows = Rows(self.data)
        self._untrained = copy.deepcopy(self.net)

    def batches(self, steps: int) -> list[tuple[Tensor, ...]]:
        return [self.data.tensors] * steps

    def loader(self, steps: int, parts: int = 1) -> DataLoader:
        """All of the data in each step, in one batch or in parts."""
        return DataLoader(ConcatDataset([self.data] * steps), batch_size=SAMPLES // parts)

    def check_first_step(self, norms: GradientNorms, rel: float = RTOL) -> None:
        """Compare with autograd on the untrained network and all of the data."""
        inputs, labels = self.data.tensors
        blocks = GradientNorms(self._untrained, "blocks.*").blocks
        truth = boundaries(
            self._untrained, inputs, blocks, lambda y: nn.functional.cross_entropy(y, labels)
        )
        found = norms.points(0)
        assert [point.name.removeprefix("net.") for point in found] == list(NAMES)
        for point, border in zip(found, truth, strict=True):
            for quantity in ("grad_in", "grad_out", "act_in", "act_out"):
                assert point.values[quantity] == pytest.approx(getattr(border, quantity), rel=rel)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def lightning_module(net: nn.Module, *, manual: bool = False, overflow_in: int = -1) -> Any:
    """A LightningModule around the network; the loss of one step may be infinite."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = not manual

        def configure_optimizers(self):
            return sgd(self)

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            if index == overflow_in:
                loss = loss * math.inf
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    return Module()


def lightning_options(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(folder),
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, **options,
    }  # fmt: skip


def training_arguments(folder: Path, **options: Any) -> Any:
    """Three steps of the Hugging Face Trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return transformers.TrainingArguments(**{
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": SAMPLES,
        "use_cpu": True, "report_to": [], "logging_steps": 1, "disable_tqdm": True,
        "save_strategy": "no", "learning_rate": 0.1, "optim": "sgd", **options,
    })  # fmt: skip


@contextlib.contextmanager
def fresh_accelerator() -> Iterator[Callable[..., Any]]:
    """Makes accelerators, and forgets the state that they share."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    forget()
