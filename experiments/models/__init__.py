"""The networks of the papers."""

from experiments.models.shortcut_net import (
    ACTIVATIONS,
    ShortcutNet,
    half_mean_squared_error,
    half_mean_squared_error_from_moments,
)

__all__ = [
    "ACTIVATIONS",
    "ShortcutNet",
    "half_mean_squared_error",
    "half_mean_squared_error_from_moments",
]
