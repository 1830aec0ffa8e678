"""The page of a checkup: well-formed, alone, escaped, and with the numbers of the JSON."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from checkup_variants import LONG, SCRIPT, VARIANTS, bare, broken, faultless
from checkups import checkup
from pages import Page, at, same
from torch import nn

from conditioning import Estimate
from conditioning import checkup as measure
from conditioning.checkup import Checkup
from conditioning.checkup.page import STATUSES, notebook, page, verdict
from conditioning.spectrum import ConditionNumber

# What the table of the spectra may lack.
OF_SPECTRA = {
    f"{matrix}.{field}"
    for matrix in ("hessian", "gauss_newton")
    for field in ("largest", "smallest", "index", "trace")
}


@functools.cache
def made(name):
    report = VARIANTS[name]()
    return report, page(report)


def estimates(plain, path=""):
    """Paths of all numbers with an enclosure in the JSON."""
    if isinstance(plain, dict):
        if {"value", "low", "high"} <= set(plain):
            yield path
        for key, value in plain.items():
            inner = f"{path}[{key}]" if path.endswith("quantiles") else f"{path}.{key}".lstrip(".")
            yield from estimates(value, inner)
    elif isinstance(plain, list):
        for place, value in enumerate(plain):
            yield from estimates(value, f"{path}[{place}]")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_page_is_well_formed_and_needs_nothing_else(name):
    _, text = made(name)
    read = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    ids = read.attributes("id")
    assert len(set(ids)) == len(ids)
    for reference in ("src", "href", "xlink:href", "action", "srcset", "data"):
        for target in read.attributes(reference):
            assert target.startswith("#")
            assert target[1:] in ids
    assert not re.search(r"url\((?!#)|@import|javascript:", text)
    assert [key for _, attrs in read.tags for key in attrs if key.startswith("on")] == []
    assert len(text) < 1_000_000


@pytest.mark.parametrize("name", VARIANTS)
def test_the_numbers_are_those_of_the_json(name):
    report, text = made(name)
    plain = json.loads(report.to_json())
    read = Page(text)
    assert read.numbers
    for attrs, shown in read.numbers:
        stored = at(plain, attrs["data-path"])
        if "data-low" not in attrs:
            assert same(attrs["data-value"], stored)
            continue
        for end in ("value", "low", "high"):
            assert same(attrs[f"data-{end}"], stored[end]), attrs["data-path"]
        said = " ".join(shown.split()).replace("\u2212", "-").replace("∞", "inf")
        ends = [float(stored[end]) for end in ("value", "low", "high")]
        if "zero_threshold" in stored:
            number = said.removesuffix(" no upper bound").replace("≥", ">=")
            fields = {f: 0.0 for f in ConditionNumber.__dataclass_fields__}
            fields |= dict(zip(("value", "low", "high"), ends, strict=True), status="certified")
            assert number in str(ConditionNumber(**fields))
        else:
            absent = "not measured" if attrs["data-path"] in OF_SPECTRA else "NaN"
            assert said == (absent if math.isnan(ends[0]) else str(Estimate(*ends)))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_number_with_an_enclosure_is_on_the_page(name):
    report, text = made(name)
    shown = {attrs["data-path"] for attrs, _ in Page(text).numbers}
    assert set(estimates(json.loads(report.to_json()))) - shown == set()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_figure_is_told_in_words_and_small(name):
    _, text = made(name)
    drawn = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert bool(drawn) == (name not in ("bare", "interrupted"))
    for svg in drawn:
        assert len(svg) < 100_000
        (_, root), *rest = Page(svg).tags
        title, description = (
            next(attrs["id"] for tag, attrs in rest if tag == which) for which in ("title", "desc")
        )
        assert root["role"] == "img"
        assert root["aria-labelledby"] == f"{title} {description}"
        assert "nan" not in svg.split("</desc>")[1]
        assert "<metadata" not in svg


def test_the_page_is_the_same_for_the_same_checkup():
    assert page(checkup()) == made("as usual")[1]


def test_the_figures_take_their_colours_from_the_page():
    from conditioning.plots.svg import ROLES

    text = made("broken")[1]
    bare_colour = re.compile(r"(?:fill|stroke): (#[0-9a-f]{6})")
    assert bare_colour.findall(text) == []
    dark = text.split("prefers-color-scheme: dark")[1].split("* {")[0]
    for role, colour in ROLES.items():
        assert f"--plot-{role}: " in dark
        assert f"var(--plot-{role}, {colour})" in text


def test_names_are_text_and_never_markup():
    report, text = made("broken")
    assert SCRIPT not in text
    read = Page(text)
    said = "".join(read.text)
    assert said.count(SCRIPT) >= 10
    assert LONG in said
    assert "(model)" in said
    assert report.blocks[9].name in said
    framed = notebook(report)
    assert SCRIPT not in framed
    (tag, attrs), *_ = Page(framed).tags
    assert tag == "iframe"
    assert attrs["srcdoc"].replace('<base href="about:srcdoc">', "") == text
    assert "allow-scripts" not in attrs["sandbox"]


def test_findings_lead_and_link_to_their_evidence():
    report, text = made("as usual")
    read = Page(text)
    assert list(read.sections) == [
        "findings", "numbers", "depth", "layers", "activations", "recurrent", "spectrum", "theory",
        "missing", "how", "legend",
    ]  # fmt: skip
    places = [read.sections["findings"].index(f.sentence) for f in report.findings]
    assert places == sorted(places)
    for finding in report.findings:
        assert finding.remedy in read.sections["findings"]
    for target in ("blocks-3", "step_size", "activations-1"):
        assert f'href="#{target}"' in text
    rows = {
        attrs["id"]: attrs.get("class") for tag, attrs in read.tags if tag == "tr" and "id" in attrs
    }
    assert rows["blocks-3"] == "problem"
    assert rows["activations-1"] == "remark"
    assert rows["blocks-4"] is None
    # A row is marked by the name, too, but only in the table that the evidence is in.
    first = replace(report.findings[0], where=("layer1.3", "layer1.7", "conv1"))
    many = page(replace(report, findings=(first, *report.findings[1:])))
    rows = {attrs["id"]: attrs.get("class") for _, attrs in Page(many).tags if "id" in attrs}
    marked = {name for name, tone in rows.items() if tone == "problem"}
    assert marked == {"blocks-3", "blocks-7"}
    assert "#nowhere" not in made("broken")[1]


def test_sections_without_content_say_why_or_are_left_out():
    read = Page(made("bare")[1])
    assert set(read.sections) == {"numbers", "depth", "spectrum", "missing", "how", "legend"}
    assert "none were found; pass blocks=" in read.sections["depth"]
    assert "the loss has no second derivative" in read.sections["spectrum"]
    assert "Gauss-Newton matrix: it was not measured" in read.sections["spectrum"]
    assert "Nothing" in Page(made("faultless")[1]).sections["missing"]
    one = replace(checkup(), blocks=tuple(replace(b, jacobian=None) for b in checkup().blocks))
    assert "the budget of 60 seconds; give more" in Page(page(one)).sections["depth"]


@pytest.mark.parametrize(
    ("report", "tone", "headline", "rest"),
    [
        (checkup(), "problem", "2 problems found", "the weightiest in layer1.3; 1 remark besides"),
        (checkup(findings=False), "fine", "No problem found in what was measured",
         "norms of 9 blocks, 7 Jacobians, 2 activations, weights of 2 layers, 1 recurrent layer, "
         "spectrum of the Hessian, spectrum of the Gauss-Newton; not measured or not certified: "
         "Jacobians of 2 blocks"),
        (checkup(findings=False, status="out of budget"), "remark", "No problem found in what", ""),
        (replace(checkup(), findings=checkup().findings[1:2]), "problem", "1 problem found", ""),
        (replace(checkup(), findings=checkup().findings[2:]), "remark", "No problem", "1 remark"),
        (bare(), "remark", "Next to nothing", "Spectrum of the Hessian, Blocks"),
        (broken(), "problem", "3 problems", "came up: the output of"),
        (replace(faultless(), loss=Estimate(math.nan, math.nan, math.nan)), "problem",
         "Not finite", "came up: the loss"),
    ],
)  # fmt: skip
def test_the_verdict_claims_no_more_than_was_measured(report, tone, headline, rest):
    found = verdict(report)
    assert found.tone == tone
    assert found.headline.startswith(headline)
    assert rest in found.rest
    assert f"{found.headline}{found.rest}".count(". ") == 0


@pytest.mark.parametrize("status", ["out of budget", "interrupted"])
def test_an_unfinished_checkup_says_so_at_its_head(status):
    head = page(bare(status)).split("<main>")[0]
    assert {"out of budget": "Stopped by its budget", "interrupted": "Interrupted"}[status] in head
    assert "Everything" not in head


def test_statuses_on_the_page_are_explained_and_no_others():
    legend = Page(made("as usual")[1]).sections["legend"]
    assert {name for name, meaning in STATUSES.items() if meaning in legend} == {
        "exact", "certified", "estimated", "lower bound only", "inside", "outside",
    }  # fmt: skip


def test_a_table_of_many_rows_scrolls_in_a_box_that_keys_reach():
    boxes = [attrs for _, attrs in Page(made("deep")[1]).tags if "scroll" in attrs.get("class", "")]
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    tall = {box["aria-label"] for box in boxes if "tall" in box["class"]}
    assert tall == {
        "Norms, block by block", "Jacobians, block by block", "Layers", "Activations"
    }  # fmt: skip


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("broken_weight", [False, True], ids=["finite", "NaN"])
def test_a_real_checkup_is_on_its_page_with_every_number(broken_weight):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), Residual(8), Residual(8), nn.Linear(8, 3))
        batch = (torch.randn(16, 6), torch.randint(3, (16,)))
    if broken_weight:
        with torch.no_grad():
            model[1].first.weight[0, 0] = math.nan
    measured = measure(
        model, nn.CrossEntropyLoss(), batch, seconds=None, num_matvecs=400, progress=False
    )
    report = Checkup.from_json(measured.to_json())
    assert len(report.blocks) == 2
    assert math.isfinite(report.loss.value) != broken_weight
    text = page(report)
    read = Page(text)
    plain = json.loads(measured.to_json())
    shown = {attrs["data-path"]: attrs for attrs, _ in read.numbers}
    wanted = list(estimates(plain))
    assert set(wanted) - set(shown) == set()
    for path in wanted:
        for end in ("value", "low", "high"):
            assert same(shown[path][f"data-{end}"], at(plain, path)[end])
    assert ("no positive, finite number" in text) == broken_weight
    assert "over the batches" not in text.split("<main>")[1].split("</dl>")[0]
    assert "one batch" in str(report)
    assert ("NaN or infinity" in str(report)) == broken_weight
    if not broken_weight:
        assert all(block.jacobian is not None for block in report.blocks)
        assert report.hessian is not None
        assert {"0.05", "0.95"} <= set(report.hessian.density.quantiles)
