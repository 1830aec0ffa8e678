"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

import math

from experiments.claims import Claim, Tolerance

_PAPER = "Liu, Chen, Zhou, Du, Zhou, Zhao, arXiv:1909.04653"
_DU = "Du, Lee, Tian, Poczos, Singh, arXiv:1712.00779"
_DERIVED = "derived for this project (conditioning.theory)"
_SEEN = "seen in an earlier simulation for this project"
# Statements that only a mistake in the program could make fail begin with this.
CHECK = "Instrument check: "
_ROUNDING = "float64 rounding; a wrong formula would be off by a part of its value"
_ALL = (
    "10,000 starts without a failure leave a rate of failure of up to 0.0004 open (Clopper and "
    "Pearson, 95 %); no set of starts shows more than 1 minus something like that"
)
_START = (
    "a random start in the ball of radius |1ᵀa*|/√k, p = 8, first angle π/3, steps 1/k² (of the "
    "filter 1/k⁴ during the warm-up)"
)
_RATE = (
    "share of the starts that enter the set from which there is but the way to the global "
    "optimum, with its Clopper-Pearson interval at 95 %; starts that are not decided in time widen "
    "it"
)
_DIFFERENCE = (
    "differences of rates of independent starts, with 95 % intervals (Clopper and Pearson's, "
    "combined by the square root of squares)"
)

_check = [
    Claim(
        "check.gradients",
        _DERIVED,
        f"{CHECK}loss and gradients in closed form, of nets with and without normalisation, are "
        "those of automatic differentiation.",
        0.0,
        Tolerance.within(atol=1e-9),
        _ROUNDING,
        "Largest relative distance over 200 random points, k = 5, p = 8: closed forms and the "
        "module against autograd through arccos.",
    ),
    Claim(
        "check.monte-carlo",
        _DERIVED,
        f"{CHECK}they are those of the net on random inputs.",
        0.0,
        Tolerance.within(atol=1e-2),
        "a few standard errors of the samples, and a hundredth of |a*| = 1",
        "Largest entry of the difference, four nets at a time, p = 6, k = 5; the enclosure is that "
        "of Student's t for 16 batches, entry by entry.",
    ),
    Claim(
        "check.hessians",
        _DERIVED,
        f"{CHECK}products of HessianOperator are those of a dense Hessian by torch.func.",
        0.0,
        Tolerance.within(atol=1e-9),
        _ROUNDING,
        "Spectral norm of the difference over that of the Hessian, at five random points.",
    ),
    Claim(
        "check.reduction",
        _DERIVED,
        f"{CHECK}descent of vectors is descent of three numbers, after thousands of steps.",
        0.0,
        Tolerance.within(atol=1e-6),
        "accumulated rounding; a wrong term would add up to a part of an angle",
        "Largest difference of the angle, and of the two parts of a over |a*|, after thousands of "
        "steps with all three methods, |a*|² = 64k.",
    ),
    Claim(
        "check.fates",
        _DERIVED,
        f"{CHECK}descent of vectors arrives where the sets that it does not leave say.",
        1.0,
        Tolerance.within(),
        "one net that arrives elsewhere would refute it",
        "Every net of check.reduction's kind, until 25 k² steps after the warm-up: within 1e-3 of "
        "v* (1e-2 of −v*) and of the outputs there.",
    ),
]

