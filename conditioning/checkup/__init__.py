"""The checkup: where a network loses the norm, and how badly its loss is conditioned."""

from conditioning.checkup.compare import Comparison, compare
from conditioning.checkup.readings import (
    ActivationReading,
    BlockReading,
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
from conditioning.checkup.results import Checkup
from conditioning.checkup.run import checkup

__all__ = [
    "ActivationReading",
    "BlockReading",
    "Checkup",
    "Comparison",
    "DensityCurve",
    "Finding",
    "LayerReading",
    "Missing",
    "Prediction",
    "RecurrentReading",
    "Setting",
    "SpectrumReading",
    "StepSize",
    "checkup",
    "compare",
]
