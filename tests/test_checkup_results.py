"""Checkups as JSON and back."""

from __future__ import annotations

import json

import pytest
from checkups import checkup

from conditioning.checkup import Checkup
from conditioning.errors import InvalidArgumentError


def test_json_and_back_is_the_same():
    report = checkup()
    text = report.to_json()
    again = Checkup.from_json(text)
    assert again.to_json() == text
    assert again.blocks == report.blocks
    assert again.hessian == report.hessian
    assert again.findings == report.findings


def test_json_is_strict(tmp_path):
    plain = json.loads(
        checkup().to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert plain["hessian"]["condition"]["high"] == "inf"
    assert plain["blocks"][8]["jacobian"] is None
    checkup().save(tmp_path / "a" / "report.json")
    assert Checkup.load(tmp_path / "a" / "report.json") == checkup()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("hello", "no JSON"),
        ("[1]", "no checkup"),
        ("{}", "no checkup"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1}', "other fields"),
    ],
)
def test_what_is_no_checkup_is_refused(text, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Checkup.from_json(text)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("loss", "value"), "much"),
        (("blocks",), {}),
        (("status",), "fine"),
        (("num_matvecs",), 1.5),
        (("setting", "notes"), "none"),
        (("hessian", "size"), True),
    ],
)
def test_wrong_entries_are_named(path, value):
    plain = json.loads(checkup().to_json())
    place = plain
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InvalidArgumentError, match=path[-1]):
        Checkup.from_json(json.dumps(plain))


def test_the_suffix_decides(tmp_path):
    with pytest.raises(InvalidArgumentError, match="suffix"):
        checkup().save(tmp_path / "report.pdf")
