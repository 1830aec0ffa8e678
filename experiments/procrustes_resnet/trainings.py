"""Verdicts on the claims about nets that are trained: drift of ratios, losses, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.claims import Measured, Verdict, decide_every, geometric, over_runs
from experiments.learning import AT_CHANCE, if_trained, loss
from experiments.procrustes_resnet.nets import (
    OURS,
    OURS_FREE,
    PAPER,
    PAPER_FREE,
    RESNET,
    SMALL_SHORTCUT,
)
from experiments.procrustes_resnet.statements import BY_ID
from experiments.sweep import Pair, name, parts

Result = Mapping[str, Any]
Value = Callable[[Result], float]
# Two cells with the same size and seed.
Twins = tuple[Pair, Pair]


def _twins(measured: Sequence[Pair], one: str, other: str) -> dict[int, list[Twins]]:
    """Cells of two nets that differ in nothing else, by size."""
    others = {(c["n"], c["seed"]): (c, r) for c, r in parts(measured, "train", net=other)}
    found: dict[int, list[Twins]] = {}
    for cell, result in parts(measured, "train", net=one):
        partner = others.get((cell["n"], cell["seed"]))
        if partner is not None:
            found.setdefault(cell["n"], []).append(((cell, result), partner))
    return found


def _means(nets: tuple[str, str], twins: Mapping[int, list[Twins]], value: Value) -> str:
    """What was compared, for a reader."""
    shown = []
    for n, both in twins.items():
        means = [np.mean([value(two[place][1]) for two in both]) for place in (0, 1)]
        shown.append(f"n={n}: {nets[0]} {means[0]:.3g}, {nets[1]} {means[1]:.3g}")
    return "; ".join(shown)


def _quotients(
    claim: str, measured: Sequence[Pair], nets: tuple[str, str], value: Value, *notes: str
) -> Verdict:
    """Decide by the quotients of a value of two nets, seed by seed, at each size."""
    twins = _twins(measured, *nets)
    found = [
        geometric(
            [value(one[1]) / value(other[1]) for one, other in both],
            run=f"{nets[0]} against {nets[1]}, n={n}",
        )
        for n, both in twins.items()
    ]
    cells = [pair for both in twins.values() for two in both for pair in two]
    note = "; ".join(note for note in (*notes, _means(nets, twins, value)) if note)
    return if_trained(decide_every(BY_ID[claim], found, note=note), cells, AT_CHANCE)


# -- ratios -------------------------------------------------------------------------------------


def _drift(result: Result) -> float:
    """Mean |1 − r| of the downsamplings over the sampled steps after the first."""
    if result["status"] == "diverged":
        return math.inf
    return float(result["training"]["downsampling"]["mean"])


def _farthest(result: Result) -> float:
    ratios = np.asarray(result["downsampling_ratios"])
    if result["status"] == "diverged" or not ratios.size:
        return math.inf
    return float(np.abs(1 - ratios).max())


def _late(result: Result) -> float:
    if result["status"] == "diverged" or not result["windows"]:
        return math.inf
    return float(result["windows"][-1]["downsampling"]["mean"])


def drift(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide where the ratios of the downsamplings go."""
    ours = parts(measured, "train", net=OURS)
    free = [
        (f"{net} n={n}", [(c, r) for c, r in cells if c["n"] == n])
        for net in (PAPER_FREE, OURS_FREE)
        for cells in [parts(measured, "train", net=net)]
        for n in sorted({c["n"] for c, _ in cells})
    ]
    late = [over_runs([_late(r) for _, r in cells], run=run) for run, cells in free]
    exact = [Measured(_farthest(result), run=name(cell)) for cell, result in ours]
    return [
        _quotients("train.1x1", measured, (PAPER, PAPER_FREE), _drift, _ends(measured)),
        _quotients("train.1x1-resnet", measured, (PAPER, RESNET), _drift),
        if_trained(decide_every(BY_ID["train.2x2"], exact), ours, AT_CHANCE),
        if_trained(
            decide_every(BY_ID["train.flat-init"], late),
            [pair for _, cells in free for pair in cells],
            AT_CHANCE,
        ),
    ]


