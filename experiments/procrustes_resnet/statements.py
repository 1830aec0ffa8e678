"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

import math

from experiments.claims import Claim, Tolerance

_PAPER = "Zaeemzadeh, Rahnavard, Shah, arXiv:1805.07477"
_CODE = f"{_PAPER}, the authors' public code"
_PAGE = f"{_PAPER}, the authors' project page"
_DERIVED = "derived for this project"
# What can fail only through a mistake in the program begins with this.
CHECK = "Instrument check: "
_TENTH = "equal to a tenth; the three claims about equality share this limit"
_ROUNDING = "float32 rounding of weights and of one polar factor"
_DOWN = "at the two downsamplings"
_NO_EFFECT = "no effect would be 1"
_DRIFT = (
    "mean |1 − r| over the sampled steps after the first, over that of the other net with the same "
    "seed: geometric mean over seeds, 95 %, at each depth"
)
_LEARN = "Not decided if the other net, or both, ended at chance (0.9 of the loss of guessing)."
_MARGIN = (
    "a margin of one standard error of the test set at the other net's error, √(p(1 − p)/m) for m "
    "images: less could not be seen on it"
)
_PAIRED = (
    "Difference for the same seed, held-out images and order of samples: mean over seeds, 95 %, "
    "widened by one image; at each depth. The spread is that over seeds: the held-out images are "
    "always the same."
)

_QUOTIENT = (
    "Quotient for the same seed and order of samples: geometric mean over seeds, 95 %, at each "
    f"depth. {_LEARN}"
)

_layers = [
    Claim(
        "layer.1x1",
        f"{_CODE}: σ = √(c_out/c_in)",
        CHECK + "the paper's transitions have all singular values √2 after one projection.",
        math.sqrt(2),
        Tolerance.within(atol=1e-3),
        _ROUNDING,
        "Smallest and largest singular value of 64 → 128 and 128 → 256 after Procrustes.project().",
    ),
    Claim(
        "layer.one-matrix",
        f"{_DERIVED}: the symbol of a 1×1 kernel is the same at every frequency",
        CHECK + "one polar factor gives what the paper's 8×8 polar factors give.",
        0.0,
        Tolerance.at_most(atol=1e-5),
        _ROUNDING,
        "Relative distance of the two weights.",
    ),
    Claim(
        "layer.rank",
        f"{_DERIVED}: rank of a 1×1 kernel of stride 2",
        CHECK
        + "the paper's transition has half the rank that keeping every gradient would need: its "
        "singular values are √2 and 0.",
        0.5,
        Tolerance.within(),
        "a count",
        "Rank over outputs of the operator as it runs, after projection.",
    ),
    Claim(
        "layer.2x2",
        f"{_DERIVED}: windows of a 2×2 kernel of stride 2 share no input",
        CHECK
        + "the isometric 2×2 transition keeps the norm of every gradient: all singular values of "
        "the operator as it runs are 1.",
        1.0,
        Tolerance.within(atol=1e-12),
        "float64 rounding of a 2048 by 512 matrix",
        "Smallest and largest of all singular values, zero padding or none.",
    ),
    Claim(
        "layer.stem",
        f"{_DERIVED}: orthogonal columns make WᵀW a multiple of the identity",
        CHECK
        + "the 3×3 stem has all singular values √(64/3) = 4.619 after one step, with circular "
        "padding.",
        math.sqrt(64 / 3),
        Tolerance.within(atol=1e-9),
        "float64 rounding",
        "Smallest and largest singular value over all frequencies of a 12×12 circle.",
    ),
    Claim(
        "layer.stem-paper",
        f"{_CODE}: polar factors at all frequencies, cut to the kernel",
        "The paper's projection of the stem needs repetition: after one, σ_max/σ_min is above 1.1.",
        1.1,
        Tolerance.more_than(),
        _TENTH,
        "Same kernels, circular padding: mean over seeds, 95 %.",
    ),
    Claim(
        "layer.stem-zeros",
        f"{_DERIVED}: with orthogonal taps WᵀW is diagonal, and counts the taps that see a pixel",
        CHECK + "with zero padding, which the layer has, the one-step stem has σ_min = 2/3 of the "
        "target: a corner is seen by 4 of 9 taps.",
        2 / 3,
        Tolerance.within(atol=1e-9),
        "float64 rounding",
        "Smallest singular value of the operator as it runs, over the target.",
    ),
    Claim(
        "layer.stem-gap",
        f"{_DERIVED}: windows over the border lose taps",
        "... and the paper's projection leaves no smaller gap, once or ten times.",
        2 / 3,
        Tolerance.at_most(),
        "that of the one-step projection",
        "The same, mean over seeds, 95 %.",
    ),
    Claim(
        "layer.stride",
        f"{_DERIVED}: a stride folds frequencies, which the paper's projection leaves out",
        "For 3×3 kernels of stride 2 neither the paper's projection nor the polar factor of the "
        "reshaped kernel makes singular values equal: σ_max/σ_min is above 1.1.",
        1.1,
        Tolerance.more_than(),
        _TENTH,
        "Circular padding, ten repetitions: mean over seeds, 95 %.",
    ),
    Claim(
        "layer.stride-aware",
        f"{_DERIVED}: alternating projections on folded frequencies",
        "With the stride taken into account it does: σ_max/σ_min is below 1.1 after 100 sweeps.",
        1.1,
        Tolerance.at_most(),
        _TENTH,
        "Circular padding: mean over seeds, 95 %.",
    ),
    Claim(
        "layer.stride-zeros",
        f"{_DERIVED}: windows over the border lose taps",
        "Zero padding leaves such a layer σ_min below half of the target even so.",
        0.5,
        Tolerance.at_most(),
        "the smallest singular value would be 1 without a border",
        "Operator as it runs, after 100 sweeps: mean over seeds, 95 %.",
    ),
    Claim(
        "layer.gain",
        f"{_DERIVED}: ‖W‖²_F/n_out, conditioning.theory.expected_backward_gain",
        CHECK + "the mean squared gain over singular values is that of the kernel's entries, "
        "whatever kernel and stride.",
        1.0,
        Tolerance.within(rtol=1e-9),
        "float64 rounding",
        "Root of Σσ²/n_out over the formula, circular and zero padding, every layer and method.",
    ),
]

