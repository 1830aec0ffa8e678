"""Figures of results. Nothing else in the package imports seaborn or matplotlib.

Every function draws on axes that the caller gives, or makes its own, and returns them.
"""

from conditioning.plots.axes import PALETTE, depth_colors, new_axes, new_grid, save, style
from conditioning.plots.depth import (
    legend_below,
    plot_block_ratios,
    plot_gains,
    plot_norms,
    plot_ranges,
    room_for,
)
from conditioning.plots.ratios import plot_ratio_heatmap, plot_ratios
from conditioning.plots.spectra import (
    plot_density,
    plot_enclosures,
    plot_singular_values,
    plot_spectrum,
)
from conditioning.plots.survey import plot_condition_numbers, plot_spectra
from conditioning.plots.svg import FIRST, SECOND, page_style, to_svg

__all__ = [
    "FIRST",
    "PALETTE",
    "SECOND",
    "depth_colors",
    "legend_below",
    "new_axes",
    "new_grid",
    "page_style",
    "plot_block_ratios",
    "plot_condition_numbers",
    "plot_density",
    "plot_enclosures",
    "plot_gains",
    "plot_norms",
    "plot_ranges",
    "plot_ratio_heatmap",
    "plot_ratios",
    "plot_singular_values",
    "plot_spectra",
    "plot_spectrum",
    "room_for",
    "save",
    "style",
    "to_svg",
]
