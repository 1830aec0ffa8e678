"""A checkup made by hand, with every kind of entry, for what reads and shows checkups."""

from __future__ import annotations

import math

import numpy as np

from conditioning import Estimate
from conditioning.blocks import BlockJacobian
from conditioning.checkup import (
    ActivationReading,
    BlockReading,
    Checkup,
    DensityCurve,
    Finding,
    LayerReading,
    Missing,
    Prediction,
    RecurrentReading,
    Setting,
    SpectrumReading,
    StepSize,
)
from conditioning.spectrum import ConditionNumber

NAN = Estimate(math.nan, math.nan, math.nan)


def near(value, share=0.02):
    width = share * abs(value)
    return Estimate(value, value - width, value + width)


def condition(value, percentile=None, *, bounded=True, size=1200):
    high = value * 1.01 if bounded else math.inf
    return ConditionNumber(
        value, value * 0.99, high, near(40.0, 0.001), near(40.0 / value, 0.01),
        Estimate(0.0, 0.0, 0.0 if bounded else float(size)), 4e-9, percentile,
        "certified" if bounded else "lower bound only",
        "no eigenvalue between" if bounded else "nothing below it is excluded", 400, 0.0,
        40.0 / value, 1e-12, 1e-6,
    )  # fmt: skip


def spectrum(matrix):
    generator = np.random.default_rng(0)
    nodes = np.sort(np.concatenate([generator.normal(0, 0.3, 150), [3.0, 7.0, 40.0]]))
    weights = np.full(len(nodes), 1 / len(nodes))
    return SpectrumReading(
        matrix, 1200, near(40.0, 0.001), near(-0.8), condition(2e6, bounded=False),
        condition(900.0, 10.0), Estimate(0.49, 0.45, 0.53), near(52.0, 0.1),
        DensityCurve(
            tuple(map(float, nodes)), tuple(map(float, weights)),
            {"0.1": near(-0.4), "0.5": Estimate(0.0, -0.01, 0.01), "0.9": near(0.4)},
            "estimated", "6 random vectors",
        ),
        560, 12.5, "a Lanczos run of 200 steps and 4 of 80 each",
    )  # fmt: skip


def block(depth, ratio=1.1, kind="identity", measured=True):
    jacobian = BlockJacobian(
        f"layer1.{depth}", 0, kind, (2048, 2048), near(1.4), near(0.7), near(0.4), near(0.45), 90,
        "certified", "both ends enclosed",
    )  # fmt: skip
    return BlockReading(
        f"layer1.{depth}", "BasicBlock", kind, "8x16x4x4 -> 8x16x4x4", depth,
        near(10.0 * ratio**depth), near(10.0 * ratio ** (depth + 1)), near(0.1 / ratio**depth),
        near(0.1 / ratio ** (depth + 1)), near(ratio), near(ratio ** (9 - depth)), 0.5,
        jacobian if measured else None,
    )  # fmt: skip


def checkup(*, ratio=1.1, status="complete", findings=True):
    """Nine blocks, two spectra, two findings."""
    found = (
        Finding(
            "gradient-lost", "problem", 2.0, ("layer1.3",),
            "The gradient comes out of 'layer1.3' with a hundredth of its norm.",
            "Scale its branch by tau = 1/sqrt(9) = 0.33.", near(0.01), 0.1, "blocks[3].ratio",
        ),
        Finding(
            "learning-rate", "problem", 1.0, (),
            "The learning rate 0.1 is 2 times the largest stable one.",
            "Use less than 0.05.", near(2.0), 1.0, "step_size.quotient",
        ),
        Finding(
            "dead-units", "remark", 0.1, ("layer1.4.relu",),
            "12 % of the units of 'layer1.4.relu' are zero for every sample.",
            "Lower the learning rate.", Estimate(0.12, 0.12, 0.12), 0.1,
            "activations[1].dead_share",
        ),
    )  # fmt: skip
    return Checkup(
        Setting(
            "CifarResNet", "CrossEntropyLoss", 1200, 1200, "float32", "cpu", 2, 16,
            "as in training, dropout off", 0, 60.0, None, "0.1.0", "2.13.0",
            ("batch normalisation by the statistics of the batch",),
        ),
        status, near(2.3), near(1.2), near(ratio**9), near(abs(ratio - 1)), "",
        tuple(block(d, ratio, "transition" if d == 3 else "identity", d < 7) for d in range(9)),
        (
            ActivationReading("layer1.0.relu", "relu", 1, 1.1, 0.5, 0.0, 16),
            ActivationReading("layer1.4.relu", "relu", 5, 1.3, 0.6, 0.12, 16),
        ),
        (
            LayerReading(
                "conv1", "Conv2d", "stem", 0, 27, 1.41, "normalisation", None, None, "", None, ""
            ),
            LayerReading(
                "layer1.3.downsample.0", "Conv2d", "transition", 4, 16, 1.0, "normalisation",
                near(2.1), near(0.3), "true", math.sqrt(2), "exact",
            ),
        ),
        (
            RecurrentReading(
                "lstm", "LSTM", 40, near(1e-4), near(1.0), near(0.8), 0.9
            ),
        ),
        spectrum("Hessian"), spectrum("Gauss-Newton"),
        StepSize(near(0.05, 0.001), 0.1, 0.0, near(2.0, 0.001)),
        (
            Prediction(
                "ratio of every identity block", 0.7, 1.4, near(ratio), "inside",
                "arXiv:1805.07477, Theorem 1", "delta from the measured Jacobians",
            ),
            Prediction(
                "product of all ratios", 0.5, 1.65, near(ratio**9), "outside",
                "arXiv:1903.07120, Theorem 2", "tau = 1/sqrt(L)",
            ),
        ),
        found if findings else (),
        (Missing("Jacobians of 2 blocks", "the budget of 60 seconds; give more"),),
        {"norms": 1.0, "Jacobians": 20.0, "Hessian": 12.5, "Gauss-Newton": 12.5, "total": 47.5},
        1400,
    )  # fmt: skip