def _ends(measured: Sequence[Pair]) -> str:
    """Where the ratios end at each size."""
    shown = []
    trained = [(c, r) for c, r in parts(measured, "train") if r["windows"]]
    for n in sorted({c["n"] for c, _ in trained}):
        for net in (PAPER, PAPER_FREE, RESNET):
            rows = [
                r["windows"][-1]["downsampling"]["ratios"]
                for c, r in trained
                if c["net"] == net and c["n"] == n
            ]
            if rows:
                means = ", ".join(f"{value:.2f}" for value in np.mean(rows, axis=0))
                shown.append(f"{net} n={n} {means}")
    return f"ratios in the last window: {'; '.join(shown)}" if shown else ""


# -- spectra and losses -------------------------------------------------------------------------


def at_the_end(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide about spectra at the end, and about the loss on the way there."""
    cells = [pair for net in (PAPER, OURS) for pair in parts(measured, "train", net=net)]
    spectra = [
        Measured(end / layer["target"], run=f"{name(cell)} {layer['name']}")
        for cell, result in cells
        for layer in result["projected"]
        for end in layer["now"]
    ]
    return [
        if_trained(decide_every(BY_ID["train.spectrum"], spectra), cells, AT_CHANCE),
        _quotients(
            "train.speed", measured, (PAPER, RESNET), _mean_loss, _final_losses(measured)
        ),
        _quotients("train.speed-free", measured, (PAPER, PAPER_FREE), _mean_loss),
    ]  # fmt: skip


def _mean_loss(result: Result) -> float:
    return math.inf if result["status"] == "diverged" else float(result["mean_loss"])


def _final_losses(measured: Sequence[Pair]) -> str:
    cells = [pair for net in (PAPER, RESNET) for pair in parts(measured, "train", net=net)]
    if not cells:
        return ""
    found = [loss(result) for _, result in cells]
    return f"losses at the end are {min(found):.2g} to {max(found):.2g} of that of guessing"


# -- errors -------------------------------------------------------------------------------------


def _error(result: Result, what: str) -> float:
    """Share of wrong answers; that of guessing for a net that diverged."""
    if result["status"] == "diverged":
        return 1 - math.exp(-result["chance"])
    return float(result[f"{what}_error"])


def _errors_compared(
    claim: str, measured: Sequence[Pair], nets: tuple[str, str], what: str, *, margin: bool
) -> Verdict:
    """Decide by the differences of the errors of two nets, seed by seed, at each size."""
    twins = _twins(measured, *nets)

    def value(result: Result) -> float:
        return _error(result, what)

    found = []
    for n, both in twins.items():
        images = both[0][0][1]["num_test"]
        other = float(np.mean([value(two[1][1]) for two in both]))
        # No error is known better than to an image: equal nets are no evidence.
        image = 1 / images
        slack = max(math.sqrt(other * (1 - other) / images), image)
        gap = over_runs([value(one[1]) - value(two[1]) for one, two in both])
        low, high = gap.enclosure
        found.append(
            Measured(
                gap.value, low - image, high + image, expected=slack if margin else 0.0,
                num_runs=gap.num_runs, run=f"{nets[0]} against {nets[1]}, n={n}",
            )
        )  # fmt: skip
    verdict = decide_every(
        BY_ID[claim], found, note="; ".join([_means(nets, twins, value), *_sizes(twins)])
    )
    return if_trained(verdict, _to_have_learnt(twins.values()), AT_CHANCE)


def _to_have_learnt(twins: Iterable[list[Twins]]) -> list[Pair]:
    """The other nets: against one that has learnt, one that has not is worse."""
    return [two[1] for both in twins for two in both]


def _sizes(twins: Mapping[int, list[Twins]]) -> list[str]:
    shown = [
        f"{both[0][0][1]['num_parameters']} and {both[0][1][1]['num_parameters']}"
        for both in twins.values()
    ]
    return [f"parameters: {', '.join(shown)}"] if shown else []


def errors(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide about test errors."""
    nets = {
        "he": (PAPER, RESNET),
        "small": (PAPER, SMALL_SHORTCUT),
        "free": (PAPER, PAPER_FREE),
        "2x2": (OURS, RESNET),
        "2x2-free": (OURS, OURS_FREE),
    }
    return [
        *(
            _errors_compared(f"error.{what}-{key}", measured, nets[key], what, margin=True)
            for key in ("he", "small", "free", "2x2")
            for what in ("final", "best")
        ),
        *(
            _errors_compared(f"error.better-{key}", measured, nets[key], "final", margin=False)
            for key in ("he", "free", "2x2", "2x2-free")
        ),
    ]
