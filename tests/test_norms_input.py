"""What goes wrong is said: where, why, and what to do."""

from __future__ import annotations

import pytest
import torch
from test_norms import NAMES, chain
from torch import nn

from conditioning import GradientNorms
from conditioning.errors import (
    BlockNotSeenWarning,
    BlockSelectionError,
    HooksNotFiredError,
    InvalidArgumentError,
    NoBackwardError,
    NonFiniteGradientWarning,
    TrackerActiveError,
)

BATCH = torch.ones(5, 4).double()


class TestNothingRecorded:
    def test_no_backward_pass(self):
        model = chain()
        norms = GradientNorms(model, NAMES).attach()
        try:
            model(BATCH)
            with pytest.raises(NoBackwardError, match=r"loss.backward\(\)"):
                norms.step()
        finally:
            norms.detach()

    def test_no_backward_pass_until_the_end(self):
        model = chain()
        with (
            pytest.raises(NoBackwardError, match=r"loss.backward\(\)"),
            GradientNorms(model, NAMES),
        ):
            model(BATCH)

    def test_no_forward_pass(self):
        with pytest.raises(HooksNotFiredError, match="0, 1, 2"), GradientNorms(chain(), NAMES):
            pass

    def test_another_object_is_trained(self):
        import copy

        model = chain()
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        norms = GradientNorms(model, NAMES).attach()
        try:
            for _ in range(2):
                trained(BATCH).sum().backward()
                if norms._idle:
                    with pytest.raises(HooksNotFiredError, match="deepcopy"):
                        optimizer.step()
                else:
                    optimizer.step()
        finally:
            norms.detach()

    def test_only_evaluations(self):
        model = chain()
        norms = GradientNorms(model, NAMES)
        with pytest.raises(HooksNotFiredError, match="no_grad"), norms, torch.no_grad():
            model(BATCH)

    def test_a_module_without_gradients(self):
        model = chain().requires_grad_(False)
        norms = GradientNorms(model, NAMES).attach()
        try:
            model(BATCH)
            with pytest.raises(NoBackwardError, match=r"frozen.*requires_grad_\(\)"):
                norms.step()
        finally:
            norms.detach()

    def test_a_loss_that_is_detached_from_the_blocks(self):
        model = chain()
        head = nn.Linear(4, 1).double()
        norms = GradientNorms(model, NAMES).attach()
        try:
            head(model(BATCH).detach()).sum().backward()
            with pytest.raises(NoBackwardError, match=r"\.detach\(\)"):
                norms.step()
        finally:
            norms.detach()

    def test_reading_before_anything_was_recorded(self):
        norms = GradientNorms(chain(), NAMES)
        assert norms.scalars() == {}
        for ask in (norms.points, norms.plot, lambda: norms.verdict(0.1)):
            with pytest.raises(NoBackwardError, match="Nothing was recorded"):
                ask()
        assert norms.to_frame().empty
        assert norms.first_nonfinite() is None
        assert "nothing recorded" in str(norms)

    def test_an_error_in_the_loop_is_not_hidden(self):
        with pytest.raises(ZeroDivisionError), GradientNorms(chain(), NAMES):
            raise ZeroDivisionError

    def test_a_block_that_the_forward_pass_does_not_use(self):
        model = chain()
        model.extra = nn.Linear(4, 4).double()
        used = model[:3]
        with GradientNorms(model, [*NAMES, "extra"]) as norms:
            used(BATCH).sum().backward()
            with pytest.warns(BlockNotSeenWarning, match="extra: did not run"):
                norms.step()
            used(BATCH).sum().backward()
            norms.step()

    def test_a_block_that_returns_no_tensor(self):
        class Opaque(nn.Module):
            def forward(self, x):
                return object()

        model = chain()
        model.extra = Opaque()
        with GradientNorms(model, [*NAMES, "extra"]) as norms:
            model.extra(BATCH)
            model[:3](BATCH).sum().backward()
            with pytest.warns(BlockNotSeenWarning, match=r"extra: returned no tensor.*object"):
                norms.step()

    def test_passes_without_an_optimizer_are_told_while_they_run(self):
        model = chain(1, 2)
        norms = GradientNorms(model, "0", activations=False).attach()
        try:
            for _ in range(999):
                model(torch.ones(1, 2).double()).sum().backward()
            with pytest.warns(BlockNotSeenWarning, match=r"norms\.step\(\)"):
                model(torch.ones(1, 2).double()).sum().backward()
        finally:
            norms.detach()

    def test_a_loop_of_its_own_without_steps(self):
        model = chain()
        norms = GradientNorms(model, NAMES).attach()
        for _ in range(3):
            model(BATCH).sum().backward()
        with pytest.warns(BlockNotSeenWarning, match="3 forward passes were counted as one"):
            norms.__exit__(None)
        assert norms.num_steps == 1


