"""Eigenvalues, singular values, densities, and numbers with their enclosures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from conditioning.errors import InvalidArgumentError
from conditioning.jacobi import Array
from conditioning.plots.axes import PALETTE, given_or_new
from conditioning.singular import SingularValues
from conditioning.spectrum import Estimate, SpectralDensity


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
    ax = given_or_new(ax)
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
    ax = given_or_new(ax)
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
    ax = given_or_new(ax)
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
    ax = given_or_new(ax)
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
