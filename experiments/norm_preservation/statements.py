"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

import math

from experiments.claims import Claim, Tolerance

# Growth of the squared gradient through BatchNorm, ReLU and a He matrix: Yang, Pennington, Rao,
# Sohl-Dickstein, Schoenholz, A Mean Field Theory of Batch Normalization, arXiv:1902.08129.
ALPHA = math.pi / (math.pi - 1)
# Of log(L)/L in the mean of |1 - r| over blocks of two layers, and exponent of the product.
CONSTANT = ALPHA**2 / 2
_PAPER = "Zaeemzadeh, Rahnavard, Shah, arXiv:1805.07477"
_T1 = f"{_PAPER}, theorem 1 (formula as quoted in public): δ = c·log(2L)/L"
_PAGE = f"{_PAPER}, the authors' project page"
_DERIVED = "derived for this project"
_MEAN_FIELD = f"{_DERIVED} (conditioning.theory.initial_ratios)"
# That a net with a small δ exists says nothing about the one that is drawn.
_NOT_THEOREM = (
    f"not the theorem of {_PAPER}, which says that such a net exists and nothing about "
    f"initialisation; mean field, {_DERIVED}, form log(2L)/L"
)
_HOPED = f"{_T1}: such a net exists, whether training finds it is not said there"
_END_TO_END = (
    f"form {_PAPER}, theorem 1, end to end: (1 + δ)^L <= (2L)^c; the constant {_DERIVED}, the "
    "paper's c is not in its public text"
)
# What can fail only through a mistake in the instrument begins with this.
CHECK = "Instrument check: "
_BOTH_LEARN = "Not decided if a net did not train: a loss of half that of guessing, or more."
_BEGUN = (
    "Not decided if a net stayed at chance: 0.9 of the loss of guessing or more, as in "
    "train.plain; how far the nets came is in the note."
)
_RATE = "log(2L)/L"
_EXPONENT = (
    "in powers of log(2L)/L, from L = 4 to 64 a decay as 1/√L is 0.72, as 1/L is 1.44, none is 0"
)
_FIT = "Least squares of log mean |1 − r| on log(log(2L)/L) for L >= 4, each seed: mean, 95 %."
_SAID = "a property that a block has or lacks; the bounds are those of certified enclosures"

_lemma = [
    Claim(
        "t0.ratio",
        _DERIVED + ": ‖Jᵀg‖/‖g‖",
        CHECK
        + "the measured ratio of every block lies between the least and the largest singular value "
        "of its Jacobian.",
        1.0,
        Tolerance.within(),
        _SAID,
        "GradientNorms beside block_jacobians at the same batch in training mode: MLPs, ResNet-20 "
        "and ProcResNet-13 on 8×8 images, at initialisation and after 30 steps.",
    ),
    Claim(
        "t0.skip",
        f"{_DERIVED}: I + DF (the lemma behind theorem 1)",
        CHECK + "with an identity skip all singular values lie within 1 ± δ, δ = ‖DF‖.",
        1.0,
        Tolerance.within(),
        _SAID,
        "Enclosures of σ_max and σ_min against the enclosure of ‖J − I‖, the same nets.",
    ),
    Claim(
        "t0.bound",
        f"{_DERIVED}: I + DF (the lemma behind theorem 1)",
        CHECK + "with an identity skip the measured ratio lies within 1 ± δ.",
        1.0,
        Tolerance.within(),
        _SAID,
        "The same nets.",
    ),
    Claim(
        "t1.remainder",
        f"{_DERIVED}: exponential series",
        CHECK
        + "a linear map as L equal blocks: L·δ differs from ‖log T‖ by no more than the remainder "
        "L(exp(b/L) − 1 − b/L), b = ‖log T‖.",
        1.0,
        Tolerance.at_most(rtol=1e-6),
        "an inequality; float64 rounding of the roots is near 1e-14",
        "|Lδ − b| over the remainder; δ = ‖T^{1/L} − I‖₂, T = exp(B) in 32 dimensions, ‖B‖₂ = 2.",
    ),
    Claim(
        "t1.rate",
        f"{_DERIVED}: T^(1/L) = exp(log T / L)",
        "So δ falls as 1/L: for linear maps there is no logarithm.",
        -1.0,
        Tolerance.within(atol=0.02),
        "log(2L)/L would be −0.79 over the same depths",
        "Least-squares exponent of δ in L for L >= 16: each seed, mean, 95 %.",
    ),
    Claim(
        "t1.ratio",
        f"{_DERIVED}: I + DF (the lemma behind theorem 1, as t0.bound)",
        CHECK + "every ratio of such a net lies within 1 ± δ.",
        1.0,
        Tolerance.at_most(rtol=1e-9),
        "an inequality, up to rounding",
        "Largest |1 − r| over δ, all blocks, every depth and seed.",
    ),
    Claim(
        "t1.product",
        f"{_DERIVED}: the chain rule",
        CHECK + "the product of its ratios is ‖Tᵀg‖/‖g‖ at every depth.",
        1.0,
        Tolerance.within(rtol=1e-9),
        "float64 rounding of 256 products",
        "Product of the tracked ratios over ‖Tᵀg‖/‖g‖.",
    ),
]

