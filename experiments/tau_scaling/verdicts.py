"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from conditioning import theory
from experiments.claims import (
    Measured,
    Verdict,
    decide,
    decide_all,
    decide_every,
    over_runs,
)
from experiments.learning import has_learnt, loss
from experiments.readings import number, ratio_of_groups
from experiments.sweep import Pair, parts
from experiments.tau_scaling import curves
from experiments.tau_scaling.nets import BN, BN_TAU, FREE, FREE_QUARTER, FREE_TAU
from experiments.tau_scaling.rules import (
    ABOVE,
    BOUNDED,
    HALF,
    LINEAR,
    ONE,
    QUARTER,
    RULES,
    SHARP,
    UNBOUNDED,
)
from experiments.tau_scaling.statements import BY_ID, CLAIMS

# The law at large width takes time that grows as L / tau.
MEAN_FIELD_DEPTH = 1000
# Loss of zero outputs: half of the square of a one-hot target.
ZERO_OUTPUTS = 0.5


def decide_claims(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_checks(measured),
        *_forward(measured),
        *_converse(measured),
        *_backward(measured),
        *_product(measured),
        *_descent(measured),
        *_images(measured),
        *_with_norm(measured),
        *_without_norm(measured),
    ]
    by_id = {verdict.claim.id: verdict for verdict in found}
    return [by_id[claim.id] for claim in CLAIMS]


def _every(claim: str, found: Sequence[Measured], note: str = "") -> Verdict:
    return decide_every(BY_ID[claim], found, note=note)


# -- instruments --------------------------------------------------------------------------------


def _checks(measured: Sequence[Pair]) -> list[Verdict]:
    by_what = {cell["what"]: result for cell, result in parts(measured, "check")}
    rules = by_what["product"]["rules"]
    laws = [one for what, groups in by_what["law"].items() for one in _same_law(groups, what)]
    return [
        _every("check.product", [Measured(number(r["outside"]), run=r["rule"]) for r in rules]),
        _every("check.norms", [Measured(number(r["norms"]), run=r["rule"]) for r in rules]),
        decide(BY_ID["check.descent"], Measured(number(by_what["descent"]["error"]))),
        _every("check.law", laws),
    ]


def _same_law(groups: Mapping[str, Sequence[float]], what: str) -> list[Measured]:
    """Ratios of geometric means, and of standard deviations of logarithms, of large groups."""
    first, second = (np.asarray(groups[name], float) for name in ("matrices", "vectors"))
    count = len(first) + len(second)
    error = math.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
    spread = math.log(first.std(ddof=1) / second.std(ddof=1))
    # The variance of a standard deviation's logarithm depends on the fourth moment.
    excess = [
        (float(np.mean((x - x.mean()) ** 4)) / x.var() ** 2 - 1) / (4 * len(x))
        for x in (first, second)
    ]
    return [
        Measured(
            math.exp(value), math.exp(value - 1.96 * half), math.exp(value + 1.96 * half),
            num_runs=count, run=run,
        )
        for value, half, run in (
            (float(first.mean() - second.mean()), error, what),
            (spread, math.sqrt(sum(excess)), f"spread of {what}"),
        )
    ]  # fmt: skip


# -- norms --------------------------------------------------------------------------------------


def _means(
    found: curves.Curves, run: str, value: Callable[[int, curves.Array], curves.Array]
) -> list[Measured]:
    """Mean over seeds of a function of the values, at each depth."""
    return [over_runs(value(depth, x), run=f"{run}, L={depth}") for depth, x in found.items()]


def _deep(found: curves.Curves, least: int = 1000) -> curves.Curves:
    return {depth: values for depth, values in found.items() if depth >= least}


def _norm(logs: Measured, expected: float | None = None) -> Measured:
    """From the logarithm of a norm to the norm."""
    low, high = logs.enclosure
    return Measured(
        math.exp(logs.value), math.exp(low), math.exp(high), expected=expected,
        num_runs=logs.num_runs, run=logs.run,
    )  # fmt: skip


