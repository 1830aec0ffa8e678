"""A checkup as text, as scalars and as a table."""

from __future__ import annotations

import dataclasses
import math

import pytest
from checkups import NAN, block, checkup, near

from conditioning import Estimate
from conditioning.checkup import ActivationReading, LayerReading
from conditioning.checkup.tables import WIDTH
from conditioning.checkup.text import verdict

LONG = "module.transformer.encoder.layers"


def deep(number=110, lost=(37, 71)):
    """A checkup of many blocks, of which some lose the gradient."""
    blocks = tuple(block(d, 0.2 if d in lost else 1.02) for d in range(number))
    uses = tuple(
        ActivationReading(f"{LONG}.{d}.relu", "relu", d, 1.0, 0.5, 0.9 if d == 50 else 0.0, 16)
        for d in range(number)
    )
    layers = tuple(
        LayerReading(
            f"{LONG}.{d}.linear", "Linear", "layer", d, 64, 3.0 if d in (60, 80) else 1.0,
            "normalisation" if d == 80 else "", None, None, "", None, "",
        )
        for d in range(number)
    )  # fmt: skip
    return dataclasses.replace(checkup(), blocks=blocks, activations=uses, layers=layers)


def section(report, start):
    """The lines of the section that starts so."""
    (found,) = [part for part in str(report).split("\n\n") if part.startswith(start)]
    return found.splitlines()


@pytest.mark.parametrize("report", [checkup(), deep(), deep(3), deep(25)], ids=range(4))
def test_lines_fit_a_terminal_and_have_no_space_at_their_end(report):
    for line in str(report).splitlines():
        assert len(line) <= WIDTH + 2
        assert line == line.rstrip()
        assert "\N{NO-BREAK SPACE}" not in line


def test_the_verdict_is_the_first_line():
    report = checkup()
    first = str(report).splitlines()[0]
    assert first == verdict(report)
    assert first == "CifarResNet: 2 problems, 1 remark, 1 not measured or not certified"
    quiet = dataclasses.replace(checkup(findings=False), missing=())
    assert verdict(quiet) == "CifarResNet: no problem in what was measured"


@pytest.mark.parametrize(
    ("status", "line"),
    [("interrupted", "was interrupted"), ("out of budget", "budget ended first")],
)
def test_a_checkup_that_ended_early_says_so(status, line):
    shown = str(checkup(status=status))
    assert shown.splitlines()[0].endswith(f"({status})")
    assert line in shown
    assert line not in str(checkup())


def test_findings_come_in_order_with_number_place_and_remedy():
    lines = section(checkup(), "Findings")
    joined = "\n".join(lines)
    assert "1. PROBLEM gradient-lost at layer1.3" in joined
    assert "3. REMARK dead-units at layer1.4.relu" in joined
    assert "-> Scale its branch by tau = 1/sqrt(9) = 0.33." in joined
    assert "0.0100 [0.00980, 0.0102], limit 0.1 (blocks[3].ratio)" in joined
    assert joined.index("learning-rate") < joined.index("dead-units")


def test_no_findings_no_section():
    assert "Findings" not in str(checkup(findings=False))


def test_numbers_have_their_enclosure_and_status():
    lines = section(checkup(), "Numbers")
    kappas = [line.split() for line in lines if line.strip().startswith("kappa")]
    assert kappas[0] == ["kappa", ">=", "1.98e+06", "lower", "bound", "only"]
    assert kappas[1] == ["kappa_10", "900", "[891,", "909]", "certified"]
    assert any("2.30 [2.25, 2.35]" in line and "2 batches" in line for line in lines)
    assert any(line.startswith("largest stable step") and "0.05" in line for line in lines)
    assert "  Hessian kappa, Gauss-Newton kappa: nothing below it is excluded" in lines


def test_what_was_not_measured_is_left_out():
    report = dataclasses.replace(
        checkup(), hessian=None, gauss_newton=None, step_size=None, recurrent=(), predictions=(),
        activations=(), layers=(), blocks=(), missing=(), seconds={},
    )  # fmt: skip
    shown = str(report)
    for word in ("Hessian", "kappa", "stable", "recurrent", "Theory", "activation", "layers",
                 "blocks", "Not measured", "product of ratios"):  # fmt: skip
        assert word not in shown.split("\n\n", 2)[2], word
    assert "Took 0.0 s" in shown


def test_numbers_of_a_spectrum_that_are_not_known_are_left_out():
    hessian = dataclasses.replace(checkup().hessian, trace=NAN, index=NAN)
    lines = section(dataclasses.replace(checkup(), hessian=hessian, gauss_newton=None), "Numbers")
    assert not [line for line in lines if "nan" in line or "trace" in line]


def test_nan_is_said():
    report = dataclasses.replace(
        checkup(), loss=NAN, nonfinite="the output of 'layer1.4' has 3 NaN",
        blocks=(dataclasses.replace(block(0), ratio=NAN, act_in=near(0.0)), block(1)),
    )  # fmt: skip
    shown = str(report)
    assert "NaN or infinity: the output of 'layer1.4' has 3 NaN" in shown
    assert "NaN or an infinity came up, 2 problems" in shown.splitlines()[0]
    quiet = dataclasses.replace(report, findings=())
    assert "no problem" not in verdict(quiet)
    assert section(report, "Numbers")[1].split()[:2] == ["loss", "nan"]
    assert section(report, "2 blocks")[2].split()[3:5] == ["nan", "nan"]


