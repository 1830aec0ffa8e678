"""The store of finished cells and the sweep: nothing twice, nothing lost, nothing different."""

from __future__ import annotations

import io
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import ConfigurationChangedError, StoreError, StoreLockedError
from experiments.store import (
    CellsInMemory,
    CellStore,
    canonical,
    from_json,
    mark_finished,
    seed_from,
    to_json,
)  # fmt: skip
from experiments.sweep import RunInterrupted, run_cells

CONFIGURATION = {"experiment": "fake", "seeds": 3, "data": "f" * 64, "code": "1"}
CELLS = [{"n": n, "L": L} for n in (1, 2) for L in (2, 4, 8)]


def measure(cell):
    return {"kappa": cell["L"] / (3 * cell["n"]), "draw": torch.rand(2), "lost": math.nan}


def same(a, b):
    return canonical(a) == canonical(b)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter("$float".__ne__), inner),
    max_leaves=10,
)


@given(json_values)
def test_a_result_comes_back_to_the_last_bit(value):
    text = json.dumps(to_json(value), allow_nan=False)
    assert repr(from_json(json.loads(text))) == repr(value)


def test_arrays_and_tensors_become_numbers():
    given_result = {
        "array": np.array([0.1, np.inf]),
        "tensor": torch.tensor([[1, 2]]),
        "scalar": np.float32(0.1),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "pair": (1, 2.5),
        "zero": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    }
    assert from_json(to_json(given_result)) == {
        "array": [0.1, math.inf],
        "tensor": [[1, 2]],
        "scalar": float(np.float32(0.1)),
        "count": 3,
        "flag": True,
        "pair": [1, 2.5],
        "zero": 0.1,
    }


@pytest.mark.parametrize("value", [object(), 1j, {1: 2}, {"$float": 1}, {1, 2}, torch.nn.ReLU()])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(StoreError, match="a cell's result"):
        to_json(value)


def test_a_sweep_runs_each_cell_once_and_keeps_their_order(tmp_path):
    calls = []
    with CellStore(tmp_path / "cells.jsonl", CONFIGURATION) as store:
        results = run_cells(CELLS, lambda cell: calls.append(cell) or measure(cell), store)
        again = run_cells(CELLS[::-1], measure, store)
    assert calls == CELLS
    assert same(results, again[::-1])
    assert [result["kappa"] for result in results] == [
        cell["L"] / (3 * cell["n"]) for cell in CELLS
    ]


