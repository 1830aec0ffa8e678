"""Tables and figures of the norm-preservation experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conditioning import plots
from experiments.claims import Verdict
from experiments.learning import has_learnt
from experiments.norm_preservation.convolutional import products_compared
from experiments.norm_preservation.readings import (
    FIRST_DEPTH,
    constants,
    curves,
)
from experiments.norm_preservation.statements import CONSTANT
from experiments.report import Titles, write_csv
from experiments.sweep import Pair, parts

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
    for blocks in ("", "identity", "transition", "downsampling", "first_block"):
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
        write_csv(out / f"{name}.csv", frame.astype(whole))


def _jacobian_row(cell: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    row = {**cell, "block": block["name"], "kind": block["kind"], "ratio": block["ratio"]}
    row["ratio_low"], row["ratio_high"] = block["bounds"]
    for key, column in (("largest", "sigma_max"), ("smallest", "sigma_min"), ("branch", "branch")):
        for end in ("value", "low", "high"):
            found = block[key]
            row[column if end == "value" else f"{column}_{end}"] = found and found[end]
    return {**row, "status": block["status"], "products": block["products"]}


# -- figures --------------------------------------------------------------------------------


def draw(out: Path, measured: Sequence[Pair], data: str, verdicts: Sequence[Verdict]) -> None:
    """Draw the figures for which there are measurements, with the verdicts in their titles."""
    titles = Titles(verdicts)
    with plots.style():
        _deviations(out / "mean_deviation.png", measured, data, titles)
        _ratios(out / "ratios_in_training.png", measured, data, titles)
        _products(out / "products.png", measured, data, titles)
        _jacobians(out / "jacobians.png", measured, data, titles)


def _num_seeds(cells: Sequence[Pair]) -> int:
    return len({cell["seed"] for cell, _ in cells})


def _bars(*groups: tuple[str, Sequence[Pair]]) -> str:
    """What the bars are: nothing if every cell has one seed."""
    counts = {label: _num_seeds(cells) for label, cells in groups if cells}
    if max(counts.values(), default=1) == 1:
        return "one seed"
    if len(set(counts.values())) == 1:
        return f"bars: range over {max(counts.values())} seeds"
    shown = ", ".join(f"{count} {label}" for label, count in counts.items())
    return f"bars: range over seeds ({shown})"


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


def _deviations(path: Path, measured: Sequence[Pair], data: str, titles: Titles) -> None:
    figure, axes = plots.new_axes(2, width=6.0, height=4.8)
    initial = [(c, r) for c, r in parts(measured, "mlp init") if c["width"] == 32]
    trained = parts(measured, "mlp train")
    stuck = {(c["net"], c["L"]) for c, r in trained if not has_learnt(r)}
    heads = (
        "At initialisation, with skip and BN\n"
        + titles(
            ("init.rate", "mean ~ log(2L)/L"), ("init.max", "largest over blocks ~ log(2L)/L")
        ),
        "In training, with skip and BN\n"
        + titles(
            ("train.at-least", "mean falls at least as log(2L)/L"),
            ("train.max", "largest over blocks ~ log(2L)/L"),
        ),
    )
    sides = (initial, [(c, r["training"]) for c, r in trained])
    depths = sorted({c["L"] for c, _ in [*initial, *trained]})
    for ax, cells, title in zip(axes, sides, heads, strict=True):
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
    bars = _bars(("at initialisation", initial), ("in training", trained))
    figure.suptitle(f"MLPs of width 32 on {data}; {bars}", x=0.01, ha="left")
    plots.save(figure, path)


def _mean(result: Mapping[str, Any]) -> float:
    return float(result["mean"])


def _law(ax: Any, cells: Sequence[Pair]) -> None:
    """``c log(2L)/L`` with the mean factor of the cells from L = 4 on."""
    by_seed = curves([(c, r) for c, r in cells if c["L"] >= FIRST_DEPTH], _mean)
    if not by_seed:
        return
    found = [float(np.mean(list(constants(curve).values()))) for curve in by_seed.values()]
    c = float(np.mean(found))
    dense = np.geomspace(min(c["L"] for c, _ in cells), max(c["L"] for c, _ in cells), 100)
    ax.plot(
        dense, [c * np.log(2 * d) / d for d in dense], color="0.35", linestyle="--", linewidth=1,
        label=f"c·log(2L)/L, c fitted {c:.2f}",
    )  # fmt: skip


def _same_limits(axes: Sequence[Any]) -> None:
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)


def _ratios(path: Path, measured: Sequence[Pair], data: str, titles: Titles) -> None:
    trained = parts(measured, "conv train")
    n = max((c["n"] for c, _ in trained), default=0)
    figure, axes = plots.new_axes(2, width=6.4, height=4.6)
    heads = {
        "ResNet": titles(
            ("conv.train-outliers", "first block and downsamplings are outliers"),
            ("conv.train-downsamplings", "downsamplings alone are"),
        ),
        "ProcResNet": titles(
            ("conv.train-repair", "downsamplings are nearer to 1 than ResNet's"),
            ("conv.train-identity", "identity blocks of both nets approach 1"),
        ),
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
        first = results[0]["blocks"][0]
        plots.plot_ratios(frame, ax, transitions=[first, *results[0]["transitions"]])
        for line in ax.get_lines():
            if line.get_label() == "transition":
                line.set_label("first block and transitions")
        ax.legend(fontsize="x-small", ncols=2, loc="best")
        depth = 9 * n + (2 if net == "ResNet" else 4)
        ax.set_title(f"{net}-{depth} on {data}\n{heads[net]}")
        ax.set_ylabel("gradient norm at block input / at output")
    _same_limits(axes)
    count = _num_seeds(trained)
    shown = "one seed" if count == 1 else f"geometric means over {count} seeds"
    steps = max((r["num_steps"] for _, r in trained), default=0)
    figure.suptitle(
        f"Gradient-norm ratio of every block along a training of {steps} steps; {shown}",
        x=0.01, ha="left",
    )  # fmt: skip
    plots.save(figure, path)


def _products(path: Path, measured: Sequence[Pair], data: str, titles: Titles) -> None:
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
    left.set_title(
        "MLPs at initialisation\n"
        + titles(
            ("init.product", "with skip and BN polynomial in L"),
            ("plain.product", "without skip exponential (width 128)"),
        )
    )
    _depth_axis(left, depths, "L, number of residual blocks")
    conv = parts(measured, "conv init")
    for net in ("ResNet, shortcut × 0.01", "ResNet", "ProcResNet", "ProcResNet, 2×2"):
        some = [(c, r) for c, r in conv if c["net"] == net]
        _curve(right, net, some, lambda r: np.exp(r["log_product"]), "n")
    numbers = sorted({c["n"] for c, _ in conv})
    right.set_title(
        "Convolutional nets at initialisation\n"
        + titles(("conv.polynomial", "ResNet, ProcResNet polynomial in depth"))
        + f"\n{_smaller_product(measured)}"
    )
    _depth_axis(right, numbers, "number of layers, ResNet / ProcResNet")
    right.set_xticks(numbers, [f"{9 * n + 2}/{9 * n + 4}" for n in numbers])
    for ax in (left, right):
        ax.set_ylabel("gradient norm at first block / after last")
        ax.legend(loc="upper left", fontsize="small")
    bars = _bars(("MLPs", initial), ("or fewer convolutional", conv))
    figure.suptitle(f"Product of all ratios on {data}; {bars}", x=0.01, ha="left")
    plots.save(figure, path)


def _smaller_product(measured: Sequence[Pair]) -> str:
    """Say for which sizes the product is smaller for ProcResNet than for ResNet, same seeds."""
    quotients = products_compared(measured)
    sizes = sorted({n for n, _ in quotients})
    smaller = [
        n for n in sizes if np.mean([q for (size, _), q in quotients.items() if size == n]) < 1
    ]
    if not smaller:
        return "nowhere smaller for ProcResNet"
    if smaller == sizes:
        return "smaller for ProcResNet at every depth"
    if smaller == sizes[-len(smaller) :]:
        return f"smaller for ProcResNet from {9 * smaller[0] + 4} layers on"
    return "smaller for ProcResNet at " + ", ".join(f"{9 * n + 4}" for n in smaller) + " layers"


def _jacobians(path: Path, measured: Sequence[Pair], data: str, titles: Titles) -> None:
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
        titles(
            (
                "t0.ratio",
                "Instrument check: measured ratios lie between the extreme singular values of "
                "their blocks",
            )
        )
        + f" ({data}, one seed)",
        x=0.01, ha="left",
    )  # fmt: skip
    plots.save(figure, path)
