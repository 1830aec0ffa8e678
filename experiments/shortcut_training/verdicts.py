"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from conditioning import theory
from experiments.claims import (
    Measured,
    Verdict,
    decide,
    decide_all,
    decide_every,
    over_runs,
)
from experiments.models.shortcut_kinds import (
    ONE,
    ORTHOGONAL,
    SHORTCUT_KINDS,
    THREE,
    TWO,
    TWO_XAVIER,
    XAVIER,
)
from experiments.readings import (
    enclosed,
    growth_exponent,
    number,
    power_law,
    ratio_of_groups,
    slope,
)
from experiments.shortcut_training import along
from experiments.shortcut_training.best import Sweep, depths_of, sweeps
from experiments.shortcut_training.statements import BY_ID, CLAIMS
from experiments.sweep import Pair, name, parts

Swept = dict[tuple[str, int], Sweep]
Context = Mapping[str, Any]


def decide_claims(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    """Decide every claim, in their order."""
    linear, relu = sweeps(measured, "sweep"), sweeps(measured, "relu")
    found = [
        _check(measured),
        *_start(measured, context),
        *_losses(linear),
        *_rates(linear),
        *_norms(linear),
        *_kappas(measured, context),
        *_indices(measured, context),
        *_relu(relu),
    ]
    by_id = {verdict.claim.id: verdict for verdict in found}
    return [by_id[claim.id] for claim in CLAIMS]


def _check(measured: Sequence[Pair]) -> Verdict:
    cells = parts(measured, "check")
    return decide_every(
        BY_ID["check.descent"],
        [Measured(max(r["weights"], r["loss"]), run=name(c)) for c, r in cells],
    )


# -- initial weights ----------------------------------------------------------------------------


def _start(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    moment = torch.diag(torch.tensor(context["singular_values"], dtype=torch.float64))
    flat = []
    for cell, result in parts(measured, "start", net=TWO):
        exact = theory.two_shortcut_spectrum(moment, cell["L"] // 2)
        expected = exact.condition_number(percentile=10)
        flat.append(enclosed(result["kappa10"], expected=expected, run=name(cell)))
    explode = []
    for cell, result in parts(measured, "start", net=XAVIER):
        low, high = (number(result["kappa10"][end]) for end in ("low", "high"))
        if cell["L"] >= 16:
            explode.append(Measured(low, low, high, run=name(cell)))
    return [
        decide_every(BY_ID["start.flat"], flat),
        decide(BY_ID["start.linear"], _growth(measured, ORTHOGONAL)),
        decide_every(BY_ID["start.explodes"], explode),
    ]


def _growth(measured: Sequence[Pair], net: str) -> Measured:
    by_seed: dict[int, dict[int, float]] = {}
    for cell, result in parts(measured, "start", net=net):
        by_seed.setdefault(cell["seed"], {})[cell["L"]] = along.kappa10(result)
    return over_runs([growth_exponent(curve).value for curve in by_seed.values()], run=net)


# -- the sweep of linear nets -------------------------------------------------------------------


def _below_all(swept: Swept, claim: str, others: Sequence[str], note: str = "") -> Verdict:
    """The final losses of the 2-shortcut net over those of others, at every depth."""
    pairs = [
        (swept[TWO, depth], swept[other, depth])
        for depth in depths_of(swept, TWO)
        for other in others
        if (other, depth) in swept
    ]
    ratios = [ratio_of_groups(two.final, other.final, run=other.run) for two, other in pairs]
    verdict = decide_every(BY_ID[claim], ratios, note=note)
    return replace(verdict, num_runs=_num_runs(sweep for pair in pairs for sweep in pair))


def _num_runs(some: Iterable[Sweep]) -> int:
    """Nets at their best learning rate, each counted once."""
    return sum({(sweep.net, sweep.depth): len(sweep.final) for sweep in some}.values())


def _deepest(swept: Swept, net: str) -> Measured:
    """Final losses of the deepest net over those of the shallowest."""
    depths = depths_of(swept, net)
    if len(depths) < 2:
        return Measured(math.nan, run=net)
    first, last = (swept[net, depth] for depth in (depths[0], depths[-1]))
    return ratio_of_groups(last.final, first.final, run=f"L = {last.depth} over {first.depth}")


def _by_depth(swept: Swept, net: str) -> str:
    """Mean final losses for a reader."""
    return "; ".join(
        f"L={depth}: {swept[net, depth].final.mean():.2g}" for depth in depths_of(swept, net)
    )


def _edges(swept: Swept) -> str:
    """Nets whose best learning rate is at the edge of the grid, for a reader; or nothing."""
    edges = [f"{sweep.run} ({sweep.edge})" for sweep in swept.values() if sweep.edge]
    return f"at the edge of the grid: {', '.join(edges)}" if edges else ""


def _losses(swept: Swept) -> list[Verdict]:
    near = [
        over_runs(swept[TWO, depth].final, run=swept[TWO, depth].run)
        for depth in depths_of(swept, TWO)
    ]
    diverged = {
        f"L={depth}": not swept[TWO_XAVIER, depth].trains
        for depth in depths_of(swept, TWO_XAVIER)
        if depth >= 24
    }
    shallow = [d for d in depths_of(swept, TWO_XAVIER) if d < 24]
    best = ", ".join(f"{swept[TWO_XAVIER, d].final.mean():.2g} at L={d}" for d in shallow)
    return [
        decide_every(BY_ID["loss.near-minimum"], near, note=_by_depth(swept, TWO)),
        _below_all(swept, "loss.beats-plain", (ORTHOGONAL, XAVIER)),
        _below_all(swept, "loss.beats-shortcuts", (ONE, THREE, TWO_XAVIER)),
        *(
            decide(BY_ID[claim], _deepest(swept, net), note=_by_depth(swept, net))
            for claim, net in (
                ("loss.xavier-degrades", XAVIER),
                ("loss.orthogonal-degrades", ORTHOGONAL),
                ("loss.one-degrades", ONE),
                ("loss.two-keeps", TWO),
            )
        ),
        decide_all(BY_ID["loss.full-xavier"], diverged, note=f"before: {best}" if best else ""),
    ]


def _rates(swept: Swept) -> list[Verdict]:
    larger = []
    for depth in depths_of(swept, TWO):
        two = swept[TWO, depth]
        step = float(two.rates[1] / two.rates[0])
        for other in (swept[net, depth] for net in SHORTCUT_KINDS if (net, depth) in swept):
            if other is not two and other.trains:
                # In steps of the grid, where neighbours are exactly one apart.
                first, second = two.best_range, other.best_range
                low, high = first[0] - second[1], first[1] - second[0]
                ratio = step ** (two.best - other.best)
                larger.append(Measured(ratio, step**low, step**high, run=other.run))
    note = _edges(swept) or "none at the grid's edge"

    def exponent(net: str) -> Measured:
        curve = {depth: swept[net, depth].rate for depth in depths_of(swept, net)}
        return power_law(curve, label=net)

    shown = ", ".join(f"{swept[TWO, depth].rate:.2g}" for depth in depths_of(swept, TWO))
    return [
        replace(
            decide_every(BY_ID["rate.larger"], larger, note=note),
            num_runs=_num_runs(sweep for sweep in swept.values() if sweep.trains),
        ),
        decide_every(BY_ID["rate.falls"], [exponent(ORTHOGONAL), exponent(ONE)]),
        decide(BY_ID["rate.keeps"], exponent(TWO), note=f"best rates {shown}"),
    ]


def _norms(swept: Swept) -> list[Verdict]:
    exponents, notes = {}, {}
    for net in (ONE, TWO, THREE):
        depths = depths_of(swept, net)
        rows = {depth: swept[net, depth].norms[swept[net, depth].best] for depth in depths}
        count = min((len(row) for row in rows.values()), default=0)
        curves = [{depth: float(rows[depth][seed]) for depth in depths} for seed in range(count)]
        values = [slope(curve, math.log, math.log) for curve in curves]
        exponents[net] = over_runs(values, run=f"{net}, L = {depths[0]} ... {depths[-1]}")
        means = {depth: float(rows[depth].mean()) for depth in depths}
        local = slope({d: means[d] for d in depths[-2:]}, math.log, math.log)
        notes[net] = f"between the deepest two {local:.2f}" + _at_one_rate(swept, net)
    three, two = (swept[net, depths_of(swept, net)[-1]] for net in (THREE, TWO))
    return [
        decide_every(BY_ID["norm.falls"], list(exponents.values())),
        decide(BY_ID["norm.rate-1"], exponents[ONE], note=notes[ONE]),
        decide(BY_ID["norm.rate-2"], exponents[TWO], note=notes[TWO]),
        decide(BY_ID["norm.rate-3"], exponents[THREE], note=notes[THREE]),
        decide(
            BY_ID["norm.few"],
            ratio_of_groups(three.shares[three.best], two.shares[two.best], run=three.run),
            note=f"means {three.shares[three.best].mean():.2f} and "
            f"{two.shares[two.best].mean():.2f}",
        ),
    ]


def _at_one_rate(swept: Swept, net: str) -> str:
    """The exponent at one learning rate for all depths, the least of the best, for a reader."""
    some = [swept[net, depth] for depth in depths_of(swept, net)]
    place = min(sweep.best for sweep in some)
    curve = {sweep.depth: float(sweep.norms[place].mean()) for sweep in some}
    rate, exponent = some[0].rates[place], slope(curve, math.log, math.log)
    return f"; at one learning rate for all depths, {rate:.2g}: {exponent:.2f}"


# -- along trainings ----------------------------------------------------------------------------


def _at_levels(
    measured: Sequence[Pair],
    context: Context,
    value: Callable[[along.Record], float],
    *,
    log: bool = True,
) -> dict[int, Measured]:
    """The 2-shortcut net over the orthogonal one at every level that both reach."""
    depth, levels = context["depth"], context["levels"]
    two, orthogonal = (along.paths(measured, net, depth) for net in (TWO, ORTHOGONAL))
    found = {}
    for place, level in enumerate(levels):
        groups = [
            # All begin near the first level, some a little below it.
            [value(path["records"][0]) for path in net]
            if place == 0
            else along.at_level(net, level, value, log=log)
            for net in (two, orthogonal)
        ]
        reached = sum(not math.isnan(one) for group in groups for one in group)
        run = f"loss {level:.2g} above the least" if place else "at the start"
        if reached < len(two) + len(orthogonal):
            # Those that come down so far need not be like the others.
            run += f", reached by {reached} of {len(two) + len(orthogonal)}"
        found[place] = ratio_of_groups(*groups, run=run)
    return found


def _at_every_level(claim: str, ratios: Mapping[int, Measured], note: str = "") -> Verdict:
    verdict = decide_every(BY_ID[claim], list(ratios.values()), note=note)
    # The same trainings at every level.
    return replace(verdict, num_runs=max((one.num_runs for one in ratios.values()), default=0))


def _nearest(context: Context, decades: float) -> int:
    """Which level lies so many decades below the first."""
    distances = [abs(math.log10(level / context["scale"]) + decades) for level in context["levels"]]
    return int(np.argmin(distances))


def _until(ratios: Mapping[int, Measured], context: Context) -> str:
    """Where the 2-shortcut net is first no longer below, for a reader."""
    for place, ratio in ratios.items():
        if ratio.value >= 1:
            loss = context["least_loss"] + context["levels"][place]
            back = [p for p, r in ratios.items() if p > place and r.value < 1]
            again = f", below again from {context['levels'][back[0]]:.2g} on" if back else ""
            level = context["levels"][place]
            return f"mean above from {level:.2g} above the least loss on (loss {loss:.2g}){again}"
    return "below at every level that all reach"


def _kappas(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    ratios = _at_levels(measured, context, along.kappa10)
    early = {place: one for place, one in ratios.items() if place <= _nearest(context, 1.0)}
    late, last = _nearest(context, 1.5), len(context["levels"]) - 1
    return [
        _at_every_level("path.smaller", ratios, _until(ratios, context)),
        _at_every_level("path.smaller-early", early),
        decide(BY_ID["path.larger-late"], ratios[late]),
        decide(BY_ID["path.same-end"], _log10(ratios[last])),
        _diverging(measured, context),
        _xavier(measured, context),
    ]


def _log10(ratio: Measured) -> Measured:
    """The logarithm of a ratio: as far from 0 whichever of the two is larger."""
    with np.errstate(divide="ignore"):
        value, low, high = (float(np.log10(end)) for end in (ratio.value, *ratio.enclosure))
    return Measured(value, low, high, num_runs=ratio.num_runs, run=ratio.run)


def _diverging(measured: Sequence[Pair], context: Context) -> Verdict:
    level = context["levels"][_nearest(context, 1.0)]
    growth = []
    for net in (TWO, ORTHOGONAL):
        for seed, path in enumerate(along.paths(measured, net, context["depth"])):
            late = along.kappa10(path["records"][-1])
            early = along.at_loss(path, level, along.kappa10)
            growth.append(Measured(late / early, run=f"{net} seed={seed}"))
    return decide_every(BY_ID["path.diverges"], growth)


def _xavier(measured: Sequence[Pair], context: Context) -> Verdict:
    depth = context["depth"]
    ratios = []
    for xavier in along.paths(measured, XAVIER, depth):
        for net in (TWO, ORTHOGONAL):
            for seed, path in enumerate(along.paths(measured, net, depth)):
                for level in context["levels"]:
                    pair = [along.at_loss(one, level, along.kappa10) for one in (xavier, path)]
                    if not np.isnan(pair).any():
                        run = f"{net} seed={seed}, loss {level:.2g} above the least"
                        ratios.append(Measured(pair[0] / pair[1], run=run))
    ends = [path["records"][-1]["loss"] for path in along.paths(measured, XAVIER, depth)]
    note = f"its last spectrum is at {min(ends):.2g} above the least loss" if ends else ""
    return decide_every(BY_ID["path.xavier"], ratios, note=note)


def _indices(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    ratios = _at_levels(measured, context, along.index, log=False)
    two = along.paths(measured, TWO, context["depth"])
    halved = context["scale"] / 2
    early, peaks = [], []
    for path in two:
        least = min(along.index(record) for record in path["records"])
        done = 0.5 - along.at_loss(path, halved, along.index, log=False)
        early.append(done / (0.5 - least) if least < 0.5 else math.nan)
        peaks.append(along.half_drop(path) / path["peak"] if path["peak"] else math.nan)
    run = f"{TWO} L={context['depth']}"
    return [
        _at_every_level("path.index-below", ratios, _until(ratios, context)),
        decide(BY_ID["path.index-early"], over_runs(early, run=run)),
        decide(BY_ID["path.peak"], over_runs(peaks, run=run)),
    ]


# -- nets with a ReLU ---------------------------------------------------------------------------


def _relu(swept: Swept) -> list[Verdict]:
    others = (ORTHOGONAL, XAVIER)
    depths = depths_of(swept, TWO)
    deepest = {key: sweep for key, sweep in swept.items() if key[1] == max(depths, default=0)}
    return [
        *(
            decide(BY_ID[claim], _deepest(swept, net), note=_by_depth(swept, net))
            for claim, net in (
                ("relu.two-improves", TWO),
                ("relu.orthogonal-does-not", ORTHOGONAL),
                ("relu.xavier-does-not", XAVIER),
            )
        ),
        _below_all(swept, "relu.best", others, _edges(swept)),
        _below_all(deepest, "relu.best-deep", others),
    ]