_critical = [
    Claim(
        "critical.points",
        f"{_PAPER}, spurious point after {_DU}; form {_DERIVED}",
        "(v*, a*) and (−v*, (11ᵀ + (π−1)I)⁻¹(11ᵀ − I)a*) are critical points of the net.",
        0.0,
        Tolerance.within(atol=1e-12),
        _ROUNDING,
        "Norm of the gradient by automatic differentiation over |a*| = 1, every k and ratio.",
    ),
    Claim(
        "critical.optimum",
        _DERIVED,
        "At the optimum the Hessian has the eigenvalues (π−1)/2π, (k+π−1)/2π, |a*|²/2 and one 0, "
        "of the scale of the filter.",
        0.0,
        Tolerance.within(atol=1e-12),
        _ROUNDING,
        "Largest distance of the full spectrum of HessianOperator to the predicted one, over the "
        "largest eigenvalue.",
    ),
    Claim(
        "critical.spurious",
        _DERIVED,
        "At the spurious point it has (π−1)/2π, (k+π−1)/2π and p zeros, whether that is a "
        "minimum or a saddle: the second order does not tell.",
        0.0,
        Tolerance.within(atol=1e-12),
        _ROUNDING,
        "As critical.optimum; below and above the threshold.",
    ),
    Claim(
        "critical.third-order",
        _DERIVED,
        "Turning the filter by ε from the spurious point changes the loss by −(a_spᵀa*) ε³/6π.",
        1.0,
        Tolerance.within(rtol=1e-3),
        "the next term is ε²/10 of it, 1e-5; rounding of the loss at ε = 1e-3 is 1e-4 or less",
        "Change over the predicted one, for ε = 1e-3 ... 1e-2.",
    ),
    Claim(
        "critical.minimum",
        f"{_PAPER} and {_DU}; inequality {_DERIVED}",
        "Where (1ᵀa*)² < (1 + (k−1)/π)|a*|² the spurious point is a local minimum.",
        1.0,
        Tolerance.within(),
        "a single way down would refute it",
        "The loss rises in 2000 random directions of filter and outputs at three distances up to "
        "0.01, and for the best outputs at each angle.",
    ),
    Claim(
        "critical.saddle",
        _DERIVED,
        "Where it is larger the spurious point is a saddle.",
        1.0,
        Tolerance.within(),
        "each teacher needs a way down and a way up",
        "The loss falls as the filter turns, and rises with the outputs (positive eigenvalues).",
    ),
    Claim(
        "critical.sign",
        _DERIVED,
        "The smallest Hessian eigenvalue beside the spurious point changes its sign at "
        "(1ᵀa*)² = (1 + (k−1)/π)|a*|².",
        1.0,
        Tolerance.within(atol=1e-6),
        "at the angle 1e-3 what is left out moves the place by 1e-9",
        "Root in (1ᵀa*)²/|a*|², over the predicted one, of the smallest eigenvalue that "
        "HessianOperator finds at π − 1e-3, in a chart of the sphere; every k.",
    ),
    Claim(
        "critical.curvature",
        _DERIVED,
        "Beside a minimum it is −(a_spᵀa*) ε/2π, beside a saddle −(a_spᵀa*) ε/π.",
        1.0,
        Tolerance.within(rtol=1e-3),
        "as critical.third-order",
        "Eigenvalue over the predicted one.",
    ),
]

