"""The experiment on the factor tau, small: verdicts, files, resuming, and that it can be bad."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch

from conditioning import theory
from conditioning.errors import InvalidArgumentError
from experiments import registry, tau_scaling
from experiments.claims import decide_every
from experiments.errors import DataFormatError
from experiments.models import TauStack
from experiments.sweep import RunInterrupted, parts
from experiments.tau_scaling import Sizes, chain, checks, curves, statements, verdicts
from experiments.tau_scaling.chain import norms_through
from experiments.tau_scaling.descent import Lanes, descend
from experiments.tau_scaling.laboratory import DESCENDING, Laboratory
from experiments.tau_scaling.nets import BN, BN_TAU, FREE, FREE_QUARTER, FREE_TAU
from experiments.tau_scaling.rules import LINEAR, ONE, QUARTER, RULES, SHARP
from experiments.tau_scaling.stack import Stack

PRESETS = dict(tau_scaling.PRESETS)
TINY = Sizes(
    summary="for tests",
    seeds=6,
    depths=(10, 100, 300, 1000),
    width=96,
    together=4,
    product_depths=(30, 100, 200),
    product_width=24,
    product_seeds=2,
    descent_depths=(6, 100),
    descent_width=24,
    descent_samples=8,
    descent_steps=30,
    image_depths=(6, 40),
    image_width=16,
    image_batch=32,
    image_epochs=0.3,
    descent_seeds=2,
    trained=(1, 2),
    trained_free=(1, 2),
    widths=(2, 4, 4),
    size=6,
    batch=64,
    epochs=0.2,
    augment=False,
    precision="float32",
    train_seeds=2,
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a small run, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tau_scaling.PRESETS, "quick", TINY)
        patch.setattr("experiments.tau_scaling.checks._NETS", 600)
        for module in ("verdicts", "figures"):
            patch.setattr(f"experiments.tau_scaling.{module}.MEAN_FIELD_DEPTH", 100)
        folder = tmp_path_factory.mktemp("tau_scaling")
        yield registry.options_for(tau_scaling, device="cpu", out=folder, progress=False)


@pytest.fixture(scope="module")
def decided(options):
    """The verdicts of that run, by the claims' ids."""
    return {verdict.claim.id: verdict for verdict in registry.run(tau_scaling, options)}


@pytest.fixture(scope="module")
def measured(decided, options):
    """What that run measured."""
    with dataclasses.replace(options, mode="resume").open_store() as store:
        return [(cell, store[cell]) for cell in tau_scaling.cells(TINY, options.seeds)]


def again(measured):
    """Verdicts by id, of measurements that were tampered with."""
    return {v.claim.id: v for v in verdicts.decide_claims(measured)}


def changed(measured, part, change, **where):
    """A copy with a function applied to the results of some cells."""
    copied = copy.deepcopy(list(measured))
    for cell, result in parts(copied, part, **where):
        change(cell, result)
    return copied


# -- norms ----------------------------------------------------------------------------------------


def test_vectors_have_the_law_of_matrices():
    # Means and spreads of 200 nets each, at a factor that makes a difference in both passes.
    depth, width, tau, count = 12, 24, 0.5, 200
    drawn = norms_through([tau], depth, width, count, 0)
    generator = torch.Generator().manual_seed(1)
    forward, backward = [], []
    for _ in range(count):
        net = TauStack(9, width, depth, 2, tau, generator=generator)
        x = torch.randn(1, 9, generator=generator, dtype=torch.float64)
        g = torch.randn(1, width, generator=generator, dtype=torch.float64)
        stack = Stack([tau], net.blocks.detach(), torch.relu(x @ net.stem.T))
        forward.append(float(stack.log_norms[-1, 0, 0]))
        backward.append(float(stack.backward(g)[0, 0]))
    for name, values in (("forward", forward), ("backward", backward)):
        ours, theirs = drawn[name][0].numpy(), np.array(values)
        error = math.sqrt((ours.var() + theirs.var()) / count)
        assert abs(ours.mean() - theirs.mean()) < 4 * error
        assert ours.std() == pytest.approx(theirs.std(), rel=0.25)


