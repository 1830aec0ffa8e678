"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conditioning.theory import ratio_band
from experiments.claims import (
    Claim,
    Measured,
    Verdict,
    decide,
    decide_all,
    decide_every,
    geometric,
    log,
)
from experiments.learning import if_trained, loss
from experiments.norm_preservation import convolutional
from experiments.norm_preservation.readings import (
    BY_ID,
    FIRST_DEPTH,
    constants,
    curves,
    decide_over_seeds,
    depths_of,
    means,
    rate_exponent,
)
from experiments.norm_preservation.statements import CLAIMS, CONSTANT
from experiments.readings import Curve, slope
from experiments.sweep import Pair, name, parts


def _at_every_depth(
    claim: Claim, by_seed: Mapping[int, Curve], *, key: str = "L", label: str = "", note: str = ""
) -> Verdict:
    return decide_every(claim, means(by_seed, key, label), note=note)


def decide_claims(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_lemma(measured),
        *_linear(measured),
        *_initial(measured),
        *_unusual(measured),
        *_trained(measured),
        *convolutional.at_initialisation(measured),
        *convolutional.in_training(measured),
    ]
    by_id = {verdict.claim.id: verdict for verdict in found}
    return [by_id[claim.id] for claim in CLAIMS]


# -- the lemma, and linear maps -----------------------------------------------------------------


def _lemma(measured: Sequence[Pair]) -> list[Verdict]:
    ratio, skip, bound = {}, {}, {}
    slack, said, certified = [], 0, 0
    for cell, result in parts(measured, "jacobian"):
        for block in result["blocks"]:
            run = f"{name(cell)} {block['name']}"
            low, high = block["bounds"]
            certified += block["smallest"]["low"] > 0
            # Float32 products and two ways to sum a norm: one part in 1e5 is no contradiction.
            r = block["ratio"]
            ratio[run] = low * (1 - 1e-5) <= r <= high * (1 + 1e-5)
            if block["kind"] == "identity" and block["branch"] is not None:
                delta = block["branch"]["high"]
                skip[run] = block["delta"]["low"] <= delta * (1 + 1e-5)
                band = ratio_band(delta)
                bound[run] = band[0] * (1 - 1e-5) <= r <= band[1] * (1 + 1e-5)
                slack.append(abs(1 - r) / block["branch"]["value"])
                said += delta < 1
    note = (
        f"median |1 − r| is {np.median(slack):.2g} of δ; the lower bound 1 − δ is above 0 in "
        f"{said} of {len(slack)} blocks"
        if slack
        else ""
    )
    return [
        decide_all(
            BY_ID["t0.ratio"],
            ratio,
            note=f"σ_min is certified to be above 0 in {certified} of {len(ratio)} blocks",
        ),
        decide_all(BY_ID["t0.skip"], skip),
        decide_all(BY_ID["t0.bound"], bound, note=note),
    ]


def _linear(measured: Sequence[Pair]) -> list[Verdict]:
    cells = parts(measured, "linear")
    remainder, within, product = [], [], []
    for cell, result in cells:
        depth, b, delta = cell["L"], result["log_norm"], result["delta"]
        left = depth * (math.expm1(b / depth) - b / depth)
        run = name(cell)
        remainder.append(Measured(abs(depth * delta - b) / left, run=run))
        ratios = np.asarray(result["ratios"])
        within.append(Measured(float(np.abs(1 - ratios).max() / delta), run=run))
        product.append(Measured(result["product"] / result["end_to_end"], run=run))
    deep = curves([(c, r) for c, r in cells if c["L"] >= 16], lambda r: r["delta"])
    largest = max((c["L"] for c, _ in cells), default=0)
    ends = [c["L"] * r["delta"] / r["log_norm"] for c, r in cells if c["L"] == largest]
    note = f"L·δ/‖log T‖ at L = {largest}: {np.mean(ends):.5g}" if ends else ""
    return [
        decide_every(BY_ID["t1.remainder"], remainder, note=note),
        decide_over_seeds(BY_ID["t1.rate"], deep, lambda curve: slope(curve, math.log, log)),
        decide_every(BY_ID["t1.ratio"], within),
        decide_every(BY_ID["t1.product"], product),
    ]


