"""Figures of results. Nothing else in the package imports seaborn or matplotlib.

Every function draws on axes that the caller gives, or makes its own, and returns them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.colors
import matplotlib.ticker
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conditioning.errors import InvalidArgumentError
from conditioning.jacobi import Array
from conditioning.singular import SingularValues
from conditioning.spectrum import Estimate, SpectralDensity

if TYPE_CHECKING:
    import pandas as pd

PALETTE: Sequence[Any] = sns.color_palette("colorblind")


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure here, without touching the caller's settings."""
    with (
        mpl.rc_context(),
        sns.axes_style("ticks", {"axes.grid": True, "grid.color": "0.92"}),
        sns.plotting_context("notebook", font_scale=0.85),
    ):
        mpl.rcParams.update({"legend.frameon": False, "axes.titlelocation": "left"})
        yield


def new_axes(
    columns: int = 1, *, width: float = 5.4, height: float = 4.2
) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window, with a row of axes."""
    figure, rows = new_grid(1, columns, width=width, height=height)
    return figure, rows[0]


def new_grid(
    rows: int, columns: int, *, width: float = 5.4, height: float = 4.2
) -> tuple[Figure, list[list[Axes]]]:
    """The same with several rows of axes, each of the given size."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def depth_colors(count: int) -> list[Any]:
    """Colours of so many curves in an order, such as that of depths: dark to light."""
    # One more than is used: the last is too light to be seen on white.
    return list(sns.color_palette("viridis", count + 1))[:count]


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG that is the same, byte for byte, for the same figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _axes(ax: Axes | None) -> Axes:
    return new_axes()[1][0] if ax is None else ax


def plot_enclosures(
    positions: Sequence[float],
    estimates: Sequence[Estimate],
    ax: Axes | None = None,
    **options: Any,
) -> Axes:
    """Points with their enclosures; a number known from below only becomes an arrow upwards.

    Parameters
    ----------
    positions : sequence of float
    estimates : sequence of Estimate
    ax : Axes, optional
    **options
        For ``Axes.errorbar``: ``label``, ``color``, ``marker`` ...
    """
    ax = _axes(ax)
    options = {"linestyle": "none", "marker": "o", "markersize": 5, "capsize": 2, **options}
    bounded = [(p, e) for p, e in zip(positions, estimates, strict=True) if math.isfinite(e.high)]
    open_ended = [
        (p, e)
        for p, e in zip(positions, estimates, strict=True)
        if not math.isfinite(e.high) and math.isfinite(e.low)
    ]
    values = np.array([e.value for _, e in bounded])
    errors = np.array([[e.value - e.low, e.high - e.value] for _, e in bounded]).reshape(-1, 2).T
    container = ax.errorbar(
        [p for p, _ in bounded], values, yerr=np.clip(errors, 0, None), **options
    )
    if open_ended:
        color = container.lines[0].get_color()
        ax.plot(
            [p for p, _ in open_ended],
            [e.low for _, e in open_ended],
            linestyle="none",
            marker="^",
            markersize=7,
            markerfacecolor="none",
            color=color,
        )
    return ax


def plot_spectrum(
    measured: Array,
    predicted: Array | None = None,
    ax: Axes | None = None,
    *,
    labels: tuple[str, str] = ("measured", "predicted"),
) -> Axes:
    """All eigenvalues in order: a line for the prediction, points over it for the measurement.

    Parameters
    ----------
    measured, predicted : ndarray of shape (n,)
        In any order.
    ax : Axes, optional
    labels : pair of str
    """
    ax = _axes(ax)
    share = (np.arange(len(measured)) + 0.5) / len(measured)
    if predicted is not None:
        ax.plot(
            share, np.sort(predicted), color="0.35", linewidth=5, alpha=0.35, label=labels[1],
            solid_capstyle="butt", drawstyle="steps-mid",
        )  # fmt: skip
    # Thinned to what can be told apart; both ends stay, since they decide.
    shown = np.unique(
        np.linspace(0, len(measured) - 1, min(len(measured), 160)).round().astype(int)
    )
    ax.plot(
        share[shown], np.sort(measured)[shown], linestyle="none", marker="o", markersize=2.2,
        color=PALETTE[0], label=labels[0],
    )  # fmt: skip
    ax.set_xlabel("share of the spectrum")
    ax.set_ylabel("eigenvalue")
    return ax


def plot_singular_values(
    results: SingularValues | Iterable[SingularValues], ax: Axes | None = None
) -> Axes:
    """Singular values in descending order, one curve for each layer and operator.

    Parameters
    ----------
    results : SingularValues, or an iterable of them
        With all values known.
    ax : Axes, optional

    Raises
    ------
    InvalidArgumentError
        If there is no result, or one knows the ends of its spectrum only.
    """
    chosen = [results] if isinstance(results, SingularValues) else list(results)
    if not chosen:
        raise InvalidArgumentError("There are no singular values to draw: results is empty.")
    ax = _axes(ax)
    for color, result in zip(sns.color_palette("colorblind", len(chosen)), chosen, strict=True):
        if result.values is None:
            msg = (
                f"Of the {result.layer} only the largest and the smallest singular value are "
                f"known ({result.status}). Use a smaller input_shape, or method='dense'."
            )
            raise InvalidArgumentError(msg)
        share = (np.arange(len(result.values)) + 0.5) / len(result.values)
        # Steps, so that a layer with one singular value shows, too.
        edges = np.concatenate([[0.0], share, [1.0]])
        values = result.values.numpy()
        ax.plot(edges, np.concatenate([values[:1], values, values[-1:]]), color=color,
                drawstyle="steps-mid", label=f"{result.layer}: {result.operator}")  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xlabel("share of the singular values")
    ax.set_ylabel("singular value")
    ax.legend(fontsize="x-small")
    return ax


def plot_density(
    density: SpectralDensity, ax: Axes | None = None, *, num_points: int = 800
) -> Axes:
    """Spectral density on a logarithmic axis, widened by a hundredth of the spectrum's width.

    Parameters
    ----------
    density : SpectralDensity
    ax : Axes, optional
    num_points : int
        Points at which the curve is drawn.
    """
    ax = _axes(ax)
    low, high = float(density.nodes[0]), float(density.nodes[-1])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    points = np.linspace(low - margin, high + margin, num_points)
    values = density.density(points)
    floor = max(values.max() * 1e-8, 1e-300)
    ax.semilogy(points, np.maximum(values, floor), color=PALETTE[0])
    ax.set_ylim(floor, values.max() * 3)
    ax.axvline(0, color="0.6", linewidth=0.8)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    ax.set_title(f"Spectral density, n = {density.size} ({density.status})")
    return ax


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
    ax = _axes(ax)
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
    _decades_or_plain(ax)
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


def _decades_or_plain(ax: Axes) -> None:
    """Plain numbers on a logarithmic axis; between the decades too where it spans few."""
    low, high = ax.get_ylim()
    if high / low < 2:
        middle = (high * low) ** 0.5
        low, high = min(low, middle / 2**0.5), max(high, middle * 2**0.5)
        ax.set_ylim(low, high)
    narrow = high / low < 30
    ax.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    if narrow:
        ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


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
    ax = _axes(ax)
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
