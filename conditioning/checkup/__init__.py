"""The checkup: where a network loses the norm, and how badly its loss is conditioned."""

from conditioning.checkup.results import (
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

__all__ = [
    "ActivationReading",
    "BlockReading",
    "Checkup",
    "DensityCurve",
    "Finding",
    "LayerReading",
    "Missing",
    "Prediction",
    "RecurrentReading",
    "Setting",
    "SpectrumReading",
    "StepSize",
]
