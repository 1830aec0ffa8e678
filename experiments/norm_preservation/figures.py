"""Tables and figures of the norm-preservation experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conditioning import plots
from experiments.norm_preservation.statements import CONSTANT
from experiments.norm_preservation.verdicts import (
    FIRST_DEPTH,
    Pair,
    constants,
    curves,
    parts,
)
from experiments.report import atomic_write

_LOOKS: Mapping[str, tuple[str, Any, str]] = {
    "skip, BN": ("skip and BN", plots.PALETTE[0], "o"),
    "skip, scaled": ("skip, no BN, branch × 1/√L", plots.PALETTE[2], "s"),
    "skip": ("skip, no BN, unscaled", plots.PALETTE[1], "^"),
    "plain, BN": ("no skip, BN", plots.PALETTE[3], "D"),
    "ResNet": ("ResNet", plots.PALETTE[3], "s"),
    "ProcResNet": ("ProcResNet", plots.PALETTE[0], "o"),
    "ResNet, shortcut × 0.01": ("ResNet, shortcut × 0.01", plots.PALETTE[1], "^"),
    "ProcResNet, 2×2": ("ProcResNet, flat 2×2 transitions", plots.PALETTE[2], "D"),
}
MLPS = ("skip, BN", "skip, scaled", "skip", "plain, BN")


# -- tables ---------------------------------------------------------------------------------


def _summary_row(cell: Mapping[str, Any], moment: str, found: Mapping[str, Any]) -> dict[str, Any]:
    row = {**cell, "moment": moment}
    for blocks in ("", "identity", "transition"):
        some = found.get(blocks) if blocks else found
        if some is not None:
            prefix = f"{blocks}_" if blocks else ""
            row[f"{prefix}mean"], row[f"{prefix}max"] = some["mean"], some["max"]
    row["log_product"] = found["log_product"]
    return row


def write_tables(out: Path, measured: Sequence[Pair]) -> None:
    """Write ``deviations.csv``, ``ratios.csv``, ``trainings.csv`` and ``jacobians.csv``."""
    rows, ratios, trainings, jacobians = [], [], [], []
    for cell, result in measured:
        if cell["part"].endswith("init"):
            rows.append(_summary_row(cell, "initial", result))
            rows[-1]["predicted_mean"] = result.get("predicted", {}).get("mean")
        elif cell["part"].endswith("train"):
            rows += [_summary_row(cell, m, result[m]) for m in ("initial", "training")]
            keys = ("status", "num_steps", "loss", "chance", "message")
            trainings.append({**cell, **{key: result[key] for key in keys}})
        elif cell["part"] == "jacobian":
            jacobians += [_jacobian_row(cell, block) for block in result["blocks"]]
        if cell["part"].startswith("conv"):
            moments = result.get("windows") or [{"first": 0, "last": 0, **result}]
            for moment in moments:
                ratios += [
                    {**cell, "first_step": moment["first"], "last_step": moment["last"],
                     "depth": depth, "block": block, "transition": block in result["transitions"],
                     "ratio": ratio}
                    for depth, (block, ratio) in enumerate(
                        zip(result["blocks"], moment["ratios"], strict=True), 1
                    )
                ]  # fmt: skip
    order = ["part", "net", "L", "n", "width", "batch", "seed", "moment"]
    for name, content in (
        ("deviations", rows), ("ratios", ratios), ("trainings", trainings),
        ("jacobians", jacobians),
    ):  # fmt: skip
        frame = pd.DataFrame(content)
        first = [column for column in order if column in frame]
        frame = frame[first + [column for column in frame if column not in first]]
        whole = {c: "Int64" for c in ("L", "n", "width", "batch") if c in frame}
        _write(out / f"{name}.csv", frame.astype(whole))


def _jacobian_row(cell: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    row = {**cell, "block": block["name"], "kind": block["kind"], "ratio": block["ratio"]}
    row["ratio_low"], row["ratio_high"] = block["bounds"]
    for key, column in (("largest", "sigma_max"), ("smallest", "sigma_min"), ("branch", "branch")):
        for end in ("value", "low", "high"):
            found = block[key]
            row[column if end == "value" else f"{column}_{end}"] = found and found[end]
    return {**row, "status": block["status"], "products": block["products"]}


def _write(path: Path, frame: pd.DataFrame) -> None:
    atomic_write(path, frame.to_csv(index=False, float_format="%.12g", lineterminator="\n"))


# -- figures --------------------------------------------------------------------------------


def draw(out: Path, measured: Sequence[Pair], data: str) -> None:
    """Draw the figures for which there are measurements."""
    with plots.style():
        _deviations(out / "mean_deviation.png", measured, data)
        _ratios(out / "ratios_in_training.png", measured, data)
        _products(out / "products.png", measured, data)
        _jacobians(out / "jacobians.png", measured, data)


def _depth_axis(ax: Any, depths: Sequence[int], label: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel(label)
    ticks = sorted(set(depths))
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()


def _statistics(
    cells: Sequence[Pair], value: Any, key: str = "L"
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Depths, geometric means over seeds, and the least and largest."""
    depths = sorted({cell[key] for cell, _ in cells})
    logs = [np.log([value(r) for c, r in cells if c[key] == depth]) for depth in depths]
    means, low, high = (np.exp([f(some) for some in logs]) for f in (np.mean, np.min, np.max))
    return depths, means, low, high


