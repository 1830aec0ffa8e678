"""Predictions against the dense autograd Hessian, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm, logm
from torch.func import functional_call, grad, jacrev

from conditioning import theory
from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory import DiscreteSpectrum
from experiments.models import ACTIVATIONS, ShortcutNet, half_mean_squared_error

TOLERANCE = {"rtol": 0, "atol": 1e-12}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def whitened(m, d, seed=0):
    """Samples whose second moment is the identity."""
    return torch.linalg.qr(normal(m, d, seed=seed)).Q * math.sqrt(m)


def samples(kind, d, m=23):
    if kind == "whitened":
        return whitened(m, d), normal(m, d, seed=1)
    return normal(m, d) @ normal(d, d, seed=2) + 0.3, normal(m, d, seed=1)


def flat_loss(model, inputs, targets):
    """Loss as a function of one flat vector in ``named_parameters`` order, and where it is now."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(vector):
        pieces = vector.split([p.numel() for p in parameters.values()])
        named = {
            name: piece.reshape(p.shape)
            for (name, p), piece in zip(parameters.items(), pieces, strict=True)
        }
        return half_mean_squared_error(functional_call(model, named, (inputs,)), targets)

    return loss, torch.cat([p.flatten() for p in parameters.values()])


def dense_hessian(model, inputs, targets):
    loss, point = flat_loss(model, inputs, targets)
    return jacrev(grad(loss))(point)


def dense_eigenvalues(model, inputs, targets):
    return torch.linalg.eigvalsh(dense_hessian(model, inputs, targets))


# --------------------------------------------------------------------- moments, n >= 2


@pytest.mark.parametrize("kind", ["generic", "whitened"])
def test_the_residual_moment_is_the_same_from_moments_and_from_samples(kind):
    x, y = samples(kind, 4)
    input_moment, cross_moment = theory.second_moments(x, y)
    d = theory.residual_moment(input_moment, cross_moment)
    torch.testing.assert_close(d, theory.sample_residual_moment(x, y), **TOLERANCE)
    torch.testing.assert_close(cross_moment, y.T @ x / len(x), **TOLERANCE)


@pytest.mark.parametrize(("d", "units"), [(1, 1), (1, 5), (3, 1), (4, 3), (6, 2)])
@pytest.mark.parametrize("kind", ["generic", "whitened"])
def test_two_shortcut_spectrum_is_the_dense_one_with_multiplicities(kind, d, units):
    x, y = samples(kind, d)
    predicted = theory.two_shortcut_spectrum(theory.sample_residual_moment(x, y), units)
    found = dense_eigenvalues(ShortcutNet(d, units, 2), x, y)
    torch.testing.assert_close(predicted.expand(), found, rtol=0, atol=1e-11)
    assert predicted.num_eigenvalues == 2 * units * d**2
    assert predicted.multiplicities.tolist() == [units * d] * (2 * d)
    assert predicted.index == 0.5
    kappa = float(found.abs().max() / found.abs().min())
    assert predicted.condition_number() == pytest.approx(kappa, rel=1e-9)
    kappa_10 = float(found.abs().max() / np.percentile(found.abs().numpy(), 10))
    assert predicted.condition_number(percentile=10) == pytest.approx(kappa_10, rel=1e-9)


def test_two_shortcut_condition_number_does_not_depend_on_depth():
    moment = normal(5, 5)
    values = [theory.two_shortcut_spectrum(moment, units).condition_number() for units in (1, 512)]
    assert values[0] == values[1] == pytest.approx(float(torch.linalg.cond(moment)), rel=1e-12)


def test_a_singular_moment_gives_zeros_and_an_infinite_condition_number():
    moment = normal(4, 2) @ normal(2, 4, seed=1)
    spectrum = theory.two_shortcut_spectrum(moment, 3)
    assert spectrum.nullity == 2 * 4 * 3 * 2
    assert spectrum.condition_number() == math.inf
    assert spectrum.condition_number(nonzero=True) < math.inf
    assert spectrum.index == 0.25
    assert spectrum.num_distinct == 5


