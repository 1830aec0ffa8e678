"""Trainings without normalisation and on samples."""

from __future__ import annotations

from experiments.models.two_layer_conv import TwoLayerConv
from experiments.shortcut_importance import trainings
from experiments.shortcut_importance.setting import CNN, COLD, WARM


def test_nets_without_normalisation_and_on_samples_are_trained():
    cell = {
        "part": "plain", "methods": [COLD.name, CNN.name], "k": 4, "squared_norms": [1],
        "seeds": 12, "steps": 3000,
    }  # fmt: skip
    with_shortcut, without = trainings.without_normalisation(cell, 5, "cpu")["kinds"]
    assert with_shortcut["successes"] == 12
    assert 0 < without["successes"] < 12
    cell = {
        "part": "samples", "method": WARM.name, "k": 4, "squared_norm": 4, "samples": 200,
        "steps": 120, "first": 0, "seeds": 2,
    }  # fmt: skip
    found = trainings.on_samples(cell, 5, "cpu")
    assert found["successes"] == 2
    assert float(found["angle"].max()) < 0.1


def test_runs_without_normalisation_that_have_too_few_steps_are_open():
    cell = {
        "part": "plain", "methods": [CNN.name], "k": 4, "squared_norms": [1], "seeds": 30,
        "steps": 20,
    }  # fmt: skip
    few = trainings.without_normalisation(cell, 5, "cpu")["kinds"][0]
    many = trainings.without_normalisation({**cell, "steps": 4000}, 5, "cpu")["kinds"][0]
    assert few["open"] > 5
    assert many["open"] == 0
    for kind in (few, many):
        assert kind["successes"] + kind["spurious"] + kind["open"] == kind["runs"] == 30


def test_all_trainings_on_samples_get_as_many_steps(monkeypatch):
    steps = []
    for method in (WARM, CNN):
        count = 0

        def counted(self, whole=TwoLayerConv.renormalise):
            nonlocal count
            count += 1
            whole(self)

        monkeypatch.setattr(TwoLayerConv, "renormalise", counted)
        cell = {"method": method.name, "k": 4, "squared_norm": 4, "samples": 10, "steps": 7,
                "seeds": 1}  # fmt: skip
        trainings.on_samples(cell, 3, "cpu")
        steps.append(count)
        monkeypatch.undo()
    assert steps == [47, 47]
