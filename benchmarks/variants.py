"""What is timed: bare steps, ``GradientNorms``, and other tools.

Each function makes the variants of one worker process.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.polar_routes import three_layers
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.worker import Variant
from conditioning import GradientNorms, Procrustes, find_blocks

BARE = "bare"
Step = Callable[[], Any]


@contextlib.contextmanager
def _bare(problem: Problem) -> Iterator[Step]:
    yield problem.step


@contextlib.contextmanager
def _tracked(problem: Problem, *, scalars: bool = False, **options: Any) -> Iterator[Step]:
    blocks = find_blocks(problem.model, problem.inputs)
    with GradientNorms(problem.model, blocks, **options) as norms:

        def step() -> None:
            problem.step()
            if scalars:
                norms.scalars()

        yield step


def library(problem_name: str, device: str, **size: int) -> dict[str, Variant]:
    """All on one model, so that its place in memory is the same for all."""
    problem = PROBLEMS[problem_name](device, **size)
    return {
        BARE: lambda: _bare(problem),
        "every 10 steps": lambda: _tracked(problem, every=10),
        "every step": lambda: _tracked(problem),
        "every 10 steps, gradients only": lambda: _tracked(problem, activations=False, every=10),
        "every step, gradients only": lambda: _tracked(problem, activations=False),
        "every step, shares": lambda: _tracked(problem, shares=True),
        "every step, per sample": lambda: _tracked(problem, statistic="sample"),
        "every step, and scalars()": lambda: _tracked(problem, scalars=True),
    }


def compiled(problem_name: str, device: str, every: str) -> dict[str, Variant]:
    """Tracking must begin before the first compiled call: a process for each.

    ``every="0"`` is not tracked.
    """
    problem = PROBLEMS[problem_name](device)
    norms = None
    if int(every):
        blocks = find_blocks(problem.model, problem.inputs)
        norms = GradientNorms(problem.model, blocks, every=int(every)).attach()
    problem.model.compile()

    @contextlib.contextmanager
    def turn() -> Iterator[Step]:
        before = norms.num_steps if norms else 0
        yield problem.step
        if norms and norms.num_steps == before:
            msg = "The compiled step was not tracked."
            raise RuntimeError(msg)

    return {BARE: turn}


def wandb(problem_name: str, device: str) -> dict[str, Variant]:
    """Offline. What the hooks of ``watch`` find is shipped by ``run.log``: timed apart, too."""
    import wandb

    problem = PROBLEMS[problem_name](device)
    settings = wandb.Settings(silent=True, console="off")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = wandb.init(mode="offline", dir=folder, project="benchmark", settings=settings)

    @contextlib.contextmanager
    def logged(*, watch: bool) -> Iterator[Step]:
        if watch:
            run.watch(problem.model, log="gradients", log_freq=1)

        def step() -> None:
            run.log({"loss": problem.step().item()})

        yield step
        if watch:
            run.unwatch(problem.model)

    return {
        BARE: lambda: _bare(problem),
        "W&B run.log(loss)": lambda: logged(watch=False),
        "W&B watch(log_freq=1)": lambda: logged(watch=True),
    }


def torchlens(problem_name: str, device: str) -> dict[str, Variant]:
    """Every operation's output and gradient."""
    import torchlens

    problem = PROBLEMS[problem_name](device)
    capture = torchlens.options.CaptureOptions(
        layers_to_save="all", save_grads=True, backward_ready=True
    )

    def step() -> None:
        problem.optimizer.zero_grad()
        trace = torchlens.trace(problem.model, problem.inputs, capture=capture)
        output = trace[trace.output_layers[0]].out
        trace.log_backward(nn.functional.cross_entropy(output, problem.targets))
        problem.optimizer.step()

    return {
        BARE: lambda: _bare(problem),
        "TorchLens, full capture": lambda: contextlib.nullcontext(step),
    }


def procrustes(problem_name: str, device: str) -> dict[str, Variant]:
    """Training steps with and without projection of stem and transitions."""
    problem = PROBLEMS[problem_name](device)

    @contextlib.contextmanager
    def projected(**options: Any) -> Iterator[Step]:
        regulariser = Procrustes.for_transitions(problem.model, problem.inputs)
        regulariser.attach(problem.optimizer, **options)
        yield problem.step
        regulariser.detach()

    return {
        BARE: lambda: _bare(problem),
        "every step": projected,
        "probability 0.5": lambda: projected(probability=0.5),
        "every 10 steps": lambda: projected(every=10),
    }


def projection(_: str, device: str) -> dict[str, Variant]:
    """One projection of the paper's three layers, by several routes."""
    return {
        name: lambda route=route: contextlib.nullcontext(route)
        for name, route in three_layers(device).items()
    }


FACTORIES: dict[str, Callable[..., dict[str, Variant]]] = {
    "library": library,
    "compiled": compiled,
    "procrustes": procrustes,
    "projection": projection,
    "wandb": wandb,
    "torchlens": torchlens,
}
