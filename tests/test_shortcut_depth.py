"""The shortcut-depth experiment, small: its verdicts, its files, and that they can come out bad."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import registry, shortcut_depth
from experiments.shortcut_depth import Sizes, laboratory, verdicts

SMALL = Sizes(
    summary="for tests",
    seeds=2,
    two=(2, 4, 16, 64),
    one=(1, 2, 3, 4, 6, 8, 16),
    initialisation=(2, 4, 8, 16),
    smooth=(1,),
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a small run, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shortcut_depth.PRESETS, "quick", SMALL)
        folder = tmp_path_factory.mktemp("shortcut_depth")
        yield registry.options_for(shortcut_depth, device="cpu", out=folder, progress=False)


@pytest.fixture(scope="module")
def decided(options):
    """The verdicts of that run, by the claims' ids."""
    return {verdict.claim.id: verdict for verdict in registry.run(shortcut_depth, options)}


def test_every_claim_holds_but_the_one_whose_assumption_is_broken(decided):
    values = {name: verdict.value for name, verdict in decided.items()}
    assert values.pop("n2.violated") == "fails"
    # Three increments and two seeds are too few for an interval within the tolerance.
    for name in ("init.orthogonal", "n1.kappa10-linear"):
        assert values.pop(name) in ("holds", "not decided")
    assert set(values.values()) == {"holds"}, values


def test_the_numbers_are_those_of_the_data(decided, options):
    kappa = decided["n2.kappa"]
    singular = pd.read_csv(options.out / "data.csv")["singular_value_of_D"]
    assert kappa.measured == pytest.approx(singular.max() / singular.min(), rel=1e-9)
    assert kappa.measured == pytest.approx(1.6783386825, rel=1e-9)  # digits, ten components
    assert decided["n2.products"].measured == 21
    assert decided["n1.nullity"].measured == 45


def test_tables_figures_and_verdicts_are_written(decided, options):
    for name in ("condition_number", "spectrum_at_zero", "products"):
        assert (options.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    frame = pd.read_csv(options.out / "condition_numbers.csv")
    two = frame[(frame.part == "two") & (frame.route == "lanczos")]
    assert set(two.status) == {"exhausted"}
    assert set(frame.quantity) == {"kappa", "kappa10"}
    written = json.loads((options.out / "verdicts.json").read_text())
    assert [claim["id"] for claim in written["claims"]] == [c.id for c in shortcut_depth.claims()]
    largest = pd.read_csv(options.out / "largest_eigenvalues.csv")
    one = largest[largest.shortcut_depth == 1]
    assert np.allclose(one.pyhessian, one.lanczos, rtol=1e-2)


def test_a_result_that_contradicts_the_theory_fails(decided, options):
    cells = shortcut_depth.cells(SMALL, 2)
    with options.__class__(**{**vars_of(options), "mode": "resume"}).open_store() as store:
        measured = [(cell, dict(store[cell])) for cell in cells]
    context = {
        "dim": 10,
        "singular_values": np.linspace(1.0, 2.0, 10)[::-1],
        "kappa_over_signs": (1.5, 2.5),
    }
    wrong = {v.claim.id: v.value for v in verdicts.decide_claims(measured, context)}
    assert wrong["n2.kappa"] == "fails"
    assert wrong["n2.spectrum"] == "fails"
    assert wrong["init.two-shortcut"] == "fails"
    assert wrong["n1.hessian"] == "holds"  # does not use the singular values


def vars_of(options):
    """The fields of frozen options, without what they cached."""
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


def test_derivatives_along_a_line_are_those_of_a_known_polynomial():
    from experiments.models import ShortcutNet

    net = ShortcutNet(1, 1, 3)
    inputs, targets = torch.tensor([[2.0]]).double(), torch.tensor([[0.5]]).double()
    direction = torch.tensor([1.0, 2.0, 3.0]).double().reshape(1, 3, 1, 1)
    # Loss (2 (1 + 6 t^3) - 0.5)^2 / 2: the third derivative at zero is 6 * 1.5 * 12.
    found = laboratory.line_derivatives(net, direction, (inputs, targets), 3)
    assert found == pytest.approx([0, 0, 108])


def test_other_data_of_another_width_are_taken(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 4
    images = rng.normal(size=(300, 6, 6)) + labels[:, None, None] * np.eye(6)
    np.savez(tmp_path / "small.npz", x=images, y=labels)
    tiny = Sizes(
        summary="tiny",
        seeds=1,
        two=(2, 4),
        one=(1, 2, 4),
        initialisation=(2, 16),
        smooth=(1,),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shortcut_depth.PRESETS, "quick", tiny)
        options = registry.options_for(
            shortcut_depth, data_name=str(tmp_path / "small.npz"), device="cpu",
            out=tmp_path / "out", progress=False,
        )  # fmt: skip
        decided = {v.claim.id: v for v in registry.run(shortcut_depth, options)}
    assert decided["n2.kappa"].value == "holds"
    assert decided["n2.products"].expected == 9
