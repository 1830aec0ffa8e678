"""Closed forms of the two-layer nets against sampling, autograd, and dense Hessians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory import (
    angle_between,
    conv_best_outputs,
    conv_gradients,
    conv_loss,
    conv_loss_reduced,
    conv_optimum_spectrum,
    conv_spurious_curvature,
    conv_spurious_spectrum,
    conv_spurious_threshold,
    rectified_overlap,
    relaxed_alignment,
    warm_up_limit,
)
from experiments.models import TwoLayerConv, population_loss, rectified_kernel
from experiments.shortcut_importance.descent import (
    Nets,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def unit(*shape):
    rows = normal(*shape)
    return rows / rows.norm(dim=-1, keepdim=True)


def dense_hessian(function, *parameters):
    """By differentiating twice, of a function of several vectors."""
    sizes = [len(p) for p in parameters]
    return torch.autograd.functional.hessian(
        lambda flat: function(*flat.split(sizes)), torch.cat(parameters)
    )


# -------------------------------------------------------------------------------- formulas


def test_the_overlap_is_that_of_sampled_rectified_products():
    x, y = unit(3), unit(3)
    rows = normal(400_000, 3)
    products = (rows @ x).relu() * (rows @ y).relu() * 2 * math.pi
    error = float(products.std()) / math.sqrt(len(rows))
    exact = float(rectified_overlap(angle_between(x, y)))
    assert abs(float(products.mean()) - exact) < 4 * error < 0.05


def test_the_overlap_keeps_its_digits_near_pi():
    for rest in (1e-6, 1e-3, 9.9e-3, 1.01e-2, 0.1):
        left = math.pi - (math.pi - rest)
        # sin x - x cos x, term by term: none of them cancels another's digits.
        exact = math.fsum(
            (-1) ** (n + 1) * 2 * n * left ** (2 * n + 1) / math.factorial(2 * n + 1)
            for n in range(1, 12)
        )
        assert float(rectified_overlap(math.pi - rest)) == pytest.approx(exact, rel=2e-9)
    assert float(rectified_overlap(0.0)) == math.pi
    assert float(rectified_overlap(math.pi)) == 0.0


@pytest.mark.parametrize("angle", [1e-9, 0.3, 1.5, 3.0, math.pi - 1e-9])
def test_angles_are_exact_at_both_ends(angle):
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    second = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    assert float(angle_between(first, 3 * second)) == pytest.approx(angle, rel=1e-6)


@pytest.mark.parametrize("normalised", [True, False])
def test_loss_and_gradients_are_those_of_autograd_and_of_samples(normalised):
    u, a, v_star, a_star = 1.3 * unit(4), unit(3), unit(4), unit(3)
    x, y = u.clone().requires_grad_(), a.clone().requires_grad_()
    size = x.norm()
    cosine = x @ v_star / size
    phi = torch.acos(cosine)
    b = y if normalised else size * y
    g = (math.pi - phi) * cosine + torch.sin(phi)
    loss = (math.pi - 1) * (b @ b + a_star @ a_star) - 2 * (g - 1) * (b @ a_star)
    loss = (loss + (b.sum() - a_star.sum()) ** 2) / (4 * math.pi)
    slopes = torch.autograd.grad(loss, [x, y])
    found = conv_gradients(u, a, v_star, a_star, normalised=normalised)
    torch.testing.assert_close(conv_loss(u, a, v_star, a_star, normalised=normalised), loss)
    for one, other in zip(found, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    net = TwoLayerConv(u - 0.5, a, shortcut=True, normalised=normalised)
    rows = normal(200_000, 3, 4)
    targets = (rows @ v_star).relu() @ a_star
    errors = (net(rows).detach() - targets).square() / 2
    spread = float(errors.std()) / math.sqrt(len(rows))
    assert abs(float(errors.mean() - loss.detach())) < 4 * spread < 0.05


def test_three_numbers_give_the_loss():
    u, a, v_star, a_star = normal(50, 6), normal(50, 4), unit(50, 6), normal(50, 4)
    one = torch.ones(50, dtype=torch.float64)
    rates = dict.fromkeys(("output_rate", "filter_rate", "warm_rate"), 0.1 * one)
    lanes = Nets(u, a, v_star, a_star).reduce(**rates, warm_up=one.long())
    beside = a.square().sum(1) - lanes.mean**2 - lanes.other**2
    reduced = conv_loss_reduced(
        lanes.mean, lanes.other, lanes.angle, 4, lanes.teacher_mean, lanes.teacher_other
    )
    whole = reduced + (math.pi - 1) / (4 * math.pi) * beside
    torch.testing.assert_close(whole, conv_loss(u, a, v_star, a_star))
    torch.testing.assert_close(lanes.alignment, (a * a_star).sum(1))


# -------------------------------------------------------------------------------- the kernel


def test_the_kernel_has_the_derivatives_that_it_says():
    u, target = normal(3, 5).requires_grad_(), unit(3, 5)
    assert torch.autograd.gradcheck(lambda x: rectified_kernel(x, target), (u,))
    assert torch.autograd.gradgradcheck(lambda x: rectified_kernel(x, target), (u,))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_kernels_hessian_is_the_limit_where_arccos_has_none(sign):
    target = unit(4)
    at = dense_hessian(lambda u: rectified_kernel(u, target), sign * target)
    assert at.abs().max() < 1e-12
    beside = sign * target + 1e-5 * unit(4)
    near = dense_hessian(lambda u: rectified_kernel(u, target), beside)
    # Linear in the distance: no jump.
    assert 1e-6 < near.abs().max() < 1e-4

    def by_arccos(u):
        cosine = u @ target / u.norm()
        return u.norm() * ((math.pi - torch.acos(cosine)) * cosine + torch.acos(cosine).sin())

    assert not torch.isfinite(dense_hessian(by_arccos, sign * target)).all()


def test_stacks_of_nets_are_nets():
    w, a, v_star, a_star = normal(3, 4), normal(3, 2), unit(3, 4), normal(3, 2)
    rows = normal(3, 10, 2, 4)
    stack = TwoLayerConv(w, a, shortcut=True)
    losses = stack.population_loss(v_star, a_star)
    for i in range(3):
        net = TwoLayerConv(w[i], a[i], shortcut=True)
        torch.testing.assert_close(stack(rows)[i], net(rows[i]))
        torch.testing.assert_close(losses[i], net.population_loss(v_star[i], a_star[i]))
    before = stack.filters.detach().clone()
    stack.renormalise()
    torch.testing.assert_close(stack.filters.detach(), before)
    torch.testing.assert_close((stack.weights + 0.5).norm(dim=1), torch.ones(3).double())


def test_the_shortcut_is_average_pooling():
    net = TwoLayerConv(torch.zeros(9).double(), torch.ones(1).double(), shortcut=True)
    rows = normal(20, 1, 9)
    torch.testing.assert_close(net(rows), (rows.mean(-1) * 3).relu()[:, 0])


@pytest.mark.parametrize(
    ("weights", "outputs", "error"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 2), ShapeError),
        (torch.tensor(1.0), torch.zeros(2), ShapeError),
        (torch.ones(4), torch.tensor(1.0), ShapeError),
        (torch.zeros(4), torch.zeros(2).double(), InvalidArgumentError),
        (torch.zeros(4).long(), torch.zeros(2).long(), InvalidArgumentError),
    ],
)
def test_nets_of_the_wrong_form_are_refused(weights, outputs, error):
    with pytest.raises(error):
        TwoLayerConv(weights, outputs, shortcut=True)


# -------------------------------------------------------------------------------- critical points


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.0, math.pi])
def test_the_best_outputs_solve_the_linear_system(angle):
    a_star = normal(5)
    ones, eye = torch.ones(5, 5).double(), torch.eye(5).double()
    g = float(rectified_overlap(angle))
    solved = torch.linalg.solve(ones + (math.pi - 1) * eye, (ones + (g - 1) * eye) @ a_star)
    torch.testing.assert_close(conv_best_outputs(angle, a_star), solved)
    share = float(a_star.sum() ** 2 / (5 * a_star @ a_star))
    alignment = float(solved @ a_star / (a_star @ a_star))
    assert float(relaxed_alignment(angle, share, 5)) == pytest.approx(alignment, rel=1e-12)


def with_ratio(k, ratio):
    """Outputs of norm 1 with ``(1^T a*)^2`` at this ratio of the threshold."""
    rest = normal(k)
    rest -= rest.mean()
    mean = math.sqrt(ratio * conv_spurious_threshold(k) / k)
    return mean / math.sqrt(k) + math.sqrt(1 - mean**2) * rest / rest.norm()


@pytest.mark.parametrize("ratio", [0.3, 0.95, 1.05, 2.0])
def test_both_critical_points_have_the_predicted_hessians_and_natures(ratio):
    k, p = 9, 5
    v_star, a_star = unit(p), with_ratio(k, ratio)
    spurious = conv_best_outputs(math.pi, a_star)
    assert float(spurious @ a_star) * (ratio - 1) > 0

    def loss(u, a):
        return population_loss(u / u.norm(), a, v_star, a_star)

    for u, a, spectrum in (
        (v_star, a_star, conv_optimum_spectrum(a_star, p)),
        (-v_star, spurious, conv_spurious_spectrum(a_star, p)),
    ):
        hessian = dense_hessian(loss, u, a)
        expected = spectrum.values.repeat_interleave(spectrum.multiplicities)
        torch.testing.assert_close(torch.linalg.eigvalsh(hessian), expected, rtol=0, atol=1e-13)
        slopes = conv_gradients(u, a, v_star, a_star)
        assert max(float(slope.norm()) for slope in slopes) < 1e-14
    # Only the third order tells a minimum from a saddle.
    across = unit(p)
    across -= (across @ v_star) * v_star
    across /= across.norm()
    at = loss(-v_star, spurious)
    for epsilon in (1e-2, 3e-2):
        u = -math.cos(epsilon) * v_star + math.sin(epsilon) * across
        change = float(loss(u, spurious) - at)
        expected = -float(spurious @ a_star) * epsilon**3 / (6 * math.pi)
        assert change == pytest.approx(expected, rel=1e-3)
        assert (change > 0) == (ratio < 1)
    curvature = conv_spurious_curvature(a_star, p)
    assert (curvature > 0) == (ratio < 1)
    # Along the way, and across it, by differences of the gradient's slope.
    assert conv_spurious_curvature(a_star, 2) == pytest.approx(-float(spurious @ a_star) / math.pi)


# -------------------------------------------------------------------------------- input


def test_bad_input_is_refused_with_what_to_do():
    v, a = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(InvalidArgumentError, match="norm 1"):
        conv_loss(v, a, 2 * v, a)
    with pytest.raises(ShapeError, match="same last axis"):
        conv_gradients(v, a, v, a[:2])
    with pytest.raises(ShapeError, match="filters of net"):
        conv_loss(torch.ones(3), a, v, a)
    with pytest.raises(InvalidArgumentError, match="zero vector"):
        conv_loss(0 * v, a, v, a)
    with pytest.raises(InvalidArgumentError, match="fold it"):
        rectified_overlap(3.2)
    with pytest.raises(InvalidArgumentError, match="lies in"):
        warm_up_limit(1.5, 16)
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        conv_spurious_threshold(0)
    with pytest.raises(ShapeError, match="shape"):
        conv_optimum_spectrum(torch.ones(2, 2), 4)
    with pytest.raises(ShapeError, match="n >= 1"):
        conv_best_outputs(0.0, torch.tensor(1.0))
    with pytest.raises(InvalidArgumentError, match="not negative"):
        conv_loss_reduced(v, v, v, 16, -1.0, 1.0)
    for k in (0, -3):
        with pytest.raises(InvalidArgumentError, match="at least 1"):
            conv_loss_reduced(v, v, v, k, 1.0, 1.0)
    with pytest.raises(ShapeError, match="shape"):
        conv_spurious_curvature(torch.ones(2, 2), 4)
    with pytest.raises(ShapeError, match="same last axis"):
        angle_between(v, a)
    rows = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(ShapeError, match="leading axes"):
        angle_between(*rows)
    with pytest.raises(ShapeError, match="leading axes"):
        conv_loss(v.expand(2, 2), a.expand(5, 3), v, a)
    with pytest.raises(ShapeError, match="leading axes"):
        conv_loss_reduced(v, torch.ones(3), 1.0, 16, 1.0, 1.0)


def test_a_teacher_of_another_norm_and_filters_without_a_direction_are_refused():
    net = TwoLayerConv(torch.ones(4), torch.ones(2), shortcut=True)
    with pytest.raises(InvalidArgumentError, match="norm 1"):
        net.population_loss(torch.ones(4), torch.ones(2))
    assert torch.isfinite(net.population_loss(torch.ones(4) / 2, torch.ones(2)))
    for weights, shortcut in ((torch.zeros(4), False), (torch.full((4,), -0.5), True)):
        with pytest.raises(InvalidArgumentError, match="a filter is zero"):
            TwoLayerConv(weights, torch.ones(2), shortcut=shortcut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pi_of_every_dtype_is_an_angle(dtype):
    assert float(rectified_overlap(torch.tensor(math.pi, dtype=dtype))) < 1e-5
    with pytest.raises(InvalidArgumentError, match="fold it"):
        rectified_overlap(torch.tensor(3.3, dtype=dtype))


def test_the_kernel_has_second_derivatives_backwards_alone():
    u, target = normal(4), unit(4)

    def kernel(x):
        return rectified_kernel(x, target)

    dense = torch.func.jacrev(torch.func.jacrev(kernel))(u)
    torch.testing.assert_close(dense, dense_hessian(kernel, u))
    with pytest.raises(NotImplementedError):
        torch.func.hessian(kernel)(u)


def test_numbers_of_python_and_numpy_are_taken_in_full():
    # torch would make them float32.
    assert float(rectified_overlap(math.pi / 3)) == float(
        rectified_overlap(np.float64(math.pi / 3))
    )
    assert float(angle_between([1.0, 0.0], [1.0, 1e-12])) == pytest.approx(1e-12, rel=1e-9)