def test_equal_singular_values_are_one_distinct_pair():
    rotation = torch.linalg.qr(normal(6, 6)).Q
    spectrum = theory.two_shortcut_spectrum(0.7 * rotation, 2)
    assert spectrum.num_distinct == 2
    assert spectrum.multiplicities.tolist() == [72, 72]
    assert spectrum.condition_number() == 1.0


@pytest.mark.parametrize(
    ("pre", "mid", "post"),
    [
        ("tanh", None, None),
        (None, "tanh", None),
        (None, None, "gelu"),
        ("gelu", "tanh", "shifted_sigmoid"),
        ("sigmoid", "shifted_sigmoid", "tanh"),
        (None, "shifted_softplus", "shifted_softplus"),
        ("relu", "gelu", None),
    ],
)
@pytest.mark.parametrize("units", [1, 3])
def test_nonlinear_two_shortcut_spectrum_scales_by_the_slopes(pre, mid, post, units):
    x, y = samples("generic", 3)
    slopes = [theory.ACTIVATIONS_AT_ZERO[name or "identity"].slope for name in (mid, post)]
    moment = theory.sample_residual_moment(x, y, pre=ACTIVATIONS[pre] if pre else None)
    predicted = theory.two_shortcut_spectrum(
        moment, units, mid_slope=slopes[0], post_slope=slopes[1]
    )
    found = dense_eigenvalues(ShortcutNet(3, units, 2, pre=pre, mid=mid, post=post), x, y)
    torch.testing.assert_close(predicted.expand(), found, rtol=0, atol=1e-11)


def test_the_prediction_fails_when_mid_does_not_vanish_at_zero():
    x, y = samples("generic", 3)
    net = ShortcutNet(3, 2, 2, mid="sigmoid")
    predicted = theory.two_shortcut_spectrum(theory.sample_residual_moment(x, y), 2, mid_slope=0.25)
    loss, zero = flat_loss(net, x, y)
    assert float(grad(loss)(zero).norm()) > 0.1
    error = (predicted.expand() - dense_eigenvalues(net, x, y)).abs().max()
    assert float(error) > 0.1 * predicted.largest
    assert not theory.main_theorem_assumptions(2, mid=torch.sigmoid)


@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("units", [1, 2])
def test_from_depth_three_on_gradient_and_hessian_vanish(depth, units):
    x, y = samples("generic", 3)
    net = ShortcutNet(3, units, depth, mid="tanh")
    loss, zero = flat_loss(net, x, y)
    assert theory.stationary_order(depth) == depth - 1 >= 2
    assert int(grad(loss)(zero).count_nonzero()) == 0
    assert int(dense_hessian(net, x, y).count_nonzero()) == 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("pre", "mid", "post"),
    [(None, None, None), ("sigmoid", "shifted_sigmoid", "gelu"), (None, "tanh", None)],
)
@pytest.mark.parametrize(("d", "units"), [(1, 1), (3, 3)])
def test_the_first_derivative_along_a_ray_is_of_order_n(depth, pre, mid, post, d, units):
    x, y = samples("generic", d)
    net = ShortcutNet(
        d, units, depth, pre=pre, mid=mid, post=post, init="xavier", generator=generator()
    )
    loss, weights = flat_loss(net, x, y)
    slopes = [theory.ACTIVATIONS_AT_ZERO[name or "identity"].slope for name in (mid, post)]
    moment = theory.sample_residual_moment(x, y, pre=ACTIVATIONS[pre] if pre else None)
    coefficient = theory.leading_coefficient(
        moment, net.stacked_weights(), mid_slope=slopes[0], post_slope=slopes[1]
    )
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = loss(t * weights)
    for order in range(1, depth + 1):
        (value,) = torch.autograd.grad(value, t, create_graph=True)
        expected = 0.0 if order < depth else math.factorial(depth) * float(coefficient)
        assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("s", [0.1, 0.6, 0.95])
def test_the_whitened_bound_holds_and_is_attained(s):
    cross = normal(5, 5)
    cross *= s / float(torch.linalg.matrix_norm(cross, 2))
    identity = torch.eye(5, dtype=torch.float64)
    bound = theory.whitened_condition_bound(s)
    assert float(torch.linalg.cond(theory.residual_moment(identity, cross))) <= bound
    extreme = torch.diag(torch.tensor([s, -s, 0, 0, 0], dtype=torch.float64))
    assert float(torch.linalg.cond(identity - extreme)) == pytest.approx(bound, rel=1e-12)