# -- MLPs ---------------------------------------------------------------------------------------


def _narrow(measured: Sequence[Pair], net: str) -> list[Pair]:
    return parts(measured, "mlp init", net=net, width=32)


def _wide(measured: Sequence[Pair], net: str) -> list[Pair]:
    return [(c, r) for c, r in parts(measured, "mlp init", net=net) if c["width"] > 32]


def _mean(result: Mapping[str, Any]) -> float:
    return float(result["mean"])


def _max(result: Mapping[str, Any]) -> float:
    return float(result["max"])


def _log_product(result: Mapping[str, Any]) -> float:
    return float(result["log_product"])


def _deep(by_seed: Mapping[int, Curve]) -> dict[int, dict[int, float]]:
    """Without the depths at which the first block decides."""
    return {
        seed: {depth: value for depth, value in curve.items() if depth >= FIRST_DEPTH}
        for seed, curve in by_seed.items()
    }


def _constant_note(by_seed: Mapping[int, Curve]) -> str:
    """The constant at each depth, averaged over seeds."""
    values: dict[int, list[float]] = defaultdict(list)
    for curve in by_seed.values():
        for depth, value in constants(curve).items():
            values[depth].append(value)
    if not values:
        return ""
    depths = sorted(values)
    many = len(by_seed) > 1
    shown = ", ".join(
        f"{np.mean(values[d]):.2f}" + (f" ± {np.std(values[d]):.2g}" if many else "")
        for d in depths
    )
    ends = [float(np.mean(values[d])) for d in (depths[0], depths[-1])]
    return (
        f"mean |1 − r|·L/log(2L) is no constant: {ends[0]:.2f} → {ends[1]:.2f} over "
        f"{depths_of(by_seed)}, by depth {shown}"
        + (" (± standard deviation over seeds)" if many else ", one seed")
    )


def _power_of_depth(curve: Curve) -> float:
    """Growth of a value with log L."""
    return slope(curve, math.log, float)


def _bounded(by_seed: Mapping[int, Curve]) -> dict[int, dict[int, float]]:
    """Logarithms of products in units of that of ``(2L)^c``."""
    return {
        seed: {d: value / (CONSTANT * math.log(2 * d)) for d, value in curve.items()}
        for seed, curve in by_seed.items()
    }


def _initial(measured: Sequence[Pair]) -> list[Verdict]:
    wide = curves(_wide(measured, "skip, BN"), lambda r: r["mean"] / r["predicted"]["mean"])
    cells = _narrow(measured, "skip, BN")
    ratio = [r["mean"] / r["predicted"]["mean"] for _, r in cells]
    at_32 = f"at width 32 the quotient is {np.mean(ratio):.3f} on average" if ratio else ""
    law = [
        Measured(m.value, m.low, m.high, expected=1.0, num_runs=m.num_runs, run=m.run)
        for m in means(wide)
    ]
    mean = curves(cells, _mean)
    total = {s: {d: d * v for d, v in curve.items()} for s, curve in mean.items()}
    product = curves(cells, _log_product)
    return [
        decide_every(BY_ID["init.law"], law, note=at_32),
        decide_over_seeds(BY_ID["init.rate"], _deep(mean), rate_exponent, _constant_note(mean)),
        decide_over_seeds(BY_ID["init.constant"], _deep(total), _power_of_depth),
        decide_over_seeds(
            BY_ID["init.max"], _deep(curves(cells, _max)), rate_exponent, "expected to fail"
        ),
        decide_over_seeds(BY_ID["init.product"], _deep(product), _power_of_depth),
        _at_every_depth(BY_ID["init.product-bound"], _bounded(product)),
    ]