def _forward(measured: Sequence[Pair]) -> list[Verdict]:
    logs = {rule: curves.norms(measured, "forward", rule) for rule in RULES}
    highest = {rule: curves.norms(measured, "highest", rule) for rule in BOUNDED}
    limits = []
    for rule in (HALF, SHARP):
        depth = max(logs[rule])
        mean = over_runs(logs[rule][depth], run=f"{rule}, L={depth}")
        limits.append(_norm(mean, math.exp(theory.limit_log_growth(RULES[rule].kappa))))
    predicted, places = [], []
    for rule in (SHARP, *UNBOUNDED):
        for depth, values in logs[rule].items():
            tau, run = RULES[rule].tau(depth), f"{rule}, L={depth}"
            if rule in (QUARTER, ONE) or depth <= MEAN_FIELD_DEPTH:
                expected = theory.mean_field_log_growth(tau, depth)
                predicted.append(replace(over_runs(values, run=run), expected=expected))
            if rule in (QUARTER, ONE):
                low, high = theory.log_growth_bounds(tau, depth)
                places.append(over_runs((2 * values - low) / (high - low), run=run))
    return [
        _every("forward.stable", [curves.slopes(logs[rule], rule) for rule in BOUNDED]),
        _every("forward.path", [curves.slopes(highest[rule], rule) for rule in BOUNDED]),
        _every("forward.limit", limits, _ratios(logs[SHARP])),
        _every("forward.mean-field", predicted),
        _every("forward.bounds", places),
    ]


def _ratios(logs: curves.Curves) -> str:
    """Geometric means at each depth, for a reader."""
    means = "; ".join(f"L={depth}: {math.exp(x.mean()):.3f}" for depth, x in logs.items())
    return f"at 1/√L {means}"


def _converse(measured: Sequence[Pair]) -> list[Verdict]:
    growth, squared = [], []
    for rule in UNBOUNDED:
        c, logs = RULES[rule].excess, curves.norms(measured, "forward", rule)
        growth += _means(logs, rule, lambda depth, x, c=c: x / (c * math.log(depth)))  # type: ignore[misc]
        squared += _means(
            logs, rule, lambda depth, x, c=c: 2 * x / math.log1p(depth ** (2 * c) / 2)  # type: ignore[misc]
        )  # fmt: skip
    quarter, one = (curves.norms(measured, "forward", rule) for rule in (QUARTER, ONE))
    rates = [
        replace(rate, expected=theory.mean_field_log_growth(1.0, depth) / depth)
        for depth, rate in zip(
            _deep(one), _means(_deep(one), ONE, lambda depth, x: x / depth), strict=True
        )
    ]
    return [
        _every("converse.growth", growth),
        _every("converse.squared", squared),
        decide(BY_ID["converse.stretched"], curves.slopes(quarter, QUARTER, log=True)),
        _every("converse.rate", rates),
    ]


def _backward(measured: Sequence[Pair]) -> list[Verdict]:
    logs = {rule: curves.norms(measured, "backward", rule) for rule in RULES}
    spread = {rule: curves.spread(measured, rule) for rule in BOUNDED}
    forward = curves.norms(measured, "forward", ONE)
    ratios = _means(_deep(logs[ONE]), ONE, lambda depth, x: x / forward[depth])
    deepest = max(logs[ABOVE])
    above = (
        f"at L^-0.4 |g_0|/|g_L| is {math.exp(logs[ABOVE][deepest].mean()):.3g} at L={deepest}, "
        f"at L^-1/4 1e{logs[QUARTER][deepest].mean() / math.log(10):.1f}"
    )
    return [
        _every("backward.stable", [curves.slopes(logs[rule], rule) for rule in BOUNDED]),
        _every(
            "backward.spread",
            [curves.slopes(spread[rule], rule) for rule in BOUNDED],
            f"from L = 30 on {_shown(curves.slopes(spread[SHARP], SHARP, least=30))} at 1/√L",
        ),
        _every("backward.explodes", ratios, above),
    ]


def _shown(found: Measured) -> str:
    low, high = found.enclosure
    return f"{found.value:.3f} [{low:.3f}, {high:.3f}]"


