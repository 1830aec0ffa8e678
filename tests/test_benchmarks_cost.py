"""Costs against sizes: fitted exponents, and a figure that hides nothing."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import cost
from benchmarks.worker import take_turn

X = np.array([1.0, 2.0, 4.0, 8.0])


def test_the_exponent_of_a_power_law_is_found_with_its_error():
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal((9, 4)))
    series = cost.Series.of(X, 3 * X**1.5 * noise)
    assert series.exponent.low <= 1.5 <= series.exponent.high
    assert series.exponent.high - series.exponent.low < 0.05
    assert [point.value for point in series.points] == pytest.approx(3 * X**1.5, rel=0.02)


def test_a_difference_within_the_noise_has_no_exponent():
    series = cost.Series.of(X, np.random.default_rng(0).standard_normal((9, 4)))
    assert series.exponent is None
    assert "noise" in cost._label("tracking", series)
    assert len(series.points) == 4


def test_every_quantity_takes_a_turn():
    made = cost.variants(8 + 4, 16, 4, lanczos=True)
    assert {one for one, _ in [*cost.SECONDS.values(), *cost.RATIOS.values()]} <= set(made)
    for variant in made.values():
        wall, _ = take_turn(variant, 1, "cpu")
        assert wall > 0


def test_a_sweep_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "BASE", {"width": 12, "batch": 8, "depth": 4})
    monkeypatch.setattr(cost, "_TURN", 1e-4)
    monkeypatch.setattr(cost, "LANCZOS_STEPS", 5)
    monkeypatch.setattr(cost, "say", lambda _: None)
    x, seconds, ratios = cost.measure("width", (12, 16), rounds=2)
    assert x == [4 * 144.0, 4 * 256.0]
    assert set(seconds) == set(cost.SECONDS)
    assert set(ratios) == set(cost.RATIOS)
    cost.draw(tmp_path / "cost.png", "width", x, seconds, ratios)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    lines = cost.rows("width", x, "ratio", ratios)
    assert len(lines) == 2 * len(ratios)
    assert all(low <= median <= high for *_, median, low, high in lines)


def test_every_sweep_has_its_title_and_axis():
    assert set(cost.SWEEPS) == set(cost.LABELS) == set(cost.BASE)
    for sizes, claim in cost.SWEEPS.values():
        assert len(sizes) >= 4
        assert "product" in claim
