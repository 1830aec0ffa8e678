"""The documentation is complete: every name, experiment, figure and link; Sphinx is not needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import conditioning
from conditioning import errors, plots, theory
from experiments import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.rst") if "_build" not in path.parts)
REFERENCE = "\n".join(
    path.read_text(encoding="utf-8") for path in PAGES if path.parent.name == "api"
)


def documented(module):
    """Names that the reference documents one by one, below ``currentmodule`` of this module."""
    found = []
    for part in re.split(r"^\.\. currentmodule:: ", REFERENCE, flags=re.M)[1:]:
        name, _, rest = part.partition("\n")
        if name == module:
            found += re.findall(r"^\.\. auto(?:class|function|data):: (\w+)$", rest, re.M)
    return found


def text_of(name):
    return (DOCS / "gallery" / f"{name}.rst").read_text(encoding="utf-8")


def figures_of(name):
    """Figure, alt text and ids of claims of the page of an experiment."""
    pattern = (
        r"^\.\. experiment-figure:: (\S+)\n   :alt: (.*?)\n   :claims: (.*?)\n\n   (\S.*?)\n\n"
    )
    return re.findall(pattern, text_of(name), re.M | re.S)


@pytest.mark.parametrize("module", [conditioning, theory], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference_once(module):
    assert sorted(documented(module.__name__)) == sorted(module.__all__)


@pytest.mark.parametrize("module", [conditioning, theory], ids=lambda module: module.__name__)
def test_every_public_name_is_in_a_table_of_the_reference(module):
    pattern = r"^\.\. autosummary::\n   :nosignatures:\n\n((?:   \w+\n)+)"
    tables = re.findall(pattern, REFERENCE, re.M)
    assert set(module.__all__) <= set("".join(tables).split())


@pytest.mark.parametrize("module", [errors, plots], ids=lambda module: module.__name__)
def test_modules_that_are_documented_as_a_whole_are(module):
    assert f".. automodule:: {module.__name__}\n   :members:" in REFERENCE


def test_every_experiment_has_its_page_and_there_are_no_others():
    assert sorted(path.stem for path in (DOCS / "gallery").glob("*.rst")) == sorted(
        registry.names()
    )
    gallery = (DOCS / "gallery.rst").read_text(encoding="utf-8")
    assert re.findall(r"^   gallery/(\w+)$", gallery, re.M) == registry.names()


@pytest.mark.parametrize("name", registry.names())
def test_the_page_of_an_experiment_is_made_from_its_results(name):
    text = text_of(name)
    assert f"\n.. experiment:: {name}\n" in text
    assert f"\n.. verdict-table:: {name}\n" in text


@pytest.mark.parametrize("name", registry.names())
def test_every_committed_figure_is_shown_with_a_text_and_its_claims(name):
    shown = figures_of(name)
    committed = sorted(path.stem for path in (ROOT / "figures" / name).glob("*.png"))
    assert sorted(figure for figure, *_ in shown) == [f"{name}/{stem}" for stem in committed]
    document = json.loads((ROOT / "figures" / name / "verdicts.json").read_text("utf-8"))
    known = {claim["id"] for claim in document["claims"]}
    for figure, alt, ids, caption in shown:
        assert len(alt.split()) >= 12, figure
        assert ids.split(), figure
        assert set(ids.split()) <= known, figure
        assert caption, figure


def test_every_page_is_reached_from_the_first_one():
    seen, todo = set(), ["index"]
    while todo:
        name = todo.pop()
        seen.add(name)
        text = (DOCS / f"{name}.rst").read_text(encoding="utf-8")
        folder = Path(name).parent
        for block in re.findall(r"^\.\. toctree::\n(?:   :.*\n)*\n((?:   \S+\n)+)", text, re.M):
            entries = [(folder / entry).as_posix() for entry in block.split()]
            todo += [entry for entry in entries if entry not in seen]
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES}
    assert seen == pages


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_local_link_of_a_page_leads_to_a_file(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r":doc:`(?:[^`<]*<)?([\w/.-]+)>?`", text):
        assert (path.parent / f"{target}.rst").is_file(), target
    for target in re.findall(r"`[^`<]*<([^>`]+)>`_", text):
        if not re.match(r"https?://|#", target):
            assert (path.parent / target).is_file(), target
    for target in re.findall(r"^\.\. (?:image|include|literalinclude):: (\S+)", text, re.M):
        assert (path.parent / target).is_file(), target


def test_every_local_link_of_the_front_page_leads_to_a_file():
    text = (ROOT / "README.rst").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"<([^>`\s]+)>`__?", text) if not t.startswith("http")]
    assert len(targets) > 20
    for target in targets:
        assert (ROOT / target).is_file(), target


def test_every_image_has_a_text_for_those_who_do_not_see_it():
    for path in [ROOT / "README.rst", *PAGES]:
        text = path.read_text(encoding="utf-8")
        for image, option in re.findall(r"^\.\. image:: (\S+)\n(.*)$", text, re.M):
            assert option.startswith("   :alt: "), (path.name, image)


def test_every_status_is_explained_with_an_example():
    from typing import get_args

    from conditioning.spectrum.results import Status

    trust = (DOCS / "trust.rst").read_text(encoding="utf-8")
    for status in get_args(Status):
        section = re.search(rf"^{status}\n~+\n(.*?)(?=^\S[^\n]*\n[~-]{{4,}}\n)", trust, re.M | re.S)
        assert section, status
        assert f"'{status}'" in section[1], status
