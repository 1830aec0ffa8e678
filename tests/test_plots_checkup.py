"""The figures of a page hold what they were given, and say where an axis cannot show it."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from checkups import condition

from conditioning import Estimate, plots
from conditioning.plots.depth import short_number, shortened
from conditioning.plots.survey import _decades

NAN = Estimate(math.nan, math.nan, math.nan)
ZERO = Estimate(0.0, 0.0, 0.0)


def near(value):
    return Estimate(value, 0.5 * value, 2 * value)


def labels(ax):
    return [text for text in ax.get_legend_handles_labels()[1] if not text.startswith("_")]


def line(ax, label):
    (found,) = [item for item in ax.lines if item.get_label() == label]
    return found.get_xydata()


def test_norms_run_from_the_input_of_a_block_to_its_output():
    ax = plots.plot_norms([near(1.0), near(3.0)], [near(2.0), near(4.0)], names=["a", "b"])
    assert np.array_equal(
        line(ax, "mean over the batches"), [[-0.5, 1], [0.5, 2], [0.5, 3], [1.5, 4]]
    )
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]
    (band,) = ax.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    assert (low, high) == (0.5, 8)


def test_zeros_and_what_is_not_finite_stand_at_the_edges():
    ax = plots.plot_norms([near(1.0), ZERO], [NAN, near(4.0)])
    assert np.array_equal(line(ax, "0"), [[0.5, 0.0]])
    assert np.array_equal(line(ax, "not finite"), [[0.5, 1.0]])
    for empty in ([], [ZERO], [NAN]):
        low, high = plots.plot_norms(empty, empty).get_ylim()
        assert 0 < low < high < math.inf


def test_ratios_stand_in_the_reach_of_their_jacobians():
    ax = plots.plot_block_ratios(
        [near(1.0), near(2.0), near(0.5)], reach=[(0.5, 4.0), None, (0.0, 1e9)], band=(0.7, 1.4),
        transitions=[1], ringed=[2],
    )  # fmt: skip
    assert sorted(labels(ax)) == [
        "problem", "ratio", "ratio, transition", "reach of the Jacobian", "theory"
    ]  # fmt: skip
    assert line(ax, "problem").tolist() == [[2, 0.5]]
    bars = next(c for c in ax.collections if c.get_label().startswith("reach"))
    assert np.allclose([s[:, 1] for s in bars.get_segments()], [[0.5, 4.0], [1e-300, 1e9]])
    assert [s[0, 0] for s in bars.get_segments()] == [0, 2]
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert points == {"ratio": [[0, 1], [2, 0.5]], "ratio, transition": [[1, 2]]}
    low, high = ax.get_ylim()
    assert low < 0.25  # the ratios with their ends
    assert 4 < high < 100  # the bar that would flatten them runs off
    assert low > 1e-3


def test_singular_values_reach_from_end_to_end_beside_their_target():
    ax = plots.plot_ranges([near(0.5), ZERO], [near(2.0), near(3.0)], targets=[1.5, None])
    (bars,) = ax.collections
    assert np.allclose([s[:, 1] for s in bars.get_segments()], [[0.5, 2], [1e-300, 3]])
    target = line(ax, "target, √(c_out / c_in)")
    assert target[0].tolist() == [0, 1.5]
    assert math.isnan(target[1, 1])


def test_gains_are_hollow_where_a_normalisation_follows():
    ax = plots.plot_gains([1.0, 2.0, 0.0], normalised=[True, False, False])
    assert line(ax, "gain, normalised").tolist() == [[0, 1]]
    assert line(ax, "gain")[0].tolist() == [1, 2]
    assert line(ax, "0").tolist() == [[2, 0]]


def test_a_spectrum_holds_its_whole_mass_and_shows_outliers():
    nodes = [-1.0, *np.linspace(-0.01, 0.01, 97), 10.0, 1000.0]
    ax = plots.plot_spectra(
        {"Hessian": (nodes, [0.01] * 100), "Gauss-Newton": ([0.0, 1000.0], [0.9, 0.1])},
        ends={"Hessian": (near(-1.0), near(1000.0))},
    )
    assert labels(ax) == ["Hessian", "Gauss-Newton", "Hessian: both ends"]
    for name in ("Hessian", "Gauss-Newton"):
        x, y = line(ax, name).T
        assert np.trapezoid(np.nan_to_num(y), x) == pytest.approx(1, abs=0.03)
    scale = 1e-3  # a millionth of the largest: the median is smaller
    x, y = line(ax, "Hessian").T
    for outlier in (-1.0, 10.0, 1000.0):
        there = np.abs(x - _decades(np.array(outlier), scale)) < 0.05
        assert y[there].max() == pytest.approx(0.01 / (0.06 * math.sqrt(2 * math.pi)), rel=0.05)
    ends = line(ax, "Hessian: both ends")[:, 0]
    assert np.allclose(ends, _decades(np.array([-1.0, 1000.0]), scale))


@pytest.mark.parametrize(
    "nodes",
    [[], [0.0], [5.0], [2.0, 5.0], [-3.0], [math.nan, 1.0], [1e-30, 1e30], [-1e30, 1e-12, 1e30]],
)
def test_ticks_of_a_spectrum_say_where_its_eigenvalues_are(nodes):
    ax = plots.plot_spectra({"Hessian": (nodes, [1 / max(len(nodes), 1)] * len(nodes))})
    ticks = ax.get_xticks()
    low, high = ax.get_xlim()
    assert len(ticks) >= 1
    assert all(low <= tick <= high for tick in ticks)
    if 5.0 in nodes:
        shown = [text.get_text() for text in ax.get_xticklabels()]
        places = dict(zip(shown, ticks, strict=True))
        scale = 0.1 * nodes[0]
        assert places["5"] == pytest.approx(float(_decades(np.array(5.0), scale)))


def test_a_condition_number_without_an_upper_bound_is_an_arrow():
    undefined = condition(math.nan)
    ax = plots.plot_condition_numbers(
        {"a": condition(100.0), "b": condition(2e6, bounded=False), "c": undefined}
    )
    (bar,) = ax.collections
    assert np.allclose(bar.get_segments()[0][:, 0], [99, 101])
    arrow, words = sorted(ax.texts, key=lambda text: len(text.get_text()))
    assert arrow.xyann == (1.98e6, 1)
    assert words.get_text() == "not defined"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b", "c"]


def test_names_are_short_and_no_formulas():
    assert shortened("layer1.0") == "layer1.0"
    assert shortened("encoder.layers.11.attention") == "…rs.11.attention"
    assert shortened("a.b", 2) == "…b"
    assert shortened("") == "(model)"
    assert shortened("a\nb") == "a?b"
    ax = plots.plot_gains([1.0, 2.0], names=["$x_1$", "$"])
    assert [tick.get_parse_math() for tick in ax.get_xticklabels()] == [False, False]
    assert plots.room_for(["a", "b"]) == 0
    assert plots.room_for(["encoder.layers.0"] * 12) > 0.5
    assert plots.room_for(["encoder.layers.0"] * 100) == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (-2, "−2"), (1e6, "10⁶"), (-1e-12, "−10⁻¹²"), (2e5, "2·10⁵")],
)
def test_ticks_are_short(value, text):
    assert short_number(value) == text


def draw(name="a", text="b"):
    with plots.page_style():
        figure, (ax,) = plots.new_axes()
        plots.plot_gains([1.0, 2.0], ax, names=["<a> & $", "三"])
        plots.legend_below(ax)
        return plots.to_svg(figure, name, "title & more", text)


def test_an_svg_is_the_same_each_time_and_leaves_the_settings_alone():
    before = dict(mpl.rcParams)
    assert draw() == draw()
    assert dict(mpl.rcParams) == before


def test_an_svg_stands_beside_others_in_the_colours_of_its_page():
    svg = draw("first")
    root = ElementTree.fromstring(svg)
    assert root.find("{*}title").text == "title & more"
    assert root.find("{*}desc").text == "b"
    texts = ["".join(item.itertext()) for item in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a> & $", "三", "gain"} <= set(texts)
    ids = [item.attrib["id"] for item in root.iter() if "id" in item.attrib]
    assert ids
    assert all(name.startswith("first-") for name in ids)
    assert "var(--plot-first, #1f6fb2)" in svg
    assert "var(--plot-font, sans-serif)" in svg
    assert "DejaVu" not in svg
    width, height = (float(root.attrib[key]) for key in ("width", "height"))
    assert root.attrib["viewBox"] == f"0 0 {width:g} {height:g}"
