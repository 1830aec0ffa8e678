"""Singular values of linear and convolutional layers: of the kernel, on a circle, as they run."""

from conditioning.singular.geometry import Geometry, geometry_of
from conditioning.singular.operator import LayerOperator
from conditioning.singular.results import SingularValues
from conditioning.singular.values import OPERATORS, singular_values

__all__ = [
    "OPERATORS",
    "Geometry",
    "LayerOperator",
    "SingularValues",
    "geometry_of",
    "singular_values",
]
