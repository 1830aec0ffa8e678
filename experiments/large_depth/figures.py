"""Figures of nets at initialisation, with the verdicts in their titles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conditioning import plots, theory
from experiments.claims import Verdict, over_runs
from experiments.large_depth import maps
from experiments.large_depth.verdicts import KEYS, by_depth, distances, law_logs
from experiments.report import Titles
from experiments.sweep import Pair, parts

Drawn = tuple[Path, Sequence[Pair], Mapping[str, Any], Titles]
_MOVEMENTS = {"output": r"$|h_L - h_0| / |h_0|$", "gradient": r"$|g_0 - g_L| / |g_L|$"}
_NORMS = {"output": r"$|h_L| / |h_0|$", "gradient": r"$|g_0| / |g_L|$"}
# Of the scalings below, at and above the critical one.
_COLORS = (plots.PALETTE[3], plots.PALETTE[0], plots.PALETTE[2])


def draw(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], verdicts: Sequence[Verdict]
) -> None:
    """Draw the eight figures."""
    drawn = (out, measured, context, Titles(verdicts))
    with plots.style():
        _independent(*drawn)
        _smooth(*drawn)
        _law(*drawn)
        _orders(*drawn)
        maps.paths(*drawn)
        maps.critical(*drawn)
        maps.weights(*drawn)
        maps.accuracy(*drawn)


def _interval(values: Any) -> tuple[Any, Any]:
    """Means over nets of each depth, and their ends; NaN where nets give no interval."""
    means = [over_runs(np.asarray(one, dtype=float).tolist()) for one in values]
    ends = np.array([one.enclosure for one in means]).T
    return np.array([one.value for one in means]), np.where(np.isfinite(ends), ends, np.nan)


def _curve(ax: Any, found: Mapping[int, Any], place: int, label: str, **more: Any) -> None:
    """Geometric means over nets with their 95 % interval."""
    middle, ends = _interval([logs[:, place] for logs in found.values()])
    color = _COLORS[place % len(_COLORS)]
    style = {"color": color, "markersize": 4, "linewidth": 1.2, **more}
    ax.plot([*found], np.exp(middle), label=label, **style)
    ax.fill_between([*found], *np.exp(ends), color=color, alpha=0.2, linewidth=0)


def _points(ax: Any, found: Mapping[int, Any], place: int, label: str) -> None:
    """Roots of mean squares over nets with their 95 % interval."""
    middle, ends = _interval([np.exp(2 * logs[:, place]) for logs in found.values()])
    # An interval that reaches 0 reaches the edge of a logarithmic axis.
    middle, ends = middle**0.5, np.maximum(ends, 0.0) ** 0.5
    ax.errorbar(
        [*found], middle, yerr=np.abs(ends - middle), color=_COLORS[place % len(_COLORS)],
        marker="o", markersize=4, linestyle="none", capsize=3, label=label,
    )  # fmt: skip


def _finish(ax: Any, ylabel: str) -> None:
    ax.set_yscale("log")
    ax.set_xlabel("depth L")
    ax.set_ylabel(ylabel)


def _independent(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], titles: Titles
) -> None:
    sizes = context["sizes"]
    figure, axes = plots.new_axes(2, width=6.2, height=5.2)
    grid = np.unique(np.geomspace(sizes.depths[0], sizes.depths[-1], 80).round()).astype(int)
    for ax, key, prefix, moments in zip(
        axes, KEYS, ("iid", "gradient"), ("", "gradient-"), strict=True
    ):
        found = by_depth(measured, "iid", key)
        for place, beta in enumerate(sizes.iid_betas):
            label = f"β = {beta:g}, root mean square of {sizes.nets} nets and 95 %"
            _points(ax, found, place, label)
            exact = [
                theory.deviation_second_moment(depth, theory.scaling_factor(depth, beta)) ** 0.5
                for depth in grid.tolist()
            ]
            ax.plot(grid, exact, "--", color="0.25", linewidth=1, zorder=3)
        ax.plot([], [], "--", color="0.25", linewidth=1, label="root of the exact second moment")
        _finish(ax, f"root mean square of {_MOVEMENTS[key]}")
        ax.set_title(
            titles(
                (f"{prefix}.identity", "β = 1 → identity, as L^(−1/2)"),
                (f"{prefix}.balanced", "β = 1/2 stays bounded"),
                (f"{prefix}.explodes", "β = 1/4 explodes"),
                (f"moment.{moments}identity", "exact second moment at β = 1"),
                (f"moment.{moments}balanced", "... at β = 1/2"),
                (f"moment.{moments}explosion", "... at β = 1/4"),
            )
        )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(
        f"Independent weights, α = L^(−β), res-3 nets of width {sizes.width}: outputs (left) and "
        "gradients (right)",
        x=0.01, ha="left", fontsize="medium",
    )  # fmt: skip
    plots.save(figure, out / "independent.png")


def _smooth(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], titles: Titles
) -> None:
    sizes = context["sizes"]
    variants = sorted({cell["variant"] for cell, _ in parts(measured, "smooth")}, reverse=True)
    figure, axes = plots.new_axes(len(variants), width=6.2, height=5.2)
    names = {"process": "weights are a smooth process", "increments": "... are its increments"}
    for ax, variant in zip(axes, variants, strict=True):
        for key, line in zip(KEYS, ("-", ":"), strict=True):
            found = by_depth(measured, "smooth", key, variant=variant)
            for place, beta in enumerate(sizes.smooth_betas):
                mark: dict[str, Any] = {
                    "marker": "o" if key == "output" else "v",
                    "linestyle": line,
                }
                _curve(ax, found, place, f"β = {beta:g}, {key}", **mark)
        _finish(ax, "relative movement from first to last layer")
        ax.set_title(names[variant])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    title = titles(
        ("smooth.identity", "Smooth weights: β = 2 → identity, as 1/L"),
        ("smooth.balanced", "β = 1 does not depend on depth (from L = 100 on)"),
        ("smooth.shallow", "... nor from L = 10 on"),
        ("smooth.explodes", "β = 1/2 explodes"),
    )
    head = f"geometric mean of {sizes.smooth_nets} res-3 nets of width {sizes.width} and 95 %"
    figure.suptitle(f"{title}\n{head}", x=0.01, ha="left", fontsize="medium")
    plots.save(figure, out / "smooth.png")


def _law(out: Path, measured: Sequence[Pair], context: Mapping[str, Any], titles: Titles) -> None:
    sizes = context["sizes"]
    figure, axes = plots.new_axes(3, width=4.6, height=4.6)
    nets = f"nets, L = {sizes.law_depth}, d = {sizes.law_width}"
    [(cell, result)] = parts(measured, "chain")
    panels = [
        (law_logs(measured, "output"), sizes.law_width, _NORMS["output"], nets),
        (law_logs(measured, "gradient"), sizes.law_width, _NORMS["gradient"], nets),
        (
            np.asarray(result["logs"], dtype=float), cell["d"], _NORMS["output"],
            f"draws of its chain, L = {cell['L']}, d = {cell['d']}",
        ),
    ]  # fmt: skip
    heads = (
        (("law.mean", "mean log = 1/4 − 1/(2d)"), ("law.spread", "its deviation = 1/√(2d)")),
        (
            ("law.gradient-mean", "gradient: mean log = 1/4 − 1/(2d)"),
            ("law.gradient-spread", "its deviation = 1/√(2d)"),
        ),
        (
            ("law.shape", "log-normal: Kolmogorov distance ≤ 0.025"),
            ("law.chain-mean", "mean log = 1/4 − 1/(2d)"),
            ("law.chain-spread", "its deviation = 1/√(2d)"),
        ),
    )
    for ax, (logs, width, label, what), head in zip(axes, panels, heads, strict=True):
        ratios = np.exp(logs)
        ax.hist(
            ratios, bins=min(60, max(10, math.isqrt(len(ratios)))), density=True,
            color=plots.PALETTE[0], alpha=0.55, label=f"{len(ratios)} {what}",
        )  # fmt: skip
        mean, variance = theory.limit_log_norm_law(width)
        reach = 4.5 * variance**0.5 / 2
        places = np.exp(np.linspace(mean / 2 - reach, mean / 2 + reach, 300))
        ax.plot(
            places, theory.limit_norm_ratio_density(places, width), color="0.15", linewidth=1.5,
            label="density of the limit",
        )  # fmt: skip
        ax.set_ylim(top=1.35 * ax.get_ylim()[1])
        ax.set_xlabel(f"norm ratio {label}")
        ax.set_title(titles(*head))
        ax.legend(loc="upper right", fontsize="x-small")
    axes[0].set_ylabel("density")
    figure.suptitle(
        "Norms of nets with independent weights, β = 1/2, against the log-normal law of the limit",
        x=0.01,
        ha="left",
        fontsize="medium",
    )
    plots.save(figure, out / "log_normal.png")


def _orders(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], titles: Titles
) -> None:
    sizes = context["sizes"]
    figure, [ax] = plots.new_axes(1, width=6.4, height=5.0)
    names = {"sde": "Brownian increments, β = 1/2", "ode": "smooth weights, β = 1"}
    for place, (cell, _) in enumerate(parts(measured, "order")):
        curve = distances(measured, cell["limit"], cell["block"], sizes.order_depths)
        depths = list(curve)
        logs = np.array([np.log(curve[depth][:, 0]) for depth in depths])
        means = np.exp(logs.mean(1))
        ends = np.exp(np.quantile(logs, (0.1, 0.9), axis=1))
        ax.errorbar(
            depths, means, yerr=np.abs(ends - means), color=plots.PALETTE[place],
            marker="osv"[place], linestyle="none", capsize=2,
            label=f"{cell['block']}, {names[cell['limit']]}",
        )  # fmt: skip
        order = 0.5 if cell["limit"] == "sde" else 1.0
        ax.plot(
            depths, means[-1] * (np.array(depths) / depths[-1]) ** -order, "--",
            color=plots.PALETTE[place], linewidth=1,
        )  # fmt: skip
    ax.plot([], [], "--", color="0.4", linewidth=1, label="slopes −1/2 and −1")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes.order_depths, [str(depth) for depth in sizes.order_depths])
    ax.set_yscale("log")
    ax.set_xlabel("depth L")
    ax.set_ylabel("largest distance to the net of depth 2L\non the same path, relative to |h₀|")
    ax.set_title(
        titles(
            ("order.sde", "stochastic limit: strong order 1/2"),
            ("order.ode", "smooth limit: order 1"),
        )
        + f"\ngeometric mean and 10th to 90th percentile of {sizes.order_nets} nets"
    )
    ax.legend(loc="lower left", fontsize="small")
    plots.save(figure, out / "convergence.png")
