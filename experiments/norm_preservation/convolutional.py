"""Verdicts on the claims about convolutional nets.

Three sets of blocks are told apart: identity blocks, downsamplings, and the first block, which is
a projection of 16 to 64 channels in ResNet and an identity block in ProcResNet.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.claims import Measured, Verdict, decide, decide_every, geometric, over_runs
from experiments.learning import AT_CHANCE, if_trained, loss
from experiments.norm_preservation.readings import BY_ID, curves
from experiments.readings import Curve
from experiments.sweep import Pair, name, parts

# The smallest net of which the page's pictures are: 164 and 166 layers.
DEEP = 18


def _log_product(result: Mapping[str, Any]) -> float:
    return float(result["log_product"])


def _conv(measured: Sequence[Pair], net: str) -> list[Pair]:
    return parts(measured, "conv init", net=net)


def _identity_sum(result: Mapping[str, Any]) -> float:
    """``Σ |1 − r|`` over identity blocks."""
    found = result["identity"]
    return float(found["mean"]) * len(found["ratios"])


def _by_tripling(curve: Curve) -> tuple[float, float]:
    """Growth of a value from n = 2 to 6 and from 6 to 18, equal factors of depth."""
    if not {2, 6, 18} <= set(curve):
        return math.nan, math.nan
    return curve[6] - curve[2], curve[18] - curve[6]


def _quotient(pair: tuple[float, float]) -> float:
    return pair[1] / pair[0] if pair[0] > 0 else math.nan


def at_initialisation(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide the claims about nets that are not trained."""
    proc, res = _conv(measured, "ProcResNet"), _conv(measured, "ResNet")
    sums = curves(proc, _identity_sum, "n")
    products = {n: curves(c, _log_product, "n") for n, c in (("ProcResNet", proc), ("ResNet", res))}
    growth = [
        over_runs([_quotient(_by_tripling(c)) for c in by_seed.values()], run=f"{net} n=2, 6, 18")
        for net, by_seed in products.items()
    ]
    quotients = _by_size(products_compared(measured))
    closer = [value for n, values in quotients.items() if n >= DEEP for value in values]
    deep = [r for c, r in res if c["n"] >= DEEP]
    first = _first_blocks(measured, "conv init")
    transitions: dict[str, list[float]] = defaultdict(list)
    for cell, result in proc:
        for block, ratio in zip(result["transitions"], result["transition"]["ratios"], strict=True):
            transitions[f"n={cell['n']} {block}"].append(ratio)
    flat = [
        Measured(ratio, run=f"{name(cell)} {block}")
        for cell, result in _conv(measured, "ProcResNet, 2×2")
        for block, ratio in zip(result["transitions"], result["transition"]["ratios"], strict=True)
    ]
    still = [
        over_runs(
            [r["identity"]["mean"] for c, r in cells if c["n"] == DEEP], run=f"{net} n={DEEP}"
        )
        for net, cells in (("ResNet", res), ("ProcResNet", proc))
    ]
    return [
        decide(
            BY_ID["conv.rate"],
            over_runs([_quotient(_by_tripling(c)) for c in sums.values()], run="n=2, 6, 18"),
        ),
        decide(
            BY_ID["conv.constant"],
            over_runs([_by_tripling(c)[1] / math.log(3) for c in sums.values()], run="n=6, 18"),
        ),
        decide_every(BY_ID["conv.polynomial"], growth),
        decide(
            BY_ID["conv.proc-closer"],
            over_runs(closer, run="n=18 and more"),
            note=f"quotient at {_at_sizes(quotients)}",
        ),
        decide(
            BY_ID["conv.outliers"],
            geometric([_contrast(r) for r in deep], run="n=18 and more"),
            note=_joined(_sets_note(deep), _extremes(deep)),
        ),
        decide(
            BY_ID["conv.downsamplings"],
            geometric([_contrast(r, "downsampling") for r in deep], run="n=18 and more"),
            note=f"quotient at {_at_sizes(_by_size(_contrasts(res)))}",
        ),
        decide(
            BY_ID["conv.downsamplings-farthest"],
            geometric([_to_farthest(r) for r in deep], run="n=18 and more"),
            note=_farthest_note(deep),
        ),
        decide(
            BY_ID["conv.first"],
            geometric([value for (n, _), value in first.items() if n >= DEEP], run="n=18 and more"),
            note="expected to fail",
        ),
        decide_every(
            BY_ID["conv.proc-transitions"],
            [over_runs(values, run=run) for run, values in transitions.items()],
            note=_extremes([r for c, r in proc if c["n"] >= DEEP]),
        ),
        decide_every(BY_ID["conv.isometric"], flat),
        decide_every(BY_ID["conv.animation"], still, note="expected to fail"),
    ]


def products_compared(measured: Sequence[Pair]) -> dict[tuple[int, int], float]:
    """Log-product of ProcResNet over that of ResNet at initialisation, by n and seed."""
    proc, res = (
        {(c["n"], c["seed"]): _log_product(r) for c, r in _conv(measured, net)}
        for net in ("ProcResNet", "ResNet")
    )
    return {key: proc[key] / res[key] for key in res if key in proc}


def _first_blocks(
    measured: Sequence[Pair], part: str, moment: str = ""
) -> dict[tuple[int, int], float]:
    """``|1 − r|`` of ProcResNet's first block over that of ResNet's, by n and seed."""
    proc, res = (
        {
            (c["n"], c["seed"]): float((r[moment] if moment else r)["first_block"]["mean"])
            for c, r in parts(measured, part, net=net)
        }
        for net in ("ProcResNet", "ResNet")
    )
    return {key: proc[key] / res[key] for key in res if key in proc}