_initial = [
    Claim(
        "init.law",
        _MEAN_FIELD,
        "With skip and BN at initialisation mean |1 − r| is that of r_l² = 1 + α/(v + (l − 1)/α), "
        "α = π/(π − 1), v the variance of the input of block 1.",
        "mean of r_l − 1",
        Tolerance.within(rtol=0.05),
        "width 128 and batches of 256 leave corrections of some per cent; no constant is fitted",
        "Every depth: mean over seeds, 95 %, of mean |1 − r| over the predicted one.",
    ),
    Claim(
        "init.rate",
        _NOT_THEOREM,
        f"With skip and BN at initialisation mean |1 − r| falls as {_RATE}, up to a slow drift of "
        "the factor, see the note.",
        1.0,
        Tolerance.within(atol=0.15),
        _EXPONENT,
        _FIT,
    ),
    Claim(
        "init.constant",
        _MEAN_FIELD,
        "Its constant: Σ|1 − r| grows by c = α²/2 = 1.08 whenever L grows by a factor e.",
        CONSTANT,
        Tolerance.within(rtol=0.15),
        "at width 32 the law above is exceeded by up to a tenth; second-order terms lower c",
        "Slope of Σ|1 − r| in log L for L >= 4: each seed, mean, 95 %.",
    ),
    Claim(
        "init.max",
        f"{_T1}, read as it stands: for every block",
        f"The largest |1 − r| over blocks follows {_RATE} too. Existence of such a net does not "
        "mean that this is one: expected to fail.",
        1.0,
        Tolerance.within(atol=0.15),
        _EXPONENT,
        "As init.rate, with the largest |1 − r| of each batch.",
    ),
    Claim(
        "init.product",
        _MEAN_FIELD,
        "The product of all ratios is polynomial in L, with exponent α²/2.",
        CONSTANT,
        Tolerance.within(rtol=0.15),
        "as init.constant; without skip the exponent itself grows with L, to 13 at L = 32",
        "Slope of log(product) in log L for L >= 4: each seed, mean, 95 %.",
    ),
    Claim(
        "init.product-bound",
        _END_TO_END,
        "The product of all ratios stays below (2L)^c with c = α²/2.",
        1.0,
        Tolerance.at_most(rtol=0.1),
        "exponents; at width 32 the law is exceeded by up to a tenth",
        "log(product)/(c log 2L) at every depth: mean over seeds, 95 %.",
    ),
    Claim(
        "skip.flat",
        f"{_DERIVED}: each He branch doubles the variance, whatever the depth",
        "With the skip alone, without BN or scaling, mean |1 − r| does not fall with depth.",
        0.0,
        Tolerance.within(atol=0.15),
        _EXPONENT,
        "As init.rate, at width 128: there nets of one depth differ less.",
    ),
    Claim(
        "scaled.rate",
        f"{_DERIVED}: |DF| shrinks with the factor",
        f"Without BN, branches times 1/√L: mean |1 − r| falls at least as fast as {_RATE}.",
        1.0,
        Tolerance.at_least(atol=0.15),
        _EXPONENT,
        "As init.rate.",
    ),
    Claim(
        "scaled.max",
        f"{_DERIVED}: |DF| shrinks with the factor",
        "There the largest |1 − r| falls as well, as fast as the factor 1/√L or faster.",
        0.72,
        Tolerance.at_least(atol=0.15),
        "a largest of L random values grows slowly with L; no decay would be 0",
        "As init.max.",
    ),
    Claim(
        "plain.flat",
        _MEAN_FIELD + ": r = α in deep plain nets",
        "Without skip, with BN, mean |1 − r| stays above α − 1 = 0.47 at every depth.",
        ALPHA - 1,
        Tolerance.at_least(rtol=0.1),
        "corrections of some per cent at finite width",
        "Each depth: mean over seeds, 95 %.",
    ),
    Claim(
        "plain.product",
        _MEAN_FIELD + ": r = α in deep plain nets",
        "Their product of ratios grows exponentially, by the factor α with each block.",
        ALPHA,
        Tolerance.within(rtol=0.05),
        "corrections of some per cent at width 128",
        "exp of the slope of log(product) in L between the two deepest wide nets: each seed, "
        "mean, 95 %.",
    ),
]

