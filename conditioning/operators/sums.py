"""Sums over batches: each graph is used and dropped before the next one is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from conditioning.operators.graphs import LossGraph


def accumulate(
    graphs: Iterable[tuple[LossGraph, float]], quantity: Callable[[LossGraph], list[Tensor]]
) -> tuple[list[Tensor], float, int]:
    """Sum quantities of several batches' graphs, times the batches' sizes.

    Returns
    -------
    sums : list of Tensor
        Of one batch alone the quantities themselves, not rounded by a weight.
    size : float
        Of all batches together.
    count : int
        How many batches there are.
    """
    totals: list[Tensor] = []
    total_size, count = 0.0, 0
    for graph, size in graphs:
        terms = quantity(graph)
        if count == 0:
            totals, total_size = terms, size
        else:
            if count == 1:
                # Sums of half precision are taken in single precision.
                totals = [t.to(wide(t.dtype)) * total_size for t in totals]
            totals = [
                t.add_(term.to(t.dtype), alpha=size) for t, term in zip(totals, terms, strict=True)
            ]
            total_size += size
        count += 1
        del graph  # before the next one is built: two may not fit
    return totals, total_size, count


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a dtype are summed: single precision at least."""
    return torch.promote_types(dtype, torch.float32)