def _contrasts(cells: Sequence[Pair]) -> dict[tuple[int, int], float]:
    return {(c["n"], c["seed"]): _contrast(r, "downsampling") for c, r in cells}


def _by_size(values: Mapping[tuple[int, int], float]) -> dict[int, list[float]]:
    """The values of all seeds for each n."""
    found: dict[int, list[float]] = defaultdict(list)
    for (n, _), value in sorted(values.items()):
        found[n].append(value)
    return dict(found)


def _at_sizes(by_size: Mapping[int, Sequence[float]]) -> str:
    sizes = ", ".join(map(str, by_size))
    return f"n = {sizes}: " + ", ".join(f"{np.mean(values):.2f}" for values in by_size.values())


def _contrast(result: Mapping[str, Any], blocks: str = "transition") -> float:
    """Mean deviation of these blocks, over that of the identity blocks."""
    return float(result[blocks]["mean"] / result["identity"]["mean"])


def _to_farthest(result: Mapping[str, Any]) -> float:
    """Mean deviation of the downsamplings, over the largest of an identity block."""
    return float(result["downsampling"]["mean"] / result["identity"]["max"])


def _sets_note(results: Sequence[Mapping[str, Any]]) -> str:
    """Say on which of the blocks it rests."""
    if not results:
        return ""
    first, down, identity = (
        np.mean([r[blocks]["mean"] for r in results])
        for blocks in ("first_block", "downsampling", "identity")
    )
    return (
        f"rests on the first block: mean |1 − r| is {first:.2f} there, {down:.2f} at the "
        f"downsamplings, {identity:.2f} at identity blocks"
    )


def _farthest_note(results: Sequence[Mapping[str, Any]]) -> str:
    """The blocks in question, and what the logarithm would say."""
    if not results:
        return ""
    down, identity = (
        np.mean([value(r) for r in results])
        for value in (lambda r: r["downsampling"]["mean"], lambda r: r["identity"]["max"])
    )
    logs = np.mean(
        [
            np.abs(np.log(r["downsampling"]["ratios"])).mean()
            / np.abs(np.log(r["identity"]["ratios"])).max()
            for r in results
        ]
    )
    return (
        f"|1 − r| is {down:.2f} at the downsamplings (r below 1), {identity:.2f} at the farthest "
        f"identity block (r above 1); in |log r| the quotient is {logs:.2f}"
    )


def _extremes(results: Sequence[Mapping[str, Any]]) -> str:
    """Say which block lies farthest from 1."""
    farthest = []
    for result in results:
        logs = np.abs(np.log(np.asarray(result["ratios"])))
        farthest.append(result["blocks"][int(logs.argmax())])
    counts = {block: farthest.count(block) for block in dict.fromkeys(farthest)}
    shown = ", ".join(f"{block} ({count} of {len(farthest)})" for block, count in counts.items())
    return f"farthest from 1: {shown}" if shown else ""


def in_training(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide the claims about trainings; the quick ones are short, see the notes."""
    res = parts(measured, "conv train", net="ResNet")
    proc = parts(measured, "conv train", net="ProcResNet")
    deviation = {
        net: {(c["n"], c["seed"]): float(r["training"]["downsampling"]["mean"]) for c, r in cells}
        for net, cells in (("ResNet", res), ("ProcResNet", proc))
    }
    repaired = [deviation["ProcResNet"][key] / value for key, value in deviation["ResNet"].items()]
    sizes = sorted({c["n"] for c, _ in res})
    outliers, downsamplings = (
        [
            geometric(
                [_contrast(r["training"], blocks) for c, r in res if c["n"] == n],
                run=f"ResNet n={n}",
            )
            for n in sizes
        ]
        for blocks in ("transition", "downsampling")
    )
    closer = [
        geometric(
            [
                r["windows"][-1]["identity"]["mean"] / r["initial"]["identity"]["mean"]
                for c, r in cells
                if c["n"] == n and r["windows"]
            ],
            run=f"{net} n={n}",
        )
        for net, cells in (("ResNet", res), ("ProcResNet", proc))
        for n in sizes
    ]
    drift = [r["windows"][-1]["transition"]["ratios"] for _, r in proc if r["windows"]]
    repair = []
    if drift:
        shown = ", ".join(f"{value:.2f}" for value in np.mean(drift, axis=0))
        repair.append(f"ProcResNet's downsamplings drift to {shown} in the last window")
    first = list(_first_blocks(measured, "conv train", "training").values())
    if first:
        repair.append(
            f"ProcResNet's first block has {np.mean(first):.2f} times the |1 − r| of ResNet's"
        )
    return [
        if_trained(verdict, nets, AT_CHANCE)
        for verdict, nets in (
            (
                decide_every(
                    BY_ID["conv.train-outliers"],
                    outliers,
                    note=_joined(_sets_note([r["training"] for _, r in res]), _how_far(res)),
                ),
                res,
            ),
            (
                decide_every(
                    BY_ID["conv.train-downsamplings"],
                    downsamplings,
                    note=_joined(_farthest_note([r["training"] for _, r in res]), _how_far(res)),
                ),
                res,
            ),
            (
                decide(
                    BY_ID["conv.train-repair"],
                    geometric(repaired, run="all seeds"),
                    note=_joined(*repair, _how_far(res + proc)),
                ),
                res + proc,
            ),
            (
                decide_every(BY_ID["conv.train-identity"], closer, note=_how_far(res + proc)),
                res + proc,
            ),
        )
    ]


def _how_far(cells: Sequence[Pair]) -> str:
    """How much the nets have learnt."""
    if not cells:
        return ""
    losses = [loss(result) for _, result in cells]
    steps = max(result["num_steps"] for _, result in cells)
    span = f"{min(losses):.2f} to {max(losses):.2f}"
    return f"after {steps} steps the loss is {span} of that of guessing"


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
