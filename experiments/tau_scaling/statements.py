"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

from experiments.claims import Claim, Tolerance

_PAPER = "Zhang, Yu, Yi, Chen, Liu, arXiv:1903.07120"
_FORWARD = f"{_PAPER}, stability of forward and backward pass at tau = O(1/√L)"
_CONVERSE = f"{_PAPER}, converse: tau > L^(-1/2 + c)"
_DESCENT = f"{_PAPER}, convergence of gradient descent"
_SMALL = f"{_PAPER}, theory check on images"
_CIFAR = f"{_PAPER}, CIFAR-10"
_CODE = f"{_PAPER}, the authors' public code"
_DERIVED = "derived for this project (conditioning.theory)"
# What can fail only through a mistake in the program begins with this.
CHECK = "Instrument check: "

_FLAT = (
    "a slope of 0.05 is a factor of 1.3 from L = 100 to 10000, where the next larger tau that is "
    "tried, L^-0.4, makes one of 7"
)
_SLOPES = "least-squares slope over log L, L >= 100, one for each seed: mean and 95 % interval"
_ROUNDING = "float64 rounding through 30 blocks"
_LOGS = (
    "2 % for the finite width, whose effect is of the order of L tau²/m in the logarithm, and "
    "0.1 for the spread over nets, whose standard deviation is 0.05 to 0.1 at m = 256 where the "
    "logarithm is of order one; the two bounds are 0.25 apart there. At 1/√L and L^-0.4 it does "
    "not tell the law from the upper bound, which is 0.01 to 0.1 above it"
)
_LEARN = "below half of the loss of guessing, mean over the last tenth of the steps"
_RANKED = (
    "One group of nets against the other (Hodges and Lehmann, with the exact Mann-Whitney "
    "enclosure): a net that hardly trains counts no more than its rank. Half an image is added to "
    "every error, so that none is zero. It is the order after the epochs of the preset, see the "
    "note: few epochs show who trains faster."
)

_OVER_SHARP = (
    "Ratio of the losses over the last tenth of the steps to those from 1/√L; infinite for a "
    "training that diverged (Hodges and Lehmann, with the exact Mann-Whitney enclosure)."
)

_checks = [
    Claim(
        "check.product",
        "conditioning.JacobianOperator, dense",
        CHECK + "the enclosure of the product's spectral norm contains that of the Jacobian which "
        "autograd takes of the module.",
        0.0,
        Tolerance.at_most(atol=1e-9),
        _ROUNDING,
        "How far the dense value lies outside the enclosure by Lanczos, relatively; one net at "
        "each factor, 30 blocks, width 64.",
    ),
    Claim(
        "check.norms",
        "torch.autograd",
        CHECK + "logarithms of forward and backward norms are those of the module and of autograd.",
        0.0,
        Tolerance.at_most(atol=1e-9),
        _ROUNDING,
        "Largest difference, the same nets.",
    ),
    Claim(
        "check.descent",
        "torch.autograd",
        CHECK + "gradients written out for many nets at once are those of autograd.",
        0.0,
        Tolerance.at_most(atol=1e-10),
        "float64 rounding",
        "Largest relative error of losses and steps, one net of 8 blocks at each factor.",
    ),
    Claim(
        "check.law",
        "derived for this project (experiments.tau_scaling.chain)",
        CHECK + "norms have the same mean and spread in nets with matrices and when only the "
        "vectors are drawn that the matrices make.",
        1.0,
        Tolerance.within(rtol=0.25),
        "a quarter: leaving out either term of the conditional law, or both, changes the gradient "
        "by a factor of 1.6 or more",
        "Geometric mean, and standard deviation of the logarithm, of the forward norm, the "
        "gradient's norm and the ratio of the largest to the smallest gradient of a block; 1500 "
        "nets against 1500 at tau = 1, 30 blocks, width 24, where it matters most; 95 %.",
    ),
]

