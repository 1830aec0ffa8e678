"""Projections after steps: of every optimizer, on every kind of weight."""

from __future__ import annotations

import copy
import functools
import gc
import io
import math
import weakref

import numpy as np
import pytest
import torch
from projected import Net, is_flat, loss_of, same, sgd, train, values_of, weights
from torch import nn

from conditioning.procrustes import Procrustes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def net():
    return Net()


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "SGD with all there is": functools.partial(
        torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "SGD, foreach": functools.partial(torch.optim.SGD, lr=0.1, foreach=True),
    "SGD, fused": functools.partial(torch.optim.SGD, lr=0.1, fused=True),
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "Adam, foreach": functools.partial(torch.optim.Adam, lr=0.01, foreach=True),
    "Adam, fused": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_each_step_of_any_optimizer_the_layers_are_projected(net, name):
    optimizer = OPTIMIZERS[name](net.parameters())
    procrustes = Procrustes(["stem", "down"], model=net).attach(optimizer)
    for step in (1, 2, 3):
        train(net, optimizer)
        assert is_flat(net.down)
        assert values_of(net.stem) == pytest.approx(1.0, rel=1e-5)  # nine rows, lengths 1/3 times 3
        assert procrustes.num_projections == step
    assert values_of(net.mix)[0] > 1.01 * values_of(net.mix)[-1]


def test_the_other_layers_and_the_step_are_those_of_the_plain_loop(net):
    plain, optimizer = copy.deepcopy(net), sgd(net)
    Procrustes(net.down).attach(optimizer)
    train(net, optimizer)
    train(plain, sgd(plain))
    Procrustes(plain.down).project()
    assert same(weights(net), weights(plain))


def test_a_step_of_lbfgs_is_one_however_often_it_looks_at_the_loss(net):
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
    procrustes = Procrustes(net.down).attach(optimizer)
    looks = []

    def closure():
        looks.append(1)
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(looks) > 4
    assert procrustes.num_projections == 2
    assert is_flat(net.down)


def test_each_layer_follows_the_optimizer_that_owns_it(net):
    first = torch.optim.SGD([*net.stem.parameters(), *net.down.parameters()], lr=0.1)
    second = torch.optim.Adam([*net.mix.parameters(), *net.head.parameters()], lr=0.01)
    procrustes = Procrustes(["down", "head"], model=net).attach([first, second], every=2)
    loss_of(net).backward()
    for _ in range(2):
        first.step()
    assert is_flat(net.down)
    assert procrustes.num_projections == 1
    assert procrustes.steps_since == {"down": 0, "head": 0}
    second.step()
    assert procrustes.steps_since == {"down": 0, "head": 1}
    first.step()
    second.step()
    assert values_of(net.head) == pytest.approx(1.0, rel=1e-5)
    assert procrustes.steps_since == {"down": 1, "head": 0}
    assert procrustes.num_projections == 2


# --------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_step_that_the_scaler_skips_is_none(net, kind, fused):
    optimizer = kind(net.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    procrustes = Procrustes(net.down).attach(optimizer, every=2)
    seen = []
    for factor in (1.0, math.inf, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        before = weights(net)
        scaler.scale(factor * loss_of(net)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(weights(net), before) == (factor == math.inf)
        seen.append((procrustes.steps_since["layer 0"], procrustes.num_projections))
    assert seen == [(1, 0), (1, 0), (0, 1), (0, 1), (1, 1)]
    assert procrustes.state_dict()["num_steps"] == [3]


def test_a_scaler_that_unscales_first_is_followed_as_well(net):
    optimizer = sgd(net, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    procrustes = Procrustes(net.down).attach(optimizer)
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(net)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert procrustes.num_projections == (factor == 1.0)
    assert is_flat(net.down)


# ------------------------------------------------------------------- when: every, probability


def test_every_third_step(net):
    optimizer = sgd(net)
    procrustes = Procrustes(net.down).attach(optimizer, every=3)
    seen = []
    for _ in range(7):
        train(net, optimizer)
        seen.append((procrustes.num_projections, procrustes.steps_since["layer 0"]))
    assert seen == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


class Still(torch.optim.Optimizer):
    """Steps that change nothing."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None):
        pass


def draws(steps, *, count=None, **options):
    """After which steps a small layer is projected."""
    layer = nn.Linear(2, 2)
    optimizer = Still(layer.parameters())
    procrustes = Procrustes(layer)
    projected = []
    procrustes._project = lambda *_: projected.append(procrustes.state_dict()["num_steps"][0])
    procrustes.attach(optimizer, **options)
    if count is not None:
        procrustes.load_state_dict({**procrustes.state_dict(), "num_steps": [count]})
    for _ in range(steps):
        optimizer.step()
    return projected


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_of_steps_is_the_probability(probability):
    share = len(draws(2000, probability=probability)) / 2000
    # Four standard deviations.
    assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 2000)


def test_probability_one_and_none_are_every_step():
    assert draws(20, probability=1.0) == draws(20) == list(range(1, 21))


def test_with_both_every_so_many_steps_are_drawn_from():
    both = draws(600, every=3, probability=0.5)
    assert all(step % 3 == 0 for step in both)
    assert 60 < len(both) < 140
    assert set(both) == {step for step in draws(600, probability=0.5) if step % 3 == 0}


def test_draws_depend_on_seed_and_step_only():
    first = draws(200, probability=0.5, seed=3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert draws(200, probability=0.5, seed=3) == first
    assert draws(200, probability=0.5, seed=4) != first
    assert draws(100, count=100, probability=0.5, seed=3) == [step for step in first if step > 100]


def test_the_global_generators_are_left_alone(net):
    optimizer = sgd(net)
    Procrustes(["stem", "down", "mix"], model=net).attach(optimizer, probability=0.5)
    loss_of(net).backward()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in range(5):
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_two_optimizers_have_draws_of_their_own():
    layers = [nn.Linear(2, 2), nn.Linear(3, 3)]
    optimizers = [Still(layer.parameters()) for layer in layers]
    procrustes = Procrustes(layers).attach(optimizers, probability=0.5)
    seen = [[], []]
    for _ in range(50):
        for place, optimizer in enumerate(optimizers):
            optimizer.step()
            seen[place].append(procrustes.steps_since[f"layer {place}"] == 0)
    assert seen[0] != seen[1]


# ------------------------------------------------------------ attach, detach, copies, states


def test_attached_twice_it_projects_once_a_step_and_goes_on_counting(net):
    optimizer = sgd(net)
    procrustes = Procrustes(net.down).attach(optimizer)
    train(net, optimizer, 3)
    assert procrustes.attach(optimizer, every=2) is procrustes
    train(net, optimizer)
    assert procrustes.num_projections == 4
    assert procrustes.state_dict()["num_steps"] == [4]
    train(net, optimizer)
    assert procrustes.num_projections == 4


def test_attached_to_another_number_of_optimizers_it_keeps_the_counts_that_it_has(net):
    first = torch.optim.SGD([*net.stem.parameters(), *net.down.parameters()], lr=0.1)
    second = torch.optim.SGD([*net.mix.parameters(), *net.head.parameters()], lr=0.1)
    procrustes = Procrustes(net.down).attach(first)
    loss_of(net).backward()
    first.step()
    procrustes.attach([first, second])
    for optimizer in (second, first, second):
        optimizer.step()
    assert procrustes.state_dict()["num_steps"] == [2, 2]
    procrustes.attach(first)
    first.step()
    assert procrustes.state_dict()["num_steps"] == [3]
    assert procrustes.num_projections == 3


def test_detached_it_does_nothing(net):
    optimizer = sgd(net)
    procrustes = Procrustes(net.down).attach(optimizer)
    train(net, optimizer)
    procrustes.detach()
    procrustes.detach()
    train(net, optimizer)
    assert procrustes.num_projections == 1
    assert not is_flat(net.down)
    assert not optimizer._optimizer_step_post_hooks


def test_an_attach_that_fails_leaves_what_was(net):
    optimizer = sgd(net)
    procrustes = Procrustes(net.down).attach(optimizer)
    with pytest.raises(ValueError, match="every"):
        procrustes.attach(optimizer, every=0)
    train(net, optimizer)
    assert procrustes.num_projections == 1


def test_loading_the_state_of_an_optimizer_keeps_the_hook(net):
    optimizer = sgd(net, momentum=0.9)
    procrustes = Procrustes(net.down).attach(optimizer)
    train(net, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))
    train(net, optimizer)
    assert procrustes.num_projections == 2


def test_a_copy_of_an_optimizer_is_attached_anew(net):
    optimizer = sgd(net)
    procrustes = Procrustes(net.down).attach(optimizer)
    train(net, optimizer)
    other, twin = copy.deepcopy((net, optimizer))
    train(other, twin)
    assert not is_flat(other.down)
    assert procrustes.num_projections == 1
    Procrustes(other.down).attach(twin)
    train(other, twin)
    assert is_flat(other.down)


def test_a_model_that_holds_its_regulariser_can_be_saved_and_copied(net):
    optimizer = sgd(net)
    net.procrustes = Procrustes(["stem", "down"], model=net).attach(optimizer, probability=0.5)
    train(net, optimizer)
    net.procrustes.project()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(net)):
        kept = other.procrustes
        assert [layer.module for layer in kept.layers] == [other.stem, other.down]
        assert kept.num_projections == net.procrustes.num_projections
        assert kept.state_dict()["schedule"] is None
        kept.attach(sgd(other))
    assert net.procrustes.state_dict()["num_steps"] == [1]


def test_the_optimizer_keeps_what_is_attached_alive(net):
    optimizer = sgd(net)
    Procrustes(net.down).attach(optimizer)
    gc.collect()
    train(net, optimizer)
    assert is_flat(net.down)


def test_once_detached_nothing_is_left_for_the_garbage_collector(net):
    optimizer = sgd(net)
    procrustes = Procrustes(["stem", "down", "mix"], model=net).attach(optimizer)
    train(net, optimizer)
    procrustes.report()
    procrustes.detach()
    seen = weakref.ref(procrustes)
    gc.collect()
    gc.disable()
    try:
        del procrustes
        assert seen() is None
    finally:
        gc.enable()


def test_with_its_optimizer_it_goes(net):
    optimizer = sgd(net)
    seen = weakref.ref(Procrustes(net.down).attach(optimizer))
    assert seen() is not None
    del optimizer
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("interrupted_after", [1, 4, 7])
def test_a_training_that_was_interrupted_gives_identical_weights(net, interrupted_after):
    def begin(model):
        optimizer = sgd(model, momentum=0.9)
        layers = ["stem", "down", "mix"]
        procrustes = Procrustes(layers, model=model)
        return optimizer, procrustes.attach(optimizer, every=2, probability=0.6, seed=5)

    other = copy.deepcopy(net)
    optimizer, procrustes = begin(net)
    train(net, optimizer, 20)
    second, again = begin(other)
    train(other, second, interrupted_after)
    file = io.BytesIO()
    torch.save([other.state_dict(), second.state_dict(), again.state_dict()], file)
    file.seek(0)
    states = torch.load(file)  # plain Python and tensors
    resumed = Net()
    third, resumption = begin(resumed)
    for each, state in zip((resumed, third, resumption), states, strict=True):
        each.load_state_dict(state)
    assert resumption.report().seconds == again.report().seconds
    train(resumed, third, 20 - interrupted_after)
    assert same(weights(resumed), weights(net))
    assert 3 < procrustes.num_projections == resumption.num_projections < 10
    assert resumption.steps_since == procrustes.steps_since


# ------------------------------------------------------------------- kinds of weights


def test_the_memory_format_of_weights_is_kept(net):
    net.to(memory_format=torch.channels_last)
    optimizer = sgd(net)
    twin = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    Procrustes(["stem", "mix"], model=net).attach(optimizer)
    address = net.mix.weight.data_ptr()
    train(net, optimizer)
    assert net.mix.weight.is_contiguous(memory_format=torch.channels_last)
    assert not net.mix.weight.is_contiguous()
    assert net.mix.weight.data_ptr() == address
    other = sgd(twin)
    Procrustes(["stem", "mix"], model=twin).attach(other)
    train(twin, other)
    assert torch.allclose(net.mix.weight, twin.mix.weight, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_are_projected_as_well_as_they_can_be(net, dtype):
    net.to(dtype)
    optimizer = sgd(net)
    procrustes = Procrustes(["stem", "down", "mix"], model=net).attach(optimizer)
    train(net, optimizer, 2)
    assert procrustes.num_projections == 2
    assert net.down.weight.dtype == dtype
    assert is_flat(net.down, rel=8 * torch.finfo(dtype).eps)


def test_layers_of_several_precisions_go_together(net):
    net.down.to(torch.float64)
    net.stem.to(torch.bfloat16)
    Procrustes(["stem", "down", "head"], model=net).project()
    assert is_flat(net.down, rel=1e-12)
    assert values_of(net.head) == pytest.approx(1.0, rel=1e-5)


def test_a_weight_that_two_layers_share_is_projected_once():
    layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    layers["b"].weight = layers["a"].weight
    procrustes = Procrustes(["a", "b"], model=layers)
    assert [layer.name for layer in procrustes.layers] == ["a"]
    optimizer = sgd(layers)
    procrustes.attach(optimizer)
    layers["b"](layers["a"](torch.randn(3, 4))).sum().backward()
    optimizer.step()
    assert values_of(layers["b"]) == pytest.approx(1.0, rel=1e-5)


def test_a_projection_between_forward_and_backward_is_seen_by_autograd(net):
    loss = loss_of(net)
    Procrustes(net.mix).project()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", ["eigh", "newton-schulz", "svd"])
def test_autocast_does_not_reach_the_projection(net, method):
    twin = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Procrustes(["stem", "down", "mix"], model=net, method=method).project()
    Procrustes(["stem", "down", "mix"], model=twin, method=method).project()
    assert same(weights(net), weights(twin))


def test_inference_mode_leaves_nothing_behind():
    layer = nn.Conv1d(2, 3, 5)  # a shape of its own: what is kept for it is made here
    procrustes = Procrustes(layer)
    with torch.inference_mode():
        procrustes.report()
        procrustes.project()
        procrustes.penalty()
    assert not procrustes._before["layer 0"].is_inference()
    layer.double()
    with torch.inference_mode():
        procrustes.report()
    procrustes.penalty().backward()
    assert layer.weight.grad is not None
    optimizer = sgd(layer)
    procrustes.attach(optimizer)
    layer(torch.randn(1, 2, 5).double()).sum().backward()
    optimizer.step()


def test_requires_grad_grads_and_identity_of_weights_are_left_alone(net):
    loss_of(net).backward()
    gradient, weight = net.down.weight.grad.clone(), net.down.weight
    Procrustes(net.down).project()
    assert net.down.weight is weight
    assert weight.requires_grad
    assert weight.grad_fn is None
    assert torch.equal(weight.grad, gradient)
