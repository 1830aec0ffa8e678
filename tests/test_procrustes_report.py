"""What the report says, and on which circle it measures."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from test_procrustes import three_layers
from test_procrustes_routes import values_of
from torch import nn

from conditioning import singular_values
from conditioning.errors import InvalidArgumentError, LayerSelectionError, ShapeError
from conditioning.procrustes import (
    IsometricDownsample,
    LayerReport,
    Procrustes,
    ProcrustesReport,
    routes,
)
from conditioning.procrustes.report import _ends


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def reported(monkeypatch):
    # The dense operators of the tests are those of small circles.
    monkeypatch.setattr(routes, "_POSITIONS", 49)
    model = three_layers()
    first = copy.deepcopy(model)
    procrustes = Procrustes(["0", "2", "4"], model=model, target={"4": 0.5})
    procrustes.project()
    projected = copy.deepcopy(model)
    with torch.no_grad():
        model[2].weight.mul_(1.1)
    return first, projected, model, procrustes


def ends(layer, *sizes):
    found = values_of(layer, sizes)
    return pytest.approx((float(found.min()), float(found.max())), rel=1e-5)


def test_the_report_has_what_was_before_after_and_is_now(reported):
    first, projected, model, procrustes = reported
    report = procrustes.report()
    assert [row.name for row in report] == ["0", "2", "4"]
    assert len(report) == 3
    for row in report:
        place, circle = int(row.name), row.circle or (2, 2)
        assert row.before == ends(first[place], *circle)
        assert row.after == ends(projected[place], *circle)
        assert row.now == ends(model[place], *circle)
        moved = (projected[place].weight - first[place].weight).norm() / first[place].weight.norm()
        assert row.moved == pytest.approx(float(moved.detach()), rel=1e-5)
        assert row.spread == pytest.approx(row.now[1] / row.now[0])
    assert report["2"].drift == pytest.approx(0.1, rel=1e-5)
    assert report["0"].drift == report["4"].drift == 0.0
    assert [row.route for row in report] == ["taps", "window", "frequencies"]
    assert [row.operator for row in report] == ["circular", "kernel", "circular"]
    assert [row.circle for row in report] == [(5, 5), None, (5, 5)]
    assert [row.aim for row in report] == ["backward", "backward", "given"]
    assert report["2"].target == pytest.approx((32 / 28) ** 0.5)
    assert report["4"].layer == "conv 3x3, 32 -> 32, zeros padding"
    assert report["4"].spread < 0.7 * report["4"].before[1] / report["4"].before[0]
    assert (report.num_projections, report["0"].steps_since) == (1, 0)
    assert report.seconds > 0


def test_before_any_projection_the_report_says_what_there_is():
    report = Procrustes(["0", "2"], model=three_layers()).report()
    row = report[0]
    assert (row.before, row.after, row.moved, row.drift, row.true) == (None,) * 5
    assert row.now[0] < row.target
    assert (report.num_projections, report.seconds) == (0, 0.0)
    assert "0 projections" in str(report)
    assert " each" not in str(report)


def test_steps_since_the_projection_are_counted():
    model = three_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    procrustes = Procrustes(["0", "2"], model=model).attach(optimizer, every=3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    for expected in (1, 2, 0, 1):
        optimizer.step()
        assert [row.steps_since for row in procrustes.report()] == [expected] * 2
    procrustes.project()
    assert procrustes.report()["0"].steps_since == 0
    assert procrustes.report().num_projections == 2


def test_a_sequence_of_layers_by_place_name_and_slice(reported):
    report = reported[-1].report()
    assert isinstance(report, ProcrustesReport)
    assert isinstance(report[0], LayerReport)
    assert report["4"] is report[-1] is report[2]
    assert report[1:] == (report[1], report[2])
    with pytest.raises(KeyError, match="5"):
        report["5"]
    with pytest.raises(IndexError):
        report[3]


def test_the_report_prints_as_a_table(reported):
    text = str(reported[-1].report())
    assert "steps since" in text.splitlines()[0]
    for word in ("conv 1x1, 28 -> 32, stride 2", "1.069", "0.1", "circular", "kernel"):
        assert word in text
    assert "circular, 5x5" in text
    assert text.splitlines()[-1].startswith("1 projection, ")
    assert text.endswith(" ms each")
    assert repr(reported[-1].report()) == "ProcrustesReport(3 layers, 1 projection)"
    line = str(reported[-1].report()["2"])
    assert line == "2: conv 1x1, 28 -> 32, stride 2; sigma 1.176, target 1.069"


def test_the_report_as_a_frame_and_as_plain_python(reported):
    report = reported[-1].report({"2": (28, 4, 4)})
    frame = report.to_frame()
    assert frame.layer.tolist() == ["0", "2", "4"]
    assert frame.now_max.tolist() == [row.now[1] for row in report]
    assert frame.before_min.tolist() == [row.before[0] for row in report]
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [row["name"] for row in plain["layers"]] == ["0", "2", "4"]
    assert plain["layers"][1]["after"] == list(report[1].after)
    assert plain["layers"][1]["true"]["operator"] == report[1].true.operator
    assert plain["layers"][0]["true"] is None
    assert plain["num_projections"] == 1


def test_without_a_projection_the_frame_has_gaps():
    frame = Procrustes("0", model=three_layers()).report().to_frame()
    assert frame[["before_min", "after_max", "moved", "drift"]].isna().all(axis=None)


def test_with_shapes_the_report_has_the_operator_as_it_runs(reported):
    *_, model, procrustes = reported
    report = procrustes.report({"0": (3, 6, 6), "2": (28, 5, 4)})
    for name, shape in (("0", (3, 6, 6)), ("2", (28, 5, 4))):
        found, truth = report[name].true, singular_values(model[int(name)], shape)
        assert found.operator == "true"
        assert float(found.largest) == pytest.approx(float(truth.largest), rel=1e-5)
        matrix = operator_of(model[int(name)], shape)
        assert float(found.largest) == pytest.approx(float(matrix.max()), rel=1e-3)
        assert "as it runs" in str(report[name])
    # Zeros at the border take taps from some windows.
    assert float(report["0"].true.smallest) < 0.99 * report["0"].now[0]
    assert report["4"].true is None
    with pytest.raises(LayerSelectionError, match=r"input_shapes names '1', but .*'0', '2', '4'"):
        procrustes.report({"1": (3, 6, 6)})


def operator_of(layer, shape):
    """Singular values of the layer as it runs, from its Jacobian."""
    twin = copy.deepcopy(layer).double()
    x = torch.zeros(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(twin, x)
    return torch.linalg.svdvals(jacobian.reshape(-1, x.numel()))


def test_the_report_changes_nothing(reported):
    *_, model, procrustes = reported
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    procrustes.report({"2": (28, 4, 4)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


SQUARE = {
    "3x3 that keeps the channels": lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False),
    "3x3 of stride 2 to four times": lambda: nn.Conv2d(16, 64, 3, stride=2, padding=1, bias=False),
}


@pytest.mark.parametrize("name", SQUARE)
def test_a_layer_that_looks_flat_on_the_smallest_circle_only_is_not_reported_as_flat(name):
    layer = SQUARE[name]().double()
    procrustes = Procrustes(layer)
    procrustes.project(sweeps=300)
    (row,) = procrustes.report()
    assert row.circle == (30, 30)
    sizes = [30 * s for s in layer.stride]
    truth = singular_values(layer, (layer.in_channels, *sizes), "circular")
    assert row.spread == pytest.approx(float(truth.condition), rel=1e-6)
    smallest = routes.singular_values(layer.weight.detach()[None], procrustes.layers[0].shape)
    assert row.spread > 2 * float(smallest.max() / smallest.min())


def test_with_the_size_of_its_input_a_layer_is_measured_on_such_a_circle():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1).double()
    (row,) = Procrustes({"x": layer}).report({"x": (4, 16, 12)})
    assert row.circle == (8, 6)
    truth = values_of(layer, (16, 12))
    assert row.now == pytest.approx((float(truth.min()), float(truth.max())), rel=1e-10)
    (row,) = Procrustes({"x": nn.ConvTranspose1d(6, 4, 3, stride=2)}).report({"x": (6, 9)})
    assert row.circle == (9,)


def test_the_report_says_what_to_do_about_layers_that_are_not_flat():
    layers = {"mix": nn.Conv2d(4, 4, 3), "down": nn.Conv2d(4, 8, 1)}
    procrustes = Procrustes(layers)
    before = str(procrustes.report())
    assert re.search(r"Not flat: mix \(frequencies, spread \d.*sweeps=50.*Isometric", before)
    assert re.search(r"Not flat: down \(window, spread \d.*project\(\) makes them flat", before)
    procrustes.project()
    after = str(procrustes.report())
    assert "Not flat: mix (frequencies" in after
    assert "down (window" not in after
    assert "Not flat" not in str(Procrustes(IsometricDownsample(3)).report())


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ((1.0, 1.00005), "1"),
        ((1.0, 1.0004), "1 ... 1.0004"),
        ((0.9996, 1.0012), "0.9996 ... 1.001"),
        ((0.5, 2.0), "0.5 ... 2"),
        ((0.0, 2.0), "0 ... 2"),
        ((math.nan, math.nan), "nan ... nan"),
    ],
)
def test_ends_that_differ_look_different(ends, shown):
    assert _ends(ends) == shown


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"0": 8}, r"input shape of '0' must be that of one input .*, got 8"),
        ((3, 8, 8), r"must map names of layers to shapes, .* got \(3, 8, 8\)"),
        ({"0": (3, 0, 8)}, r"got \(3, 0, 8\)"),
        ({"0": "abc"}, "got 'abc'"),
        ({"0": (3, 2.5, 8)}, "2.5"),
        ({"0": ()}, r"got \(\)"),
    ],
    ids=repr,
)
def test_input_shapes_that_are_none_are_refused(shapes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Procrustes({"0": nn.Conv2d(3, 4, 3)}).report(shapes)


@pytest.mark.parametrize("shape", [(3, 8), (4, 8, 8), (1, 3, 8, 8)])
def test_a_shape_of_another_layer_is_refused(shape):
    with pytest.raises(ShapeError, match="conv 3x3"):
        Procrustes({"0": nn.Conv2d(3, 4, 3)}).report({"0": shape})
