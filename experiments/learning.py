"""Whether the nets of a claim about trainings have learnt anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from experiments.claims import NOT_DECIDED, Verdict
from experiments.sweep import Pair, name

# Final losses, in units of that of guessing: below the first a net has learnt, from the second on
# it is at chance.
LEARNT = 0.5
AT_CHANCE = 0.9


def loss(result: Mapping[str, Any]) -> float:
    """Final loss in units of that of guessing; infinite if the training diverged."""
    return math.inf if result["status"] == "diverged" else result["loss"] / result["chance"]


def has_learnt(result: Mapping[str, Any], limit: float = LEARNT) -> bool:
    """Whether a training ended with a loss below ``limit`` times that of guessing."""
    return bool(result["status"] == "finished" and loss(result) < limit)


def if_trained(verdict: Verdict, cells: Iterable[Pair], limit: float = LEARNT) -> Verdict:
    """Withdraw a verdict about training if one of these nets did not train."""
    stuck = [name(cell) for cell, result in cells if not has_learnt(result, limit)]
    if not stuck:
        return verdict
    shown = ", ".join(stuck[:4]) + (f" and {len(stuck) - 4} more" if len(stuck) > 4 else "")
    notes = [f"did not train: {shown}", *([verdict.note] if verdict.note else [])]
    return replace(verdict, value=NOT_DECIDED, note="; ".join(notes))
