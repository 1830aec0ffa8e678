"""What theory says for a network of this depth, next to what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from conditioning.checkup.readings import BlockReading, LayerReading, Prediction
from conditioning.spectrum import Estimate
from conditioning.spectrum.full import NAN
from conditioning.theory import ratio_band

_NORM_PRESERVATION = "Zaeemzadeh, Rahnavard, Shah, arXiv:1805.07477"
_NARROW = 1.1  # bands of blocks whose |J - I| is not known to a tenth say nothing
_EQUAL = 0.01  # singular values this near to the target count as equal to it
_ORDER_ONE = math.e
_LEMMA = f"{_NORM_PRESERVATION}, the lemma behind Theorem 1"
_TAU = "Zhang, Yu, Yi, Chen, Liu, arXiv:1903.07120"


def predictions(
    blocks: Sequence[BlockReading], layers: Sequence[LayerReading], *, same_samples: bool
) -> tuple[Prediction, ...]:
    """All predictions that apply to the blocks and layers that were measured.

    Parameters
    ----------
    blocks, layers
    same_samples : bool
        Whether ratios and Jacobians were measured on the same samples: else nothing that is said
        of the ones by the others is refuted.
    """
    bands = list(_bands(blocks))
    if not same_samples:
        bands = [
            replace(band, agrees="not decided") if band.agrees == "outside" else band
            for band in bands
        ]
    return (*bands, *_growth(blocks), *_transitions(layers))


def _compared(measured: Estimate, low: float, high: float) -> str:
    if math.isnan(measured.value):
        return "not decided"
    if low <= measured.low and measured.high <= high:
        return "inside"
    return "outside" if measured.high < low or measured.low > high else "not decided"


def _chain(blocks: Sequence[BlockReading]) -> list[BlockReading]:
    return [b for b in blocks if b.kind == "identity" and not math.isnan(b.ratio.value)]


def _branch(block: BlockReading) -> Estimate:
    """``|J - I|``, NaN where it was not measured."""
    jacobian = block.jacobian
    return NAN if jacobian is None or jacobian.branch is None else jacobian.branch


def _bands(blocks: Sequence[BlockReading]) -> Iterator[Prediction]:
    """Ratios within 1 +- ||J - I||, and their product."""
    known = [b for b in _chain(blocks) if _branch(b).high <= _NARROW * _branch(b).low]
    if not known:
        return
    widest = max(known, key=lambda b: _branch(b).high)
    low, high = ratio_band(_branch(widest).high)
    ratios = np.array([[b.ratio.value, b.ratio.low, b.ratio.high] for b in known])
    measured = Estimate(
        float(ratios[:, 0].mean()), float(ratios[:, 1].min()), float(ratios[:, 2].max())
    )
    yield Prediction(
        "ratio of every identity block: within 1 ± δ, δ being the largest |J - I|", low, high,
        measured, _compared(measured, low, high), _LEMMA,
        f"|J - I| = {_branch(widest).brief()} in {widest.name}, on the samples that Jacobians were "
        f"taken on; measured is the mean of {len(known)} blocks with the least and the largest",
    )  # fmt: skip
    if len(known) < 2 or len(known) < len(_chain(blocks)):
        return
    bands = np.array([ratio_band(_branch(b).high) for b in known])
    low, high = (float(end) for end in bands.prod(axis=0))
    measured = Estimate(*(float(end) for end in ratios.prod(axis=0)))
    yield Prediction(
        f"product of the ratios of {len(known)} identity blocks: within the product of their bands",
        low, high, measured, _compared(measured, low, high),
        f"{_LEMMA}, block by block", "",
    )  # fmt: skip


def _growth(blocks: Sequence[BlockReading]) -> Iterator[Prediction]:
    """Growth of activations over a run of identity blocks, at tau = 1/sqrt(L)."""
    for run in _runs(blocks):
        count = len(run)
        first, last = run[0].act_in, run[-1].act_out
        if count < 3 or not first.value > 0 or not math.isfinite(last.value):
            continue
        measured = Estimate(
            last.value / first.value,
            last.low / first.high if first.high else math.nan,
            last.high / first.low if first.low else math.nan,
        )
        yield Prediction(
            f"growth of the activations over the {count} blocks {run[0].name} ... {run[-1].name}, "
            f"as if their branches were scaled by 1/√{count}: of order 1",
            1 / _ORDER_ONE, _ORDER_ONE, measured, _compared(measured, 1 / _ORDER_ONE, _ORDER_ONE),
            f"{_TAU}, Theorem 1; the limit √e = 1.65 is conditioning.theory.limit_log_growth",
            "taken as of order 1: a factor of e either way; outside means that the branches here "
            "add more than branches of He's size times 1/√L would",
        )  # fmt: skip


def _runs(blocks: Sequence[BlockReading]) -> Iterator[list[BlockReading]]:
    """Identity blocks that follow one another at one shape."""
    run: list[BlockReading] = []
    for block in blocks:
        if block.kind == "identity" and (not run or run[-1].shapes == block.shapes):
            run.append(block)
            continue
        if run:
            yield run
        run = [block] if block.kind == "identity" else []
    if run:
        yield run


def _transitions(layers: Sequence[LayerReading]) -> Iterator[Prediction]:
    """Singular values of transitions against those that keep the norm of gradients."""
    for layer in layers:
        if layer.role != "transition" or layer.largest is None or layer.smallest is None:
            continue
        if layer.target is None:
            continue
        measured = Estimate(
            math.sqrt(max(layer.largest.value * layer.smallest.value, 0.0)),
            layer.smallest.low, layer.largest.high,
        )  # fmt: skip
        low, high = layer.target * (1 - _EQUAL), layer.target * (1 + _EQUAL)
        agrees = _compared(measured, low, high)
        if layer.smallest.high < low or layer.largest.low > high:
            agrees = "outside"
        yield Prediction(
            f"singular values of the transition {layer.name}: all {layer.target:.4g} within 1 %",
            low, high, measured, agrees,
            f"{_NORM_PRESERVATION}, section 4 (Procrustes ResNets)",
            "the range is that of the singular values that are not zero by structure; if all are "
            "this one, random gradients keep their norm in the mean",
        )  # fmt: skip
