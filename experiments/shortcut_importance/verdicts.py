"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from experiments.claims import (
    Measured,
    Verdict,
    decide,
    decide_all,
    decide_every,
    over_runs,
)
from experiments.readings import Rate, difference_of_rates, enclosed, power_law, rate_of
from experiments.shortcut_importance import angles
from experiments.shortcut_importance.angles import all_won, reached
from experiments.shortcut_importance.critical import RADII
from experiments.shortcut_importance.descent import OPTIMUM
from experiments.shortcut_importance.setting import (
    CNN,
    COLD,
    LARGE,
    LARGE_SUM,
    PRIOR,
    SHORT,
    STRESS,
    UNIT,
    WARM,
    Method,
    Teacher,
)
from experiments.shortcut_importance.statements import BY_ID, CLAIMS
from experiments.sweep import Cell, Pair, name, parts


def decide_claims(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_checks(measured),
        *_critical(measured),
        *_rates(measured),
        *_starts(measured),
        *angles.decide(measured),
        *_stages(measured),
        *_plain(measured),
        *_samples(measured),
    ]
    by_id = {verdict.claim.id: verdict for verdict in found}
    return [by_id[claim.id] for claim in CLAIMS]


def _checks(measured: Sequence[Pair]) -> list[Verdict]:
    points = parts(measured, "gradients")
    samples = [
        enclosed(of, run=f"{quantity}, {name(cell)}")
        for cell, result in parts(measured, "monte-carlo")
        for quantity, of in result.items()
    ]
    fates = parts(measured, "fates")
    arrived = Measured(math.nan)
    if fates:
        runs, same, left = (sum(r[key] for _, r in fates) for key in ("runs", "same", "open"))
        arrived = Measured(same / runs, same / runs, (same + left) / runs, num_runs=runs)
    optimum = sum(r["optimum"] for _, r in fates)
    return [
        *(
            decide_every(BY_ID[f"check.{key}"], [Measured(r[key], run=name(c)) for c, r in points])
            for key in ("gradients", "hessians")
        ),
        decide_every(BY_ID["check.monte-carlo"], samples),
        decide_every(
            BY_ID["check.reduction"],
            [
                Measured(max(r["angle"], r["outputs"]), num_runs=c["seeds"], run=name(c))
                for c, r in parts(measured, "reduction")
            ],
        ),
        decide(BY_ID["check.fates"], arrived, note=f"{optimum} of them at the optimum"),
    ]


# -- critical points ----------------------------------------------------------------------------


def _critical(measured: Sequence[Pair]) -> list[Verdict]:
    cells = parts(measured, "critical")
    names = [f"k={cell['k']}, {cell['ratio']:g} of the threshold" for cell, _ in cells]
    results = [result for _, result in cells]

    def every(claim: str, values: Iterable[tuple[float, str]]) -> Verdict:
        return decide_every(BY_ID[claim], [Measured(value, run=run) for value, run in values])

    minima, saddles = {}, {}
    for (cell, result), run in zip(cells, names, strict=True):
        around = result["around"]
        lowest = min(around["least"], *around["best"])
        if cell["ratio"] < 1:
            minima[run] = lowest > 0
        else:
            saddles[run] = min(around["best"]) < 0
    points = [(max(r["optimum"]["gradient"], r["spurious"]["gradient"]), n)
              for r, n in zip(results, names, strict=True)]  # fmt: skip
    cubic = [
        (change / (-r["alignment"] / (6 * math.pi)), f"{n}, ε={radius:g}")
        for r, n in zip(results, names, strict=True)
        for change, radius in zip(r["around"]["cubic"], RADII, strict=True)
    ]
    curvature = [
        (r["beside"] / r["beside_expected"], n) for r, n in zip(results, names, strict=True)
    ]
    roots = [(r["ratio"], name(c)) for c, r in parts(measured, "crossing")]
    return [
        every("critical.points", points),
        *(
            every(f"critical.{point}", ((r[point]["distance"], n)
                                        for r, n in zip(results, names, strict=True)))
            for point in ("optimum", "spurious")
        ),
        every("critical.third-order", cubic),
        decide_all(BY_ID["critical.minimum"], minima),
        decide_all(BY_ID["critical.saddle"], saddles),
        every("critical.sign", roots),
        every("critical.curvature", curvature),
    ]  # fmt: skip


# -- success rates ------------------------------------------------------------------------------


def rates_of(measured: Sequence[Pair], teacher: Teacher, method: Method) -> dict[int, Rate]:
    """Rates of success by the number of patches."""
    counts: dict[int, list[int]] = {}
    for cell, result in parts(measured, "rates", teacher=teacher.name, method=method.name):
        rows = zip(cell["patches"], result["successes"], result["open"], strict=True)
        for k, won, left in rows:
            before = counts.get(k, [0, 0, 0])
            counts[k] = [a + b for a, b in zip(before, (won, left, result["runs"]), strict=True)]
    return {
        k: rate_of(won, runs, undecided=left, run=f"{teacher.name}, k={k}")
        for k, (won, left, runs) in counts.items()
    }


