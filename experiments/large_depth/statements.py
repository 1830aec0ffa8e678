"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

from experiments.claims import Claim, Tolerance

_PAPER = "Marion, Fermanian, Biau, Vert, arXiv:2206.06929"
_RECALLED = f"{_PAPER}, as recalled, not re-read"
_DERIVED = "derived for this project (conditioning.theory)"
# Statements that only a mistake in the program could make fail begin with this.
CHECK = "Instrument check: "
_FLAT = (
    "what an earlier numerical check of the paper asked for; a factor of 1.15 over L = 10 ... 1000"
)
_ORDER = "a sign, not a size"
_SLOPES = (
    "Least-squares slope in log L of log |h_L − h_0| / |h_0| for one net at each depth: mean over "
    "nets and 95 %."
)
_GRADIENT = _SLOPES.replace("|h_L − h_0| / |h_0|", "|g_0 − g_L| / |g_L|")
_CROSSING = (
    "Crossing of zero of the mean decimal logarithm of |h_L − h_0| / |h_0| over inputs, in β, "
    "linearly interpolated, for each net; mean over nets and 95 %, every H"
)
_LINE = "what an earlier numerical check of the paper asked for; asymptotic exponents are .03 off"


def _moment(name: str, beta: str, slack: float, reason: str, *, gradient: bool = False) -> Claim:
    what = "|g_0 − g_L|² / |g_L|²" if gradient else "|h_L − h_0|² / |h_0|²"
    grades = ", up to corrections of order 1/d" if gradient else ""
    return Claim(
        f"moment.{name}",
        f"{_DERIVED}: deviation_second_moment{grades}",
        f"E {what} = (1 + α²/2)^L − 1 for independent weights, β = {beta}.",
        1.0,
        Tolerance.within(rtol=slack),
        reason,
        "Measured over predicted, mean over all nets of all depths and 95 %; res-3, uniform "
        "entries. Each depth by itself is in moments.csv.",
    )


_TWICE = "twice the half-width to be expected for 500 nets of width 40"

_check = [
    Claim(
        "check.gradient",
        _DERIVED,
        f"{CHECK}movements of outputs and gradients are those of a plain net and autograd.",
        0.0,
        Tolerance.within(atol=1e-11),
        "float64 rounding of 40 layers",
        "Greatest relative error of four norms, both blocks.",
    ),
    Claim(
        "check.training",
        _DERIVED,
        f"{CHECK}lanes trained at once are nets trained by autograd and torch.optim.Adam.",
        0.0,
        Tolerance.within(atol=1e-8),
        "float64 rounding of 21 steps; Adam divides by gradients that may be small",
        "Relative distance of the weights, three lanes with different scalings and rates.",
    ),
    Claim(
        "check.embedding",
        _DERIVED,
        f"{CHECK}the circulant embedding has the covariance of fractional Gaussian noise.",
        0.0,
        Tolerance.within(atol=1e-12),
        "float64 rounding",
        "The filter applied to unit impulses, all entries of the covariance of 64 layers, five "
        "values of H; no random numbers.",
    ),
    Claim(
        "check.noise",
        _DERIVED,
        f"{CHECK}so have the paths that are drawn.",
        0.0,
        Tolerance.within(atol=4.0),
        "four standard errors: one of 20 scores is beyond them in one of 800 runs",
        "Sample autocovariances at lags 0, 1, 2 and 10, in standard errors; every H.",
    ),
]

_moments = [
    _moment("identity", "1", 0.05, _TWICE),
    _moment("balanced", "1/2", 0.05, _TWICE),
    _moment("explosion", "1/4", 0.25, f"{_TWICE}, whose ratios have a heavy tail"),
    _moment(
        "gradient-identity", "1", 0.1, "that of the output, and 2/d for the corrections",
        gradient=True,
    ),
    _moment(
        "gradient-balanced", "1/2", 0.1, "that of the output, and 2/d for the corrections",
        gradient=True,
    ),
]  # fmt: skip


