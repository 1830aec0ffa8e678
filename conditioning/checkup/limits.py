"""The limits beyond which a number of a checkup is a finding, each with where it comes from.

None is fitted to networks: they follow from theory, or are conventions that are stated here.
"""

from __future__ import annotations

import math

#: Exponent with which a healthy net may change the gradient over its depth. Pre-activation ResNets
#: with BatchNorm multiply it by ``(2L)^1.08`` at initialisation, see
#: :func:`conditioning.theory.initial_ratios`, and train at any depth; what grows faster is
#: exponential in the depth.
DEPTH_POWER = 0.5 / (1 - 1 / math.pi) ** 2

#: What the ends add to that. A stem whose weights have half or twice the right gain, a first block
#: behind a small stream (its ratio grows as the stream falls), a head of few classes: together an
#: order of magnitude, by convention. What pooling does is taken from the shapes.
ENDS = 10.0

#: Over the second half of a run of equal residual blocks a net with normalisation gains
#: ``2^1.08`` however deep it is, one with ``tau = 1/sqrt(L)`` at most ``e^0.25``. Chance may double
#: that of the whole net.
CHANCE = 2.0
#: Runs of fewer blocks have no second half to speak of.
FEWEST_BLOCKS = 4

#: From so many layers on, a right gain is not enough without skips: plain nets of 34 layers train
#: worse than those of 18 even with BatchNorm (He, Zhang, Ren, Sun, arXiv:1512.03385, figure 4). The
#: limit is the shallowest depth at which they saw it on CIFAR-10, 20 against 32 layers (figure 6).
PLAIN_DEPTH = 32

#: Fewer layers do not show that it is the initialisation and not one layer.
FEWEST_LAYERS = 3

#: A cause explains a loss if it accounts for most of its logarithm.
MOST = 0.5

#: Half of the norm, in one transition: two of them cost as much as the gain of a whole stage.
TRANSITION = 0.5

#: More than half of the entries of a bounded activation are flat: most of the gradient stops.
SATURATED = 0.5

#: Share of units without any slope that chance explains: random units without bias are closed for
#: all samples with probability 1/2 where samples are alike, and three standard deviations more.
DEAD = 0.5
SIGMAS = 3.0

#: Of the closed gates of a ReLU, those closed for every sample: most of them. Of independent
#: samples it is ``2^(1 - samples)``; in plain ReLU nets the angle between samples falls as
#: ``3 pi / l`` with the depth ``l``, and with it the share of gates that tell two samples apart.
COLLAPSED = 0.5
#: With fewer samples gates are the same for all by chance; with these it is ``2^-15``.
FEWEST_SAMPLES = 16

#: The smallest positive float64: what lies below it is exactly zero.
NO_GRADIENT = math.ulp(0.0)

#: A step beyond ``2 (1 + momentum) / lambda_max`` leaves a quadratic bowl.
STEP = 1.0

#: Gradient descent at its best step reduces an error along a direction of curvature ``lambda`` by
#: ``1/e`` in about ``kappa / 2`` steps: a million is beyond most trainings.
CONDITION = 1e6
#: ``kappa_10`` leaves a tenth of the directions aside. Of a Hessian with more negative eigenvalues
#: than that, directions in which descent leads away are among the rest: steps to a minimum say
#: nothing there.
INDEFINITE = 0.1

#: ``1 / sqrt(E f(z)^2)`` with z standard normal for ReLU, GELU and SiLU: with this gain a layer in
#: front of ``f`` keeps the second moment. tanh and hardtanh have slope 1 at zero, where a gain of 1
#: keeps small signals (Glorot and Bengio, AISTATS 2010).
RIGHT_GAIN = {
    "relu": math.sqrt(2), "relu6": math.sqrt(2), "leaky_relu": math.sqrt(2),
    "gelu": 1.5335, "silu": 1.6765, "tanh": 1.0, "hardtanh": 1.0,
}  # fmt: skip


def fair_factor(num_blocks: int) -> float:
    """By how much a norm may grow or fall over a number of blocks: ``10 (2L)^1.08``."""
    return ENDS * math.pow(2 * max(num_blocks, 1), DEPTH_POWER)


def second_half(num_runs: int) -> float:
    """By how much the gradient may grow over the second halves of runs of residual blocks."""
    return CHANCE * math.pow(2, DEPTH_POWER * num_runs)


def dead_limit(num_units: int) -> float:
    """Share of dead units beyond chance; of few units it takes all of them."""
    count = max(num_units, 1)
    return min(DEAD + SIGMAS * 0.5 / math.sqrt(count), 1 - 0.5 / count)