def _shown(rates: Mapping[int, Measured]) -> str:
    return ", ".join(f"{rate.value:.4g}" for rate in rates.values())


def _rises(rates: Mapping[int, Rate], *, ends: bool = False) -> list[Measured]:
    """Differences from each k to the next, or of the last to the first."""
    ks = sorted(rates)
    steps = [(ks[0], ks[-1])] if ends and len(ks) > 1 else list(itertools.pairwise(ks))
    return [
        difference_of_rates(rates[k], rates[before], run=f"{rates[k].run} against {before}")
        for before, k in steps
    ]


def _rates(measured: Sequence[Pair]) -> list[Verdict]:
    def every(claim: str, teachers: Sequence[Teacher], method: Method) -> Verdict:
        found = {teacher: rates_of(measured, teacher, method) for teacher in teachers}
        note = "; ".join(
            f"{teacher.name}: {_shown(rates)}"
            for teacher, rates in found.items()
            if any(rate.value < 1 for rate in rates.values())
        )
        values = [rate for rates in found.values() for rate in rates.values()]
        return decide_every(BY_ID[claim], values, note=note)

    cold = rates_of(measured, LARGE, COLD)
    with_sum, without = (rates_of(measured, teacher, CNN) for teacher in (LARGE_SUM, LARGE))
    above = [
        difference_of_rates(with_sum[k], without[k], run=f"k={k}, r = 0.2 against 1/(16k)")
        for k in with_sum
        if k in without
    ]
    stress = {teacher: rates_of(measured, teacher, COLD) for teacher in STRESS}
    rising = decide_every(BY_ID["rates.rising"], _rises(cold), note=_shown(cold))
    short = every("rates.warm-up-1000", PRIOR, SHORT)
    last = max(
        (step for teacher in PRIOR
         for _, result in parts(measured, "rates", teacher=teacher.name, method=SHORT.name)
         for step in result["last_step"]),
        default=0,
    )  # fmt: skip
    when = f"the last start is decided at step {last} or before"
    sums = decide_every(
        BY_ID["rates.cnn-sum"], [*above, *_rises(with_sum, ends=True)], note=_shown(with_sum)
    )
    return [
        _every_start(measured),
        replace(short, note="; ".join(text for text in (short.note, when) if text)),
        every("rates.no-warm-up", [LARGE], COLD),
        # Neighbours share the starts of one k.
        replace(rising, num_runs=sum(rate.num_runs for rate in cold.values())),
        every("rates.unit", [UNIT], COLD),
        every("rates.cnn", [UNIT, LARGE], CNN),
        # The rates of the first are in both kinds of differences, and counted once.
        replace(
            sums, num_runs=sum(r.num_runs for rates in (with_sum, without) for r in rates.values())
        ),
        every("rates.stress", STRESS, WARM),
        every("rates.stress-1000", STRESS, SHORT),
        decide_every(
            BY_ID["rates.stress-rising"],
            [rise for rates in stress.values() for rise in _rises(rates, ends=True)],
            note="; ".join(f"{teacher.name}: {_shown(rates)}" for teacher, rates in stress.items()),
        ),
    ]


def _every_start(measured: Sequence[Pair]) -> Verdict:
    """Whether each of the drawn starts succeeds: the theorem allows no failure."""
    rates = {t: rates_of(measured, t, WARM) for t in PRIOR}
    outcomes = {
        rate.run: all_won(rate.successes, rate.undecided, rate.num_runs)
        for of in rates.values()
        for rate in of.values()
    }
    found = [rate for of in rates.values() for rate in of.values()]
    least = min((rate.enclosure[0] for rate in found), default=math.nan)
    lost = sum(rate.num_runs - rate.successes - rate.undecided for rate in found)
    verdict = decide_all(
        BY_ID["rates.warm-up"], outcomes,
        note=f"{lost} starts are lost; each rate is {least:.4f} or more with 97.5 % confidence",
    )  # fmt: skip
    return replace(verdict, num_runs=sum(rate.num_runs for rate in found))


# -- starts ---------------------------------------------------------------------------------


def start_names(cell: Cell) -> list[str]:
    """The teachers of a cell of starts, in their order."""

    def norm(size: float) -> str:
        return f"k/{1 / size:g}" if size < 1 else "k" if size == 1 else f"{size:g}k"

    return [
        f"|a*|²={norm(size)} r={share:g} k={k}"
        for size in cell["sizes"]
        for share in cell["shares"]
        for k in cell["patches"]
    ]