_rates = [
    Claim(
        "rates.warm-up",
        f"{_PAPER}, main theorem",
        "With a shortcut and a warm-up of 10k² steps every start ends at the global optimum.",
        1.0,
        Tolerance.at_least(atol=1e-3),
        _ALL,
        f"{_START}; three teachers, every k: {_RATE}.",
    ),
    Claim(
        "rates.warm-up-1000",
        f"{_PAPER}, experiments (protocol recalled)",
        "1000 steps of warm-up are enough for random starts, too.",
        1.0,
        Tolerance.at_least(atol=1e-3),
        _ALL,
        "As rates.warm-up.",
    ),
    Claim(
        "rates.no-warm-up",
        f"{_PAPER}, experiments",
        "Without a warm-up some starts do not, at every k (|a*|² = 64k, 1ᵀa* = |a*|/4).",
        1.0,
        Tolerance.less_than(),
        "an order, not a size: the paper's teacher is not known",
        f"{_START}: {_RATE}.",
    ),
    Claim(
        "rates.rising",
        f"{_PAPER}, experiments (trend recalled)",
        "Without a warm-up the rate of success rises from each k to the next (the same teacher).",
        0.0,
        Tolerance.more_than(),
        "an order, not a size",
        f"As rates.no-warm-up: {_DIFFERENCE}.",
    ),
    Claim(
        "rates.unit",
        _SEEN,
        "With |a*| = 1 random starts need no warm-up.",
        1.0,
        Tolerance.at_least(atol=1e-3),
        _ALL,
        "As rates.warm-up.",
    ),
    Claim(
        "rates.cnn",
        f"{_PAPER}, experiments; {_DU} (a constant probability)",
        "Without a shortcut one half of the starts end at the global optimum, at every k "
        "(1ᵀa* = |a*|/4).",
        0.5,
        Tolerance.within(atol=0.05),
        "one half to the first digit",
        f"Filter drawn from the sphere, |a*|² = 1 and 64k: {_RATE}.",
    ),
    Claim(
        "rates.cnn-sum",
        _SEEN,
        "That is so for a small 1ᵀa* only: with (1ᵀa*)² = 0.2 k|a*|² the rate is larger, and rises "
        "with k.",
        0.0,
        Tolerance.more_than(),
        "an order, not a size",
        f"Rate against that at |a*|²=64k, 1ᵀa* = |a*|/4, at every k, and that at the largest k "
        f"against the smallest: {_DIFFERENCE}.",
    ),
    Claim(
        "rates.stress",
        _DERIVED,
        "A warm-up of 10k² steps is enough beyond the prior, too, at first angles 0.45π and 0.48π.",
        1.0,
        Tolerance.at_least(atol=1e-3),
        _ALL,
        "As rates.warm-up, three other teachers.",
    ),
    Claim(
        "rates.stress-1000",
        f"{_PAPER}, experiments (protocol recalled), beyond its prior",
        "So are 1000 steps.",
        1.0,
        Tolerance.at_least(atol=1e-3),
        _ALL,
        "As rates.stress.",
    ),
    Claim(
        "rates.stress-rising",
        f"{_PAPER}, experiments (trend recalled)",
        "Without a warm-up the rate rises with k there, too.",
        0.0,
        Tolerance.more_than(),
        "an order, not a size",
        f"The largest k against the smallest: {_DIFFERENCE}.",
    ),
]

_TEACHERS = "|a*|²/k = 1/16, 1, 16, 64, r = 0.01, 0.1, 0.3, k = 16, 64: 24 teachers"
_starts = [
    Claim(
        "starts.adversarial",
        f"{_PAPER}, main theorem (any start in the ball)",
        "With a warm-up of 10k² steps the start against the teacher's outputs, "
        "a₀ = −(|1ᵀa*|/√k) a*/|a*|, ends at the global optimum.",
        1.0,
        Tolerance.within(),
        "the theorem has no exceptions",
        f"{_TEACHERS}.",
    ),
    Claim(
        "starts.ball",
        f"{_PAPER}, main theorem (any start in the ball)",
        "So does every other start in the ball.",
        1.0,
        Tolerance.within(),
        "the theorem has no exceptions",
        "The same teachers, a grid of starts over the ball's two dimensions that matter, and over "
        "its rim.",
    ),
    Claim(
        "starts.short",
        f"{_DERIVED}: it takes of the order of k² steps to turn a",
        "1000 steps of warm-up are not enough for all of the adversarial starts.",
        1.0,
        Tolerance.less_than(),
        "one that fails is enough",
        "As starts.adversarial: share that ends at the global optimum.",
    ),
    Claim(
        "starts.cold",
        f"{_PAPER} (why there is a warm-up)",
        "Without a warm-up some adversarial starts end at the spurious optimum.",
        1.0,
        Tolerance.less_than(),
        "one that fails is enough",
        "As starts.adversarial: share that ends at the global optimum.",
    ),
    Claim(
        "starts.time",
        f"{_PAPER}, main theorem (stage I takes O(k²) steps up to logarithms)",
        "The warm-up that adversarial starts need grows no faster than k².",
        2.0,
        Tolerance.at_most(atol=0.1),
        "k^2.1 over k = 16 ... 100 is what a factor log k looks like",
        "Exponent over k of the steps until all is decided, with its 95 % interval; |a*|² = k, "
        "three shares r.",
    ),
]

