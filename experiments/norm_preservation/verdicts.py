"""From measured cells to one verdict for each claim."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from conditioning.theory import depth_rate, ratio_band
from experiments.claims import (
    Claim,
    Measured,
    Verdict,
    decide,
    decide_all,
    decide_every,
    over_runs,
)
from experiments.norm_preservation.statements import CLAIMS, CONSTANT
from experiments.sweep import describe

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
Curve = Mapping[int, float]
_BY_ID = {claim.id: claim for claim in CLAIMS}
# At L = 2 the first block, which obeys no law, is half of the net.
FIRST_DEPTH = 4


def parts(measured: Sequence[Pair], part: str, **where: Any) -> list[Pair]:
    """The cells of a kind, with the given entries."""
    return [
        (cell, result)
        for cell, result in measured
        if cell["part"] == part and all(cell.get(k) == v for k, v in where.items())
    ]


def name(cell: Mapping[str, Any]) -> str:
    """A cell for a reader, without its kind."""
    return describe({key: value for key, value in cell.items() if key != "part"})


def curves(
    cells: Iterable[Pair], value: Callable[[Mapping[str, Any]], float], key: str = "L"
) -> dict[int, dict[int, float]]:
    """For each seed a value at each depth."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for cell, result in cells:
        found[cell["seed"]][cell[key]] = value(result)
    return dict(found)


def slope(curve: Curve, x: Callable[[int], float], y: Callable[[float], float]) -> float:
    """Slope of the least-squares line through ``(x(L), y(value))``; NaN for fewer than 2 points."""
    depths = sorted(curve)
    values = np.array([y(curve[depth]) for depth in depths])
    if len(depths) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(np.polyfit([x(depth) for depth in depths], values, 1)[0])


def rate_exponent(curve: Curve) -> float:
    """Exponent of a value in powers of ``log(2L)/L``."""
    return slope(curve, lambda depth: math.log(depth_rate(depth)), _log)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _depths(by_seed: Mapping[int, Curve]) -> str:
    depths = sorted({depth for curve in by_seed.values() for depth in curve})
    return f"L = {depths[0]} ... {depths[-1]}" if depths else ""


def _over_seeds(
    claim: Claim, by_seed: Mapping[int, Curve], value: Callable[[Curve], float], note: str = ""
) -> Verdict:
    """Decide a claim about a number that each seed's curve has."""
    found = [value(curve) for curve in by_seed.values()]
    return decide(claim, over_runs(found, run=f"all seeds, {_depths(by_seed)}"), note=note)


def _geometric(quotients: Sequence[float], **more: Any) -> Measured:
    """Geometric mean of positive numbers and its confidence interval."""
    logs = over_runs([_log(quotient) for quotient in quotients], **more)
    low, high = logs.enclosure
    return Measured(
        math.exp(logs.value), math.exp(low), math.exp(high), num_runs=logs.num_runs, run=logs.run
    )


def _at_every_depth(
    claim: Claim, by_seed: Mapping[int, Curve], *, key: str = "L", label: str = "", note: str = ""
) -> Verdict:
    return decide_every(claim, _means(by_seed, key, label), note=note)


def _means(by_seed: Mapping[int, Curve], key: str = "L", label: str = "") -> list[Measured]:
    """At each depth the mean over seeds."""
    depths = sorted({depth for curve in by_seed.values() for depth in curve})
    return [
        over_runs([c[depth] for c in by_seed.values() if depth in c], run=f"{label}{key}={depth}")
        for depth in depths
    ]


def decide_claims(measured: Sequence[Pair]) -> list[Verdict]:
    """Decide every claim, in their order."""
    found = [
        *_lemma(measured),
        *_linear(measured),
        *_initial(measured),
        *_unusual(measured),
        *_trained(measured),
        *_conv_initial(measured),
        *_conv_trained(measured),
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
            _BY_ID["t0.ratio"],
            ratio,
            note=f"σ_min is certified to be above 0 in {certified} of {len(ratio)} blocks",
        ),
        decide_all(_BY_ID["t0.skip"], skip),
        decide_all(_BY_ID["t0.bound"], bound, note=note),
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
        decide_every(_BY_ID["t1.remainder"], remainder, note=note),
        _over_seeds(_BY_ID["t1.rate"], deep, lambda curve: slope(curve, math.log, _log)),
        decide_every(_BY_ID["t1.ratio"], within),
        decide_every(_BY_ID["t1.product"], product),
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