# ------------------------------------------------------------------------------ n = 1


@pytest.mark.parametrize(("d", "layers"), [(1, 1), (1, 6), (4, 1), (3, 7), (5, 4)])
@pytest.mark.parametrize("kind", ["generic", "whitened"])
def test_one_shortcut_hessian_and_gradient_are_the_dense_ones(kind, d, layers):
    x, y = samples(kind, d)
    input_moment, cross_moment = theory.second_moments(x, y)
    residual = theory.residual_moment(input_moment, cross_moment)
    net = ShortcutNet(d, layers, 1)
    loss, zero = flat_loss(net, x, y)
    predicted = theory.one_shortcut_hessian(input_moment, residual, layers)
    torch.testing.assert_close(predicted, dense_hessian(net, x, y), rtol=0, atol=1e-11)
    gradient = theory.one_shortcut_gradient(residual, layers)
    torch.testing.assert_close(gradient.flatten(), grad(loss)(zero), **TOLERANCE)
    eigenvalues = torch.linalg.eigvalsh(predicted)
    lower, upper = theory.one_shortcut_largest_eigenvalue_bounds(input_moment, residual, layers)
    slack = 1e-12 * upper
    assert lower - slack <= float(eigenvalues[-1]) <= upper + slack
    assert float(eigenvalues.abs().max()) <= upper + slack
    if kind == "whitened":
        mu = float(torch.linalg.eigvalsh((residual + residual.T) / 2)[-1])
        norm = float(torch.linalg.matrix_norm(residual, 2))
        assert lower == pytest.approx(layers * (1 + mu) - mu, rel=1e-12)
        assert upper == pytest.approx(layers + (layers - 1) * norm, rel=1e-12)


@pytest.mark.parametrize(("d", "layers"), [(1, 1), (1, 5), (4, 1), (5, 3), (3, 11)])
@pytest.mark.parametrize("s", [0.25, 0.6, 1.0, 1.1, 0.0, -0.4])
def test_isotropic_spectrum_is_the_dense_one_with_multiplicities(d, layers, s):
    x = whitened(17, d)
    predicted = theory.one_shortcut_isotropic_spectrum(d, layers, s)
    found = dense_eigenvalues(ShortcutNet(d, layers, 1), x, (1 - s) * x)
    torch.testing.assert_close(predicted.expand(), found, rtol=0, atol=1e-11)
    if 0 < s <= 1 and layers >= 2:
        expected = (layers * (1 + s) - s) / s
        assert predicted.condition_number() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_exact_zeros_appear_where_the_stray_eigenvalue_crosses_zero(d):
    x = whitened(17, d)
    predicted = theory.one_shortcut_isotropic_spectrum(d, 11, 1.1)
    found = dense_eigenvalues(ShortcutNet(d, 11, 1), x, -0.1 * x)
    torch.testing.assert_close(predicted.expand(), found, rtol=0, atol=1e-11)
    zeros = d * (d - 1) // 2
    assert predicted.nullity == zeros == int((found.abs() < 1e-10).sum())
    nonzero = found[found.abs() >= 1e-10].abs()
    kappa = float(nonzero.max() / nonzero.min())
    assert predicted.condition_number(nonzero=True) == pytest.approx(kappa, rel=1e-10)
    assert (predicted.condition_number() == math.inf) == (zeros > 0)


@pytest.mark.parametrize(("d", "layers"), [(1, 1), (1, 4), (4, 1), (3, 2), (4, 6), (2, 16)])
@pytest.mark.parametrize("kind", ["generic", "whitened"])
def test_zero_targets_multiply_the_condition_number_of_the_data(kind, d, layers):
    x, _ = samples(kind, d)
    input_moment, _ = theory.second_moments(x, x)
    found = dense_eigenvalues(ShortcutNet(d, layers, 1), x, torch.zeros_like(x)).abs()
    predicted = theory.one_shortcut_zero_target_condition_number(input_moment, layers)
    assert predicted == pytest.approx(float(found.max() / found.min()), rel=1e-9)


