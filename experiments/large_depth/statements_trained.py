"""Claims about trained nets: how rough their layers are, and where they learn."""

from __future__ import annotations

from experiments.claims import Claim, Tolerance
from experiments.large_depth.sources import DERIVED, PAPER, RECALLED

_KEPT = "smooth, Brownian and independent layers have the exponents 1, 1/2 and 0"
_EXPONENT = (
    "Half the slope of the logarithm of mean squared increments over 1, 2 and 4 layers in the "
    "logarithm of their number"
)
_regular = [
    Claim(
        "regularity.smooth",
        f"{PAPER} (figure of a weight against the layer)",
        "Smooth layers, β = 1, stay smooth in training.",
        0.0,
        Tolerance.within(atol=0.1),
        _KEPT,
        f"{_EXPONENT}, after less before, net by net: mean over seeds and 95 %.",
    ),
    Claim(
        "regularity.rough",
        f"{PAPER} (figure of a weight against the layer)",
        "Independent layers stay rough, with β = 1 and with β = 1/2.",
        0.0,
        Tolerance.within(atol=0.1),
        _KEPT,
        "As regularity.smooth; the worse of the two. Adam moves a weight by the learning rate at "
        "each step, hardly more: after a short training even a smooth change would leave the "
        "exponent near 0, and this could hardly fail. The note says what a smooth change of that "
        "size would do; what the change is like, regularity.change-rough does.",
    ),
    Claim(
        "regularity.change",
        f"{DERIVED.split(' (')[0]}: states and gradients are smooth in the layer",
        "What training adds to smooth layers is itself smoother than Brownian motion.",
        0.5,
        Tolerance.more_than(),
        _KEPT,
        f"{_EXPONENT}, of the difference of trained and initial weights: mean and 95 %.",
    ),
    Claim(
        "regularity.change-rough",
        f"{DERIVED.split(' (')[0]}: states and gradients of independent layers are like Brownian "
        "motion in the layer",
        "What training adds to independent layers is rough, too: nearer to Brownian motion than to "
        "a smooth path or to independent layers, with β = 1 and with β = 1/2.",
        0.5,
        Tolerance.within(atol=0.25),
        f"{_KEPT}: half of their distance",
        "As regularity.change; the worse of the two.",
    ),
]

_LEARNT = "one sample in twenty: a net that gets so few more right than guessing has not learnt"
_BEST = (
    "Test accuracy at the learning rate of highest training accuracy; predictions that are not "
    "finite are wrong"
)
_STABILITY = "The line is critical_beta for res-1 at the nets' depth."
_accuracy = [
    Claim(
        "accuracy.above",
        f"{RECALLED} (good accuracy above the line only)",
        "At equal β, trained nets at an H whose line of initial stability is below it are better "
        "than the others.",
        0.0,
        Tolerance.more_than(),
        "a sign, not a size; a law of β alone gives 0",
        f"{_BEST}. Mean over H above the line less that over H below it, for every β that has "
        f"both; mean over β for each seed; mean over seeds and 95 %. {_STABILITY}",
    ),
    Claim(
        "accuracy.above-hurst",
        f"{RECALLED} (good accuracy above the line only)",
        "At equal H, trained nets whose β is above the line are better than the others.",
        0.0,
        Tolerance.more_than(),
        "a sign, not a size; a law of H alone gives 0",
        f"As accuracy.above, with β and H exchanged. {_STABILITY}",
    ),
    Claim(
        "accuracy.corner",
        f"{RECALLED} (exploding corner at chance)",
        "At the largest H and the smallest β no net learns.",
        "accuracy of the commonest class",
        Tolerance.at_most(atol=0.05),
        _LEARNT,
        f"{_BEST}: mean over seeds and 95 %.",
    ),
    Claim(
        "accuracy.below",
        f"{RECALLED} (good accuracy above the line only), taken to the letter",
        "No net below the line learns.",
        "accuracy of the commonest class",
        Tolerance.at_most(atol=0.05),
        _LEARNT,
        f"{_BEST}: mean over seeds and 95 %, every cell of the map below the line.",
    ),
]

CLAIMS = [*_regular, *_accuracy]
