"""The look of all figures, and axes to draw them on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def given_or_new(ax: Axes | None) -> Axes:
    """The axes that the caller gave, or new ones."""
    return new_axes()[1][0] if ax is None else ax


def decades_or_plain(ax: Axes) -> None:
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