class TestUse:
    @pytest.mark.parametrize("model", [torch.nn.functional.relu, [], None])
    def test_what_is_no_model(self, model):
        with pytest.raises(InvalidArgumentError, match=r"nn\.Module"):
            GradientNorms(model)

    def test_a_batch_in_the_place_of_blocks(self):
        with pytest.raises(BlockSelectionError, match="inputs="):
            GradientNorms(chain(), BATCH)

    def test_a_tracker_runs_once_at_a_time(self):
        model = chain()
        with GradientNorms(model, NAMES) as norms:
            with pytest.raises(TrackerActiveError, match="running already"):
                norms.attach()
            model(BATCH).sum().backward()
        assert norms.num_steps == 1

    def test_a_tracker_that_is_dropped_takes_its_hooks_along(self):
        model = chain()
        norms = GradientNorms(model, NAMES).attach()
        assert any(m._forward_hooks for m in model.modules())
        del norms
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_transformed_functions_are_left_alone(self):
        model = chain()
        parameters = dict(model.named_parameters())

        def loss(values, sample):
            return torch.func.functional_call(model, values, (sample,)).sum()

        with GradientNorms(model, NAMES) as norms:
            per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, BATCH)
            model(BATCH).sum().backward()
            norms.step()
        assert per_sample["0.0.weight"].shape == (5, 4, 4)
        assert norms.to_frame().call.unique().tolist() == [0]

    def test_two_trackers_do_not_disturb_each_other(self):
        model = chain()
        with GradientNorms(model, NAMES) as one, GradientNorms(model, ["1"]) as two:
            model(BATCH).sum().backward()
            one.step()
            two.step()
        assert one.ratios()["1"].equals(two.ratios()["1"])

    def test_a_block_that_is_not_there(self):
        with pytest.raises(BlockSelectionError, match="layer"):
            GradientNorms(chain(), "layer1")

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"every": 0}, "every"),
            ({"every": 1.5}, "every"),
            ({"keep": 0}, "keep"),
            ({"statistic": "mean"}, "statistic"),
            ({"tensors": "last"}, "tensors"),
        ],
    )
    def test_options_out_of_range(self, options, text):
        with pytest.raises(InvalidArgumentError, match=text):
            GradientNorms(chain(), NAMES, **options)

    def test_samples_along_an_axis_that_is_not_there(self):
        model = chain()
        norms = GradientNorms(model, NAMES, statistic="sample", batch_dim=3)
        with pytest.raises(InvalidArgumentError, match="batch_dim"), norms:
            model(BATCH)

    def test_a_state_of_other_blocks(self):
        state = GradientNorms(chain(), NAMES).state_dict()
        with pytest.raises(InvalidArgumentError, match="blocks"):
            GradientNorms(chain(), ["0"]).load_state_dict(state)

    def test_a_step_that_was_not_sampled(self):
        model = chain()
        with GradientNorms(model, NAMES, every=2) as norms:
            for _ in range(3):
                model(BATCH).sum().backward()
                norms.step()
        with pytest.raises(InvalidArgumentError, match="0, 2"):
            norms.points(1)

    def test_an_unknown_plot(self):
        model = chain()
        with GradientNorms(model, NAMES) as norms:
            model(BATCH).sum().backward()
        with pytest.raises(InvalidArgumentError, match="heatmap"):
            norms.plot("bars")


class Breaks(nn.Module):
    """Passes its input on; makes NaN forward or backward."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        if self.where == "forward":
            return x * float("inf")
        if self.where == "backward":
            return x + (x * 0).abs().sqrt()  # 0 / sqrt(0)
        return x


class TestNonFinite:
    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_the_block_in_which_it_begins_is_named(self, where):
        model = chain()
        model[1].append(Breaks(where))
        with GradientNorms(model, NAMES) as norms:
            model(BATCH).sum().backward()
            with pytest.warns(NonFiniteGradientWarning, match=f"block '1', on its {where} pass"):
                norms.step()
            model(BATCH).sum().backward()
            norms.step()  # said once
        found = norms.first_nonfinite()
        assert (found.step, found.block, found.where) == (0, "1", where)
        assert found.to_dict()["block"] == "1"

    def test_the_innermost_of_nested_blocks_is_named(self):
        model = chain()
        model[1].append(Breaks("backward"))
        with GradientNorms(model, ["0", "1", "1.2", "2"]) as norms:
            model(BATCH).sum().backward()
            with pytest.warns(NonFiniteGradientWarning, match="block '1.2'"):
                norms.step()

    def test_the_first_of_two_towers_is_named(self):
        class Towers(nn.Module):
            def __init__(self):
                super().__init__()
                self.b, self.c = chain(1), nn.Sequential(chain(1), chain(1))

            def forward(self, x):
                return self.b(x) * float("inf") + self.c(x)

        model = Towers()
        model.b.append(Breaks("forward"))
        model.c[1].append(Breaks("forward"))
        with GradientNorms(model, ["b", "c", "c.1"]) as norms:
            model(BATCH).sum().backward()
            with pytest.warns(NonFiniteGradientWarning, match="block 'b', on its forward"):
                norms.step()

    def test_a_loss_that_is_not_finite(self):
        model = chain()
        with GradientNorms(model, NAMES) as norms:
            (model(BATCH).sum() * float("nan")).backward()
            with pytest.warns(NonFiniteGradientWarning, match=r"block '2' already.*the loss"):
                norms.step()

    def test_inputs_that_are_not_finite(self):
        model = chain()
        with GradientNorms(model, NAMES) as norms:
            model(BATCH * float("inf")).sum().backward()
            with pytest.warns(NonFiniteGradientWarning, match="input of block '0' already"):
                norms.step()
