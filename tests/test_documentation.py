"""What the README and the docstrings show is what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import conditioning

ROOT = Path(__file__).parent.parent
README = ROOT / "README.rst"
PAGES = sorted((ROOT / "docs").glob("*.rst"))
# How many lines each page runs at the least; a page that has none must not have lost them.
EXAMPLES = {"checkup": 10, "hessian": 15, "layers": 15, "norms": 15, "tour": 35, "trust": 45}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(conditioning.__path__, "conditioning.")
    if not module.name.endswith("__main__")
]


def test_the_examples_of_the_readme_run_as_shown():
    failures, tried = doctest.testfile(str(README), module_relative=False)
    assert tried >= 12
    assert failures == 0


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_examples_of_the_pages_run_as_shown(path):
    failures, tried = doctest.testfile(str(path), module_relative=False)
    assert failures == 0
    assert tried >= EXAMPLES.get(path.stem, 0)
    assert (tried > 0) == (path.stem in EXAMPLES)


def test_the_front_page_shows_four_examples_of_some_ten_lines_with_a_picture_each():
    text = README.read_text(encoding="utf-8").split("Two commands\n----")[0]
    parts = re.split(r"^\S[^\n]*\n-{4,}\n", text, flags=re.M)[1:]
    assert len(parts) >= 4
    for part in parts:
        examples = doctest.DocTestParser().get_examples(part)
        assert examples
        assert sum(example.source.count("\n") for example in examples) <= 12
        assert len([line for line in part.splitlines() if line.startswith(".. image::")]) == 1


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run_as_shown(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_the_images_of_the_readme_are_there():
    lines = README.read_text(encoding="utf-8").splitlines()
    images = [line.split("::")[1].strip() for line in lines if line.startswith(".. image::")]
    assert images
    for image in images:
        assert (README.parent / image).is_file(), image


@pytest.mark.parametrize("name", conditioning.__all__)
def test_every_public_name_has_a_docstring(name):
    assert (getattr(conditioning, name).__doc__ or "").strip()
