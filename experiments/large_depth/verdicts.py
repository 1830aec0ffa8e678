"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from conditioning import theory
from experiments.claims import Measured, Verdict, decide, decide_every, over_runs
from experiments.large_depth.statements import BY_ID, CLAIMS
from experiments.large_depth.verdicts_maps import decide_maps
from experiments.large_depth.verdicts_trained import decide_accuracy, decide_regularity
from experiments.readings import Array, slope
from experiments.sweep import Pair, name, parts

Context = Mapping[str, Any]
# Numbers over depths: depth -> (nets, scalings).
ByDepth = Mapping[int, Array]
KEYS = ("output", "gradient")
# The scalings that claims are about.
INDEPENDENT = {"identity": 1.0, "balanced": 0.5, "explodes": 0.25}
SMOOTH = {"identity": 2.0, "balanced": 1.0, "shallow": 1.0, "explodes": 0.5}


def decide_claims(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_checks(measured),
        *_moments(measured, context),
        *_independent(measured, context),
        *_smooth(measured, context),
        *_laws(measured, context),
        *_orders(measured, context),
        *decide_maps(measured, context),
        *decide_regularity(measured),
        *decide_accuracy(measured, context),
    ]
    by_id = {verdict.claim.id: verdict for verdict in found}
    return [by_id[claim.id] for claim in CLAIMS]


def _checks(measured: Sequence[Pair]) -> list[Verdict]:
    errors = {c["what"]: r for c, r in parts(measured, "check")}
    verdicts = [
        decide(BY_ID[f"check.{what}"], Measured(errors[what]["error"]))
        for what in ("gradient", "training", "embedding")
    ]
    scores = errors["noise"]["scores"]
    scored = [Measured(score, run=run) for run, score in scores.items()]
    return [*verdicts, decide_every(BY_ID["check.noise"], scored)]


# -- nets at initialisation, over depths --------------------------------------------------------


def by_depth(measured: Sequence[Pair], part: str, key: str, **where: Any) -> dict[int, Array]:
    """Natural logarithms of movements, shape (nets, scalings), by depth."""
    rows: dict[int, list[Any]] = {}
    for cell, result in parts(measured, part, **where):
        rows.setdefault(cell["L"], []).extend(result[key])
    return {depth: np.asarray(rows[depth], dtype=float) for depth in sorted(rows)}


def moment_ratios(found: ByDepth, place: int, beta: float) -> dict[int, Array]:
    """Squared movements over their exact mean, by depth."""
    return {
        depth: _over(
            logs[:, place],
            theory.deviation_second_moment(depth, theory.scaling_factor(depth, beta)),
        )
        for depth, logs in found.items()
    }


