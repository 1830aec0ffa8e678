"""Tables of the experiment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conditioning import theory
from experiments.claims import over_runs
from experiments.readings import number
from experiments.report import write_csv
from experiments.sweep import Pair, parts
from experiments.tau_scaling import curves
from experiments.tau_scaling.laboratory import DESCENDING, MULTIPLIED
from experiments.tau_scaling.rules import RULES

# Validation errors in per cent on CIFAR-10, read to 0.03 from the bar chart in the repository of
# the authors (Zhang et al., arXiv:1903.07120): orientation, never a threshold.
PAPER_ERRORS: Mapping[tuple[str, int], float] = {
    ("BN", 20): 8.08, ("BN", 32): 7.39, ("BN", 56): 6.73, ("BN", 110): 6.61, ("BN", 1202): 6.93,
    ("BN, 1/√L", 20): 7.89, ("BN, 1/√L", 32): 7.17, ("BN, 1/√L", 56): 6.18,
    ("BN, 1/√L", 110): 5.83, ("BN, 1/√L", 1202): 5.02,
}  # fmt: skip


def write(out: Path, measured: Sequence[Pair], data: str) -> None:
    """Write the tables.

    ``norms.csv`` (means over seeds of logarithms, and what is predicted), ``products.csv``,
    ``descent.csv`` (losses along the way), ``descent_ends.csv`` and ``resnets.csv``.
    """
    descents = [
        {"task": task, "tau": rule, "L": depth, "seed": seed, "step": step, "loss": loss}
        for task, rule, depth, rows in _descents(measured)
        for seed in range(rows.shape[1])
        for step, loss in enumerate(rows[:, seed])
        if step % 10 == 0 or step == len(rows) - 1
    ]
    for name, found in (
        ("norms", list(_norms(measured))),
        ("products", list(_products(measured))),
        ("descent", descents),
        ("descent_ends", list(_ends(measured))),
        ("resnets", [_resnet(cell, result, data) for cell, result in parts(measured, "train")]),
    ):
        write_csv(out / f"{name}.csv", pd.DataFrame(found))


def _norms(measured: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    for rule in RULES:
        quantities = {
            name: curves.norms(measured, name, rule) for name in ("forward", "highest", "backward")
        }
        quantities["gradient_spread"] = curves.spread(measured, rule)
        for quantity, found in quantities.items():
            for depth, values in found.items():
                mean, tau = over_runs(values), RULES[rule].tau(depth)
                low, high = mean.enclosure
                row = {
                    "tau": rule, "factor": tau, "L": depth, "quantity": quantity,
                    "seeds": len(values), "mean_log": mean.value, "low": low, "high": high,
                    "sd_log": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
                }  # fmt: skip
                if quantity == "forward":
                    bounds = theory.log_growth_bounds(tau, depth)
                    row |= {"lower_bound": bounds[0] / 2, "upper_bound": bounds[1] / 2}
                yield row


def _products(measured: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    for cell, result in parts(measured, "product"):
        for place, rule in enumerate(MULTIPLIED):
            yield {
                "tau": rule, "L": cell["L"], "seed": cell["seed"],
                **{f"spectral_norm_{k}" if k in ("value", "low", "high") else k: v
                   for k, v in result["spectral_norm"][rule].items()},
                "mean_log_forward": float(np.mean(result["forward"][place])),
                "mean_log_backward": float(np.mean(result["backward"][place])),
            }  # fmt: skip


def _descents(measured: Sequence[Pair]) -> Iterator[tuple[str, str, int, curves.Array]]:
    for task in ("descent", "images"):
        for rule in DESCENDING:
            for depth, rows in curves.losses(measured, task, rule).items():
                yield task, rule, depth, rows


def _ends(measured: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    wrong = {cell["L"]: np.asarray(result["errors"]) for cell, result in parts(measured, "images")}
    for task, rule, depth, rows in _descents(measured):
        last = rows[-max(len(rows) // 10, 1) :].mean(0)
        for seed in range(rows.shape[1]):
            finite = np.isfinite(last[seed])
            error = wrong[depth][DESCENDING.index(rule), seed] if task == "images" else math.nan
            yield {
                "task": task, "tau": rule, "L": depth, "seed": seed, "steps": len(rows),
                "first_loss": rows[0, seed], "last_loss": last[seed],
                "steps_to_a_tenth": curves.steps_to(rows, 0.05)[seed],
                "test_error": error if finite else math.nan,
            }  # fmt: skip


def _resnet(cell: Mapping[str, Any], result: Mapping[str, Any], data: str) -> dict[str, Any]:
    depth = 6 * cell["n"] + 2
    recorded = PAPER_ERRORS.get((cell["net"], depth)) if data == "cifar10" else None
    return {
        "net": cell["net"], "layers": depth, "seed": cell["seed"], "status": result["status"],
        "steps": result["num_steps"], "loss": number(result["loss"]),
        "final_error": number(result["final_error"]), "best_error": number(result["best_error"]),
        "tau_at_the_end": number(result["tau"]), "error_in_the_paper_percent": recorded,
    }  # fmt: skip
