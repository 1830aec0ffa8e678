"""Eigenvalues, condition number, density, trace and index of a symmetric operator."""

from conditioning.spectrum.condition import condition_number
from conditioning.spectrum.density import SpectralDensity, index, spectral_density, trace
from conditioning.spectrum.eigenvalues import eigenvalues
from conditioning.spectrum.full import FullSpectrum, full_spectrum
from conditioning.spectrum.results import ConditionNumber, Eigenvalues, Estimate
from conditioning.spectrum.singular import singular_range
from conditioning.spectrum.singular_bounds import SingularRange
from conditioning.spectrum.survey import SpectrumSurvey, survey

__all__ = [
    "ConditionNumber",
    "Eigenvalues",
    "Estimate",
    "FullSpectrum",
    "SingularRange",
    "SpectralDensity",
    "SpectrumSurvey",
    "condition_number",
    "eigenvalues",
    "full_spectrum",
    "index",
    "singular_range",
    "spectral_density",
    "survey",
    "trace",
]