def _over(logs: Array, square: float) -> Array:
    """Squares of numbers given by their logarithms, over another."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(2 * logs - math.log(square)), dtype=float)


def _moments(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    betas = context["sizes"].iid_betas
    verdicts = []
    for key, prefix in (("output", ""), ("gradient", "gradient-")):
        found = by_depth(measured, "iid", key)
        for kind, beta in INDEPENDENT.items():
            ratios = moment_ratios(found, betas.index(beta), beta)
            claim = BY_ID[f"moment.{prefix}{kind.replace('explodes', 'explosion')}"]
            pooled = over_runs(np.concatenate([*ratios.values()]), run=_range(found))
            verdicts.append(decide(claim, pooled, note=_scores(ratios)))
    return verdicts


def standard_errors_off(ratios: Array) -> float:
    """How far the mean is from 1; NaN without a spread."""
    error = ratios.std(ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return float((ratios.mean() - 1) / error) if 0 < error < math.inf else math.nan


def _scores(ratios: ByDepth) -> str:
    """How far off single depths are, for a reader."""
    scores = {depth: standard_errors_off(values) for depth, values in ratios.items()}
    finite = {depth: score for depth, score in scores.items() if math.isfinite(score)}
    if not finite:
        return ""
    worst = max(finite, key=lambda depth: abs(finite[depth]))
    beyond = sum(abs(score) > 3 for score in finite.values())
    return (
        f"by itself farthest off: L = {worst}, by {finite[worst]:+.1f} standard errors; "
        f"{beyond} of {len(scores)} depths are more than 3 off"
    )


def _range(found: ByDepth) -> str:
    depths = list(found)
    return f"L = {depths[0]} ... {depths[-1]}"


def slopes(
    found: ByDepth, place: int, x: Callable[[float], float] = math.log, since: int = 0
) -> Measured:
    """Slope of logarithms in ``x(L)``, for every net with one of each depth; their mean."""
    used = {depth: logs for depth, logs in found.items() if depth >= since}
    count = min((len(logs) for logs in used.values()), default=0)
    values = [
        slope({depth: float(logs[net, place]) for depth, logs in used.items()}, x, float)
        for net in range(count)
    ]
    return over_runs(values, run=_range(used) if used else "")


def _levels(found: ByDepth, place: int) -> str:
    """Mean movements at the ends, for a reader."""
    depths = [min(found), max(found)]
    return "means " + ", ".join(
        f"{np.exp(found[depth][:, place]).mean():.3g} at L = {depth}" for depth in depths
    )


def _independent(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    betas, verdicts = context["sizes"].iid_betas, []
    for key, prefix in (("output", "iid"), ("gradient", "gradient")):
        found = by_depth(measured, "iid", key)
        verdicts += [
            decide(
                BY_ID[f"{prefix}.{kind}"], slopes(found, betas.index(beta)),
                note=_levels(found, betas.index(beta)),
            )
            for kind, beta in INDEPENDENT.items()
        ]  # fmt: skip
    return [*verdicts, _rate(measured)]


def _rate(measured: Sequence[Pair]) -> Verdict:
    chains = {cell["L"]: (cell["d"], result) for cell, result in parts(measured, "growth")}
    [width] = {size for size, _ in chains.values()}
    table = np.array([result["logs"] for _, result in chains.values()], dtype=float)
    roots = np.sqrt(np.array([*chains], dtype=float))
    # The least-squares slope of every draw with one of each depth.
    weights = (roots - roots.mean()) / ((roots - roots.mean()) ** 2).sum()
    rates = weights @ table
    run = f"L = {min(chains)} ... {max(chains)}, d = {width}"
    return decide(
        BY_ID["iid.rate"], over_runs(ito_units(rates, width).tolist(), run=run),
        note=f"rate {rates.mean():.4f} for {1 / 4 - 1 / (2 * width):.4f}",
    )  # fmt: skip


def ito_units(rates: Array, width: int) -> Array:
    """How far rates or mean logarithms lie below 1/4, in units of 1 / (2 width)."""
    return np.asarray((1 / 4 - rates) * 2 * width, dtype=float)


# Bandwidths of the smooth weights are ten layers and more from this depth on.
_RESOLVED = 100


def _smooth(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    variants = sorted({cell["variant"] for cell, _ in parts(measured, "smooth")})
    verdicts = []
    for kind, beta in SMOOTH.items():
        place = context["sizes"].smooth_betas.index(beta)
        since = _RESOLVED if kind in ("identity", "balanced") else 0
        found, notes = [], []
        for variant in variants:
            for key in KEYS:
                curves = by_depth(measured, "smooth", key, variant=variant)
                one = slopes(curves, place, since=since)
                found.append(replace(one, run=f"{variant}, {key}, {one.run}"))
                if since == 0:
                    notes.append(f"{variant}, {key}: {_levels(curves, place)}")
        verdicts.append(decide_every(BY_ID[f"smooth.{kind}"], found, note="; ".join(notes)))
    return verdicts


# -- limits -------------------------------------------------------------------------------------


def spread(values: Sequence[float] | Array, *, expected: float, run: str = "") -> Measured:
    """Standard deviation of a normal variable with its 95 % interval (chi-square)."""
    runs = np.asarray(values, dtype=float)
    count = len(runs)
    if count < 2 or not np.isfinite(runs).all():
        return Measured(math.nan, expected=expected, num_runs=count, run=run)
    value = float(runs.std(ddof=1))
    quantiles = stats.chi2.ppf((0.975, 0.025), count - 1)
    low, high = (value * math.sqrt((count - 1) / quantile) for quantile in quantiles)
    return Measured(value, low, high, expected=expected, num_runs=count, run=run)


def kolmogorov_distance(logs: Sequence[float] | Array, width: int, *, run: str = "") -> Measured:
    """Distance of the law of log norms from its limit, with the band of DKW and Massart."""
    mean, variance = theory.limit_log_norm_law(width)
    if not len(logs) or not np.isfinite(logs).all():
        return Measured(math.nan, num_runs=len(logs), run=run)
    found = stats.kstest(logs, stats.norm(mean / 2, math.sqrt(variance) / 2).cdf)
    distance, count = float(found.statistic), len(logs)
    band = math.sqrt(math.log(2 / 0.05) / (2 * count))
    return Measured(
        distance, max(distance - band, 0.0), distance + band, num_runs=count, run=run
    )  # fmt: skip


def law_logs(measured: Sequence[Pair], key: str) -> Array:
    """Natural logarithms of the norm ratios of all nets."""
    return np.concatenate([np.asarray(r[key], dtype=float) for _, r in parts(measured, "law")])


def _laws(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    sizes = context["sizes"]
    run = f"L = {sizes.law_depth}, d = {sizes.law_width}"
    [(cell, result)] = parts(measured, "chain")
    logs = np.asarray(result["logs"], dtype=float)
    verdicts = [
        *_law("", law_logs(measured, "output"), sizes.law_width, run),
        *_law("gradient-", law_logs(measured, "gradient"), sizes.law_width, run),
        *_law("chain-", logs, cell["d"], name(cell)),
    ]
    distance = kolmogorov_distance(logs, cell["d"], run=name(cell))
    ratios = np.exp(logs)
    note = f"ratio: mean {ratios.mean():.4g}, standard deviation {ratios.std(ddof=1):.3g}"
    return [*verdicts, decide(BY_ID["law.shape"], distance, note=note)]


def _law(prefix: str, logs: Array, width: int, run: str) -> list[Verdict]:
    mean, variance = theory.limit_log_norm_law(width)
    return [
        decide(
            BY_ID[f"law.{prefix}mean"], over_runs(ito_units(logs, width).tolist(), run=run),
            note=f"mean logarithm {logs.mean():.4f} for {mean / 2:.4f}",
        ),
        decide(
            BY_ID[f"law.{prefix}spread"],
            spread(logs, expected=math.sqrt(variance) / 2, run=run),
        ),
    ]  # fmt: skip


def distances(
    measured: Sequence[Pair], limit: str, block: str, depths: Sequence[int]
) -> dict[int, Array]:
    """Distances of nets of depth L and 2 L by L, shape (nets, 1)."""
    rows = [
        np.asarray(result["distances"], dtype=float)
        for _, result in parts(measured, "order", limit=limit, block=block)
    ]
    table = np.concatenate(rows, axis=1)
    return {depth: row[:, None] for depth, row in zip(depths, table, strict=True)}


def _orders(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    found: dict[str, list[Measured]] = {}
    depths = context["sizes"].order_depths
    for cell, _ in parts(measured, "order"):
        curve = distances(measured, cell["limit"], cell["block"], depths)
        one = slopes({depth: np.log(values) for depth, values in curve.items()}, 0)
        run = f"{cell['block']}, {one.run}"
        found.setdefault(cell["limit"], []).append(replace(one, run=run))
    return [decide_every(BY_ID[f"order.{limit}"], some) for limit, some in found.items()]
