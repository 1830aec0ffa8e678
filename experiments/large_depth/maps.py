"""Figures over the Hurst index, and of trained nets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conditioning import plots, theory
from experiments.claims import over_runs
from experiments.large_depth import frontier
from experiments.report import Titles
from experiments.sweep import Pair, parts

_HEADS = {
    ("res-3", "output"): (
        ("map.line", "on the predicted line"),
        ("map.plateau", "the same for all H ≤ 1/2"),
        ("map.rises", "rises above H = 1/2"),
    ),
    ("res-3", "gradient"): (
        ("map.gradient-line", "on its predicted line"),
        ("map.gradient", "on that of outputs"),
        ("map.gradient-below", "below it for every H > 1/2"),
    ),
    ("res-1", "output"): (
        ("map.single", "on the predicted line, H ≥ 1/2"),
        ("map.single-rough", "... H < 1/2"),
        ("map.no-plateau", "falls below H = 1/2"),
    ),
    ("res-1", "gradient"): (
        ("map.single-gradient", "on the predicted line, H ≥ 1/2"),
        ("map.single-gradient-rough", "... H < 1/2"),
    ),
}


def _edges(centres: Sequence[float]) -> np.ndarray:
    """Edges of cells around these places."""
    places = np.asarray(centres, dtype=float)
    middle = (places[1:] + places[:-1]) / 2
    ends = 2 * places[0] - middle[0], 2 * places[-1] - middle[-1]
    return np.concatenate([[ends[0]], middle, [ends[1]]])


def paths(out: Path, measured: Sequence[Pair], context: Mapping[str, Any], _: Titles) -> None:
    """Fractional Brownian motion, whose increments are the weights of the maps."""
    figure, axes = plots.new_axes(3, width=3.8, height=3.2)
    for ax, (cell, result) in zip(axes, parts(measured, "paths"), strict=True):
        path = np.asarray(result["path"], dtype=float)
        ax.plot(np.arange(1, len(path) + 1) / len(path), path, color=plots.PALETTE[0], linewidth=1)
        ax.set_title(f"H = {cell['H']:g}")
        ax.set_xlabel("layer k / L")
    axes[0].set_ylabel("one weight, summed over layers")
    figure.suptitle(
        f"Fractional Brownian motion, exact, L = {context['sizes'].map_depth}", x=0.01, ha="left",
        fontsize="medium",
    )  # fmt: skip
    plots.save(figure, out / "hurst_paths.png")


def critical(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], titles: Titles
) -> None:
    """Heat maps over H and beta, with predicted lines and measured crossings."""
    sizes = context["sizes"]
    blocks = list(dict.fromkeys(cell["block"] for cell, _ in parts(measured, "map")))
    figure, grid = plots.new_grid(len(blocks), 2, width=6.2, height=4.7)
    hursts = np.linspace(sizes.map_hursts[0], sizes.map_hursts[-1], 120)
    mesh = None
    for row, block in zip(grid, blocks, strict=True):
        for ax, key in zip(row, ("output", "gradient"), strict=True):
            places, values = frontier.mean_map(measured, block, key)
            mesh = ax.pcolormesh(
                _edges(places), _edges(sizes.map_betas), np.clip(values.T, -1, 1), cmap="vlag",
                vmin=-1, vmax=1, rasterized=True,
            )  # fmt: skip
            gradient = key == "gradient"
            for compounded, style in ((True, "-"), (False, "--")):
                line = [
                    theory.critical_beta(
                        sizes.map_depth,
                        h,
                        block,
                        gradient=gradient,
                        width=sizes.width,
                        compounded=compounded,
                    )
                    for h in hursts.tolist()
                ]
                ax.plot(hursts, line, style, color="0.1", linewidth=1.4)
            limit = [
                theory.critical_exponent(h, block, gradient=gradient, width=sizes.width)
                for h in hursts.tolist()
            ]
            ax.plot(hursts, limit, ":", color="0.1", linewidth=1.6)
            found = frontier.crossings(measured, sizes.map_betas, block, key)
            means = [over_runs(crossed) for crossed in found.values()]
            ends = np.array([one.enclosure for one in means]).T
            middle = np.array([one.value for one in means])
            # A point without an interval, as of one net, gets no bar.
            errors = np.abs(ends - middle)
            errors[~np.isfinite(errors)] = np.nan
            ax.errorbar(
                list(found), middle, yerr=errors, color="0.1", marker="o", markersize=5,
                markerfacecolor="w", linestyle="none", capsize=3,
            )  # fmt: skip
            ax.set_ylim(sizes.map_betas[0], sizes.map_betas[-1])
            ax.grid(visible=False)
            ax.set_xlabel("Hurst index H")
            ax.set_ylabel("β")
            head = titles(*_HEADS[block, key])
            ax.set_title(f"{block}, {key}" + (f"\n{head}" if head else ""), fontsize="medium")
    legend = grid[0][0]
    legend.errorbar([], [], yerr=[], color="0.1", marker="o", markerfacecolor="w", linestyle="none",
                    capsize=3, label="measured: movement 1, mean and 95 %")  # fmt: skip
    for style, label in (
        ("-", "predicted, compounded"), ("--", "predicted, first order"),
        (":", "limit L → ∞ at this width"),
    ):  # fmt: skip
        legend.plot([], [], style, color="0.1", label=label)
    figure.legend(
        *legend.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small"
    )
    assert mesh is not None
    figure.colorbar(mesh, ax=[ax for row in grid for ax in row], shrink=0.6,
                    label="mean log₁₀ of the relative movement, clipped")  # fmt: skip
    nets = max(cell["nets"] for cell, _ in parts(measured, "map"))
    figure.suptitle(
        f"Where nets with fractional noise as weights turn unstable: L = {sizes.map_depth}, "
        f"d = {sizes.width}, {nets} nets per H",
        x=0.01, ha="left", fontsize="medium",
    )  # fmt: skip
    plots.save(figure, out / "critical_line.png")


def weights(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], titles: Titles
) -> None:
    """One weight against the layer, before and after training."""
    sizes = context["sizes"]
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell, result in parts(measured, "regularity"):
        groups.setdefault((cell["init"], cell["beta"]), []).append(result)
    figure, axes = plots.new_axes(len(groups), width=4.6, height=4.0)
    for ax, ((init, beta), results) in zip(axes, groups.items(), strict=True):
        first = results[0]
        for key, color, width in (("before", "0.6", 1.6), ("after", plots.PALETTE[0], 1.1)):
            path = np.asarray(first[f"weight_{key}"], dtype=float)
            ax.plot(np.arange(1, len(path) + 1), path, color=color, linewidth=width,
                    label=f"{key} training")  # fmt: skip
        exponent = np.mean([result["after"] for result in results])
        ax.set_title(f"{init} layers, β = {beta:g}\nexponent after training {exponent:.3f}")
        ax.set_xlabel("layer")
        ax.set_ylim(top=ax.get_ylim()[1] + 0.18 * np.ptp(ax.get_ylim()))
    axes[0].set_ylabel("one weight")
    axes[0].legend(loc="upper right", fontsize="small", ncols=2)
    title = titles(
        ("regularity.smooth", "Smooth layers stay smooth"),
        ("regularity.rough", "independent layers stay rough"),
        ("regularity.change-rough", "what training adds to them is like Brownian motion"),
    )
    seeds = len(next(iter(groups.values())))
    head = (
        f"one of {seeds} nets each, trained {sizes.regularity_epochs} epochs on {context['data']}, "
        f"L = {sizes.regularity_depth}, d = {sizes.train_width}"
    )
    figure.suptitle(f"{title}\n{head}", x=0.01, ha="left", fontsize="medium")
    plots.save(figure, out / "weights_after_training.png")


def accuracy(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], titles: Titles
) -> None:
    """Test accuracy over H and beta, and over the distance from the line."""
    sizes = context["sizes"]
    best = frontier.best_accuracies(measured)
    hursts = list(next(iter(best.values())))
    tables = np.array([[rows[hurst] for hurst in hursts] for rows in best.values()])
    means = tables.mean(0)
    figure, (left, right) = plots.new_axes(2, width=6.0, height=5.0)
    mesh = left.pcolormesh(
        _edges(hursts), _edges(sizes.train_betas), means.T, cmap="viridis", vmin=0, vmax=1
    )
    if means.size <= 64:
        for row, hurst in enumerate(hursts):
            for column, beta in enumerate(sizes.train_betas):
                value = means[row, column]
                left.text(hurst, beta, f"{100 * value:.0f}", ha="center", va="center",
                          color="w" if value < 0.6 else "0.1", fontsize="small")  # fmt: skip
    ends = _edges(hursts)
    places = np.linspace(max(ends[0], 0.01), min(ends[-1], 0.99), 100)
    line = [theory.critical_beta(sizes.train_depth, h, "res-1") for h in places.tolist()]
    left.plot(places, line, color=plots.PALETTE[3], linewidth=2.2,
              label="predicted line of initial stability, res-1")  # fmt: skip
    left.set_ylim(*_edges(sizes.train_betas)[[0, -1]])
    left.grid(visible=False)
    left.set_xlabel("Hurst index H of the initial weights")
    left.set_ylabel("β")
    figure.colorbar(mesh, ax=left, label="test accuracy (numbers: per cent)")
    left.legend(loc="upper left", fontsize="small", frameon=True)
    for row, hurst in enumerate(hursts):
        gap = np.array(sizes.train_betas) - theory.critical_beta(sizes.train_depth, hurst, "res-1")
        spans = np.abs(np.array([tables[:, row].min(0), tables[:, row].max(0)]) - means[row])
        shade = plots.PALETTE[row % len(plots.PALETTE)]
        right.errorbar(gap, means[row], yerr=spans, marker="o", markersize=4, capsize=2,
                       color=shade, linewidth=1.1, label=f"H = {hurst:g}")  # fmt: skip
    right.axvline(0, color=plots.PALETTE[3], linewidth=1.5)
    right.axhline(context["commonest"], color="0.4", linestyle="--", linewidth=1,
                  label="commonest class")  # fmt: skip
    right.set_ylim(0, 1.02)
    right.set_xlabel("β less that of the predicted line")
    right.set_ylabel("test accuracy")
    right.legend(loc="lower right", fontsize="small", ncols=1 if len(hursts) < 8 else 2)
    left.set_title(
        titles(
            ("accuracy.above", "better above the line at equal β"),
            ("accuracy.above-hurst", "... at equal H"),
            ("accuracy.corner", "no net learns at largest H, smallest β"),
        )
    )
    right.set_title(titles(("accuracy.below", "no net below the line learns")))
    figure.suptitle(
        f"res-1 nets trained {sizes.train_epochs} epochs on {context['data']}, "
        f"L = {sizes.train_depth}, d = {sizes.train_width}, best of {len(sizes.train_rates)} "
        f"learning rates; mean (right: and range) of {len(tables)} seeds",
        x=0.01, ha="left", fontsize="medium",
    )  # fmt: skip
    plots.save(figure, out / "accuracy.png")
