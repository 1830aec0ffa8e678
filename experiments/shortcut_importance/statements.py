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
# Proven for this project: a mistake in the proof or in the program could make it fail, and this is
# the independent way to the same number.
PROVEN = "Proven, checked: "
_ROUNDING = "float64 rounding; a wrong formula would be off by a part of its value"
_MOST = (
    "a rate of 1 cannot be shown: 10,000 starts without a failure leave one of failure of up to "
    "0.0004 open (Clopper and Pearson, 95 %), and up to three failures less than 0.001"
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
    "combined by the square root of squares; starts that are not decided count for each end in the "
    "way that is worst)"
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
        f"{PROVEN}(v*, a*) and (−v*, (11ᵀ + (π−1)I)⁻¹(11ᵀ − I)a*) are critical points of the net.",
        0.0,
        Tolerance.within(atol=1e-12),
        _ROUNDING,
        "Norm of the gradient by automatic differentiation over |a*| = 1, every k and ratio.",
    ),
    Claim(
        "critical.optimum",
        _DERIVED,
        f"{PROVEN}at the optimum the Hessian has the eigenvalues (π−1)/2π, (k+π−1)/2π, |a*|²/2 and "
        "one 0, of the scale of the filter.",
        0.0,
        Tolerance.within(atol=1e-12),
        _ROUNDING,
        "Largest distance of the full spectrum of HessianOperator to the predicted one, over the "
        "largest eigenvalue.",
    ),
    Claim(
        "critical.spurious",
        _DERIVED,
        f"{PROVEN}at the spurious point it has (π−1)/2π, (k+π−1)/2π and p zeros, whether that is a "
        "minimum or a saddle: the second order does not tell.",
        0.0,
        Tolerance.within(atol=1e-12),
        _ROUNDING,
        "As critical.optimum; below and above the threshold.",
    ),
    Claim(
        "critical.third-order",
        _DERIVED,
        f"{PROVEN}turning the filter by ε from the spurious point changes the loss by "
        "−(a_spᵀa*) ε³/6π.",
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
        "Where it is larger there is a way down: the spurious point is no minimum, but a saddle.",
        1.0,
        Tolerance.within(),
        "a single teacher without a way down would refute it",
        "The loss falls as the filter turns by one of three small angles, with the best outputs "
        "there. That it rises along the outputs is part of critical.spurious.",
    ),
    Claim(
        "critical.sign",
        _DERIVED,
        f"{PROVEN}the smallest Hessian eigenvalue beside the spurious point changes its sign at "
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
        f"{PROVEN}beside a minimum it is −(a_spᵀa*) ε/2π, beside a saddle −(a_spᵀa*) ε/π.",
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
        "With a shortcut and a warm-up of 10k² steps every random start that was drawn ends at the "
        "global optimum.",
        1.0,
        Tolerance.within(),
        "the theorem has no exceptions: a single start that ends elsewhere refutes it",
        f"{_START}; |a*|² = 1 and 64k with 1ᵀa* = |a*|/4, and 64k with r = 0.2, every k: whether "
        "all starts enter the set from which there is but the way to the global optimum.",
    ),
    Claim(
        "rates.warm-up-1000",
        f"{_PAPER}, experiments (protocol recalled)",
        "1000 steps of warm-up are enough for at least 0.999 of the random starts of these "
        "teachers.",
        0.999,
        Tolerance.at_least(),
        _MOST,
        f"As rates.warm-up, other draws: {_RATE}. The note says when the last start is decided: "
        "within 1000 steps a longer warm-up is the same experiment.",
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
        "With |a*| = 1 at least 0.999 of the random starts need no warm-up.",
        0.999,
        Tolerance.at_least(),
        _MOST,
        f"{_START}: {_RATE}.",
    ),
    Claim(
        "rates.cnn",
        f"{_PAPER}, experiments; {_DU} (a constant probability)",
        "Without a shortcut about one half of the starts (0.45 ... 0.55) end at the global "
        "optimum, at every k (1ᵀa* = |a*|/4).",
        0.5,
        Tolerance.within(atol=0.05),
        "one half to the first digit: a constant of about that size, not one half itself",
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
        "A warm-up of 10k² steps is enough for at least 0.999 of the random starts of three "
        "teachers beyond the prior: |a*|² = 64k at 0.45π, 16k at 0.48π, k^1.5 at 0.48π.",
        0.999,
        Tolerance.at_least(),
        _MOST,
        f"As rates.warm-up, 1ᵀa* = |a*|/4: {_RATE}. Other teachers are lost there: angle.large.",
    ),
    Claim(
        "rates.stress-1000",
        f"{_PAPER}, experiments (protocol recalled), beyond its prior",
        "1000 steps of warm-up are enough for at least 0.999 of these, too.",
        0.999,
        Tolerance.at_least(),
        _MOST,
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
        "So does every point of a grid over the ball's two dimensions that matter, and over its "
        "rim.",
        1.0,
        Tolerance.within(),
        "the theorem has no exceptions",
        "The same teachers. A grid is no draw from the ball: shares of it are not shares of the "
        "ball.",
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
        "a tenth in the exponent tells k² from k² log k, whose fitted exponent over k = 16 ... 100 "
        "is 2.27",
        "Exponent over k of the steps until all is decided; |a*|² = k, three shares r. The steps "
        "are not random: the interval, that of the regression at 95 %, says how far they are from "
        "a power law.",
    ),
]