_trained = [
    Claim(
        "train.rate",
        _HOPED,
        f"In training with skip and BN mean |1 − r| follows {_RATE}, neither slower nor faster.",
        1.0,
        Tolerance.within(atol=0.15),
        _EXPONENT,
        f"As init.rate, averaged over the sampled steps of a training. {_BOTH_LEARN}",
    ),
    Claim(
        "train.at-least",
        _HOPED,
        f"It falls at least as fast as {_RATE}, which is what a bound asks for.",
        1.0,
        Tolerance.at_least(atol=0.15),
        _EXPONENT,
        "As train.rate.",
    ),
    Claim(
        "train.constant",
        _PAGE + ": blocks become norm-preserving in training",
        "Training lowers the constant: mean |1 − r|·L/log(2L) is below that at initialisation.",
        1.0,
        Tolerance.at_most(),
        "an order, not a size",
        f"Ratio of the two, averaged over L >= 4: geometric mean over seeds, 95 %. {_BOTH_LEARN}",
    ),
    Claim(
        "train.max",
        f"{_T1}, read as it stands: for every block",
        f"In training the largest |1 − r| over blocks follows {_RATE} too: expected to fail.",
        1.0,
        Tolerance.within(atol=0.15),
        _EXPONENT,
        "As train.rate, with the largest |1 − r| of each step.",
    ),
    Claim(
        "train.product",
        _END_TO_END,
        "In training the product of all ratios stays below (2L)^c with c = α²/2.",
        1.0,
        Tolerance.at_most(rtol=0.1),
        "as init.product-bound",
        f"As init.product-bound. {_BOTH_LEARN}",
    ),
    Claim(
        "train.scaled",
        f"{_DERIVED}: |DF| shrinks with the factor",
        f"Without BN, branches times 1/√L, it falls at least as fast as {_RATE} in training too.",
        1.0,
        Tolerance.at_least(atol=0.15),
        _EXPONENT,
        "As train.rate.",
    ),
    Claim(
        "train.skip",
        f"{_PAPER}, abstract: skips let deep nets be trained",
        "Nets with skip, with BN or scaled, train at every depth with one recipe.",
        0.0,
        Tolerance.at_most(atol=0.5),
        "a loss in units of that of guessing; 0.5 is far from both 0 and 1",
        "Mean loss of the last tenth of the steps over log(classes), every seed.",
    ),
    Claim(
        "train.plain",
        f"{_PAPER}, abstract: skips let deep nets be trained",
        "With the same recipe the deepest net without skip does not train.",
        1.0,
        Tolerance.at_least(atol=0.1),
        "a loss in units of that of guessing",
        "The same, at the largest depth; a diverged training counts as infinite.",
    ),
]

