"""Spectra from their quadrature nodes, and condition numbers with their enclosures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from conditioning.jacobi import Array
from conditioning.plots.axes import given_or_new
from conditioning.plots.depth import short_number
from conditioning.plots.svg import FIRST, MUTED, SECOND
from conditioning.spectrum import ConditionNumber, Estimate

_WIDTH = 0.06  # of the Gaussians, in decades of the axis
_FLOOR = 0.02  # of the height of the lightest node: what is below it is tail of a Gaussian


def plot_spectra(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ax: Axes | None = None,
    *,
    ends: Mapping[str, tuple[Estimate, Estimate]] | None = None,
) -> Axes:
    """Densities of eigenvalues on axes on which outliers show beside the bulk.

    Parameters
    ----------
    curves : mapping of str to (nodes, weights)
        By the name of the matrix: quadrature nodes and their shares.
    ax : Axes, optional
    ends : mapping of str to (Estimate, Estimate), optional
        Smallest and largest eigenvalue of each, marked under the curve.

    Returns
    -------
    Axes
        The eigenvalues stand at ``asinh(lambda / s)``: evenly around zero, logarithmically
        beyond ``s``, a tenth of the median of ``|lambda|`` over the first curve, but at least a
        millionth of the largest. The curve is the share of eigenvalues for each decade of that
        axis, nodes widened to Gaussians of 0.06 decades.
    """
    ax = given_or_new(ax)
    known = {name: _finite(*curve) for name, curve in curves.items()}
    known = {name: curve for name, curve in known.items() if len(curve[0])}
    scale = _linear_width(list(known.values()))
    floor, top = math.inf, 0.0
    styles = ((FIRST, "-"), (SECOND, "--"), (MUTED, ":"))
    for (name, (nodes, weights)), (color, dash) in zip(known.items(), styles, strict=False):
        at = _decades(nodes, scale)
        points = np.linspace(at.min() - 5 * _WIDTH, at.max() + 5 * _WIDTH, 400)
        height = _smooth(points, at, weights)
        peaks = weights[weights > 0] / (_WIDTH * math.sqrt(2 * math.pi))
        lowest = max(_FLOOR * float(peaks.min(initial=math.inf)), 1e-12 * float(height.max()))
        floor, top = min(floor, lowest), max(top, float(height.max()))
        shown = np.where(height >= lowest, height, np.nan)
        ax.plot(points, shown, color=color, linestyle=dash, linewidth=1.5, label=name, zorder=3)
        ax.fill_between(points, np.where(height >= lowest, lowest, np.nan), shown, color=color,
                        alpha=0.12, linewidth=0)  # fmt: skip
    if not known or not top > 0:
        floor, top = 0.1, 1.0
    ax.set_yscale("log")
    ax.set_ylim(floor, top * 2.5)
    for (name, pair), (color, _) in zip((ends or {}).items(), styles, strict=False):
        at = _decades(np.array([end.value for end in pair]), scale)
        at = at[np.isfinite(at)]
        ax.plot(at, [0.0] * len(at), linestyle="none", marker="^", color=color, markersize=7,
                markerfacecolor="none" if color == SECOND else color, clip_on=False, zorder=4,
                transform=ax.get_xaxis_transform(), label=f"{name}: both ends")  # fmt: skip
    _eigenvalue_ticks(ax, scale)
    ax.yaxis.set_major_locator(LogLocator(numticks=7))
    ax.yaxis.set_major_formatter(FuncFormatter(short_number))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("share of eigenvalues per decade")
    return ax


def plot_condition_numbers(numbers: Mapping[str, ConditionNumber], ax: Axes | None = None) -> Axes:
    """Condition numbers with their enclosures; an arrow where no upper bound is known.

    Parameters
    ----------
    numbers : mapping of str to ConditionNumber
        By what they are called, from top to bottom.
    ax : Axes, optional
    """
    ax = given_or_new(ax)
    held: list[float] = []
    for row, number in enumerate(numbers.values()):
        if not (math.isfinite(number.low) and number.low > 0):
            ax.annotate("not defined", (0.02, row), xycoords=("axes fraction", "data"),
                        va="center", color=MUTED)  # fmt: skip
            continue
        held += [end for end in (number.low, number.high) if math.isfinite(end)]
        if math.isfinite(number.high):
            ax.hlines(row, number.low, number.high, color=FIRST, linewidth=7, alpha=0.4)
            ax.plot(number.value, row, marker="o", markersize=6, color=FIRST, linestyle="none")
        else:
            ax.annotate(
                "", (0.985, row), (number.low, row), xycoords=("axes fraction", "data"),
                textcoords="data",
                arrowprops={"arrowstyle": "->", "color": SECOND, "linewidth": 1.6, "shrinkA": 0},
            )  # fmt: skip
            ax.plot(number.low, row, marker="|", markersize=12, markeredgewidth=2,
                    color=SECOND, linestyle="none")  # fmt: skip
    low, high = (min(held), max(held)) if held else (1.0, 1e3)
    ax.set_xscale("log")
    ax.set_xlim(min(1.0, low) / 1.5, high * (high / min(low, 1.0)) ** 0.25 * 3)
    ax.xaxis.set_major_locator(LogLocator(numticks=6))
    ax.xaxis.set_major_formatter(FuncFormatter(short_number))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(len(numbers) - 0.5, -0.5)
    ax.set_yticks(range(len(numbers)), list(numbers))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("condition number")
    return ax


def _finite(nodes: Sequence[float], weights: Sequence[float]) -> tuple[Array, Array]:
    at, share = np.asarray(nodes, dtype=float), np.asarray(weights, dtype=float)
    good = np.isfinite(at) & np.isfinite(share)
    return at[good], share[good]


def _linear_width(curves: Sequence[tuple[Array, Array]]) -> float:
    if not curves:
        return 1.0
    nodes, weights = curves[0]
    size = np.abs(nodes)
    order = np.argsort(size)
    middle = int(np.searchsorted(np.cumsum(weights[order]), 0.5 * weights.sum()))
    median = float(size[order][min(middle, len(order) - 1)])
    largest = max(float(np.abs(at).max()) for at, _ in curves)
    return max(0.1 * median, 1e-6 * largest) or 1.0


def _decades(values: Array, scale: float) -> Array:
    """Where eigenvalues stand on the axis: its unit is a decade, far from zero."""
    return np.asarray(np.arcsinh(values / (2 * scale)) / math.log(10))


def _smooth(points: Array, at: Array, weights: Array) -> Array:
    kernel = np.exp(-0.5 * ((points[:, None] - at) / _WIDTH) ** 2)
    return np.asarray(kernel @ weights / (_WIDTH * math.sqrt(2 * math.pi)))


def _eigenvalue_ticks(ax: Axes, scale: float) -> None:
    left, right = ax.get_xlim()
    reach = 2 * scale * math.sinh(min(max(abs(left), abs(right)), 300) * math.log(10))
    first, last = math.ceil(math.log10(scale) + 0.3), math.floor(math.log10(reach))
    every = max(1, math.ceil((last - first + 1) / (4 if left < -0.5 else 7)))
    powers = [10.0**e for e in range(last, first - 1, -every)]
    ticks = _within(powers, left, right, scale)
    if len(ticks) < 3:  # all of it within a decade or two
        fine = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 3, 5, 7)]
        ticks = _within(fine, left, right, scale)
    ax.xaxis.set_major_locator(FixedLocator([place for place, _ in ticks]))
    ax.xaxis.set_ticklabels([short_number(value) for _, value in ticks])
    ax.set_xlim(left, right)
    if left < 0 < right:
        ax.axvline(0, color=MUTED, linewidth=0.8, zorder=1)


def _within(
    sizes: Sequence[float], left: float, right: float, scale: float
) -> list[tuple[float, float]]:
    """Places on the axis and their eigenvalues, with both signs and zero."""
    values = np.array([*(-size for size in sizes), 0.0, *sizes])
    places = _decades(values, scale)
    inside = (places >= left) & (places <= right)
    return sorted(zip(places[inside].tolist(), values[inside].tolist(), strict=True))
