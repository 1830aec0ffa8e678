"""Checkups that are hard to show: deep, empty, not finite, with names that are no words."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from checkups import NAN, block, checkup, condition, near

from conditioning import Estimate
from conditioning.checkup import ActivationReading, LayerReading, Missing, Prediction
from conditioning.spectrum import ConditionNumber

ZERO = Estimate(0.0, 0.0, 0.0)
INF = Estimate(math.inf, math.inf, math.inf)
SCRIPT = "<script>alert(1)</script>"
LONG = "encoder.a_long_name_without_any_dots_in_it_that_goes_on_and_on_and_on.attention$x_1$"


def deep(count, ratio=1.02):
    """As many blocks, twice as many layers, ratios that differ, norms that differ by batch."""
    base = checkup(ratio=ratio)
    blocks = tuple(
        replace(
            block(
                d, ratio * (1 + 0.2 * math.sin(1.7 * d)),
                "transition" if d % 30 == 13 else "identity", d % 9 != 7,
            ),
            act_in=near(10 * ratio**d), act_out=near(10 * ratio ** (d + 1)),
            grad_in=near(0.1 * ratio ** (count - d), 0.2),
            grad_out=near(0.1 * ratio ** (count - d - 1), 0.2), product=near(ratio ** (count - d)),
        )
        for d in range(count)
    )  # fmt: skip
    layers = tuple(
        LayerReading(
            f"layer1.{i // 2}.conv{i % 2}", "Conv2d", "layer", i, 144, 1 + 0.4 * math.cos(i),
            "" if i % 3 else "normalisation", None, None, "", None, "",
        )
        for i in range(2 * count)
    )  # fmt: skip
    activations = tuple(
        ActivationReading(f"layer1.{i}.relu", "relu", i, 1.1, 0.5, i / (2 * count), 16)
        for i in range(count)
    )
    return replace(
        base, blocks=blocks, layers=base.layers + layers, activations=activations,
        product=near(ratio**count),
    )  # fmt: skip


def bare(status="complete"):
    """Nothing but a loss and a gradient."""
    return replace(
        checkup(status=status, findings=False),
        blocks=(), activations=(), layers=(), recurrent=(), hessian=None, gauss_newton=None,
        step_size=None, predictions=(), seconds={}, product=NAN, mean_deviation=NAN,
        missing=(
            Missing("Spectrum of the Hessian", "the loss has no second derivative"),
            Missing("Blocks", "none were found; pass blocks="),
        ),
    )  # fmt: skip


def faultless():
    """Nothing found, nothing missing."""
    return replace(checkup(findings=False), missing=())


def broken():
    """NaN, infinities, zeros and odd names wherever they can be."""
    base = deep(12)
    blocks = list(base.blocks)
    blocks[3] = replace(blocks[3], ratio=ZERO, grad_in=ZERO, product=ZERO, act_in=ZERO)
    blocks[5] = replace(blocks[5], ratio=NAN, grad_in=NAN, grad_out=NAN, act_out=INF)
    blocks[7] = replace(
        blocks[7], name=SCRIPT, classes=SCRIPT, shapes="8 -> 8 & more", ratio=Estimate(30, 1, 90),
        jacobian=replace(
            blocks[0].jacobian, largest=Estimate(80, 79, math.inf), smallest=ZERO,
            status="one-sided", branch=None, message=SCRIPT,
        ),
    )  # fmt: skip
    blocks[8] = replace(blocks[8], name=LONG, branch_share=math.nan)
    blocks[9] = replace(blocks[9], name='模块."三"', branch_share=None)
    blocks[10] = replace(blocks[10], name="")
    generator = np.random.default_rng(1)
    nodes = generator.normal(0, 0.02, 200) * 10 ** generator.normal(0, 0.7, 200)
    nodes = np.sort(np.append(nodes, [1.0, 5.0, 40.0, -3.0])).tolist()
    undefined = ConditionNumber(
        math.nan, math.nan, math.nan, NAN, NAN, NAN, 0.0, 10.0, "not resolvable", "all zero", 3,
        0.0, 0.0, 0.0, 0.0,
    )  # fmt: skip
    density = replace(
        base.hessian.density, nodes=tuple(nodes), weights=(1 / len(nodes),) * len(nodes),
        quantiles={},
    )  # fmt: skip
    hessian = replace(
        base.hessian, density=density, smallest=Estimate(-3.0, -3.01, -2.99), trace=INF,
        condition=replace(condition(5e4), low=2e4, high=2e5), condition10=undefined,
    )  # fmt: skip
    empty = replace(base.gauss_newton.density, nodes=(), weights=(), status="undefined")
    findings = (
        *base.findings,
        replace(
            base.findings[0], kind="odd", where=tuple(b.name for b in blocks), number=NAN,
            sentence=f"{SCRIPT} & more", remedy=f'"{SCRIPT}"', evidence="nowhere[7].at_all",
        ),
    )  # fmt: skip
    return replace(
        base, blocks=tuple(blocks), hessian=hessian, findings=findings, loss=NAN,
        nonfinite=f"the output of {SCRIPT}", gradient_norm=INF, status="out of budget",
        gauss_newton=replace(base.gauss_newton, density=empty, largest=NAN, smallest=NAN),
        setting=replace(base.setting, model=SCRIPT, loss=SCRIPT, seconds=None, num_matvecs=40,
                        notes=(SCRIPT,)),
        step_size=replace(base.step_size, largest_stable=INF, given=None, quotient=None,
                          momentum=0.9),
        predictions=(
            *base.predictions,
            Prediction("kappa", 0.1, math.inf, NAN, "not decided", SCRIPT, ""),
            Prediction("one number", 2.0, 2.0, near(2.0), "inside", "theory", "none"),
        ),
        missing=(*base.missing, Missing(SCRIPT, SCRIPT)), seconds={"a": 0.0, SCRIPT: 0.0},
    )  # fmt: skip


VARIANTS = {
    "as usual": checkup,
    "one block": lambda: deep(1),
    "three blocks": lambda: deep(3),
    "deep": lambda: deep(110),
    "bare": bare,
    "interrupted": lambda: bare("interrupted"),
    "faultless": faultless,
    "broken": broken,
}
