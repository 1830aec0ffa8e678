"""Verdicts about trained nets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conditioning import theory
from experiments.claims import Measured, Verdict, decide, decide_every, over_runs
from experiments.large_depth import frontier
from experiments.large_depth.statements import BY_ID
from experiments.readings import Array, number
from experiments.sweep import Pair, parts

Context = Mapping[str, Any]
# So many cells of a map are named in a note.
_SHOWN = 12


def decide_regularity(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide the claims about the layers."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell, result in parts(measured, "regularity"):
        groups.setdefault((cell["init"], cell["beta"]), []).append(result)
    runs = {key: f"{key[0]}, β = {key[1]:g}" for key in groups}
    notes = {key: f"{runs[key]}: {_trained(results)}" for key, results in groups.items()}
    smooth = [key for key in groups if key[0] == "smooth"]
    rough = [key for key in groups if key[0] != "smooth"]
    changed = {key: [r["after"] - r["before"] for r in results] for key, results in groups.items()}
    changes = {
        key: over_runs([result["change"] for result in results], run=runs[key])
        for key, results in groups.items()
    }
    return [
        decide_every(
            BY_ID["regularity.smooth"],
            [over_runs(changed[key], run=runs[key]) for key in smooth],
            note="; ".join(notes[key] for key in smooth),
        ),
        decide_every(
            BY_ID["regularity.rough"], [over_runs(changed[key], run=runs[key]) for key in rough],
            note="; ".join(
                f"{notes[key]}; smooth, that change would add {_if_smooth(groups[key]):.4f}"
                for key in rough
            ),
        ),
        decide_every(BY_ID["regularity.change"], [changes[key] for key in smooth]),
        decide_every(
            BY_ID["regularity.change-rough"], [changes[key] for key in rough],
            note=", ".join(f"{changes[key].run}: {changes[key].value:.3f}" for key in rough),
        ),
    ]  # fmt: skip


def _trained(results: Sequence[Mapping[str, Any]]) -> str:
    """How much training did, for a reader."""
    before, after, moved, accuracy = (
        float(np.mean([result[key] for result in results]))
        for key in ("before", "after", "moved", "accuracy")
    )
    return (
        f"exponent {before:.3f} before, {after:.3f} after; layers moved by {moved:.2g} of their "
        f"norm, accuracy {accuracy:.3f}"
    )


def _if_smooth(results: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([number(result["if_smooth"]) for result in results]))


def decide_accuracy(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    """Decide the claims about accuracies."""
    sizes = context["sizes"]
    betas, chance = sizes.train_betas, context["commonest"]
    best = frontier.best_accuracies(measured)
    hursts = list(next(iter(best.values())))
    tables = np.array([[rows[hurst] for hurst in hursts] for rows in best.values()])
    above = frontier.above_line(hursts, betas, sizes.train_depth)

    def at(row: int, column: int) -> Measured:
        run = f"H = {hursts[row]}, β = {betas[column]}"
        return over_runs(tables[:, row, column].tolist(), expected=chance, run=run)

    below = [at(row, column) for row, column in np.argwhere(~above).tolist()]
    run = f"L = {sizes.train_depth}"
    note = ""
    if 0 < above.sum() < above.size:
        note = (
            f"means {tables[:, above].mean():.3f} above, {tables[:, ~above].mean():.3f} below; "
            f"least above {tables.mean(0)[above].min():.3f}, "
            f"greatest below {tables.mean(0)[~above].max():.3f}"
        )
    return [
        decide(
            BY_ID["accuracy.above"], over_runs(gaps(tables, above, axis=0), run=run), note=note
        ),
        decide(BY_ID["accuracy.above-hurst"], over_runs(gaps(tables, above, axis=1), run=run)),
        decide(BY_ID["accuracy.corner"], at(hursts.index(max(hursts)), betas.index(min(betas)))),
        decide_every(BY_ID["accuracy.below"], below, note=_by_distance(tables, hursts, sizes)),
    ]  # fmt: skip


def gaps(tables: Array, above: NDArray[np.bool_], *, axis: int) -> list[float]:
    """Accuracies above the line less those below it, at equal values along the other axis.

    ``tables`` has the shape (seeds, H, betas). With ``axis`` 0 means over H are compared, at each
    beta that has H on both sides; with 1 those over beta. NaN where nothing has both sides.
    """
    both = above.any(axis) & ~above.all(axis)
    if not both.any():
        return [math.nan] * len(tables)
    found = []
    for table in tables:
        means = [np.where(side, table, 0.0).sum(axis)[both] for side in (above, ~above)]
        counts = [side.sum(axis)[both] for side in (above, ~above)]
        found.append(float((means[0] / counts[0] - means[1] / counts[1]).mean()))
    return found


def _by_distance(tables: Array, hursts: Sequence[float], sizes: Any) -> str:
    """Mean accuracy of every cell below the line, nearest first, for a reader."""
    means, found = tables.mean(0), []
    for row, hurst in enumerate(hursts):
        line = theory.critical_beta(sizes.train_depth, hurst, "res-1")
        found += [
            (line - beta, float(means[row, column]))
            for column, beta in enumerate(sizes.train_betas)
            if beta <= line
        ]
    return "distance below the line: accuracy; " + ", ".join(
        f"{distance:.2f}: {value:.2f}" for distance, value in sorted(found)[:_SHOWN]
    )