def commuting_moments(d, equal=False):
    basis = torch.linalg.qr(normal(d, d)).Q
    sigma = torch.linspace(1, 3, d, dtype=torch.float64) if not equal else torch.ones(d).double()
    delta = normal(d, seed=3)
    return (basis * sigma) @ basis.T, (basis * delta) @ basis.T


@pytest.mark.parametrize(("d", "layers"), [(1, 1), (1, 5), (4, 1), (4, 7), (3, 12)])
@pytest.mark.parametrize("equal", [False, True])
def test_commuting_spectrum_is_the_dense_one(d, layers, equal):
    input_moment, residual = commuting_moments(d, equal)
    x = whitened(19, d) @ torch.linalg.cholesky(input_moment).T
    targets = x @ torch.linalg.solve(input_moment, input_moment - residual)
    found = dense_eigenvalues(ShortcutNet(d, layers, 1), x, targets)
    predicted = theory.one_shortcut_commuting_spectrum(input_moment, residual, layers)
    torch.testing.assert_close(predicted.expand(), found, rtol=0, atol=1e-10)


def test_commuting_spectrum_contains_the_isotropic_one():
    identity = torch.eye(4, dtype=torch.float64)
    predicted = theory.one_shortcut_commuting_spectrum(identity, 0.3 * identity, 9)
    expected = theory.one_shortcut_isotropic_spectrum(4, 9, 0.3)
    torch.testing.assert_close(predicted.values, expected.values, rtol=1e-12, atol=0)
    assert predicted.multiplicities.tolist() == expected.multiplicities.tolist()


def test_moments_that_do_not_commute_are_refused():
    input_moment, _ = commuting_moments(4)
    other = torch.diag(torch.arange(4.0))
    with pytest.raises(InvalidArgumentError, match="do not commute"):
        theory.one_shortcut_commuting_spectrum(input_moment, other, 3)


# -------------------------------------------------------------------- ReLU, plain nets


