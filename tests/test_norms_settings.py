"""The same norms under checkpointing, compilation, mixed precision, and on several ranks."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from architectures import MlpBlock
from boundaries import boundaries
from torch import nn
from torch.utils.checkpoint import checkpoint

from conditioning import GradientNorms
from conditioning.errors import HooksNotFiredError

WIDTH = 5


class Checkpointed(nn.Module):
    """Residual blocks, some of them run under checkpointing; the first is shared."""

    def __init__(self, reentrant, *, segments):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(MlpBlock(WIDTH) for _ in range(4))
        self.order = (0, 1, 0, 2, 3)
        self.reentrant, self.segments = reentrant, segments

    def forward(self, x):
        x = self.embed(x)
        for begin, end in self.segments:

            def part(y, begin=begin, end=end):
                for index in self.order[begin:end]:
                    y = self.blocks[index](y)
                return y

            # A segment of one block is not checkpointed, so that both kinds mix.
            direct = end - begin == 1 or self.reentrant is None
            x = part(x) if direct else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def assert_same(norms, truth, step=0):
    frame = norms.to_frame()
    frame = frame[frame.step == step]
    seen = {}
    for border in truth:
        call = seen.setdefault(border.block, 0)
        seen[border.block] += 1
        rows = frame[(frame.block == border.block) & (frame.call == call)]
        found = rows.set_index("quantity").value
        for quantity in ("grad_in", "grad_out", "act_in", "act_out"):
            assert found[quantity] == pytest.approx(getattr(border, quantity), rel=1e-12), (
                border.block, call, quantity,
            )  # fmt: skip
    assert len(frame[frame.quantity == "ratio"]) == len(truth)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    "segments", [[(0, 5)], [(0, 2), (2, 4), (4, 5)], [(0, 1), (1, 3), (3, 5)]], ids=str
)
@pytest.mark.parametrize("passes", [1, 2])
def test_checkpointing_changes_no_norm_and_no_order(reentrant, segments, passes):
    torch.manual_seed(0)
    model = Checkpointed(reentrant, segments=segments).double()
    batches = [torch.randn(6, 3).double() for _ in range(passes)]
    with GradientNorms(model, "blocks.*") as norms:
        for _ in range(2):
            sum(model(batch).square().sum() for batch in batches).backward()
            norms.step()
    model.reentrant = None
    # Calls of a shared block are numbered over all passes of a step.
    truth = [
        border
        for batch in batches
        for border in boundaries(model, batch, norms.blocks, lambda y: y.square().sum())
    ]
    for step in range(2):
        assert_same(norms, truth, step)
    products = norms.points(0)
    expected = 1.0
    for point in reversed(products):
        expected *= point.values["ratio"]
    assert products[0].values["product"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointing_with_evaluation_in_between():
    torch.manual_seed(0)
    model = Checkpointed(True, segments=[(0, 3), (3, 5)]).double()
    batch = torch.randn(6, 3).double()
    with GradientNorms(model, "blocks.*") as norms:
        with torch.no_grad():
            model(batch)
        model(batch).square().sum().backward()
        norms.step()
    model.reentrant = None
    assert_same(norms, boundaries(model, batch, norms.blocks, lambda y: y.square().sum()))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.blocks = nn.Sequential(*(MlpBlock(WIDTH) for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.embed(x))


def residual(seed=0):
    torch.manual_seed(seed)
    return Residual().double()


# Dynamo silences this one itself, which does not help where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("form", ["wrapper", "in place"])
    def test_tracking_first_and_compiling_then_is_exact(self, backend, form):
        model, batch = residual(), torch.randn(6, 3).double()
        truth_of = copy.deepcopy(model)
        if form == "wrapper":
            compiled = torch.compile(model, backend=backend)
        else:
            model.compile(backend=backend)
            compiled = model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with GradientNorms(compiled, "blocks.*") as norms:
            for _ in range(3):
                compiled(batch).square().sum().backward()
                optimizer.step()
        blocks = GradientNorms(truth_of, "blocks.*").blocks
        truth = boundaries(truth_of, batch, blocks, lambda y: y.square().sum())
        for step in range(3):
            assert_same(norms, truth, step)

    def test_tracking_a_model_that_has_run_compiled_is_refused(self):
        model, batch = residual(), torch.randn(6, 3).double()
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        compiled(batch).square().sum().backward()
        norms = GradientNorms(compiled, "blocks.*").attach()
        try:
            compiled(batch).square().sum().backward()
            with pytest.raises(HooksNotFiredError, match="compiled"):
                optimizer.step()
        finally:
            norms.detach()

    def test_and_so_is_the_module_inside_a_compiled_wrapper(self):
        model, batch = residual(), torch.randn(6, 3).double()
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        compiled(batch)
        norms = GradientNorms(model, "blocks.*").attach()
        try:
            compiled(batch).square().sum().backward()
            optimizer.step()
            compiled(batch).square().sum().backward()
            with pytest.raises(HooksNotFiredError, match=r"torch.compile has run"):
                optimizer.step()
        finally:
            norms.detach()


class TestMixedPrecision:
    def test_autocast_is_as_good_as_its_dtype(self):
        model, batch = residual().float(), torch.randn(64, 3)
        with GradientNorms(model, "blocks.*") as norms:
            model(batch).square().mean().backward()
            norms.step()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch).float().square().mean()
            loss.backward()
            norms.step()
        ratios = norms.ratios()
        assert ratios.loc[1].to_numpy() == pytest.approx(ratios.loc[0].to_numpy(), rel=0.02)

    def test_a_scaler_changes_no_ratio_and_its_scale_is_taken_out(self):
        model, batch = residual().float(), torch.randn(16, 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with GradientNorms(model, "blocks.*", scaler=scaler) as norms:
            scaler.scale(model(batch).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        with GradientNorms(model, "blocks.*") as plain:
            model(batch).square().mean().backward()
            plain.step()
        for one, two in zip(norms.points(), plain.points(), strict=True):
            assert one.values == pytest.approx(two.values, rel=1e-5)

    def test_a_step_that_the_scaler_skips_is_a_step_of_its_own(self):
        model, batch = residual().float(), torch.randn(16, 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with GradientNorms(model, "blocks.*", scaler=scaler) as norms:
            for factor in (1.0, float("inf"), 1.0):
                optimizer.zero_grad()
                scaler.scale(model(batch).square().mean() * factor).backward()
                scaler.step(optimizer)
                scaler.update()
        assert norms.num_steps == 3
        ratios = norms.ratios()
        assert ratios.loc[1].isna().all()
        assert ratios.loc[2].to_numpy() == pytest.approx(ratios.loc[0].to_numpy(), rel=1e-6)
        assert norms.first_nonfinite().step == 1
        assert "the loss" in norms.first_nonfinite().message


class TestCopies:
    def test_hooks_do_not_travel_with_copies_and_pickles(self):
        model, batch = residual(), torch.randn(6, 3).double()
        with GradientNorms(model, "blocks.*") as norms:
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copies.append(torch.load(file, weights_only=False))
            for other in copies:
                other(batch).square().sum().backward()
            model(batch).square().sum().backward()
            norms.step()
        assert norms.to_frame().call.unique().tolist() == [0]
        with GradientNorms(copies[0], "blocks.*") as again:
            copies[0](batch).square().sum().backward()
            again.step()
        assert again.ratios().equals(norms.ratios())

    def test_a_pickle_loads_where_the_package_is_not(self):
        norms = GradientNorms(residual(), "blocks.*").attach()
        text = pickle.dumps(norms.blocks[0].module._forward_hooks)
        norms.detach()
        assert b"nullcontext" in text
        assert b"conditioning" not in text
