"""Tables of the experiment: what was measured, beside an earlier replication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.claims import over_runs
from experiments.report import write_csv
from experiments.shortcut_training import along, reference
from experiments.shortcut_training.best import Sweep, sweeps
from experiments.sweep import Pair, parts

# In tables and figures: where activations are, if any.
KINDS = {"sweep": "linear", "relu": "ReLU in the middle"}


def write(out: Path, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    """Write the tables.

    ``best.csv`` and ``learning_rates.csv`` (of every net and depth), ``curves.csv`` (losses and
    norms along trainings), ``spectra.csv``, and ``comparison.csv``, which puts what was measured
    beside an earlier replication on MNIST. Losses are above the least one where nets are linear.
    """
    best, rates = [], []
    swept = {part: sweeps(measured, part) for part in KINDS}
    for part, kind in KINDS.items():
        for sweep in swept[part].values():
            best.append(_best(kind, sweep))
            rates += _rates(kind, sweep)
    curves = [row for cell, result in parts(measured, "sweep") for row in _curve(cell, result)]
    spectra = [
        _spectrum(cell, {"step": 0, **result}, cell["seed"], context)
        for cell, result in parts(measured, "start")
    ]
    spectra += [
        _spectrum(cell, record, cell["first"] + place, context)
        for cell, result in parts(measured, "path")
        for place, path in enumerate(result["paths"])
        for record in path["records"]
    ]
    for name, rows in (
        ("best", best), ("learning_rates", rates), ("curves", curves), ("spectra", spectra),
        ("comparison", _comparison(measured, swept["sweep"], swept["relu"])),
    ):  # fmt: skip
        write_csv(out / f"{name}.csv", pd.DataFrame(rows))


def _best(kind: str, sweep: Sweep) -> dict[str, Any]:
    """One net at one depth at its best learning rate."""
    final = sweep.final
    summary = over_runs(final.tolist())
    low, high = summary.enclosure
    return {
        "kind": kind, "net": sweep.net, "L": sweep.depth, "seeds": len(final),
        "learning_rate": sweep.rate, "edge_of_grid": sweep.edge,
        "largest_finite_rate": sweep.largest_finite,
        "loss": summary.value, "loss_low": low, "loss_high": high,
        "loss_least": final.min(), "loss_greatest": final.max(),
        "norm": sweep.norms[sweep.best].mean(), "active_share": sweep.shares[sweep.best].mean(),
    }  # fmt: skip


def _comparison(
    measured: Sequence[Pair],
    linear: Mapping[tuple[str, int], Sweep],
    relu: Mapping[tuple[str, int], Sweep],
) -> list[dict[str, Any]]:
    """Every number of the earlier replication that has one here beside it."""
    starts: dict[tuple[str, int], list[float]] = {}
    for cell, result in parts(measured, "start"):
        starts.setdefault((cell["net"], cell["L"]), []).append(along.kappa10(result))
    here: dict[str, Mapping[tuple[str, int], float]] = {
        "κ₁₀ at initial weights": {k: float(np.mean(values)) for k, values in starts.items()},
        "final loss above the least one": {k: float(s.final.mean()) for k, s in linear.items()},
        "best learning rate": {k: s.rate for k, s in linear.items()},
        "mean Frobenius norm": {k: float(s.norms[s.best].mean()) for k, s in linear.items()},
        "final loss, ReLU in the middle": {k: float(s.final.mean()) for k, s in relu.items()},
    }
    rows: list[dict[str, Any]] = [
        {"quantity": quantity, "net": net, "L": depth, "loss": None,
         "measured": here[quantity][net, depth], "earlier_on_mnist": value}
        for quantity, (depths, table) in reference.tables().items()
        for net, values in table.items()
        for depth, value in zip(depths, values, strict=True)
        if (net, depth) in here[quantity]
    ]  # fmt: skip
    for net, values in reference.PATH.items():
        followed = along.paths(measured, net, reference.PATH_DEPTH)
        for loss, value in zip(reference.PATH_LOSSES, values, strict=True):
            excess = loss - reference.LEAST_LOSS
            found = along.at_level(followed, excess, along.kappa10)
            if found and not np.isnan(found).any():
                rows.append({
                    "quantity": "κ₁₀ along training", "net": net, "L": reference.PATH_DEPTH,
                    "loss": excess, "measured": float(np.exp(np.mean(np.log(found)))),
                    "earlier_on_mnist": value,
                })  # fmt: skip
    return rows


def _rates(kind: str, sweep: Sweep) -> list[dict[str, Any]]:
    rows = []
    for rate, losses, norms in zip(sweep.rates, sweep.losses, sweep.norms, strict=True):
        finite = np.isfinite(losses)
        rows.append({
            "kind": kind, "net": sweep.net, "L": sweep.depth, "learning_rate": rate,
            "seeds": len(losses), "diverged": int((~finite).sum()), "loss": losses.mean(),
            "loss_least": losses.min(), "loss_greatest": losses.max(),
            "norm": norms[finite].mean() if finite.any() else None,
        })  # fmt: skip
    return rows


def _curve(cell: Mapping[str, Any], result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Along the training at the best learning rate, means over seeds."""
    losses, norms = (np.asarray(result[key], dtype=float) for key in ("loss_curves", "norm_curves"))
    return [
        {"net": cell["net"], "L": cell["L"], "step": step, "loss": loss.mean(),
         "norm": norm.mean()}
        for step, loss, norm in zip(result["steps"], losses, norms, strict=True)
        if np.isfinite(loss).all()
    ]  # fmt: skip


def _spectrum(
    cell: Mapping[str, Any], record: Mapping[str, Any], seed: int, context: Mapping[str, Any]
) -> dict[str, Any]:
    kappa, index = record["kappa10"], record["index"]
    excess = record.get("loss")
    return {
        "part": cell["part"], "net": cell["net"], "L": cell["L"], "seed": seed, "n": record["n"],
        "step": record["step"], "loss": excess,
        "whole_loss": None if excess is None else excess + context["least_loss"],
        "gradient_norm": record.get("gradient"),
        "kappa10": kappa["value"], "kappa10_low": kappa["low"], "kappa10_high": kappa["high"],
        "status": kappa["status"], "largest": record["largest"]["value"],
        "tenth_percentile": record["tenth"]["value"], "most_negative": record["negative"],
        "index": index["value"], "index_low": index["low"], "index_high": index["high"],
    }  # fmt: skip