_initial = [
    Claim(
        "init.1x1",
        f"{_CODE}: σ = √2; expectation {_DERIVED}",
        "At initialisation the 1×1 transitions with equal singular values have ratios within "
        "[0.97, 1.03].",
        1.0,
        Tolerance.within(atol=0.03),
        "the expectation is 1 for random gradients; the band is ours, for means over seeds",
        "Ratio of each downsampling of each size: mean over seeds, 95 %.",
    ),
    Claim(
        "init.2x2",
        f"{_DERIVED}: isometry",
        CHECK + "the isometric transitions have ratio 1, for every gradient.",
        0.0,
        Tolerance.at_most(atol=1e-4),
        "float32 rounding of a sum over a batch",
        "Largest |1 − r| of any downsampling, size and seed.",
    ),
    Claim(
        "init.parameters",
        f"{_DERIVED}: 3 (c_in c_out) more entries in each 2×2 kernel",
        CHECK + "the isometric transitions cost 122880 parameters, at every depth.",
        122880,
        Tolerance.within(),
        "a count",
        "Parameters of the net with 2×2 less those of ProcResNet.",
    ),
]

_training = [
    Claim(
        "train.1x1",
        f"{_PAGE}: ProcResNet's transitions stay nearer to 1 than ResNet's, 1.2 against 1.5 to 2.8",
        "Projected with probability 1/2 after each step, the 1×1 transitions drift less than the "
        "same net without projection.",
        1.0,
        Tolerance.less_than(),
        _NO_EFFECT,
        f"{_DRIFT}, {_DOWN}. {_LEARN}",
    ),
    Claim(
        "train.1x1-resnet",
        f"{_PAGE}: ProcResNet repairs the transitions",
        "... and less than ResNet's downsamplings.",
        1.0,
        Tolerance.less_than(),
        _NO_EFFECT,
        f"{_DRIFT}, {_DOWN}. {_LEARN}",
    ),
    Claim(
        "train.2x2",
        f"{_DERIVED}: isometry after every projection",
        CHECK
        + "projected after each step, the 2×2 transitions keep ratio 1.00 all along the training.",
        0.0,
        Tolerance.at_most(atol=1e-3),
        "float32 rounding; 1.00 to two digits would allow 5e-3",
        "Largest |1 − r| of a downsampling in any sampled step and seed.",
    ),
    Claim(
        "train.flat-init",
        f"{_DERIVED}: the ablation that the paper's public material lacks",
        "Equal singular values at initialisation alone do not last: without projection the ratios "
        "leave [0.97, 1.03].",
        0.03,
        Tolerance.at_least(),
        "the band of init.1x1",
        f"Mean |1 − r| {_DOWN} in the last tenths of the steps, 1×1 and 2×2: mean over seeds, "
        f"95 %. {_LEARN}",
    ),
    Claim(
        "train.spectrum",
        f"{_CODE}: σ = √(c_out/c_in) for the stem and the transitions",
        CHECK
        + "after a projection at the end stem and transitions have all singular values at their "
        "target.",
        1.0,
        Tolerance.within(rtol=1e-3),
        _ROUNDING,
        "Smallest and largest singular value over the target (circular padding for the stem), "
        "after a projection at the end: every net that is projected.",
    ),
    Claim(
        "train.speed",
        f"{_PAPER}, abstract: optimization is easier",
        "ProcResNet's training loss, averaged over the training, is below ResNet's.",
        1.0,
        Tolerance.less_than(),
        _NO_EFFECT,
        _QUOTIENT,
    ),
    Claim(
        "train.speed-free",
        f"{_DERIVED}: the ablation that the paper's public material lacks",
        "... and the projection does it: below that of the same net without projection.",
        1.0,
        Tolerance.less_than(),
        _NO_EFFECT,
        _QUOTIENT,
    ),
]