def _unusual(measured: Sequence[Pair]) -> list[Verdict]:
    """Nets without BN, or without skip, at initialisation."""
    skip = curves(_wide(measured, "skip"), _mean)
    narrow = [rate_exponent(c) for c in _deep(curves(_narrow(measured, "skip"), _mean)).values()]
    spread = f" ± {np.std(narrow):.2f}" if len(narrow) > 1 else ""
    at_32 = f"{np.mean(narrow):.2f}{spread} at width 32" if narrow else ""
    scaled = _narrow(measured, "skip, scaled")
    plain = curves(_narrow(measured, "plain, BN"), _mean)
    product = curves(_wide(measured, "plain, BN"), _log_product)

    def factor(curve: Curve) -> float:
        deepest = sorted(curve)[-2:]
        return math.exp(slope({d: curve[d] for d in deepest}, float, float))

    return [
        decide_over_seeds(BY_ID["skip.flat"], _deep(skip), rate_exponent, at_32),
        decide_over_seeds(BY_ID["scaled.rate"], _deep(curves(scaled, _mean)), rate_exponent),
        decide_over_seeds(BY_ID["scaled.max"], _deep(curves(scaled, _max)), rate_exponent),
        _at_every_depth(BY_ID["plain.flat"], plain),
        decide_over_seeds(BY_ID["plain.product"], product, factor),
    ]


def _in_training(cells: Iterable[Pair], key: str) -> dict[int, dict[int, float]]:
    return curves(cells, lambda result: float(result["training"][key]))


def _trained(measured: Sequence[Pair]) -> list[Verdict]:
    cells = parts(measured, "mlp train", net="skip, BN")
    scaled = parts(measured, "mlp train", net="skip, scaled")
    mean = _in_training(cells, "mean")
    initial = curves(cells, lambda r: float(r["initial"]["mean"]))

    def average(curve: Curve) -> float:
        return float(np.mean(list(constants(curve).values()))) if curve else math.nan

    deep, before = _deep(mean), _deep(initial)
    lowered = [average(deep[seed]) / average(before[seed]) for seed in deep]
    losses = [Measured(loss(result), run=name(cell)) for cell, result in [*cells, *scaled]]
    plain = parts(measured, "mlp train", net="plain, BN")
    deepest = max((c["L"] for c, _ in plain), default=0)
    stuck = [Measured(loss(r), run=name(c)) for c, r in plain if c["L"] == deepest]
    far = [(c, r) for c, r in cells if c["L"] >= FIRST_DEPTH]
    far_scaled = [(c, r) for c, r in scaled if c["L"] >= FIRST_DEPTH]
    about_training = [
        (decide_over_seeds(BY_ID["train.rate"], deep, rate_exponent, _constant_note(mean)), far),
        (decide_over_seeds(BY_ID["train.at-least"], deep, rate_exponent), far),
        (
            decide(
                BY_ID["train.constant"], geometric(lowered, run=f"all seeds, {depths_of(deep)}")
            ),
            far,
        ),
        (
            decide_over_seeds(
                BY_ID["train.max"],
                _deep(_in_training(cells, "max")),
                rate_exponent,
                "expected to fail",
            ),
            far,
        ),
        (
            _at_every_depth(BY_ID["train.product"], _bounded(_in_training(cells, "log_product"))),
            cells,
        ),
        (
            decide_over_seeds(
                BY_ID["train.scaled"], _deep(_in_training(scaled, "mean")), rate_exponent
            ),
            far_scaled,
        ),
    ]
    return [
        *(if_trained(verdict, nets) for verdict, nets in about_training),
        decide_every(BY_ID["train.skip"], losses),
        decide_every(BY_ID["train.plain"], stuck, note=_unscaled_note(measured)),
    ]


def _unscaled_note(measured: Sequence[Pair]) -> str:
    cells = parts(measured, "mlp train", net="skip")
    ended = sorted({c["L"] for c, r in cells if r["status"] == "diverged"})
    if not ended:
        return ""
    return (
        f"with skip, without BN or scaling, training diverged at L = {', '.join(map(str, ended))}"
    )
