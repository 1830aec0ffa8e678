"""Figures of the experiment, with the verdicts in their titles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conditioning import plots
from experiments.claims import Verdict
from experiments.models.shortcut_kinds import ONE, ORTHOGONAL, THREE, TWO, TWO_XAVIER, XAVIER
from experiments.report import Titles
from experiments.shortcut_training import along, reference
from experiments.shortcut_training.best import Sweep, depths_of, sweeps
from experiments.sweep import Pair, parts

# Colour and marker of a net, the same in every figure.
_LOOKS: Mapping[str, tuple[Any, str]] = {
    TWO: (plots.PALETTE[0], "o"),
    ONE: (plots.PALETTE[3], "s"),
    THREE: ((0.15, 0.15, 0.15), "P"),
    ORTHOGONAL: (plots.PALETTE[2], "D"),
    XAVIER: (plots.PALETTE[1], "v"),
    TWO_XAVIER: (plots.PALETTE[4], "^"),
}
# What is below it is as good as the least loss; a logarithmic axis would go on for ever.
_BOTTOM = 1e-9


@dataclass(frozen=True)
class Drawing:
    """What every figure needs."""

    out: Path
    measured: Sequence[Pair]
    context: Mapping[str, Any]
    titles: Titles

    @property
    def data(self) -> str:
        """Name of the data set."""
        return str(self.context["data"])


def draw(
    out: Path, measured: Sequence[Pair], context: Mapping[str, Any], verdicts: Sequence[Verdict]
) -> None:
    """Draw the six figures."""
    drawing = Drawing(out, measured, context, Titles(verdicts))
    linear, relu = sweeps(measured, "sweep"), sweeps(measured, "relu")
    with plots.style():
        _final(drawing, linear)
        _rates(drawing, linear)
        _norms(drawing, linear)
        _trajectories(drawing)
        _escape(drawing)
        _relu(drawing, relu)


def _depth_axis(ax: Any, depths: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(depths, [str(depth) for depth in depths])
    ax.minorticks_off()
    ax.set_xlabel("depth L (number of weight matrices)")


def _line(ax: Any, x: Any, y: Any, net: str, **more: Any) -> None:
    color, marker = _LOOKS[net]
    ax.plot(x, y, **{"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.3, **more})


def _over_depth(
    ax: Any, swept: Mapping[tuple[str, int], Sweep], net: str, value: Callable[[Sweep], Any]
) -> None:
    """Means over seeds with the range, where the net trains."""
    found = [swept[net, depth] for depth in depths_of(swept, net)]
    found = [sweep for sweep in found if sweep.trains]
    if not found:
        return
    rows = [np.atleast_1d(np.asarray(value(sweep), dtype=float)) for sweep in found]
    means = np.array([row.mean() for row in rows])
    ends = np.array([[row.min(), row.max()] for row in rows]).T.clip(min=_BOTTOM)
    errors = np.abs(ends - means)
    color, marker = _LOOKS[net]
    ax.errorbar(
        [sweep.depth for sweep in found], means, yerr=errors if np.any(errors) else None,
        color=color, marker=marker, markersize=5, linewidth=1.3, capsize=2, label=net,
    )  # fmt: skip


def _referred(ax: Any, table: Mapping[str, tuple[float, ...]], depths: Sequence[int]) -> None:
    """The earlier replication beside, dotted and hollow."""
    for net, values in table.items():
        shown = [(d, v) for d, v in zip(depths, values, strict=True) if np.isfinite(v)]
        _line(
            ax, [d for d, _ in shown], [v for _, v in shown], net, linestyle=":", linewidth=0.9,
            markerfacecolor="none", alpha=0.75,
        )  # fmt: skip
    ax.plot([], [], ":o", color="0.4", markerfacecolor="none", markersize=4.5, linewidth=0.9,
            label=reference.NAME)  # fmt: skip


def _edges(ax: Any, swept: Mapping[tuple[str, int], Sweep]) -> None:
    """A ring around optima at the edge of the grid."""
    edges = [sweep for sweep in swept.values() if sweep.edge]
    if edges:
        ax.plot(
            [s.depth for s in edges], [s.rate for s in edges], "o", markersize=11, color="0.2",
            markerfacecolor="none", label="at the edge of the grid",
        )  # fmt: skip


def _diverging(swept: Mapping[tuple[str, int], Sweep]) -> str:
    """Nets that no learning rate keeps finite for all seeds, for a reader."""
    gone: dict[str, list[int]] = {}
    for (net, depth), sweep in swept.items():
        if not sweep.trains:
            gone.setdefault(net, []).append(depth)
    return "; ".join(
        f"{net}: no rate of the grid without diverged seeds at L = {', '.join(map(str, depths))}"
        for net, depths in gone.items()
    )


# -- linear nets --------------------------------------------------------------------------------


def _final(drawing: Drawing, swept: Mapping[tuple[str, int], Sweep]) -> None:
    figure, (left, right) = plots.new_axes(2, width=6.4, height=5.4)
    depths = sorted({depth for _, depth in swept})
    for net in _LOOKS:
        _over_depth(left, swept, net, lambda sweep: sweep.final)
        _over_depth(right, swept, net, lambda sweep: sweep.rate)
    _referred(left, reference.EXCESS, reference.DEPTHS)
    _referred(right, reference.RATE, reference.DEPTHS)
    left.axhline(1e-4, color="0.3", linewidth=0.9, linestyle="--", label="1e-4")
    left.set_ylim(_BOTTOM, drawing.context["scale"])
    _edges(right, swept)
    for ax in (left, right):
        _depth_axis(ax, depths)
        ax.set_yscale("log")
    left.set_ylabel("final loss above the least one, best learning rate")
    right.set_ylabel("best learning rate")
    left.set_title(
        drawing.titles(
            ("loss.near-minimum", "2-shortcut within 1e-4 at every depth"),
            ("loss.beats-plain", "... below orthogonal and Xavier"),
            ("loss.xavier-degrades", "Xavier degrades with depth"),
        )
    )
    right.set_title(
        drawing.titles(
            ("rate.larger", "2-shortcut has the largest best learning rate"),
            ("rate.falls", "orthogonal and 1-shortcut: rate ~ 1/L"),
            ("rate.keeps", "2-shortcut: rate does not fall"),
        )
    )
    handles, labels = left.get_legend_handles_labels()
    extra = [(h, t) for h, t in zip(*right.get_legend_handles_labels(), strict=True) if "edge" in t]
    handles, labels = handles + [h for h, _ in extra], labels + [t for _, t in extra]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    seeds = sorted({sweep.losses.shape[1] for sweep in swept.values()})
    shown = " or ".join(map(str, seeds))
    head = (
        f"Linear nets on {drawing.data}, {_steps(drawing)} steps; mean and range of {shown} seeds"
    )
    gone = _diverging(swept)
    figure.suptitle(f"{head}\n{gone}" if gone else head, x=0.01, ha="left", fontsize="medium")
    plots.save(figure, drawing.out / "final_loss.png")


def _steps(drawing: Drawing) -> int:
    return int(max(r["steps"][-1] for _, r in parts(drawing.measured, "sweep")))


def _rates(drawing: Drawing, swept: Mapping[tuple[str, int], Sweep]) -> None:
    depths = sorted({depth for _, depth in swept})
    figure, axes = plots.new_axes(len(depths), width=3.2, height=4.2)
    start = drawing.context["scale"]
    for ax, depth in zip(axes, depths, strict=True):
        for net in _LOOKS:
            sweep = swept.get((net, depth))
            if sweep is None:
                continue
            means = sweep.losses.mean(1)
            finite = np.isfinite(means)
            _line(ax, sweep.rates[finite], means[finite].clip(_BOTTOM), net, markersize=3)
            if sweep.trains:
                _line(
                    ax, [sweep.rate], [max(means[sweep.best], _BOTTOM)], net, markersize=9,
                    markeredgecolor="0.1",
                )  # fmt: skip
        ax.axhline(start, color="0.5", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(_BOTTOM, 30 * start)
        ax.set_xlabel("learning rate")
        ax.set_title(f"L = {depth}")
        if ax is not axes[0]:
            ax.tick_params(labelleft=False)
    axes[0].set_ylabel("mean final loss above the least one")
    for net in _LOOKS:
        _line(axes[0], [], [], net, label=net)
    axes[0].plot([], [], "o", color="w", markeredgecolor="0.1", markersize=9, label="best rate")
    axes[0].plot([], [], ":", color="0.5", label="loss of the identity map")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    title = drawing.titles(
        (
            "rate.larger",
            "The best learning rate of the 2-shortcut net is the largest at every depth",
        )
    )
    figure.suptitle(
        f"{title}\nlinear nets on {drawing.data}; a curve ends where some seed diverges",
        x=0.01, ha="left", fontsize="medium",
    )  # fmt: skip
    plots.save(figure, drawing.out / "learning_rates.png")


def _norms(drawing: Drawing, swept: Mapping[tuple[str, int], Sweep]) -> None:
    figure, (left, right) = plots.new_axes(2, width=6.2, height=5.0)
    depths = sorted({depth for _, depth in swept})
    cells = parts(drawing.measured, "sweep", net=TWO)
    shades = np.linspace(0.25, 1.0, len(cells))
    for (cell, result), shade in zip(cells, shades, strict=True):
        norms = np.asarray(result["norm_curves"], dtype=float).mean(1)
        steps = np.asarray(result["steps"]) + 1
        color = [shade * c + (1 - shade) for c in _LOOKS[TWO][0]]
        left.plot(steps, norms, color=color, linewidth=1.6, label=f"L = {cell['L']}")
    left.set_xscale("log")
    left.set_xlabel("step of gradient descent, counted from 1")
    left.set_ylabel("mean Frobenius norm of the matrices")
    left.set_title("2-shortcut net, each depth at its best learning rate")
    left.legend(loc="upper left", fontsize="small")
    for net, depth in ((ONE, 1), (TWO, 2), (THREE, 3)):
        _over_depth(right, swept, net, lambda sweep: sweep.norms[sweep.best])
        known = depths_of(swept, net)
        sweep = swept[net, known[0]]
        first = float(sweep.norms[sweep.best].mean())
        right.plot(
            known, [first * (d / known[0]) ** (-1 / depth) for d in known], color=_LOOKS[net][0],
            linewidth=1, linestyle="--", alpha=0.8,
        )  # fmt: skip
    _referred(right, reference.NORM, reference.DEPTHS)
    right.plot([], [], "--", color="0.4", linewidth=1, label="rate of small minima: L^(-1/n)")
    _depth_axis(right, depths)
    right.set_yscale("log")
    right.set_ylabel("mean Frobenius norm of the matrices at the end")
    right.set_title(
        drawing.titles(
            ("norm.falls", "the deeper, the smaller"),
            ("norm.rate-1", "n = 1: ~ 1/L"),
            ("norm.rate-2", "n = 2: ~ L^(-1/2)"),
            ("norm.rate-3", "n = 3: ~ L^(-1/3)"),
        )
    )
    right.legend(loc="lower left", fontsize="small")
    figure.suptitle(f"Weights of linear nets on {drawing.data}", x=0.01, ha="left")
    plots.save(figure, drawing.out / "weight_norms.png")


# -- along trainings ----------------------------------------------------------------------------


def _followed(drawing: Drawing, net: str, depth: int) -> list[Mapping[str, Any]]:
    return along.paths(drawing.measured, net, depth)


def _trajectories(drawing: Drawing) -> None:
    depths = list(dict.fromkeys(cell["L"] for cell, _ in parts(drawing.measured, "path")))
    quantities: list[tuple[str, Callable[[along.Record], float], str]] = [
        ("κ₁₀ = |λ|max / |λ|(0.1)", along.kappa10, "log"),
        ("largest |λ|", lambda record: float(record["largest"]["value"]), "log"),
        ("10th percentile |λ|(0.1)", lambda record: float(record["tenth"]["value"]), "log"),
        ("index: share of negative λ", along.index, "linear"),
    ]
    figure, axes = plots.new_grid(len(depths), len(quantities), width=4.0, height=3.7)
    for row, depth in zip(axes, depths, strict=True):
        for ax, (label, value, scale) in zip(row, quantities, strict=True):
            for net in (XAVIER, ONE, ORTHOGONAL, TWO):
                for place, path in enumerate(_followed(drawing, net, depth)):
                    records = path["records"]
                    _line(
                        ax, [r["loss"] for r in records], [value(r) for r in records], net,
                        markersize=3, linewidth=1, alpha=0.9 if place == 0 else 0.45,
                    )  # fmt: skip
            ax.set_xscale("log")
            ax.invert_xaxis()
            ax.set_yscale(scale)
            ax.set_ylabel(f"L = {depth}: {label}")
    for ax in axes[-1]:
        ax.set_xlabel("loss above the least one, falling")
    axes[0][0].set_title(
        drawing.titles(
            ("path.smaller", "2-shortcut below orthogonal"),
            ("path.smaller-early", "... down to a tenth"),
            ("path.same-end", "both alike at the end"),
        )
    )
    axes[0][3].set_title(
        drawing.titles(
            ("path.index-below", "2-shortcut below orthogonal"),
            ("path.index-early", "drops early"),
        )
    )
    shown = [net for net in _LOOKS if any(_followed(drawing, net, depth) for depth in depths)]
    for net in shown:
        _line(axes[0][0], [], [], net, label=net)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    counts = ", ".join(
        f"{len(_followed(drawing, net, depths[0]))} of {net}" for net in (TWO, ORTHOGONAL)
    )
    figure.suptitle(
        f"Full Hessian spectra of linear nets on {drawing.data} along gradient descent "
        f"(seeds at L = {depths[0]}: {counts}, else one)", x=0.01, ha="left",
    )  # fmt: skip
    plots.save(figure, drawing.out / "spectra_along_training.png")


def _escape(drawing: Drawing) -> None:
    depth = int(drawing.context["depth"])
    figure, (left, right) = plots.new_axes(2, width=6.2, height=4.6)
    path = _followed(drawing, TWO, depth)[0]
    _gradient_and_index(left, path)
    left.set_title(
        f"2-shortcut net, L = {depth}, one seed\n"
        + drawing.titles(("path.peak", "gradient peaks as the index drops"))
    )
    for net in (XAVIER, ONE, ORTHOGONAL, TWO):
        for place, followed in enumerate(_followed(drawing, net, depth)):
            records = followed["records"]
            _line(
                right, [r["step"] + 1 for r in records], [along.kappa10(r) for r in records], net,
                markersize=3, linewidth=1, alpha=0.9 if place == 0 else 0.45,
                label=net if place == 0 else None,
            )  # fmt: skip
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("step of gradient descent, counted from 1")
    right.set_ylabel("κ₁₀ = |λ|max / |λ|(0.1)")
    right.set_title(
        f"κ₁₀ against time, L = {depth}\n"
        + drawing.titles(("path.diverges", "grows by 10 or more towards the least loss"))
    )
    right.legend(loc="best", fontsize="small")
    figure.suptitle(
        f"Linear nets on {drawing.data}, learning rate 0.02", x=0.01, ha="left"
    )  # fmt: skip
    plots.save(figure, drawing.out / "escape.png")


def _gradient_and_index(ax: Any, path: Mapping[str, Any]) -> None:
    """Loss and gradient norm on the left axis, the index on the right one."""
    end = min(3 * path["peak"], path["num_steps"]) or path["num_steps"]
    steps = np.asarray(path["steps"])
    inside = steps <= end
    losses, gradients = (
        np.asarray(path[key], dtype=float)[inside] for key in ("losses", "gradients")
    )
    ax.plot(steps[inside], gradients, color=plots.PALETTE[7], linewidth=1.6, label="gradient norm")
    ax.plot(
        steps[inside], losses, color="0.55", linewidth=1.2, linestyle="--",
        label="loss above the least one",
    )  # fmt: skip
    ax.axvline(path["peak"], color=plots.PALETTE[7], linewidth=0.8, linestyle=":")
    other = ax.twinx()
    records = [record for record in path["records"] if record["step"] <= end]
    other.plot(
        [r["step"] for r in records], [along.index(r) for r in records], "o-",
        color=plots.PALETTE[0], markersize=4, linewidth=1.2, label="index (right axis)",
    )  # fmt: skip
    other.set_ylabel("index: share of negative eigenvalues")
    other.grid(visible=False)
    ax.set_xlabel("step of gradient descent")
    ax.set_ylabel("gradient norm; loss above the least one")
    handles = [side.get_legend_handles_labels() for side in (ax, other)]
    ax.legend(
        handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="upper right",
        fontsize="small",
    )  # fmt: skip


# -- nets with a ReLU ---------------------------------------------------------------------------


def _relu(drawing: Drawing, swept: Mapping[tuple[str, int], Sweep]) -> None:
    figure, (left, right) = plots.new_axes(2, width=6.2, height=5.0)
    depths = sorted({depth for _, depth in swept})
    for net in (XAVIER, ORTHOGONAL, TWO):
        _over_depth(left, swept, net, lambda sweep: sweep.final)
        _over_depth(right, swept, net, lambda sweep: sweep.rate)
    _referred(left, reference.RELU, reference.RELU_DEPTHS)
    least = drawing.context["least_loss"]
    left.axhline(least, color="0.5", linewidth=0.9, linestyle="--", label="least loss, linear map")
    _edges(right, swept)
    for ax in (left, right):
        _depth_axis(ax, depths)
        ax.set_yscale("log")
    left.set_ylabel("final loss, best learning rate")
    right.set_ylabel("best learning rate")
    left.set_title(
        drawing.titles(
            ("relu.two-improves", "2-shortcut improves with depth"),
            ("relu.orthogonal-does-not", "orthogonal does not"),
            ("relu.xavier-does-not", "Xavier does not"),
            ("relu.best", "2-shortcut lowest at every depth"),
            ("relu.best-deep", "... at the largest"),
        )
    )
    right.set_title("where these losses were reached")
    left.legend(loc="best", fontsize="small")
    if any(sweep.edge for sweep in swept.values()):
        right.legend(
            *([[group[-1]] for group in right.get_legend_handles_labels()]), fontsize="small"
        )
    (_, first), *_ = parts(drawing.measured, "relu")
    seeds = max(sweep.losses.shape[1] for sweep in swept.values())
    figure.suptitle(
        f"Nets with a ReLU in the middle of each pair, {first['samples']} samples of "
        f"{drawing.data}, {_steps(drawing)} steps; mean and range of {seeds} seeds",
        x=0.01, ha="left", fontsize="medium",
    )  # fmt: skip
    plots.save(figure, drawing.out / "relu.png")
