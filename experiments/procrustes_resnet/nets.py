"""The nets that are compared, and how each is regularised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Net:
    """One kind of net.

    Parameters
    ----------
    options : mapping
        Of :class:`experiments.models.CifarResNet`.
    projected : bool
        Whether stem and transitions are projected, at the beginning and in training.
    probability : float or None
        Of a projection after a step; None for every step.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    projected: bool = False
    probability: float | None = None


_PROC = {"variant": "proc", "transition_init": "flat"}
_ISOMETRIC = {**_PROC, "transition_kernel": 2}

RESNET = "ResNet"
SMALL_SHORTCUT = "ResNet, shortcut × 0.01"
PAPER = "ProcResNet"
PAPER_FREE = "ProcResNet, not projected"
OURS = "2×2"
OURS_FREE = "2×2, not projected"

NETS: Mapping[str, Net] = {
    RESNET: Net(),
    SMALL_SHORTCUT: Net({"shortcut_scale": 0.01}),
    PAPER: Net(_PROC, projected=True, probability=0.5),
    PAPER_FREE: Net(_PROC),
    OURS: Net(_ISOMETRIC, projected=True),
    OURS_FREE: Net(_ISOMETRIC),
}
# The same initial weights with and without projection: one of each pair is enough.
INITIAL_NETS = (RESNET, SMALL_SHORTCUT, PAPER, OURS)
DEEP_NETS = (RESNET, PAPER, OURS)
