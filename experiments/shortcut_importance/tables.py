"""Tables of the experiment: what was measured, beside what is recalled of the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.report import write_csv
from experiments.shortcut_importance.angles import angle_rows
from experiments.shortcut_importance.setting import CNN, COLD, METHODS, SHORT, TEACHERS, Method
from experiments.shortcut_importance.verdicts import rates_of, start_names
from experiments.sweep import Pair, parts

#: Success rates of the paper's experiment as recalled, not read off its text, for orientation
#: only: no claim rests on them. 5000 starts, 1000 steps of warm-up; its teacher is not known.
RECALLED_PATCHES = (16, 25, 36, 49, 64, 81, 100)
RECALLED: Mapping[Method, tuple[float, ...]] = {
    SHORT: (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    COLD: (0.7042, 0.7354, 0.7776, 0.7848, 0.8220, 0.8388, 0.8426),
    CNN: (0.5348, 0.5528, 0.5312, 0.5426, 0.5192, 0.5368, 0.5374),
}


def write(out: Path, measured: Sequence[Pair]) -> None:
    """Write the tables.

    ``rates.csv`` (success rates with intervals, and steps until the last start is decided),
    ``starts.csv`` (adversarial starts and a grid over the ball), ``critical.csv`` (critical points
    and Hessians), ``angles.csv`` (the range of first angles, and angles up to a right one),
    ``other.csv`` (without normalisation, on samples).
    """
    tables = {
        "rates": [*_rates(measured), *_recalled()],
        "starts": _starts(measured),
        "critical": _critical(measured),
        "angles": _angles(measured),
        "other": _other(measured),
    }
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", pd.DataFrame(rows))


def _rates(measured: Sequence[Pair]) -> list[dict[str, Any]]:
    rows = []
    for teacher in TEACHERS.values():
        for method in METHODS.values():
            results = parts(measured, "rates", teacher=teacher.name, method=method.name)
            for place, (k, rate) in enumerate(rates_of(measured, teacher, method).items()):
                low, high = rate.enclosure
                rows.append(
                    {"teacher": teacher.name, "method": method.name, "k": k,
                     "starts": rate.num_runs,
                     "undecided": sum(result["open"][place] for _, result in results),
                     "rate": rate.value, "low": low, "high": high,
                     "last_step": max(result["last_step"][place] for _, result in results)}
                )  # fmt: skip
    return rows


def _recalled() -> list[dict[str, Any]]:
    return [
        {"teacher": "recalled from the paper", "method": method.name, "k": k, "rate": rate}
        for method, rates in RECALLED.items()
        for k, rate in zip(RECALLED_PATCHES, rates, strict=True)
    ]


def _starts(measured: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {"method": cell["method"], "teacher": teacher, "adversarial_fate": fate,
         "global_on_grid": won, "undecided_on_grid": left, "starts_on_grid": result["starts"]}
        for cell, result in parts(measured, "starts")
        for teacher, fate, won, left in zip(
            start_names(cell), result["adversarial"], result["successes"], result["open"],
            strict=True,
        )
    ]  # fmt: skip


def _critical(measured: Sequence[Pair]) -> list[dict[str, Any]]:
    rows = []
    for cell, result in parts(measured, "critical"):
        spurious = result["spurious"]
        values = np.asarray(spurious["spectrum"], dtype=float)
        zero = 1e-9 * np.abs(values).max()
        rows.append(
            {"k": cell["k"], "ratio_to_threshold": cell["ratio"],
             "alignment": result["alignment"], "spurious_loss": spurious["loss"],
             # Roundings are told as such: their digits differ from machine to machine.
             "gradients_below_1e-12": max(
                 spurious["gradient"], result["optimum"]["gradient"]
             ) < 1e-12,
             "zero_eigenvalues": int((np.abs(values) <= zero).sum()),
             "negative_eigenvalues": int((values < -zero).sum()),
             "smallest_beside_over_distance": result["beside"],
             "predicted": result["beside_expected"],
             "least_rise": result["around"]["least"]}
        )  # fmt: skip
    return rows


def _angles(measured: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {"experiment": row.part, "squared_norm": f"{row.size:g}k", "r": row.share, "k": row.k,
         "predicted_over_pi": row.limit / math.pi, "edge_low_over_pi": row.edge.enclosure[0],
         "edge_high_over_pi": row.edge.enclosure[1], "angle_over_pi": angle / math.pi,
         "global": won, "undecided": left, "starts": row.runs, "adversarial_fate": fate}
        for row in angle_rows(measured)
        for angle, won, left, fate in zip(
            row.angles, row.successes, row.undecided, row.adversarial, strict=True
        )
    ]  # fmt: skip


def _other(measured: Sequence[Pair]) -> list[dict[str, Any]]:
    """Nets without normalisation, and trainings on samples, by method and norm."""
    kinds = [
        ("no normalisation", cell["k"], kind)
        for cell, result in parts(measured, "plain")
        for kind in result["kinds"]
    ]
    kinds += [("samples", cell["k"], {**cell, **result})
              for cell, result in parts(measured, "samples")]  # fmt: skip
    return [
        {"kind": name, "k": k, "method": kind["method"], "squared_norm": kind["squared_norm"],
         "first_seed": kind.get("first", 0), "runs": kind["runs"], "global": kind["successes"],
         "spurious": kind["spurious"], "undecided": kind["open"]}
        for name, k, kind in kinds
    ]  # fmt: skip
