"""Tables, scalars, verdicts and figures of recorded norms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from conditioning import GradientNorms
from conditioning.errors import (
    BlockNotSeenWarning,
    InvalidArgumentError,
    NonFiniteGradientWarning,
)


class Scale(nn.Module):
    """A block whose ratio is known."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)).double())

    def forward(self, x):
        return self.factor * x


def scales(*factors):
    return nn.Sequential(nn.Identity(), *(Scale(f) for f in factors))


def track(*steps, **options):
    """One step for each tuple of factors."""
    model = scales(*steps[0])
    names = [str(i + 1) for i in range(len(steps[0]))]
    with GradientNorms(model, names, **options) as norms:
        for factors in steps:
            for module, factor in zip(model[1:], factors, strict=True):
                module.factor.data.fill_(factor)
            batch = torch.ones(2, 3).double().requires_grad_()
            model(batch).sum().backward()
            norms.step()
    return norms


def test_ratios_and_products_of_known_factors():
    norms = track((2.0, 0.5, 3.0))
    values = [p.values for p in norms.points()]
    assert [v["ratio"] for v in values] == pytest.approx([2.0, 0.5, 3.0])
    assert [v["product"] for v in values] == pytest.approx([3.0, 1.5, 3.0])
    frame = norms.to_frame()
    assert list(frame.columns) == ["step", "block", "call", "quantity", "value", "kind", "depth"]
    products = frame[frame.quantity == "product"].sort_values("depth").value
    assert products.tolist() == pytest.approx([3.0, 1.5, 3.0])


def test_scalars_are_flat_and_plain():
    found = track((2.0, 0.5)).scalars()
    assert found["norms/ratio/1"] == pytest.approx(2.0)
    assert found["norms/ratio_min"] == pytest.approx(0.5)
    assert found["norms/ratio_max"] == pytest.approx(2.0)
    assert found["norms/mean_deviation"] == pytest.approx(0.75)
    assert found["norms/product"] == pytest.approx(1.0)
    assert all(type(value) is float for value in found.values())
    json.dumps(found)
    assert set(track((1.0,)).scalars("x.")) >= {"x.ratio/1", "x.act_out/1"}


def test_layers_between_tracked_blocks_count_and_are_named():
    model = scales(2.0, 1e-3, 3.0)
    with GradientNorms(model, ["1", "3"]) as norms:
        model(torch.ones(2, 3).double().requires_grad_()).sum().backward()
        norms.step()
    assert norms.points()[0].values["product"] == pytest.approx(6e-3)
    assert norms.scalars()["norms/product"] == pytest.approx(6e-3)
    frame = norms.to_frame()
    assert frame[frame.quantity == "product"].value.tolist() == pytest.approx([6e-3, 3.0])
    assert "between 1 and 3 the gradient norm changes by 0.001 outside" in str(norms)
    assert "between" not in str(track((2.0, 3.0)))


def test_nan_is_not_printed_as_missing():
    model = scales(1.0, math.nan)
    with GradientNorms(model, ["1", "2"]) as norms:
        model(torch.ones(2, 3).double()).sum().backward()
        with pytest.warns(NonFiniteGradientWarning):
            norms.step()
    text = str(norms)
    assert "nan" in text
    assert "-" in text
    assert norms.first_nonfinite().message in text


def test_printing_shows_the_last_step():
    text = str(track((2.0, 0.5), (3.0, 0.25)))
    assert "step 1, 2 sampled" in text
    assert "0.25" in text
    assert "grad_out" in text


