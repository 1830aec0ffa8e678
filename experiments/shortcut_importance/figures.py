"""Figures of the experiment, with the verdicts in their titles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditioning import plots, theory
from experiments.claims import Verdict
from experiments.report import Titles
from experiments.shortcut_importance.angles import angle_rows
from experiments.shortcut_importance.critical import RADII
from experiments.shortcut_importance.descent import OPEN, OPTIMUM, SPURIOUS
from experiments.shortcut_importance.laboratory import RATE_WINDOW
from experiments.shortcut_importance.setting import (
    CNN,
    COLD,
    LARGE,
    LARGE_SUM,
    PRIOR,
    SHORT,
    STRESS,
    UNIT,
    WARM,
    Method,
    Teacher,
)
from experiments.shortcut_importance.tables import RECALLED, RECALLED_PATCHES
from experiments.shortcut_importance.verdicts import rates_of, start_names
from experiments.sweep import Pair, parts

# Colour and marker of a method, the same in every figure.
_LOOKS: Mapping[Method, tuple[Any, str]] = {
    WARM: (plots.PALETTE[0], "o"),
    SHORT: (plots.PALETTE[9], "s"),
    COLD: (plots.PALETTE[1], "D"),
    CNN: (plots.PALETTE[3], "v"),
}
_FATES = {OPTIMUM: plots.PALETTE[2], SPURIOUS: plots.PALETTE[3], OPEN: plots.PALETTE[7]}
_SMALLEST = 1e-9


@dataclass(frozen=True)
class Drawing:
    """What every figure needs."""

    out: Path
    measured: Sequence[Pair]
    titles: Titles


def draw(out: Path, measured: Sequence[Pair], verdicts: Sequence[Verdict]) -> None:
    """Draw the six figures."""
    drawing = Drawing(out, measured, Titles(verdicts))
    with plots.style():
        _rates(drawing)
        _landscape(drawing)
        _trajectories(drawing)
        _angles(drawing)
        _hessian(drawing)
        _starts(drawing)


def _point(method: Method) -> dict[str, Any]:
    """Markers of different sizes, some hollow: points on top of each other stay visible."""
    color, marker = _LOOKS[method]
    size = {COLD: 9.0, SHORT: 6.5, WARM: 3.5, CNN: 5.0}[method]
    face = "none" if method in (COLD, SHORT) else color
    return {"color": color, "marker": marker, "markersize": size, "markerfacecolor": face}


def _patch_axis(ax: Any, patches: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(patches, [str(k) for k in patches])
    ax.minorticks_off()
    ax.set_xlabel("number of patches k")


# -- success rates ------------------------------------------------------------------------------


def _rates(drawing: Drawing) -> None:
    figure, axes = plots.new_grid(2, len(PRIOR), width=4.6, height=3.9)
    cells = parts(drawing.measured, "rates")
    patches = sorted({k for cell, _ in cells for k in cell["patches"]})
    for row, teachers in zip(axes, (PRIOR, STRESS), strict=True):
        for ax, teacher in zip(row, teachers, strict=True):
            # The upper curves first: where all are 1 the warm-up is to be seen on top.
            for method in (CNN, COLD, SHORT, WARM):
                rates = rates_of(drawing.measured, teacher, method)
                if not rates:
                    continue
                color, marker = _LOOKS[method]
                values = np.array([rate.value for rate in rates.values()])
                ends = np.array([rate.enclosure for rate in rates.values()]).T
                ax.errorbar(
                    list(rates), values, yerr=np.abs(ends - values), capsize=2, linewidth=1.3,
                    **_point(method),
                )  # fmt: skip
                if method in RECALLED and (teacher is LARGE or teacher in STRESS):
                    ax.plot(
                        RECALLED_PATCHES, RECALLED[method], ":", color=color, linewidth=1,
                        marker=marker, markersize=3, markerfacecolor="w", alpha=0.8,
                    )  # fmt: skip
            _patch_axis(ax, patches)
            ax.set_ylim(0.4, 1.04)
            angle = "" if teacher in STRESS else ", φ₀ = π/3"
            share = "" if "r =" in teacher.name else ", 1ᵀa* = |a*|/4"
            ax.set_title(f"{teacher.name}{share}{angle}", fontsize="medium")
    for row in axes:
        row[0].set_ylabel("rate of the global optimum")
    for method in _LOOKS:
        axes[0][0].plot([], [], label=method.name, **_point(method))
    axes[0][0].plot([], [], ":o", color="0.4", markersize=3, markerfacecolor="w",
                    label="recalled from the paper, whose teacher is not known")  # fmt: skip
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    starts = max(cell["first"] + cell["seeds"] for cell, _ in cells)
    title = drawing.titles(
        ("rates.warm-up", "Shortcut and warm-up: every random start ends at the global optimum"),
        ("rates.no-warm-up", "... without a warm-up some do not (|a*|² = 64k)"),
        ("rates.cnn", "... without a shortcut about one half does (1ᵀa* = |a*|/4)"),
        ("rates.stress", "... beyond the prior (lower row), warm-up of 10k² steps: ≥ 0.999"),
        ("rates.stress-1000", "... 1000 steps there"),
    )
    head = f"{starts:,} starts for each point, 95 % intervals"
    figure.suptitle(f"{title}\n{head}", x=0.01, ha="left", fontsize="medium")
    plots.save(figure, drawing.out / "success_rates.png")


# -- landscape and trajectories -----------------------------------------------------------------


def lowest_loss(angle: Tensor, alignment: Tensor, k: int, mean: float, other: float) -> Tensor:
    """Least loss over ``a`` at an angle and ``a^T a* / |a*|^2``, over ``|a*|^2``.

    With a multiplier ``m`` for the alignment the best parts are ``(k + g - 1 + m) S/(k + pi - 1)``
    and ``(g - 1 + m) C/(pi - 1)``.
    """
    size = mean**2 + other**2
    slow, fast = math.pi - 1, k + math.pi - 1
    g = theory.rectified_overlap(angle)
    relaxed = theory.relaxed_alignment(angle, mean**2 / size, k)
    m = (alignment - relaxed) * size / (mean**2 / fast + other**2 / slow)
    s, c = (k + g - 1 + m) * mean / fast, (g - 1 + m) * other / slow
    return theory.conv_loss_reduced(s, c, angle, k, mean, other) / size


def _followed(drawing: Drawing, teacher: Teacher, method: Method) -> Pair:
    return parts(drawing.measured, "follow", teacher=teacher.name, method=method.name)[0]


def _landscape(drawing: Drawing) -> None:
    methods = (WARM, COLD, CNN)
    figure, axes = plots.new_axes(len(methods), width=4.7, height=4.5)
    teacher = LARGE_SUM
    k = _followed(drawing, teacher, WARM)[0]["k"]
    mean, other = teacher.parts(k)
    angles = torch.linspace(0, math.pi, 161, dtype=torch.float64)
    heights = torch.linspace(-0.7, 1.25, 161, dtype=torch.float64)
    height, angle = torch.meshgrid(heights, angles, indexing="ij")
    losses = lowest_loss(angle, height, k, mean, other).numpy()
    # At pi the best outputs are those of the spurious point.
    share = teacher.share(k)
    bottom = float(theory.relaxed_alignment(math.pi, share, k))
    levels = np.linspace(0, 0.5, 26)
    for ax, method in zip(axes, methods, strict=True):
        shades = ax.contourf(
            angles / math.pi, heights, losses, levels=levels, cmap="Greys", extend="max", alpha=0.75
        )
        ax.contour(angles / math.pi, heights, losses, levels=levels, colors="0.45", linewidths=0.3)
        ax.grid(visible=False)
        _, result = _followed(drawing, teacher, method)
        x = np.asarray(result["angle"], dtype=float) / math.pi
        y = np.asarray(result["alignment"], dtype=float)
        for lane, fate in enumerate(result["fate"]):
            color = _FATES[fate]
            ax.plot(x[:, lane], y[:, lane], color=color, linewidth=1.3, alpha=0.85)
            ax.plot(x[0, lane], y[0, lane], "o", color=color, markersize=4, markeredgecolor="w",
                    zorder=4)  # fmt: skip
        ax.plot(0, 1, "*", color=plots.PALETTE[2], markersize=16, markeredgecolor="k", zorder=5,
                clip_on=False)  # fmt: skip
        ax.plot(1, bottom, "X", color=plots.PALETTE[3], markersize=11, markeredgecolor="k",
                zorder=5, clip_on=False)  # fmt: skip
        ax.axhline(0, color="0.15", linewidth=0.9, linestyle="--")
        ax.axvline(0.5, color="0.15", linewidth=0.9, linestyle=":")
        ax.set_xlim(0, 1)
        ax.set_ylim(-0.7, 1.25)
        ax.set_xlabel("angle between the filters, φ/π")
        ax.set_title(method.name)
        if ax is not axes[0]:
            ax.tick_params(labelleft=False)
    axes[0].set_ylabel("alignment of the outputs, aᵀa*/|a*|²")
    figure.colorbar(shades, ax=axes, label="least loss over a, /|a*|²", fraction=0.03)
    handles = axes[0]
    for marker, color, label in (
        ("*", plots.PALETTE[2], "global optimum"), ("X", plots.PALETTE[3], "spurious optimum"),
        ("o-", plots.PALETTE[2], "start that ends at the first"),
        ("o-", plots.PALETTE[3], "start that ends at the second"),
    ):  # fmt: skip
        handles.plot([], [], marker, color=color, label=label)
    handles.plot([], [], "--", color="0.15", label="below: the filter turns away")
    handles.plot([], [], ":", color="0.15", label="right angle")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    title = drawing.titles(
        ("stage.angle", "During a warm-up the angle stays below a right one"),
        ("rates.warm-up", "... and every random start ends at the global optimum"),
    )
    figure.suptitle(f"{title}\n{teacher.name}, k = {k}, φ₀ = π/3", x=0.01, ha="left",
                    fontsize="medium")  # fmt: skip
    plots.save(figure, drawing.out / "landscape.png")


def _trajectories(drawing: Drawing) -> None:
    columns = ((LARGE, WARM), (LARGE, COLD), (LARGE, CNN), (UNIT, WARM))
    rows = (
        ("loss", "loss/|a*|²", "log"),
        ("angle", "angle φ/π", "log"),
        ("alignment", "aᵀa*/|a*|²", "linear"),
        ("outputs_distance", "|a − a*|/|a*|", "log"),
    )
    figure, axes = plots.new_grid(len(rows), len(columns), width=3.8, height=2.5)
    for column, (teacher, method) in enumerate(columns):
        cell, result = _followed(drawing, teacher, method)
        steps = np.asarray(result["steps"]) + 1
        for row, (quantity, label, scale) in zip(axes, rows, strict=True):
            ax = row[column]
            values = np.asarray(result[quantity], dtype=float)
            values = values / math.pi if quantity == "angle" else values
            values = values.clip(_SMALLEST) if scale == "log" else values
            for lane, fate in enumerate(result["fate"]):
                ax.plot(steps, values[:, lane], color=_FATES[fate], linewidth=1.1, alpha=0.8)
            if result["warm_up"]:
                ax.axvspan(1, result["warm_up"] + 1, color=plots.PALETTE[0], alpha=0.1)
            ax.set_xscale("log")
            ax.set_yscale(scale)
            if quantity == "alignment":
                ax.axhline(0, color="0.3", linewidth=0.8, linestyle="--")
                ax.set_ylim(-0.75, 1.1)
            if scale == "log":
                ax.set_ylim(_SMALLEST / 2, 4)
            if column == 0:
                ax.set_ylabel(label)
            if ax is axes[-1][column]:
                ax.set_xlabel("step, counted from 1")
        axes[0][column].set_title(f"{teacher.name}: {method.name}", fontsize="medium")
        if teacher is UNIT:
            _linear_convergence(axes[1][column], axes[3][column], cell["k"], result)
    for fate, label in (
        (OPTIMUM, "ends at the global optimum"), (SPURIOUS, "ends at the spurious optimum"),
    ):  # fmt: skip
        axes[0][0].plot([], [], color=_FATES[fate], label=label)
    axes[0][0].plot([], [], "k--", label="decay at the Hessian's eigenvalue (|a*| = 1)")
    axes[0][0].fill_between([], [], color=plots.PALETTE[0], alpha=0.2, label="warm-up")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    cell, result = _followed(drawing, UNIT, WARM)
    title = drawing.titles(
        ("stage.alignment", "|a*| = 1: the warm-up ends at the best outputs for its angle"),
        ("stage.angle-rate", "... angles then converge linearly, at the Hessian's rate"),
        ("stage.outputs-rate", "... and so do the outputs"),
    )
    head = f"k = {cell['k']}, φ₀ = π/3, {len(result['fate'])} starts in each column; "
    head += f"smaller values are drawn at {_SMALLEST:g}"
    figure.suptitle(f"{title}\n{head}", x=0.01, ha="left", fontsize="medium")
    plots.save(figure, drawing.out / "trajectories.png")


def _linear_convergence(angle: Any, outputs: Any, k: int, result: Mapping[str, Any]) -> None:
    """What the Hessian's eigenvalues predict in the window where the rates are measured."""
    steps, start = np.asarray(result["steps"]), result["warm_up"] + RATE_WINDOW[0] * k * k
    place = int(np.searchsorted(steps, start))
    later = steps[place:]
    for ax, quantity, rate in (
        (angle, "angle", 0.5), (outputs, "outputs_distance", (math.pi - 1) / (2 * math.pi)),
    ):  # fmt: skip
        middle = np.median(np.asarray(result[quantity], dtype=float)[place])
        middle = middle / math.pi if quantity == "angle" else middle
        curve = middle * np.exp(-rate * (later - later[0]) / k**2)
        ax.plot(later + 1, curve, "k--", linewidth=1.6, zorder=5)


