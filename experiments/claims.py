"""Claims, what was measured for them, and verdicts.

A claim says what a paper predicts, and how far a measurement may lie from that. A measurement is
an enclosure ``[low, high]``, never a bare number. The verdict has three values: the enclosure lies
wholly inside what the claim accepts (*holds*), wholly outside (*fails*), or neither, which is
*not decided* rather than a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from experiments.errors import ClaimError

Decision = Literal["holds", "fails", "not decided"]
HOLDS: Decision = "holds"
FAILS: Decision = "fails"
NOT_DECIDED: Decision = "not decided"


@dataclass(frozen=True)
class Tolerance:
    """The values that a claim accepts, relative to the predicted one.

    Use :meth:`within`, :meth:`at_most` and :meth:`at_least`: they read as the sentence that is
    meant. The slack on a side is ``atol + rtol * abs(predicted)``.

    Parameters
    ----------
    below, above : bool
        Whether values below (above) the predicted one are accepted without limit.
    rtol, atol : float
        The slack on the sides that have a limit.
    strict : bool
        Whether the limit itself is not accepted: "below" is no "at most".
    """

    below: bool = False
    above: bool = False
    rtol: float = 0.0
    atol: float = 0.0
    strict: bool = False

    def __post_init__(self) -> None:
        """Reject a slack that could not be meant."""
        for name, slack in (("rtol", self.rtol), ("atol", self.atol)):
            if not (math.isfinite(slack) and slack >= 0):
                msg = f"{name} must be a finite number >= 0, got {slack}"
                raise ClaimError(msg)

    @classmethod
    def within(cls, *, rtol: float = 0.0, atol: float = 0.0) -> Tolerance:
        """Accept the predicted value, and what is as near as this on either side."""
        return cls(rtol=rtol, atol=atol)

    @classmethod
    def at_most(cls, *, rtol: float = 0.0, atol: float = 0.0) -> Tolerance:
        """Accept whatever is not above the predicted value by more than this."""
        return cls(below=True, rtol=rtol, atol=atol)

    @classmethod
    def at_least(cls, *, rtol: float = 0.0, atol: float = 0.0) -> Tolerance:
        """Accept whatever is not below the predicted value by more than this."""
        return cls(above=True, rtol=rtol, atol=atol)

    @classmethod
    def less_than(cls) -> Tolerance:
        """Accept whatever is below the predicted value."""
        return cls(below=True, strict=True)

    @classmethod
    def more_than(cls) -> Tolerance:
        """Accept whatever is above the predicted value."""
        return cls(above=True, strict=True)

    def judge(self, low: float, high: float, predicted: float) -> Decision:
        """Say whether an enclosure lies inside what is accepted, outside, or neither."""
        least, most = self.accepted(predicted)
        if self.strict and self.below:
            most = math.nextafter(most, -math.inf)  # so that the limit itself lies outside
        if self.strict and self.above:
            least = math.nextafter(least, math.inf)
        # Every comparison with NaN is false, which leaves "not decided".
        if least <= low and high <= most:
            return HOLDS
        if high < least or low > most:
            return FAILS
        return NOT_DECIDED

    def accepted(self, predicted: float) -> tuple[float, float]:
        """Give the interval of accepted values."""
        if math.isnan(predicted):
            return math.nan, math.nan
        # 0 * inf is nan: an infinite prediction has no relative slack.
        slack = self.atol + (self.rtol * abs(predicted) if self.rtol else 0.0)
        if math.isinf(predicted):
            slack = 0.0
        low = -math.inf if self.below else predicted - slack
        high = math.inf if self.above else predicted + slack
        return low, high

    def __str__(self) -> str:
        slack = [f"{self.rtol:g} relative"] if self.rtol else []
        slack += [f"{self.atol:g} absolute"] if self.atol else []
        amount = " + ".join(slack)
        if self.strict:
            return "below" if self.below else "above"
        if self.below:
            return f"at most, + {amount}" if amount else "at most"
        if self.above:
            return f"at least, - {amount}" if amount else "at least"
        return f"± {amount}" if amount else "exactly"


@dataclass(frozen=True)
class Claim:
    """What a paper predicts, and what would count as the prediction coming true.

    Parameters
    ----------
    id : str
        A short name without spaces, unique within the experiment.
    source : str
        The paper and the place in it.
    statement : str
        The claim in one sentence.
    predicted : float or str
        The predicted number, or the relation where the number depends on the data: the number is
        then given when the claim is decided.
    tolerance : Tolerance
        What is accepted.
    reason : str
        Why this tolerance and no other.
    how : str
        How the claim is measured.
    """

    id: str
    source: str
    statement: str
    predicted: float | str
    tolerance: Tolerance
    reason: str
    how: str

    def __post_init__(self) -> None:
        """Reject names that a table, a file and a command line could not share."""
        if not self.id or any(character.isspace() for character in self.id):
            msg = f"a claim's id is a word without spaces, got {self.id!r}"
            raise ClaimError(msg)


class HasEnclosure(Protocol):
    """An estimated number with its error."""

    @property
    def value(self) -> float:
        """The best guess."""

    @property
    def low(self) -> float:
        """The lower end of the enclosure."""

    @property
    def high(self) -> float:
        """The upper end of the enclosure."""


@dataclass(frozen=True)
class Measured:
    """A measured number with its enclosure, and what the claim predicts for it.

    Parameters
    ----------
    value : float
        The measured value; NaN where nothing could be measured.
    low, high : float, optional
        The enclosure. Left out, the value is taken as exact up to the claim's tolerance.
    expected : float, optional
        The number that the claim predicts here. Needed where ``claim.predicted`` is a relation.
    num_runs : int
        How many runs the value summarises.
    run : str
        The cells that made it, such as ``"n=2 L=64"``.
    """

    value: float
    low: float | None = None
    high: float | None = None
    expected: float | None = None
    num_runs: int = 1
    run: str = ""

    @classmethod
    def of(
        cls,
        estimate: HasEnclosure,
        *,
        expected: float | None = None,
        num_runs: int = 1,
        run: str = "",
    ) -> Measured:
        """Take over the value and the enclosure of an estimate of the library."""
        return cls(
            float(estimate.value),
            float(estimate.low),
            float(estimate.high),
            expected=expected,
            num_runs=num_runs,
            run=run,
        )

    @property
    def enclosure(self) -> tuple[float, float]:
        """The ends of the enclosure; NaN if the value or either end is."""
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        if math.isnan(self.value) or math.isnan(low) or math.isnan(high):
            return math.nan, math.nan
        if low > high:
            msg = f"an enclosure needs low <= high, got [{low}, {high}]"
            raise ClaimError(msg)
        return low, high


def over_runs(
    values: Iterable[float],
    *,
    confidence: float = 0.95,
    expected: float | None = None,
    run: str = "",
) -> Measured:
    """Summarise a random quantity over runs: the mean and its Student-t confidence interval.

    Parameters
    ----------
    values : iterable of float
        One value for each run. A run that diverged enters as infinity or NaN, it is not left out.
    confidence : float
        The confidence of the interval for the mean.
    expected, run
        As in :class:`Measured`.

    Returns
    -------
    Measured
        One run has no spread, hence an unbounded enclosure: the verdict is then *not decided*
        rather than resting on a single draw. So has a mean that is not finite.
    """
    if not 0 < confidence < 1:
        msg = f"confidence must lie between 0 and 1, got {confidence}"
        raise ClaimError(msg)
    runs = [float(value) for value in values]
    count = len(runs)
    if count == 0 or any(math.isnan(value) for value in runs):
        return Measured(math.nan, expected=expected, num_runs=count, run=run)
    if any(math.isinf(value) for value in runs):
        infinite = {value for value in runs if math.isinf(value)}
        mean = infinite.pop() if len(infinite) == 1 else math.nan
        all_same = all(value == mean for value in runs)
        low, high = (mean, mean) if all_same else (-math.inf, math.inf)
        return Measured(mean, low, high, expected=expected, num_runs=count, run=run)
    mean = math.fsum(runs) / count
    if count == 1:
        half = math.inf
    else:
        from scipy.stats import t

        variance = math.fsum((value - mean) ** 2 for value in runs) / (count - 1)
        half = float(t.ppf((1 + confidence) / 2, count - 1)) * math.sqrt(variance / count)
    return Measured(mean, mean - half, mean + half, expected=expected, num_runs=count, run=run)


def log(value: float) -> float:
    """Natural logarithm; NaN where there is none."""
    return math.log(value) if value > 0 else math.nan


def geometric(quotients: Sequence[float], **more: Any) -> Measured:
    """Summarise positive numbers over runs: their geometric mean and its confidence interval."""
    logs = over_runs([log(quotient) for quotient in quotients], **more)
    low, high = logs.enclosure
    return Measured(
        math.exp(logs.value), math.exp(low), math.exp(high), num_runs=logs.num_runs, run=logs.run
    )


@dataclass(frozen=True)
class Verdict:
    """A claim, what was measured for it, and whether it holds.

    Parameters
    ----------
    claim : Claim
        What was tested.
    value : {"holds", "fails", "not decided"}
        The verdict.
    measured, low, high : float
        The measured value and its enclosure; NaN where nothing was measured.
    expected : float or None
        The number that the claim predicts for this data; None if none was known.
    num_runs : int
        How many runs went in.
    run : str
        The cells that made the measured value.
    note : str
        What else a reader must know, such as which cells failed.
    """

    claim: Claim
    value: Decision
    measured: float
    low: float
    high: float
    expected: float | None = None
    num_runs: int = 1
    run: str = ""
    note: str = ""

    @property
    def accepted(self) -> tuple[float, float] | None:
        """The interval that the claim accepts; None if no number is predicted."""
        return None if self.expected is None else self.claim.tolerance.accepted(self.expected)


def _expected(claim: Claim, measured: Measured) -> float:
    if measured.expected is not None:
        return float(measured.expected)
    if isinstance(claim.predicted, str):
        msg = (
            f"claim {claim.id!r} predicts the relation {claim.predicted!r}: "
            "give the number that it takes here as Measured(..., expected=...)"
        )
        raise ClaimError(msg)
    return float(claim.predicted)


def decide(claim: Claim, measured: Measured, *, note: str = "") -> Verdict:
    """Decide a claim by one measured value.

    Parameters
    ----------
    claim : Claim
        What is tested.
    measured : Measured
        The value with its enclosure.
    note : str
        What else a reader must know.

    Returns
    -------
    Verdict
        *holds* if the enclosure lies wholly inside what the claim accepts, *fails* if it lies
        wholly outside, else *not decided*: also when the value, an end of its enclosure or the
        expected number is NaN.
    """
    expected = _expected(claim, measured)
    low, high = measured.enclosure
    value = claim.tolerance.judge(low, high, expected)
    return Verdict(
        claim=claim,
        value=value,
        measured=float(measured.value),
        low=low,
        high=high,
        expected=expected,
        num_runs=measured.num_runs,
        run=measured.run,
        note=note,
    )


def decide_every(claim: Claim, measured: Sequence[Measured], *, note: str = "") -> Verdict:
    """Decide a claim about every one of several measured values, such as "at every depth".

    Parameters
    ----------
    claim : Claim
        What is tested.
    measured : sequence of Measured
        The values, each with its own expected number where the claim predicts a relation.
    note : str
        What else a reader must know.

    Returns
    -------
    Verdict
        *fails* if one of them does, *holds* if all do, else *not decided*. It shows the value
        that lies nearest to the limit of what is accepted, or farthest beyond it; ``num_runs`` is
        the sum.
    """
    if not measured:
        return _undecided(claim, note or "nothing was measured")
    verdicts = [decide(claim, one) for one in measured]
    outcomes = [verdict.value for verdict in verdicts]
    value: Decision = HOLDS
    if FAILS in outcomes:
        value = FAILS
    elif NOT_DECIDED in outcomes:
        value = NOT_DECIDED
    same = [verdict for verdict in verdicts if verdict.value == value]
    worst = max(same, key=_strain)
    notes = [note] if note else []
    if value != HOLDS:
        notes.append(f"{value}: {_some([verdict.run for verdict in same])}")
    run = f"worst of {len(verdicts)}: {worst.run}" if len(verdicts) > 1 else worst.run
    num_runs = sum(one.num_runs for one in measured)
    return replace(worst, num_runs=num_runs, run=run, note="; ".join(notes))


def decide_all(
    claim: Claim, outcomes: Mapping[str, bool | None], *, num_runs: int = 1, note: str = ""
) -> Verdict:
    """Decide a claim about a property that cells have or lack, such as "is exhausted".

    Parameters
    ----------
    claim : Claim
        What is tested. Its predicted value is the fraction of cells that have the property, so
        1 for "always"; a relation in words is taken to mean 1.
    outcomes : mapping of str to bool or None
        For each cell whether it has the property; None where that is open.
    num_runs : int
        How many runs each cell summarises.
    note : str
        What else a reader must know.

    Returns
    -------
    Verdict
        The measured value is the fraction of cells with the property; open cells widen its
        enclosure.
    """
    total = len(outcomes)
    if total == 0:
        return _undecided(claim, note or "nothing was measured")
    having = sum(outcome is True for outcome in outcomes.values())
    open_cells = [cell for cell, outcome in outcomes.items() if outcome is None]
    lacking = [cell for cell, outcome in outcomes.items() if outcome is False]
    notes = [note] if note else []
    notes += [f"not so: {_some(lacking)}"] if lacking else []
    notes += [f"open: {_some(open_cells)}"] if open_cells else []
    expected = 1.0 if isinstance(claim.predicted, str) else None
    measured = Measured(
        having / total,
        having / total,
        (having + len(open_cells)) / total,
        expected=expected,
        num_runs=total * num_runs,
        run=f"{total} cells" if total > 1 else next(iter(outcomes)),
    )
    return decide(claim, measured, note="; ".join(notes))


def _strain(verdict: Verdict) -> float:
    """Give how much of the slack is used up: 1 at the limit of what is accepted, more beyond."""
    if verdict.expected is None or math.isnan(verdict.low):
        return math.inf
    accept_low, accept_high = verdict.claim.tolerance.accepted(verdict.expected)
    strains = []
    for end, limit, sign in ((verdict.low, accept_low, -1), (verdict.high, accept_high, 1)):
        if math.isinf(limit):
            continue
        slack = abs(limit - verdict.expected)
        excess = sign * (end - verdict.expected)
        # Without slack, what counts is the distance itself, on the scale of the prediction.
        strains.append(excess / slack if slack else 1 + excess / max(abs(verdict.expected), 1e-300))
    return max(strains, default=0.0)


def _undecided(claim: Claim, note: str) -> Verdict:
    expected = None if isinstance(claim.predicted, str) else float(claim.predicted)
    nan = math.nan
    return Verdict(claim, NOT_DECIDED, nan, nan, nan, expected=expected, num_runs=0, note=note)


def _some(cells: Sequence[str], limit: int = 4) -> str:
    """Name the first few cells, and count the others."""
    named = [cell for cell in cells if cell]
    if not named:
        return f"{len(cells)} of them"
    rest = len(cells) - min(len(named), limit)
    return ", ".join(named[:limit]) + (f" and {rest} more" if rest else "")
