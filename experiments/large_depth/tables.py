"""Tables of the experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conditioning import theory
from experiments.claims import over_runs
from experiments.large_depth import frontier, reference
from experiments.large_depth.verdicts import (
    KEYS,
    by_depth,
    distances,
    law_logs,
    moment_ratios,
    standard_errors_off,
)
from experiments.report import write_csv
from experiments.sweep import Pair, parts


def write(out: Path, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    """Write the tables.

    ``movements.csv`` (independent and smooth weights, by depth), ``moments.csv`` (against exact
    second moments), ``norms.csv`` (the log-normal law), ``orders.csv`` (convergence), ``map.csv``
    and ``critical.csv`` (over H and beta), ``regularity.csv`` and ``accuracy.csv`` (trained nets),
    and ``comparison.csv``, which puts what was measured beside numbers of others.
    """
    tables: dict[str, Any] = {
        "movements": _movements(measured, context),
        "moments": _moments(measured, context),
        "norms": _norms(measured, context),
        "orders": _orders(measured, context),
        "map": _map(measured, context),
        "critical": _critical(measured, context),
        "regularity": _regularity(measured),
        "accuracy": _accuracy(measured, context),
    }
    tables["comparison"] = _comparison(tables["movements"], tables["critical"], context)
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", pd.DataFrame(rows))


_COMPARED = ("quantity", "case", "beta_or_H", "L", "measured", "low", "high", "earlier", "authors")


def _comparison(
    movements: Sequence[Mapping[str, Any]],
    critical: Sequence[Mapping[str, Any]],
    context: Mapping[str, Any],
) -> pd.DataFrame:
    """Every number of others that has one here beside it; none where sizes differ."""
    sizes, rows = context["sizes"], []
    for row in movements:
        key, depth = (row["weights"], row["beta"]), row["L"]
        earlier = reference.EARLIER.get(key, {}).get(depth)
        authors = reference.AUTHORS.get(key, {}).get(depth)
        known = earlier is not None or authors is not None
        if row["of"] == "output" and sizes.width == reference.WIDTH and known:
            rows.append((
                "mean movement", row["weights"], row["beta"], depth, row["mean"], row["low"],
                row["high"], earlier, authors,
            ))  # fmt: skip
    for row in critical:
        earlier = reference.CRITICAL[row["block"]].get(row["H"])
        same = sizes.width == reference.WIDTH and sizes.map_depth == reference.CRITICAL_DEPTH
        if same and earlier is not None:
            rows.append((
                "critical beta", row["block"], row["H"], sizes.map_depth, row["beta"], row["low"],
                row["high"], earlier, None,
            ))  # fmt: skip
    return pd.DataFrame(rows, columns=list(_COMPARED))


def _movements(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes, rows = context["sizes"], []
    kinds: list[tuple[str, str, Sequence[float], dict[str, Any]]]
    kinds = [("independent", "iid", sizes.iid_betas, {})]
    kinds += [
        (f"smooth, {variant}", "smooth", sizes.smooth_betas, {"variant": variant})
        for variant in sorted({cell["variant"] for cell, _ in parts(measured, "smooth")})
    ]
    for label, part, betas, where in kinds:
        for key in KEYS:
            for depth, logs in by_depth(measured, part, key, **where).items():
                for place, beta in enumerate(betas):
                    values = np.exp(logs[:, place])
                    summary = over_runs(values.tolist())
                    rows.append({
                        "weights": label, "beta": beta, "L": depth, "of": key,
                        "nets": len(values), "mean": summary.value, "low": summary.enclosure[0],
                        "high": summary.enclosure[1], "median": np.median(values),
                        "root_mean_square": np.sqrt(np.mean(values**2)),
                        "mean_log": logs[:, place].mean(),
                    })  # fmt: skip
    return rows


def _moments(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each depth by itself: how many standard errors the mean square is off."""
    rows = []
    for key in KEYS:
        found = by_depth(measured, "iid", key)
        for place, beta in enumerate(context["sizes"].iid_betas):
            for depth, ratios in moment_ratios(found, place, beta).items():
                exact = theory.deviation_second_moment(depth, theory.scaling_factor(depth, beta))
                error = ratios.std(ddof=1) / len(ratios) ** 0.5 if len(ratios) > 1 else np.nan
                rows.append({
                    "of": key, "beta": beta, "L": depth, "nets": len(ratios),
                    "exact_root_mean_square": exact**0.5,
                    "measured_root_mean_square": (exact * ratios.mean()) ** 0.5,
                    "mean_square_over_exact": ratios.mean(), "standard_error": error,
                    "standard_errors_off": standard_errors_off(ratios),
                })  # fmt: skip
    return rows


