"""From measured cells to one verdict for each claim."""

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
from experiments.procrustes_resnet.statements import CLAIMS
from experiments.sweep import Pair, name, parts

BY_ID = {claim.id: claim for claim in CLAIMS}
Result = Mapping[str, Any]
Value = Callable[[Result], float]


def decide_claims(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_full_size(measured),
        *_layers(measured),
        *_initial(measured),
        *_drift(measured),
        *_training(measured),
        *_errors(measured),
    ]
    by_id = {verdict.claim.id: verdict for verdict in found}
    return [by_id[claim.id] for claim in CLAIMS]


# -- single layers ------------------------------------------------------------------------------


def _full_size(measured: Sequence[Pair]) -> list[Verdict]:
    cells = parts(measured, "full size")
    ends = [
        Measured(result[end], run=name(cell))
        for cell, result in cells
        for end in ("smallest", "largest")
    ]
    gaps = [Measured(result["gap"], run=name(cell)) for cell, result in cells]
    return [
        decide_every(BY_ID["layer.1x1"], ends),
        decide_every(BY_ID["layer.one-matrix"], gaps),
    ]


def _layers(measured: Sequence[Pair]) -> list[Verdict]:
    def runs(layer: str, methods: Iterable[str], value: Value) -> list[Measured]:
        found = []
        for method in methods:
            cells = parts(measured, "operator", layer=layer, method=method)
            values = [value(result) for _, result in cells]
            found.append(over_runs(values, run=f"{layer}, {method}"))
        return found

    def each(layer: str, method: str, operator: str) -> list[Measured]:
        return [
            Measured(result[operator][end]["value"], run=name(cell))
            for cell, result in parts(measured, "operator", layer=layer, method=method)
            for end in ("smallest", "largest")
        ]

    halves = [
        Measured(result["true"]["rank"] / result["true"]["rows"], run=name(cell))
        for cell, result in parts(measured, "operator", layer="1×1, stride 2", method="ours ×1")
    ]
    gains = [
        Measured(result[operator]["gain"] / expected, run=f"{name(cell)} {operator}")
        for cell, result in parts(measured, "operator")
        for operator, expected in (
            ("circular", math.sqrt(result["energy"])),
            ("true", result["expected_gain"]),
        )
    ]
    stem, strided = "3×3 stem", "3×3, stride 2"
    gaps = [
        Measured(_least(result) / result["target"], run=name(cell))
        for cell, result in parts(measured, "operator", layer=stem, method="ours ×1")
    ]
    lost = [
        result["true"]["gain"] / result["circular"]["gain"]
        for _, result in parts(measured, "operator", layer=strided, method="ours ×100")
    ]
    sides = {r["outputs"] for _, r in parts(measured, "operator", layer=strided)}
    note = ""
    if lost and len(sides) == 1:
        side = sides.pop()
        note = (
            f"zero padding multiplies the gain of 3×3, stride 2 by {np.mean(lost):.3f}; "
            f"(3M − 1)/(3M) = {(3 * side - 1) / (3 * side):.3f} for taps of equal size, M = {side}"
        )
    again = runs(stem, ["paper ×10"], _spread)
    once = "" if not again else f"after ten: {again[0].value:.3f}"
    return [
        decide_every(BY_ID["layer.rank"], halves),
        decide_every(BY_ID["layer.2x2"], each("2×2, stride 2", "ours ×1", "true")),
        decide_every(BY_ID["layer.stem"], each(stem, "ours ×1", "circular")),
        decide_every(
            BY_ID["layer.stem-paper"], runs(stem, ["paper ×1"], _spread), note=once
        ),
        decide_every(BY_ID["layer.stem-zeros"], gaps),
        decide_every(
            BY_ID["layer.stem-gap"],
            runs(stem, ["paper ×1", "paper ×10"], lambda r: _least(r) / r["target"]),
        ),
        decide_every(BY_ID["layer.stride"], runs(strided, ["paper ×10", "reshape"], _spread)),
        decide_every(BY_ID["layer.stride-aware"], runs(strided, ["ours ×100"], _spread)),
        decide_every(
            # The target of a kernel that covers its stride, with twice the channels, is 1.
            BY_ID["layer.stride-zeros"], runs(strided, ["ours ×100"], _least)
        ),
        decide_every(BY_ID["layer.gain"], gains, note=note),
    ]  # fmt: skip


def _spread(result: Result) -> float:
    found = result["circular"]
    return float(found["largest"]["value"] / found["least_nonzero"])


def _least(result: Result) -> float:
    return float(result["true"]["smallest"]["value"])


# -- nets ---------------------------------------------------------------------------------------


def _initial(measured: Sequence[Pair]) -> list[Verdict]:
    def ratios(net: str) -> list[Measured]:
        cells = parts(measured, "init", net=net)
        found = []
        for n in sorted({cell["n"] for cell, _ in cells}):
            rows = np.array([_downsampling(r)["ratios"] for c, r in cells if c["n"] == n])
            found += [
                over_runs(column, run=f"{net} n={n}, downsampling {place}")
                for place, column in enumerate(rows.T, 1)
            ]
        return found

    gaps = [
        Measured(_downsampling(result)["max"], run=name(cell))
        for cell, result in parts(measured, "init", net=OURS)
    ]
    sizes = {
        (cell["n"], cell["seed"], cell["net"]): result["num_parameters"]
        for cell, result in parts(measured, "init")
    }
    more = [
        Measured(count - sizes[n, seed, PAPER], run=f"n={n}")
        for (n, seed, net), count in sizes.items()
        if net == OURS and seed == 0
    ]
    return [
        decide_every(BY_ID["init.1x1"], ratios(PAPER)),
        decide_every(BY_ID["init.2x2"], gaps),
        decide_every(BY_ID["init.parameters"], more),
    ]


