"""Figures of results. Nothing else in the package imports seaborn or matplotlib.

Every function draws on axes that the caller gives, or makes its own, and returns them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conditioning.jacobi import Array
from conditioning.spectrum import Estimate, SpectralDensity

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
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


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