def _curve(
    ax: Any, net: str, cells: Sequence[Pair], value: Any, key: str = "L", **more: Any
) -> None:
    if not cells:
        return
    label, color, marker = _LOOKS[net]
    depths, means, low, high = _statistics(cells, value, key)
    options = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1, "label": label}
    ax.errorbar(depths, means, yerr=[means - low, high - means], capsize=2, **{**options, **more})


def _deviations(path: Path, measured: Sequence[Pair], data: str) -> None:
    figure, axes = plots.new_axes(2, width=6.0, height=4.8)
    initial = [(c, r) for c, r in parts(measured, "mlp init") if c["width"] == 32]
    trained = parts(measured, "mlp train")
    stuck = {(c["net"], c["L"]) for c, r in trained if not _has_learnt(r)}
    titles = (
        "At initialisation: with skip and BN the mean falls as\nlog(2L)/L, the largest |1 − r| "
        "does not fall",
        "In training: with skip and BN the mean falls at least as\nfast, the largest more slowly",
    )
    sides = (initial, [(c, r["training"]) for c, r in trained])
    depths = sorted({c["L"] for c, _ in [*initial, *trained]})
    for ax, cells, title in zip(axes, sides, titles, strict=True):
        aside = stuck if ax is axes[1] else set()
        for net in MLPS:
            some = [(c, r) for c, r in cells if c["net"] == net]
            _curve(ax, net, [p for p in some if (net, p[0]["L"]) not in aside], _mean)
            crossed = [p for p in some if (net, p[0]["L"]) in aside]
            _curve(ax, net, crossed, _mean, linestyle="none", marker="x", label=None)
        both = [(c, r) for c, r in cells if c["net"] == "skip, BN"]
        _curve(
            ax, "skip, BN", both, lambda r: r["max"], linestyle="none", markerfacecolor="none",
            label="skip and BN: largest over blocks",
        )  # fmt: skip
        _law(ax, both)
        ax.set_title(title)
        _depth_axis(ax, depths, "L, number of residual blocks")
        ax.set_ylabel("|1 − r|, mean over the blocks of a net")
    predicted = [
        (c, r["predicted"]) for c, r in initial if c["net"] == "skip, BN" and "predicted" in r
    ]
    if predicted:
        ends, means, _, _ = _statistics(predicted, _mean)
        axes[0].plot(
            ends, means, color="0.1", linewidth=1.2, linestyle=":",
            label="mean field, nothing fitted", zorder=3,
        )  # fmt: skip
    _same_limits(axes)
    axes[1].plot([], [], "x", color="0.35", label="does not train")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles, labels, loc="lower left", fontsize="small")
    handles, labels = axes[1].get_legend_handles_labels()
    kept = [i for i, text in enumerate(labels) if text.startswith(("c·", "does"))]
    axes[1].legend(
        [handles[i] for i in kept], [labels[i] for i in kept], loc="lower left", fontsize="small"
    )
    figure.suptitle(f"MLPs of width 32 on {data}; bars: range over seeds", x=0.01, ha="left")
    plots.save(figure, path)