def constants(curve: Curve) -> dict[int, float]:
    """Mean deviations as multiples of ``log(2L)/L``."""
    return {depth: value / depth_rate(depth) for depth, value in curve.items()}


def _constant_note(by_seed: Mapping[int, Curve]) -> str:
    """The constant at each depth, averaged over seeds."""
    values: dict[int, list[float]] = defaultdict(list)
    for curve in by_seed.values():
        for depth, value in constants(curve).items():
            values[depth].append(value)
    shown = ", ".join(f"{np.mean(values[d]):.2f} ± {np.std(values[d]):.2f}" for d in sorted(values))
    return (
        f"mean |1 − r|·L/log(2L) at {_depths(by_seed)}: {shown} (± standard deviation over seeds)"
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
        for m in _means(wide)
    ]
    mean = curves(cells, _mean)
    total = {s: {d: d * v for d, v in curve.items()} for s, curve in mean.items()}
    product = curves(cells, _log_product)
    return [
        decide_every(_BY_ID["init.law"], law, note=at_32),
        _over_seeds(_BY_ID["init.rate"], _deep(mean), rate_exponent, _constant_note(mean)),
        _over_seeds(_BY_ID["init.constant"], _deep(total), _power_of_depth),
        _over_seeds(
            _BY_ID["init.max"], _deep(curves(cells, _max)), rate_exponent, "expected to fail"
        ),
        _over_seeds(_BY_ID["init.product"], _deep(product), _power_of_depth),
        _at_every_depth(_BY_ID["init.product-bound"], _bounded(product)),
    ]


def _unusual(measured: Sequence[Pair]) -> list[Verdict]:
    """Nets without BN, or without skip, at initialisation."""
    skip = curves(_wide(measured, "skip"), _mean)
    narrow = [rate_exponent(c) for c in _deep(curves(_narrow(measured, "skip"), _mean)).values()]
    at_32 = f"{np.mean(narrow):.2f} ± {np.std(narrow):.2f} at width 32" if narrow else ""
    scaled = _narrow(measured, "skip, scaled")
    plain = curves(_narrow(measured, "plain, BN"), _mean)
    product = curves(_wide(measured, "plain, BN"), _log_product)

    def factor(curve: Curve) -> float:
        deepest = sorted(curve)[-2:]
        return math.exp(slope({d: curve[d] for d in deepest}, float, float))

    return [
        _over_seeds(_BY_ID["skip.flat"], _deep(skip), rate_exponent, at_32),
        _over_seeds(_BY_ID["scaled.rate"], _deep(curves(scaled, _mean)), rate_exponent),
        _over_seeds(_BY_ID["scaled.max"], _deep(curves(scaled, _max)), rate_exponent),
        _at_every_depth(_BY_ID["plain.flat"], plain),
        _over_seeds(_BY_ID["plain.product"], product, factor),
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
    losses = [Measured(_loss(result), run=name(cell)) for cell, result in [*cells, *scaled]]
    plain = parts(measured, "mlp train", net="plain, BN")
    deepest = max((c["L"] for c, _ in plain), default=0)
    stuck = [Measured(_loss(r), run=name(c)) for c, r in plain if c["L"] == deepest]
    return [
        _over_seeds(_BY_ID["train.rate"], deep, rate_exponent, _constant_note(mean)),
        _over_seeds(_BY_ID["train.at-least"], deep, rate_exponent),
        decide(_BY_ID["train.constant"], _geometric(lowered, run=f"all seeds, {_depths(deep)}")),
        _over_seeds(
            _BY_ID["train.max"],
            _deep(_in_training(cells, "max")),
            rate_exponent,
            "expected to fail",
        ),
        _at_every_depth(_BY_ID["train.product"], _bounded(_in_training(cells, "log_product"))),
        _over_seeds(_BY_ID["train.scaled"], _deep(_in_training(scaled, "mean")), rate_exponent),
        decide_every(_BY_ID["train.skip"], losses),
        decide_every(_BY_ID["train.plain"], stuck, note=_unscaled_note(measured)),
    ]


def _loss(result: Mapping[str, Any]) -> float:
    """Final loss in units of that of guessing; infinite if the training diverged."""
    return math.inf if result["status"] == "diverged" else result["loss"] / result["chance"]


def _unscaled_note(measured: Sequence[Pair]) -> str:
    cells = parts(measured, "mlp train", net="skip")
    ended = sorted({c["L"] for c, r in cells if r["status"] == "diverged"})
    if not ended:
        return ""
    return (
        f"with skip, without BN or scaling, training diverged at L = {', '.join(map(str, ended))}"
    )


# -- convolutional nets -------------------------------------------------------------------------


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


def _conv_initial(measured: Sequence[Pair]) -> list[Verdict]:
    proc, res = _conv(measured, "ProcResNet"), _conv(measured, "ResNet")
    sums = curves(proc, _identity_sum, "n")
    products = {n: curves(c, _log_product, "n") for n, c in (("ProcResNet", proc), ("ResNet", res))}
    growth = [
        over_runs([_quotient(_by_tripling(c)) for c in by_seed.values()], run=f"{net} n=2, 6, 18")
        for net, by_seed in products.items()
    ]
    closer = [
        products["ProcResNet"][seed][n] / value
        for seed, curve in products["ResNet"].items()
        for n, value in curve.items()
        if n >= 18
    ]
    deep = [(c, r) for c, r in res if c["n"] >= 18]
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
        over_runs([r["identity"]["mean"] for c, r in cells if c["n"] == 18], run=f"{net} n=18")
        for net, cells in (("ResNet", res), ("ProcResNet", proc))
    ]
    return [
        decide(
            _BY_ID["conv.rate"],
            over_runs([_quotient(_by_tripling(c)) for c in sums.values()], run="n=2, 6, 18"),
        ),
        decide(
            _BY_ID["conv.constant"],
            over_runs([_by_tripling(c)[1] / math.log(3) for c in sums.values()], run="n=6, 18"),
        ),
        decide_every(_BY_ID["conv.polynomial"], growth),
        decide(_BY_ID["conv.proc-closer"], over_runs(closer, run="n=18 and more")),
        decide(
            _BY_ID["conv.outliers"],
            _geometric([_contrast(r) for _, r in deep], run="n=18 and more"),
            note=_extremes([r for _, r in deep]),
        ),
        decide_every(
            _BY_ID["conv.proc-transitions"],
            [over_runs(values, run=run) for run, values in transitions.items()],
            note=_extremes([r for c, r in proc if c["n"] >= 18]),
        ),
        decide_every(_BY_ID["conv.isometric"], flat),
        decide_every(_BY_ID["conv.animation"], still, note="expected to fail"),
    ]