def _trichotomy(part: str, what: str, how: str) -> list[Claim]:
    return [
        Claim(
            f"{part}.identity",
            f"{_PAPER} (tends to 0); the exponent: {_DERIVED}",
            f"Independent weights, β = 1: {what} falls to 0 with depth, as L^(-1/2).",
            -0.5,
            Tolerance.within(atol=0.03),
            _FLAT,
            how,
        ),
        Claim(
            f"{part}.balanced",
            f"{_PAPER} (bounded on both sides)",
            f"Independent weights, β = 1/2: {what} neither grows nor falls with depth.",
            0.0,
            Tolerance.within(atol=0.03),
            _FLAT,
            how,
        ),
        Claim(
            f"{part}.explodes",
            f"{_PAPER} (tends to infinity)",
            f"Independent weights, β = 1/4: {what} grows with depth.",
            0.0,
            Tolerance.more_than(),
            _ORDER,
            how,
        ),
    ]


_iid = [
    *_trichotomy("iid", "|h_L − h_0| / |h_0|", _SLOPES),
    Claim(
        "iid.rate",
        f"{_DERIVED}: the log-normal law at the time L α² = √L",
        "It grows as exp(√L (1/4 − 1/(2d))).",
        "1/4 − 1/(2d)",
        Tolerance.within(rtol=0.1),
        "the rate of the root of the mean square, 1/4, is 5 % above",
        "As iid.explodes, slope in √L, from L = 100 on.",
    ),
    *_trichotomy("gradient", "|g_0 − g_L| / |g_L|", _GRADIENT),
]

_SMOOTH_HOW = (
    f"{_SLOPES} Nets of different depths are twins: the same paths on another grid, the same "
    "input. The Gaussian process and its increments, and the same for the gradient; the worst of "
    "the four."
)
_RESOLVED = "From L = 100 on, where a bandwidth of the weights has ten layers."
_smooth = [
    Claim(
        "smooth.identity",
        f"{_PAPER} (tends to 0); the exponent: {_DERIVED}",
        "Smooth weights, β = 2: outputs and gradients approach those of the identity, as 1/L.",
        -1.0,
        Tolerance.within(atol=0.03),
        _FLAT,
        f"{_SMOOTH_HOW} {_RESOLVED}",
    ),
    Claim(
        "smooth.balanced",
        f"{_PAPER} (tends to the solution of a differential equation)",
        "Smooth weights, β = 1: the movement of outputs and gradients does not depend on depth.",
        0.0,
        Tolerance.within(atol=0.03),
        _FLAT,
        f"{_SMOOTH_HOW} {_RESOLVED}",
    ),
    Claim(
        "smooth.shallow",
        f"{_PAPER} (figures begin at L = 10)",
        "... not even from L = 10 on, one layer for each bandwidth.",
        0.0,
        Tolerance.within(atol=0.03),
        _FLAT,
        _SMOOTH_HOW,
    ),
    Claim(
        "smooth.explodes",
        f"{_PAPER} (tends to infinity, under a condition on the first layers)",
        "Smooth weights, β = 1/2: the movement of outputs and gradients grows with depth.",
        0.0,
        Tolerance.more_than(),
        _ORDER,
        _SMOOTH_HOW,
    ),
]


def _law(name: str, what: str) -> list[Claim]:
    return [
        Claim(
            f"law.{name}mean",
            f"{_PAPER} (the limit); its solution: {_DERIVED}",
            f"Independent weights, β = 1/2: log {what} has the mean 1/4 − 1/(2d).",
            "1/4 − 1/(2d)",
            Tolerance.within(rtol=0.1),
            "twice the half-width to be expected for 400 nets of width 40",
            "Mean over nets and 95 %; res-3, uniform entries.",
        ),
        Claim(
            f"law.{name}spread",
            f"{_PAPER} (the limit); its solution: {_DERIVED}",
            f"Independent weights, β = 1/2: log {what} has the standard deviation 1/√(2d).",
            "1/√(2d)",
            Tolerance.within(rtol=0.15),
            "what an earlier numerical check of the paper asked for",
            "Standard deviation over nets and its 95 % interval for a normal variable.",
        ),
    ]