def _mean(result: Mapping[str, Any]) -> float:
    return float(result["mean"])


def _has_learnt(result: Mapping[str, Any]) -> bool:
    return bool(result["status"] == "finished" and result["loss"] < 0.5 * result["chance"])


def _law(ax: Any, cells: Sequence[Pair]) -> None:
    """``c log(2L)/L`` with the constant of the cells from L = 4 on, and its spread over seeds."""
    by_seed = curves([(c, r) for c, r in cells if c["L"] >= FIRST_DEPTH], _mean)
    if not by_seed:
        return
    found = [float(np.mean(list(constants(curve).values()))) for curve in by_seed.values()]
    c, spread = float(np.mean(found)), float(np.std(found))
    dense = np.geomspace(min(c["L"] for c, _ in cells), max(c["L"] for c, _ in cells), 100)
    ax.plot(
        dense, [c * np.log(2 * d) / d for d in dense], color="0.35", linestyle="--", linewidth=1,
        label=f"c·log(2L)/L, c = {c:.2f} ± {spread:.2f}",
    )  # fmt: skip


def _same_limits(axes: Sequence[Any]) -> None:
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)


def _ratios(path: Path, measured: Sequence[Pair], data: str) -> None:
    trained = parts(measured, "conv train")
    n = max((c["n"] for c, _ in trained), default=0)
    figure, axes = plots.new_axes(2, width=6.4, height=4.6)
    facts = {
        "ResNet": "transitions are the outliers",
        "ProcResNet": "transitions stay near 1, the first block not",
    }
    for ax, net in zip(axes, ("ResNet", "ProcResNet"), strict=True):
        results = [r for c, r in trained if c["net"] == net and c["n"] == n and r["windows"]]
        if not results:
            continue
        windows = [(w["first"], w["last"]) for w in results[0]["windows"]]
        rows = []
        for index in range(len(windows)):
            some = [r["windows"][index]["ratios"] for r in results if index < len(r["windows"])]
            rows.append(np.exp(np.log(some).mean(axis=0)))
        labels = [f"{a}" if a == b else f"{a}–{b}" for a, b in windows]
        frame = pd.DataFrame(rows, index=labels, columns=results[0]["blocks"])
        plots.plot_ratios(frame, ax, transitions=results[0]["transitions"])
        depth = 9 * n + (2 if net == "ResNet" else 4)
        ax.set_title(f"{net}-{depth} on {data}: {facts[net]}")
        ax.set_ylabel("gradient norm at block input / at output")
    _same_limits(axes)
    count = len({c["seed"] for c, _ in trained})
    figure.suptitle(
        f"Gradient-norm ratio of every block along training; geometric means over {count} seeds",
        x=0.01, ha="left",
    )  # fmt: skip
    plots.save(figure, path)