_BELOW = (
    "Warm-up of 10k² steps, r = 1/256, 0.05 and 0.2, the smaller k, first angles 0.2π ... 0.4995π"
)
_angles = [
    Claim(
        "angle.edge",
        _DERIVED,
        "With |a*|² = k the largest first angle at which all starts that were tried succeed is "
        "that at which the relaxed aᵀa* changes its sign.",
        0.0,
        Tolerance.within(atol=0.01),
        "a hundredth of π; near the edge the filter moves while a relaxes",
        "Between the last angle at which all starts, random ones and the adversarial one, succeed "
        "and the first at which some do not, minus the predicted one, over π; three shares r. "
        "Beyond the edge not all starts fail at once: the note says how far some succeed.",
    ),
    Claim(
        "angle.prior",
        f"{_PAPER}, main theorem (π/3); up to π/2: {_DERIVED}",
        "With |a*|² = k all random starts succeed at every first angle below π/2 that was tried, "
        "beyond the prior π/3.",
        1.0,
        Tolerance.within(),
        "a start that fails would refute it",
        f"{_BELOW}: cells in which all random starts succeed.",
    ),
    Claim(
        "angle.adversarial",
        f"{_PAPER}, main theorem (π/3); up to π/2: {_DERIVED}",
        "So does the adversarial start, −(|1ᵀa*|/√k) a*/|a*|.",
        1.0,
        Tolerance.within(),
        "as angle.prior",
        f"{_BELOW}.",
    ),
    Claim(
        "angle.large",
        f"{_PAPER}, main theorem (π/3); up to π/2: {_DERIVED}, for a filter that rests",
        "With |a*|² = 64k, too, all random starts succeed at every first angle below π/2 that was "
        "tried.",
        1.0,
        Tolerance.within(),
        "a start that fails refutes it",
        f"{_BELOW}. In a warm-up the filter's rate 1/k⁴ times |a*|² is 64/k³ here, against 1/k² of "
        "a: at k = 16 the filter does not rest while a relaxes.",
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
        f"{PROVEN}afterwards, with |a*| = 1, the angle falls by the factor 1 − η|a*|²/2 in each "
        "step: the Hessian's eigenvalue along the filter.",
        0.5,
        Tolerance.within(rtol=0.01),
        "the logarithm of the factor and the eigenvalue differ by η/4 or less, 0.1 %",
        "Decay rate over η between 30k² and 40k² steps after the warm-up, |a*| = 1, k = 16 and 25 "
        "(the paper preset also has 36 and 64): mean over starts and its 95 % interval.",
    ),
    Claim(
        "stage.outputs-rate",
        f"{_PAPER}, main theorem, stage II (linear convergence); rate: {_DERIVED}",
        f"{PROVEN}the outputs then converge at the rate (π−1)/2π, the Hessian's smallest positive "
        "eigenvalue.",
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
        "Without the normalisation, too, the shortcut leads at least 0.98 of the starts to the "
        "global optimum if |a*| = 1.",
        0.98,
        Tolerance.at_least(),
        "200 starts without a failure show 0.982, more starts show no less",
        "Plain gradient descent, k = 16, step 1/k², no warm-up: loss below half of the spurious "
        "point's, a threshold from which descent cannot come back.",
    ),
    Claim(
        "plain.better",
        _SEEN,
        "Without the normalisation the shortcut still ends there more often than no shortcut.",
        0.0,
        Tolerance.more_than(),
        "an order, not a size",
        f"|a*|² = 1, k² and 64k: {_DIFFERENCE}. The note counts runs that are not decided.",
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
        "On a fixed set of samples shortcut and warm-up lead at least 0.8 of the trainings to the "
        "global optimum, too.",
        0.8,
        Tolerance.at_least(),
        "20 trainings without a failure show 0.83, more show no less",
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
        "As samples.shortcut, with as many steps.",
    ),
]

CLAIMS: list[Claim] = [*_check, *_critical, *_rates, *_starts, *_angles, *_others]
BY_ID = {claim.id: claim for claim in CLAIMS}