# -- first angles -------------------------------------------------------------------------------


def _angles(drawing: Drawing) -> None:
    figure, (left, right, low) = plots.new_axes(3, width=5.2, height=4.4)
    rows = angle_rows(drawing.measured)
    shares = sorted({row.share for row in rows})
    markers = dict(zip(sorted({row.k for row in rows}), "osDv^P*", strict=False))
    for row in rows:
        color, marker = plots.PALETTE[shares.index(row.share)], markers[row.k]
        angles = np.asarray(row.angles, dtype=float) / math.pi
        won = np.asarray(row.successes, dtype=float) / row.runs
        look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "alpha": 0.85}
        if row.part == "below":
            size = "-" if row.size > 1 else ":"
            low.plot(angles, won, size, linewidth=1, **look)
            continue
        left.plot(angles, won, linewidth=1, **look)
        left.axvline(row.limit / math.pi, color=color, linewidth=0.8, linestyle="--")
        lowest, highest = row.edge.enclosure
        right.errorbar(
            [row.share], [row.edge.value],
            yerr=[[row.edge.value - lowest], [highest - row.edge.value]],
            color=color, marker=marker, capsize=3, linestyle="none", markersize=6, zorder=3,
        )  # fmt: skip
    low.plot([], [], "-", color="0.4", label="|a*|² = 64k")
    low.plot([], [], ":", color="0.4", label="|a*|² = k")
    # At smaller angles all is 1, see the table.
    low.set_xlim(0.43, 0.502)
    low.set_xlabel("first angle φ₀/π (colours, markers: as left)")
    low.set_ylabel("rate of the global optimum, random starts")
    low.legend(loc="lower left", fontsize="small")
    low.set_title(
        drawing.titles(
            ("angle.prior", "|a*|² = k: all random starts succeed"),
            ("angle.adversarial", "... and the adversarial one"),
            ("angle.large", "|a*|² = 64k: all random starts succeed"),
        )
    )
    grid = np.geomspace(1e-3, 1, 120)
    for k, dashes in zip(markers, ("-", "--", ":", "-.") * 3, strict=False):
        limits = [theory.warm_up_limit(float(r), k) / math.pi for r in grid]
        right.plot(grid, limits, dashes, color="0.35", linewidth=1.1, zorder=2,
                   label=f"predicted, k = {k}")  # fmt: skip
    right.legend(loc="upper left", fontsize="x-small")
    right.axhspan(0, 1 / 3, color=plots.PALETTE[0], alpha=0.12)
    left.axvspan(0, 1 / 3, color=plots.PALETTE[0], alpha=0.12, label="prior of the theorem, ≤ π/3")
    right.set_xscale("log")
    right.set_ylim(0.25, 1.02)
    right.set_xlabel("share r = (1ᵀa*)²/(k|a*|²)")
    right.set_ylabel("largest first angle φ₀/π")
    left.set_xlabel("first angle φ₀/π")
    left.set_ylabel("rate of the global optimum, random starts")
    left.set_xlim(left=0.15)
    for place, share in enumerate(shares):
        left.plot([], [], color=plots.PALETTE[place], label=f"r = {share:.3g}")
    for k, marker in markers.items():
        left.plot([], [], marker, color="0.4", label=f"k = {k}")
    left.plot([], [], "--", color="0.4", label="predicted: relaxed aᵀa* = 0")
    left.legend(loc="lower left", fontsize="x-small")
    left.set_title("|a*|² = k: success around the predicted edge")
    right.set_title(drawing.titles(("angle.edge", "|a*|² = k: measured edge = predicted one")))
    figure.suptitle("How far the first filter may be from the teacher's, warm-up of 10k² steps",
                    x=0.01, ha="left")  # fmt: skip
    plots.save(figure, drawing.out / "first_angle.png")


