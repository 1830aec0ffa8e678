"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.claims import Measured, Verdict, decide_every, over_runs
from experiments.procrustes_resnet import trainings
from experiments.procrustes_resnet.nets import OURS, PAPER
from experiments.procrustes_resnet.statements import BY_ID, CLAIMS
from experiments.sweep import Pair, name, parts

Result = Mapping[str, Any]
Value = Callable[[Result], float]


def decide_claims(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_full_size(measured),
        *_layers(measured),
        *_initial(measured),
        *trainings.drift(measured),
        *trainings.at_the_end(measured),
        *trainings.errors(measured),
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
