"""The networks of the papers."""

from experiments.models.cifar_resnet import CifarResNet
from experiments.models.residual_mlp import ResidualBranch, ResidualMLP
from experiments.models.scaled_resnet import ScaledResNet, counted_blocks
from experiments.models.shortcut_net import (
    ACTIVATIONS,
    ShortcutNet,
    half_mean_squared_error,
    half_mean_squared_error_from_moments,
)
from experiments.models.tau_stack import TauStack
from experiments.models.two_layer_conv import TwoLayerConv, population_loss, rectified_kernel

__all__ = [
    "ACTIVATIONS",
    "CifarResNet",
    "ResidualBranch",
    "ResidualMLP",
    "ScaledResNet",
    "ShortcutNet",
    "TauStack",
    "TwoLayerConv",
    "counted_blocks",
    "half_mean_squared_error",
    "half_mean_squared_error_from_moments",
    "population_loss",
    "rectified_kernel",
]