@pytest.mark.parametrize("stop", range(len(CELLS)))
def test_an_interrupted_sweep_ends_as_an_uninterrupted_one(tmp_path, stop):
    with CellStore(tmp_path / "whole.jsonl", CONFIGURATION) as store:
        whole = run_cells(CELLS, measure, store)
    calls = []

    def interrupted(cell):
        calls.append(cell)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return measure(cell)

    path = tmp_path / "cells.jsonl"
    with (
        CellStore(path, CONFIGURATION) as store,
        pytest.raises(RunInterrupted, match=f"after {stop} of {len(CELLS)} cells"),
    ):
        run_cells(CELLS, interrupted, store)
    with CellStore(path, CONFIGURATION) as store:
        assert len(store) == stop
        assert same(run_cells(CELLS, measure, store), whole)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_run_killed_at_any_byte_loses_at_most_the_torn_cell(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        whole = run_cells(CELLS[:3], measure, store)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        with CellStore(path, CONFIGURATION) as store:
            lines = content[:length].count(b"\n")
            assert len(store) == max(lines - 1, 0)
            assert same(run_cells(CELLS[:3], measure, store, progress=False), whole)
        assert path.read_bytes() == content


def test_a_last_block_of_zeros_is_a_torn_line(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        run_cells(CELLS[:2], measure, store)
    content = path.read_bytes()
    for tail in (b"\0" * 512, b"\0" * 100 + b"\n", b'{"cell": {}\n'):
        path.write_bytes(content + tail)
        with CellStore(path, CONFIGURATION) as store:
            assert len(store) == 2
        assert path.read_bytes() == content


def test_damage_elsewhere_is_not_passed_over(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        run_cells(CELLS[:3], measure, store)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    for mode in ("continue", "resume"):
        with pytest.raises(StoreError, match="line 2, is damaged"):
            CellStore(path, CONFIGURATION, mode)
    with CellStore(path, CONFIGURATION, "fresh") as store:
        assert len(store) == 0
    path.write_text("a file of something else\n")
    with pytest.raises(StoreError, match="line 1, is damaged"):
        CellStore(path, CONFIGURATION)


def test_a_finished_run_is_measured_anew_unless_resumed(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        run_cells(CELLS, measure, store)
    mark_finished(path)
    mark_finished(path)
    assert path.read_text().count("finished") == 1
    with CellStore(path, CONFIGURATION, "resume") as store:
        assert len(store) == len(CELLS)
        store.mark_finished()
    with CellStore(path, CONFIGURATION) as store:
        assert len(store) == 0
        assert store.notice == ""
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_run_that_gets_more_cells_is_unfinished_again(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        run_cells(CELLS[:2], measure, store)
        store.mark_finished()
    with CellStore(path, CONFIGURATION, "resume") as store:
        run_cells(CELLS[:4], measure, store)
    with CellStore(path, CONFIGURATION) as store:
        assert len(store) == 4


def test_another_configuration_starts_anew_and_says_why(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        run_cells(CELLS, measure, store)
    before = path.read_bytes()
    with pytest.raises(ConfigurationChangedError, match="seeds was 3 and is 5"):
        CellStore(path, CONFIGURATION | {"seeds": 5}, "resume")
    assert path.read_bytes() == before
    with CellStore(path, CONFIGURATION | {"seeds": 5}) as store:
        assert len(store) == 0
        assert "seeds was 3 and is 5" in store.notice
    assert (tmp_path / "cells.previous.jsonl").read_bytes() == before


def test_a_changed_program_starts_anew_unless_resumed(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        run_cells(CELLS, measure, store)
    with CellStore(path, CONFIGURATION | {"code": "2"}, "resume") as store:
        assert len(store) == len(CELLS)
        assert "the program changed" in store.notice
    with CellStore(path, CONFIGURATION | {"code": "2"}) as store:
        assert len(store) == 0
        assert "the program changed" in store.notice


def test_resuming_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigurationChangedError, match="without --resume"):
        CellStore(tmp_path / "cells.jsonl", CONFIGURATION, "resume")


def test_fresh_discards_but_keeps_a_copy_of_what_was_unfinished(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        run_cells(CELLS, measure, store)
    with CellStore(path, CONFIGURATION, "fresh") as store:
        assert len(store) == 0
        assert "as --fresh asks" in store.notice
    assert (tmp_path / "cells.previous.jsonl").exists()


def test_two_runs_cannot_share_a_store(tmp_path):
    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store:
        store.add(CELLS[0], 1)
        before = path.read_bytes()
        for mode in ("continue", "resume", "fresh"):
            with pytest.raises(StoreLockedError, match="another run"):
                CellStore(path, CONFIGURATION, mode)
        assert path.read_bytes() == before
    with CellStore(path, CONFIGURATION) as store:
        assert store[CELLS[0]] == 1


def test_misuse_is_refused(tmp_path):
    with pytest.raises(StoreError, match="mode"):
        CellStore(tmp_path / "cells.jsonl", CONFIGURATION, "again")
    with CellStore(tmp_path / "cells.jsonl", CONFIGURATION) as store:
        store.add({"L": 2}, 1)
        with pytest.raises(StoreError, match="already"):
            store.add({"L": 2}, 1)
        with pytest.raises(StoreError, match="more than once"):
            run_cells([{"L": 3}, {"L": 3}], measure, store)
        with pytest.raises(StoreError, match="to_dict"):
            run_cells([{"L": 3}], lambda cell: object(), store)
        assert {"L": 3} not in store


def test_a_failing_cell_leaves_the_finished_ones(tmp_path):
    def fails_at_last(cell):
        if cell == CELLS[-1]:
            raise ZeroDivisionError
        return measure(cell)

    path = tmp_path / "cells.jsonl"
    with CellStore(path, CONFIGURATION) as store, pytest.raises(ZeroDivisionError):
        run_cells(CELLS, fails_at_last, store)
    with CellStore(path, CONFIGURATION) as store:
        assert len(store) == len(CELLS) - 1


def test_the_callers_random_states_are_given_back(tmp_path):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with CellStore(tmp_path / "cells.jsonl", CONFIGURATION) as store:
        run_cells(CELLS, measure, store)
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_cells_done_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with CellStore(tmp_path / "cells.jsonl", CONFIGURATION) as store:
        run_cells(CELLS[:2], measure, store)
        run_cells(CELLS, measure, store, title="depths", cost=lambda cell: cell["L"])
    shown = sys.stderr.getvalue()
    assert "depths: 2/6 cells" in shown
    assert "depths: 6/6 cells 100%" in shown
    assert "left" in shown
    assert "n=2 L=8" in shown


def test_a_log_gets_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.sweep._SECONDS_BETWEEN_LINES", 0.0)
    with CellStore(tmp_path / "cells.jsonl", CONFIGURATION) as store:
        run_cells(CELLS, measure, store)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("cells: 1/6 cells, ")
        assert lines[0].endswith(" left")
        assert lines[-1].startswith("cells: 6/6 cells, in ")
        run_cells(CELLS, measure, store)
        assert capsys.readouterr().err == ""


def test_no_progress_is_silent(tmp_path, capsys):
    with CellStore(tmp_path / "cells.jsonl", CONFIGURATION) as store:
        run_cells(CELLS, measure, store, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="choose another --out"):
        CellStore(tmp_path / "file" / "cells.jsonl", {})


def test_a_store_in_memory_holds_the_same_and_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CellStore(tmp_path / "cells.jsonl", CONFIGURATION) as store, CellsInMemory() as other:
        for cell, result in zip(CELLS, run_cells(CELLS, measure, store), strict=True):
            assert cell not in other
            other.add(cell, result)
            assert same(other[cell], store[cell])
        assert len(other) == len(CELLS)
        with pytest.raises(StoreError, match="already"):
            other.add(CELLS[0], 1)
        other.mark_finished()
        assert other.finished
    assert [path.name for path in tmp_path.iterdir()] == ["cells.jsonl"]


def test_a_seed_is_made_from_what_it_is_for():
    seeds = {seed_from(what) for what in ("net", ["net", 0], ["net", 1], {"L": 3}, {"L": 4})}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_from({"L": 3, "seed": 1}) == seed_from({"seed": 1, "L": 3})
