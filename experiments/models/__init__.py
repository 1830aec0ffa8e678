"""The networks of the papers."""

from experiments.models.cifar_resnet import CifarResNet
from experiments.models.residual_mlp import ResidualBranch, ResidualMLP
from experiments.models.shortcut_net import (
    ACTIVATIONS,
    ShortcutNet,
    half_mean_squared_error,
    half_mean_squared_error_from_moments,
)

__all__ = [
    "ACTIVATIONS",
    "CifarResNet",
    "ResidualBranch",
    "ResidualMLP",
    "ShortcutNet",
    "half_mean_squared_error",
    "half_mean_squared_error_from_moments",
]
