"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from conditioning import theory
from experiments.claims import Measured, Verdict, decide, decide_every, over_runs
from experiments.large_depth import frontier
from experiments.large_depth.statements import BY_ID, CLAIMS
from experiments.readings import Array, slope
from experiments.sweep import Pair, name, parts

Context = Mapping[str, Any]
# Numbers over depths: depth -> (nets, scalings).
ByDepth = Mapping[int, Array]
KEYS = ("output", "gradient")


def decide_claims(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_checks(measured),
        *_moments(measured, context),
        *_independent(measured, context),
        *_smooth(measured),
        *_laws(measured, context),
        *_orders(measured, context),
        *_maps(measured, context),
        *_regularity(measured),
        *_accuracy(measured, context),
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
        depth: np.exp(2 * logs[:, place])
        / theory.deviation_second_moment(depth, theory.scaling_factor(depth, beta))
        for depth, logs in found.items()
    }


def _moments(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    betas = context["sizes"].iid_betas
    verdicts = []
    for key, prefix in (("output", ""), ("gradient", "gradient-")):
        found = by_depth(measured, "iid", key)
        for place, kind in enumerate(("explosion", "balanced", "identity")):
            claim = f"moment.{prefix}{kind}"
            if claim in BY_ID:
                ratios = np.concatenate([*moment_ratios(found, place, betas[place]).values()])
                verdicts.append(decide(BY_ID[claim], over_runs(ratios, run=_range(found))))
    return verdicts


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
    verdicts = []
    for key, prefix in (("output", "iid"), ("gradient", "gradient")):
        found = by_depth(measured, "iid", key)
        verdicts += [
            decide(BY_ID[f"{prefix}.{kind}"], slopes(found, place), note=_levels(found, place))
            for place, kind in ((2, "identity"), (1, "balanced"), (0, "explodes"))
        ]
    found = by_depth(measured, "iid", "output")
    mean, _ = theory.limit_log_norm_law(context["sizes"].width)
    rate = replace(slopes(found, 0, math.sqrt, since=100), expected=mean / 2)
    return [*verdicts, decide(BY_ID["iid.rate"], rate)]


# Bandwidths of the smooth weights are ten layers and more from this depth on.
_RESOLVED = 100


def _smooth(measured: Sequence[Pair]) -> list[Verdict]:
    variants = sorted({cell["variant"] for cell, _ in parts(measured, "smooth")})
    verdicts = []
    for place, kind, since in (
        (2, "identity", _RESOLVED),
        (1, "balanced", _RESOLVED),
        (1, "shallow", 0),
        (0, "explodes", 0),
    ):
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
    mean, variance = theory.limit_log_norm_law(sizes.law_width)
    run = f"L = {sizes.law_depth}, d = {sizes.law_width}"
    verdicts = []
    for key, prefix in (("output", ""), ("gradient", "gradient-")):
        logs = law_logs(measured, key)
        expected = mean / 2, math.sqrt(variance) / 2
        verdicts += [
            decide(BY_ID[f"law.{prefix}mean"], over_runs(logs, expected=expected[0], run=run)),
            decide(BY_ID[f"law.{prefix}spread"], spread(logs, expected=expected[1], run=run)),
        ]
    [(cell, result)] = parts(measured, "chain")
    logs = np.asarray(result["logs"], dtype=float)
    distance = kolmogorov_distance(logs, cell["d"], run=name(cell))
    ratios = np.exp(logs)
    note = f"ratio: mean {ratios.mean():.4g}, standard deviation {ratios.std(ddof=1):.3g}"
    return [*verdicts, decide(BY_ID["law.shape"], distance, note=note)]


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


# -- maps ---------------------------------------------------------------------------------------


def _maps(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    sizes = context["sizes"]
    betas, depth = sizes.map_betas, sizes.map_depth
    output = frontier.crossings(measured, betas, "res-3")
    slow = frontier.crossings(measured, betas, "res-3", "gradient")
    single = frontier.crossings(measured, betas, "res-1")

    def on_line(
        claim: str, found: Mapping[float, list[float]], block: str, **more: bool
    ) -> Verdict:
        lines = [
            over_runs(
                values, run=f"H = {hurst}",
                expected=theory.critical_beta(depth, hurst, block, **more),
            )
            for hurst, values in found.items()
        ]  # fmt: skip
        return decide_every(BY_ID[claim], lines, note=_departures(lines))

    rising = [hurst for hurst in output if hurst >= 0.5]
    gaps = [over_runs(np.subtract(slow[h], output[h]).tolist(), run=f"H = {h}") for h in output]
    rises = [_difference(output, b, a) for a, b in itertools.pairwise(rising)]
    return [
        on_line("map.line", output, "res-3"),
        on_line("map.line-first", output, "res-3", compounded=False),
        decide_every(
            BY_ID["map.plateau"], [_difference(output, h, 0.5) for h in output if h < 0.5]
        ),
        decide_every(BY_ID["map.rises"], rises),
        decide(BY_ID["map.end"], _difference(output, max(output), 0.5)),
        decide_every(BY_ID["map.gradient"], gaps, note=_by_hurst(gaps)),
        on_line("map.gradient-line", slow, "res-3", gradient=True),
        decide_every(
            BY_ID["map.no-plateau"], [_difference(single, h, 0.5) for h in single if h < 0.5]
        ),
        on_line("map.single", {h: v for h, v in single.items() if h >= 0.5}, "res-1"),
        on_line("map.single-rough", {h: v for h, v in single.items() if h < 0.5}, "res-1"),
    ]  # fmt: skip


def _difference(found: Mapping[float, list[float]], hurst: float, other: float) -> Measured:
    """Nets of different H are independent: any pairing gives the mean and its interval."""
    values = np.subtract(found[hurst], found[other]).tolist()
    return over_runs(values, run=f"H = {hurst} less {other}")


def _by_hurst(gaps: Sequence[Measured]) -> str:
    """Means at every H, for a reader."""
    return ", ".join(f"{gap.run}: {gap.value:+.3f}" for gap in gaps)


def _departures(lines: Sequence[Measured]) -> str:
    """How far the means are off, for a reader."""
    gaps = [one.value - (one.expected or 0.0) for one in lines]
    return f"means are {min(gaps):+.3f} ... {max(gaps):+.3f} off" if gaps else ""


# -- trained nets -------------------------------------------------------------------------------


def _regularity(measured: Sequence[Pair]) -> list[Verdict]:
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell, result in parts(measured, "regularity"):
        groups.setdefault((cell["init"], cell["beta"]), []).append(result)
    kept = {
        key: over_runs([r["after"] - r["before"] for r in results], run=f"{key[0]}, β = {key[1]:g}")
        for key, results in groups.items()
    }
    notes = {key: _trained(results) for key, results in groups.items()}
    smooth = [key for key in kept if key[0] == "smooth"]
    rough = [key for key in kept if key[0] != "smooth"]
    changes = [
        over_runs([result["change"] for result in groups[key]], run=kept[key].run) for key in smooth
    ]
    return [
        decide_every(BY_ID["regularity.smooth"], [kept[key] for key in smooth],
                     note="; ".join(notes[key] for key in smooth)),
        decide_every(BY_ID["regularity.rough"], [kept[key] for key in rough],
                     note="; ".join(f"{kept[key].run}: {notes[key]}" for key in rough)),
        decide_every(BY_ID["regularity.change"], changes),
    ]  # fmt: skip


def _trained(results: Sequence[Mapping[str, Any]]) -> str:
    """How much training did, for a reader."""
    before, after, moved, accuracy = (
        float(np.mean([result[key] for result in results]))
        for key in ("before", "after", "moved", "accuracy")
    )
    return (
        f"exponent {before:.3f} before, {after:.3f} after; layers moved by {moved:.2g} of their "
        f"norm, accuracy {accuracy:.3f}"
    )


def _accuracy(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    sizes = context["sizes"]
    betas, chance = sizes.train_betas, context["commonest"]
    best = frontier.best_accuracies(measured)
    hursts = list(next(iter(best.values())))
    tables = np.array([[rows[hurst] for hurst in hursts] for rows in best.values()])
    above = frontier.above_line(hursts, betas, sizes.train_depth)

    def at(row: int, column: int) -> Measured:
        run = f"H = {hursts[row]}, β = {betas[column]}"
        return over_runs(tables[:, row, column].tolist(), expected=chance, run=run)

    below = [at(row, column) for row, column in np.argwhere(~above).tolist()]
    both = 0 < above.sum() < above.size
    gaps = [
        float(table[above].mean() - table[~above].mean()) if both else math.nan for table in tables
    ]
    note = ""
    if both:
        note = (
            f"means {tables[:, above].mean():.3f} above, {tables[:, ~above].mean():.3f} below; "
            f"least above {tables.mean(0)[above].min():.3f}, "
            f"greatest below {tables.mean(0)[~above].max():.3f}"
        )
    return [
        decide(
            BY_ID["accuracy.above"], over_runs(gaps, run=f"L = {sizes.train_depth}"), note=note
        ),
        decide(BY_ID["accuracy.corner"], at(len(hursts) - 1, 0)),
        decide_every(BY_ID["accuracy.below"], below),
    ]  # fmt: skip