def _norms(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = context["sizes"]
    groups = [
        (f"nets, {key}", sizes.law_depth, sizes.law_width, law_logs(measured, key)) for key in KEYS
    ]
    groups += [
        ("chain, output", cell["L"], cell["d"], np.asarray(result["logs"], dtype=float))
        for cell, result in parts(measured, "chain")
    ]
    rows = []
    for label, depth, width, logs in groups:
        mean, variance = theory.limit_log_norm_law(width)
        rows.append({
            "of": label, "L": depth, "d": width, "nets": len(logs),
            "mean_ratio": np.exp(logs).mean(), "sd_ratio": np.exp(logs).std(ddof=1),
            "median_ratio": np.exp(np.median(logs)), "predicted_median": np.exp(mean / 2),
            "mean_log": logs.mean(), "predicted_mean_log": mean / 2,
            "sd_log": logs.std(ddof=1), "predicted_sd_log": variance**0.5 / 2,
        })  # fmt: skip
    return rows


def _orders(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for cell, _ in parts(measured, "order"):
        curve = distances(measured, cell["limit"], cell["block"], context["sizes"].order_depths)
        for depth, values in curve.items():
            rows.append({
                "limit": cell["limit"], "block": cell["block"], "L": depth, "nets": len(values),
                "distance_to_2L": float(np.exp(np.log(values).mean())),
                "root_mean_square": float(np.sqrt((values**2).mean())),
            })  # fmt: skip
    return rows


def _map(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for block in theory_blocks(measured):
        output, gradient = (frontier.mean_map(measured, block, key) for key in KEYS)
        for place, hurst in enumerate(output[0]):
            for column, beta in enumerate(context["sizes"].map_betas):
                rows.append({
                    "block": block, "H": hurst, "beta": beta,
                    "mean_log10_output": output[1][place, column],
                    "mean_log10_gradient": gradient[1][place, column],
                })  # fmt: skip
    return rows


def theory_blocks(measured: Sequence[Pair]) -> list[str]:
    """Blocks of which there is a map, in the order of the cells."""
    return list(dict.fromkeys(cell["block"] for cell, _ in parts(measured, "map")))


def _critical(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes, rows = context["sizes"], []
    for block in theory_blocks(measured):
        output, gradient = (
            frontier.crossings(measured, sizes.map_betas, block, key) for key in KEYS
        )
        for hurst, values in output.items():
            summary, slower = over_runs(values), over_runs(gradient[hurst])
            rows.append({
                "block": block, "H": hurst, "nets": len(values),
                "beta": summary.value, "low": summary.enclosure[0], "high": summary.enclosure[1],
                "beta_gradient": slower.value, "gradient_low": slower.enclosure[0],
                "gradient_high": slower.enclosure[1],
                "predicted_compounded": theory.critical_beta(sizes.map_depth, hurst, block),
                "predicted_first_order": theory.critical_beta(
                    sizes.map_depth, hurst, block, compounded=False
                ),
                "predicted_limit": theory.critical_exponent(hurst, block),
                "predicted_gradient": theory.critical_beta(
                    sizes.map_depth, hurst, block, gradient=True, width=sizes.width
                ),
            })  # fmt: skip
    return rows


def _regularity(measured: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "init": cell["init"], "beta": cell["beta"], "seed": cell["seed"],
            "exponent_before": result["before"], "exponent_after": result["after"],
            "exponent_of_change": result["change"],
            "rise_if_change_were_smooth": result["if_smooth"], "relative_change": result["moved"],
            "loss": result["loss"], "test_accuracy": result["accuracy"],
        }
        for cell, result in parts(measured, "regularity")
    ]  # fmt: skip


def _accuracy(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes, rows = context["sizes"], []
    for cell, result in parts(measured, "accuracy"):
        for place, hurst in enumerate(cell["H"]):
            line = theory.critical_beta(sizes.train_depth, hurst, "res-1")
            for column, beta in enumerate(sizes.train_betas):
                for index, rate in enumerate(sizes.train_rates):
                    rows.append({
                        "seed": cell["seed"], "H": hurst, "beta": beta, "learning_rate": rate,
                        "above_line": beta > line,
                        **{
                            key: np.asarray(result[key], dtype=float)[place, column, index]
                            for key in ("loss", "train", "test")
                        },
                    })  # fmt: skip
    return rows
