"""What happens from block to block: norms, ratios, singular values and gains against depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from conditioning.jacobi import Array
from conditioning.plots.axes import given_or_new
from conditioning.plots.svg import ALARM, FIRST, INK, MUTED, SECOND, THIRD
from conditioning.spectrum import Estimate

# Names of blocks are written out up to so many; beyond it their numbers are.
_NAMED = 24
_LETTERS = 16
_ACROSS = 50  # letters of all names together, for them to stand side by side


def plot_norms(
    before: Sequence[Estimate],
    after: Sequence[Estimate],
    ax: Axes | None = None,
    *,
    names: Sequence[str] = (),
    color: str = FIRST,
    label: str = "mean over the batches",
) -> Axes:
    """Norms in front of and behind every block, on a logarithmic axis.

    Each block takes one unit of the axis: the line goes from the norm in front of it to the one
    behind it. A step between two blocks is what runs between them.

    Parameters
    ----------
    before, after : sequence of Estimate
        In order of depth; the band reaches from ``low`` to ``high``.
    ax : Axes, optional
    names : sequence of str
        Of the blocks, written out where there are few.
    color, label : str
        Of the line.
    """
    ax = given_or_new(ax)
    depth = np.arange(float(len(before)))
    places = np.stack([depth - 0.5, depth + 0.5], axis=1).ravel()
    ends = [estimate for pair in zip(before, after, strict=True) for estimate in pair]
    value, low, high = (_columns(ends, name) for name in ("value", "low", "high"))
    shown = _positive(value)
    marker: dict[str, Any] = {"marker": "o", "markersize": 2.8} if len(before) <= 40 else {}
    if np.isfinite(shown).any():
        ax.plot(places, shown, color=color, linewidth=1.4, label=label, **marker)
    if np.any(high > low):
        ax.fill_between(
            places, _positive(low), _positive(high), color=color, alpha=0.18, linewidth=0,
            label="least to largest",
        )  # fmt: skip
    _log_axis(ax, np.concatenate([shown, _positive(low), _positive(high)]))
    _edge_marks(ax, places, value)
    name_blocks(ax, names, len(before))
    return ax


def plot_block_ratios(
    ratios: Sequence[Estimate],
    ax: Axes | None = None,
    *,
    names: Sequence[str] = (),
    reach: Sequence[tuple[float, float] | None] = (),
    band: tuple[float, float] | None = None,
    transitions: Sequence[int] = (),
    ringed: Sequence[int] = (),
) -> Axes:
    """Ratio of gradient norms of every block, within what its Jacobian allows for any gradient.

    Parameters
    ----------
    ratios : sequence of Estimate
        Gradient norm at the input over that at the output, in order of depth.
    ax : Axes, optional
    names : sequence of str
        Of the blocks.
    reach : sequence of (float, float) or None
        Least and largest ratio that each block's Jacobian allows; ``None`` where unknown.
    band : pair of float, optional
        What a theory says of the ratios.
    transitions : sequence of int
        Places of the blocks whose skip is no identity.
    ringed : sequence of int
        Places of the blocks with a problem.

    Notes
    -----
    Bars, and a band, that would make the ratios hard to see run off the axis.
    """
    ax = given_or_new(ax)
    places = np.arange(float(len(ratios)))
    value, low, high = (_columns(ratios, name) for name in ("value", "low", "high"))
    shown = _positive(value)
    if band is not None and max(band[0], 0) < band[1]:
        ax.axhspan(max(band[0], 1e-300), band[1], color=THIRD, alpha=0.14, linewidth=0, zorder=0,
                   label="theory")  # fmt: skip
    ax.axhline(1, color=INK, linewidth=0.9, zorder=1)
    bars = [(place, *pair) for place, pair in enumerate(reach) if pair is not None]
    width = 5.0 if len(ratios) <= 40 else 2.4
    _bars(ax, bars, color=MUTED, width=width, label="reach of the Jacobian")
    spread = (shown - np.fmin(_positive(low), shown), np.fmax(_positive(high), shown) - shown)
    turned = np.isin(places, list(transitions))
    for chosen, marker, size, label in (
        (~turned, "o", 4.0, "ratio"),
        (turned, "D", 4.6, "ratio, transition"),
    ):
        some = chosen & np.isfinite(shown)
        if some.any():
            ax.errorbar(
                places[some], shown[some], yerr=[np.nan_to_num(s[some]) for s in spread],
                linestyle="none", marker=marker, markersize=size if len(ratios) <= 40 else 2.8,
                color=FIRST if marker == "o" else SECOND, elinewidth=1, label=label, zorder=3,
            )  # fmt: skip
    rings = [i for i in ringed if math.isfinite(shown[i])]
    if rings:
        ax.plot(places[rings], shown[rings], linestyle="none", marker="o", markersize=11,
                markerfacecolor="none", markeredgewidth=1.6, color=ALARM, label="problem",
                zorder=4)  # fmt: skip
    ends = np.array([*(end for _, *pair in bars for end in pair), *(band or ())], dtype=float)
    held = np.concatenate([shown, _positive(low), _positive(high), [1.0]])
    _log_axis(ax, held, wished=ends)
    _edge_marks(ax, places, value)
    name_blocks(ax, names, len(ratios))
    ax.set_ylabel("norm at input / at output")
    return ax


def plot_ranges(
    smallest: Sequence[Estimate],
    largest: Sequence[Estimate],
    ax: Axes | None = None,
    *,
    targets: Sequence[float | None] = (),
    names: Sequence[str] = (),
) -> Axes:
    """Singular values of layers, from the smallest to the largest, and what they should be.

    Parameters
    ----------
    smallest, largest : sequence of Estimate
        One of each for every layer.
    ax : Axes, optional
    targets : sequence of float or None
        The value that keeps the norm of a gradient.
    names : sequence of str
        Of the layers.
    """
    ax = given_or_new(ax)
    places = np.arange(float(len(largest)))
    low, high = _columns(smallest, "value"), _columns(largest, "value")
    bars = [(int(p), a, b) for p, a, b in zip(places, low, high, strict=True)]
    _bars(ax, bars, color=FIRST, width=7, label="smallest to largest singular value")
    aims = np.array([math.nan if t is None else t for t in targets], dtype=float)
    if np.isfinite(aims).any():
        ax.plot(places[: len(aims)], aims, linestyle="none", marker="_", markersize=16,
                markeredgewidth=2.2, color=SECOND, label="target, √(c_out / c_in)")  # fmt: skip
    _log_axis(ax, np.concatenate([_positive(high), _positive(aims)]), wished=low)
    _edge_marks(ax, places, high)
    name_blocks(ax, names, len(largest), label="layer")
    ax.set_ylabel("singular value")
    return ax


def plot_gains(
    gains: Sequence[float],
    ax: Axes | None = None,
    *,
    normalised: Sequence[bool] = (),
    names: Sequence[str] = (),
) -> Axes:
    """Scale of the weights of every layer, next to what keeps the variance.

    Parameters
    ----------
    gains : sequence of float
        ``sqrt(fan_in)`` times the root mean square of the weight, in order of depth.
    ax : Axes, optional
    normalised : sequence of bool
        Whether a normalisation follows, which undoes the scale.
    names : sequence of str
        Of the layers.
    """
    ax = given_or_new(ax)
    places = np.arange(float(len(gains)))
    value = np.asarray(gains, dtype=float)
    shown = _positive(value)
    undone = np.zeros(len(value), dtype=bool)
    undone[: len(normalised)] = normalised
    for height, text, dash in ((1.0, "1: linear", "-"), (2**0.5, "√2: ReLU follows", "--")):
        ax.axhline(height, color=MUTED, linewidth=1, linestyle=dash, label=text, zorder=1)
    size = 4.5 if len(value) <= 60 else 3
    for chosen, face, label in ((~undone, FIRST, "gain"), (undone, "none", "gain, normalised")):
        if chosen.any():
            ax.plot(places[chosen], shown[chosen], linestyle="none", marker="o", markersize=size,
                    color=FIRST, markerfacecolor=face, label=label)  # fmt: skip
    _log_axis(ax, np.concatenate([shown, [1.0, 2**0.5]]))
    _edge_marks(ax, places, value)
    name_blocks(ax, names, len(value), label="layer")
    ax.set_ylabel("√fan_in · rms(weight)")
    return ax


def name_blocks(ax: Axes, names: Sequence[str], count: int, *, label: str = "block") -> None:
    """Names where there is room for them, else numbers from 0, as in the tables."""
    ax.set_xlim(-0.7, max(count, 1) - 0.3)
    ax.grid(visible=False, axis="x")
    texts, turned = _written(names)
    if texts:
        ax.xaxis.set_major_locator(FixedLocator(list(range(count))))
        # A dollar sign in a name is no formula.
        ax.set_xticklabels(texts, rotation=90 if turned else 0, parse_math=False)
        return
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    ax.set_xlabel(f"number of the {label}, from input to output")


def room_for(names: Sequence[str]) -> float:
    """Inches that upright names take below the axes."""
    texts, turned = _written(names)
    return 0.075 * max(map(len, texts)) if turned else 0.0


def _written(names: Sequence[str]) -> tuple[list[str], bool]:
    """Names as they stand below the axes, none if they are too many, and whether upright."""
    if not 0 < len(names) <= _NAMED:
        return [], False
    texts = [shortened(name, max(_LETTERS, _ACROSS // len(names))) for name in names]
    return texts, sum(map(len, texts)) > _ACROSS


def shortened(name: str, letters: int = _LETTERS) -> str:
    """The end of a long name: it is there that names of one network differ."""
    name = "".join(c if c.isprintable() else "?" for c in name) or "(model)"
    return name if len(name) <= letters else "…" + name[-letters + 1 :].lstrip(".")


def short_number(value: float, _: object = None) -> str:
    """A tick of a wide axis: plain where that is short, else as a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "−")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    factor = value / 10.0**exponent
    head = "" if math.isclose(factor, 1) else "−" if math.isclose(factor, -1) else f"{factor:.3g}·"
    return f"{head}10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def legend_below(ax: Axes, columns: int = 2) -> None:
    """A legend of all axes of the figure under them, where it hides nothing; each label once."""
    known: dict[str, Any] = {}
    for one in ax.figure.axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    if known:
        ax.figure.legend(
            list(known.values()), list(known),
            loc="outside lower left", ncols=columns, handlelength=1.4,
            columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip


def _columns(estimates: Sequence[Estimate], name: str) -> Array:
    return np.array([getattr(estimate, name) for estimate in estimates], dtype=float)


def _positive(values: Array) -> Array:
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def _bars(
    ax: Axes, bars: Sequence[tuple[int, float, float]], *, color: str, width: float, label: str
) -> None:
    """Upright bars; those that reach down to 0 or without end leave the axis at its edge."""
    drawn = [
        (place, max(low, 1e-300), min(high, 1e200))
        for place, low, high in bars
        if not math.isnan(low) and not math.isnan(high) and high > 0
    ]
    if drawn:
        places, lows, highs = zip(*drawn, strict=True)
        ax.vlines(places, lows, highs, color=color, alpha=0.45, linewidth=width, label=label,
                  zorder=2)  # fmt: skip


def _log_axis(ax: Axes, held: Array, wished: Array | None = None) -> None:
    """A logarithmic axis that shows all that must be seen, and of the rest what is near it."""
    ax.set_yscale("log")
    held = held[np.isfinite(held) & (held > 0)]
    if not held.size:
        ax.text(0.5, 0.5, "no positive, finite number", transform=ax.transAxes, ha="center",
                va="center", color=MUTED)  # fmt: skip
    low, high = (held.min(), held.max()) if held.size else (0.1, 10.0)
    low = max(low, high * 1e-200)  # what floats hold is more than an axis can
    if wished is not None:
        near = wished[np.isfinite(wished) & (wished > low / 30) & (wished < high * 30)]
        low, high = min([low, *near]), max([high, *near])
        if np.any(wished < low):
            low /= 3
    if high / low < 3:
        low, high = low / 1.5, high * 1.5
    margin = (high / low) ** 0.06
    ax.set_ylim(low / margin, high * margin)
    ax.yaxis.set_major_locator(_ticks(*ax.get_ylim()) if held.size else NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(short_number))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()


def _ticks(low: float, high: float) -> LogLocator:
    """The coarsest ticks that suit the range, of which at least two lie in it."""
    decades = math.log10(high / low)
    steps: list[tuple[float, ...]] = [(1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.5, *range(2, 10))]
    if decades >= 2.2:
        steps = [(1, 3) if decades < 3.5 else (1,)]
    for subs in steps:
        locator = LogLocator(subs=subs, numticks=9)
        ticks = np.asarray(locator.tick_values(low, high))
        if np.count_nonzero((ticks >= low) & (ticks <= high)) >= 2:
            break
    return locator


def _edge_marks(ax: Axes, places: Array, values: Array) -> None:
    """What a logarithmic axis cannot show, at its edge: zeros below, infinities and NaN above."""
    across = ax.get_xaxis_transform()
    for chosen, height, marker, label in (
        (values == 0, 0.0, "v", "0"),
        (~np.isfinite(values), 1.0, "x", "not finite"),
    ):
        if chosen.any():
            ax.plot(
                places[chosen], [height] * int(chosen.sum()), linestyle="none", marker=marker,
                color=ALARM, markersize=6, markeredgewidth=1.6, clip_on=False, transform=across,
                label=label, zorder=5,
            )  # fmt: skip