def _contrast(result: Mapping[str, Any]) -> float:
    """Mean deviation of the transitions, over that of the identity blocks."""
    return float(result["transition"]["mean"] / result["identity"]["mean"])


def _extremes(results: Sequence[Mapping[str, Any]]) -> str:
    """Say which block lies farthest from 1."""
    farthest = []
    for result in results:
        logs = np.abs(np.log(np.asarray(result["ratios"])))
        farthest.append(result["blocks"][int(logs.argmax())])
    counts = {block: farthest.count(block) for block in dict.fromkeys(farthest)}
    shown = ", ".join(f"{block} ({count} of {len(farthest)})" for block, count in counts.items())
    return f"farthest from 1: {shown}" if shown else ""


def _conv_trained(measured: Sequence[Pair]) -> list[Verdict]:
    res = parts(measured, "conv train", net="ResNet")
    proc = parts(measured, "conv train", net="ProcResNet")
    deviation = {
        net: {(c["n"], c["seed"]): float(r["training"]["transition"]["mean"]) for c, r in cells}
        for net, cells in (("ResNet", res), ("ProcResNet", proc))
    }
    repaired = [deviation["ProcResNet"][key] / value for key, value in deviation["ResNet"].items()]
    sizes = sorted({c["n"] for c, _ in res})
    outliers = [
        _geometric([_contrast(r["training"]) for c, r in res if c["n"] == n], run=f"ResNet n={n}")
        for n in sizes
    ]
    closer = [
        _geometric(
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
    note = ""
    if drift:
        shown = ", ".join(f"{value:.2f}" for value in np.mean(drift, axis=0))
        note = f"ProcResNet's transitions drift to {shown} in the last window"
    return [
        decide_every(_BY_ID["conv.train-outliers"], outliers),
        decide(_BY_ID["conv.train-repair"], _geometric(repaired, run="all seeds"), note=note),
        decide_every(_BY_ID["conv.train-identity"], closer),
    ]
