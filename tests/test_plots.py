"""Figures hold what they were given, and are the same file for the same numbers."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from planted import diagonal
from torch import nn

from conditioning import Estimate, plots, singular_values, spectral_density
from conditioning.errors import InvalidArgumentError


def test_enclosures_become_bars_and_lower_bounds_become_arrows():
    estimates = [Estimate(2.0, 1.5, 3.0), Estimate(5.0, 5.0, float("inf"))]
    ax = plots.plot_enclosures([1, 2], estimates, label="measured")
    (container,) = ax.containers
    points, _, bars = container.lines
    assert np.array_equal(points.get_xydata(), [[1.0, 2.0]])
    assert np.allclose(bars[0].get_segments()[0], [[1, 1.5], [1, 3.0]])
    arrow = ax.lines[-1]
    assert arrow.get_marker() == "^"
    assert np.array_equal(arrow.get_xydata(), [[2.0, 5.0]])


def test_a_spectrum_is_drawn_in_order_over_its_prediction():
    ax = plots.plot_spectrum(np.array([3.0, -1.0, 2.0]), np.array([2.0, 3.0, -1.0]))
    predicted, measured = ax.lines
    assert np.array_equal(predicted.get_ydata(), [-1, 2, 3])
    assert np.array_equal(measured.get_ydata(), [-1, 2, 3])
    assert [text.get_text() for text in ax.legend().get_texts()] == ["predicted", "measured"]


@pytest.mark.parametrize("values", [np.linspace(-2, 5, 60), np.full(30, 2.0), np.zeros(5)])
def test_a_density_can_be_drawn(values):
    density = spectral_density(diagonal(values))
    ax = density.plot()
    assert ax.get_yscale() == "log"
    assert np.isfinite(ax.lines[0].get_ydata()).all()
    assert str(len(values)) in ax.get_title(loc="left") + ax.get_title()


def test_singular_values_are_drawn_in_order_and_named():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1)
    results = [singular_values(conv, (2, 4, 4), operator) for operator in ("true", "circular")]
    ax = plots.plot_singular_values(results)
    for line, result in zip(ax.lines, results, strict=True):
        shares, values = line.get_data()
        assert (shares[0], shares[-1]) == (0, 1)
        assert np.array_equal(values[1:-1], result.values.numpy())
        assert shares[1] == pytest.approx(0.5 / len(result.values))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [f"conv 3x3, 2 -> 3, zeros padding: {o}" for o in ("true", "circular")]
    assert ax.get_ylim()[0] == 0
    assert len(plots.plot_singular_values(singular_values(nn.Linear(1, 1))).lines) == 1


def test_singular_values_that_are_not_all_known_are_not_drawn():
    ends = singular_values(nn.Conv2d(2, 3, 3), (2, 6, 6), method="lanczos")
    with pytest.raises(InvalidArgumentError, match="only the largest and the smallest"):
        plots.plot_singular_values(ends)
    with pytest.raises(InvalidArgumentError, match="empty"):
        plots.plot_singular_values([])


def test_saving_twice_gives_the_same_bytes_and_leaves_the_settings_alone(tmp_path):
    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        with plots.style():
            figure, (ax,) = plots.new_axes()
            plots.plot_spectrum(np.arange(5.0), ax=ax)
            plots.save(figure, tmp_path / "deep" / f"{name}.png")
    assert (tmp_path / "deep/a.png").read_bytes() == (tmp_path / "deep/b.png").read_bytes()
    assert dict(mpl.rcParams) == before
