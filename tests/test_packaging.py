"""The promises of the packaging: pins for every requirement, types marked, one version."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import conditioning

ROOT = Path(__file__).resolve().parent.parent


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_requirement_is_pinned(config):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {canonical(line.split("==")[0]) for line in lines if "==" in line}
    required = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    names = {
        canonical(re.match(r"[\w.-]+", line).group())
        for text in required
        for line in text.split("\n")
        if line.strip()
    }
    assert "torch" in names
    assert names <= pins
    assert "torchvision" not in names | pins


def test_each_pin_is_exact_and_unique_for_a_python():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pattern = r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?'
    assert [line for line in pins if not re.fullmatch(pattern, line)] == []
    keys = [re.sub(r"==[^;]+", "", line) for line in pins]
    assert len(set(keys)) == len(keys)
    unmarked = {key for key in keys if ";" not in key}
    assert not unmarked & {key.split(";")[0] for key in keys if ";" in key}


def test_packages_are_marked_as_typed():
    for package in ("conditioning", "experiments"):
        assert (ROOT / package / "py.typed").is_file()


def test_the_version_is_read_without_importing_the_package(config):
    assert config["metadata"]["version"] == "attr: conditioning.__version__"
    source = (ROOT / "conditioning" / "__init__.py").read_text("utf-8")
    assert f'__version__ = "{conditioning.__version__}"' in source


def test_every_file_that_is_no_module_is_package_data(config):
    listed = config["options.package_data"]
    for package in ("conditioning", "experiments"):
        patterns = listed[package].split()
        files = {
            path.relative_to(ROOT / package)
            for path in (ROOT / package).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        assert files
        assert [path for path in files if not any(path.match(p) for p in patterns)] == []