def law_of(monkeypatch, count=600):
    """Verdict of the check of the law, for fewer nets."""
    monkeypatch.setattr(checks, "_NETS", count)
    found = checks.law("cpu")
    measured = [one for what, groups in found.items() for one in verdicts._same_law(groups, what)]
    return decide_every(statements.BY_ID["check.law"], measured)


@pytest.mark.parametrize(
    "wrong",
    [
        "d + tau * fresh",
        "d + tau * (fresh - h * (z * d).sum(-1, keepdim=True))",
        "d + tau * (h * (z * d).sum(-1, keepdim=True) + unprojected)",
    ],
)
def test_the_check_of_the_law_sees_a_wrong_one(monkeypatch, wrong):
    assert law_of(monkeypatch).value == "holds"
    source = inspect.getsource(chain)
    right = "d + tau * (h * (z * d).sum(-1, keepdim=True) + fresh)"
    assert source.count(right) == 1
    if "unprojected" in wrong:
        line = "            fresh -= h * (h * fresh).sum(-1, keepdim=True)\n"
        assert line in source
        source, wrong = source.replace(line, ""), right
    space = {}
    exec(compile(source.replace(right, wrong), "chain", "exec"), space)
    monkeypatch.setattr(checks, "norms_through", space["norms_through"])
    assert law_of(monkeypatch).value == "fails"


def test_instruments_that_give_no_number_fail_to_hold(monkeypatch, measured):
    assert math.isnan(checks._largest([0.0, math.nan, 1.0]))
    monkeypatch.setattr(Stack, "backward", lambda *_: torch.full((1, 1), math.nan))
    found = checks.product("cpu")
    tampered = changed(measured, "check", lambda c, r: r.update(found), what="product")
    assert again(tampered)["check.norms"].value == "not decided"


def test_a_net_that_dies_is_named():
    with pytest.raises(InvalidArgumentError, match="width 2"):
        norms_through([3.0], 60, 2, 8, 0)


def test_a_gradient_ends_where_the_forward_pass_was_closed():
    # With tau -> 0 the positive half of h_0 stays open. The other half does a random walk that is
    # reflected at zero, and lets a gradient through if it never was at zero: for n steps that has
    # the probability binom(2n, n) / 4^n, whatever the law of the steps (Sparre Andersen).
    depth = 4
    drawn = norms_through([1e-4], depth, 4000, 4, 0)
    assert drawn["forward"].abs().max() < 1e-2
    through = 0.5 + 0.5 * math.comb(2 * depth, depth) / 4**depth
    assert float(drawn["backward"].exp().square().mean()) == pytest.approx(through, abs=0.02)


def test_segments_do_not_matter(monkeypatch):
    one = norms_through([0.2, 1.0], 37, 20, 3, 5)
    monkeypatch.setattr("experiments.tau_scaling.chain.math.isqrt", lambda _: 36)
    whole = norms_through([0.2, 1.0], 37, 20, 3, 5)
    for name, values in one.items():
        assert torch.equal(values, whole[name]), name
    assert (one["steepest"] >= one["flattest"]).all()
    assert (one["highest"] >= one["forward"]).all()


def test_very_deep_nets_do_not_overflow():
    logs = norms_through([1.0], 3000, 16, 2, 0)
    for values in logs.values():
        assert values.isfinite().all()
    assert logs["forward"].min() > math.log(1e300)


def test_products_whose_norm_leaves_float64_are_refused():
    blocks = torch.full((200, 4, 4), 30.0, dtype=torch.float64)
    stack = Stack([1.0], blocks, torch.ones(1, 4, dtype=torch.float64))
    with pytest.raises(OverflowError, match="1e150"):
        stack.product(0, 0)


