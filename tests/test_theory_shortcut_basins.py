"""Basins of the two-layer nets: sets that descent does not leave, and descent in three numbers."""

from __future__ import annotations

import math

import pytest
import torch

from conditioning.errors import InvalidArgumentError
from conditioning.theory import (
    absorbed_by_optimum,
    absorbed_by_spurious,
    conv_spurious_threshold,
    rectified_overlap,
    relaxed_alignment,
    warm_up_limit,
)
from experiments.models import TwoLayerConv
from experiments.shortcut_importance.descent import (
    OPEN,
    OPTIMUM,
    SPURIOUS,
    Lanes,
    Nets,
    advance,
    descend,
    descend_vectors,
    follow,
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


def test_the_warm_up_limit_is_where_the_relaxed_alignment_vanishes():
    for k in (16, 100):
        for share in (1e-3, 0.05, 0.2, 0.3):
            limit = warm_up_limit(share, k)
            assert math.pi / 2 <= limit <= math.pi
            assert abs(float(relaxed_alignment(limit, share, k))) < 1e-12
        assert warm_up_limit(0.0, k) == math.pi / 2
        edge = conv_spurious_threshold(k) / k
        assert warm_up_limit(edge * 1.001, k) == math.pi
        assert warm_up_limit(edge * 0.999, k) < math.pi
    # Measured in the earlier simulation: success up to 0.50 pi at r = 1/256, 0.60 pi at r = 0.2.
    assert 0.50 < warm_up_limit(1 / 256, 16) / math.pi < 0.51
    assert warm_up_limit(0.2, 16) / math.pi > 0.60


def lanes_of(mean, other, angle, k=16, parts=(0.3, 0.9), rate=None, warm_up=0, warm_rate=None):
    one = torch.ones_like(mean)
    rate = 1 / k**2 if rate is None else rate
    return Lanes(
        mean, other, angle, one * k, one * parts[0], one * parts[1], one / k**2, one * rate,
        one * (rate if warm_rate is None else warm_rate), torch.full(mean.shape, warm_up),
    )  # fmt: skip


def drawn_states(count):
    """States all over, with corners: ``s, c, phi, k, S, C``."""
    k = torch.randint(1, 30, (count,)).double()
    big_s, big_c = 1.5 * torch.rand(2, count).double()
    big_s[::11] = 0
    big_c[1::11] = 0
    s, c = 4 * (2 * torch.rand(2, count).double() - 1)
    s, c = s * big_s.clamp(min=0.2), c * big_c.clamp(min=0.2)
    angle = math.pi * torch.rand(count).double()
    near = 1e-3 * torch.rand(count).double()
    angle[::5], angle[1::5] = near[::5], math.pi - near[1::5]
    angle[2::5] = math.pi / 2 - near[2::5]
    return s, c, angle, k, big_s, big_c


def at_the_limits(state, filter_rate):
    """Lanes with these steps of the filter, and the largest, or a tenth of them, of the outputs."""
    k = state[3]
    rate = 2 * math.pi / (k + math.pi - 1) * torch.where(torch.rand(len(k)) < 0.5, 1.0, 0.1)
    return Lanes(*state, rate, filter_rate, filter_rate, torch.zeros(len(k), dtype=torch.int64))


def test_no_step_leaves_the_set_of_the_optimum_at_its_limits():
    s, c, phi, _, big_s, big_c = state = drawn_states(40_000)
    size = big_s**2 + torch.maximum(c, big_c) * big_c
    rate = 4 / size.clamp(min=1e-3)
    alignment = s * big_s + c * big_c
    inside = (phi < math.pi / 2) & (alignment > 0) & (s <= big_s) & (size >= 1e-3)
    assert int(inside.sum()) > 2000
    assert torch.equal(absorbed_by_optimum(*state, rate) & (size >= 1e-3), inside)
    # A step that is a little larger is not allowed.
    assert not absorbed_by_optimum(*state, rate * (1 + 1e-6))[inside].any()
    lanes = at_the_limits([part[inside] for part in state], rate[inside])
    for step in range(20):
        after = advance(lanes, step, 1 if step < 10 else 30)
        assert (after.angle <= lanes.angle + 1e-12).all()
        assert (after.alignment > 0).all()
        lanes = after


def test_no_step_leaves_the_set_of_the_spurious_point_at_its_limits():
    s, c, phi, k, big_s, big_c = state = drawn_states(40_000)
    size = torch.maximum(s.abs(), big_s) * big_s + torch.maximum(c.abs(), big_c) * big_c
    rate = 4 * math.pi / size.clamp(min=1e-3)
    overlap = rectified_overlap(phi)
    wide = (1 - overlap) * (big_s**2 + big_c**2) >= math.pi * k / (k + math.pi - 1) * big_s**2
    large = s >= big_s * (k - 1) / (k + math.pi - 1)
    inside = wide & large & (s * big_s + c * big_c < 0) & (size >= 1e-3)
    assert int(inside.sum()) > 500
    smaller = rate * (1 - 1e-12)
    assert torch.equal(absorbed_by_spurious(*state, smaller) & (size >= 1e-3), inside)
    assert not absorbed_by_spurious(*state, rate * (1 + 1e-6))[inside].any()
    lanes = at_the_limits([part[inside] for part in state], smaller[inside])
    for step in range(20):
        after = advance(lanes, step, 1 if step < 10 else 30)
        assert (after.angle >= lanes.angle - 1e-12).all()
        assert (after.alignment < 0).all()
        lanes = after


# A point that breaks one condition alone, and leaves: k, S, C, s, c, phi, both rates.
@pytest.mark.parametrize(
    ("absorbed", "point", "end"),
    [
        # s > S
        (absorbed_by_optimum, (9, 0.29, 0.379, 1.028, -0.6045, 1.278, 0.0564, 17.5), SPURIOUS),
        # not wide enough, but for half of the threshold it were
        (absorbed_by_spurious, (3, 0.568, 0.237, 0.3245, -0.8355, 2.8687, 0.1222, 2.41), OPTIMUM),
        # s < S (k - 1)/(k + pi - 1)
        (absorbed_by_spurious, (25, 0.372, 0.993, -1.178, 0.241, 2.904, 0.02315, 2.8), OPTIMUM),
    ],
)
def test_points_that_break_one_condition_leave_the_sets(absorbed, point, end):
    k, big_s, big_c, s, c, phi, output_rate, filter_rate = (
        torch.tensor([value], dtype=torch.float64) for value in point
    )
    assert not absorbed(s, c, phi, k, big_s, big_c, filter_rate)
    start = torch.zeros(1, dtype=torch.int64)
    lanes = Lanes(
        s, c, phi, k, big_s, big_c, output_rate, filter_rate, filter_rate, start
    )  # fmt: skip
    assert descend(lanes, 20_000).fate.tolist() == [end]
    # What is broken is that condition: all others hold.
    alignment = s * big_s + c * big_c
    if absorbed is absorbed_by_optimum:
        assert alignment > 0
        assert phi < math.pi / 2
        assert filter_rate * (big_s**2 + max(c, big_c) * big_c) <= 4
    else:
        assert alignment < 0
        size = max(s.abs(), big_s) * big_s + max(c.abs(), big_c) * big_c
        assert filter_rate * size <= 4 * math.pi


def test_outputs_beyond_the_teachers_count_in_the_largest_step():
    one = torch.ones(1, dtype=torch.float64)
    k, big_s, big_c, phi = 16.0 * one, 0.3 * one, 0.9 * one, 1e-3 * one
    s, c = big_s, 3 * big_c
    rate = 4 / (big_s**2 + big_c**2)
    assert not absorbed_by_optimum(s, c, phi, k, big_s, big_c, rate)
    step = Lanes(s, c, phi, k, big_s, big_c, rate / 1e9, rate, rate, torch.zeros(1).long())
    assert advance(step, 0, 1).angle > phi
    smaller = 4 / (big_s**2 + 3 * big_c**2)
    assert absorbed_by_optimum(s, c, phi, k, big_s, big_c, smaller)
    step = Lanes(s, c, phi, k, big_s, big_c, rate / 1e9, smaller, smaller, torch.zeros(1).long())
    assert advance(step, 0, 1).angle <= phi


def test_a_filter_that_rests_is_not_certain_to_arrive():
    one = torch.ones(1).double()
    for rate in (0.0, -1e9):
        for absorbed in (absorbed_by_optimum, absorbed_by_spurious):
            with pytest.raises(InvalidArgumentError, match="positive"):
                absorbed(0.2 * one, 0.1 * one, one, 16, 0.3, 0.9, rate)


@pytest.mark.parametrize("angle", [0.02, math.pi - 0.02])
def test_large_steps_are_folded_at_both_ends_as_vectors_are(angle):
    k, p, count = 6, 5, 40
    one = torch.ones(count).double()
    v_star, across = unit(count, p), unit(count, p)
    across -= (across * v_star).sum(1, keepdim=True) * v_star
    across /= across.norm(dim=1, keepdim=True)
    u = math.cos(angle) * v_star + math.sin(angle) * across
    a_star = normal(count, k) + 0.4
    # Towards the end that is near: from 0.02 beyond v*, or beyond -v*.
    sign = 1.0 if angle < 1 else -1.0
    nets = Nets(u, sign * a_star + 0.1 * normal(count, k), v_star, a_star)
    rates = {"output_rate": 0.02 * one, "filter_rate": 3e3 * one, "warm_rate": 3e3 * one}
    lanes = nets.reduce(**rates, warm_up=torch.zeros(count).long())
    pull = lanes.alignment * (math.pi - lanes.angle) * lanes.angle.sin()
    turned = lanes.angle - (3e3 * pull / (2 * math.pi)).atan()
    beyond = turned < 0 if angle < 1 else turned > math.pi
    assert int(beyond.sum()) > count / 2
    for steps in (1, 2, 3):
        after = descend_vectors(nets, rates["output_rate"], [(steps, rates["filter_rate"])])
        state = advance(lanes, 0, steps)
        assert ((state.angle >= 0) & (state.angle <= math.pi)).all()
        torch.testing.assert_close(after.angle, state.angle, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rate", [0.01, 1.0, 4.0])
def test_no_step_leaves_the_sets_and_they_lead_where_they_say(rate):
    count = 1000
    mean, other = 0.3 * (2 * torch.rand(2, count).double() - 1)
    angle = math.pi * torch.rand(count).double()
    # The largest step that the first set allows is 4 / |a*|^2.
    lanes = lanes_of(mean, other, angle, rate=rate / 0.9)
    before = lanes.fate()
    assert {int(value) for value in before.unique()} >= {OPTIMUM, SPURIOUS}
    after = lanes
    for step in range(0, 2000, 50):
        after = advance(after, step, 50)
        assert torch.equal(after.fate()[before != OPEN], before[before != OPEN])
    good, bad = before == OPTIMUM, before == SPURIOUS
    assert (after.angle[good] <= lanes.angle[good] + 1e-12).all()
    assert (after.angle[bad] >= lanes.angle[bad] - 1e-12).all()
    far = advance(after, 2000, 8000) if rate == 1.0 else after
    if rate == 1.0:
        assert far.angle[good].max() < 1e-3
        assert far.angle[bad].min() > math.pi - 0.3


def test_a_step_that_is_too_large_is_not_certain():
    one = torch.ones(1).double()
    inside = (0.2 * one, 0.1 * one, one, 16, 0.3, 0.9)
    assert absorbed_by_optimum(*inside, 1.0)
    assert not absorbed_by_optimum(*inside, 5.0)
    outside = (0.25 * one, -0.3 * one, 3.0 * one, 16, 0.3, 0.9)
    assert absorbed_by_spurious(*outside, 1.0)
    assert not absorbed_by_spurious(*outside, 50.0)
    # Where the spurious point is a saddle nothing ends there.
    assert not absorbed_by_spurious(0.9 * one, -3.0 * one, 3.1 * one, 16, 0.9, 0.3, 0.01)


@pytest.mark.parametrize("negative_sum", [False, True])
def test_vectors_and_three_numbers_take_the_same_way(negative_sum):
    k, p, count = 6, 5, 30
    a_star = normal(count, k) + (-0.4 if negative_sum else 0.4)
    nets = Nets(unit(count, p), 0.3 * normal(count, k), unit(count, p), a_star)
    one = torch.ones(count).double()
    rates = {"output_rate": 0.02 * one, "filter_rate": 0.1 * one, "warm_rate": 0.001 * one}
    lanes = nets.reduce(**rates, warm_up=torch.full((count,), 40))
    states = follow(lanes, [0, 17, 40, 500])
    for state, (first, second) in zip(states, ((0, 0), (17, 0), (40, 0), (40, 460)), strict=True):
        stages = [(first, rates["warm_rate"]), (second, rates["filter_rate"])]
        after = descend_vectors(nets, rates["output_rate"], stages)
        there = after.reduce(**rates, warm_up=torch.full((count,), 40))
        for quantity in ("mean", "other", "angle"):
            torch.testing.assert_close(
                getattr(there, quantity), getattr(state, quantity), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize("normalised", [True, False])
def test_a_step_of_vectors_is_a_step_along_the_gradient_of_the_module(normalised):
    nets = Nets(unit(4, 5), normal(4, 3), unit(4, 5), normal(4, 3))
    rate = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    after = descend_vectors(nets, rate, [(1, 2 * rate)], normalised=normalised)
    net = TwoLayerConv(nets.filters - 5**-0.5, nets.outputs, shortcut=True, normalised=normalised)
    loss = net.population_loss(nets.teacher_filters, nets.teacher_outputs).sum()
    in_w, in_a = torch.autograd.grad(loss, [net.weights, net.outputs])
    with torch.no_grad():
        net.weights.sub_(2 * rate[:, None] * in_w)
        net.outputs.sub_(rate[:, None] * in_a)
    if normalised:
        net.renormalise()
    torch.testing.assert_close(after.filters, net.weights.detach() + 5**-0.5)
    torch.testing.assert_close(after.outputs, net.outputs.detach())


def test_lanes_that_are_decided_are_taken_out_and_counted():
    angle = torch.tensor([0.5, 0.5, 3.0, math.pi / 2], dtype=torch.float64)
    mean = torch.tensor([0.2, 0.2, 0.25, 0.0], dtype=torch.float64)
    other = torch.tensor([0.1, -0.1, -0.3, 0.0], dtype=torch.float64)
    found = descend(lanes_of(mean, other, angle), 5000)
    assert found.fate[0] == OPTIMUM
    assert found.fate[2] == SPURIOUS
    assert found.step[[0, 2]].tolist() == [0, 0]
    assert found.fate[1] == OPTIMUM
    assert found.step[1] > 0
    # At a right angle and without outputs the first step decides.
    assert descend(lanes_of(mean[3:], other[3:], angle[3:]), 0).fate.tolist() == [OPEN]
    assert found.successes() == int((found.fate == OPTIMUM).sum())


def test_warm_ups_of_different_lengths_run_side_by_side():
    mean, other = torch.full((2,), -0.2).double(), torch.full((2,), -0.25).double()
    angle = torch.full((2,), math.pi / 3).double()
    long = lanes_of(mean[:1], other[:1], angle[:1], rate=2.0, warm_rate=1e-5, warm_up=2560)
    short = lanes_of(mean[1:], other[1:], angle[1:], rate=2.0, warm_rate=1e-5, warm_up=10)
    both = descend(Lanes.join([long, short]), 5000)
    assert both.fate.tolist() == [OPTIMUM, SPURIOUS]
    for lanes, fate in ((long, OPTIMUM), (short, SPURIOUS)):
        assert descend(lanes, 5000).fate.tolist() == [fate]
    with pytest.raises(ValueError, match="a warm-up ends within"):
        advance(short, 0, 20)


def test_step_sizes_for_which_the_sets_mean_nothing_are_refused():
    one = torch.ones(1).double()

    def with_rate(rate):
        return Lanes(one, one, one, 16 * one, one, one, rate, one, one, one.long())

    limit = 2 * math.pi / (16 * one + math.pi - 1)
    assert len(with_rate(limit)) == 1
    for rate in (1.0001 * limit, one):
        with pytest.raises(ValueError, match="must not exceed"):
            with_rate(rate)
    with pytest.raises(ValueError, match="larger in a warm-up"):
        lanes_of(one, one, one, rate=0.1, warm_rate=0.2)
    with pytest.raises(ValueError, match="one shape"):
        lanes_of(one, torch.ones(2).double(), one)