_norms = [
    Claim(
        "forward.stable",
        _FORWARD,
        "The norm of the last state over that of the first does not depend on the depth at "
        "1/√L and below.",
        0.0,
        Tolerance.within(atol=0.05),
        _FLAT,
        f"Logarithm at 1/L, 0.5/√L, 1/√L: {_SLOPES}.",
    ),
    Claim(
        "forward.path",
        _FORWARD,
        "Nor does the largest norm of any state on the way grow with it.",
        0.0,
        Tolerance.at_most(atol=0.05),
        _FLAT,
        f"Logarithm of max |h_l|/|h_0| over l: {_SLOPES}.",
    ),
    Claim(
        "forward.limit",
        _DERIVED,
        "At kappa/√L the norm grows by exp(kappa²/2) in the limit of large depth: reflected "
        "Brownian motion.",
        "exp(kappa²/2)",
        Tolerance.within(rtol=0.05),
        "the law at large width lies 0.5 % below the limit at L = 10000; 5 % tells it from the "
        "lower bound, 6 % to 22 % below, and from no growth",
        "Geometric mean over seeds at the largest L, kappa = 1/2 and 1.",
    ),
    Claim(
        "forward.mean-field",
        _DERIVED,
        "At every depth and factor the norm grows as in the limit of large width, where the law "
        "of one coordinate says by how much.",
        "mean_field_log_growth",
        Tolerance.within(rtol=0.02, atol=0.1),
        _LOGS,
        "Mean logarithm over seeds at 1/√L and L^-0.4 up to L = 1000, at L^-1/4 and 1 up to the "
        "largest L.",
    ),
    Claim(
        "forward.bounds",
        _DERIVED,
        CHECK + "the growth lies inside the two bounds on its expectation, which are proved.",
        0.5,
        Tolerance.within(atol=0.5),
        "0 is the lower bound, 1 the upper one",
        "Place of the mean logarithm between the bounds on that of the expectation, at L^-1/4 and "
        "1, at every L. Factors below come too close to the upper bound to be told from it.",
    ),
    Claim(
        "converse.growth",
        _CONVERSE,
        "Above the sharp factor, at L^(-1/2 + c), the forward pass grows at least like L^c.",
        1.0,
        Tolerance.at_least(),
        "the claim is a bound",
        "Mean logarithm of the norm over c log L, for c = 0.1, 1/4, 1/2 and every L. The mean "
        "logarithm lies below the logarithm of the mean, so this is the harder test. The lower "
        "bound of this project implies it; the paper has it with high probability.",
    ),
    Claim(
        "converse.squared",
        f"{_CONVERSE}; derived for this project",
        CHECK + "it grows at least by 1 + L^(2c)/2 in the square, which is proved.",
        1.0,
        Tolerance.at_least(),
        "the claim is a bound",
        "Twice the mean logarithm over log(1 + L^(2c)/2), the same nets.",
    ),
    Claim(
        "converse.stretched",
        _DERIVED,
        "At L^-1/4 the growth is exp(const √L), not a power of L.",
        0.5,
        Tolerance.within(atol=0.08),
        "the exponent of a power of L would be 0; at finite depth the law at large width has a "
        "slope of 0.53",
        f"Logarithm of the logarithm of the norm: {_SLOPES}.",
    ),
    Claim(
        "converse.rate",
        _DERIVED,
        "Without a factor, at tau = 1, every block adds the same number of nats.",
        "mean_field_log_growth / L",
        Tolerance.within(atol=0.01),
        "finite width takes about 1/(2m) off; doubling the variance of weights would add 0.16",
        "Mean of log(|h_L|/|h_0|)/L over seeds at every L >= 1000.",
    ),
    Claim(
        "backward.stable",
        _FORWARD,
        "The norm of the gradient at the first block over that at the last does not depend on the "
        "depth at 1/√L and below.",
        0.0,
        Tolerance.within(atol=0.05),
        _FLAT,
        f"Logarithm for a Gaussian gradient at the last block, at 1/L, 0.5/√L, 1/√L: {_SLOPES}.",
    ),
    Claim(
        "backward.spread",
        f"{_PAPER}, upper bounds on the gradients of all blocks; our reading",
        "The ratio of the largest to the smallest gradient of a block's weights does not grow with "
        "the depth.",
        0.0,
        Tolerance.at_most(atol=0.05),
        _FLAT,
        f"Logarithm of max/min over l of |dF/dW_l|, at 1/L, 0.5/√L, 1/√L: {_SLOPES}.",
    ),
    Claim(
        "backward.explodes",
        f"{_PAPER}, in words; derived for this project",
        "At tau = 1 the gradient grows by as many nats a block as the state.",
        1.0,
        Tolerance.within(rtol=0.05),
        "the two differ by a few nats in all, for coordinates whose ReLU is closed",
        "log |g_0|/|g_L| over log |h_L|/|h_0|, mean over seeds, at every L >= 1000.",
    ),
]

_product = [
    Claim(
        "product.stable",
        _FORWARD,
        "The spectral norm of the product of all blocks does not grow with the depth at 1/√L and "
        "below.",
        0.0,
        Tolerance.at_most(atol=0.05),
        "as forward.stable, over L = 100 ... 1000",
        "Logarithm of the value enclosed to 1 % by Lanczos, matrix-free, at 1/L, 0.5/√L, 1/√L: "
        f"{_SLOPES}.",
    ),
    Claim(
        "product.explodes",
        f"{_CONVERSE}; derived for this project",
        "At L^(-1/2 + c) it grows at least like L^c.",
        1.0,
        Tolerance.at_least(),
        "the claim is a bound",
        "Lower ends over c log L, c = 1/4 and 1/2: mean over seeds at every L.",
    ),
    Claim(
        "product.constant",
        f"{_PAPER}: the norm is 1 + c; derived for this project",
        "'Stable' means bounded, not near 1: at 1/√L the spectral norm is above 2.",
        2.0,
        Tolerance.at_least(),
        "the norm of a state grows by 1.65 only",
        "Lower ends: mean over seeds, at every L.",
    ),
]