_laws = [
    *_law("", "|h_L| / |h_0|"),
    *_law("gradient-", "|g_0| / |g_L|"),
    Claim(
        "law.shape",
        f"{_PAPER} (the limit); its solution: {_DERIVED}",
        "The law of |h_L| / |h_0| is log-normal, with that mean and deviation.",
        0.0,
        Tolerance.within(atol=0.05),
        "a shift by an eighth of the deviation is 0.05",
        "Kolmogorov distance of the empirical law of the norm's Markov chain, which has the law of "
        "nets with normal entries, with the 95 % band of Dvoretzky, Kiefer, Wolfowitz and Massart.",
    ),
]

_orders = [
    Claim(
        "order.sde",
        _RECALLED,
        "res-1, β = 1/2, layers that are increments of one Brownian motion: the net converges to "
        "the stochastic equation with strong order 1/2.",
        -0.5,
        Tolerance.within(atol=0.1),
        "orders 1/2 and 1 are five times as far apart",
        "Greatest distance of nets of depth L and 2 L on the same path, at all common layers: "
        "slope of its logarithm in log L for each net, mean and 95 %. Against a finest net of "
        "finite depth the last slopes would be too steep.",
    ),
    Claim(
        "order.ode",
        _RECALLED,
        "Smooth weights, β = 1: the net converges to the ordinary equation with order 1, "
        "uniformly over layers.",
        -1.0,
        Tolerance.within(atol=0.1),
        "orders 1/2 and 1 are five times as far apart",
        "As order.sde, for res-1 and res-3; the worse of the two.",
    ),
]

_maps = [
    Claim(
        "map.line",
        f"{_DERIVED}: critical_beta, growth compounded",
        "res-3, weights with Hurst index H: the movement is 1 on the predicted line β(H).",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_CROSSING}.",
    ),
    Claim(
        "map.line-first",
        f"{_DERIVED}: critical_beta, to first order",
        "... and so it is on the line of first order in α.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        "As map.line.",
    ),
    Claim(
        "map.plateau",
        f"{_PAPER} (about 1/2 for H ≤ 1/2)",
        "res-3: the critical β is the same for all H ≤ 1/2.",
        0.0,
        Tolerance.within(atol=0.05),
        "a tenth of its rise between H = 1/2 and 1",
        f"{_CROSSING}, less that at H = 1/2.",
    ),
    Claim(
        "map.rises",
        f"{_PAPER} (rises to 1 as H does)",
        "res-3: above H = 1/2 the critical β rises with H.",
        0.0,
        Tolerance.more_than(),
        _ORDER,
        f"{_CROSSING}: difference of neighbouring H from 1/2 on.",
    ),
    Claim(
        "map.end",
        f"{_PAPER} (1/2 to 1)",
        "res-3: at the largest H most of the way from 1/2 to 1 is done.",
        0.25,
        Tolerance.more_than(),
        "half of the rise from 1/2 to 1",
        f"{_CROSSING}: at the largest H less that at H = 1/2.",
    ),
    Claim(
        "map.gradient",
        f"{_PAPER} (maps of outputs and of gradients; that their lines agree is our reading)",
        "res-3: gradients have the same critical β as outputs.",
        0.0,
        Tolerance.within(atol=0.04),
        "as map.line",
        f"{_CROSSING}, gradient less output, net by net.",
    ),
    Claim(
        "map.gradient-line",
        f"{_DERIVED}: critical_beta of the gradient, growth compounded; exponent "
        "max(1/2, 2 H − 1) in place of max(1/2, H)",
        "res-3: gradients move by their norm on a line of their own, below that of outputs for "
        "H > 1/2.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        _CROSSING.replace("|h_L − h_0| / |h_0|", "|g_0 − g_L| / |g_L|") + ".",
    ),
    Claim(
        "map.no-plateau",
        f"{_DERIVED}: exponent H without inner matrix, against max(1/2, H) with one",
        "res-1: the critical β falls below that at H = 1/2 for every smaller H: the plateau is "
        "made by the inner matrices.",
        0.0,
        Tolerance.less_than(),
        _ORDER,
        f"{_CROSSING}, less that at H = 1/2.",
    ),
    Claim(
        "map.single",
        f"{_DERIVED}: critical_beta, growth compounded",
        "res-1, H ≥ 1/2: the movement is 1 on the predicted line β(H).",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_CROSSING}.",
    ),
    Claim(
        "map.single-rough",
        f"{_DERIVED}: critical_beta, growth compounded",
        "res-1, H < 1/2: the same, although the critical α is then not small at any usual depth.",
        "β(H)",
        Tolerance.within(atol=0.04),
        _LINE,
        f"{_CROSSING}.",
    ),
]

