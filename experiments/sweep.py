"""Run the cells of a sweep one after the other, with a progress bar and nothing done twice."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.errors import StoreError
from experiments.ranks import alone, current, on_first
from experiments.store import CellStore, canonical, seed_from

if TYPE_CHECKING:
    from experiments.registry import Options

Cell = Mapping[str, Any]
# A cell and what was measured in it.
Pair = tuple[Cell, Mapping[str, Any]]

# Without a terminal there is no bar to redraw: a line this often tells that the run is alive.
_SECONDS_BETWEEN_LINES = 20.0


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C between or inside cells: what is finished is on the disk.

    Parameters
    ----------
    done, total : int
        How many cells are finished, and of how many.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"interrupted after {done} of {total} cells")
        self.done, self.total = done, total


def run_cells(
    cells: Sequence[Cell],
    function: Callable[[Cell], Any],
    store: CellStore,
    *,
    progress: bool = True,
    title: str = "cells",
    cost: Callable[[Cell], float] | None = None,
    parallel: Callable[[Cell], bool] | None = None,
) -> list[Any]:
    """Measure every cell that the store does not hold yet.

    Parameters
    ----------
    cells : sequence of mapping
        What to measure: each a mapping of words to numbers, words or lists, all different.
    function : callable
        Takes a cell and returns its result: numbers, words, arrays, lists and dicts of them.
    store : CellStore
        Where finished cells are kept.
    progress : bool
        Whether to report on stderr: a bar in a terminal, else a line now and then.
    title : str
        What the bar is called.
    cost : callable, optional
        How long a cell takes compared with others, in any unit: it makes the time left right
        where cells are of very different size.
    parallel : callable, optional
        Which cells all ranks measure together, when ``torchrun`` started several: those whose
        training is shared between them (see :class:`experiments.training.Trainer`). Every other
        cell is measured by the first rank alone while the others wait. By default that is all.

    Returns
    -------
    list
        The results in the order of ``cells``, each as it is read back from the store: the same,
        to the last bit, whether the run was interrupted or not. On several ranks, every rank
        gets them.

    Raises
    ------
    RunInterrupted
        On Ctrl-C.
    RankFailedError
        A cell failed on the first rank, and this is another.

    Notes
    -----
    On several ranks the first one's store decides what is missing and its results count; stores of
    the others, such as :class:`experiments.store.CellsInMemory`, are filled from it.

    The global random states of Python, numpy and torch are set before each cell, to a seed made
    from the cell: what it draws must not depend on which cells were run before it in this
    process. Afterwards they are what they were.
    """
    keys = [canonical(cell) for cell in cells]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        msg = f"cell {twice} occurs more than once: what differs must be part of the cell"
        raise StoreError(msg)
    of_key, here = dict(zip(keys, cells, strict=True)), current()
    wanted, kept = on_first(lambda: (keys, {k: store[c] for k, c in of_key.items() if c in store}))
    if wanted != keys:
        msg = "the ranks were given different cells: what they measure must not depend on the rank"
        raise StoreError(msg)
    if not here.first:
        for key, result in kept.items():
            if of_key[key] not in store:
                store.add(of_key[key], result)
    missing = [cell for key, cell in of_key.items() if key not in kept]
    weight = cost or (lambda _: 1.0)
    done = len(cells) - len(missing)
    states = _random_states()
    weights = [weight(cell) for cell in missing]
    with _Progress(title, len(cells), done, weights, progress and here.first) as shown:
        try:
            for cell in missing:
                shown.start(cell)
                _seed(cell)
                _measure(cell, function, store, parallel is not None and parallel(cell))
                shown.advance()
        except KeyboardInterrupt:
            raise RunInterrupted(sum(cell in store for cell in cells), len(cells)) from None
        finally:
            _restore(states)
    return [store[cell] for cell in cells]


def _measure(cell: Cell, function: Callable[[Cell], Any], store: CellStore, together: bool) -> None:
    """Put a cell's result into the store of every rank."""
    if together:
        shared = function(cell)

    def on_disk() -> Any:
        if together:
            store.add(cell, shared)
        else:
            with alone():
                store.add(cell, function(cell))
        return store[cell]

    result = on_first(on_disk)
    if not current().first:
        store.add(cell, result)


def measure_cells(
    options: Options,
    cells: Sequence[Cell],
    function: Callable[[Cell], Any],
    *,
    title: str,
    cost: Callable[[Cell], float],
    parallel: Callable[[Cell], bool] | None = None,
    uses_data: bool = True,
) -> list[Pair]:
    """Run the cells of an experiment with the store of its options; each with its result.

    Without ``uses_data`` no data set is loaded, and ``--data`` does not count.
    """
    with options.open_store(uses_data=uses_data) as store:
        results = run_cells(
            cells, function, store, progress=options.progress, title=title, cost=cost,
            parallel=parallel,
        )  # fmt: skip
    return list(zip(cells, results, strict=True))


def _seed(cell: Cell) -> None:
    import numpy as np
    import torch

    seed = seed_from(cell)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the legacy global state is what is pinned here
    torch.manual_seed(seed)


def _random_states() -> tuple[Any, Any, Any, Any]:
    import numpy as np
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _restore(states: tuple[Any, Any, Any, Any]) -> None:
    import numpy as np
    import torch

    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def describe(cell: Cell) -> str:
    """Write a cell for a reader, such as ``n=2 L=64``."""
    return " ".join(f"{key}={value}" for key, value in cell.items())


def parts(measured: Sequence[Pair], part: str, **where: Any) -> list[Pair]:
    """Pick the cells of a kind, their entry ``part``, with the given other entries."""
    return [
        (cell, result)
        for cell, result in measured
        if cell["part"] == part and all(cell.get(k) == v for k, v in where.items())
    ]


def name(cell: Cell) -> str:
    """Write a cell for a reader, without its kind."""
    return describe({key: value for key, value in cell.items() if key != "part"})


class _Progress:
    """Cells done and time left, as a bar in a terminal and as lines elsewhere."""

    def __init__(
        self, title: str, total: int, done: int, weights: Sequence[float], shown: bool
    ) -> None:
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self.weights = list(weights)
        self.index = 0
        self.started = self.told = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        if self.shown and self.weights and sys.stderr.isatty():
            from tqdm import tqdm

            # tqdm's own count would be in units of cost, so cells are told in the description.
            self.bar = tqdm(
                total=sum(self.weights),
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            )
            self._describe()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.shown and self.index:
            seconds = time.monotonic() - self.started
            self._tell(f"in {_duration(seconds)}")

    def start(self, cell: Cell) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(describe(cell)[:40])

    def advance(self) -> None:
        self.done += 1
        self.index += 1
        now = time.monotonic()
        if self.bar is not None:
            self._describe()
            self.bar.update(self.weights[self.index - 1])
        elif self.shown and self.done < self.total and now - self.told > _SECONDS_BETWEEN_LINES:
            self.told = now
            spent = sum(self.weights[: self.index])
            left = (now - self.started) * sum(self.weights[self.index :]) / spent
            self._tell(f"{_duration(left)} left")

    def _describe(self) -> None:
        self.bar.set_description_str(f"{self.title}: {self.done}/{self.total} cells", refresh=False)

    def _tell(self, end: str) -> None:
        print(f"{self.title}: {self.done}/{self.total} cells, {end}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
