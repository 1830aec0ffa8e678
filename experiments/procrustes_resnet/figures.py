"""Tables and figures of the Procrustes experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from conditioning import plots
from experiments.claims import Verdict
from experiments.procrustes_resnet.nets import (
    NETS,
    OURS,
    OURS_FREE,
    PAPER,
    PAPER_FREE,
    RESNET,
    SMALL_SHORTCUT,
)
from experiments.report import Titles, write_csv
from experiments.sweep import Pair, parts

_COLORS: Mapping[str, Any] = {
    RESNET: plots.PALETTE[3],
    SMALL_SHORTCUT: plots.PALETTE[1],
    PAPER: plots.PALETTE[0],
    PAPER_FREE: plots.PALETTE[9],
    OURS: plots.PALETTE[2],
    OURS_FREE: plots.PALETTE[4],
}
_LABELS: Mapping[str, str] = {
    RESNET: "ResNet",
    SMALL_SHORTCUT: "ResNet, shortcut × 0.01",
    PAPER: "ProcResNet (1×1, p = 0.5)",
    PAPER_FREE: "ProcResNet, flat start, no projection",
    OURS: "isometric 2×2, every step",
    OURS_FREE: "2×2, flat start, no projection",
}
_BAND = (0.97, 1.03)
_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.4, 1.7, 2, 3, 5)


# -- tables ---------------------------------------------------------------------------------


def write_tables(out: Path, measured: Sequence[Pair]) -> None:
    """Write ``layers.csv``, ``ratios.csv``, ``trainings.csv`` and ``evaluations.csv``."""
    layers, ratios, trainings, evaluations = [], [], [], []
    for cell, result in measured:
        if cell["part"] == "operator":
            for operator in ("circular", "true"):
                found = result[operator]
                layers.append({
                    **cell, "operator": operator, "sigma_max": found["largest"]["value"],
                    "sigma_min": found["smallest"]["value"],
                    "sigma_min_nonzero": found["least_nonzero"], "rank": found["rank"],
                    "outputs": found["rows"], "gain": found["gain"], "status": found["status"],
                })  # fmt: skip
        elif cell["part"] == "init":
            ratios += _ratio_rows(cell, 0, 0, result)
        elif cell["part"] == "train":
            for window in result["windows"]:
                ratios += _ratio_rows(cell, window["first"], window["last"], {**result, **window})
            keys = (
                "status", "num_steps", "loss", "mean_loss", "final_error", "best_error",
                "projections", "message",
            )  # fmt: skip
            trainings.append({**cell, **{key: result[key] for key in keys}})
            evaluations += [{**cell, **one} for one in result["evaluations"]]
    for name, rows in (
        ("layers", layers), ("ratios", ratios), ("trainings", trainings),
        ("evaluations", evaluations),
    ):  # fmt: skip
        write_csv(out / f"{name}.csv", pd.DataFrame(rows))


def _ratio_rows(
    cell: Mapping[str, Any], first: int, last: int, result: Mapping[str, Any]
) -> list[dict[str, Any]]:
    return [
        {
            **cell, "first_step": first, "last_step": last, "depth": depth, "block": block,
            "transition": block in result["transitions"], "ratio": ratio,
        }
        for depth, (block, ratio) in enumerate(
            zip(result["blocks"], result["ratios"], strict=True), 1
        )
    ]  # fmt: skip


# -- figures --------------------------------------------------------------------------------


def draw(out: Path, measured: Sequence[Pair], schedule: str, verdicts: Sequence[Verdict]) -> None:
    """Draw the figures for which there are measurements, with the verdicts in their titles."""
    titles = Titles(verdicts)
    with plots.style():
        _ratios(out / "ratios_in_training.png", measured, schedule, titles)
        _spectra(out / "singular_values.png", measured, titles)
        _errors(out / "test_error.png", measured, schedule, titles)


def _num_seeds(cells: Sequence[Pair]) -> int:
    return len({cell["seed"] for cell, _ in cells})


def _over(cells: Sequence[Pair]) -> str:
    count = _num_seeds(cells)
    return "one seed" if count == 1 else f"lines: mean over {count} seeds, shades: their range"


def _ratios(path: Path, measured: Sequence[Pair], schedule: str, titles: Titles) -> None:
    trained = parts(measured, "train")
    n = min((c["n"] for c, _ in trained), default=0)
    panels = (
        (
            (PAPER, PAPER_FREE),
            titles(
                ("train.1x1", "1×1: projection keeps them nearer to 1"),
                ("train.flat-init", "equal singular values at the start do not last"),
            ),
        ),
        ((OURS, OURS_FREE), titles(("train.2x2", "2×2: with projection ratio 1.00 throughout"))),
        (
            (RESNET, SMALL_SHORTCUT, PAPER),
            titles(("train.1x1-resnet", "1×1, projected, nearer to 1 than ResNet")),
        ),
    )
    figure, axes = plots.new_axes(3, width=4.6, height=4.6)
    for ax, (nets, title) in zip(axes, panels, strict=True):
        for net in nets:
            _curves(ax, net, [(c, r) for c, r in trained if c["net"] == net and c["n"] == n])
        ax.axhspan(*_BAND, color="0.85", zorder=0, label=f"{_BAND[0]} to {_BAND[1]}")
        ax.axhline(1, color="0.5", linewidth=0.8, zorder=0)
        ax.set_yscale("log")
        ax.set_xlabel("optimizer step")
        ax.set_title(title)
        ax.legend(fontsize="x-small", loc="upper left")
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    ticks = [
        t for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.4, 1.7, 2, 3, 5) if low < t < high
    ]
    for ax in axes:
        ax.set_ylim(low, high * 1.4)
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    axes[0].set_ylabel("gradient norm at input / at output\nof the two downsamplings")
    figure.suptitle(
        f"Gradient-norm ratio of the downsamplings, {9 * n + 2} and {9 * n + 4} layers\n"
        f"{schedule}; solid: first, dashed: second; {_over(trained)}",
        x=0.01, ha="left",
    )  # fmt: skip
    plots.save(figure, path)


def _curves(ax: Any, net: str, cells: Sequence[Pair]) -> None:
    """Ratios of both downsamplings against the step."""
    if not cells:
        return
    shared = sorted(set.intersection(*(set(map(int, r["steps"])) for _, r in cells)))
    rows = []
    for _, result in cells:
        place = {int(step): i for i, step in enumerate(result["steps"])}
        rows.append(np.asarray(result["downsampling_ratios"])[[place[step] for step in shared]])
    found = np.stack(rows)
    for index, line in zip(range(found.shape[2]), ("-", "--"), strict=False):
        some = found[:, :, index]
        ax.plot(
            shared, np.exp(np.log(some).mean(0)), line, color=_COLORS[net], linewidth=1.3,
            label=_LABELS[net] if index == 0 else None,
        )  # fmt: skip
        if len(cells) > 1:
            ax.fill_between(
                shared, some.min(0), some.max(0), color=_COLORS[net], alpha=0.15, linewidth=0
            )


def _spectra(path: Path, measured: Sequence[Pair], titles: Titles) -> None:
    panels = (
        (
            "1×1, stride 2",
            {"none": "He", "ours ×1": "one polar factor (the paper's result)"},
            titles(("layer.rank", "half of them are zero")),
        ),
        (
            "2×2, stride 2",
            {"none": "He", "ours ×1": "one polar factor"},
            titles(("layer.2x2", "all are 1")),
        ),
        (
            "3×3, stride 2",
            {
                "none": "He", "paper ×10": "the paper's, 10 times",
                "ours ×100": "stride-aware, 100 sweeps",
            },
            titles(
                ("layer.stride", "paper's projection: not equal"),
                ("layer.stride-aware", "stride-aware: equal on a circle"),
            ),
        ),
        (
            "3×3 stem",
            {"none": "He", "paper ×1": "the paper's, once", "ours ×1": "orthogonal columns, once"},
            titles(
                ("layer.stem", "one step: equal on a circle"),
                ("layer.stem-zeros", "zero padding leaves 2/3 at corners"),
            ),
        ),
    )  # fmt: skip
    figure, axes = plots.new_axes(4, width=3.9, height=4.8)
    colors = {
        "none": "0.6", "paper ×1": plots.PALETTE[3], "paper ×10": plots.PALETTE[3],
        "ours ×1": plots.PALETTE[0], "ours ×100": plots.PALETTE[0],
    }  # fmt: skip
    for ax, (layer, methods, title) in zip(axes, panels, strict=True):
        for method, label in methods.items():
            cells = parts(measured, "operator", layer=layer, method=method, seed=0)
            for _, result in cells:
                # Without padding both are one.
                lines = (("circular", "-"), ("true", ":"))[: 2 if "3×3" in layer else 1]
                for operator, line in lines:
                    values = np.asarray(result[operator]["values"])
                    ax.plot(
                        np.linspace(0, 1, len(values)), values, line, color=colors[method],
                        linewidth=1.4 if operator == "circular" else 2,
                        label=label if operator == "circular" else None,
                    )  # fmt: skip
        if "3×3" in layer:
            ax.plot([], [], ":", color="0.1", linewidth=2, label="the same with zero padding")
        ax.set_ylim(bottom=0)
        ax.set_ylim(top=ax.get_ylim()[1] * 1.35)
        ax.set_xlabel("share of all singular values")
        ax.set_title(f"{layer}\n{title}", fontsize="medium")
        ax.legend(fontsize="x-small", loc="upper right")
    axes[0].set_ylabel("singular value σ of the operator")
    figure.suptitle(
        "Singular values of layers, largest first (stem 3 → 64, others 16 → 32 channels; one seed)",
        x=0.01, ha="left",
    )  # fmt: skip
    plots.save(figure, path)


def _errors(path: Path, measured: Sequence[Pair], schedule: str, titles: Titles) -> None:
    trained = parts(measured, "train")
    numbers = sorted({c["n"] for c, _ in trained})
    if not numbers:
        return
    n = numbers[0]
    figure, (left, right) = plots.new_axes(2, width=6.0, height=4.8)
    for net in NETS:
        cells = [(c, r) for c, r in trained if c["net"] == net and c["n"] == n]
        if not cells:
            continue
        epochs = [e["epochs"] for e in cells[0][1]["evaluations"]]
        rows = [[e["error"] for e in r["evaluations"]] for _, r in cells]
        whole = [row for row in rows if len(row) == len(epochs)]
        if whole:
            found = 100 * np.array(whole)
            # Curves of different nets side by side, so that bars do not hide each other.
            shift = 0.02 * epochs[0] * (list(NETS).index(net) - 2.5)
            mean = found.mean(0)
            left.errorbar(
                np.array(epochs) + shift, mean, yerr=[mean - found.min(0), found.max(0) - mean],
                color=_COLORS[net], marker="o", markersize=4, linewidth=1.2, capsize=2,
                label=_LABELS[net],
            )  # fmt: skip
    left.set_yscale("log")
    ticks = [t for t in (1, 2, 3, 5, 10, 20, 30, 50, 90) if _inside(left, t)]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("epoch")
    left.set_ylabel("test error, %")
    left.set_title(
        f"{9 * n + 2} and {9 * n + 4} layers; "
        f"lines: mean, bars: range over {_num_seeds(trained)} seeds"
    )
    left.legend(fontsize="x-small", loc="best")
    names = [net for net in NETS if any(c["net"] == net for c, _ in trained)]
    for place, net in enumerate(names):
        for size, marker in zip(numbers, ("o", "s", "D"), strict=False):
            for what, offset, filled in (("final", -0.13, True), ("best", 0.13, False)):
                values = [
                    100 * r[f"{what}_error"]
                    for c, r in trained
                    if c["net"] == net and c["n"] == size
                ]
                if not values:
                    continue
                nudge = offset + 0.06 * numbers.index(size)
                jitter = nudge + 0.02 * (np.arange(len(values)) - len(values) / 2)
                right.plot(
                    place + jitter, values, marker, markersize=4, color=_COLORS[net],
                    markerfacecolor=_COLORS[net] if filled else "none", alpha=0.8,
                )  # fmt: skip
    for size, marker in zip(numbers, ("o", "s", "D"), strict=False):
        right.plot(
            [],
            [],
            marker,
            color="0.3",
            markersize=4,
            label=f"{9 * size + 2} / {9 * size + 4} layers",
        )
    right.plot([], [], "o", color="0.3", markersize=4, label="filled: after the last epoch")
    right.plot(
        [], [], "o", color="0.3", markersize=4, markerfacecolor="none",
        label="open: at the best evaluation",
    )  # fmt: skip
    labels = [f"{_LABELS[net]}\n{_millions(trained, net, n)} M parameters" for net in names]
    right.set_xticks(range(len(names)), labels, rotation=30, ha="right", fontsize="small")
    right.set_ylabel("test error, %")
    right.set_title(
        titles(
            ("error.final-he", "ProcResNet no worse than ResNet, up to 1 s.e."),
            ("error.better-he", "... better"),
            ("error.better-free", "... better than without projection"),
            ("error.better-2x2", "2×2 better than ResNet"),
            ("error.better-2x2-free", "... better than without projection"),
        )
    )
    right.legend(fontsize="x-small", loc="best")
    figure.suptitle(f"Test error: {schedule}", x=0.01, ha="left")
    plots.save(figure, path)


def _millions(cells: Sequence[Pair], net: str, n: int) -> str:
    counts = {r["num_parameters"] for c, r in cells if c["net"] == net and c["n"] == n}
    return "/".join(f"{count / 1e6:.3g}" for count in counts)


def _inside(ax: Any, value: float) -> bool:
    low, high = ax.get_ylim()
    return bool(low < value < high)