_convolutional = [
    Claim(
        "conv.rate",
        _NOT_THEOREM,
        "ProcResNet at initialisation: mean |1 − r| over identity blocks is (c·log L + b)/L, b for "
        "the first blocks.",
        1.0,
        Tolerance.within(atol=0.4),
        "a mean that falls as 1/√L would give √3 = 1.73, a constant one 3",
        "Growth of Σ|1 − r| from n = 6 to 18 over that from 2 to 6: each seed, mean, 95 %.",
    ),
    Claim(
        "conv.constant",
        _MEAN_FIELD + ", three layers in a branch",
        "There c = α³/2 = 1.58.",
        ALPHA**3 / 2,
        Tolerance.within(rtol=0.25),
        "zero padding loses up to 16 % of the gradient's energy in a branch on 8×8 maps, and "
        "second-order terms lower c",
        "Growth of Σ|1 − r| from n = 6 to 18 over log 3: each seed, mean, 95 %.",
    ),
    Claim(
        "conv.polynomial",
        f"{_MEAN_FIELD}, form (2L)^c of {_PAPER}, theorem 1, end to end",
        "The product of all ratios at initialisation is polynomial in depth.",
        1.0,
        Tolerance.at_most(atol=0.5),
        "local exponents are equal for a power, and in the ratio 3 for an exponential",
        "Slope of log(product) in log n from n = 6 to 18 over that from 2 to 6, ResNet and "
        "ProcResNet: mean over seeds, 95 %.",
    ),
    Claim(
        "conv.proc-closer",
        _PAGE + ": ProcResNet repairs the transitions",
        "At initialisation ProcResNet as a whole changes the norm less than ResNet, from 166 and "
        "164 layers (n = 18) on; of smaller nets nothing is claimed, see the note.",
        1.0,
        Tolerance.at_most(),
        "an order, not a size",
        "Quotient of the logarithms of the two products over all blocks, same seed, n >= 18: mean, "
        "95 %.",
    ),
    Claim(
        "conv.outliers",
        _PAGE + ": the transition blocks are the outliers",
        "ResNet-164 at initialisation: all three transitions, the first block (16 to 64 channels) "
        "among them, deviate from 1 more than identity blocks do.",
        2.0,
        Tolerance.at_least(),
        "an outlier is not just above the average: twice it at least",
        "Mean |1 − r| over the transitions over that over identity blocks, n >= 18: geometric "
        "mean over seeds, 95 %.",
    ),
    Claim(
        "conv.downsamplings",
        _PAGE + ": the transition blocks are the outliers; read without the first block",
        "ResNet-164 at initialisation: the two downsamplings alone deviate from 1 more than "
        "identity blocks do on average.",
        2.0,
        Tolerance.at_least(),
        "as conv.outliers",
        "As conv.outliers, mean |1 − r| over stage2.0 and stage3.0.",
    ),
    Claim(
        "conv.downsamplings-farthest",
        _PAGE + ": the transition blocks are the outliers; read without the first block",
        "ResNet-164 at initialisation: the two downsamplings deviate more than every identity "
        "block.",
        1.0,
        Tolerance.at_least(),
        "an order, not a size",
        "Mean |1 − r| over stage2.0 and stage3.0 over the largest of an identity block, n >= 18: "
        "geometric mean over seeds, 95 %.",
    ),
    Claim(
        "conv.first",
        _PAGE + ": ProcResNet repairs the transitions, of which ResNet's first block is one",
        "At initialisation ProcResNet's first block (an identity block) is nearer to 1 than "
        "ResNet's (a projection), from 166 and 164 layers on: expected to fail, nothing is "
        "repaired there.",
        1.0,
        Tolerance.at_most(),
        "an order, not a size",
        "Quotient of |1 − r| of stage1.0, same n >= 18 and seed: geometric mean, 95 %.",
    ),
    Claim(
        "conv.proc-transitions",
        f"{_PAPER}: transitions with σ = √(c_out/c_in); {_DERIVED}: E‖Wᵀg‖² = ‖g‖²",
        "ProcResNet's transitions have ratio 1 at initialisation, before any regularisation.",
        1.0,
        Tolerance.within(atol=0.05),
        "a random gradient of 64 or more channels",
        "Each transition at each n: mean over seeds, 95 %.",
    ),
    Claim(
        "conv.isometric",
        f"{_DERIVED}: windows that do not overlap, orthonormal rows",
        CHECK + "transitions of 2×2 kernels with a flat spectrum preserve every gradient exactly.",
        1.0,
        Tolerance.within(atol=1e-4),
        "float32 rounding of norms",
        "Each transition, net and seed at initialisation.",
    ),
    Claim(
        "conv.animation",
        f"{_PAPER}, the authors' animation, its first frame read as initialisation",
        "Identity blocks of ResNet-164 and ProcResNet-166 lie within 0.025 of ratio 1 on average: "
        "expected to fail at initialisation.",
        0.025,
        Tolerance.at_most(),
        "no block of the animation is off by more; a mean, so that no single block decides",
        "Mean |1 − r| over identity blocks: mean over seeds, 95 %.",
    ),
    Claim(
        "conv.train-outliers",
        _PAGE + ": the transition blocks are the outliers",
        "Along the training of a ResNet all three transitions, the first block among them, deviate "
        "from 1 more than identity blocks do.",
        2.0,
        Tolerance.at_least(),
        "as conv.outliers",
        f"As conv.outliers, |1 − r| averaged over all sampled steps. {_BEGUN}",
    ),
    Claim(
        "conv.train-downsamplings",
        _PAGE + ": the transition blocks are the outliers; read without the first block",
        "Along the training of a ResNet the two downsamplings alone deviate from 1 more than "
        "identity blocks do on average.",
        2.0,
        Tolerance.at_least(),
        "as conv.outliers",
        f"As conv.train-outliers, over stage2.0 and stage3.0. {_BEGUN}",
    ),
    Claim(
        "conv.train-repair",
        _PAGE + ": ProcResNet repairs the transitions",
        "In training ProcResNet's downsamplings are nearer to 1 than ResNet's, even unregularised; "
        "like for like, without the first blocks.",
        0.5,
        Tolerance.at_most(),
        "repaired means at least halved",
        "Ratio of mean |1 − r| over down1 and down2 to that over stage2.0 and stage3.0, all "
        f"sampled steps, same n and seed: geometric mean, 95 %. {_BEGUN}",
    ),
    Claim(
        "conv.train-identity",
        _PAGE + ": blocks become norm-preserving in training",
        "Training brings identity blocks nearer to 1, in both nets.",
        1.0,
        Tolerance.at_most(),
        "an order, not a size",
        "Mean |1 − r| in the last window of steps over that at step 0: geometric mean over seeds, "
        f"95 %. {_BEGUN}",
    ),
]

CLAIMS = (*_lemma, *_initial, *_trained, *_convolutional)