def test_the_product_is_that_of_dense_matrices():
    net = TauStack(5, 12, 23, 2, 0.4, generator=torch.Generator().manual_seed(3))
    x = torch.rand(2, 12, dtype=torch.float64)
    stack = Stack([0.1, 0.4], net.blocks.detach(), x)
    for rule, tau in enumerate((0.1, 0.4)):
        h, dense = x[1], torch.eye(12, dtype=torch.float64)
        for weight in net.blocks.detach():
            step = torch.eye(12, dtype=torch.float64) + tau * weight
            mask = (step @ h > 0).double()
            h, dense = mask * (step @ h), mask[:, None] * (step @ dense)
        found = stack.spectral_norm(rule, 1, 0, rtol=1e-6).largest
        truth = float(torch.linalg.matrix_norm(dense, 2))
        assert found.low <= truth * (1 + 1e-12)
        assert truth <= found.high * (1 + 1e-12)
        assert float(stack.log_norms[-1, rule, 1].exp()) == pytest.approx(
            float(h.norm() / x[1].norm())
        )


# -- descent --------------------------------------------------------------------------------------


def test_descent_of_many_nets_is_that_of_torch():
    nets = [
        TauStack(4, 10, 3, 2, tau, generator=torch.Generator().manual_seed(seed))
        for seed, tau in enumerate((0.1, 0.8))
    ]
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    losses = descend(Lanes.of(nets), lambda _, some: (x[some], y[some]), 0.05, 12)
    for index, net in enumerate(nets):
        optimizer = torch.optim.SGD([net.blocks, net.last], lr=0.05)
        for step in range(12):
            optimizer.zero_grad()
            loss = (net(x[index]) - y[index]).square().sum() / 12
            assert float(losses[step, index]) == pytest.approx(loss.item(), rel=1e-10)
            loss.backward()
            optimizer.step()


def test_a_net_that_diverges_leaves_the_others_alone():
    nets = [
        TauStack(4, 10, 6, 2, tau, generator=torch.Generator().manual_seed(1))
        for tau in (0.1, 40.0, 0.1)
    ]
    x, y = torch.ones(3, 5, 4, dtype=torch.float64), torch.ones(3, 5, 2, dtype=torch.float64)
    lanes = Lanes.of(nets)
    losses = descend(lanes, lambda _, some: (x[some], y[some]), 0.02, 40)
    # The caller's weights are those at the end.
    left = (lanes.outputs(x) - y).square().sum((1, 2)) / 10
    assert left[0] < 0.9 * losses[0, 0]
    assert left[0] == left[2] <= losses[-1, 0]
    assert losses[:, [0, 2]].isfinite().all()
    assert torch.equal(losses[:, 0], losses[:, 2])
    assert losses[-1, 1] == math.inf
    first = int(losses[:, 1].isinf().int().argmax())
    assert losses[first:, 1].isinf().all()
    alone = descend(Lanes.of(nets[:1]), lambda _, some: (x[some], y[some]), 0.02, 40)
    torch.testing.assert_close(alone[:, 0], losses[:, 0])
    everything = descend(Lanes.of(nets[1:2]), lambda _, some: (x[some], y[some]), 0.02, 40)
    assert everything[-1, 0] == math.inf


def test_steps_to_a_level():
    rows = np.array([[4.0, 1.0], [2.0, 3.0], [0.5, 2.0]])
    assert curves.steps_to(rows, 1.0).tolist() == [2.0, 0.0]
    assert curves.steps_to(rows, 0.6).tolist() == [2.0, math.inf]


# -- the run --------------------------------------------------------------------------------------


def test_what_only_a_mistake_could_break_holds(decided):
    named = [c.id for c in statements.CLAIMS if c.statement.startswith(statements.CHECK)]
    assert named == [
        "check.product", "check.norms", "check.descent", "check.law", "forward.bounds",
        "converse.squared",
    ]  # fmt: skip
    for name in named[:4]:
        assert decided[name].value == "holds"


def test_what_is_sure_at_any_size_holds(decided):
    for name in (
        "converse.growth", "descent.diverges",
    ):  # fmt: skip
        assert decided[name].value == "holds", name


