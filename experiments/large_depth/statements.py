"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

from experiments.claims import Claim, Tolerance
from experiments.large_depth import statements_maps, statements_trained
from experiments.large_depth.sources import CHECK, DERIVED, PAPER, RECALLED, SIGN

_FLAT = (
    "what an earlier numerical check of the paper asked for; a factor of 1.15 over L = 10 ... 1000"
)
_SLOPES = (
    "Least-squares slope in log L of log |h_L − h_0| / |h_0| for one net at each depth: mean over "
    "nets and 95 %."
)
_ITO = "without the term of Ito's formula it is 0, twice as far off as what is accepted"
_ITO_UNITS = (
    "how far it lies below 1/4, the rate of the root of the mean square, in units of 1/(2d), the "
    "term of Ito's formula: mean and 95 %."
)
_GRADIENT = _SLOPES.replace("|h_L − h_0| / |h_0|", "|g_0 − g_L| / |g_L|")


def _moment(name: str, beta: str, slack: float, reason: str, *, gradient: bool = False) -> Claim:
    what = "|g_0 − g_L|² / |g_L|²" if gradient else "|h_L − h_0|² / |h_0|²"
    return Claim(
        f"moment.{name}",
        f"{DERIVED}: deviation_second_moment",
        f"E {what} = (1 + α²/2)^L − 1 for independent weights, β = {beta}.",
        1.0,
        Tolerance.within(rtol=slack),
        reason,
        "Measured over predicted, mean over all nets of all depths and 95 %; res-3, uniform "
        "entries. The note gives the largest of the scores of single depths, in standard errors; "
        "all are in moments.csv.",
    )


_BY_MANY = "what 600 nets of width 40 resolve: half-widths of some 0.02 are to be expected"
# By a simulation of log-normal squares with the deviation √(2 √L / d) of their logarithm.
_HEAVY = (
    f"{_BY_MANY}, but five times that where squares have a heavy tail, as at this scaling; the "
    "score of 60 nets of depth 890 is then beyond 3 in one case of twenty"
)

_check = [
    Claim(
        "check.gradient",
        DERIVED,
        f"{CHECK}movements of outputs and gradients are those of a plain net and autograd.",
        0.0,
        Tolerance.within(atol=1e-11),
        "float64 rounding of 40 layers",
        "Greatest relative error of four norms, both blocks.",
    ),
    Claim(
        "check.training",
        DERIVED,
        f"{CHECK}lanes trained at once are nets trained by autograd and torch.optim.Adam.",
        0.0,
        Tolerance.within(atol=1e-8),
        "float64 rounding of 21 steps; Adam divides by gradients that may be small",
        "Relative distance of the weights, three lanes with different scalings and rates.",
    ),
    Claim(
        "check.embedding",
        DERIVED,
        f"{CHECK}the circulant embedding has the covariance of fractional Gaussian noise.",
        0.0,
        Tolerance.within(atol=1e-12),
        "float64 rounding",
        "The filter applied to unit impulses, all entries of the covariance of 64 layers, five "
        "values of H; no random numbers.",
    ),
    Claim(
        "check.noise",
        DERIVED,
        f"{CHECK}so have the paths that are drawn.",
        0.0,
        Tolerance.within(atol=4.0),
        "four standard errors: one of 20 scores is beyond them in one of 800 runs",
        "Sample autocovariances at lags 0, 1, 2 and 10, in standard errors; every H.",
    ),
]

_moments = [
    _moment("identity", "1", 0.05, _BY_MANY),
    _moment("balanced", "1/2", 0.05, _BY_MANY),
    _moment("explosion", "1/4", 0.25, _HEAVY),
    _moment("gradient-identity", "1", 0.05, _BY_MANY, gradient=True),
    _moment("gradient-balanced", "1/2", 0.05, _BY_MANY, gradient=True),
    _moment(
        "gradient-explosion", "1/4", 0.25, _HEAVY,
        gradient=True,
    ),
]  # fmt: skip


def _trichotomy(part: str, what: str, how: str) -> list[Claim]:
    return [
        Claim(
            f"{part}.identity",
            f"{PAPER} (tends to 0); the exponent: {DERIVED}",
            f"Independent weights, β = 1: {what} falls to 0 with depth, as L^(-1/2).",
            -0.5,
            Tolerance.within(atol=0.03),
            _FLAT,
            how,
        ),
        Claim(
            f"{part}.balanced",
            f"{PAPER} (bounded on both sides)",
            f"Independent weights, β = 1/2: {what} neither grows nor falls with depth.",
            0.0,
            Tolerance.within(atol=0.03),
            _FLAT,
            how,
        ),
        Claim(
            f"{part}.explodes",
            f"{PAPER} (tends to infinity)",
            f"Independent weights, β = 1/4: {what} grows with depth.",
            0.0,
            Tolerance.more_than(),
            SIGN,
            how,
        ),
    ]