@pytest.mark.parametrize(("d", "units"), [(1, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize(("pre", "post"), [(None, None), ("tanh", "gelu")])
def test_relu_spectrum_near_zero_tends_to_that_of_the_gated_moments(d, units, pre, post):
    x, y = samples("generic", d, m=40)
    net = ShortcutNet(
        d, units, 2, pre=pre, mid="relu", post=post, init="xavier", scale=1e-6,
        generator=generator(4),
    )  # fmt: skip
    moments = theory.relu_gated_moments(
        x, y, net.stacked_weights()[:, 0], pre=ACTIVATIONS[pre] if pre else None
    )
    assert moments.shape == (units, d, d, d)
    slope = theory.ACTIVATIONS_AT_ZERO[post or "identity"].slope
    predicted = theory.relu_limit_spectrum(moments, post_slope=slope)
    found = dense_eigenvalues(net, x, y)
    assert predicted.num_eigenvalues == len(found)
    torch.testing.assert_close(predicted.expand(), found, rtol=0, atol=1e-10)


def test_the_relu_limit_is_approached_at_least_linearly():
    x, y = samples("generic", 3, m=40)
    errors = []
    for scale in (1e-2, 1e-6):
        net = ShortcutNet(3, 2, 2, mid="relu", init="xavier", scale=scale, generator=generator(4))
        moments = theory.relu_gated_moments(x, y, net.stacked_weights()[:, 0])
        predicted = theory.relu_limit_spectrum(moments).expand()
        errors.append(float((predicted - dense_eigenvalues(net, x, y)).abs().max()))
    assert errors[1] < 1e-3 * errors[0]
    assert errors[1] < 1e-9


def test_an_open_gate_gives_the_whole_residual_moment():
    x, y = normal(9, 3).abs() + 0.1, normal(9, 3, seed=1)
    moments = theory.relu_gated_moments(x, y, torch.stack([torch.ones(3), -torch.ones(3)]))
    torch.testing.assert_close(moments[0], theory.sample_residual_moment(x, y), **TOLERANCE)
    assert int(moments[1].count_nonzero()) == 0


@pytest.mark.parametrize(("d", "layers"), [(1, 1), (1, 4), (4, 1), (3, 6), (4, 5)])
@pytest.mark.parametrize("kind", ["generic", "whitened"])
def test_orthogonal_initialisation_is_zero_initialisation_with_rotated_targets(kind, d, layers):
    x, y = samples(kind, d)
    plain = ShortcutNet(d, layers, 1, shortcut=False, init="orthogonal", generator=generator(7))
    product = plain.end_to_end_matrix()
    found = dense_eigenvalues(plain, x, y)
    input_moment, cross_moment = theory.second_moments(x, y)
    rotated = theory.rotate_cross_moment(product, cross_moment)
    matrix = theory.one_shortcut_hessian(
        input_moment, theory.residual_moment(input_moment, rotated), layers
    )
    torch.testing.assert_close(torch.linalg.eigvalsh(matrix), found, rtol=0, atol=1e-10)
    targets = theory.rotate_targets(product, y)
    torch.testing.assert_close(theory.second_moments(x, targets)[1], rotated, **TOLERANCE)
    zero = dense_eigenvalues(ShortcutNet(d, layers, 1), x, targets)
    torch.testing.assert_close(zero, found, rtol=0, atol=1e-10)


def _unit_powers(matrix, units):
    """Units ``I + E_r`` with product ``matrix``: equal powers of its two polar factors."""
    u, s, vh = np.linalg.svd(matrix)
    rotation, stretch = logm(u @ vh).real, (vh.T * np.log(s)) @ vh
    share = math.pi / (math.pi + np.abs(np.log(s)).max())
    turns = min(max(1, round(units * share)), units - 1)
    turn, pull = expm(rotation / turns), expm(stretch / (units - turns))
    return [pull] * (units - turns) + [turn] * turns


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deep_nets_have_a_global_minimiser_as_small_as_predicted(depth):
    d, units = 5, 256
    optimum = normal(d, d)
    optimum[0] *= torch.linalg.det(optimum).sign()
    net = ShortcutNet(d, units, depth)
    for index, unit in enumerate(_unit_powers(optimum.numpy(), units)):
        u, s, vh = np.linalg.svd(unit - np.eye(d))
        root = np.diag(s ** (1 / depth))
        factors = [u @ root @ vh] if depth == 1 else [root @ vh, *[root] * (depth - 2), u @ root]
        for weight, factor in zip(net.unit_weights(index), factors, strict=True):
            weight.data.copy_(torch.from_numpy(factor))
    torch.testing.assert_close(net.end_to_end_matrix().detach(), optimum, rtol=0, atol=1e-11)
    largest = float(torch.linalg.matrix_norm(net.stacked_weights().detach(), 2).max())
    assert largest <= 1.03 * theory.near_global_minimiser_norm(optimum, units, depth)


def test_the_minimiser_norm_falls_with_the_depth_of_the_shortcut_as_root():
    optimum = torch.eye(3)
    assert theory.near_global_minimiser_norm(optimum, 100, 2) == pytest.approx(
        math.sqrt(math.pi / 100)
    )


# -------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", sorted(theory.ACTIVATIONS_AT_ZERO))
def test_the_table_of_activations_agrees_with_autograd(name):
    known = theory.ACTIVATIONS_AT_ZERO[name]
    found = theory.activation_at_zero(ACTIVATIONS[name])
    assert found.value == pytest.approx(known.value, abs=1e-16)
    assert found.slope == pytest.approx(known.slope, abs=1e-15)
    assert found.smooth == known.smooth


def test_table_and_registry_name_the_same_activations():
    assert set(theory.ACTIVATIONS_AT_ZERO) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("activation", "smooth"),
    [(F.leaky_relu, False), (F.elu, False), (F.silu, True), (torch.abs, False), (torch.sign, False),
     (torch.zeros_like, True)],
)  # fmt: skip
def test_kinks_and_jumps_at_zero_are_found(activation, smooth):
    assert theory.activation_at_zero(activation).smooth is smooth


def test_the_theorem_assumptions_name_what_fails():
    assert theory.main_theorem_assumptions(2, mid=torch.tanh, post=F.gelu)
    assert theory.main_theorem_assumptions(4, mid=ACTIVATIONS["shifted_softplus"]).hold
    relu = theory.main_theorem_assumptions(2, mid=torch.relu)
    assert not relu.hold
    assert "order 1 of mid" in relu.violations[0]
    both = theory.main_theorem_assumptions(2, mid=torch.sigmoid, post=F.softplus)
    assert len(both.violations) == 2
    assert theory.main_theorem_assumptions(1, mid=torch.sigmoid)  # no mid position


def test_the_orders_that_must_exist_grow_with_the_depth_of_the_shortcut():
    def rough(x):  # its third derivative jumps
        return x + x * x * x.abs()

    assert [theory.main_theorem_assumptions(n, mid=rough).hold for n in (2, 3, 4)] == [1, 1, 0]
    assert not theory.main_theorem_assumptions(2, post=F.elu)  # its second derivative jumps


# ------------------------------------------------------------------------------ spectrum


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=7, unique=True),
    counts=st.lists(st.integers(1, 5), min_size=7, max_size=7),
    percentile=st.floats(0, 100),
)
def test_statistics_of_a_spectrum_are_those_of_its_expansion(values, counts, percentile):
    multiplicities = torch.tensor(counts[: len(values)])
    spectrum = DiscreteSpectrum.collect(
        torch.tensor(values, dtype=torch.float64), multiplicities, atol=0
    )
    expanded = spectrum.expand().numpy()
    assert sorted(expanded) == sorted(np.repeat(values, multiplicities.numpy()))
    assert spectrum.num_eigenvalues == len(expanded)
    assert spectrum.index == (expanded < 0).mean()
    assert spectrum.nullity == (expanded == 0).sum()
    expected = np.percentile(np.abs(expanded), percentile)
    assert spectrum.percentile(percentile) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    kappa = spectrum.condition_number()
    assert kappa == (np.abs(expanded).max() / np.abs(expanded).min() if all(values) else math.inf)


