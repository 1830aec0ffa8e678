"""Ratios of gradient norms over depth and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.colors
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from conditioning.plots.axes import PALETTE, decades_or_plain, given_or_new

if TYPE_CHECKING:
    import pandas as pd


def plot_ratios(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    transitions: Sequence[str] = (),
    bound: tuple[float, float] | None = None,
    num_curves: int = 6,
) -> Axes:
    """Gradient-norm ratio of every block, one curve for each snapshot, light to dark in time.

    Parameters
    ----------
    frame : DataFrame
        A row for each step, a column for each block in depth order, as
        :meth:`GradientNorms.ratios` gives it.
    ax : Axes, optional
    transitions : sequence of str
        Blocks to mark.
    bound : pair of float, optional
        A band to draw, such as that of a theory.
    num_curves : int
        At most so many snapshots are drawn, evenly spaced, the first and the last among them.
    """
    ax = given_or_new(ax)
    shown = np.unique(np.linspace(0, len(frame) - 1, min(num_curves, len(frame))).round())
    depth = np.arange(1, frame.shape[1] + 1)
    colors = sns.color_palette("flare", len(shown))
    marker = "o" if len(depth) <= 40 else None
    for color, row in zip(colors, shown.astype(int), strict=True):
        values = frame.iloc[row].to_numpy(dtype=float)
        positive = np.where((values > 0) & np.isfinite(values), values, np.nan)
        if np.isnan(positive).all() and not (values == 0).any():
            continue  # nothing to be seen of this step
        ax.plot(depth, positive, color=color, marker=marker, markersize=3, linewidth=1.2,
                label=f"step {frame.index[row]}")  # fmt: skip
    ax.axhline(1, color="0.35", linewidth=0.8, zorder=0)
    if bound is not None:
        ax.axhspan(*bound, color=PALETTE[2], alpha=0.15, zorder=0, label="bound")
    _mark_columns(ax, frame, transitions)
    ax.set_yscale("log")
    decades_or_plain(ax)
    zero = [place for place, column in zip(depth, frame.to_numpy()[shown.astype(int)].T,
                                           strict=True) if (column == 0).any()]  # fmt: skip
    if zero:
        ax.plot(zero, [0.0] * len(zero), linestyle="none", marker="v", color="0.1", markersize=7,
                clip_on=False, transform=ax.get_xaxis_transform(), label="0 in some step",
                zorder=5)  # fmt: skip
    _name_columns(ax, frame, "block, from input to output")
    ax.set_ylabel("gradient norm at input / at output")
    ax.set_title("Norm preservation: 1 is ideal")
    ax.legend(fontsize="x-small", ncols=2, loc="best")
    return ax


def _mark_columns(ax: Axes, frame: pd.DataFrame, names: Sequence[str]) -> None:
    places = [place for place, name in enumerate(frame.columns, 1) if name in set(names)]
    for number, place in enumerate(places):
        ax.axvline(place, color="0.45", linestyle=":", linewidth=1, zorder=0.9,
                   label=None if number else "transition")  # fmt: skip


def _name_columns(ax: Axes, frame: pd.DataFrame, label: str) -> None:
    """Names of blocks where there is room for them, else their numbers."""
    if frame.shape[1] <= 24:
        names = [str(name) for name in frame.columns]
        turned = sum(map(len, names)) > 50
        ax.set_xticks(range(1, len(names) + 1), names, rotation=90 if turned else 0,
                      fontsize="x-small")  # fmt: skip
    ax.set_xlabel(label)


def plot_ratio_heatmap(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    transitions: Sequence[str] = (),
    bound: tuple[float, float] | None = None,
) -> Axes:
    """Ratios over depth and step: red where the gradient grows, blue where it shrinks.

    Parameters
    ----------
    frame : DataFrame
        As for :func:`plot_ratios`.
    ax : Axes, optional
    transitions : sequence of str
        Blocks to mark.
    bound : pair of float, optional
        The colours end there; by default they end at the ratio farthest from 1.
    """
    ax = given_or_new(ax)
    values = frame.to_numpy(dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    finite = np.abs(logs[np.isfinite(logs)])
    reach = max(finite.max() if finite.size else 0.0, 1e-3)
    if bound is not None:
        reach = max(abs(np.log(end)) for end in bound if end > 0)
    edges = np.arange(frame.shape[1] + 1) + 0.5
    mesh = ax.pcolormesh(
        edges, np.arange(len(frame) + 1),
        # A dead block is the bluest of all; only what has no ratio is left out.
        np.exp(np.ma.masked_invalid(np.clip(logs, -reach, reach))), cmap="vlag",
        norm=mpl.colors.LogNorm(np.exp(-reach), np.exp(reach)), rasterized=True,
    )  # fmt: skip
    ax.set_facecolor("0.75")  # what is missing shows through
    for place, name in enumerate(frame.columns, 1):
        if name in set(transitions):
            ax.plot(place, 1.0, marker="v", color="0.2", markersize=5, clip_on=False,
                    transform=ax.get_xaxis_transform())  # fmt: skip
    rows = np.unique(np.linspace(0, len(frame) - 1, min(6, len(frame))).round()).astype(int)
    ax.set_yticks(rows + 0.5, [str(frame.index[row]) for row in rows])
    ax.grid(visible=False)
    bar = ax.figure.colorbar(mesh, ax=ax, label="gradient norm at input / at output")
    ticks = np.exp(np.linspace(-reach, reach, 5))
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    notes = ["▼ transition"] if len(transitions) else []
    notes += ["grey: no ratio"] if np.isnan(values).any() else []
    notes += ["darkest blue: 0"] if (values == 0).any() else []
    legend = f" ({', '.join(notes)})" if notes else ""
    _name_columns(ax, frame, f"block, from input to output{legend}")
    ax.set_ylabel("step")
    ax.set_title("Norm preservation: white is ideal")
    return ax