def test_every_file_is_written(decided, options):
    names = {path.name for path in options.out.iterdir()}
    assert {
        "norms.csv", "products.csv", "descent.csv", "descent_ends.csv", "resnets.csv",
        "norms.png", "products.png", "descent.png", "resnets.png", "verdicts.json",
    } <= names  # fmt: skip
    assert "checkpoints" not in names
    norms = pd.read_csv(options.out / "norms.csv")
    forward = norms[(norms.quantity == "forward") & (norms.tau == ONE) & (norms.L == 1000)]
    assert forward.mean_log.iloc[0] == pytest.approx(
        theory.mean_field_log_growth(1.0, 1000), rel=0.05
    )
    resnets = pd.read_csv(options.out / "resnets.csv")
    assert len(resnets) == (3 * 2 + 2) * 2
    # The authors' errors are those on CIFAR-10.
    assert resnets.error_in_the_paper_percent.isna().all()


def test_an_interrupted_run_ends_like_a_whole_one(options, decided, tmp_path, monkeypatch):
    measure, count = Laboratory.measure, 0

    def interrupted(self, cell):
        nonlocal count
        count += 1
        if count in (5, 12):
            raise KeyboardInterrupt
        return measure(self, cell)

    monkeypatch.setattr(Laboratory, "measure", interrupted)
    monkeypatch.setattr("experiments.tau_scaling.figures.draw", lambda *_: None)
    again_options = dataclasses.replace(options, out=tmp_path)
    for _ in range(2):
        with pytest.raises(RunInterrupted):
            registry.run(tau_scaling, again_options)
    registry.run(tau_scaling, again_options)
    for name in ("norms.csv", "products.csv", "descent.csv", "resnets.csv", "verdicts.json"):
        assert (tmp_path / name).read_bytes() == (options.out / name).read_bytes(), name
    assert count == 2 + len(tau_scaling.cells(TINY, options.seeds))


def test_presets_are_complete():
    for preset in PRESETS.values():
        found = tau_scaling.cells(preset, preset.seeds)
        more = tau_scaling.cells(preset, preset.seeds + 1)
        assert {cell["part"] for cell in found} == {
            "check", "norms", "product", "descent", "images", "train"
        }  # fmt: skip
        assert len(parts([(c, {}) for c in more], "train", net=BN)) == (preset.seeds + 1) * len(
            preset.trained
        )
        assert all(tau_scaling._cost(cell, preset) > 0 for cell in found)


def test_data_that_are_no_images(tmp_path, monkeypatch):
    monkeypatch.setitem(tau_scaling.PRESETS, "quick", TINY)
    np.savez(
        tmp_path / "odd.npz", x=np.random.default_rng(0).normal(size=(90, 7)), y=[0, 1, 2] * 30
    )
    np.savez(
        tmp_path / "few.npz", x=np.random.default_rng(0).normal(size=(60, 5, 5)), y=[0, 1] * 30
    )
    for name, text in (("odd", "no square image"), ("few", "leaves 48 images.*takes 64")):
        options = registry.options_for(
            tau_scaling, data_name=str(tmp_path / f"{name}.npz"), device="cpu", out=tmp_path,
            progress=False,
        )  # fmt: skip
        with pytest.raises(DataFormatError, match=text):
            registry.run(tau_scaling, options)


