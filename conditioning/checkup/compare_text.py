"""Two checkups side by side, as text for a terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from conditioning.blocks.block import table
from conditioning.checkup.tables import JOINED, cut, label, ranged, short, wrapped
from conditioning.operators.modules import join_names
from conditioning.spectrum import Estimate

if TYPE_CHECKING:
    from conditioning.checkup.compare import Change, Comparison

_SHOWN = 24
_SAME = {"act_out": "act_in", "grad_out": "grad_in"}
_MOVEMENTS = {"moved": "yes", "within its error": "no", "not comparable": "?"}


def comparison_text(comparison: Comparison) -> str:
    """Write a comparison: settings that differ, findings, the network, and the parts that moved."""
    parts = [
        _head(comparison), _differences(comparison), _findings(comparison), _network(comparison),
        _moved(comparison), _rest(comparison),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _value(number: Estimate) -> str:
    if math.isnan(number.value):
        return "-"
    if math.isinf(number.high) and math.isfinite(number.low):
        return f">= {short(number.low)}"
    return ranged(number)


def _factor(change: Change) -> str:
    return "" if math.isnan(change.factor) else f"{change.factor:.3g}"


def _ends(change: Change) -> tuple[str, str]:
    return f"{change.before.value:.6g}", f"{change.after.value:.6g}"


def _head(comparison: Comparison) -> str:
    outcomes = [change.outcome for change in comparison.findings]
    found = [f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)]
    lines = [
        f"{comparison.model}, before and after: {comparison.counts()}",
        f"findings: {', '.join(found) or 'none in either'}",
        "(a number has moved if its two enclosures have nothing in common)",
    ]
    lines += [wrapped(note, "        ", "  note: ") for note in comparison.notes]
    return "\n".join(lines)


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    short_ones = [d for d in comparison.differences if len(d.before) + len(d.after) < 60]
    rows = [(f"  {d.name}", d.before, d.after) for d in short_ones]
    lines = [table(("Settings that differ", "before", "after"), rows)]
    for one in comparison.differences:
        if one not in short_ones:
            lines.append(wrapped(one.before, " " * 6, f"  {one.name} before: "))
            lines.append(wrapped(one.after, " " * 6, f"  {one.name} after: "))
    return "\n".join(lines)


def _findings(comparison: Comparison) -> str:
    if not comparison.findings:
        return ""
    lines = ["Findings"]
    for change in comparison.findings:
        one = change.either
        where = f" at {join_names([label(name) for name in one.where])}" if one.where else ""
        values = [_value(f.number).replace(" ", JOINED) for f in (change.before, change.after) if f]
        line = f"{change.outcome}: {one.severity} {one.kind}{where}: {' -> '.join(values)}"
        lines.append(wrapped(f"{line}, limit {one.limit:.4g}", "      ", "  "))
    return "\n".join(lines)


def _network(comparison: Comparison) -> str:
    rows = [
        (f"  {c.quantity}", _value(c.before), _value(c.after), _factor(c), _MOVEMENTS[c.movement])
        for c in comparison.changes
        if c.part == "network"
    ]
    return table(("The network", "before", "after", "factor", "moved"), rows)


def _moved(comparison: Comparison) -> str:
    # Numbers of one block move together: the one that moved most stands for them.
    groups: dict[tuple[str, str], list[Change]] = defaultdict(list)
    moved = comparison.moved
    entering = {(c.quantity, *_ends(c)) for c in moved if c.quantity in _SAME.values()}
    for change in moved:
        # What leaves a block is what enters the next one.
        twice = (_SAME.get(change.quantity), *_ends(change)) in entering
        if change.part != "network" and not twice:
            groups[change.part, change.where].append(change)
    if not groups:
        return "Of blocks, layers and activations no number moved beyond its error."
    rows = [
        (
            f"  {part} {cut(label(where))}", most.quantity, short(most.before.value),
            short(most.after.value), _factor(most), f"+ {len(others)} more" if others else "",
        )
        for (part, where), (most, *others) in list(groups.items())[:_SHOWN]
    ]  # fmt: skip
    left = len(groups) - len(rows)
    rows += [(f"  ... ({left} more)", "", "", "", "", "")] if left else []
    return table(("Moved beyond the error", "", "before", "after", "factor", ""), rows)


def _rest(comparison: Comparison) -> str:
    reasons: dict[str, list[str]] = defaultdict(list)
    for change in comparison.changes:
        if change.movement == "not comparable":
            where = f" of {label(change.where)}" if change.part != "network" else ""
            reasons[change.reason].append(f"{change.quantity}{where}")
    lines = [
        wrapped(f"Not comparable (?), {reason}: {join_names(names)}", "  ", "")
        for reason, names in reasons.items()
    ]
    for when, names in (("before", comparison.only_before), ("after", comparison.only_after)):
        if names:
            lines.append(wrapped(f"Only {when}: {join_names(list(names))}", "  ", ""))
    return "\n".join(lines)
