"""What the README and the docstrings show is what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import conditioning

README = Path(__file__).parent.parent / "README.rst"
MODULES = [
    module.name
    for module in pkgutil.walk_packages(conditioning.__path__, "conditioning.")
    if not module.name.endswith("__main__")
]


def test_the_examples_of_the_readme_run_as_shown():
    failures, tried = doctest.testfile(str(README), module_relative=False)
    assert tried >= 12
    assert failures == 0


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
