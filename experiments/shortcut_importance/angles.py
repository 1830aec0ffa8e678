"""How far the first filter may be from the teacher's: rows of what was tried, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conditioning import theory
from experiments.claims import Measured, Verdict, decide_all, decide_every
from experiments.shortcut_importance.descent import OPEN, OPTIMUM
from experiments.shortcut_importance.statements import BY_ID
from experiments.sweep import Cell, Pair, parts

RIGHT = math.pi / 2


def all_won(won: int, left: int, runs: int) -> bool | None:
    """Whether all runs succeeded; None if some are not decided and none failed."""
    if won == runs:
        return True
    return None if won + left == runs else False


def reached(fate: int) -> bool | None:
    """Whether a start ended at the global optimum; None if it is not decided."""
    return None if fate == OPEN else fate == OPTIMUM


@dataclass(frozen=True)
class AngleRow:
    """A teacher, and what became of starts at several first angles.

    Parameters
    ----------
    part : str
        ``"edge"``: angles around the predicted limit; ``"below"``: angles up to a right one.
    size, share : float
        ``|a*|^2 / k`` and ``r``.
    k : int
    limit : float
        The predicted largest angle.
    angles : sequence of float
        Ascending.
    successes, undecided : sequence of int
        Of so many random ``runs`` at each angle.
    adversarial : sequence of int
        The fate of the start against the teacher's outputs.
    """

    part: str
    size: float
    share: float
    k: int
    limit: float
    angles: Sequence[float]
    successes: Sequence[int]
    undecided: Sequence[int]
    adversarial: Sequence[int]
    runs: int

    @property
    def name(self) -> str:
        """For verdicts."""
        return f"r={self.share:.3g} k={self.k}"

    @property
    def edge(self) -> Measured:
        """Where starts begin to fail, in angles over pi: between two angles that were tried.

        Between the last angle before which all succeed, the adversarial start included, and the
        first at which one fails; angles at which starts are not decided lie between. Not known
        where none fails, where some are lost at the smallest angle, or where all succeed at an
        angle beyond one at which some fail.
        """
        rows = zip(self.successes, self.undecided, self.adversarial, strict=True)
        outcomes = [
            all_won(won + (fate == OPTIMUM), left + (fate == OPEN), self.runs + 1)
            for won, left, fate in rows
        ]
        first = next((i for i, outcome in enumerate(outcomes) if outcome is not True), None)
        if not first or False not in outcomes or True in outcomes[first:]:
            return Measured(math.nan)
        low = self.angles[first - 1] / math.pi
        high = self.angles[outcomes.index(False)] / math.pi
        return Measured((low + high) / 2, low, high)

    @property
    def reach(self) -> float:
        """The largest angle at which some random start succeeds, over pi."""
        return max((a for a, won in zip(self.angles, self.successes, strict=True) if won),
                   default=math.nan) / math.pi  # fmt: skip


def angle_rows(measured: Sequence[Pair]) -> list[AngleRow]:
    """Every teacher of the two kinds of cells."""
    rows = [
        _row(cell, result, place, (1.0, cell["share"], k), result["angles"][place])
        for cell, result in parts(measured, "edge")
        for place, k in enumerate(cell["patches"])
    ]
    for cell, result in parts(measured, "below"):
        teachers = [(cell["size"], r, k) for r in cell["shares"] for k in cell["patches"]]
        angles = [math.pi * angle for angle in cell["angles"]]
        rows += [_row(cell, result, i, teacher, angles) for i, teacher in enumerate(teachers)]
    return rows


def _row(
    cell: Cell,
    result: Mapping[str, Any],
    place: int,
    teacher: tuple[float, float, int],
    angles: Sequence[float],
) -> AngleRow:
    size, share, k = teacher
    return AngleRow(
        cell["part"], size, share, k, theory.warm_up_limit(share, k), angles,
        result["successes"][place], result["open"][place], result["adversarial"][place],
        result["runs"],
    )  # fmt: skip


def decide(measured: Sequence[Pair]) -> list[Verdict]:
    """The claims about first angles."""
    rows = angle_rows(measured)
    edges, reaches = [], []
    for row in rows:
        if row.part != "edge":
            continue
        limit = row.limit / math.pi
        low, high = row.edge.enclosure
        edges.append(
            Measured(row.edge.value - limit, low - limit, high - limit, num_runs=row.runs + 1,
                     run=f"{row.name}, predicted {limit:.4f}π")
        )  # fmt: skip
        reaches.append(row.reach - limit)
    note = f"some random starts succeed up to {max(reaches):+.3f}π beyond it" if reaches else ""
    return [
        decide_every(BY_ID["angle.edge"], edges, note=note),
        _all_below("angle.prior", rows, large=False),
        _all_below("angle.large", rows, large=True),
        _adversarial(rows),
    ]


def _below(rows: Sequence[AngleRow], *, large: bool) -> list[AngleRow]:
    return [row for row in rows if row.part == "below" and (row.size > 1) == large]


def _all_below(claim: str, rows: Sequence[AngleRow], *, large: bool) -> Verdict:
    chosen = _below(rows, large=large)
    outcomes = {
        f"{row.name} {angle / math.pi:g}π": all_won(won, left, row.runs)
        for row in chosen
        for angle, won, left in zip(row.angles, row.successes, row.undecided, strict=True)
        if angle < RIGHT
    }
    lowest = min(
        ((won / row.runs, f"{row.name} {angle / math.pi:g}π")
         for row in chosen
         for angle, won in zip(row.angles, row.successes, strict=True)),
        default=(math.nan, ""),
    )  # fmt: skip
    note = f"lowest rate {lowest[0]:.3g} at {lowest[1]}" if lowest[0] < 1 else ""
    runs = max((row.runs for row in chosen), default=1)
    return decide_all(BY_ID[claim], outcomes, num_runs=runs, note=note)


def _adversarial(rows: Sequence[AngleRow]) -> Verdict:
    outcomes = {
        f"{row.name} {angle / math.pi:g}π": reached(fate)
        for row in _below(rows, large=False)
        for angle, fate in zip(row.angles, row.adversarial, strict=True)
        if angle < RIGHT
    }
    return decide_all(BY_ID["angle.adversarial"], outcomes)
