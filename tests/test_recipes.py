"""The recipes of the docs run as they are printed; skipped where a package is not installed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from conditioning import GradientNorms
from tests.frameworks import (
    NAMES,
    Problem,
    fresh_accelerator,
    lightning_module,
    lightning_options,
    quiet,
    sgd,
    training_arguments,
)

PAGE = Path(__file__).parent.parent / "docs" / "recipes.rst"
LABELS = (
    "Plain loop", "TensorBoard, and any other logger", "Weights & Biases", "Lightning",
    "Hugging Face Trainer", "Accelerate",
)  # fmt: skip


def recipes():
    """The code blocks of the page, by the line that introduces each."""
    text = PAGE.read_text(encoding="utf-8")
    block = re.compile(r"^(\S[^\n]*):\n\n\.\. code-block:: python\n\n((?:   .*\n|\n)+)", re.M)
    return {label: textwrap.dedent(code).strip("\n") for label, code in block.findall(text)}


def execute(label, **names):
    """Run a recipe as the page prints it, and return its tracker and the other names."""
    names = {"GradientNorms": GradientNorms, **names}
    exec(compile(recipes()[label], f"recipes.rst, {label}", "exec"), names)
    return names["norms"], names


@pytest.fixture
def problem():
    return Problem()


def step_function(model, optimizer):
    """A user's own function for one step."""

    def train(batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    return train


def test_every_recipe_of_the_page_is_run_here():
    assert tuple(recipes()) == LABELS


@pytest.mark.parametrize("label", LABELS)
def test_a_recipe_is_six_lines_at_most(label):
    assert len(recipes()[label].splitlines()) <= 6


def test_plain_loop(problem, capsys):
    norms, _ = execute(
        "Plain loop", model=problem.net, loader=problem.batches(3), optimizer=sgd(problem.net),
        loss_fn=nn.functional.cross_entropy,
    )  # fmt: skip
    assert norms.num_steps == 3
    problem.check_first_step(norms)
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)


def test_tensorboard(problem, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        norms, _ = execute(
            "TensorBoard, and any other logger", model=problem.net, loader=problem.batches(21),
            train=step_function(problem.net, sgd(problem.net)), writer=writer,
        )  # fmt: skip
    problem.check_first_step(norms)
    written = EventAccumulator(str(tmp_path))
    written.Reload()
    for name in NAMES:
        events = written.Scalars(f"norms/ratio/{name}")
        assert [event.step for event in events] == [0, 10, 20]
        expected = norms.ratios()[name].tolist()
        assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)


def test_wandb(problem, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(mode="offline", dir=tmp_path, project="recipes", settings=settings)
    logged, log = [], run.log
    monkeypatch.setattr(run, "log", lambda values: (logged.append(values), log(values)))
    norms, _ = execute(
        "Weights & Biases", model=problem.net, loader=problem.batches(11),
        train=step_function(problem.net, sgd(problem.net)), run=run,
    )  # fmt: skip
    run.finish()
    problem.check_first_step(norms)
    assert all("loss" in values for values in logged)
    sent = [values.get("norms/ratio/blocks.1") for values in logged]
    ratios = norms.ratios()["blocks.1"].tolist()
    assert sent == [ratios[0], *[None] * 9, ratios[1]]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@quiet["lightning"]
def test_lightning(problem, tmp_path):
    lightning = pytest.importorskip("lightning")
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    logged = []
    logger.experiment.log_metrics = lambda values, step: logged.append(values)
    norms, _ = execute(
        "Lightning", lightning=lightning, module=lightning_module(problem.net),
        loader=problem.loader(4), options=lightning_options(tmp_path, logger=logger),
    )  # fmt: skip
    assert norms.num_steps == 4
    problem.check_first_step(norms)
    sent = [values["norms/ratio/net.blocks.1"] for values in logged]
    assert sent == norms.ratios()["net.blocks.1"].tolist()


def test_hugging_face_trainer(problem, tmp_path):
    transformers = pytest.importorskip("transformers")
    norms, names = execute(
        "Hugging Face Trainer", Trainer=transformers.Trainer, model=problem.net,
        dataset=problem.rows, arguments=training_arguments(tmp_path),
    )  # fmt: skip
    assert norms.num_steps == 3
    problem.check_first_step(norms)
    history = [logs for logs in names["trainer"].state.log_history if "loss" in logs]
    sent = [logs["norms/ratio/blocks.1"] for logs in history]
    assert sent == norms.ratios()["blocks.1"].tolist()


def test_accelerate(problem):
    with fresh_accelerator() as make:
        accelerator = make(gradient_accumulation_steps=2)
        logged, user = [], SimpleNamespace()
        accelerator.log = lambda values, step: logged.append(values)
        prepare = accelerator.prepare

        def prepared(*objects):
            user.model, user.optimizer, loader = prepare(*objects)
            return user.model, user.optimizer, loader

        def train(batch):
            accelerator.backward(nn.functional.cross_entropy(user.model(batch[0]), batch[1]))
            user.optimizer.step()
            user.optimizer.zero_grad()

        accelerator.prepare = prepared
        norms, _ = execute(
            "Accelerate", accelerator=accelerator, model=problem.net, optimizer=sgd(problem.net),
            loader=problem.loader(3, parts=2), train=train,
        )  # fmt: skip
    problem.check_first_step(norms)
    sent = [values.get("norms/ratio/blocks.1") for values in logged]
    first, second, third = norms.ratios()["blocks.1"]
    assert sent == [None, first, first, second, second, third]
