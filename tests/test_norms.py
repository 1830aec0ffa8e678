"""Recorded norms against ``torch.autograd.grad`` at the borders of blocks."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from architectures import ZOO
from boundaries import boundaries, run, squares
from torch import nn

from conditioning import GradientNorms, HessianOperator
from conditioning.errors import BlockNotSeenWarning

RTOL = 1e-12


def one_step(model, inputs, norms, loss=squares):
    loss(run(model, inputs)).backward()
    norms.step()


def assert_agrees(norms, expected):
    """Every call in the frame against the truth, in order."""
    frame = norms.to_frame()
    truth = {}
    for border in expected:
        truth.setdefault(border.block, []).append(border)
    compared = 0
    for name, borders in truth.items():
        rows = frame[frame.block == name].pivot(index="call", columns="quantity", values="value")
        assert len(rows) == len(borders), name
        for border, (_, row) in zip(borders, rows.iterrows(), strict=True):
            for quantity in ("grad_in", "grad_out", "act_in", "act_out"):
                wanted = getattr(border, quantity)
                if wanted is None:
                    assert quantity not in row or math.isnan(row[quantity])
                else:
                    assert row[quantity] == pytest.approx(wanted, rel=RTOL), (name, quantity)
                    compared += 1
            if border.grad_in is not None:
                ratio = border.grad_in / border.grad_out
                assert row["ratio"] == pytest.approx(ratio, rel=RTOL)
    assert compared >= 3 * len(expected)


@pytest.mark.parametrize("name", ZOO)
def test_norms_agree_with_autograd_on_every_architecture(name):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    blocks = ["lstm", "head"] if name == "lstm" else None
    norms = GradientNorms(model, blocks)
    state = torch.get_rng_state()
    expected = boundaries(model, inputs, norms.blocks)
    torch.set_rng_state(state)
    with norms:
        one_step(model, inputs, norms)
    assert_agrees(norms, expected)


@pytest.mark.parametrize("name", ["preact_resnet", "encoder_postnorm", "gpt_dicts", "convnext"])
def test_tracking_changes_nothing_about_training(name):
    def train(tracked):
        torch.manual_seed(0)
        model, inputs = ZOO[name]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        tracker = GradientNorms(model, shares=True) if tracked else contextlib.nullcontext()
        with tracker:
            for _ in range(3):
                optimizer.zero_grad()
                squares(run(model, inputs)).backward()
                optimizer.step()
        return model, torch.get_rng_state()

    (plain, state), (tracked, tracked_state) = train(False), train(True)
    assert torch.equal(state, tracked_state)
    for (key, one), two in zip(
        plain.state_dict().items(), tracked.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in tracked.modules())


def chain(depth=3, width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh())
                           for _ in range(depth))).double()  # fmt: skip


NAMES = ["0", "1", "2"]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


class TestSteps:
    def test_an_optimizer_ends_the_step_and_other_optimizers_do_not(self):
        model, other = chain(), nn.Linear(2, 2)
        optimizer, stranger = sgd(model), torch.optim.SGD(other.parameters(), lr=0.1)
        with GradientNorms(model, NAMES) as norms:
            for _ in range(3):
                model(torch.randn(5, 4).double()).sum().backward()
                other(torch.randn(1, 2)).sum().backward()
                stranger.step()
                optimizer.step()
        assert norms.num_steps == 3
        assert list(norms.ratios().index) == [0, 1, 2]

    def test_two_optimizers_of_one_model_end_one_step(self):
        model = chain()
        first = torch.optim.SGD(model[0].parameters(), lr=0.0)
        second = torch.optim.SGD(model[1:].parameters(), lr=0.0)
        with GradientNorms(model, NAMES, every=2) as norms:
            for _ in range(4):
                model(torch.randn(5, 4).double()).sum().backward()
                first.step()
                second.step()
        assert norms.num_steps == 4
        assert list(norms.ratios().index) == [0, 2]

    def test_sampling_measures_every_kth_step(self):
        model = chain()
        optimizer = sgd(model)
        batches = [torch.randn(5, 4).double() for _ in range(7)]
        with GradientNorms(model, NAMES, every=3) as norms:
            for batch in batches:
                model(batch).square().sum().backward()
                optimizer.step()
        assert norms.num_steps == 7
        assert list(norms.ratios().index) == [0, 3, 6]
        for step in (0, 3, 6):
            truth = boundaries(model, batches[step], norms.blocks, lambda y: y.square().sum())
            assert norms.ratios().loc[step, "1"] == pytest.approx(truth[1].grad_in /
                                                                  truth[1].grad_out)  # fmt: skip

    def test_gradient_accumulation_has_a_call_for_each_pass_and_sums_like_one_batch(self):
        model = chain()
        batch = torch.randn(6, 4).double()
        with GradientNorms(model, NAMES) as norms:
            for part in batch.split(2):
                model(part).square().sum().backward()
            norms.step()
            model(batch).square().sum().backward()
            norms.step()
        frame = norms.to_frame()
        assert sorted(frame[frame.step == 0].call.unique()) == [0, 1, 2]
        parts, whole = norms.points(0), norms.points(1)
        for part, one in zip(parts, whole, strict=True):
            assert part.values == pytest.approx(one.values, rel=1e-12, nan_ok=True)

    def test_several_forward_passes_before_one_backward(self):
        model = chain()
        batches = [torch.randn(5, 4).double() for _ in range(2)]
        with GradientNorms(model, NAMES) as norms:
            sum(model(batch).square().sum() for batch in batches).backward()
            norms.step()
        for call, batch in enumerate(batches):
            truth = boundaries(model, batch, norms.blocks, lambda y: y.square().sum())
            frame = norms.to_frame()
            frame = frame[(frame.call == call) & (frame.quantity == "grad_out")]
            assert frame.value.tolist() == pytest.approx([t.grad_out for t in truth])
        assert list(norms.ratios().columns) == NAMES

    def test_a_second_backward_pass_is_a_call_of_its_own(self):
        model = chain()
        batch = torch.randn(5, 4).double()
        with GradientNorms(model, NAMES) as norms:
            out = model(batch)
            out.square().sum().backward(retain_graph=True)
            out.sum().backward()
            norms.step()
        for call, loss in enumerate((lambda y: y.square().sum(), lambda y: y.sum())):
            truth = boundaries(model, batch, norms.blocks, loss)
            frame = norms.to_frame()
            frame = frame[(frame.call == call) & (frame.quantity == "grad_out")]
            assert frame.value.tolist() == pytest.approx([t.grad_out for t in truth])

    def test_a_shared_block_has_a_place_for_each_visit(self):
        torch.manual_seed(0)
        model, inputs = ZOO["shared_block"]()
        with GradientNorms(model, "blocks.0") as norms:
            one_step(model, inputs, norms)
            one_step(model, inputs, norms)
        columns = ["blocks.0", "blocks.0#1", "blocks.0#2", "blocks.0#3"]
        assert list(norms.ratios().columns) == columns
        product = norms.points(1)[0].values["product"]
        assert product == pytest.approx(math.prod(norms.ratios().loc[1]))

    def test_lbfgs_calls_its_closure_several_times_in_one_step(self):
        model = chain()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
        batch = torch.randn(5, 4).double()

        def closure():
            optimizer.zero_grad()
            loss = model(batch).square().sum()
            loss.backward()
            return loss

        with GradientNorms(model, NAMES) as norms:
            optimizer.step(closure)
            optimizer.step(closure)
        assert norms.num_steps == 2
        assert norms.to_frame().call.max() >= 1

    def test_evaluation_between_steps_leaves_no_trace(self):
        model = chain()
        optimizer = sgd(model)
        batch = torch.randn(5, 4).double()
        with GradientNorms(model, NAMES) as norms:
            with torch.no_grad():
                model(batch)
            model(batch).sum().backward()
            model(batch)  # with gradients on, but never differentiated
            with norms.pause():
                model(batch).sum().backward()
            with torch.inference_mode():
                model(batch)
            optimizer.step()
        assert norms.to_frame().call.unique().tolist() == [0]

    def test_evaluation_between_forward_and_backward_with_reentrant_checkpoints(self):
        from torch.utils.checkpoint import checkpoint

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = chain()

            def forward(self, x):
                return checkpoint(self.body, x, use_reentrant=self.training)

        torch.manual_seed(0)
        model = Checkpointed()
        batch = torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, ["body.0", "body.1"]) as norms:
            out = model(batch)
            with torch.no_grad():
                model.eval()(batch)
            out.square().sum().backward()
            norms.step()
        truth = boundaries(model.eval(), batch, norms.blocks, lambda y: y.square().sum())
        assert_agrees(norms, truth)

    def test_hessian_products_are_not_taken_for_training(self):
        model = chain()
        batch = (torch.randn(5, 4).double(), torch.randn(5, 4).double())
        with GradientNorms(model, NAMES) as norms:
            hessian = HessianOperator(model, nn.MSELoss(), batch)
            model(batch[0]).square().sum().backward()
            hessian @ torch.ones(hessian.shape[0]).double()
            norms.step()
        assert norms.to_frame().call.unique().tolist() == [0]

    def test_a_failing_forward_pass_does_not_disturb_the_next(self):
        model = chain()
        batch = torch.randn(5, 4).double()
        with GradientNorms(model, NAMES) as norms:
            with pytest.raises(RuntimeError):
                model(torch.randn(5, 3).double())
            model(batch).square().sum().backward()
            norms.step()
        truth = boundaries(model, batch, norms.blocks, lambda y: y.square().sum())
        assert norms.ratios().loc[0, "1"] == pytest.approx(truth[1].grad_in / truth[1].grad_out)

    def test_tracking_can_be_resumed_from_a_state(self):
        def steps(norms, model, count):
            torch.manual_seed(norms.num_steps)
            with norms:
                for _ in range(count):
                    model(torch.randn(5, 4).double()).square().sum().backward()
                    norms.step()

        model = chain()
        whole = GradientNorms(model, NAMES)
        steps(whole, model, 2)
        again = GradientNorms(model, NAMES)
        again.load_state_dict(torch.load(_saved(whole.state_dict()), weights_only=True))
        for norms in (whole, again):
            steps(norms, model, 2)
        assert whole.to_frame().equals(again.to_frame())

    def test_old_steps_can_be_forgotten(self):
        model = chain()
        with GradientNorms(model, NAMES, keep=2) as norms:
            for _ in range(5):
                model(torch.randn(5, 4).double()).square().sum().backward()
                norms.step()
        assert norms.num_steps == 5
        assert list(norms.ratios().index) == [3, 4]

    def test_a_core_that_runs_several_times_is_one_pass(self):
        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.core = chain(2)

            def forward(self, x):
                return self.core(self.core(self.core(x)))

        torch.manual_seed(0)
        model = Loop()
        batch = torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, ["core.0", "core.1"]) as norms:
            for _ in range(2):
                model(batch).square().sum().backward()
            norms.step()
        assert [p.name for p in norms.points()] == [
            "core.0", "core.1", "core.0#1", "core.1#1", "core.0#2", "core.1#2",
        ]  # fmt: skip
        assert norms.to_frame().call.max() == 5
        first, last = norms.points()[0].values, norms.points()[-1].values
        assert first["product"] == pytest.approx(first["grad_in"] / last["grad_out"])


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


class TestNesting:
    def test_blocks_inside_blocks_are_measured_both(self):
        torch.manual_seed(0)
        model, inputs = ZOO["nested_stages"]()
        names = ["body.0", "body.0.0", "body.0.0.0", "body.0.0.1", "body.0.1", "body.1"]
        norms = GradientNorms(model, names)
        expected = boundaries(model, inputs, norms.blocks)
        with norms:
            one_step(model, inputs, norms)
        assert_agrees(norms, expected)

    def test_products_end_at_the_last_block_of_a_level(self):
        torch.manual_seed(0)
        model, inputs = ZOO["nested_stages"]()
        with GradientNorms(model, ["body.0", "body.0.1", "body.0.0", "body.1"]) as norms:
            one_step(model, inputs, norms)
        values = {point.name: point.values for point in norms.points()}
        outer = values["body.0"]["ratio"] * values["body.1"]["ratio"]
        assert values["body.0"]["product"] == pytest.approx(outer)
        assert values["body.0.0"]["product"] == pytest.approx(values["body.0"]["ratio"])

    def test_products_telescope_in_a_chain(self):
        model = chain()
        batch = torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, NAMES) as norms:
            model(batch).square().sum().backward()
            norms.step()
        first, last = norms.points()[0].values, norms.points()[-1].values
        assert first["product"] == pytest.approx(first["grad_in"] / last["grad_out"])


class TestQuantities:
    def test_shares_of_zeros_and_of_what_is_not_finite(self):
        model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity())
        values = torch.tensor([[1.0, -1.0, -2.0, -3.0]], requires_grad=True)
        with GradientNorms(model, ["1"], shares=True) as norms:
            model(values).sum().backward()
            norms.step()
        found = norms.to_frame().set_index("quantity").value
        assert found["act_out_zeros"] == 0.75
        assert found["grad_in_zeros"] == 0.75
        assert found["grad_out_zeros"] == 0.0
        assert found["act_out_nonfinite"] == 0.0

    def test_statistics_over_samples(self):
        model = chain(1)
        batch = torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, "0", statistic="sample") as norms:
            model(batch).square().sum().backward()
            norms.step()
        found = norms.to_frame().set_index("quantity").value
        out = model(batch)
        gradients = torch.autograd.grad(out.square().sum(), [batch, out])
        per_sample = [g.norm(dim=1).detach().numpy() for g in gradients]
        ratio = per_sample[0] / per_sample[1]
        for what, function in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            assert found[f"ratio_{what}"] == pytest.approx(function(ratio))
            assert found[f"grad_out_{what}"] == pytest.approx(function(per_sample[1]))
        assert found["ratio_std"] == pytest.approx(np.std(ratio, ddof=1))

    def test_the_axis_of_the_samples_can_be_chosen(self):
        model = chain(1)
        batch = torch.randn(3, 5, 4).double().requires_grad_()
        with GradientNorms(model, "0", statistic="sample", batch_dim=1) as norms:
            model(batch).square().sum().backward()
            norms.step()
        found = norms.to_frame().set_index("quantity").value
        assert found["act_in_max"] == pytest.approx(float(batch.norm(dim=(0, 2)).max().detach()))

    def test_all_tensors_count_together_where_asked_for(self):
        class Pair(nn.Module):
            def forward(self, a, b):
                return 2 * a, 3 * b

        model = nn.Sequential()
        model.pair = Pair()
        a, b = (torch.randn(4).double().requires_grad_() for _ in range(2))
        for tensors, expected in (("first", 2.0), ("all", math.sqrt(13 / 2))):
            with GradientNorms(model, "pair", tensors=tensors) as norms:
                sum(t.sum() for t in model.pair(a, b)).backward()
                norms.step()
            assert norms.points()[0].values["ratio"] == pytest.approx(expected)

    @pytest.mark.parametrize("exponent", [-30, 25])
    def test_float32_gradients_whose_squares_leave_the_range(self, exponent):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        batch = torch.randn(3, 4).requires_grad_()
        with GradientNorms(model, ["0", "1"], activations=False) as norms:
            (model(batch).sum() * 10.0**exponent).backward()
            norms.step()
        assert norms.points()[1].values["grad_out"] == pytest.approx(
            math.sqrt(12) * 10.0**exponent, rel=1e-5
        )

    def test_complex_streams(self):
        model = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex128), nn.Identity())
        batch = torch.randn(2, 3, dtype=torch.complex128).requires_grad_()
        with GradientNorms(model, ["0"]) as norms:
            model(batch).abs().square().sum().backward()
            norms.step()
        weight = model[0].weight.detach()
        out = model(batch).detach()
        expected = torch.linalg.vector_norm(2 * out @ weight.conj()) / torch.linalg.vector_norm(
            2 * out
        )
        assert norms.points()[0].values["ratio"] == pytest.approx(float(expected))

    def test_activations_can_be_left_out(self):
        model = chain()
        with GradientNorms(model, NAMES, activations=False) as norms:
            model(torch.randn(5, 4).double()).sum().backward()
            norms.step()
        assert set(norms.to_frame().quantity) == {"grad_in", "grad_out", "ratio", "product"}

    def test_a_block_without_gradient_at_its_input_has_no_ratio(self):
        model = chain()
        with GradientNorms(model, NAMES) as norms:
            model(torch.randn(5, 4).double()).sum().backward()
            norms.step()
        assert math.isnan(norms.points()[0].values["ratio"])
        assert math.isnan(norms.points()[0].values["product"])
        assert norms.points()[1].values["product"] > 0

    def test_frozen_layers_are_named(self):
        model = chain()
        model[0].requires_grad_(False)
        with GradientNorms(model, NAMES) as norms:
            model(torch.randn(5, 4).double()).sum().backward()
            with pytest.warns(BlockNotSeenWarning, match="through 0: ran without gradients"):
                norms.step()
        assert list(norms.ratios().columns) == ["1", "2"]


class TestGraphs:
    """Graphs that are not a plain chain under one backward pass."""

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
    @pytest.mark.parametrize("outer", [True, False])
    @pytest.mark.parametrize("inner", [True, False])
    def test_checkpoints_inside_checkpoints(self, outer, inner):
        from torch.utils.checkpoint import checkpoint

        class Nested(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Linear(4, 4)
                self.body = chain(6)
                self.checkpointed = True

            def forward(self, x):
                x = self.embed(x)
                for begin in (0, 3):

                    def segment(y, begin=begin):
                        for block in self.body[begin : begin + 3]:
                            y = (
                                checkpoint(block, y, use_reentrant=inner)
                                if self.checkpointed
                                else block(y)
                            )
                        return y

                    x = (
                        checkpoint(segment, x, use_reentrant=outer)
                        if self.checkpointed
                        else segment(x)
                    )
                return x

        torch.manual_seed(0)
        model = Nested().double()
        batch = torch.randn(5, 4).double()
        with GradientNorms(model, "body.*") as norms:
            model(batch).square().sum().backward()
            norms.step()
        model.checkpointed = False
        truth = boundaries(model, batch, norms.blocks, lambda y: y.square().sum())
        assert_agrees(norms, truth)
        first, last = norms.points()[0].values, norms.points()[-1].values
        assert first["product"] == pytest.approx(first["grad_in"] / last["grad_out"])

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_views_that_are_changed_in_place_later(self, layout):
        class Permuting(nn.Module):
            """Ends in a view of what it computed."""

            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 3)

            def forward(self, x):
                out = self.linear(x.permute(0, 2, 3, 1)).contiguous(memory_format=layout)
                return out.permute(0, 3, 1, 2)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Permuting() for _ in range(3))

            def forward(self, x):
                for block in self.blocks:
                    x = nn.functional.leaky_relu(block(x), 0.3, inplace=True)
                return x

        torch.manual_seed(0)
        model = Net().double()
        batch = torch.randn(2, 3, 4, 4).double().requires_grad_()
        norms = GradientNorms(model, "blocks.*")
        with norms:
            model(batch).square().sum().backward()
            norms.step()
        truth = boundaries(model, batch, norms.blocks, lambda y: y.square().sum())
        assert_agrees(norms, truth)

    def test_losses_that_leave_at_several_depths(self):
        model = chain(4)
        batch = torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, ["0", "1", "2", "3"]) as norms:
            early = model[1](model[0](batch))
            late = model[3](model[2](early))
            early.sum().backward(retain_graph=True)
            late.square().sum().backward()
            norms.step()
        values = {p.name: p.values for p in norms.points()}
        assert list(values) == ["0", "1", "0@1", "1@1", "2@1", "3@1"]
        whole = values["0"]["ratio"] * values["1"]["ratio"]
        assert values["0"]["product"] == pytest.approx(whole)
        chained = math.prod(values[f"{i}@1"]["ratio"] for i in range(4))
        assert values["0@1"]["product"] == pytest.approx(chained)
        frame = norms.to_frame()
        products = frame[(frame.quantity == "product") & (frame.block == "0")].value.tolist()
        assert products == pytest.approx([whole, chained])

    def test_parts_that_are_called_without_the_model(self):
        class Parts(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

        torch.manual_seed(0)
        model = Parts().double()
        with GradientNorms(model, ["encoder", "decoder"]) as norms:
            for _ in range(3):
                model.decoder(model.encoder(torch.randn(5, 4).double())).sum().backward()
            norms.step()
        assert [p.name for p in norms.points()] == ["encoder", "decoder"]

    def test_a_teacher_without_gradients_keeps_its_activations_to_itself(self):
        from torch.utils.checkpoint import checkpoint

        class Student(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = chain()
                self.checkpointed = True

            def encode(self, x):
                if self.checkpointed and torch.is_grad_enabled():
                    return checkpoint(self.body, x, use_reentrant=True)
                return self.body(x)

            def forward(self, one, two):
                with torch.no_grad():
                    target = self.encode(one)
                return (self.encode(two) - target).square().sum()

        torch.manual_seed(0)
        model = Student()
        one, two = 50 * torch.randn(5, 4).double(), torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, ["body.0", "body.1"]) as norms:
            model(one, two).backward()
            norms.step()
        assert norms.points()[0].values["act_in"] == pytest.approx(float(two.detach().norm()))

    def test_recurrent_cells_are_followed_along_their_state(self):
        class Cells(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.cell = nn.Linear(3, 3), nn.GRUCell(3, 4)

            def forward(self, x):
                states = [torch.zeros(5, 4).double()]
                for t in range(x.shape[1]):
                    states.append(self.cell(self.embed(x[:, t]), states[-1]))
                return states

        torch.manual_seed(0)
        model = Cells().double()
        with GradientNorms(model, "cell") as norms:
            states = model(torch.randn(5, 6, 3).double())
            loss = states[-1].square().sum()
            truth = torch.autograd.grad(loss, states[1:], retain_graph=True)
            loss.backward()
            norms.step()
        expected = [float(g.norm()) for g in truth]
        points = norms.points()
        # The backward pass for the truth comes first; both are the same.
        ratios = [p.values["ratio"] for p in points if p.backward == 1]
        steps = [one / two for one, two in itertools.pairwise(expected)]
        assert ratios[1:] == pytest.approx(steps)

    def test_a_block_that_calls_itself(self):
        class Tree(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x, depth=2):
                x = torch.tanh(self.linear(x))
                return self(x, depth - 1) if depth else x

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), Tree()).double()
        with GradientNorms(model, ["1"]) as norms:
            model(torch.randn(5, 4).double()).sum().backward()
            norms.step()
        assert [p.name for p in norms.points()] == ["1", "1#1", "1#2"]
        outer, inner = norms.points()[0].values, norms.points()[2].values
        assert outer["grad_out"] == pytest.approx(inner["grad_out"])

    def test_batched_gradients_are_left_alone(self):
        model = chain()
        batch = torch.randn(5, 4).double()
        with GradientNorms(model, NAMES) as norms:
            out = model(batch)
            vectors = torch.eye(20).double().reshape(20, 5, 4)
            torch.autograd.grad(
                out, model[0][0].weight, vectors, is_grads_batched=True, retain_graph=True
            )
            out.sum().backward()
            norms.step()
        assert norms.to_frame().call.unique().tolist() == [0]

    def test_jagged_tensors(self):
        class Jagged(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

            def forward(self, x):
                return self.blocks(x)

        torch.manual_seed(0)
        model = Jagged().double()
        parts = [torch.randn(n, 4).double() for n in (2, 3)]
        flat = torch.cat(parts)
        with GradientNorms(model, "blocks.2") as norms:
            nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
            model(nested).values().square().sum().backward()
            norms.step()
            model(flat).square().sum().backward()
            norms.step()
        assert norms.points(0)[0].values == pytest.approx(norms.points(1)[0].values)


class TestOptimizers:
    def test_one_that_moves_no_tracked_block_ends_nothing(self):
        model = nn.ModuleDict({"critic": chain(), "generator": chain()})
        critic = torch.optim.SGD(model["critic"].parameters(), lr=0.0)
        generator = torch.optim.SGD(model["generator"].parameters(), lr=0.0)
        noise = torch.randn(5, 4).double()
        with GradientNorms(model, ["generator.0", "generator.1"]) as norms:
            for _ in range(2):
                for _ in range(3):
                    with torch.no_grad():
                        fake = model["generator"](noise)
                    model["critic"](fake).sum().backward()
                    critic.step()
                model["critic"](model["generator"](noise)).sum().backward()
                generator.step()
        assert norms.num_steps == 2
        assert norms.to_frame().call.unique().tolist() == [0]

    def test_the_head_of_a_frozen_backbone_ends_the_step(self):
        model = chain()
        model[:2].requires_grad_(False)
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.0)
        batch = torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, ["0", "1"]) as norms:
            for _ in range(2):
                model(batch).sum().backward()
                optimizer.step()
        assert norms.num_steps == 2

    def test_layers_that_are_unfrozen_later(self):
        model = chain()
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.0)
        batch = torch.randn(5, 4).double().requires_grad_()
        with GradientNorms(model, ["0", "1"]) as norms:
            model(batch).sum().backward()
            optimizer.step()
            assert norms.num_steps == 0
            norms.step()
            optimizer.add_param_group({"params": model[0].parameters()})
            model(batch).sum().backward()
            optimizer.step()
        assert norms.num_steps == 2