def _product(measured: Sequence[Pair]) -> list[Verdict]:
    logs = {rule: curves.spectral_norms(measured, rule) for rule in BOUNDED}
    explode = []
    for rule in (QUARTER, ONE):
        low, c = curves.spectral_norms(measured, rule, "low"), RULES[rule].excess
        explode += _means(low, rule, lambda depth, x, c=c: x / (c * math.log(depth)))  # type: ignore[misc]
    low = curves.spectral_norms(measured, SHARP, "low")
    means = "; ".join(
        f"{rule}: {', '.join(f'{math.exp(x.mean()):.3g}' for x in logs[rule].values())}"
        for rule in BOUNDED
    )
    depths = ", ".join(map(str, logs[SHARP]))
    return [
        _every(
            "product.stable", [curves.slopes(logs[rule], rule) for rule in BOUNDED],
            f"geometric means at L = {depths}: {means}",
        ),
        _every("product.explodes", explode),
        _every("product.constant", _means(low, SHARP, lambda _, x: np.exp(x))),
    ]  # fmt: skip


# -- descent ------------------------------------------------------------------------------------


def _ratios_of_losses(measured: Sequence[Pair], part: str) -> list[Measured]:
    sharp, linear = (curves.last_losses(measured, part, rule) for rule in (SHARP, LINEAR))
    return [ratio_of_groups(sharp[depth], linear[depth], run=f"L={depth}") for depth in sharp]


def _descent(measured: Sequence[Pair]) -> list[Verdict]:
    level = ZERO_OUTPUTS / 10
    steps = {
        depth: curves.steps_to(rows, level)
        for depth, rows in curves.losses(measured, "descent", SHARP).items()
    }
    exponents = _exponents(steps, measured)
    means = ", ".join(f"{x.mean():.0f} at L={depth}" for depth, x in steps.items())
    reached = {
        f"L={depth} seed={seed}": bool(np.isfinite(step))
        for depth, row in steps.items()
        for seed, step in enumerate(row)
    }
    quarter = curves.last_losses(measured, "descent", QUARTER)
    return [
        decide(BY_ID["descent.depth-free"], exponents, note=f"mean steps {means}"),
        decide_all(BY_ID["descent.global"], reached),
        _every("descent.sharp-faster", _ratios_of_losses(measured, "descent")),
        decide_all(BY_ID["descent.diverges"], _diverged(quarter, 100)),
    ]


def _exponents(steps: curves.Curves, measured: Sequence[Pair]) -> Measured:
    """Exponents of a power law in the depth, one for each seed.

    Where deep nets do not reach the level, what is known is that the exponent is at least that of
    the steps that they made.
    """
    made = {d: len(rows) for d, rows in curves.losses(measured, "descent", SHARP).items()}
    known = {d: np.where(np.isfinite(x), x, made[d]) for d, x in steps.items()}
    found = curves.slopes({d: np.log(x) for d, x in known.items()}, SHARP, least=1)
    censored = [depth for depth, x in steps.items() if not np.isfinite(x).all()]
    if not censored:
        return found
    if min(censored) == min(steps):
        return Measured(math.nan, num_runs=found.num_runs, run=found.run)
    low, _ = found.enclosure
    return Measured(found.value, low, math.inf, num_runs=found.num_runs, run=found.run)


def _diverged(losses: curves.Curves, least: int) -> dict[str, bool | None]:
    return {
        f"L={depth} seed={seed}": bool(math.isinf(last))
        for depth, row in losses.items()
        if depth >= least
        for seed, last in enumerate(row)
    }


def _images(measured: Sequence[Pair]) -> list[Verdict]:
    learnt: dict[str, bool | None] = {
        f"{rule} L={depth} seed={seed}": bool(last < ZERO_OUTPUTS / 2)
        for rule in (LINEAR, SHARP)
        for depth, row in curves.last_losses(measured, "images", rule).items()
        for seed, last in enumerate(row)
    }
    quarter = curves.last_losses(measured, "images", QUARTER)
    return [
        decide_all(BY_ID["images.train"], learnt),
        _every("images.sharp-faster", _ratios_of_losses(measured, "images")),
        decide_all(BY_ID["images.diverges"], _diverged(quarter, max(quarter, default=0))),
    ]


# -- ResNets ------------------------------------------------------------------------------------


def errors(measured: Sequence[Pair], net: str) -> dict[int, dict[int, float]]:
    """Errors on held-out images by size and seed; that of guessing for a net that diverged."""
    found: dict[int, dict[int, float]] = {}
    for cell, result in parts(measured, "train", net=net):
        diverged = result["status"] == "diverged"
        error = 1 - math.exp(-result["chance"]) if diverged else number(result["final_error"])
        found.setdefault(cell["n"], {})[cell["seed"]] = error
    return dict(sorted(found.items()))


