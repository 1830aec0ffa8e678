"""The gallery: each ailment is found and named, and its twin is clean."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from checkups import checkup

from conditioning import Estimate
from conditioning.checkup import Finding
from conditioning.errors import InvalidArgumentError
from experiments.gallery import judging
from experiments.gallery.__main__ import cases_of, examine, main, networks, show, write
from experiments.gallery.ailments import ailments
from experiments.gallery.cases import Case, digits, seeded, sequences, tokens
from experiments.gallery.networks import balance_

FIRST = {case.ailment: case for case in ailments() if case.variant == 0}
ALL = cases_of()


def test_there_are_eight_ailments_with_three_held_out_variants_each():
    assert len(FIRST) == 8
    for ailment in FIRST:
        variants = [case.variant for case in ALL if case.ailment == ailment]
        assert variants[:4] == [0, 1, 2, 3]
    assert len({case.name for case in ALL}) == len(ALL)


@pytest.mark.slow
@pytest.mark.parametrize("ailment", FIRST)
def test_the_ailment_leads_and_its_place_is_named(ailment):
    sick, twin = examine(FIRST[ailment])
    assert (sick.found, sick.outcome) == (FIRST[ailment].kind, "hit")
    assert sick.where.split()[:1] == [FIRST[ailment].where] or not FIRST[ailment].where
    assert not sick.low <= sick.limit <= sick.high
    assert (twin.state, twin.outcome) == ("twin", "clean"), twin.sentence


def healthy_zero():
    return [case for case in ALL if case.twin is None and case.variant == 0]


@pytest.mark.slow
@pytest.mark.parametrize("case", healthy_zero(), ids=lambda case: case.ailment)
def test_a_healthy_net_gets_a_clean_page(case):
    (judged,) = examine(case)
    assert judged.outcome == "clean", judged.sentence


@pytest.mark.parametrize("case", [c for c in ALL if c.twin is not None], ids=lambda c: c.name)
def test_a_twin_has_the_size_of_the_sick_one(case):
    made = [patient for _, patient in networks(case)]
    sizes = [sum(p.numel() for p in patient.model.parameters()) for patient in made]
    assert sizes[0] == sizes[1]
    for (a, x), (b, y) in zip(made[0].data, made[1].data, strict=True):
        assert a.shape == b.shape
        assert torch.equal(x, y)


def test_networks_are_drawn_by_their_seed_alone():
    case = FIRST["bad-gain"]
    first = case.sick().model.state_dict()
    before = torch.get_rng_state()
    torch.manual_seed(123)
    second = case.sick().model.state_dict()
    torch.set_rng_state(before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    state = torch.get_rng_state()
    with seeded(0):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_data():
    images, labels = digits(0, batch=8)[0]
    assert images.shape == (8, 1, 8, 8)
    assert labels.shape == (8,)
    assert digits(0, raw=True)[0][0].max() == 255
    everything = torch.cat([x for x, _ in digits(0, batch=1797, batches=1)])
    assert float(everything.mean()) == pytest.approx(0, abs=1e-5)
    assert float(everything.std()) == pytest.approx(1, abs=1e-5)
    steps, classes = sequences(0, steps=5, features=3, batch=4)[1]
    assert (steps.shape, classes.shape) == ((4, 5, 3), (4,))
    words, following = tokens(0, steps=5, vocabulary=9, batch=4)[0]
    assert torch.equal(words[:, 1:], following[:, :-1])


@pytest.mark.parametrize(("rank", "scale"), [(None, 1.0), (2, 0.5), (0, 1.0)])
def test_balanced_kernels(rank, scale):
    layer = torch.nn.Conv2d(4, 8, 1, bias=False)
    balance_(layer, rank=rank, scale=scale)
    values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    kept = 4 if rank is None else rank
    expected = torch.tensor([scale * 2**0.5] * kept + [0.0] * (4 - kept))
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)


def test_a_rank_above_the_most_is_refused():
    with pytest.raises(InvalidArgumentError, match="rank must be from 0 to 4"):
        balance_(torch.nn.Conv2d(4, 8, 1), rank=5)


# ---------------------------------------------------------------------- judging


def found(kind, where=(), severity="problem"):
    number = Estimate(2.0, 2.0, 2.0)
    return Finding(kind, severity, 1.0, where, "It is.", "Mend it.", number, 1.0, "product")


def case(kind="dead-units", where="a", variant=0):
    return Case("x", variant, "a net", kind, where, lambda: None, lambda: None)


@pytest.mark.parametrize(
    ("state", "findings", "outcome"),
    [
        ("sick", [found("dead-units", ("a", "b"))], "hit"),
        ("sick", [found("dead-units", ("b", "a"))], "wrong place"),
        ("sick", [found("weight-gain"), found("dead-units", ("a",))], "wrong kind"),
        ("sick", [found("dead-units", ("a",), "remark")], "missed"),
        ("sick", [], "missed"),
        ("twin", [], "clean"),
        ("twin", [found("dead-units", ("a",), "remark")], "clean"),
        ("twin", [found("weight-gain")], "false alarm"),
        ("healthy", [found("weight-gain")], "false alarm"),
    ],
)
def test_outcomes(state, findings, outcome):
    report = dataclasses.replace(checkup(findings=False), findings=tuple(findings))
    judged = judging.judge(case(), state, report)
    assert judged.outcome == outcome
    assert judged.right == (outcome in ("hit", "clean"))


def test_counts_tell_seen_variants_from_others(capsys):
    report = dataclasses.replace(checkup(findings=False), findings=())
    judgements = [judging.judge(case(variant=v), "sick", report) for v in (0, 1, 3, 4)]
    counts = judging.counted(judgements)
    assert counts["ailments, variant 0"] == {"missed": 1}
    assert counts["ailments, variants 1 to 3"] == {"missed": 2}
    assert counts["ailments, later variants"] == {"missed": 1}
    import sys

    show(judgements, sys.stdout)
    shown = capsys.readouterr().out
    assert "missed: x/3 (sick; a net): expected dead-units a, found nothing" in shown
    assert "ailments, variants 1 to 3: 2 missed" in shown


def test_tables(tmp_path):
    report = dataclasses.replace(checkup(findings=False), findings=(found("weight-gain"),))
    judgements = [judging.judge(case(), state, report) for state in ("sick", "twin")]
    write(judgements, tmp_path / "new")
    with (tmp_path / "new" / "gallery.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["outcome"] for row in rows] == ["wrong kind", "false alarm"]
    assert float(rows[0]["value"]) == 2.0
    plain = json.loads((tmp_path / "new" / "gallery.json").read_text(encoding="utf-8"))
    assert plain["counts"]["twins, variant 0"] == {"false alarm": 1}
    assert [entry["state"] for entry in plain["not right"]] == ["sick", "twin"]


def test_the_command_refuses_unknown_names(capsys):
    assert main(["no-such-case"]) == 2
    assert "bad-gain" in capsys.readouterr().err


def test_the_command_on_one_case_writes_no_table(tmp_path, capsys):
    assert main(["dead-relu/1", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "ailments, variants 1 to 3: 1 hit" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
