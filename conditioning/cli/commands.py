"""What the commands do: from options to a checkup, a comparison, and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conditioning.checkup.compare import compare, read
from conditioning.checkup.results import Checkup
from conditioning.checkup.run import checkup
from conditioning.checkup.text import verdict
from conditioning.cli.checkpoints import load_checkpoint
from conditioning.cli.datasets import (
    Amount,
    Given,
    find_data,
    fitted,
    from_object,
    random_inputs,
    random_tokens,
)
from conditioning.cli.interrupts import Interrupts
from conditioning.cli.losses import cross_entropy, find_loss, loss_for
from conditioning.cli.objects import Built, build
from conditioning.cli.outputs import Outputs, say
from conditioning.errors import ConditioningError, ExaminationError, InvalidArgumentError
from conditioning.operators.batches import tensors_in

EXIT_OK, EXIT_PROBLEMS, EXIT_UNUSABLE, EXIT_INTERRUPTED = 0, 1, 2, 130

Examine = Callable[..., Checkup]


def run_checkup(options: argparse.Namespace, examine: Examine | None = None) -> int:
    """Examine what the options name; print and write the result.

    Returns
    -------
    int
        0 if no problem was found, 1 if problems were, 130 if it was interrupted.
    """
    outputs = Outputs(options.json, options.text, options.html)
    outputs.check()
    with Interrupts() as interrupts:
        report, notes = _report(options, examine or checkup, outputs)
        interrupts.hold()
        _deliver(report, notes, options, outputs)
    if report.status == "interrupted":
        return EXIT_INTERRUPTED
    found = report.problems or report.nonfinite
    return EXIT_PROBLEMS if found and not options.exit_zero else EXIT_OK


def _report(
    options: argparse.Namespace, examine: Examine, outputs: Outputs
) -> tuple[Checkup, tuple[str, ...]]:
    """The checkup, and what is to be known of its data."""
    if options.classes is not None and not (options.input_shape or options.tokens):
        msg = "--classes is for random inputs: it goes with --input-shape or --tokens."
        raise InvalidArgumentError(msg)
    device = _device(options.device)
    stream = sys.stderr if outputs.on_stdout else sys.stdout
    # What a factory or a model prints must not end up among the JSON.
    with _plain_warnings(), contextlib.redirect_stdout(stream):
        built = build(options.factory, options.seed)
        notes = _prepare(built.model, options, device)
        loss_fn, given = _loss_and_data(built, options)
        given = fitted(given, built.model)
        report = _examined(examine, built.model, loss_fn, given, options)
    kept = (*given.notes, *notes, *report.setting.notes)
    return replace(report, setting=replace(report.setting, notes=kept)), given.notes


def _deliver(
    report: Checkup, notes: tuple[str, ...], options: argparse.Namespace, outputs: Outputs
) -> None:
    """Print and write. What fails is said when the rest is done: it may have taken minutes."""
    stream = sys.stderr if outputs.on_stdout else sys.stdout
    failure: OSError | None = None
    try:
        say(verdict(report) if options.quiet else report, stream)
        for note in notes if options.quiet else ():
            say(f"note: {note}", sys.stderr)
    except OSError as error:  # a reader who has closed the pipe still wants the files
        failure = error
    written = outputs.save(report)
    if failure is not None:
        raise failure
    if written and not options.quiet:
        say(f"\nwritten: {', '.join(map(str, written))}", stream)


def _examined(
    examine: Examine, model: nn.Module, loss_fn: Any, given: Given, options: argparse.Namespace
) -> Checkup:
    try:
        return examine(
            model, loss_fn, given.batches, blocks=options.blocks, params=options.params,
            learning_rate=options.learning_rate, momentum=options.momentum,
            seconds=options.budget, num_matvecs=options.max_matvecs, seed=options.seed,
            progress=not options.quiet,
        )  # fmt: skip
    except ConditioningError:
        raise
    except Exception as error:
        shapes = ["x".join(map(str, tensor.shape)) for tensor in tensors_in(given.batches[0])]
        batch = f" on a batch of the shapes {', '.join(shapes)}" if shapes else ""
        msg = (
            f"Examining {type(model).__name__}{batch} raised {type(error).__name__}: {error} "
            f"(--debug shows where)."
        )
        raise ExaminationError(msg) from error


def run_compare(options: argparse.Namespace) -> int:
    """Print two checkups side by side; 1 if there are problems that the first did not have."""
    comparison = compare(options.before, options.after)
    say(comparison.to_json() if options.json else comparison, sys.stdout)
    return EXIT_PROBLEMS if comparison.new_problems and not options.exit_zero else EXIT_OK


def run_show(options: argparse.Namespace) -> int:
    """Print a checkup that was saved, or write it in other forms."""
    outputs = Outputs(options.json, options.text, options.html)
    outputs.check()
    report = read(options.report)
    written = outputs.save(report)
    if not written and not outputs.on_stdout:
        say(report, sys.stdout)
    return EXIT_OK


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        msg = f"--device {name!r} is none that torch knows: cpu, cuda, cuda:N or mps."
        raise InvalidArgumentError(msg) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is seen"
        )
        msg = f"--device {name}: {built}. Leave it out to stay on the CPU."
        raise InvalidArgumentError(msg)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0."
        raise InvalidArgumentError(msg)
    if device.type == "mps" and not torch.backends.mps.is_available():
        msg = f"--device {name} is not available here. Leave it out to stay on the CPU."
        raise InvalidArgumentError(msg)
    try:
        held = torch.zeros(1, device=device).sum().item()
    except Exception as error:  # each backend has errors of its own
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        msg = f"--device {name} cannot be used: {reason}. Leave it out to stay on the CPU."
        raise InvalidArgumentError(msg) from error
    assert held == 0
    return device


def _prepare(
    model: nn.Module, options: argparse.Namespace, device: torch.device | None
) -> list[str]:
    notes = []
    if options.checkpoint is not None:
        more = load_checkpoint(model, options.checkpoint)
        notes += [f"weights from {Path(options.checkpoint).name}", *more]
    if options.dtype is not None:
        model.to(getattr(torch, options.dtype))
    if device is not None:
        model.to(device)
    if options.eval or options.train:
        model.train(options.train)
    return notes


def _loss_and_data(built: Built, options: argparse.Namespace) -> tuple[Any, Given]:
    amount = Amount(options.batch_size, options.batches, options.seed)
    loss_fn = find_loss(options.loss) if options.loss is not None else built.loss_fn
    known = options.loss is not None or built.complete
    if options.input_shape or options.tokens:
        loss_fn = loss_fn if known else cross_entropy
    if options.data is not None:
        given = find_data(options.data, amount)
    elif options.input_shape is not None:
        given = random_inputs(options.input_shape, options.classes, amount, built.model, loss_fn)
    elif options.tokens is not None:
        given = random_tokens(options.tokens, options.classes, amount)
    elif built.complete:
        given = from_object(built.data, options.factory, amount)
    else:
        msg = (
            f"There are no data: pass --data, or --input-shape with --classes, or let "
            f"{options.factory} return (model, loss_fn, data)."
        )
        raise InvalidArgumentError(msg)
    if not known and options.data is not None:
        loss_fn = loss_for(given.batches)
    return loss_fn, given


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the code that issues them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
