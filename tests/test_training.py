"""The training loop: deterministic, resumable to the last bit, and honest about divergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from conditioning import GradientNorms
from experiments.models import ResidualMLP
from experiments.training import Recipe, Trainer, TrainingError, evaluate

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
