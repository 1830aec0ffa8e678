"""Gradient-norm ratios of blocks in few numbers, block by kind of block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def summary(ratios: np.ndarray) -> dict[str, Any]:
    """Sum up ratios of shape (steps, blocks): means over steps of what each step shows."""
    deviation = np.abs(1 - ratios)
    with np.errstate(divide="ignore"):
        logs = np.log(ratios)
    return {
        "ratios": ratios.mean(axis=0),
        "mean": float(deviation.mean()),
        "max": float(deviation.max(axis=1).mean()),
        "log_product": float(logs.sum(axis=1).mean()),
    }


def split_summary(frame: pd.DataFrame, transitions: Sequence[str]) -> dict[str, Any]:
    """The same, and for some blocks apart; the product is over all.

    ``transition`` holds every transition, ``downsampling`` those after the first block;
    ``first_block`` holds that one, a projection in one net and an identity block in the other, and
    far from 1 in both; ``identity`` holds all that are no transitions.
    """
    found = summary(frame.to_numpy())
    if transitions:
        first = frame.columns[0]
        groups = {
            "identity": [name for name in frame.columns if name not in set(transitions)],
            "transition": list(transitions),
            "downsampling": [name for name in transitions if name != first],
            "first_block": [first],
        }
        found |= {
            group: summary(frame[names].to_numpy()) for group, names in groups.items() if names
        }
    return found


def windows_of(num_steps: int) -> list[tuple[int, int]]:
    """Steps to average over, both ends included: the first alone, then ever longer windows."""
    edges = [0, 1]
    for share in (0.1, 0.3, 0.6, 1.0):
        edge = max(round(share * num_steps), edges[-1] + 1)
        if edge <= num_steps:
            edges.append(edge)
    return [(first, after - 1) for first, after in itertools.pairwise(edges)]
