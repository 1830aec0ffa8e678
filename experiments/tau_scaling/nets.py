"""The ResNets that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.tau_scaling.rules import ONE, QUARTER, RULES, SHARP, Rule


@dataclass(frozen=True)
class Net:
    """One kind of net: its factor at the start, and whether it has BatchNorm.

    Without BatchNorm the factor is trained, as one scalar for all blocks.
    """

    rule: Rule
    bn: bool


BN = "BN"
BN_TAU = "BN, 1/√L"
FREE_TAU = "1/√L"
FREE_QUARTER = "L^-1/4"
FREE = "1"

NETS: Mapping[str, Net] = {
    BN: Net(RULES[ONE], bn=True),
    BN_TAU: Net(RULES[SHARP], bn=True),
    FREE_TAU: Net(RULES[SHARP], bn=False),
    FREE_QUARTER: Net(RULES[QUARTER], bn=False),
    FREE: Net(RULES[ONE], bn=False),
}
