"""Claims about maps over the Hurst index and the scaling, at initialisation."""

from __future__ import annotations

from experiments.claims import Claim, Tolerance
from experiments.large_depth.sources import DERIVED, PAPER, SIGN

_CROSSING = (
    "Crossing of zero of the mean decimal logarithm of |h_L − h_0| / |h_0| over inputs, in β, "
    "linearly interpolated, for each net; mean over nets and 95 %, every H"
)
_OF_GRADIENT = _CROSSING.replace("|h_L − h_0| / |h_0|", "|g_0 − g_L| / |g_L|")
_LINE = "what an earlier numerical check of the paper asked for; asymptotic exponents are .03 off"
_COMPOUNDED = (
    f"{DERIVED}: critical_beta, growth compounded: exact for H = 1/2 as α → 0, an interpolation "
    "for other H"
)

CLAIMS = [
    Claim(
        "map.line",
        _COMPOUNDED,
        "res-3, weights with Hurst index H: the movement is 1 on the predicted line β(H).",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_CROSSING}.",
    ),
    Claim(
        "map.line-first",
        f"{DERIVED}: critical_beta, to first order",
        "... and so it is on the line of first order in α.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        "As map.line.",
    ),
    Claim(
        "map.compounding",
        _COMPOUNDED,
        "... which is farther from where a net's movement is 1 than the compounded one.",
        0.0,
        Tolerance.more_than(),
        SIGN,
        "Crossing as in map.line, for each net: its distance from the line of first order less "
        "that from the compounded one; mean over nets of all H and 95 %.",
    ),
    Claim(
        "map.plateau",
        f"{PAPER} (about 1/2 for H ≤ 1/2)",
        "res-3: the critical β is the same for all H ≤ 1/2.",
        0.0,
        Tolerance.within(atol=0.05),
        "a tenth of its rise between H = 1/2 and 1",
        f"{_CROSSING}, less that at H = 1/2.",
    ),
    Claim(
        "map.rises",
        f"{PAPER} (rises to 1 as H does)",
        "res-3: above H = 1/2 the critical β rises with H.",
        0.0,
        Tolerance.more_than(),
        SIGN,
        f"{_CROSSING}: difference of neighbouring H from 1/2 on.",
    ),
    Claim(
        "map.end",
        f"{PAPER} (1/2 to 1)",
        "res-3: at the largest H most of the way from 1/2 to 1 is done.",
        0.25,
        Tolerance.more_than(),
        "half of the rise from 1/2 to 1",
        f"{_CROSSING}: at the largest H less that at H = 1/2.",
    ),
    Claim(
        "map.gradient",
        f"{PAPER} (maps of outputs and of gradients; that their lines agree is our reading)",
        "res-3: gradients have the same critical β as outputs.",
        0.0,
        Tolerance.within(atol=0.04),
        "as map.line",
        f"{_CROSSING}, gradient less output, net by net.",
    ),
    Claim(
        "map.gradient-below",
        f"{DERIVED}: first_order_sum of the gradient is less, as gates decorrelate all components "
        "of a row but one",
        "res-3: for every H > 1/2 the critical β of gradients is below that of outputs.",
        0.0,
        Tolerance.less_than(),
        SIGN,
        f"{_CROSSING} above 1/2, gradient less output, net by net.",
    ),
    Claim(
        "map.gradient-line",
        _COMPOUNDED,
        "res-3: gradients move by their norm on the line that is predicted for them at this depth "
        "and width.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_OF_GRADIENT}.",
    ),
    Claim(
        "map.no-plateau",
        f"{DERIVED}: exponent H without inner matrix, against max(1/2, H) with one",
        "res-1: the critical β falls below that at H = 1/2 for every smaller H: the plateau is "
        "made by the inner matrices.",
        0.0,
        Tolerance.less_than(),
        SIGN,
        f"{_CROSSING}, less that at H = 1/2.",
    ),
    Claim(
        "map.single",
        _COMPOUNDED,
        "res-1, H ≥ 1/2: the movement is 1 on the predicted line β(H).",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_CROSSING}.",
    ),
    Claim(
        "map.single-rough",
        _COMPOUNDED,
        "res-1, H < 1/2: the same, although the critical α is then not small at any usual depth.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_CROSSING}.",
    ),
    Claim(
        "map.single-gradient",
        _COMPOUNDED,
        "res-1, H ≥ 1/2: gradients move by their norm on that line, too.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_OF_GRADIENT}.",
    ),
    Claim(
        "map.single-gradient-rough",
        _COMPOUNDED,
        "res-1, H < 1/2: the same, although to first order only are they alike.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_OF_GRADIENT}.",
    ),
]
