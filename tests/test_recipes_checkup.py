"""The recipes for checkups run as they are printed; skipped where a package is not installed."""

from __future__ import annotations

import functools
import re
import textwrap
from pathlib import Path

import pytest
from torch import nn

from conditioning.checkup import Checkup, checkup
from tests.frameworks import (
    NAMES,
    Problem,
    lightning_module,
    lightning_options,
    quiet,
    sgd,
    training_arguments,
)

PAGE = Path(__file__).parent.parent / "docs" / "checkup.rst"
LABELS = (
    "Checkup in a plain loop, with any logger", "Checkup before and after a change",
    "Checkup in Lightning", "Checkup in the Hugging Face Trainer",
)  # fmt: skip


def recipes():
    """The code blocks of the page, by the line that introduces each."""
    text = PAGE.read_text(encoding="utf-8")
    block = re.compile(r"^(\S[^\n]*):\n\n\.\. code-block:: python\n\n((?:   .*\n|\n)+)", re.M)
    return {label: textwrap.dedent(code).strip("\n") for label, code in block.findall(text)}


class Problems(Problem):
    """The problem with what the recipes take besides it."""

    def __init__(self):
        super().__init__()
        self.held = [self.data.tensors]

    def execute(self, label, **names):
        """Run a recipe as it is printed, and return the names that it leaves behind."""
        given = {
            "checkup": checkup, "model": self.net, "loss_fn": nn.functional.cross_entropy,
            "held": self.held, "every": 3, **names,
        }  # fmt: skip
        exec(compile(recipes()[label], f"{PAGE.name}, {label}", "exec"), given)
        return given

    def check(self, logged):
        """The first checkup is that of the untrained network, the later ones are others."""
        assert len(logged) == 2
        for key, value in untrained().items():
            assert logged[0][key] == pytest.approx(value, rel=1e-4), key
        losses = [values["checkup/loss"] for values in logged]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == len(losses)


@functools.cache
def untrained():
    """What does not depend on the time that a checkup of the untrained network takes."""
    problem = Problems()
    report = checkup(
        problem.net, nn.functional.cross_entropy, problem.held, num_matvecs=500, progress=False
    )
    names = ("loss", "gradient_norm", "lambda_max", "ratio_min", "product")
    return {f"checkup/{name}": report.scalars()[f"checkup/{name}"] for name in names}


@pytest.fixture
def problem():
    return Problems()


def test_every_recipe_of_the_page_is_run_here():
    assert tuple(recipes()) == LABELS


@pytest.mark.parametrize("label", LABELS)
def test_a_recipe_is_six_lines_at_most(label):
    assert len(recipes()[label].splitlines()) <= 6


class Writer:
    """What the loop needs of a logger."""

    def __init__(self):
        self.values = {}

    def add_scalar(self, name, value, step):
        self.values.setdefault(step, {})[name] = value


def test_plain_loop(problem):
    optimizer, writer = sgd(problem.net), Writer()

    def train(batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(problem.net(batch[0]), batch[1]).backward()
        optimizer.step()

    problem.execute(LABELS[0], loader=problem.batches(4), train=train, writer=writer)
    assert list(writer.values) == [0, 3]
    problem.check(list(writer.values.values()))


def test_before_and_after(problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def change(model):
        nn.init.zeros_(model.head.weight)

    names = problem.execute(LABELS[1], change=change)
    assert Checkup.load("before.json").blocks == names["before"].blocks
    shown = capsys.readouterr().out
    assert re.search(r"gradient norm .* yes$", shown, re.M)
    assert [block.name for block in names["after"].blocks] == list(NAMES)


@quiet["lightning"]
def test_lightning(problem, tmp_path):
    lightning = pytest.importorskip("lightning")
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    logged = []
    logger.experiment.log_metrics = lambda values, step: logged.append(values)
    problem.execute(
        LABELS[2], lightning=lightning, module=lightning_module(problem.net),
        loader=problem.loader(4), options=lightning_options(tmp_path, logger=logger),
    )  # fmt: skip
    sent = [values for values in logged if "checkup/loss" in values]
    problem.check(sent)


def test_hugging_face_trainer(problem, tmp_path):
    transformers = pytest.importorskip("transformers")
    inputs, labels = problem.data.tensors
    names = problem.execute(
        LABELS[3], Trainer=transformers.Trainer, TrainerCallback=transformers.TrainerCallback,
        every=2, held=[({"x": inputs}, labels)], arguments=training_arguments(tmp_path),
        loss_fn=lambda outputs, targets: nn.functional.cross_entropy(
            outputs["logits"] if isinstance(outputs, dict) else outputs, targets
        ), dataset=problem.rows,
    )  # fmt: skip
    history = names["trainer"].state.log_history
    sent = [values for values in history if "checkup/loss" in values]
    problem.check(sent)