def _starts(measured: Sequence[Pair]) -> list[Verdict]:
    def adversarial(method: Method) -> dict[str, bool | None]:
        return {
            run: reached(fate)
            for cell, result in parts(measured, "starts", method=method.name)
            for run, fate in zip(start_names(cell), result["adversarial"], strict=True)
        }

    ball: dict[str, bool | None] = {}
    lost = {}
    for method in (WARM, SHORT, COLD):
        for cell, result in parts(measured, "starts", method=method.name):
            total = result["starts"] * len(result["successes"])
            left = sum(result["open"])
            lost[method] = f"{total - sum(result['successes']) - left} of {total} on the grid"
            lost[method] += f", {left} not decided" if left else ""
            if method is WARM:
                ball |= {
                    run: all_won(won, left, result["starts"])
                    for run, won, left in zip(
                        start_names(cell), result["successes"], result["open"], strict=True
                    )
                }
    counts = [result["starts"] for _, result in parts(measured, "starts", method=WARM.name)]
    times = []
    for cell, result in parts(measured, "time"):
        done = all(fate == OPTIMUM for fate in result["fates"])
        curve = dict(zip(cell["patches"], result["steps"], strict=True)) if done else {}
        times.append(power_law(curve, label=f"r={cell['share']:g}", symbol="k"))
    return [
        decide_all(BY_ID["starts.adversarial"], adversarial(WARM)),
        decide_all(BY_ID["starts.ball"], ball, num_runs=counts[0] if counts else 1),
        decide_all(
            BY_ID["starts.short"], adversarial(SHORT), note=f"lost: {lost.get(SHORT, 'none')}"
        ),
        decide_all(BY_ID["starts.cold"], adversarial(COLD), note=f"lost: {lost.get(COLD, 'none')}"),
        decide_every(BY_ID["starts.time"], times),
    ]


def _stages(measured: Sequence[Pair]) -> list[Verdict]:
    warm = parts(measured, "follow", method=WARM.name)
    largest, ratios, angle_rates, outputs_rates = [], [], [], []
    notes = []
    for cell, result in warm:
        run = f"{cell['teacher']}, k={cell['k']}"
        largest.append(
            Measured(max(result["largest_angle"]) / math.pi, num_runs=cell["seeds"], run=run)
        )
        shares = [
            one / other
            for one, other in zip(result["warm_alignment"], result["warm_expected"], strict=True)
        ]
        notes.append(f"{run}: {min(shares):.3g} ... {max(shares):.3g}")
        middle = sorted(shares)[len(shares) // 2]
        if cell["teacher"] == UNIT.name:
            ratios.append(Measured(middle, min(shares), max(shares), num_runs=len(shares), run=run))
            angle_rates.append(over_runs(result["angle_rate"], run=run))
            outputs_rates.append(over_runs(result["outputs_rate"], run=run))
    least = min((min(result["warm_alignment"]) for _, result in warm), default=math.nan)
    return [
        decide_every(BY_ID["stage.angle"], largest),
        decide_every(
            BY_ID["stage.alignment"],
            ratios,
            note=f"smallest aᵀa*/|a*|² there: {least:.3g}; {'; '.join(notes)}",
        ),
        decide_every(BY_ID["stage.angle-rate"], angle_rates),
        decide_every(BY_ID["stage.outputs-rate"], outputs_rates),
    ]


# -- without normalisation, on samples ----------------------------------------------------------


def _plain(measured: Sequence[Pair]) -> list[Verdict]:
    rates = {
        (kind["squared_norm"], kind["method"]): rate_of(
            kind["successes"], kind["runs"], undecided=kind["open"],
            run=f"|a*|²={kind['squared_norm']:g}",
        )
        for _, result in parts(measured, "plain")
        for kind in result["kinds"]
    }  # fmt: skip
    sizes = sorted({size for size, _ in rates})

    def told(size: float, method: Method, which: str) -> str:
        rate = rates[size, method.name]
        left = f" ({rate.undecided} not decided)" if rate.undecided else ""
        return f"{rate.successes} of {rate.num_runs}{left} {which}"

    with_shortcut = [rates[size, COLD.name] for size in sizes]
    shown = "; ".join(f"|a*|²={size:g}: {told(size, COLD, 'with')} and "
                      f"{told(size, CNN, 'without')} shortcut" for size in sizes)  # fmt: skip
    better = [
        difference_of_rates(rates[size, COLD.name], rates[size, CNN.name], run=f"|a*|²={size:g}")
        for size in sizes
    ]
    return [
        decide_every(BY_ID["plain.unit"], with_shortcut[:1]),
        decide_every(BY_ID["plain.better"], better, note=shown),
        decide_every(BY_ID["plain.large"], with_shortcut[-1:]),
    ]


def _samples(measured: Sequence[Pair]) -> list[Verdict]:
    found = []
    for claim, method in (("samples.shortcut", WARM), ("samples.cnn", CNN)):
        results = [result for _, result in parts(measured, "samples", method=method.name)]
        won, left, runs = (
            sum(result[key] for result in results) for key in ("successes", "open", "runs")
        )
        rate = rate_of(won, runs, undecided=left) if runs else Measured(math.nan)
        stuck = [
            loss
            for result in results
            for loss, angle in zip(result["loss"], result["angle"], strict=True)
            if angle > math.pi / 2
        ]
        note = f"losses of the others {min(stuck):.3g} ... {max(stuck):.3g}" if stuck else ""
        found.append(decide(BY_ID[claim], rate, note=note))
    return found
