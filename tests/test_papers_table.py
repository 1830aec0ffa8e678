"""The table of papers in the README says what the committed verdicts say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text(encoding="utf-8")
# Paper, claim with its ids, measured, verdict, figure.
COLUMNS = 5


def rows():
    """Cells of the table that has a figure in its last column."""
    start = README.index("   * - paper\n")
    table = README[start : README.index("\n\n.. ", start)]
    found = []
    for row in re.split(r"\n   \* -(?: |(?=\n))", "\n" + table)[1:]:
        cells = [" ".join(cell.split()) for cell in re.split(r"\n     - ", row)]
        assert len(cells) == COLUMNS, cells
        found.append(cells)
    return found[1:]


def of(name):
    """Verdicts of an experiment by claim."""
    document = json.loads((ROOT / "figures" / name / "verdicts.json").read_text("utf-8"))
    return {claim["id"]: claim["verdict"] for claim in document["claims"]}


def ids(claim):
    return re.findall(r"``([a-z0-9.-]+)``", claim)


def test_every_verdict_of_the_table_is_the_committed_one():
    for _, claim, _, verdict, figure in rows():
        name = re.search(r"figures/(\w+)/(\w+\.png)", figure)
        assert name, figure
        assert (ROOT / "figures" / name[1] / name[2]).is_file(), figure
        named = ids(claim)
        assert named, claim
        values = {of(name[1])[one] for one in named}
        assert values == {verdict}, (claim, values)


def test_every_experiment_is_in_the_table():
    shown = {re.search(r"figures/(\w+)/", row[-1])[1] for row in rows()}
    assert shown == set(registry.names())


def test_the_number_of_claims_is_the_one_that_is_told():
    counts = {"holds": 0, "fails": 0, "not decided": 0}
    for name in registry.names():
        for verdict in of(name).values():
            counts[verdict] += 1
    total = sum(counts.values())
    text = " ".join(README.split())
    assert f"prints {total} verdicts" in text
    told = (
        f"Of {total} claims {counts['holds']} hold, {counts['fails']} fail and "
        f"{counts['not decided']} are not decided"
    )
    assert told in text, told


@pytest.mark.parametrize("name", registry.names())
def test_every_experiment_has_its_section(name):
    papers = (ROOT / "docs" / "papers.rst").read_text("utf-8")
    assert f"``{name}``\n---" in papers
    assert f"-m experiments {name}" in README
    counts = list(of(name).values())
    section = " ".join(papers.split(f"``{name}``\n---")[1].split())
    assert f"Of {len(counts)} claims {counts.count('holds')} hold" in section


def test_the_images_of_the_papers_are_there():
    papers = ROOT / "docs" / "papers.rst"
    lines = papers.read_text("utf-8").splitlines()
    images = [line.split("::")[1].strip() for line in lines if line.startswith(".. image::")]
    assert images
    for image in images:
        assert (papers.parent / image).resolve().is_file(), image