_KEPT = "smooth, Brownian and independent layers have the exponents 1, 1/2 and 0"
_EXPONENT = (
    "Half the slope of the logarithm of mean squared increments over 1, 2 and 4 layers in the "
    "logarithm of their number"
)
_regular = [
    Claim(
        "regularity.smooth",
        f"{_PAPER} (figure of a weight against the layer)",
        "Smooth layers, β = 1, stay smooth in training.",
        0.0,
        Tolerance.within(atol=0.1),
        _KEPT,
        f"{_EXPONENT}, after less before, net by net: mean over seeds and 95 %.",
    ),
    Claim(
        "regularity.rough",
        f"{_PAPER} (figure of a weight against the layer)",
        "Independent layers stay rough, with β = 1 and with β = 1/2.",
        0.0,
        Tolerance.within(atol=0.1),
        _KEPT,
        "As regularity.smooth; the worse of the two.",
    ),
    Claim(
        "regularity.change",
        f"{_DERIVED.split(' (')[0]}: states and gradients are smooth in the layer",
        "What training adds to smooth layers is itself smoother than Brownian motion.",
        0.5,
        Tolerance.more_than(),
        _KEPT,
        f"{_EXPONENT}, of the difference of trained and initial weights: mean and 95 %.",
    ),
]

_NOISE = "three standard errors of the accuracy on 360 test samples in ten classes"
_BEST = (
    "Test accuracy at the learning rate of highest training accuracy; predictions that are not "
    "finite are wrong"
)
_accuracy = [
    Claim(
        "accuracy.above",
        f"{_RECALLED} (good accuracy above the line only)",
        "Trained nets whose β is above the line of initial stability at their H are better than "
        "those below it.",
        0.0,
        Tolerance.more_than(),
        _ORDER,
        f"{_BEST}. Mean over the cells of the map above the line less that below, for each seed; "
        "mean and 95 %. The line is critical_beta for res-1 at the nets' depth.",
    ),
    Claim(
        "accuracy.corner",
        f"{_RECALLED} (exploding corner at chance)",
        "At the largest H and the smallest β no net learns.",
        "accuracy of the commonest class",
        Tolerance.at_most(atol=0.05),
        _NOISE,
        f"{_BEST}: mean over seeds and 95 %.",
    ),
    Claim(
        "accuracy.below",
        f"{_RECALLED} (good accuracy above the line only), taken to the letter",
        "No net below the line learns.",
        "accuracy of the commonest class",
        Tolerance.at_most(atol=0.05),
        _NOISE,
        f"{_BEST}: mean over seeds and 95 %, every cell of the map below the line.",
    ),
]

CLAIMS = (
    *_check, *_moments, *_iid, *_smooth, *_laws, *_orders, *_maps, *_regular, *_accuracy,
)  # fmt: skip
BY_ID = {claim.id: claim for claim in CLAIMS}