def _differences(
    first: Mapping[int, float], second: Mapping[int, float], run: str, expected: float
) -> Measured:
    seeds = sorted(set(first) & set(second))
    return over_runs([first[s] - second[s] for s in seeds], expected=expected, run=run)


def _with_norm(measured: Sequence[Pair]) -> list[Verdict]:
    plain, tau = errors(measured, BN), errors(measured, BN_TAU)
    shallow, deep = min(tau), max(tau)
    images = next(r["num_test"] for _, r in parts(measured, "train", net=BN_TAU))
    p = float(np.mean(list(tau[shallow].values())))
    slack = math.sqrt(2 * p * (1 - p) / images)
    note = "; ".join(
        f"ResNet-{6 * n + 2}: {np.mean(list(plain[n].values())):.3f} without, "
        f"{np.mean(list(tau[n].values())):.3f} with"
        for n in tau
    )
    epochs = next(r["epochs"] for _, r in parts(measured, "train", net=BN_TAU))
    note += f"; after {epochs:.3g} epochs, {_losses(measured, deep)}"

    def counted(of_seed: Mapping[int, float]) -> curves.Array:
        return np.array([error + 0.5 / images for error in of_seed.values()])

    gains = {n: counted(plain[n]) / counted(tau[n]) for n in (shallow, deep)}
    if shallow == deep:
        # A depth is not compared with itself.
        grows = degrades = Measured(math.nan, num_runs=0)
        keeps = replace(grows, expected=slack)
    else:
        both = f"n={deep} against n={shallow}"
        grows = ratio_of_groups(gains[deep], gains[shallow], run=both)
        degrades = ratio_of_groups(counted(plain[deep]), counted(plain[shallow]), run=both)
        keeps = _differences(tau[deep], tau[shallow], both, slack)
    lower = ratio_of_groups(counted(tau[deep]), counted(plain[deep]), run=f"n={deep}")
    return [
        decide(BY_ID["bn.deep"], lower, note=note),
        decide(BY_ID["bn.gain-grows"], grows),
        decide(BY_ID["bn.degradation"], degrades),
        decide(BY_ID["bn.no-degradation"], keeps),
    ]


def _losses(measured: Sequence[Pair], n: int) -> str:
    """Training losses of the deepest nets with BatchNorm, for a reader."""
    means = [
        np.mean(
            [
                loss(result) * result["chance"]
                for _, result in parts(measured, "train", net=net, n=n)
            ]
        )
        for net in (BN, BN_TAU)
    ]
    return f"training losses of ResNet-{6 * n + 2} {means[0]:.2g} without, {means[1]:.2g} with"


def _without_norm(measured: Sequence[Pair]) -> list[Verdict]:
    def losses(net: str, n: int) -> list[float]:
        return [loss(result) for _, result in parts(measured, "train", net=net, n=n)]

    sizes = sorted({cell["n"] for cell, _ in parts(measured, "train", net=FREE_TAU)})
    learnt = [over_runs(losses(FREE_TAU, n), run=f"n={n}") for n in sizes]
    deepest = sizes[-1]
    ratios = {
        net: ratio_of_groups(losses(net, deepest), losses(FREE_TAU, deepest), run=f"n={deepest}")
        for net in (FREE, FREE_QUARTER)
    }
    return [
        _every("free.train", learnt, _ends(measured, FREE_TAU)),
        decide(BY_ID["free.without"], ratios[FREE], note=_ends(measured, FREE)),
        decide(BY_ID["free.larger"], ratios[FREE_QUARTER], note=_ends(measured, FREE_QUARTER)),
    ]


def _ends(measured: Sequence[Pair], net: str) -> str:
    """How trainings of each size ended, for a reader."""
    found: dict[int, list[dict[str, Any]]] = {}
    for cell, result in parts(measured, "train", net=net):
        found.setdefault(cell["n"], []).append(dict(result))
    return "; ".join(
        f"n={n}: {sum(r['status'] == 'diverged' for r in rows)} of {len(rows)} diverge, "
        f"{sum(has_learnt(r) for r in rows)} end below half of the loss of guessing"
        for n, rows in sorted(found.items())
    )