_angles = [
    Claim(
        "angle.edge",
        _DERIVED,
        "The largest first angle that a warm-up allows is that at which the relaxed aᵀa* changes "
        "its sign.",
        0.0,
        Tolerance.within(atol=0.01),
        "a hundredth of π; near the edge the filter moves while a relaxes",
        "Between the last angle at which all starts succeed and the first at which some do not, "
        "minus the predicted one, over π; |a*|² = k, three shares r.",
    ),
    Claim(
        "angle.prior",
        f"{_PAPER}, main theorem (π/3); up to π/2: {_DERIVED}",
        "All starts succeed at every first angle below π/2, beyond the prior π/3.",
        1.0,
        Tolerance.within(),
        "a start that fails would refute it",
        "Every angle below π/2 of angle.edge, for which all starts succeed.",
    ),
    Claim(
        "stage.angle",
        f"{_PAPER}, main theorem, stage I (some constant below π/2)",
        "During the warm-up the angle stays below π/2.",
        0.5,
        Tolerance.less_than(),
        "π/2 is where the constant part of the gradient changes its sign",
        "Largest angle over π, over all followed starts and records until the warm-up's end.",
    ),
    Claim(
        "stage.alignment",
        f"{_PAPER}, main theorem, stage I (between positive constants); value: {_DERIVED}",
        "At its end aᵀa*/|a*|² is that of the best outputs at the angle reached (|a*| = 1, where "
        "the filter is slow).",
        1.0,
        Tolerance.within(atol=0.05),
        "after 10k² steps exp(−3.4) = 0.03 of the slowest component is left",
        "Smallest and largest ratio over all followed starts. With |a*|² = 64k the filter's steps, "
        "1/k⁴, move it at k = 16 as fast as a: noted only.",
    ),
    Claim(
        "stage.angle-rate",
        f"{_PAPER}, main theorem, stage II (linear convergence); rate: {_DERIVED}",
        "Afterwards the angle falls by the factor 1 − η|a*|²/2 in each step: the Hessian's "
        "eigenvalue along the filter.",
        0.5,
        Tolerance.within(rtol=0.01),
        "the logarithm of the factor and the eigenvalue differ by η/4 or less, 0.1 %",
        "Decay rate over η between 30k² and 40k² steps after the warm-up, |a*| = 1: mean over "
        "starts and its 95 % interval.",
    ),
    Claim(
        "stage.outputs-rate",
        f"{_PAPER}, main theorem, stage II (linear convergence); rate: {_DERIVED}",
        "The outputs converge at the rate (π−1)/2π, the Hessian's smallest positive eigenvalue.",
        (math.pi - 1) / (2 * math.pi),
        Tolerance.within(rtol=0.01),
        "as stage.angle-rate",
        "As stage.angle-rate, of |a − a*|.",
    ),
]

_others = [
    Claim(
        "plain.unit",
        _SEEN,
        "Without the normalisation, too, the shortcut leads to the global optimum if |a*| = 1.",
        1.0,
        Tolerance.at_least(atol=0.02),
        "200 starts without a failure leave 0.018 open",
        "Plain gradient descent, k = 16, step 1/k², no warm-up: loss below half of the spurious "
        "point's.",
    ),
    Claim(
        "plain.better",
        _SEEN,
        "Without the normalisation the shortcut still ends there more often than no shortcut.",
        0.0,
        Tolerance.more_than(),
        "an order, not a size",
        f"|a*|² = 1, k² and 64k: {_DIFFERENCE}.",
    ),
    Claim(
        "plain.large",
        f"{_PAPER} (warm-up and normalisation are needed in its theorem)",
        "But with |a*|² = 64k not every start does: the shortcut alone is not enough.",
        1.0,
        Tolerance.less_than(),
        "an order, not a size",
        "As plain.unit.",
    ),
    Claim(
        "samples.shortcut",
        _SEEN,
        "On a fixed set of samples shortcut and warm-up lead to the global optimum, too.",
        1.0,
        Tolerance.at_least(atol=0.2),
        "20 trainings without a failure leave 0.17 open",
        "Trainings by automatic differentiation, k = 16, p = 8, |a*| = 2: share with a loss "
        "below half of the spurious point's.",
    ),
    Claim(
        "samples.cnn",
        _SEEN,
        "Without a shortcut not all trainings on samples do.",
        1.0,
        Tolerance.less_than(),
        "an order, not a size",
        "As samples.shortcut.",
    ),
]

CLAIMS: list[Claim] = [*_check, *_critical, *_rates, *_starts, *_angles, *_others]
BY_ID = {claim.id: claim for claim in CLAIMS}