def test_other_images_with_other_classes_are_taken(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 4
    images = rng.normal(size=(160, 3, 9, 9)) + labels[:, None, None, None]
    np.savez(tmp_path / "small.npz", x=images, y=labels)
    options = registry.options_for(
        tau_scaling, data_name=str(tmp_path / "small.npz"), device="cpu", out=tmp_path,
        progress=False,
    )  # fmt: skip
    laboratory = Laboratory(options.dataset, TINY, "cpu", tmp_path / "checkpoints")
    found = laboratory.measure({"part": "images", "L": 5, "seeds": 2})
    assert np.shape(found["errors"]) == (len(DESCENDING), 2)
    net = laboratory.measure({"part": "train", "net": FREE_TAU, "n": 1, "seed": 0})
    assert net["chance"] == pytest.approx(math.log(4))
    assert net["tau"] != pytest.approx(3**-0.5)  # it is trained


def test_errors_are_those_of_trained_nets_though_others_diverged(options, tmp_path):
    sizes = dataclasses.replace(TINY, image_epochs=6.0, image_width=32, image_batch=16)
    laboratory = Laboratory(options.dataset, sizes, "cpu", tmp_path)
    found = laboratory.measure({"part": "images", "L": 40, "seeds": 2})
    ends = np.asarray(found["losses"])[-1]
    assert np.isinf(ends[DESCENDING.index(QUARTER)]).all()
    # Guessing is right once in ten times.
    assert found["errors"][:2].max() < 0.6


def test_every_net_has_its_own_samples(options, tmp_path, monkeypatch):
    seen = []

    def batches(lanes, batch, rate, steps):
        seen.append(batch(0, torch.arange(len(lanes))))
        return torch.zeros(steps, len(lanes))

    monkeypatch.setattr("experiments.tau_scaling.laboratory.descend", batches)
    laboratory = Laboratory(options.dataset, TINY, "cpu", tmp_path)
    for part in ("descent", "images"):
        laboratory.measure({"part": part, "L": 5, "seeds": 2})
    for x, _ in seen:
        assert len(x) == 6
        assert len({one.sum().item() for one in x}) == 6


# -- that verdicts can be bad ---------------------------------------------------------------------


def norm_of(rule, values):
    """A change of the logarithm of the forward norm at a factor."""
    place = list(RULES).index(rule)

    def change(cell, result):
        rows = np.asarray(result["forward"], float)
        rows[place] = values(cell["L"], rows[place])
        result["forward"] = rows

    return change


@pytest.mark.parametrize(
    ("rule", "values", "claim"),
    [
        (SHARP, lambda depth, x: x + 0.2 * math.log(depth), "forward.stable"),
        (SHARP, lambda depth, x: x + 0.5, "forward.limit"),
        (ONE, lambda depth, x: 1.2 * x, "forward.mean-field"),
        (ONE, lambda depth, x: 1.5 * x, "forward.bounds"),
        (QUARTER, lambda depth, x: 0.1 * x, "converse.growth"),
        (QUARTER, lambda depth, x: 0.1 * x, "converse.squared"),
        (QUARTER, lambda depth, x: 0 * x + math.log(depth), "converse.stretched"),
        (ONE, lambda depth, x: 0.3 * depth + 0 * x, "converse.rate"),
        (ONE, lambda depth, x: 2 * x, "backward.explodes"),
    ],
)
def test_wrong_norms_fail(measured, rule, values, claim):
    found = again(changed(measured, "norms", norm_of(rule, values)))
    assert found[claim].value == "fails"


def test_one_net_at_each_depth_decides_nothing_about_norms(measured):
    def first(_, result):
        for name, rows in result.items():
            result[name] = np.asarray(rows)[:, :1]

    one = [(c, r) for c, r in measured if c["part"] != "norms" or c["first"] == 0]
    found = again(changed(one, "norms", first))
    for name in ("forward.stable", "forward.limit", "forward.mean-field", "backward.stable"):
        assert found[name].value == "not decided", name


def test_products_that_grow_fail(measured):
    def grow(cell, result):
        for found in result["spectral_norm"].values():
            for end in ("value", "low", "high"):
                found[end] = float(cell["L"]) * (1 + 0.01 * cell["seed"])

    assert again(changed(measured, "product", grow))["product.stable"].value == "fails"

    def small(_, result):
        for found in result["spectral_norm"].values():
            for end in ("value", "low", "high"):
                found[end] = 1.01

    found = again(changed(measured, "product", small))
    assert found["product.explodes"].value == found["product.constant"].value == "fails"


def losses(measured, part, values):
    """Losses of a descent replaced by a function of depth and factor, for four seeds."""

    def change(cell, result):
        steps = np.arange(60)[:, None]
        rows = [values(cell["L"], rule, steps) * np.ones((60, 4)) for rule in DESCENDING]
        noise = 1 + 1e-3 * np.arange(4)
        result["losses"] = np.stack(rows, axis=1) * noise
        result["errors"] = np.zeros((len(DESCENDING), 4))

    return again(changed(measured, part, change))


def test_descent_that_slows_with_depth_fails(measured):
    found = losses(
        measured, "descent", lambda depth, rule, step: 0.5 * 0.9 ** (step * 6 / depth**0.3)
    )
    assert found["descent.depth-free"].value == "fails"
    assert found["descent.global"].value == "holds"
    assert found["descent.diverges"].value == "fails"
    fine = losses(
        measured,
        "descent",
        lambda depth, rule, step: (
            0.5 * {LINEAR: 0.93, SHARP: 0.9}[rule] ** step if rule != QUARTER else step + math.inf
        ),
    )
    for name in ("depth-free", "global", "sharp-faster", "diverges"):
        assert fine[f"descent.{name}"].value == "holds", name
    worse = losses(
        measured,
        "descent",
        lambda depth, rule, step: 0.5 * (0.99 if rule == SHARP else 0.9) ** step,
    )
    assert worse["descent.sharp-faster"].value == "fails"
    assert worse["descent.global"].value == "fails"
    # A level that no net reaches says nothing about the number of steps.
    assert worse["descent.depth-free"].value == "not decided"
    # One that deep nets do not reach says that they need at least those made.
    late = losses(
        measured,
        "descent",
        lambda depth, rule, step: (
            0.5 * (0.9 if depth > 50 else 0.1) ** step / (2 if depth < 50 else 1)
        ),
    )
    assert late["descent.global"].value == "holds"
    censored = losses(
        measured, "descent", lambda depth, rule, step: 0.5 * (0.99 if depth > 50 else 0.5) ** step
    )
    assert censored["descent.global"].value == "fails"
    assert censored["descent.depth-free"].value == "fails"
    assert censored["descent.depth-free"].high == math.inf


def test_images_that_are_not_learnt_fail(measured):
    found = losses(measured, "images", lambda depth, rule, step: 0.4 + 0 * step)
    assert found["images.train"].value == "fails"
    assert found["images.diverges"].value == "fails"
    assert found["images.sharp-faster"].value == "not decided"


def trained(measured, errors, ends):
    """Trainings with errors by net and size, and losses by net."""
    rng = np.random.default_rng(0)

    def change(cell, result):
        result["status"] = "diverged" if math.isinf(ends[cell["net"]]) else "finished"
        result["loss"] = ends[cell["net"]] * result["chance"] * (1 + 0.01 * rng.random())
        result["final_error"] = errors(cell["net"], cell["n"]) + 1e-4 * rng.random()

    copied = [pair for pair in measured if pair[0]["part"] != "train"]
    some = parts(measured, "train", seed=0)
    copied += [({**c, "seed": seed}, dict(r)) for c, r in some for seed in range(4)]
    return again(changed(copied, "train", change))


GOOD = {BN: 0.1, BN_TAU: 0.1, FREE_TAU: 0.1, FREE_QUARTER: 0.6, FREE: math.inf}


def test_resnets_can_hold_and_fail(measured):
    as_in_the_paper = trained(
        measured, lambda net, n: 0.08 + (0.05 * n if net == BN else -0.01 * n), GOOD
    )
    for name in ("deep", "gain-grows", "degradation", "no-degradation"):
        assert as_in_the_paper[f"bn.{name}"].value == "holds", name
    for name in ("train", "without", "larger"):
        assert as_in_the_paper[f"free.{name}"].value == "holds", name
    reverse = trained(
        measured,
        lambda net, n: 0.08 + (0.3 * n if net == BN_TAU else -0.01 * n),
        {BN: 0.1, BN_TAU: 0.1, FREE_TAU: 1.2, FREE_QUARTER: 0.1, FREE: 0.1},
    )
    for name in ("deep", "gain-grows", "degradation", "no-degradation"):
        assert reverse[f"bn.{name}"].value == "fails", name
    for name in ("train", "without", "larger"):
        assert reverse[f"free.{name}"].value == "fails", name


def test_one_depth_cannot_tell_how_a_gain_grows(measured):
    one = [(c, r) for c, r in measured if c["part"] != "train" or c["n"] == 1]
    found = again(one)
    for name in ("gain-grows", "degradation", "no-degradation"):
        assert found[f"bn.{name}"].value == "not decided", name
