"""Figures of the experiment, with the verdicts in their titles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conditioning import plots, theory
from experiments.claims import Verdict
from experiments.readings import number
from experiments.report import Titles
from experiments.sweep import Pair, parts
from experiments.tau_scaling import curves
from experiments.tau_scaling.laboratory import DESCENDING, MULTIPLIED
from experiments.tau_scaling.nets import BN, BN_TAU, FREE, FREE_QUARTER, FREE_TAU
from experiments.tau_scaling.rules import (
    ABOVE,
    BOUNDED,
    HALF,
    LINEAR,
    ONE,
    QUARTER,
    RULES,
    SHARP,
    UNBOUNDED,
)
from experiments.tau_scaling.verdicts import MEAN_FIELD_DEPTH, ZERO_OUTPUTS, errors

# Colour and marker of a factor, the same in every figure.
_LOOKS: Mapping[str, tuple[Any, str]] = {
    LINEAR: (plots.PALETTE[2], "v"),
    HALF: (plots.PALETTE[9], "D"),
    SHARP: (plots.PALETTE[0], "o"),
    ABOVE: (plots.PALETTE[4], "P"),
    QUARTER: (plots.PALETTE[1], "s"),
    ONE: (plots.PALETTE[3], "^"),
}
_NETS: Mapping[str, tuple[Any, str, str]] = {
    BN: (plots.PALETTE[3], "^", "BatchNorm, tau = 1 (He et al.)"),
    BN_TAU: (plots.PALETTE[0], "o", "BatchNorm, tau = 1/√L"),
    FREE_TAU: (plots.PALETTE[0], "o", "from tau = 1/√L"),
    FREE_QUARTER: (plots.PALETTE[1], "s", "from tau = L^-1/4"),
    FREE: (plots.PALETTE[3], "^", "from tau = 1"),
}

# Losses of nets that diverge go on beyond this.
_TOP = 30.0


def draw(out: Path, measured: Sequence[Pair], described: str, verdicts: Sequence[Verdict]) -> None:
    """Draw the four figures."""
    titles = Titles(verdicts)
    with plots.style():
        _norms(out / "norms.png", measured, titles)
        _products(out / "products.png", measured, titles)
        _descent(out / "descent.png", measured, titles)
        _resnets(out / "resnets.png", measured, described, titles)


def _over_depth(
    ax: Any, found: curves.Curves, rule: str, value: Callable[[Any], Any] = np.exp, **more: Any
) -> None:
    """Mean over seeds, with the range, of a function of the logarithms."""
    depths = list(found)
    means = np.array([value(found[depth].mean()) for depth in depths])
    ends = np.array([[value(found[d].min()), value(found[d].max())] for d in depths]).T
    color, marker = _LOOKS[rule]
    ax.errorbar(
        depths, means, yerr=np.abs(ends - means), color=color, marker=marker,
        markersize=4.5, capsize=2, **{"linestyle": "none", "label": f"tau = {rule}", **more},
    )  # fmt: skip


def _depth_axis(ax: Any, depths: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(depths, [str(depth) for depth in depths])
    ax.minorticks_off()
    ax.set_xlabel("residual blocks L")


# -- norms --------------------------------------------------------------------------------------


def _norms(path: Path, measured: Sequence[Pair], titles: Titles) -> None:
    figure, axes = plots.new_grid(2, 2, width=6.2, height=4.2)
    depths = list(curves.norms(measured, "forward", SHARP))
    for row, quantity in zip(axes, ("forward", "backward"), strict=True):
        for ax, rules in zip(row, (BOUNDED, UNBOUNDED), strict=True):
            for rule in rules:
                found = curves.norms(measured, quantity, rule)
                value = np.exp if ax is row[0] else float
                joined = "none" if quantity == "forward" else "-"
                _over_depth(ax, found, rule, value, linestyle=joined, linewidth=0.9)
            _depth_axis(ax, depths)
    _predictions(axes[0], depths)
    (left, right), (below, beside) = axes
    left.set_ylabel("|h_L| / |h_0|")
    right.set_ylabel("ln(|h_L| / |h_0|)")
    below.set_ylabel("|g_0| / |g_L|")
    beside.set_ylabel("ln(|g_0| / |g_L|)")
    right.set_yscale("log")
    beside.set_yscale("symlog", linthresh=1)
    beside.set_ylim(-1.5, 2e4)
    left.set_title(
        titles(
            ("forward.stable", "Forward norm flat from L = 100 on at 1/√L and below"),
            ("forward.limit", "with the limit exp(κ²/2) at κ/√L"),
        )
    )
    right.set_title(
        titles(
            ("converse.growth", "Above 1/√L it grows at least like L^c"),
            ("forward.mean-field", "as the law at large width says"),
        )
    )
    below.set_title(
        titles(("backward.stable", "Gradient norm flat from L = 100 on at 1/√L and below"))
    )
    beside.set_title(titles(("backward.explodes", "At tau = 1 it grows like the forward norm")))
    left.set_ylim(0.9, 2.35)
    left.legend(loc="upper left", fontsize="small", ncol=2)
    right.legend(loc="upper left", fontsize="small")
    below.legend(loc="upper left", fontsize="small")
    below.set_ylim(0.4, 1.35)
    beside.legend(loc="upper left", fontsize="small")
    plots.save(figure, path)


def _predictions(axes: Sequence[Any], depths: Sequence[int]) -> None:
    """Lines of the forward pass: the law at large width, its limit, and the two bounds."""
    left, right = axes
    for ax, rules in ((left, BOUNDED), (right, UNBOUNDED)):
        value = math.exp if ax is left else float
        for rule in rules:
            color = _LOOKS[rule][0]
            # The law takes time that grows as L / tau.
            far = {LINEAR: 100, HALF: 100, SHARP: MEAN_FIELD_DEPTH, ABOVE: MEAN_FIELD_DEPTH}
            shown = [depth for depth in depths if depth <= far.get(rule, math.inf)]
            taus = [RULES[rule].tau(depth) for depth in shown]
            ax.plot(
                shown,
                [
                    value(theory.mean_field_log_growth(tau, depth))
                    for tau, depth in zip(taus, shown, strict=True)
                ],
                color=color, linewidth=1.3,
            )  # fmt: skip
            bounds = [theory.log_growth_bounds(RULES[rule].tau(d), d) for d in depths]
            ends = [[value(bound[end] / 2) for bound in bounds] for end in (0, 1)]
            ax.fill_between(depths, *ends, color=color, alpha=0.13, linewidth=0)
    for rule in (HALF, SHARP):
        limit = math.exp(theory.limit_log_growth(RULES[rule].kappa))
        left.axhline(limit, color=_LOOKS[rule][0], linewidth=1, linestyle="--")
    left.plot([], [], color="0.3", linewidth=1.3, label="law at large width")
    left.plot([], [], color="0.3", linewidth=1, linestyle="--", label="limit exp(κ²/2)")
    left.fill_between([], [], [], color="0.3", alpha=0.2, label="bounds at any width")


def _products(path: Path, measured: Sequence[Pair], titles: Titles) -> None:
    figure, (left, right) = plots.new_axes(2, width=5.8)
    depths = list(curves.spectral_norms(measured, SHARP))
    for rule in MULTIPLIED:
        ax = left if rule in BOUNDED else right
        value = np.exp if ax is left else (lambda logs: logs / math.log(10))
        _over_depth(ax, curves.spectral_norms(measured, rule), rule, value, linestyle="-")
    for ax in (left, right):
        _depth_axis(ax, depths)
        ax.legend(loc="upper left", fontsize="small")
    left.set_ylim(0.9, 3.8)
    left.set_ylabel("spectral norm of the product of all blocks")
    right.set_yscale("log")
    right.set_ylabel("its logarithm to base 10")
    left.set_title(
        titles(
            ("product.stable", "No growth with L at 1/√L and below"),
            ("product.constant", "but above 2 at 1/√L"),
        )
    )
    right.set_title(titles(("product.explodes", "Above 1/√L it grows at least like L^c")))
    plots.save(figure, path)


# -- descent ------------------------------------------------------------------------------------


def _descent(path: Path, measured: Sequence[Pair], titles: Titles) -> None:
    figure, axes = plots.new_grid(2, 3, width=4.7, height=3.9)
    for row, task in zip(axes, ("descent", "images"), strict=True):
        depths = list(curves.losses(measured, task, SHARP))
        for ax, rule in zip(row, DESCENDING, strict=True):
            for place, (depth, rows) in enumerate(curves.losses(measured, task, rule).items()):
                color = plots.depth_colors(len(depths))[place]
                _losses(ax, rows, color, f"L = {depth}")
            ax.axhline(
                ZERO_OUTPUTS, color="0.4", linewidth=0.9, linestyle=":", label="zero outputs"
            )  # fmt: skip
            if task == "descent":
                ax.axhline(
                    ZERO_OUTPUTS / 10, color="0.4", linewidth=0.9, linestyle="--",
                    label="a tenth of that",
                )  # fmt: skip
            ax.set_yscale("log")
            ax.set_xlabel("step")
            ax.set_ylabel("loss, mean over samples")
            ax.legend(loc="upper right", fontsize="small")
        lowest = min(
            float(found.min()) for rule in DESCENDING
            for found in curves.losses(measured, task, rule).values()
        )  # fmt: skip
        for ax in row:
            ax.set_ylim(lowest / 1.5, _TOP)
    (linear, sharp, quarter), (images, images_sharp, images_quarter) = axes
    linear.set_title("Random labels, all samples in a step: tau = 1/L")
    sharp.set_title(
        "tau = 1/√L\n" + titles(("descent.depth-free", "as many steps at any depth"))
        + "\n" + titles(("descent.sharp-faster", "not above 1/L"))
    )  # fmt: skip
    quarter.set_title("tau = L^-1/4\n" + titles(("descent.diverges", "diverges where it is deep")))
    images.set_title("Images, stochastic: tau = 1/L\n" + titles(("images.train", "trains")))
    images_sharp.set_title("tau = 1/√L\n" + titles(("images.sharp-faster", "not above 1/L")))
    images_quarter.set_title(
        "tau = L^-1/4\n" + titles(("images.diverges", "diverges where it is deepest"))
    )
    plots.save(figure, path)


def _losses(ax: Any, rows: curves.Array, color: Any, label: str) -> None:
    """Geometric mean with the range of the nets that do not diverge; a cross for those that do."""
    steps = np.arange(len(rows))
    alive = np.isfinite(rows[-1])
    if alive.any():
        shown = rows[:, alive]
        ax.plot(steps, np.exp(np.log(shown).mean(1)), color=color, linewidth=1.3, label=label)
        ax.fill_between(
            steps, shown.min(1), shown.max(1), color=color, alpha=0.18, linewidth=0
        )  # fmt: skip
    if not alive.all():
        last = int(np.isfinite(rows[:, ~alive]).sum(0).max()) - 1
        ax.plot(
            [max(last, 0)], [_TOP / 1.5], "x", color=color, markersize=8,
            label=f"{label}: {(~alive).sum()} of {len(alive)} diverge",
        )  # fmt: skip


# -- ResNets ------------------------------------------------------------------------------------


def _resnets(path: Path, measured: Sequence[Pair], described: str, titles: Titles) -> None:
    figure, (left, middle, right) = plots.new_axes(3, width=5.0)
    layers: list[int] = []
    for net in (BN, BN_TAU):
        color, marker, label = _NETS[net]
        found = errors(measured, net)
        layers = [6 * n + 2 for n in found]
        rows = [100 * np.array(list(of_seed.values())) for of_seed in found.values()]
        means = np.array([row.mean() for row in rows])
        ends = np.array([[row.min(), row.max()] for row in rows]).T
        left.errorbar(
            layers, means, yerr=np.abs(ends - means), color=color, marker=marker, capsize=3,
            label=label,
        )  # fmt: skip
    left.set_xticks(layers, [f"ResNet-{depth}" for depth in layers])
    left.set_xlabel("depth")
    left.set_ylabel("error on held-out images (%)")
    left.set_ylim(bottom=0)
    left.set_title(
        titles(
            ("bn.deep", "By then 1/√L has helped the deep net with BN"),
            ("bn.gain-grows", "the more, the deeper"),
        )
    )
    left.legend(loc="upper left", title=described, title_fontsize="small")
    sizes = sorted({cell["n"] for cell, _ in parts(measured, "train", net=FREE_TAU)})
    for ax, n, claim in ((middle, sizes[0], None), (right, sizes[-1], "free.without")):
        for net in (FREE_TAU, FREE_QUARTER, FREE):
            _curves(ax, parts(measured, "train", net=net, n=n), net)
        chance = parts(measured, "train")[0][1]["chance"]
        ax.axhline(chance, color="0.4", linewidth=0.9, linestyle=":", label="guessing")
        ax.set_yscale("log")
        ax.set_ylim(top=30)
        ax.set_xlabel("step")
        ax.set_ylabel("training loss")
        ax.legend(loc="lower left", fontsize="small")
        title = f"Without BatchNorm, ResNet-{6 * n + 2}"
        if claim is not None:
            title += "\n" + titles(
                ("free.train", "1/√L learns at every depth"),
                ("free.without", "1 is worse where it is deepest"),
                ("free.larger", "so is L^-1/4"),
            )
        ax.set_title(title)
    plots.save(figure, path)


def _curves(ax: Any, cells: Sequence[Pair], net: str) -> None:
    """Losses of all seeds; a cross where a training diverged."""
    color, _, label = _NETS[net]
    for place, (_, result) in enumerate(cells):
        losses = np.array([number(loss) for loss in np.asarray(result["losses"], float)])
        steps = result["stride"] * np.arange(len(losses))
        ax.plot(
            steps, losses, color=color, linewidth=0.9, alpha=0.8,
            label=label if not place else None,
        )  # fmt: skip
        if result["status"] == "diverged":
            finite = losses[np.isfinite(losses)]
            height = min(finite[-1], 25.0) if len(finite) else 25.0
            ax.plot(steps[max(len(finite) - 1, 0)], height, marker="x", color=color, markersize=8)
    if any(result["status"] == "diverged" for _, result in cells):
        count = sum(result["status"] == "diverged" for _, result in cells)
        ax.plot([], [], "x", color=color, label=f"{label}: {count} of {len(cells)} diverge")