_descent = [
    Claim(
        "descent.depth-free",
        _DESCENT,
        "At 1/√L the number of steps that descent needs does not grow with the depth.",
        0.0,
        Tolerance.at_most(atol=0.1),
        "from the shallowest to the deepest net an exponent of 0.1 is a factor of 1.35; of steps "
        "that follow the depth it would be 1",
        "Steps until the loss is a tenth of that of zero outputs, exponent in L for each seed: "
        "mean and 95 %; where deep nets do not reach it, the steps made are a lower bound. Random "
        "labels, all samples in a step, one learning rate for all.",
    ),
    Claim(
        "descent.global",
        _DESCENT,
        "At 1/√L descent reaches losses below a tenth of that of zero outputs at every depth.",
        1.0,
        Tolerance.within(),
        "a level is reached or not; the theorem's own limit is zero",
        "All seeds.",
    ),
    Claim(
        "descent.sharp-faster",
        f"{_DESCENT}, and the theory check: 1/√L at least as fast as 1/L",
        "After the same number of steps the loss at 1/√L is not above that at 1/L.",
        1.0,
        Tolerance.at_most(),
        "the claim is a comparison",
        "Ratio of last losses of independent nets at every depth (Hodges and Lehmann, with the "
        "exact Mann-Whitney enclosure).",
    ),
    Claim(
        "descent.diverges",
        f"{_CONVERSE}, and the theory check",
        "At L^-1/4 descent at the same learning rate diverges in deep networks.",
        1.0,
        Tolerance.within(),
        "a training diverges or not",
        "All seeds at L >= 100: a loss that is not finite, or a million times the first.",
    ),
    Claim(
        "images.train",
        _SMALL,
        "On images, stochastic descent trains at 1/L and at 1/√L at every depth.",
        1.0,
        Tolerance.within(),
        "a net learns or not",
        f"Share of trainings that end {_LEARN}; here half of that of zero outputs. Images have "
        "norm 1 and the learning rate is 2 d/m, as for random labels.",
    ),
    Claim(
        "images.sharp-faster",
        _SMALL,
        "There too 1/√L is at least as fast as 1/L.",
        1.0,
        Tolerance.at_most(),
        "the claim is a comparison",
        "Ratio of the losses over the last tenth of the steps, as descent.sharp-faster.",
    ),
    Claim(
        "images.diverges",
        _SMALL,
        "There too L^-1/4 diverges in the deepest networks.",
        1.0,
        Tolerance.within(),
        "a training diverges or not",
        "All seeds at the largest L.",
    ),
]

_resnets = [
    Claim(
        "bn.deep",
        f"{_CIFAR}, with BatchNorm",
        "With BatchNorm, 1/√L on the branches lowers the error of the deepest ResNet at the end of "
        "the preset's epochs.",
        1.0,
        Tolerance.less_than(),
        "no effect would be 1",
        f"Error on held-out images with the factor over that without. {_RANKED}",
    ),
    Claim(
        "bn.gain-grows",
        f"{_CIFAR}, with BatchNorm",
        "The deeper the ResNet, the more it gains at that time.",
        1.0,
        Tolerance.more_than(),
        "no effect would be 1",
        "Error without over that with the factor, for twins with the same initial convolutions and "
        f"batches; that of the deepest over that of the shallowest. {_RANKED}",
    ),
    Claim(
        "bn.degradation",
        f"{_CIFAR}, with BatchNorm",
        "Without the factor the deepest ResNet is then worse than the shallowest.",
        1.0,
        Tolerance.more_than(),
        "no effect would be 1; the paper sees this from 110 to 1202 layers",
        f"Error of the deepest over that of the shallowest. {_RANKED}",
    ),
    Claim(
        "bn.no-degradation",
        f"{_CIFAR}, with BatchNorm",
        "With it the deepest ResNet is then not worse than the shallowest.",
        "one standard error of the test set",
        Tolerance.at_most(),
        "√(2 p(1 − p)/m) for m held-out images: less could not be seen on them",
        "Error of the deepest less that of the shallowest, same seed: mean over seeds, 95 %.",
    ),
    Claim(
        "free.train",
        f"{_CIFAR}, without normalisation",
        "Without BatchNorm, ResNets of every depth learn with one factor for all blocks that "
        "starts at 1/√L and is trained too.",
        1.0,
        Tolerance.less_than(),
        "1 is the loss of guessing",
        "Loss over the last tenth of the steps in units of guessing, infinite for a training that "
        "diverged: mean over seeds, 95 %, at every depth.",
    ),
    Claim(
        "free.without",
        f"{_CIFAR}, without normalisation",
        "Starting at tau = 1, the deepest ends at larger losses, or diverges.",
        1.0,
        Tolerance.more_than(),
        "no effect would be 1",
        _OVER_SHARP,
    ),
    Claim(
        "free.larger",
        f"{_CODE}, its description: a larger tau explodes",
        "So it does starting at L^-1/4.",
        1.0,
        Tolerance.more_than(),
        "no effect would be 1",
        _OVER_SHARP,
    ),
]

CLAIMS = [*_checks, *_norms, *_product, *_descent, *_resnets]
BY_ID = {claim.id: claim for claim in CLAIMS}