_TABLES = f"{_PAGE}, tables: 0.5 to 0.8 points better on CIFAR-10 at nearly equal size, single runs"
_ABLATION = f"{_DERIVED}: the ablation that the paper's public material lacks"
_WORSE = (
    (
        "he",
        _TABLES,
        "ProcResNet's {what} test error is no worse than that of ResNet of nearly equal size.",
    ),
    (
        "small",
        f"{_PAGE}, tables; the baseline of the authors' first implementation",
        "... nor than that of ResNet with the shortcut × 0.01 ({what} error).",
    ),
    ("free", _ABLATION, "... nor than its own without projection ({what} error)."),
    (
        "2x2",
        _DERIVED,
        "The net with isometric transitions, which has 122880 parameters more, has a {what} test "
        "error no worse than ResNet's.",
    ),
)
_BETTER = (
    ("he", _TABLES, "ProcResNet's final test error is below that of ResNet of nearly equal size."),
    ("free", _ABLATION, "... and the projection does it: below its own without projection."),
    ("2x2", _DERIVED, "The net with isometric transitions has a final test error below ResNet's."),
    (
        "2x2-free",
        _DERIVED,
        "... and keeping them isometric does it: below its own without projection.",
    ),
)
_error = [
    Claim(
        f"error.{what}-{net}",
        source,
        statement.format(what=what),
        "one standard error",
        Tolerance.at_most(),
        _MARGIN,
        f"Share of wrong answers, {when}. {_PAIRED} {_LEARN} A net that diverged counts as "
        "guessing.",
    )
    for net, source, statement in _WORSE
    for what, when in (
        ("final", "after the last epoch"),
        ("best", "at the best evaluation, which is a choice on test data"),
    )
]
_better = [
    Claim(
        f"error.better-{net}",
        source,
        statement,
        0.0,
        Tolerance.less_than(),
        "no effect would be 0",
        f"Share of wrong answers after the last epoch. {_PAIRED} {_LEARN} A net that diverged "
        "counts as guessing.",
    )
    for net, source, statement in _BETTER
]

CLAIMS: tuple[Claim, ...] = (*_layers, *_initial, *_training, *_error, *_better)
BY_ID = {claim.id: claim for claim in CLAIMS}
