"""Figures of results. Nothing else in the package imports seaborn or matplotlib.

Every function draws on axes that the caller gives, or makes its own, and returns them.
"""

from conditioning.plots.axes import PALETTE, depth_colors, new_axes, new_grid, save, style
from conditioning.plots.ratios import plot_ratio_heatmap, plot_ratios
from conditioning.plots.spectra import (
    plot_density,
    plot_enclosures,
    plot_singular_values,
    plot_spectrum,
)

__all__ = [
    "PALETTE",
    "depth_colors",
    "new_axes",
    "new_grid",
    "plot_density",
    "plot_enclosures",
    "plot_ratio_heatmap",
    "plot_ratios",
    "plot_singular_values",
    "plot_spectrum",
    "save",
    "style",
]
