"""What a checkup says of a case, and whether that is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from conditioning.checkup import Checkup, Finding
from experiments.gallery.cases import Case

HIT = "hit"
MISSED = "missed"
WRONG_KIND = "wrong kind"
WRONG_PLACE = "wrong place"
CLEAN = "clean"
FALSE_ALARM = "false alarm"

LATER = 4  # variants from here on are those of experiments.gallery.later


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One network's findings next to what is known of it.

    Attributes
    ----------
    case : str
    state : {"sick", "twin", "healthy"}
    summary : str
    expected, expected_where : str
        Kind and place of the ailment; empty where there is none.
    outcome : str
        ``hit``: the leading problem is of the right kind and names the right place; ``missed``:
        there is no problem; ``wrong kind`` and ``wrong place`` otherwise. Without an ailment:
        ``clean``, or ``false alarm`` if there is any problem.
    found, where, sentence : str
        The leading problem.
    value, low, high, limit : float or None
        Its number.
    further : str
        Kinds of all other findings, remarks in brackets.
    """

    case: str
    state: str
    summary: str
    expected: str
    expected_where: str
    outcome: str
    found: str = ""
    where: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    further: str = ""
    sentence: str = ""

    @property
    def variant(self) -> int:
        """Of the case."""
        return int(self.case.rpartition("/")[2])

    @property
    def right(self) -> bool:
        """Whether the checkup is right."""
        return self.outcome in (HIT, CLEAN)


def judge(case: Case, state: str, report: Checkup) -> Judgement:
    """Set the findings of a checkup against what is known of the network.

    Parameters
    ----------
    case : Case
    state : {"sick", "twin", "healthy"}
    report : Checkup
    """
    kind, where = (case.kind, case.where) if state == "sick" else ("", "")
    problems = report.problems
    outcome = _outcome(kind, where, problems)
    judged = Judgement(case.name, state, case.summary, kind, where, outcome)
    others = [_named(finding) for finding in report.findings if finding not in problems[:1]]
    judged = dataclasses.replace(judged, further=", ".join(others))
    if not problems:
        return judged
    lead = problems[0]
    return dataclasses.replace(
        judged,
        found=lead.kind, where=" ".join(lead.where), value=lead.number.value,
        low=lead.number.low, high=lead.number.high, limit=lead.limit, sentence=lead.sentence,
    )  # fmt: skip


def _named(finding: Finding) -> str:
    return finding.kind if finding.severity == "problem" else f"({finding.kind})"


def _outcome(kind: str, where: str, problems: Sequence[Finding]) -> str:
    if not kind:
        return FALSE_ALARM if problems else CLEAN
    if not problems:
        return MISSED
    if problems[0].kind != kind:
        return WRONG_KIND
    return HIT if not where or problems[0].where[:1] == (where,) else WRONG_PLACE


def counted(judgements: Sequence[Judgement]) -> dict[str, dict[str, int]]:
    """How often each outcome came up, by what the rules had seen of the cases.

    Rules were made with variants 0. Variants 1 to 3 were held out, and one rule was changed for
    one of them. Variants from 4 on were written after that.
    """
    groups: dict[str, list[Judgement]] = {}
    for state, name in (("sick", "ailments"), ("twin", "twins"), ("healthy", "healthy nets")):
        same = [j for j in judgements if j.state == state]
        groups[f"{name}, variant 0"] = [j for j in same if j.variant == 0]
        groups[f"{name}, variants 1 to 3"] = [j for j in same if 0 < j.variant < LATER]
        groups[f"{name}, later variants"] = [j for j in same if j.variant >= LATER]
    counts: dict[str, dict[str, int]] = {}
    for name, group in groups.items():
        outcomes = dict.fromkeys(sorted(j.outcome for j in group))
        counts[name] = {o: sum(j.outcome == o for j in group) for o in outcomes}
    return counts