# -- the spurious point -------------------------------------------------------------------------


def _hessian(drawing: Drawing) -> None:
    figure, (left, right) = plots.new_axes(2, width=5.6, height=4.6)
    cells = parts(drawing.measured, "critical")
    patches = sorted({cell["k"] for cell, _ in cells})
    # In these units the prediction is the same for every k.
    ratios = np.linspace(0, max(cell["ratio"] for cell, _ in cells) * 1.05, 200)
    alignment = (ratios - 1) / (math.pi - 1)
    left.plot(ratios, np.where(alignment < 0, -alignment / 2, -alignment) / math.pi, color="0.4",
              linewidth=4, alpha=0.4, label="predicted")  # fmt: skip
    for cell, result in cells:
        place = patches.index(cell["k"])
        color, marker = plots.PALETTE[place % 10], "osDv^P*X"[place % 8]
        first = cell["ratio"] == min(c["ratio"] for c, _ in cells)
        left.plot(
            cell["ratio"], result["beside"], marker, color=color, markersize=9 - place * 0.9,
            markerfacecolor="none", label=f"k = {cell['k']}" if first else None,
        )  # fmt: skip
    left.axhline(0, color="0.2", linewidth=0.8)
    left.axvline(1, color="0.2", linewidth=0.8, linestyle="--")
    left.set_xlabel("(1ᵀa*)²/|a*|², over 1 + (k − 1)/π")
    left.set_ylabel("smallest Hessian eigenvalue at π − ε, over ε|a*|²")
    left.legend(fontsize="x-small", ncols=2, loc="lower left")
    left.set_title(
        drawing.titles(
            ("critical.sign", "changes its sign at the threshold"),
            ("critical.spurious", "at the point itself: p zeros on either side"),
        )
    )
    shown = [(c, r) for c, r in cells if c["k"] == patches[0]]
    radii = np.asarray(RADII)
    for place, (cell, result) in enumerate(shown):
        change = np.asarray(result["around"]["best"], dtype=float)
        expected = abs(result["alignment"]) / (6 * math.pi) * radii**3
        falls = change[-1] < 0
        shade = plots.PALETTE[place % 10]
        right.plot(radii, expected, color=shade, linewidth=1, linestyle="--" if falls else "-")
        right.plot(
            radii, np.abs(change), "v" if falls else "^", color=shade, markersize=6,
            label=f"{cell['ratio']:g} of the threshold: {'falls' if falls else 'rises'}",
        )  # fmt: skip
    right.plot([], [], color="0.4", label="predicted: |a_spᵀa*| ε³/6π")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("angle ε between the filter and −v*")
    right.set_ylabel("|change of the loss| for the best outputs")
    right.legend(fontsize="x-small")
    right.set_title(
        drawing.titles(
            ("critical.minimum", f"k = {patches[0]}: below the threshold a minimum"),
            ("critical.saddle", "above it a saddle"),
        )
    )
    figure.suptitle("The spurious critical point (−v*, a_sp), |a*| = 1", x=0.01, ha="left")
    plots.save(figure, drawing.out / "spurious_point.png")


