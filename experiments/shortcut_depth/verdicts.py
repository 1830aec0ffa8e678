"""From measured cells to one verdict for each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from experiments.readings import enclosed, growth_exponent, number, slope_of
from experiments.shortcut_depth.statements import CLAIMS
from experiments.sweep import Pair, name, parts

_BY_ID = {claim.id: claim for claim in CLAIMS}


def decide_claims(measured: Sequence[Pair], context: Mapping[str, Any]) -> list[Verdict]:
    """Decide every claim, in their order."""
    singular = np.asarray(context["singular_values"])
    found = [
        *_two(measured, singular, context),
        *_smooth(measured),
        *_high(measured),
        *_one(measured),
        *_initial(measured, singular),
        *_relu(measured),
        _pyhessian(measured),
    ]
    by_id = {verdict.claim.id: verdict for verdict in found}
    return [by_id[claim.id] for claim in CLAIMS]


def _two(
    measured: Sequence[Pair], singular: np.ndarray, context: Mapping[str, Any]
) -> list[Verdict]:
    dim = int(context["dim"])
    signs = "over the signs of the components κ(D) is {:.3f} ... {:.3f}".format(
        *context["kappa_over_signs"]
    )
    kappa = float(singular[0] / singular[-1])
    cells = parts(measured, "two")
    ends = [enclosed(r["kappa"], expected=kappa, run=name(c)) for c, r in cells]
    ends += [
        enclosed(r["dense"], expected=kappa, run=f"{name(c)} dense")
        for c, r in cells
        if "dense" in r
    ]
    errors = []
    for cell, result in cells:
        if "values" in result:
            units = cell["L"] // 2
            predicted = np.sort(np.repeat(np.concatenate([singular, -singular]), dim * units))
            distance = np.abs(np.asarray(result["values"]) - predicted).max() / singular[0]
            errors.append(Measured(float(distance), run=name(cell)))
    statuses = {name(c): r["kappa"]["status"] == "exhausted" for c, r in cells}
    products = [
        Measured(r["kappa"]["num_matvecs"], expected=2 * dim + 1, run=name(c)) for c, r in cells
    ]
    dense = [enclosed(r["index"], run=name(c)) for c, r in cells if "values" in r]
    beyond = [r["index"] for _, r in cells if "values" not in r]
    inside = sum(i["low"] <= 0.5 <= i["high"] for i in beyond)
    note = f"beyond n = 4096 the Lanczos enclosure contains 1/2 in {inside} of {len(beyond)} cells"
    return [
        decide_every(_BY_ID["n2.kappa"], ends, note=signs),
        decide_every(_BY_ID["n2.spectrum"], errors),
        decide_all(_BY_ID["n2.exhausted"], statuses),
        decide_every(_BY_ID["n2.products"], products),
        decide_every(_BY_ID["n2.index"], dense, note=note),
    ]


def _smooth(measured: Sequence[Pair]) -> list[Verdict]:
    cells = parts(measured, "smooth")
    good = [(c, r) for c, r in cells if c.get("mid") != "sigmoid"]
    bad = [(c, r) for c, r in cells if c.get("mid") == "sigmoid"]

    def kappas(some: Sequence[Pair]) -> list[Measured]:
        return [
            enclosed(r[route], expected=r["predicted"], run=f"{name(c)} {route}")
            for c, r in some
            for route in ("kappa", "dense")
            if route in r
        ]

    return [
        decide_every(_BY_ID["n2.smooth"], kappas(good)),
        decide_every(
            _BY_ID["n2.smooth-spectrum"], [Measured(r["error"], run=name(c)) for c, r in good]
        ),
        decide_every(
            _BY_ID["n2.violated"],
            [enclosed(r["dense"], expected=r["predicted"], run=name(c)) for c, r in bad],
            note="expected to fail",
        ),
        decide_every(
            _BY_ID["n2.violated-gradient"],
            [Measured(r["gradient"], run=name(c)) for c, r in bad],
        ),
    ]


def _high(measured: Sequence[Pair]) -> list[Verdict]:
    cells = parts(measured, "high order")
    lower, leading = [], []
    for cell, result in cells:
        *below, top = result["derivatives"]
        worst = max(abs(value) for value in [*below, result["gradient"]])
        lower.append(Measured(worst, run=name(cell)))
        leading.append(Measured(top, expected=result["predicted"], run=name(cell)))
    zero = {name(c): bool(r["zero"]) for c, r in cells if c["n"] >= 3}
    return [
        decide_every(_BY_ID["n3.stationary"], lower),
        decide_every(_BY_ID["n3.order"], leading),
        decide_all(_BY_ID["n3.zero-hessian"], zero),
    ]


def _one(measured: Sequence[Pair]) -> list[Verdict]:
    isotropic = parts(measured, "isotropic")
    regular = [(c, r) for c, r in isotropic if c["s"] < 1]
    singular = [(c, r) for c, r in isotropic if c["s"] > 1]
    zero = parts(measured, "zero targets")
    one = parts(measured, "one")
    quotients = [number(r["dense"]["value"]) / c["L"] for c, r in one if c["L"] >= 2]
    curve = {c["L"]: number(r["kappa10"]["value"]) for c, r in one}
    exponent, slope = growth_exponent(curve), slope_of(curve)
    at_ten = [value / depth for depth, value in curve.items() if depth >= 2]
    return [
        decide_every(
            _BY_ID["n1.isotropic"],
            [
                enclosed(r[route], expected=r["predicted"], run=f"{name(c)} {route}")
                for c, r in regular
                for route in ("kappa", "dense")
            ],
        ),
        decide_every(
            _BY_ID["n1.isotropic-spectrum"],
            [Measured(r["error"], run=name(c)) for c, r in isotropic],
        ),
        decide_every(
            _BY_ID["n1.nullity"],
            [
                enclosed(r["dense"]["nullity"], expected=r["predicted_nullity"], run=name(c))
                for c, r in singular
            ],
        ),
        decide_every(
            _BY_ID["n1.zero-targets"],
            [enclosed(r["dense"], expected=r["predicted"], run=name(c)) for c, r in zero],
        ),
        decide_every(_BY_ID["n1.hessian"], [Measured(r["error"], run=name(c)) for c, r in one]),
        decide(
            _BY_ID["n1.kappa10-linear"],
            exponent,
            note=f"κ₁₀ rises by {slope[0]:.3f} ± {slope[1]:.3f} a layer (95 %, L >= 2)",
        ),
        decide(
            _BY_ID["n1.kappa-erratic"],
            Measured(max(quotients) / min(quotients), run=f"{len(quotients)} depths"),
            note=f"the same quotient of κ₁₀ is {max(at_ten) / min(at_ten):.2f}",
        ),
    ]


def _initial(measured: Sequence[Pair], singular: np.ndarray) -> list[Verdict]:
    def kappa10(net: str) -> dict[tuple[int, int], Mapping[str, Any]]:
        return {
            (c["L"], c["seed"]): r["kappa10"] for c, r in parts(measured, "initialisation", net=net)
        }

    two, orthogonal = kappa10("2-shortcut, 0.01 Xavier"), kappa10("plain, orthogonal")
    xavier = kappa10("plain, Xavier")
    moment = torch.diag(torch.from_numpy(np.ascontiguousarray(singular)))
    flat = []
    for (depth, seed), result in two.items():
        exact = theory.two_shortcut_spectrum(moment, depth // 2)
        expected = exact.condition_number(percentile=10)
        flat.append(enclosed(result, expected=expected, run=f"L={depth} seed={seed}"))
    seeds = sorted({seed for _, seed in orthogonal})
    exponents = [
        growth_exponent({d: number(r["value"]) for (d, s), r in orthogonal.items() if s == seed})
        for seed in seeds
    ]
    explode = [
        Measured(number(r["low"]), number(r["low"]), number(r["high"]), run=f"L={d} seed={s}")
        for (d, s), r in xavier.items()
        if d >= 16
    ]
    ratios = [
        Measured(
            number(r["low"]) / number(orthogonal[key]["high"]), run=f"L={key[0]} seed={key[1]}"
        )
        for key, r in xavier.items()
        if key[0] >= 4
    ]
    rotated = [Measured(r["error"], run=name(c)) for c, r in parts(measured, "rotation")]
    return [
        decide_every(_BY_ID["init.two-shortcut"], flat),
        decide(_BY_ID["init.orthogonal"], over_runs([e.value for e in exponents], run="all seeds")),
        decide_every(_BY_ID["init.rotation"], rotated),
        decide_every(_BY_ID["init.xavier"], explode),
        decide_every(_BY_ID["init.faster"], ratios),
    ]


def _relu(measured: Sequence[Pair]) -> list[Verdict]:
    cells = parts(measured, "relu")
    warned = {name(c): bool(r["warned"] and r["autograd_zero"]) for c, r in cells}
    return [
        decide_all(_BY_ID["relu.warning"], warned),
        decide_every(_BY_ID["relu.limit"], [Measured(r["error"], run=name(c)) for c, r in cells]),
    ]


def _pyhessian(measured: Sequence[Pair]) -> Verdict:
    claim = _BY_ID["check.pyhessian"]
    values = [
        Measured(r["largest"]["pyhessian"], expected=r["largest"]["lanczos"], run=f"n=1 {name(c)}")
        for c, r in parts(measured, "one")
        if "largest" in r and c["L"] >= 2
    ]
    two = [r["largest"] for _, r in parts(measured, "two") if "largest" in r]
    wrong = sum(abs(abs(t["pyhessian"]) / abs(t["lanczos"]) - 1) > 1e-2 for t in two)
    return decide_every(
        claim, values, note=f"at depth 2 it is off by more than 1 % in {wrong} of {len(two)} cells"
    )
