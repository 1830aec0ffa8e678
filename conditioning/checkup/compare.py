"""Two checkups side by side: what moved beyond its error, and which findings went or came."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conditioning.checkup.numbers import Number, form_of, needs_of, numbers, parts_of
from conditioning.checkup.plain import to_plain
from conditioning.checkup.readings import Finding, Setting
from conditioning.checkup.results import Checkup
from conditioning.checkup.tables import count, label
from conditioning.errors import InvalidArgumentError
from conditioning.spectrum import Estimate
from conditioning.spectrum.full import NAN
from conditioning.spectrum.results import Result

if TYPE_CHECKING:
    import pandas as pd

Movement = Literal["moved", "within its error", "not comparable"]
Outcome = Literal[
    "new", "still there", "gone", "not measured after", "not measured before", "not comparable"
]

# Numbers without an enclosure differ by the rounding of sums of many terms.
_ROUNDING = {"float64": 1e-10, "float32": 1e-5}
_COARSE_ROUNDING = 1e-2


@dataclass(frozen=True)
class Difference(Result):
    """A setting that is not the same in both checkups.

    Attributes
    ----------
    name, before, after : str
    """

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Change(Result):
    """One number in both checkups.

    Attributes
    ----------
    part : {"network", "block", "layer", "activation", "recurrent layer"}
    where : str
        Name of the block, layer or activation; empty for the network.
    quantity : str
    before, after : Estimate
        NaN where there is none.
    factor : float
        ``after / before``; NaN where it has no meaning, as between bounds on one side.
    movement : {"moved", "within its error", "not comparable"}
        ``moved`` only if the enclosures have no number in common.
    reason : str
        Why it is not comparable.
    weight : float
        By which changes are ordered: the logarithm to base 10 of the larger over the smaller
        magnitude. To both of shares, and of distances from an ideal, one hundredth is added:
        what is smaller counts as none.
    """

    part: str
    where: str
    quantity: str
    before: Estimate
    after: Estimate
    factor: float
    movement: Movement
    reason: str
    weight: float


@dataclass(frozen=True)
class FindingChange(Result):
    """A finding of one checkup or of both.

    Attributes
    ----------
    outcome : {"new", "still there", "gone", "not measured after", "not measured before", \
            "not comparable"}
        ``gone`` and ``new`` only where the other checkup has the number behind the finding, or
        has read all blocks (layers ...) and this one is not among them. ``not comparable`` where
        that number needs the data or the loss, and these are others.
    before, after : Finding or None
    """

    outcome: Outcome
    before: Finding | None
    after: Finding | None

    @property
    def either(self) -> Finding:
        """The later one where there are two."""
        found = self.after or self.before
        assert found is not None
        return found


@dataclass(frozen=True)
class Comparison(Result):
    """Two checkups side by side.

    Attributes
    ----------
    model : str
        Class of the model, of both where they differ.
    differences : tuple of Difference
        Settings that are not the same.
    findings : tuple of FindingChange
        New ones first, then those still there, then the others.
    changes : tuple of Change
        What moved first, the most first; then what stayed within its error; then the rest, both
        in the order of the checkup.
    only_before, only_after : tuple of str
        Blocks, layers and activations that the other checkup does not have.
    notes : tuple of str
        What limits all that is said.
    """

    model: str
    differences: tuple[Difference, ...]
    findings: tuple[FindingChange, ...]
    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def moved(self) -> tuple[Change, ...]:
        """The changes beyond the errors, the largest first."""
        return tuple(change for change in self.changes if change.movement == "moved")

    @property
    def new_problems(self) -> tuple[Finding, ...]:
        """Problems that the first checkup did not have, though it had measured their numbers."""
        return tuple(
            change.either
            for change in self.findings
            if change.outcome == "new" and change.either.severity == "problem"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each change.

        Columns: part, where, quantity, before, before_low, before_high, after, after_low,
        after_high, factor, movement, reason.
        """
        import pandas as pd

        rows = [
            (
                c.part, c.where, c.quantity, c.before.value, c.before.low, c.before.high,
                c.after.value, c.after.low, c.after.high, c.factor, c.movement, c.reason,
            )
            for c in self.changes
        ]  # fmt: skip
        columns = [
            "part", "where", "quantity", "before", "before_low", "before_high", "after",
            "after_low", "after_high", "factor", "movement", "reason",
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def to_json(self, indent: int | None = 1) -> str:
        """The whole comparison as JSON; numbers that are not finite are strings."""
        return json.dumps(to_plain(self), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        from conditioning.checkup.compare_text import comparison_text

        return comparison_text(self)

    def __repr__(self) -> str:
        return f"<Comparison of {self.model}: {self.counts()}>"

    def counts(self) -> str:
        """How many numbers moved, did not, and are not comparable."""
        kinds = [change.movement for change in self.changes]
        return (
            f"{count(kinds.count('moved'), 'number')} moved, "
            f"{kinds.count('within its error')} within the error, "
            f"{kinds.count('not comparable')} not comparable"
        )


def read(path: str | Path) -> Checkup:
    """Load a checkup; an error names the file.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be read, or is no checkup.
    """
    try:
        return Checkup.load(path)
    except OSError as error:
        msg = f"{str(path)!r} cannot be read: {error.strerror or error}."
        raise InvalidArgumentError(msg) from error
    except (InvalidArgumentError, UnicodeDecodeError) as error:
        msg = f"{str(path)!r}: {error}"
        raise InvalidArgumentError(msg) from error


def compare(before: Checkup | str | Path, after: Checkup | str | Path) -> Comparison:
    """Set two checkups beside each other, number by number.

    A number has moved only if its two enclosures have no number in common; numbers without an
    enclosure may differ by their rounding. Where the enclosure is the range over the batches,
    that says the same: the least of one is above the largest of the other.

    Blocks, layers and activations are matched by name. What data the checkups saw is not
    recorded: with another number of samples or batches, all that depends on data is not
    comparable, and whether equally many samples were the same ones is for the caller to know.

    Parameters
    ----------
    before, after : Checkup, or path of one
        As :meth:`Checkup.save` writes it with the suffix ``.json``.

    Returns
    -------
    Comparison

    Raises
    ------
    InvalidArgumentError
        If a path leads to no checkup, or an argument is neither.
    """
    first, second = _given("before", before), _given("after", after)
    old, new = numbers(first), numbers(second)
    obstacle = _obstacles(first, second)
    rounding = max(_rounding(first.setting), _rounding(second.setting))
    shared = set(parts_of(first)) & set(parts_of(second))
    changes = [
        _change(key, old.get(key), new.get(key), obstacle, rounding)
        for key in dict.fromkeys([*old, *new])
        if key[:2] in shared
    ]
    order = ("moved", "within its error", "not comparable")
    changes.sort(
        key=lambda one: (order.index(one.movement), -one.weight if one.movement == "moved" else 0)
    )
    names = list(dict.fromkeys([first.setting.model, second.setting.model]))
    return Comparison(
        " and ".join(names),
        _differences(first, second),
        _finding_changes(first, second, obstacle),
        tuple(changes),
        _names(part for part in parts_of(first) if part not in shared),
        _names(part for part in parts_of(second) if part not in shared),
        _notes(first, second),
    )


def _given(name: str, value: Any) -> Checkup:
    if isinstance(value, (str, Path)):
        return read(value)
    if not isinstance(value, Checkup):
        msg = f"{name} must be a Checkup or the path of one, got {type(value).__name__}."
        raise InvalidArgumentError(msg)
    return value


def _names(parts: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{part} {label(where)}" for part, where in parts)


def _notes(before: Checkup, after: Checkup) -> tuple[str, ...]:
    if min(before.setting.num_batches, after.setting.num_batches) > 1:
        return ()
    return (
        "one batch: how far norms spread over batches is not known, so a move may be that of the "
        "batch, not of the network",
    )


def _rounding(setting: Setting) -> float:
    return _ROUNDING.get(setting.dtype.removeprefix("torch."), _COARSE_ROUNDING)


def _obstacles(before: Checkup, after: Checkup) -> dict[str, str]:
    """Why numbers that need the data, or the loss, are not comparable."""
    old, new = before.setting, after.setting
    found = {}
    if (old.num_samples, old.num_batches) != (new.num_samples, new.num_batches):
        found["data"] = (
            f"other data ({old.num_samples} samples in {count(old.num_batches, 'batch')}, then "
            f"{new.num_samples} in {new.num_batches})"
        )
    if old.loss != new.loss:
        found["loss"] = f"another loss ({old.loss}, then {new.loss})"
    return found


def _change(
    key: tuple[str, str, str],
    before: Number | None,
    after: Number | None,
    obstacles: dict[str, str],
    rounding: float,
) -> Change:
    old = before.estimate if before else NAN
    new = after.estimate if after else NAN
    either = after or before
    assert either is not None
    reason = _reason(before, after, obstacles)
    movement: Movement = "not comparable" if reason else "within its error"
    if not reason and _apart(old, new, rounding, either.scale):
        movement = "moved"
    bounds = math.isinf(old.high) or math.isinf(new.high)
    factor = new.value / old.value if old.value and not bounds else math.nan
    weight = _weight(old.value, new.value, either.floor)
    return Change(*key, old, new, factor, movement, reason, weight)


def _reason(before: Number | None, after: Number | None, obstacles: dict[str, str]) -> str:
    for number, when in ((before, "before"), (after, "after")):
        if number is None:
            return f"not measured {when}"
        if math.isnan(number.estimate.value):
            return f"not a number {when}"
    assert before is not None
    assert after is not None
    if before.form != after.form:
        return f"other shapes ({before.form}, then {after.form})"
    return next((obstacles[need] for need in after.needs if need in obstacles), "")


def _apart(one: Estimate, other: Estimate, rounding: float, scale: float) -> bool:
    low = max(min(one.low, one.high), min(other.low, other.high))
    high = min(max(one.low, one.high), max(other.low, other.high))
    if math.isinf(low) or math.isinf(high):
        return low > high
    return low - high > rounding * max(abs(low), abs(high), scale)


def _weight(before: float, after: float, floor: float) -> float:
    if math.isnan(before) or math.isnan(after) or before == after:
        return 0.0
    if math.isinf(before) or math.isinf(after):
        return math.inf
    least = min(abs(before), abs(after)) + floor
    return math.log10(1 + abs(after - before) / least) if least else math.inf


def _differences(before: Checkup, after: Checkup) -> tuple[Difference, ...]:
    def settings(report: Checkup) -> dict[str, Any]:
        known = {f.name: getattr(report.setting, f.name) for f in fields(report.setting)}
        step = report.step_size
        return known | {
            "status": report.status,
            "learning rate": step.given if step else None,
            "momentum": step.momentum if step else None,
        }

    old, new = settings(before), settings(after)
    # Without a step size there is no record of what was given.
    skipped = ("learning rate", "momentum") if None in (before.step_size, after.step_size) else ()
    return tuple(
        Difference(name, _said(old[name]), _said(new[name]))
        for name in old
        if old[name] != new[name] and name not in skipped
    )


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


_OUTCOMES: tuple[Outcome, ...] = (
    "new", "still there", "not comparable", "not measured after", "not measured before", "gone",
)  # fmt: skip


def _finding_changes(
    before: Checkup, after: Checkup, obstacles: dict[str, str]
) -> tuple[FindingChange, ...]:
    left = list(after.findings)
    found = []
    for old in before.findings:
        same = next((new for new in left if _same(old, new)), None)
        if same is not None:
            left.remove(same)
            found.append(FindingChange("still there", old, same))
        else:
            outcome = _outcome(old, before, after, obstacles, "gone", "not measured after")
            found.append(FindingChange(outcome, old, None))
    for new in left:
        outcome = _outcome(new, after, before, obstacles, "new", "not measured before")
        found.append(FindingChange(outcome, None, new))
    return tuple(sorted(found, key=lambda change: _OUTCOMES.index(change.outcome)))


def _same(one: Finding, other: Finding) -> bool:
    if one.kind != other.kind:
        return False
    return one.where == other.where or bool(set(one.where) & set(other.where))


def _outcome(
    finding: Finding,
    own: Checkup,
    other: Checkup,
    obstacles: dict[str, str],
    known: Outcome,
    unknown: Outcome,
) -> Outcome:
    """What it means that only one of two checkups has a finding."""
    value: Any = other
    mine: Any = own
    for name, place in re.findall(r"(\w+)(?:\[(\d+)\])?", finding.evidence):
        mine, value = getattr(mine, name, None), getattr(value, name, None)
        if value is None or mine is None:
            return unknown
        if place:
            if not value or int(place) >= len(mine):
                return unknown
            mine, value = mine[int(place)], _namesake(mine, int(place), value)
            if value is None:  # the other network was read as well, and has no such part
                break
            if form_of(mine) != form_of(value):
                return "not comparable"
    number = getattr(value, "value", value)
    if isinstance(number, float) and math.isnan(number):
        return unknown
    return "not comparable" if set(needs_of(finding.evidence)) & set(obstacles) else known


def _namesake(own: Sequence[Any], place: int, others: Sequence[Any]) -> Any:
    """The one of the same name; of several uses, the use of the same number."""
    name = own[place].name
    use = sum(one.name == name for one in own[:place])
    same = [one for one in others if one.name == name]
    return same[use] if use < len(same) else None
