"""The training loop: deterministic, resumable to the last bit, and honest about divergence."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from conditioning import GradientNorms
from experiments.models import ResidualMLP
from experiments.training import Evaluation, Recipe, Trainer, TrainingError, evaluate

RECIPE = Recipe(
    num_steps=20, batch_size=8, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3,
    milestones=(0.5,),
)  # fmt: skip


def data(count=30):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, 0] > 0).long()


def model(seed=0, dropout=0.3):
    net = ResidualMLP(6, 8, 2, 2, generator=torch.Generator().manual_seed(seed))
    net.head.insert(0, nn.Dropout(dropout))
    return net


def noisy(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def trainer(recipe=RECIPE, *, seed=0, net=None, **options):
    return Trainer(net or model(), *data(), recipe, seed=seed, **options)


def weights(one):
    return [t.clone() for t in one.model.state_dict().values()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_training_lowers_the_loss_and_says_how_it_went():
    net = model(dropout=0.0)
    before, _ = evaluate(net, *data())
    result = Trainer(net, *data(), Recipe(num_steps=60, batch_size=10, lr=0.1)).run()
    assert (result.status, result.num_steps, result.message) == ("finished", 60, "")
    assert len(result.losses) == 60
    after, accuracy = evaluate(net, *data())
    assert after < 0.5 * before
    assert accuracy > 0.9


def test_the_loop_is_plain_sgd():
    net, (x, y) = nn.Linear(6, 2), data()
    start = [p.detach().clone().requires_grad_() for p in net.parameters()]
    one = Trainer(net, x, y, Recipe(num_steps=3, batch_size=8, lr=0.1, milestones=(0.5,)), seed=4)
    batches = [one.batch(step) for step in range(3)]
    one.run()
    for (inputs, targets), lr in zip(batches, (0.1, 0.1, 0.01), strict=True):
        outputs = inputs @ start[0].T + start[1]
        grads = torch.autograd.grad(nn.functional.cross_entropy(outputs, targets), start)
        start = [(p - lr * g).detach().requires_grad_() for p, g in zip(start, grads, strict=True)]
    for found, expected in zip(net.parameters(), start, strict=True):
        torch.testing.assert_close(found, expected)


def test_an_epoch_visits_each_sample_once_in_an_order_of_its_own():
    x = torch.arange(12.0)[:, None]
    one = Trainer(nn.Linear(1, 2), x, x[:, 0].long(), Recipe(num_steps=8, batch_size=3, lr=0.0))
    assert one.steps_per_epoch == 4
    epochs = [
        torch.cat([one.batch(4 * epoch + place)[0].flatten() for place in range(4)])
        for epoch in range(2)
    ]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    inputs, targets = one.batch(5)
    assert torch.equal(inputs[:, 0].long(), targets)


def test_the_seed_decides_and_nothing_else():
    first = trainer(seed=1, transform=noisy)
    first_result = first.run()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        second = trainer(seed=1, transform=noisy)
        assert second.run() == first_result
    assert same(weights(first), weights(second))
    assert trainer(seed=2, transform=noisy).run().losses != first_result.losses


def test_the_callers_random_state_and_mode_are_left_alone():
    net = model().eval()
    state = torch.random.get_rng_state()
    trainer(net=net, transform=noisy).run()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not net.training


def test_a_resumed_training_is_the_same_to_the_last_bit(tmp_path):
    def tracked():
        net = model()
        norms = GradientNorms(net, net.block_names, every=3)
        return trainer(net=net, transform=noisy, stateful=[norms]), norms

    whole, whole_norms = tracked()
    with whole_norms:
        result = whole.run()
    cut, cut_norms = tracked()
    with cut_norms:
        assert cut.run(7).num_steps == 7
    cut.save(tmp_path / "half.pt")
    resumed, norms = tracked()
    resumed.load(tmp_path / "half.pt")
    with norms:
        assert resumed.run() == result
    assert same(weights(resumed), weights(whole))
    assert norms.ratios().equals(whole_norms.ratios())


def test_a_training_that_was_killed_continues_from_its_checkpoint(tmp_path):
    path = tmp_path / "folder" / "run.pt"
    whole = trainer().run()
    killed = trainer(callbacks=[interrupt_at(9)])
    with pytest.raises(KeyboardInterrupt):
        killed.run(checkpoint=path, checkpoint_every=4)
    seen = []
    resumed = trainer(callbacks=[lambda _, step: seen.append(step.index)])
    assert resumed.run(checkpoint=path, checkpoint_every=4) == whole
    assert seen == list(range(8, 20))
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


def interrupt_at(index):
    def callback(_, step):
        if step.index == index:
            raise KeyboardInterrupt

    return callback


def test_callbacks_are_told_of_every_step():
    steps = []
    one = trainer(callbacks=[lambda t, step: steps.append((t, step))])
    result = one.run()
    assert all(t is one for t, _ in steps)
    told = [step for _, step in steps]
    assert [step.index for step in told] == list(range(20))
    assert [step.epoch for step in told] == [index // 3 for index in range(20)]
    assert [step.loss for step in told] == list(result.losses)
    assert told[9].lr == 0.1
    assert told[10].lr == pytest.approx(0.01)


def test_a_loss_that_is_not_finite_ends_the_training_as_diverged():
    net = ResidualMLP(6, 8, 6, 2, bn=False, generator=torch.Generator().manual_seed(0))
    wild = Recipe(num_steps=50, batch_size=8, lr=1e6)
    one = Trainer(net, *data(), wild)
    result = one.run()
    assert result.status == "diverged"
    assert result.num_steps < 50
    assert len(result.losses) == result.num_steps + 1
    assert not math.isfinite(result.losses[-1])
    assert all(math.isfinite(loss) for loss in result.losses[:-1])
    assert result.message.startswith("loss ")
    assert result.message.endswith(f"at step {result.num_steps}")
    assert one.run() == result


def test_a_loss_above_the_limit_ends_it_too():
    recipe = Recipe(num_steps=50, batch_size=8, lr=0.1, divergence=1e-3)
    result = trainer(recipe).run()
    assert (result.status, result.num_steps, len(result.losses)) == ("diverged", 0, 1)


def test_parameters_that_the_last_step_ruined_are_noticed():
    net = nn.Linear(6, 2)
    result = Trainer(
        net, *data(), Recipe(num_steps=1, batch_size=8, lr=1e38, weight_decay=1e10)
    ).run()
    assert result.status == "diverged"
    assert result.message == "parameters are not finite after step 0"


def test_evaluation_is_a_mean_over_samples_in_evaluation_mode():
    net, (x, y) = model(dropout=0.9), data()
    net.train()
    loss, accuracy = evaluate(net, x, y, batch_size=7)
    assert net.training
    net.eval()
    outputs = net(x)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(outputs, y).detach()), rel=1e-5)
    assert accuracy == float((outputs.argmax(1) == y).double().mean())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_steps": -1}, "num_steps >= 0"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"batch_size": 31}, "got 30 inputs and 30 targets for batches of 31"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, float16, got 'half'"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, match):
    with pytest.raises(TrainingError, match=match):
        trainer(Recipe(**{"num_steps": 1, "batch_size": 8, "lr": 0.1, **options}))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    trainer().save(tmp_path / "one.pt")
    for other in (trainer(seed=1), trainer(Recipe(num_steps=20, batch_size=8, lr=0.2))):
        with pytest.raises(TrainingError, match="made with another recipe"):
            other.load(tmp_path / "one.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="no checkpoint that can be read"):
        trainer().load(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"evaluation": (torch.zeros(3, 6), torch.zeros(2))}, "3 inputs and 2 targets to evaluate"),
        ({"evaluation": (torch.zeros(0, 6), torch.zeros(0))}, "at least one, are needed"),
        ({"evaluate_every": 0}, "must be at least 1, got 1 and 0"),
        ({"sync_every": 0}, "must be at least 1, got 0 and None"),
        ({"ranks": "all"}, "ranks must be 'auto' or None, got 'all'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, match):
    with pytest.raises(TrainingError, match=match):
        trainer(**options)


def test_batches_can_be_asked_for_in_any_order():
    one = trainer()
    assert one.steps_per_epoch == 3
    steps = [0, 5, 1, 4, 0, 19, 5]
    asked = {step: one.batch(step) for step in steps}
    for step, found in asked.items():
        assert same(trainer().batch(step), found)


# -- precision ----------------------------------------------------------------------------------


def short(precision, **changes):
    return dataclasses.replace(RECIPE, precision=precision, **changes)


def test_bfloat16_is_autocast_of_the_forward_pass_and_the_loss():
    net, (x, y) = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), data()
    start = [p.detach().clone() for p in net.parameters()]
    recipe = Recipe(num_steps=1, batch_size=30, lr=0.5, precision="bfloat16")
    result = Trainer(net, x, y, recipe).run()

    def rounded(t):
        return t.bfloat16()

    params = [p.requires_grad_() for p in start]
    hidden = torch.tanh(nn.functional.linear(*map(rounded, (x, *params[:2]))))
    outputs = nn.functional.linear(hidden, *map(rounded, params[2:]))
    loss = nn.functional.cross_entropy(outputs.float(), y)
    assert result.losses[0] == pytest.approx(float(loss.detach()), abs=1e-3)
    grads = torch.autograd.grad(loss, params)
    for found, before, grad in zip(net.parameters(), start, grads, strict=True):
        assert found.dtype == torch.float32
        # The order of samples differs, and sums over them are rounded to 8 bits.
        torch.testing.assert_close(found, before - 0.5 * grad, rtol=0.0, atol=4e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_short_precisions_train_and_resume_to_the_last_bit(tmp_path, precision):
    recipe, options = short(precision), {"transform": noisy, "evaluation": data(12)}
    whole = trainer(recipe, **options)
    result = whole.run()
    assert result.status == "finished"
    exact = trainer(**options).run()
    assert result.losses != exact.losses
    # Later ones part company: dropout draws other numbers for another dtype.
    assert result.losses[0] == pytest.approx(exact.losses[0], abs=0.01)
    assert (whole.scaler is not None) == (precision == "float16")
    cut = trainer(recipe, **options)
    cut.run(7, checkpoint=tmp_path / "half.pt", checkpoint_every=7)
    resumed = trainer(recipe, **options)
    assert resumed.run(checkpoint=tmp_path / "half.pt") == result
    assert same(weights(resumed), weights(whole))


def test_another_precision_is_another_recipe(tmp_path):
    trainer().save(tmp_path / "one.pt")
    with pytest.raises(TrainingError, match="made with another recipe"):
        trainer(short("bfloat16")).load(tmp_path / "one.pt")


def test_a_step_that_overflows_is_left_out_and_counted(tmp_path):
    def overflowing(told):
        # Too large for any gradient in float16, until it has been halved often enough.
        one = trainer(short("float16"), callbacks=[lambda _, step: told.append(step)])
        one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return one

    told = []
    one = overflowing(told)
    before = weights(one)
    first = one.run(1)
    assert (first.num_steps, first.num_skipped) == (1, 1)
    assert told[0].skipped
    parameters = {name for name, _ in one.model.named_parameters()}
    for (name, now), old in zip(one.model.state_dict().items(), before, strict=True):
        assert name not in parameters or torch.equal(now, old)
    result = one.run()
    assert (result.status, result.num_steps, len(result.losses)) == ("finished", 20, 20)
    assert result.num_skipped == sum(step.skipped for step in told)
    assert 1 <= result.num_skipped < 10
    assert one.scaler.get_scale() == 2.0 ** (20 - result.num_skipped)
    # The scale is part of the checkpoint: a resumed training does not overflow anew.
    one.save(tmp_path / "all.pt")
    again = overflowing([])
    again.load(tmp_path / "all.pt")
    assert again.scaler.get_scale() == one.scaler.get_scale()
    assert again.run() == result


def test_a_model_in_float64_stays_in_float64():
    net = nn.Linear(6, 2).double()
    x, y = data()
    result = Trainer(net, x.double(), y, Recipe(num_steps=2, batch_size=8, lr=0.1)).run()
    assert net.weight.dtype == torch.float64
    assert result.losses[0] != torch.tensor(result.losses[0]).float().item()


def test_evaluation_has_the_precision_that_it_is_asked_for():
    net, (x, y) = model(), data()
    exact, _ = evaluate(net, x, y)
    rounded, _ = evaluate(net, x, y, precision="bfloat16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)
    with pytest.raises(TrainingError, match="precision must be one of"):
        evaluate(net, x, y, precision="int8")


# -- evaluation during the training -------------------------------------------------------------


def held_out():
    return data(41)[0][30:], data(41)[1][30:]


def test_the_error_is_recorded_after_each_epoch_and_at_the_end():
    result = trainer(evaluation=held_out()).run()
    assert [(one.step, one.epoch) for one in result.evaluations] == [
        *[(3 * epoch, epoch) for epoch in range(1, 7)],
        (20, 6),
    ]
    every = trainer(evaluation=held_out(), evaluate_every=10).run()
    assert [one.step for one in every.evaluations] == [10, 20]
    assert every.evaluations[-1] == result.evaluations[-1]


def test_what_is_recorded_is_what_evaluate_finds():
    one = trainer(evaluation=held_out())
    result = one.run(6)
    loss, right = evaluate(one.model, *held_out())
    last = result.evaluations[-1]
    assert last == Evaluation(6, 2, loss, last.error)
    assert last.error == pytest.approx(1 - right, abs=1e-15)


def test_evaluation_does_not_disturb_the_training():
    def tracked(**options):
        net = model()  # draws dropout, and has batch normalisation
        norms = GradientNorms(net, net.block_names)
        one = trainer(net=net, transform=noisy, stateful=[norms], **options)
        with norms:
            return one.run(), weights(one), norms.ratios()

    alone, alone_weights, alone_ratios = tracked()
    draws = []

    def drawing(outputs, targets):
        # A loss that draws, and would shift all later draws of dropout.
        if not outputs.requires_grad:
            draws.append(torch.rand(3))
        return nn.functional.cross_entropy(outputs, targets)

    result, its_weights, ratios = tracked(evaluation=held_out(), evaluate_every=2, loss=drawing)
    assert len(draws) == len(result.evaluations) == 10
    assert dataclasses.replace(result, evaluations=()) == alone
    assert same(its_weights, alone_weights)
    assert ratios.equals(alone_ratios)


def test_a_part_that_is_frozen_in_evaluation_mode_stays_so():
    net = model().train()
    net.head.eval()
    before = [module.training for module in net.modules()]
    evaluate(net, *data())
    assert [module.training for module in net.modules()] == before
    assert len(set(before)) == 2


def test_final_and_best_error():
    one = trainer(evaluation=held_out())
    part = one.run(7)
    assert part.final_error is None  # it was evaluated at step 6
    assert part.best_error == min(e.error for e in part.evaluations)
    result = one.run()
    assert result.final_error == result.evaluations[-1].error
    assert result.best_error == min(e.error for e in result.evaluations)
    without = trainer().run()
    assert (without.final_error, without.best_error, without.evaluations) == (None, None, ())


def test_a_diverged_training_has_no_final_error():
    net = ResidualMLP(6, 8, 6, 2, bn=False, generator=torch.Generator().manual_seed(0))
    wild = Recipe(num_steps=50, batch_size=8, lr=5.0)
    result = Trainer(net, *data(), wild, evaluation=held_out(), evaluate_every=1).run()
    assert result.status == "diverged"
    assert [e.step for e in result.evaluations] == list(range(1, result.num_steps + 1))
    assert result.final_error is None
    assert result.best_error is not None


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_evaluations_survive_an_interruption(tmp_path, stop):
    path = tmp_path / "run.pt"
    whole = trainer(evaluation=held_out()).run()
    with pytest.raises(KeyboardInterrupt):
        trainer(evaluation=held_out(), callbacks=[interrupt_at(stop)]).run(checkpoint=path)
    assert trainer(evaluation=held_out()).run(checkpoint=path) == whole


def test_a_checkpoint_of_another_evaluation_is_refused(tmp_path):
    trainer(evaluation=held_out()).save(tmp_path / "one.pt")
    for options in ({}, {"evaluation": data(7)}, {"evaluation": held_out(), "evaluate_every": 2}):
        with pytest.raises(TrainingError, match="evaluation"):
            trainer(**options).load(tmp_path / "one.pt")


# -- losses that are read now and then ----------------------------------------------------------


@pytest.mark.parametrize("every", [2, 7, 100])
def test_reading_losses_seldom_changes_nothing(tmp_path, every):
    options = {"transform": noisy, "evaluation": held_out()}
    whole = trainer(**options)
    result = whole.run()
    seldom = trainer(sync_every=every, **options)
    assert seldom.run(8).losses == result.losses[:8]
    seldom.save(tmp_path / "half.pt")
    resumed = trainer(sync_every=every, **options)
    resumed.load(tmp_path / "half.pt")
    assert resumed.run() == result
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("every", [2, 7, 100])
def test_divergence_that_is_seen_late_is_told_with_its_step(every):
    def wild(**options):
        net = ResidualMLP(6, 8, 6, 2, bn=False, generator=torch.Generator().manual_seed(0))
        recipe = Recipe(num_steps=50, batch_size=8, lr=5.0)
        return Trainer(net, *data(), recipe, evaluation=held_out(), **options)

    one = wild(sync_every=every)
    late, soon = one.run(), wild().run()
    assert soon.num_steps > 0
    assert repr(late) == repr(soon)  # NaN equals nothing but its own text
    assert one.run() == late


def test_with_callbacks_every_loss_is_read():
    told = []
    one = trainer(sync_every=5, callbacks=[lambda _, step: told.append(step.loss)])
    result = one.run()
    assert len(told) == 20
    assert result.losses == tuple(told)
