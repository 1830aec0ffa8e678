"""Predictions: closed forms and bounds, each with its source. Nothing here measures."""

from conditioning.theory.activations import (
    ACTIVATIONS_AT_ZERO,
    ActivationAtZero,
    TheoremAssumptions,
    activation_at_zero,
    main_theorem_assumptions,
)
from conditioning.theory.discrete_spectrum import DiscreteSpectrum
from conditioning.theory.one_shortcut import (
    one_shortcut_commuting_spectrum,
    one_shortcut_gradient,
    one_shortcut_hessian,
    one_shortcut_isotropic_spectrum,
    one_shortcut_largest_eigenvalue_bounds,
    one_shortcut_zero_target_condition_number,
    rotate_cross_moment,
    rotate_targets,
)
from conditioning.theory.shortcut_depth import (
    leading_coefficient,
    near_global_minimiser_norm,
    relu_gated_moments,
    relu_limit_spectrum,
    residual_moment,
    sample_residual_moment,
    second_moments,
    stationary_order,
    two_shortcut_spectrum,
    whitened_condition_bound,
)

__all__ = [
    "ACTIVATIONS_AT_ZERO",
    "ActivationAtZero",
    "DiscreteSpectrum",
    "TheoremAssumptions",
    "activation_at_zero",
    "leading_coefficient",
    "main_theorem_assumptions",
    "near_global_minimiser_norm",
    "one_shortcut_commuting_spectrum",
    "one_shortcut_gradient",
    "one_shortcut_hessian",
    "one_shortcut_isotropic_spectrum",
    "one_shortcut_largest_eigenvalue_bounds",
    "one_shortcut_zero_target_condition_number",
    "relu_gated_moments",
    "relu_limit_spectrum",
    "residual_moment",
    "rotate_cross_moment",
    "rotate_targets",
    "sample_residual_moment",
    "second_moments",
    "stationary_order",
    "two_shortcut_spectrum",
    "whitened_condition_bound",
]