def test_few_blocks_are_all_shown():
    for number in (1, 3, 24):
        lines = section(deep(number, ()), f"{number} block")
        assert [line.split()[0] for line in lines[2 : 2 + number]] == [
            str(i) for i in range(number)
        ]
        assert "more" not in "".join(lines)


def test_of_many_blocks_the_ends_and_the_worst_are_shown_and_the_others_counted():
    lines = section(deep(), "110 blocks")
    assert "of them shown" in lines[0]
    rows = [line.split() for line in lines[2:] if not line.startswith("  ")]
    shown = [int(row[0]) for row in rows if row[0] != "..."]
    left = [int(row[1].strip("(")) for row in rows if row[0] == "..."]
    assert {0, 1, 2, 107, 108, 109, 37, 71} <= set(shown)
    assert 3 in shown  # a finding names it
    assert len(shown) + sum(left) == 110
    assert min(left) > 1
    assert str(len(shown)) in lines[0]


def test_a_normalisation_excuses_the_scale_of_a_layer():
    names = [line.split()[0] for line in section(deep(), "110 layers")]
    assert any(name.endswith(".60.linear") for name in names)
    assert not any(name.endswith(".80.linear") for name in names)


def test_dead_units_are_shown_first():
    names = [line.split()[0] for line in section(deep(), "110 activations")]
    assert any(name.endswith(".50.relu") for name in names)


def test_a_jacobian_that_is_not_enclosed_is_marked():
    loose = dataclasses.replace(block(0).jacobian, status="lower bound only")
    report = dataclasses.replace(
        checkup(), blocks=(dataclasses.replace(block(0), jacobian=loose), block(1))
    )
    lines = section(report, "2 blocks")
    assert lines[2].endswith("0.700 .. 1.40 ?")
    assert lines[3].endswith("0.700 .. 1.40")


def test_scalars_are_floats_by_stable_names():
    found = checkup().scalars()
    assert all(type(value) is float for value in found.values())
    assert {name.removeprefix("checkup/") for name in found} >= {
        "loss", "gradient_norm", "product", "mean_deviation", "ratio_min", "ratio_max",
        "lambda_max", "lambda_min", "kappa", "kappa_low", "kappa_high", "kappa10", "index", "trace",
        "largest_stable_step", "step_quotient", "num_problems", "num_findings", "num_missing",
        "gauss_newton/lambda_max", "sigma_min", "sigma_max", "dead_share_max", "seconds",
    }  # fmt: skip
    assert found["checkup/kappa_low"] == pytest.approx(1.98e6)
    assert found["checkup/kappa_high"] == math.inf
    assert found["checkup/num_problems"] == 2
    assert found["checkup/seconds"] == 47.5
    assert checkup().scalars("x.")["x.loss"] == 2.3


def test_scalars_leave_out_what_was_not_measured_and_keep_nan():
    report = dataclasses.replace(
        checkup(), hessian=None, gauss_newton=None, step_size=None, blocks=(), loss=NAN,
        activations=(), recurrent=(),
    )  # fmt: skip
    names = {name.removeprefix("checkup/") for name in report.scalars()}
    assert names == {
        "loss", "gradient_norm", "num_problems", "num_findings", "num_missing", "num_matvecs",
        "seconds",
    }  # fmt: skip
    assert math.isnan(report.scalars()["checkup/loss"])


def test_ratios_that_are_not_numbers_do_not_hide_the_others():
    blocks = (dataclasses.replace(block(0), ratio=NAN), block(1, 0.5), block(2, 2.0))
    found = dataclasses.replace(checkup(), blocks=blocks).scalars("")
    assert (found["ratio_min"], found["ratio_max"]) == (0.5, 2.0)


def test_the_frame_has_a_row_for_each_block():
    frame = checkup().to_frame()
    assert frame["block"].tolist() == [f"layer1.{d}" for d in range(9)]
    assert frame["ratio"].tolist() == pytest.approx([1.1] * 9)
    assert frame["ratio_low"].tolist() == pytest.approx([1.078] * 9)
    assert frame["sigma_max"].isna().tolist() == [False] * 7 + [True] * 2
    assert frame["status"].iloc[[0, 8]].tolist() == ["certified", "not measured"]
    assert frame["growth"].iloc[0] == pytest.approx(1.1)


def test_the_frame_of_no_blocks_is_empty():
    frame = dataclasses.replace(checkup(), blocks=()).to_frame()
    assert frame.empty
    assert "ratio" in frame.columns


def test_a_value_of_zero_keeps_its_enclosure():
    hessian = dataclasses.replace(checkup().hessian, trace=Estimate(0.0, -0.5, 0.5))
    shown = str(dataclasses.replace(checkup(), hessian=hessian))
    assert "trace                    0 [-0.500, 0.500]" in shown