_iid = [
    *_trichotomy("iid", "|h_L − h_0| / |h_0|", _SLOPES),
    Claim(
        "iid.rate",
        f"{DERIVED}: limit_log_norm_law at the time L α² = √L",
        "... the logarithm of |h_L| / |h_0| as √L (1/4 − 1/(2d)).",
        1.0,
        Tolerance.within(atol=0.5),
        _ITO,
        "Norms of nets with normal entries, drawn as a Markov chain of the same law, β = 1/4. "
        f"Slope of the logarithm in √L, for one draw at each depth; {_ITO_UNITS}",
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
        f"{PAPER} (tends to 0); the exponent: {DERIVED}",
        "Smooth weights, β = 2: outputs and gradients approach those of the identity, as 1/L.",
        -1.0,
        Tolerance.within(atol=0.03),
        _FLAT,
        f"{_SMOOTH_HOW} {_RESOLVED}",
    ),
    Claim(
        "smooth.balanced",
        f"{PAPER} (tends to the solution of a differential equation)",
        "Smooth weights, β = 1: the movement of outputs and gradients does not depend on depth.",
        0.0,
        Tolerance.within(atol=0.03),
        _FLAT,
        f"{_SMOOTH_HOW} {_RESOLVED}",
    ),
    Claim(
        "smooth.shallow",
        f"{PAPER} (figures begin at L = 10)",
        "... not even from L = 10 on, one layer for each bandwidth.",
        0.0,
        Tolerance.within(atol=0.03),
        _FLAT,
        _SMOOTH_HOW,
    ),
    Claim(
        "smooth.explodes",
        f"{PAPER} (tends to infinity, under a condition on the first layers)",
        "Smooth weights, β = 1/2: the movement of outputs and gradients grows with depth.",
        0.0,
        Tolerance.more_than(),
        SIGN,
        _SMOOTH_HOW,
    ),
]


_LIMIT = f"{PAPER} (the limit); its solution: {DERIVED}"
_OF_NETS, _OF_CHAIN = (
    "res-3, uniform entries.",
    "Norms of nets with normal entries, drawn as a Markov chain of the same law.",
)


def _law(name: str, what: str, where: str, slack: float, reason: str) -> list[Claim]:
    return [
        Claim(
            f"law.{name}mean",
            _LIMIT,
            f"Independent weights, β = 1/2: log {what} has the mean 1/4 − 1/(2d).",
            1.0,
            Tolerance.within(atol=0.5),
            _ITO,
            f"{where} Mean of the logarithm; {_ITO_UNITS}",
        ),
        Claim(
            f"law.{name}spread",
            _LIMIT,
            f"Independent weights, β = 1/2: log {what} has the standard deviation 1/√(2d).",
            "1/√(2d)",
            Tolerance.within(rtol=slack),
            reason,
            f"{where} Standard deviation and its 95 % interval for a normal variable.",
        ),
    ]


_ASKED = "what an earlier numerical check of the paper asked for"
_laws = [
    *_law("", "|h_L| / |h_0|", _OF_NETS, 0.15, _ASKED),
    *_law("gradient-", "|g_0| / |g_L|", _OF_NETS, 0.15, _ASKED),
    *_law("chain-", "|h_L| / |h_0|", _OF_CHAIN, 0.05, "that of nets a tenth as wide again"),
    Claim(
        "law.shape",
        _LIMIT,
        "The law of |h_L| / |h_0| is log-normal, with that mean and deviation.",
        0.0,
        Tolerance.within(atol=0.025),
        "the law without the term of Ito's formula is 0.028 away at d = 100",
        f"{_OF_CHAIN} Kolmogorov distance of the empirical law, with the 95 % band of Dvoretzky, "
        "Kiefer, Wolfowitz and Massart.",
    ),
]

_orders = [
    Claim(
        "order.sde",
        RECALLED,
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
        RECALLED,
        "Smooth weights, β = 1: the net converges to the ordinary equation with order 1, "
        "uniformly over layers.",
        -1.0,
        Tolerance.within(atol=0.1),
        "orders 1/2 and 1 are five times as far apart",
        "As order.sde, for res-1 and res-3; the worse of the two.",
    ),
]

CLAIMS = (
    *_check, *_moments, *_iid, *_smooth, *_laws, *_orders,
    *statements_maps.CLAIMS, *statements_trained.CLAIMS,
)  # fmt: skip
BY_ID = {claim.id: claim for claim in CLAIMS}