def test_values_equal_up_to_rounding_become_one_and_zero_stays_apart():
    spectrum = DiscreteSpectrum.collect(
        torch.tensor([1.0, 1 + 1e-14, 1e-14, -1e-14, 1.5e-13, 2.0], dtype=torch.float64),
        torch.tensor([1, 2, 3, 4, 1, 0]),
        atol=1e-13,
    )
    assert spectrum.multiplicities.tolist() == [7, 1, 3]
    assert spectrum.values[0] == 0
    assert "11 eigenvalues, 3 distinct, 7 zero" in repr(spectrum)


def test_the_zero_spectrum_has_no_condition_number_of_nonzero_eigenvalues():
    spectrum = theory.two_shortcut_spectrum(torch.zeros(2, 2), 1)
    assert spectrum.condition_number() == math.inf
    with pytest.raises(InvalidArgumentError, match="every eigenvalue is zero"):
        spectrum.condition_number(nonzero=True)


# ----------------------------------------------------------------------------- bad input

EYE = torch.eye(3, dtype=torch.float64)
SKEW = EYE + torch.ones(3, 3).triu(1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: theory.second_moments(normal(4, 3), normal(4, 2)), ShapeError, r"\(4, 2\)"),
        (lambda: theory.second_moments(normal(0, 3), normal(0, 3)), ShapeError, "m >= 1"),
        (lambda: theory.residual_moment(SKEW, EYE), InvalidArgumentError, "symmetric"),
        (lambda: theory.residual_moment(EYE, normal(2, 2)), ShapeError, r"\(3, 3\)"),
        (lambda: theory.residual_moment(EYE * math.nan, EYE), InvalidArgumentError, "NaN"),
        (lambda: theory.residual_moment(EYE.to(torch.cdouble), EYE), InvalidArgumentError, "real"),
        (lambda: theory.residual_moment(object(), EYE), InvalidArgumentError, "tensor"),
        (
            lambda: theory.sample_residual_moment(EYE, EYE, pre="tanh"),
            InvalidArgumentError,
            "callable",
        ),
        (
            lambda: theory.sample_residual_moment(EYE, EYE, pre=torch.sum),
            ShapeError,
            "elementwise",
        ),
        (lambda: theory.stationary_order(0), InvalidArgumentError, "at least 1"),
        (lambda: theory.stationary_order(1.5), InvalidArgumentError, "integer"),
        (lambda: theory.stationary_order(True), InvalidArgumentError, "True"),
        (lambda: theory.leading_coefficient(EYE, normal(2, 3, 3)), ShapeError, r"\(R, n, 3, 3\)"),
        (lambda: theory.two_shortcut_spectrum(normal(2, 3), 1), ShapeError, r"\(2, 3\)"),
        (lambda: theory.two_shortcut_spectrum(EYE, -1), InvalidArgumentError, "num_units"),
        (
            lambda: theory.two_shortcut_spectrum(EYE, 1, mid_slope=math.inf),
            InvalidArgumentError,
            "mid_slope",
        ),
        (
            lambda: theory.two_shortcut_spectrum(EYE, 1, post_slope="one"),
            InvalidArgumentError,
            "post_slope",
        ),
        (lambda: theory.whitened_condition_bound(1.0), InvalidArgumentError, "singular"),
        (lambda: theory.one_shortcut_gradient(EYE, 0), InvalidArgumentError, "num_layers"),
        (lambda: theory.one_shortcut_hessian(EYE, normal(2, 2), 2), ShapeError, r"\(2, 2\)"),
        (lambda: theory.one_shortcut_hessian(SKEW, EYE, 2), InvalidArgumentError, "symmetric"),
        (
            lambda: theory.one_shortcut_isotropic_spectrum(0, 2, 0.5),
            InvalidArgumentError,
            "dim",
        ),
        (
            lambda: theory.one_shortcut_isotropic_spectrum(2, 2, math.nan),
            InvalidArgumentError,
            "residual_scale",
        ),
        (
            lambda: theory.one_shortcut_zero_target_condition_number(0 * EYE, 2),
            InvalidArgumentError,
            "positive definite",
        ),
        (
            lambda: theory.one_shortcut_commuting_spectrum(EYE, SKEW, 2),
            InvalidArgumentError,
            "symmetric",
        ),
        (
            lambda: theory.relu_gated_moments(normal(4, 3), normal(4, 3), normal(2, 2)),
            ShapeError,
            "first_weights",
        ),
        (lambda: theory.relu_limit_spectrum(normal(2, 3)), ShapeError, "gated_moments"),
        (lambda: theory.rotate_cross_moment(2 * EYE, EYE), InvalidArgumentError, "orthogonal"),
        (lambda: theory.rotate_targets(EYE, normal(4, 2)), ShapeError, r"\(m, 3\)"),
        (
            lambda: theory.near_global_minimiser_norm(-EYE, 4, 1),
            InvalidArgumentError,
            "determinant",
        ),
        (
            lambda: theory.near_global_minimiser_norm(torch.zeros(2, 2), 4, 1),
            InvalidArgumentError,
            "determinant",
        ),
        (lambda: theory.activation_at_zero("tanh"), InvalidArgumentError, "callable"),
        (lambda: theory.main_theorem_assumptions(0), InvalidArgumentError, "shortcut_depth"),
        (
            lambda: DiscreteSpectrum(torch.tensor([1.0, 0.0]), torch.tensor([1, 1])),
            InvalidArgumentError,
            "ascending",
        ),
        (
            lambda: DiscreteSpectrum(torch.tensor([1.0]), torch.tensor([0])),
            InvalidArgumentError,
            "at least 1",
        ),
        (lambda: DiscreteSpectrum(torch.ones(2), torch.tensor([1])), ShapeError, "one length"),
        (
            lambda: DiscreteSpectrum.collect(torch.ones(2), torch.tensor([1]), atol=0),
            ShapeError,
            "one length",
        ),
        (
            lambda: DiscreteSpectrum.collect(torch.ones(1), torch.tensor([-1]), atol=0),
            InvalidArgumentError,
            "negative",
        ),
        (
            lambda: theory.two_shortcut_spectrum(EYE, 1).percentile(101),
            InvalidArgumentError,
            "between 0 and 100",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
