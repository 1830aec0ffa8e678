"""Verdicts about maps over the Hurst index and the scaling."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conditioning import theory
from experiments.claims import Measured, Verdict, decide, decide_every, over_runs
from experiments.large_depth import frontier
from experiments.large_depth.statements import BY_ID
from experiments.sweep import Pair

Context = Mapping[str, Any]
# The critical beta of every net, by H.
Crossings = Mapping[float, list[float]]


def decide_maps(measured: Sequence[Pair], context: Context) -> list[Verdict]:
    """Decide the claims about maps."""
    sizes = context["sizes"]
    betas, depth = sizes.map_betas, sizes.map_depth
    output = frontier.crossings(measured, betas, "res-3")
    slow = frontier.crossings(measured, betas, "res-3", "gradient")
    single = frontier.crossings(measured, betas, "res-1")
    single_slow = frontier.crossings(measured, betas, "res-1", "gradient")

    def on_line(
        claim: str, found: Crossings, block: str, *, gradient: bool = False, compounded: bool = True
    ) -> Verdict:
        lines = [
            over_runs(
                values, run=f"H = {hurst}",
                expected=theory.critical_beta(
                    depth, hurst, block, gradient=gradient, width=sizes.width,
                    compounded=compounded,
                ),
            )
            for hurst, values in found.items()
        ]  # fmt: skip
        return decide_every(BY_ID[claim], lines, note=_departures(lines))

    rising = [hurst for hurst in output if hurst >= 0.5]
    slower = {h: np.subtract(slow[h], output[h]).tolist() for h in output}
    gaps = {h: over_runs(values, run=f"H = {h}") for h, values in slower.items()}
    rises = [_difference(output, b, a) for a, b in itertools.pairwise(rising)]
    return [
        on_line("map.line", output, "res-3"),
        on_line("map.line-first", output, "res-3", compounded=False),
        _compounding(output, depth),
        decide_every(
            BY_ID["map.plateau"], [_difference(output, h, 0.5) for h in output if h < 0.5]
        ),
        decide_every(BY_ID["map.rises"], rises),
        decide(BY_ID["map.end"], _difference(output, max(output), 0.5)),
        decide_every(BY_ID["map.gradient"], [*gaps.values()], note=_by_hurst([*gaps.values()])),
        decide_every(BY_ID["map.gradient-below"], [gaps[h] for h in gaps if h > 0.5]),
        on_line("map.gradient-line", slow, "res-3", gradient=True),
        decide_every(
            BY_ID["map.no-plateau"], [_difference(single, h, 0.5) for h in single if h < 0.5]
        ),
        on_line("map.single", _smoother(single), "res-1"),
        on_line("map.single-rough", _rougher(single), "res-1"),
        on_line("map.single-gradient", _smoother(single_slow), "res-1", gradient=True),
        on_line("map.single-gradient-rough", _rougher(single_slow), "res-1", gradient=True),
    ]  # fmt: skip


def _smoother(found: Crossings) -> Crossings:
    return {hurst: values for hurst, values in found.items() if hurst >= 0.5}


def _rougher(found: Crossings) -> Crossings:
    return {hurst: values for hurst, values in found.items() if hurst < 0.5}


def _compounding(output: Crossings, depth: int) -> Verdict:
    """By how much every net is nearer to one line than to the other."""
    nearer = {}
    for hurst, values in output.items():
        first, compounded = (
            theory.critical_beta(depth, hurst, compounded=kind) for kind in (False, True)
        )
        found = np.asarray(values, dtype=float)
        nearer[hurst] = np.abs(found - first) - np.abs(found - compounded)
    pooled = over_runs(
        np.concatenate([*nearer.values()]).tolist(), run=f"{len(nearer)} values of H"
    )  # fmt: skip
    means = [over_runs(values.tolist(), run=f"H = {hurst}") for hurst, values in nearer.items()]
    return decide(BY_ID["map.compounding"], pooled, note=_by_hurst(means))


def _difference(found: Crossings, hurst: float, other: float) -> Measured:
    """Nets of different H are independent: any pairing gives the mean and its interval."""
    values = np.subtract(found[hurst], found[other]).tolist()
    return over_runs(values, run=f"H = {hurst} less {other}")


def _by_hurst(gaps: Sequence[Measured]) -> str:
    """Means at every H, for a reader."""
    return ", ".join(f"{gap.run}: {gap.value:+.3f}" for gap in gaps)


def _departures(lines: Sequence[Measured]) -> str:
    """How far the means are off, for a reader."""
    gaps = [one.value - (one.expected or 0.0) for one in lines]
    if not gaps:
        return ""
    means = ", ".join(f"{one.run}: {one.value:.3f}" for one in lines)
    return f"means are {min(gaps):+.3f} ... {max(gaps):+.3f} off; {means}"