# -- starts -------------------------------------------------------------------------------------


def _starts(drawing: Drawing) -> None:
    figure, (left, right) = plots.new_axes(2, width=6.6, height=5.2)
    names: list[str] = []
    for method, shift in ((COLD, -0.2), (SHORT, 0.0), (WARM, 0.2)):
        for cell, result in parts(drawing.measured, "starts", method=method.name):
            names = start_names(cell)
            color, marker = _LOOKS[method]
            share = np.asarray(result["successes"], dtype=float) / result["starts"]
            won = np.asarray(result["adversarial"]) == OPTIMUM
            places = np.arange(len(names)) + shift
            for chosen, face in ((won, color), (~won, "none")):
                left.plot(places[chosen], share[chosen], marker, color=color, markersize=5.5,
                          markerfacecolor=face, linestyle="none")  # fmt: skip
            left.plot([], [], marker, color=color, label=method.name)
    left.plot([], [], "o", color="0.3", markerfacecolor="none", label="adversarial start is lost")
    left.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    left.set_ylim(0.4, 1.02)
    left.set_ylabel("share of a grid over (s, c) that ends at the optimum")
    left.legend(fontsize="x-small", loc="lower left")
    left.set_title(
        drawing.titles(
            ("starts.adversarial", "warm-up of 10k² steps: every adversarial start succeeds"),
            ("starts.ball", "... and every point of the grid"),
            ("starts.short", "1000 steps are not enough for all"),
        )
    )
    for place, (cell, result) in enumerate(parts(drawing.measured, "time")):
        patches, steps = np.asarray(cell["patches"]), np.asarray(result["steps"], dtype=float)
        right.plot(patches, steps, "osD^v"[place % 5] + "-", color=plots.PALETTE[place],
                   label=f"r = {cell['share']:g}")  # fmt: skip
    known = np.asarray(
        sorted({k for c, _ in parts(drawing.measured, "time") for k in c["patches"]})
    )
    right.plot(known, known**2.0, "--", color="0.4", label="k²")
    right.plot(known, 10 * known**2.0, ":", color="0.4", label="10k², the warm-up")
    right.axhline(1000, color=_LOOKS[SHORT][0], linewidth=0.9, label="1000 steps")
    _patch_axis(right, known.tolist())
    right.set_yscale("log")
    right.set_ylabel("steps until an adversarial start is safe")
    right.legend(fontsize="x-small")
    right.set_title(drawing.titles(("starts.time", "|a*|² = k: no faster than k²")))
    plots.save(figure, drawing.out / "starts.png")
