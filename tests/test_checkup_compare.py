"""Two checkups side by side."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from checkups import NAN, block, checkup, near

from conditioning import Estimate
from conditioning import checkup as examine
from conditioning.checkup.compare import compare, read
from conditioning.errors import InvalidArgumentError


def changed(report, **fields):
    return dataclasses.replace(report, **fields)


def setting(report, **fields):
    return changed(report, setting=dataclasses.replace(report.setting, **fields))


def change_of(comparison, quantity, where=""):
    (found,) = [c for c in comparison.changes if (c.quantity, c.where) == (quantity, where)]
    return found


def test_a_checkup_compared_with_itself_has_not_moved():
    comparison = checkup().compare(checkup())
    assert {c.movement for c in comparison.changes} == {"within its error"}
    assert not comparison.differences
    assert {c.outcome for c in comparison.findings} == {"still there"}
    assert not comparison.new_problems
    # Two spectra, nine blocks, a recurrent layer and so on: nothing was left out.
    assert len(comparison.changes) > 100


@pytest.mark.parametrize(
    ("before", "after", "movement"),
    [
        (Estimate(1.0, 0.9, 1.1), Estimate(1.3, 1.2, 1.4), "moved"),
        (Estimate(1.3, 1.2, 1.4), Estimate(1.0, 0.9, 1.1), "moved"),
        (Estimate(1.0, 0.9, 1.1), Estimate(1.15, 1.1, 1.2), "within its error"),  # they touch
        (Estimate(1.0, 0.9, 1.1), Estimate(1.3, 1.05, 1.4), "within its error"),
        (Estimate(1.0, 1.0, math.inf), Estimate(9.0, 9.0, math.inf), "within its error"),
        (Estimate(1.0, 1.0, 1.1), Estimate(9.0, 9.0, math.inf), "moved"),
        (Estimate(math.inf, math.inf, math.inf), Estimate(9.0, 9.0, 9.0), "moved"),
        (Estimate(math.inf, math.inf, math.inf),) * 2 + ("within its error",),
        (Estimate(-1.0, -1.1, -0.9), Estimate(1.0, 0.9, 1.1), "moved"),
        (Estimate(1.0, 1.0, 1.0), Estimate(*[1 + 1e-6] * 3), "within its error"),  # float32
        (Estimate(1.0, 1.0, 1.0), Estimate(*[1 + 1e-4] * 3), "moved"),
        (NAN, Estimate(1.0, 0.9, 1.1), "not comparable"),
        (Estimate(1.0, 0.9, 1.1), NAN, "not comparable"),
    ],
)
def test_moved_means_that_the_enclosures_are_disjoint(before, after, movement):
    comparison = compare(changed(checkup(), loss=before), changed(checkup(), loss=after))
    assert change_of(comparison, "loss").movement == movement


def test_rounding_is_that_of_the_coarser_dtype():
    near_one, one = Estimate(*[1 + 1e-6] * 3), Estimate(1.0, 1.0, 1.0)
    for dtypes, movement in (
        (("float64", "float64"), "moved"),
        (("float64", "float32"), "within its error"),
    ):
        pair = [
            setting(changed(checkup(), loss=loss), dtype=dtype)
            for loss, dtype in zip((one, near_one), dtypes, strict=True)
        ]
        assert change_of(compare(*pair), "loss").movement == movement


def test_the_factor_is_after_over_before():
    after = changed(checkup(), loss=near(4.6))
    change = change_of(checkup().compare(after), "loss")
    assert change.factor == pytest.approx(2)
    assert change.weight == pytest.approx(math.log10(2))
    zero = changed(checkup(), loss=Estimate(0.0, 0.0, 0.0))
    assert math.isnan(change_of(zero.compare(after), "loss").factor)


def test_what_moved_most_comes_first():
    hessian = dataclasses.replace(checkup().hessian, largest=near(400.0), smallest=near(-8000.0))
    after = changed(checkup(), hessian=hessian, loss=near(4.6))
    assert [c.quantity for c in checkup().compare(after).moved] == [
        "Hessian lambda_min", "Hessian lambda_max", "loss",
    ]  # fmt: skip


def test_a_share_that_was_nearly_zero_does_not_come_first():
    uses = checkup().activations
    first = changed(checkup(), activations=(dataclasses.replace(uses[0], dead_share=1e-9),))
    second = changed(
        checkup(), activations=(dataclasses.replace(uses[0], dead_share=1e-3),), loss=near(4.6)
    )
    moved = compare(first, second).moved
    assert [c.quantity for c in moved] == ["loss", "dead share"]
    assert moved[1].factor == pytest.approx(1e6)


def test_settings_that_differ_are_said_first():
    after = setting(checkup(), seed=1, model="Other", notes=())
    after = changed(after, step_size=dataclasses.replace(after.step_size, given=0.02))
    comparison = checkup().compare(after)
    assert {d.name: (d.before, d.after) for d in comparison.differences} == {
        "model": ("CifarResNet", "Other"),
        "seed": ("0", "1"),
        "notes": ("batch normalisation by the statistics of the batch", "none"),
        "learning rate": ("0.1", "0.02"),
    }
    parts = str(comparison).split("\n\n")
    assert parts[0].startswith("CifarResNet and Other, before and after")
    assert parts[1].startswith("Settings that differ")


def test_with_other_data_only_weights_are_comparable():
    after = setting(checkup(ratio=0.5), num_samples=64)
    comparison = checkup().compare(after)
    comparable = {c.quantity for c in comparison.changes if c.movement != "not comparable"}
    assert comparable == {"weight gain", "sigma_max", "sigma_min", "recurrent norm"}
    assert {
        c.part for c in comparison.changes if c.quantity.startswith("sigma") and not c.reason
    } == {"layer"}
    assert not comparison.moved
    reason = change_of(comparison, "loss").reason
    assert reason == "other data (16 samples in 2 batches, then 64 in 2)"
    assert change_of(comparison, "product of ratios").factor == pytest.approx((0.5 / 1.1) ** 9)


def test_with_another_loss_the_forward_pass_is_comparable():
    comparison = checkup().compare(setting(checkup(), loss="MSELoss"))
    assert change_of(comparison, "act_out", "layer1.0").movement == "within its error"
    assert change_of(comparison, "grad_in", "layer1.0").reason == (
        "another loss (CrossEntropyLoss, then MSELoss)"
    )


def test_blocks_are_matched_by_name():
    report = checkup()
    after = changed(report, blocks=(*report.blocks[2:], block(20)))
    comparison = report.compare(after)
    assert comparison.only_before == ("block layer1.0", "block layer1.1")
    assert comparison.only_after == ("block layer1.20",)
    assert not [c for c in comparison.changes if c.where in ("layer1.0", "layer1.20")]
    assert change_of(comparison, "ratio", "layer1.2").movement == "within its error"
    assert "Only before: block layer1.0, block layer1.1" in str(comparison)


def test_a_block_of_other_shapes_is_another_one():
    blocks = checkup().blocks
    wide = dataclasses.replace(blocks[0], shapes="8x64x4x4 -> 8x64x4x4")
    comparison = checkup().compare(changed(checkup(), blocks=(wide, *blocks[1:])))
    assert change_of(comparison, "ratio", "layer1.0").reason.startswith("other shapes")


def test_what_was_measured_once_only_is_not_comparable():
    report = checkup()
    less = changed(
        report,
        hessian=None,
        blocks=tuple(dataclasses.replace(b, jacobian=None) for b in report.blocks),
    )
    for comparison, when in ((report.compare(less), "after"), (less.compare(report), "before")):
        assert change_of(comparison, "Hessian kappa").reason == f"not measured {when}"
        assert change_of(comparison, "sigma_max", "layer1.0").reason == f"not measured {when}"
        assert change_of(comparison, "Gauss-Newton kappa").movement == "within its error"


def test_findings_go_come_and_stay():
    first, second, third = checkup().findings
    weaker = dataclasses.replace(first, number=near(0.05), where=("layer1.3", "layer1.4"))
    other = dataclasses.replace(third, kind="flat-units", severity="problem")
    comparison = checkup().compare(changed(checkup(), findings=(other, weaker, second)))
    outcomes = [(c.outcome, c.either.kind) for c in comparison.findings]
    assert outcomes == [
        ("new", "flat-units"), ("still there", "gradient-lost"), ("still there", "learning-rate"),
        ("gone", "dead-units"),
    ]  # fmt: skip
    assert comparison.findings[1].before is not None
    assert comparison.findings[1].after.number == near(0.05)
    assert [f.kind for f in comparison.new_problems] == ["flat-units"]
    assert "0.0100 [0.00980, 0.0102] -> 0.0500 [0.0490, 0.0510]" in " ".join(
        str(comparison).split()
    )


def test_a_finding_elsewhere_is_another_one():
    first = checkup().findings[0]
    moved = dataclasses.replace(first, where=("layer1.5",), evidence="blocks[5].ratio")
    comparison = changed(checkup(), findings=(first,)).compare(
        changed(checkup(), findings=(moved,))
    )
    assert [c.outcome for c in comparison.findings] == ["new", "gone"]


@pytest.mark.parametrize(
    "lack",
    [
        {"step_size": None},
        {"blocks": (), "step_size": None},
        {"activations": (), "step_size": None},
    ],
)
def test_a_finding_whose_number_was_not_measured_is_not_gone(lack):
    less = changed(checkup(findings=False), **lack)
    after = {c.either.kind: c.outcome for c in checkup().compare(less).findings}
    before = {c.either.kind: c.outcome for c in less.compare(checkup()).findings}
    expected = {
        "gradient-lost": "gone",
        "learning-rate": "not measured after",
        "dead-units": "gone",
    }
    if "blocks" in lack:
        expected["gradient-lost"] = "not measured after"
    if "activations" in lack:
        expected["dead-units"] = "not measured after"
    assert after == expected
    assert before == {
        kind: {"gone": "new"}.get(outcome, "not measured before")
        for kind, outcome in expected.items()
    }


def test_a_problem_of_a_block_that_was_not_there_is_new():
    finding = dataclasses.replace(checkup().findings[0], where=("layer1.8",))
    finding = dataclasses.replace(finding, evidence="blocks[8].ratio")
    deep = changed(checkup(), findings=(finding,))
    shallow = changed(checkup(findings=False), blocks=checkup().blocks[:4])
    assert shallow.compare(deep).new_problems == (finding,)
    (change,) = deep.compare(shallow).findings
    assert change.outcome == "gone"


def test_a_second_use_of_a_block_is_matched_with_a_second_use():
    twice = (block(0), block(0))
    finding = dataclasses.replace(checkup().findings[0], evidence="blocks[1].ratio")
    with_it = changed(checkup(findings=False), blocks=twice, findings=(finding,))
    nan = dataclasses.replace(block(0), ratio=NAN)
    for blocks, outcome in (
        ((nan, block(0)), "new"), ((block(0), nan), "not measured before"), (twice[:1], "new")
    ):  # fmt: skip
        before = changed(checkup(findings=False), blocks=blocks)
        assert [c.outcome for c in before.compare(with_it).findings] == [outcome]


@pytest.mark.parametrize(
    ("evidence", "data", "loss"),
    [
        ("blocks[3].ratio", "not comparable", "not comparable"),
        ("product", "not comparable", "not comparable"),
        ("step_size.quotient", "not comparable", "not comparable"),
        ("blocks[3].act_out", "not comparable", "new"),
        ("activations[1].dead_share", "not comparable", "new"),
        ("layers[0].weight_gain", "new", "new"),
        ("recurrent[0].growth_per_step", "not comparable", "not comparable"),
        ("recurrent[0].recurrent_norm", "new", "new"),
    ],
)
def test_with_other_data_or_loss_a_finding_is_not_new(evidence, data, loss):
    finding = dataclasses.replace(checkup().findings[0], evidence=evidence)
    after = changed(checkup(), findings=(finding,))
    for fields, outcome in (({"num_samples": 64}, data), ({"loss": "MSELoss"}, loss)):
        before = setting(checkup(findings=False), **fields)
        comparison = before.compare(after)
        assert [c.outcome for c in comparison.findings] == [outcome]
        assert bool(comparison.new_problems) == (outcome == "new")


def test_a_finding_of_a_block_of_other_shapes_is_not_new():
    wide = dataclasses.replace(block(3), shapes="8x64x4x4 -> 8x64x4x4")
    blocks = checkup().blocks
    before = changed(checkup(findings=False), blocks=(*blocks[:3], wide, *blocks[4:]))
    after = changed(checkup(), findings=checkup().findings[:1])
    assert [c.outcome for c in before.compare(after).findings] == ["not comparable"]


@pytest.mark.parametrize(
    ("before", "after", "movement"),
    [(4e-8, 2.6e-8, "within its error"), (4e-3, 2.6e-3, "moved")],
)
def test_a_distance_from_one_has_the_rounding_of_one(before, after, movement):
    pair = (changed(checkup(), mean_deviation=Estimate(v, v, v)) for v in (before, after))
    assert change_of(compare(*pair), "mean |1 - ratio|").movement == movement


def test_a_batch_in_another_order_moves_nothing():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(6, 6)
            torch.nn.init.normal_(self.inner.weight, std=1e-7)

        def forward(self, x):
            return x + torch.relu(self.inner(x))

    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(), Block(), torch.nn.Linear(6, 3))
    inputs, targets, order = torch.randn(33, 6), torch.randint(3, (33,)), torch.randperm(33)
    reports = [
        examine(model, torch.nn.CrossEntropyLoss(), batch, seconds=None, num_matvecs=200)
        for batch in ((inputs, targets), (inputs[order], targets[order]))
    ]
    assert reports[0].mean_deviation.value < 1e-6
    assert reports[0].mean_deviation != reports[1].mean_deviation
    assert not compare(*reports).moved


def test_of_one_batch_the_spread_is_said_to_be_unknown():
    assert not checkup().compare(checkup()).notes
    for pair in ((1, 1), (1, 2), (2, 1)):
        before, after = (setting(checkup(), num_batches=number) for number in pair)
        (note,) = compare(before, after).notes
        assert "note: one batch: how far norms spread" in str(compare(before, after))
        assert "a move may be that of the batch" in note


def test_what_did_not_move_keeps_its_order():
    after = changed(checkup(), loss=near(2.31), gradient_norm=near(1.21))
    assert [c.quantity for c in checkup().compare(after).changes][:4] == [
        "loss", "gradient norm", "product of ratios", "mean |1 - ratio|",
    ]  # fmt: skip
    after = changed(checkup(), loss=near(2.3001), gradient_norm=near(1.21))
    assert [c.quantity for c in checkup().compare(after).changes][:2] == ["loss", "gradient norm"]


def test_between_two_bounds_there_is_no_factor():
    one, other = Estimate(2.0, 2.0, math.inf), Estimate(8.0, 8.0, math.inf)
    for before, after in ((one, other), (one, near(8.0)), (near(2.0), other)):
        comparison = compare(changed(checkup(), loss=before), changed(checkup(), loss=after))
        assert math.isnan(change_of(comparison, "loss").factor)


def test_what_leaves_a_block_is_not_listed_again_where_it_enters_the_next():
    def with_norm(norm):
        first = dataclasses.replace(block(0), grad_out=norm, ratio=near(1.0))
        return changed(checkup(), blocks=(first, dataclasses.replace(block(1), grad_in=norm)))

    comparison = with_norm(near(0.3)).compare(with_norm(near(3.0)))
    assert [c.quantity for c in comparison.moved] == ["grad_out", "grad_in"]
    (_, listed) = str(comparison).split("Moved beyond the error")
    assert "grad_in" in listed
    assert "grad_out" not in listed
    assert "layer1.0" not in listed


def test_paths_are_taken_too(tmp_path):
    checkup().save(tmp_path / "a.json")
    checkup(ratio=0.5).save(tmp_path / "b.json")
    comparison = compare(str(tmp_path / "a.json"), tmp_path / "b.json")
    assert comparison == checkup().compare(checkup(ratio=0.5))


def test_what_is_no_checkup_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"after must be a Checkup .* got int"):
        compare(checkup(), 3)
    with pytest.raises(InvalidArgumentError, match=r"none\.json' cannot be read: No such file"):
        compare(checkup(), tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match=r"x\.json': This is no checkup"):
        compare(tmp_path / "x.json", checkup())
    (tmp_path / "y.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidArgumentError, match=r"y\.json'"):
        read(tmp_path / "y.json")


def test_json_is_strict_and_complete():
    comparison = changed(checkup(), loss=NAN).compare(checkup())
    plain = json.loads(comparison.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert len(plain["changes"]) == len(comparison.changes)
    assert plain["changes"][0].keys() >= {"quantity", "before", "after", "factor", "movement"}


def test_the_frame_has_a_row_for_each_change():
    comparison = checkup().compare(checkup(ratio=0.5))
    frame = comparison.to_frame()
    assert len(frame) == len(comparison.changes)
    ratios = frame[frame["quantity"] == "ratio"]
    assert ratios["factor"].tolist() == pytest.approx([0.5 / 1.1] * 9)
    assert set(ratios["movement"]) == {"moved"}


def test_the_text_fits_a_terminal_and_counts_what_it_leaves_out():
    blocks = tuple(block(d) for d in range(60))
    after = tuple(block(d, 0.9) for d in range(60))
    text = str(changed(checkup(), blocks=blocks).compare(changed(checkup(), blocks=after)))
    assert max(map(len, text.splitlines())) <= 100
    assert "... (36 more)" in text
    assert repr(checkup().compare(checkup())).startswith(
        "<Comparison of CifarResNet: 0 numbers moved"
    )
    assert "no number moved beyond its error" in str(checkup().compare(checkup()))