def _downsampling(result: Result) -> Mapping[str, Any]:
    found: Mapping[str, Any] = result["downsampling"]
    return found


def _pairs(measured: Sequence[Pair], one: str, other: str) -> dict[int, list[tuple[Pair, Pair]]]:
    """Cells of two nets with the same size and seed, by size."""
    others = {(c["n"], c["seed"]): (c, r) for c, r in parts(measured, "train", net=other)}
    found: dict[int, list[tuple[Pair, Pair]]] = {}
    for cell, result in parts(measured, "train", net=one):
        partner = others.get((cell["n"], cell["seed"]))
        if partner is not None:
            found.setdefault(cell["n"], []).append(((cell, result), partner))
    return found


def _compared(
    claim: str,
    measured: Sequence[Pair],
    nets: tuple[str, str],
    value: Value,
    *,
    difference: bool = False,
    note: str = "",
) -> Verdict:
    """Quotients, or differences, of a value of two nets with the same seed, at each size."""
    pairs = _pairs(measured, *nets)
    found, cells = [], []
    for n, both in pairs.items():
        values = [(value(one[1]), value(other[1])) for one, other in both]
        run = f"{nets[0]} against {nets[1]}, n={n}"
        found.append(
            over_runs([a - b for a, b in values], run=run)
            if difference
            else geometric([a / b for a, b in values], run=run)
        )
        cells += [pair for two in both for pair in two]
    return if_trained(decide_every(BY_ID[claim], found, note=note), cells, AT_CHANCE)


def _drift(measured: Sequence[Pair]) -> list[Verdict]:
    def drift(result: Result) -> float:
        return float(result["training"]["downsampling"]["mean"])

    ours, paper = (
        [
            Measured(reduce(np.asarray(result["downsampling_ratios"])), run=name(cell))
            for cell, result in parts(measured, "train", net=net)
        ]
        for net, reduce in (
            (OURS, lambda ratios: float(np.abs(1 - ratios).max())),
            (PAPER, lambda ratios: float(ratios.max())),
        )
    )
    free = [
        (net, n, [(c, r) for c, r in parts(measured, "train", net=net) if c["n"] == n])
        for net in (PAPER_FREE, OURS_FREE)
        for n in sorted({c["n"] for c, _ in parts(measured, "train", net=net)})
    ]
    late = [
        over_runs(
            [_last(r)["downsampling"]["mean"] for _, r in cells if r["windows"]],
            run=f"{net} n={n}",
        )
        for net, n, cells in free
    ]
    return [
        _compared(
            "train.1x1", measured, (PAPER, PAPER_FREE), drift, note=_ends(measured)
        ),
        _compared("train.1x1-resnet", measured, (PAPER, RESNET), drift),
        decide_every(BY_ID["train.1x1-bound"], paper),
        decide_every(BY_ID["train.2x2"], ours),
        if_trained(
            decide_every(BY_ID["train.flat-init"], late),
            [pair for _, _, cells in free for pair in cells],
            AT_CHANCE,
        ),
    ]  # fmt: skip


def _last(result: Result) -> Mapping[str, Any]:
    found: Mapping[str, Any] = result["windows"][-1]
    return found


def _ends(measured: Sequence[Pair]) -> str:
    """Where the ratios end, for a reader."""
    shown = []
    for net in (PAPER, PAPER_FREE, RESNET):
        rows = [
            _last(r)["downsampling"]["ratios"]
            for _, r in parts(measured, "train", net=net)
            if r["windows"]
        ]
        if rows:
            means = ", ".join(f"{value:.2f}" for value in np.mean(rows, axis=0))
            shown.append(f"{net} {means}")
    return f"ratios in the last window: {'; '.join(shown)}" if shown else ""


def _training(measured: Sequence[Pair]) -> list[Verdict]:
    spectra = [
        Measured(end / layer["target"], run=f"{name(cell)} {layer['name']}")
        for net in (PAPER, OURS)
        for cell, result in parts(measured, "train", net=net)
        for layer in result["projected"]
        for end in layer["now"]
    ]
    nets = (PAPER, RESNET)
    return [
        decide_every(BY_ID["train.spectrum"], spectra),
        _compared(
            "train.speed", measured, nets, lambda r: float(r["mean_loss"]), note=_losses(measured)
        ),
    ]


def _losses(measured: Sequence[Pair]) -> str:
    cells = [pair for net in (PAPER, RESNET) for pair in parts(measured, "train", net=net)]
    if not cells:
        return ""
    found = [loss(result) for _, result in cells]
    return f"losses at the end are {min(found):.2g} to {max(found):.2g} of that of guessing"


def _errors(measured: Sequence[Pair]) -> list[Verdict]:
    nets = {
        "he": (PAPER, RESNET),
        "small": (PAPER, SMALL_SHORTCUT),
        "free": (PAPER, PAPER_FREE),
        "2x2": (OURS, RESNET),
    }
    found = []
    for key, pair in nets.items():
        for what in ("final", "best"):

            def error(result: Result, what: str = what) -> float:
                return float(result[f"{what}_error"])

            both = [two for some in _pairs(measured, *pair).values() for two in some]
            means = [
                f"{net} {np.mean([error(two[place][1]) for two in both]):.3f}"
                for place, net in enumerate(pair)
                if both
            ]
            found.append(
                _compared(
                    f"error.{what}-{key}", measured, pair, error, difference=True,
                    note=", ".join(means),
                )
            )  # fmt: skip
    better = (
        _compared(
            f"error.better-{key}", measured, nets[key], lambda r: float(r["final_error"]),
            difference=True,
        )
        for key in ("he", "free")
    )  # fmt: skip
    return [*found, *better]
