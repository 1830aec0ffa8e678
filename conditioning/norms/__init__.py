"""Gradient and activation norms at the borders of blocks, during training."""

from conditioning.norms.history import NormVerdict
from conditioning.norms.tracker import GradientNorms

__all__ = ["GradientNorms", "NormVerdict"]
