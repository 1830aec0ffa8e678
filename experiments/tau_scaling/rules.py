"""How the factor of the branches depends on the depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from conditioning import theory


@dataclass(frozen=True)
class Rule:
    """``tau = kappa * L ** -exponent``."""

    exponent: float
    kappa: float = 1.0

    def tau(self, num_blocks: int) -> float:
        """The factor at a depth."""
        return theory.scaling_factor(num_blocks, self.exponent, self.kappa)

    @property
    def excess(self) -> float:
        """``c`` in ``tau = L ** (-1/2 + c)``: what is above the sharp factor."""
        return 0.5 - self.exponent


LINEAR = "1/L"
HALF = "0.5/√L"
SHARP = "1/√L"
ABOVE = "L^-0.4"
QUARTER = "L^-1/4"
ONE = "1"

RULES: Mapping[str, Rule] = {
    LINEAR: Rule(1.0),
    HALF: Rule(0.5, 0.5),
    SHARP: Rule(0.5),
    ABOVE: Rule(0.4),
    QUARTER: Rule(0.25),
    ONE: Rule(0.0),
}
BOUNDED = (LINEAR, HALF, SHARP)
UNBOUNDED = (ABOVE, QUARTER, ONE)