def _products(path: Path, measured: Sequence[Pair], data: str) -> None:
    figure, (left, right) = plots.new_axes(2, width=6.0, height=4.6)
    initial = [(c, r) for c, r in parts(measured, "mlp init") if c["width"] == 32]
    for net in MLPS:
        some = [(c, r) for c, r in initial if c["net"] == net]
        _curve(left, net, some, lambda r: np.exp(r["log_product"]))
    depths = sorted({c["L"] for c, _ in initial})
    if depths:
        dense = np.geomspace(depths[0], depths[-1], 100)
        left.plot(
            dense, (2 * dense) ** CONSTANT, color="0.35", linestyle="--", linewidth=1,
            label=f"(2L)^c, c = α²/2 = {CONSTANT:.2f}",
        )  # fmt: skip
    left.set_title("MLPs at initialisation: the product is polynomial in L\nonly with skip and BN "
                   "(or a scaled branch)")  # fmt: skip
    _depth_axis(left, depths, "L, number of residual blocks")
    conv = parts(measured, "conv init")
    for net in ("ResNet, shortcut × 0.01", "ResNet", "ProcResNet", "ProcResNet, 2×2"):
        some = [(c, r) for c, r in conv if c["net"] == net]
        _curve(right, net, some, lambda r: np.exp(r["log_product"]), "n")
    numbers = sorted({c["n"] for c, _ in conv})
    right.set_title("Convolutional nets at initialisation: polynomial too,\nwith a smaller product "
                    "for ProcResNet")  # fmt: skip
    _depth_axis(right, numbers, "number of layers, ResNet / ProcResNet")
    right.set_xticks(numbers, [f"{9 * n + 2}/{9 * n + 4}" for n in numbers])
    for ax in (left, right):
        ax.set_ylabel("gradient norm at first block / after last")
        ax.legend(loc="upper left", fontsize="small")
    figure.suptitle(f"Product of all ratios on {data}; bars: range over seeds", x=0.01, ha="left")
    plots.save(figure, path)


def _jacobians(path: Path, measured: Sequence[Pair], data: str) -> None:
    cells = [(c, r) for c, r in parts(measured, "jacobian") if c["seed"] == 0]
    nets = list(dict.fromkeys(c["net"] for c, _ in cells))
    if not nets:
        return
    figure, axes = plots.new_axes(len(nets), width=3.7, height=4.8)
    states = (("initial", -0.15, plots.PALETTE[7]), ("trained", 0.15, plots.PALETTE[0]))
    floor = 5e-3
    for ax, net in zip(axes, nets, strict=True):
        number = next(c for c, _ in cells if c["net"] == net)
        names: list[str] = []
        for state, shift, color in states:
            found = [r["blocks"] for c, r in cells if c["net"] == net and c["state"] == state]
            for place, block in enumerate(found[0] if found else []):
                low, high = block["bounds"]
                x = place + shift
                ax.plot(
                    [x, x], [max(low, floor), high], color=color, linewidth=5, alpha=0.5,
                    solid_capstyle="butt",
                )  # fmt: skip
                ax.plot(x, block["ratio"], "o", color="0.1", markersize=4, zorder=3)
            names = [block["name"] for block in found[0]] if found else names
        ax.axhline(1, color="0.35", linewidth=0.8, zorder=0)
        ax.set_yscale("log")
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_xlabel("block")
        n = number.get("n")
        size = f"L = {number['L']}" if n is None else f"{9 * n + (2 if net == 'ResNet' else 4)}"
        ax.set_title(f"{_LOOKS[net][0]}{', ' if n is None else '-'}{size}", fontsize="medium")
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(floor, high)
    axes[0].set_ylabel("gradient norm at block input / at output")
    handles = [
        axes[0].plot([], [], color=color, linewidth=5, alpha=0.5)[0] for _, _, color in states
    ]
    handles.append(axes[0].plot([], [], "o", color="0.1", markersize=4)[0])
    figure.legend(
        handles,
        [
            "[σ_min, σ_max] of the block at initialisation, to the lower edge where σ_min is not "
            "certified above 0",
            "after 30 steps",
            "measured ratio",
        ],
        loc="outside lower left", ncols=3, fontsize="small",
    )  # fmt: skip
    figure.suptitle(
        f"Every measured ratio lies between the extreme singular values of its block ({data})",
        x=0.01, ha="left",
    )  # fmt: skip
    plots.save(figure, path)
