"""Measure the conditioning of neural networks, each number with its error."""

from conditioning.blocks import block_jacobians, find_blocks, select_blocks, split_blocks
from conditioning.checkup import Checkup, checkup
from conditioning.krylov import block_lanczos, lanczos, power_iteration
from conditioning.norms import GradientNorms
from conditioning.operators import (
    FunctionOperator,
    GaussNewtonOperator,
    HessianOperator,
    JacobianOperator,
    LinearOperator,
    MatrixOperator,
)
from conditioning.procrustes import IsometricDownsample, Procrustes
from conditioning.singular import SingularValues, singular_values
from conditioning.spectrum import (
    ConditionNumber,
    Eigenvalues,
    Estimate,
    FullSpectrum,
    SingularRange,
    SpectralDensity,
    SpectrumSurvey,
    condition_number,
    eigenvalues,
    full_spectrum,
    index,
    singular_range,
    spectral_density,
    survey,
    trace,
)

__version__ = "0.1.0"

__all__ = [
    "Checkup",
    "ConditionNumber",
    "Eigenvalues",
    "Estimate",
    "FullSpectrum",
    "FunctionOperator",
    "GaussNewtonOperator",
    "GradientNorms",
    "HessianOperator",
    "IsometricDownsample",
    "JacobianOperator",
    "LinearOperator",
    "MatrixOperator",
    "Procrustes",
    "SingularRange",
    "SingularValues",
    "SpectralDensity",
    "SpectrumSurvey",
    "block_jacobians",
    "block_lanczos",
    "checkup",
    "condition_number",
    "eigenvalues",
    "find_blocks",
    "full_spectrum",
    "index",
    "lanczos",
    "power_iteration",
    "select_blocks",
    "singular_range",
    "singular_values",
    "spectral_density",
    "split_blocks",
    "survey",
    "trace",
]