class TestVerdict:
    def test_all_inside(self):
        verdict = track((1.05, 0.95), (1.0, 1.02)).verdict(0.1)
        assert verdict.verdict == "holds"
        assert not verdict.outside
        assert verdict.num_steps == 2
        assert verdict.num_ratios == 4
        means = [0.05, 0.01]
        assert verdict.deviation.value == pytest.approx(np.mean(means))
        assert verdict.deviation.low == pytest.approx(min(means))
        assert verdict.deviation.high == pytest.approx(max(means))
        assert "over steps" in str(verdict)

    def test_one_outside(self):
        verdict = track((1.05, 0.5), (1.0, 1.0)).verdict(0.1)
        assert verdict.verdict == "fails"
        assert verdict.outside == (("2", 0.5),)
        assert (verdict.worst_block, verdict.worst_step) == ("2", 0)
        assert verdict.worst_ratio == pytest.approx(0.5)
        assert "2 (50%)" in str(verdict)
        json.dumps(verdict.to_dict())

    def test_a_pair_of_ends(self):
        assert track((0.6, 1.9)).verdict((0.5, 2.0)).verdict == "holds"
        assert track((0.6, 2.1)).verdict((0.5, 2.0)).verdict == "fails"

    def test_a_missing_ratio_leaves_it_open(self):
        model = scales(1.0, 1.0)
        with GradientNorms(model, ["1", "2"]) as norms:
            model(torch.ones(2, 3).double()).sum().backward()
            norms.step()
        verdict = norms.verdict(0.1)
        assert verdict.verdict == "not decided"
        assert verdict.missing == ("1",)

    def test_one_step_has_no_range(self):
        assert "over steps" not in str(track((1.0, 1.1)).verdict(0.2))

    def test_a_block_that_never_had_a_gradient_leaves_it_open(self):
        model = scales(1.0, 1.0)
        model[1].requires_grad_(False)
        with GradientNorms(model, ["1", "2"]) as norms:
            model(torch.ones(2, 3).double()).sum().backward()
            with pytest.warns(BlockNotSeenWarning):
                norms.step()
        verdict = norms.verdict(0.1)
        assert verdict.verdict == "not decided"
        assert verdict.missing[0] == "2" or verdict.missing == ("2", "1")
        assert "farthest" not in str(verdict)

    def test_other_numbers_are_numbers(self):
        norms = track((1.05,))
        for bound in (np.float32(0.1), torch.tensor(0.1), [0.9, 1.1]):
            assert norms.verdict(bound).verdict == "holds"
        assert norms.verdict(5.0).low == 0

    @pytest.mark.parametrize(
        "bound", [0, -1.0, math.nan, (2.0, 1.0), (0.1, 0.2, 0.3), None, "0.1x", True]
    )
    def test_bounds_that_mean_nothing(self, bound):
        with pytest.raises(InvalidArgumentError, match="bound"):
            track((1.0,)).verdict(bound)


class TestPlots:
    def test_a_curve_for_each_snapshot(self):
        ax = track(*[(1.0 + 0.1 * i, 0.9) for i in range(9)]).plot()
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels[0] == "step 0"
        assert labels[-1] == "step 8"
        assert len(labels) == 6
        assert ax.get_yscale() == "log"
        drawn = ax.get_lines()[0].get_ydata()
        assert list(drawn) == pytest.approx([1.0, 0.9])

    def test_a_heat_map(self):
        ax = track((1.5, 0.9), (1.2, 1.0)).plot("heatmap")
        mesh = ax.collections[0]
        assert mesh.get_array().ravel().tolist() == pytest.approx([1.5, 0.9, 1.2, 1.0])
        assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1"]

    def test_transition_blocks_are_marked(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5), nn.Linear(5, 5))
        with GradientNorms(model, [model[1], model[2]]) as norms:
            model(torch.randn(2, 3)).sum().backward()
            norms.step()
        if norms.points()[0].kind == "transition":
            labels = [text.get_text() for text in norms.plot().get_legend().get_texts()]
            assert "transition" in labels

    def test_a_dead_block_is_not_hidden(self):
        norms = track((0.5, 0.0, 1.0), (0.5, 0.0, 1.0))
        ax = norms.plot()
        markers = [line for line in ax.get_lines() if line.get_label() == "0 in some step"]
        # Nothing comes back through a dead block: the one before it has no ratio.
        assert [list(line.get_xdata()) for line in markers] == [[2]]
        ax = norms.plot("heatmap")
        cells = ax.collections[0].get_array()
        assert cells[0, 1] == cells.min()
        assert bool(np.ma.getmaskarray(cells)[0, 0])
        assert "darkest blue: 0" in ax.get_xlabel()
        assert "grey: no ratio" in ax.get_xlabel()
