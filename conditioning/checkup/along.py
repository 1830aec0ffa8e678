"""Findings about norms along the depth: what is lost or gained over all blocks, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conditioning.checkup import limits
from conditioning.checkup.depth import (
    Chain,
    additions_of,
    base,
    carriers,
    chain_of,
    growth_of,
    holds,
    is_added,
    log,
    logs,
    over,
    pooled,
    pooled_between,
    quotient,
    runs_of,
)
from conditioning.checkup.readings import BlockReading, Finding, LayerReading
from conditioning.checkup.results import Checkup
from conditioning.spectrum import Estimate
from conditioning.theory import scaling_factor

_SHOWN = 5  # blocks that a finding names


@dataclass(frozen=True)
class _Gains:
    """Layers whose scale of weights has a right value, and how far they are from it."""

    layers: tuple[LayerReading, ...]
    rights: tuple[float, ...]

    @property
    def total(self) -> float:
        """Logarithm of what the wrong scales do to a signal that goes through all layers."""
        pairs = zip(self.layers, self.rights, strict=True)
        return sum(log(layer.weight_gain) - math.log(right) for layer, right in pairs)

    @property
    def mean(self) -> float:
        """Geometric mean of the gains."""
        return math.exp(sum(log(layer.weight_gain) for layer in self.layers) / len(self.layers))

    @property
    def right(self) -> float:
        """Geometric mean of the right ones."""
        return math.exp(sum(map(math.log, self.rights)) / len(self.rights))


def along_depth(report: Checkup, found: Sequence[Finding]) -> list[Finding]:
    """Findings about the norms over all blocks.

    Parameters
    ----------
    report : Checkup
    found : sequence of Finding
        What other rules found: a transition that loses most of the gradient says it all.
    """
    chain = chain_of(report)
    branches = _unscaled(report, chain)
    if branches is not None:
        return [branches]
    symptom = _gradient(report, chain, found)
    if symptom is not None:
        return [symptom]
    return [f for f in (_activations(chain), _collapse(report, chain)) if f is not None][:1]


def _fair(
    number: Estimate,
    blocks: Sequence[BlockReading],
    gaps: Sequence[tuple[BlockReading, BlockReading]] = (),
) -> float | None:
    """The limit that a number is beyond with its whole enclosure, if it is.

    Parameters
    ----------
    number : Estimate
    blocks : sequence of BlockReading
        Over which it goes.
    gaps : sequence of pairs of BlockReading
        Between which it goes.
    """
    most = limits.fair_factor(len(blocks))
    if number.low > most:
        return most
    means = math.prod(map(pooled, blocks)) * math.prod(pooled_between(*gap) for gap in gaps)
    least = 1 / (most * math.sqrt(means))
    return least if number.high < least else None


def _weight(number: Estimate, limit: float) -> float:
    return abs(log(number.value) - math.log(limit))


# ---------------------------------------------------------------------- the gradient


def _unscaled(report: Checkup, chain: Chain) -> Finding | None:
    """Runs of residual blocks over whose second half the gradient grows by more than a power."""
    runs = [run for run in runs_of(chain) if len(run) >= limits.FEWEST_BLOCKS]
    added = [run for run in additions_of(chain) if len(run) >= limits.FEWEST_BLOCKS]
    halves = [run[len(run) // 2 :] for run in (*runs, *added)]
    late = [block for half in halves for block in half]
    # From end to end: norms of several batches at each addition would widen what is enclosed.
    ends = [_over_run(half) for half in halves[len(runs) :]]
    second = over([*(b.ratio for half in halves[: len(runs)] for b in half), *ends])
    limit = limits.second_half(len(halves))
    if not halves or not second.low > limit:
        return None
    blocks = chain.of_kind("identity", "transition")
    product = over([*(b.ratio for b in blocks), *map(_over_run, added)])
    count = len(blocks) + sum(map(len, added))
    tau = scaling_factor(count, 0.5)
    worst = carriers(late, limits.MOST)[:_SHOWN]
    evidence = f"blocks[{[b.name for b in report.blocks].index(worst[0].name)}]"
    return Finding(
        "unscaled-branches", "problem", _weight(second, limit), tuple(b.name for b in worst),
        f"The gradient grows by {product.value:.3g} over {count} residual blocks, and in the "
        f"second half of each run of equal ones still by {second.brief()} (with normalisation or "
        f"scaled branches it would be at most {limit:.2g}): exponentially in the depth. Most in "
        f"{_listed(worst)}.",
        f"Multiply the branches by tau = 1/sqrt({count}) = {tau:.3g}, which bounds the growth by a "
        f"constant (arXiv:1903.07120), or put a normalisation into each branch.",
        second, limit, f"{evidence}.{'ratio' if worst[0] in report.blocks else 'grad_in'}",
    )  # fmt: skip


def _over_run(run: Sequence[BlockReading]) -> Estimate:
    return quotient(run[0].grad_in, run[-1].grad_out)


def _gradient(report: Checkup, chain: Chain, found: Sequence[Finding]) -> Finding | None:
    limit = _fair(chain.product, chain.covered, chain.gaps)
    if limit is None:
        return None
    lost = limit < 1
    whole = logs(chain.product).value
    said = {f.where[0] for f in found if f.kind == "transition-loses-gradient" and f.where}
    explained = sum(log(b.ratio.value) for b in chain.known if b.name in said)
    if said and explained / whole >= limits.MOST:
        return None
    between = _between(chain, whole)
    gains = _gains(report, chain)
    by_gain = gains is not None and gains.total / whole >= limits.MOST and between is None
    plain = _plain_layers(report, chain)
    if gains is not None and by_gain and len(plain) < limits.PLAIN_DEPTH:
        return _gain(report, chain, gains, limit)
    worst = carriers(chain.known, limits.MOST)
    one = between is None and len(worst) == 1 and len(chain.known) > 2
    shown = worst[:_SHOWN]
    if between is not None:
        spread = f"Most of that happens between {between}."
        remedy = f"Look at what runs between {between}, outside of them."
    else:
        few = one or len(worst) < max(len(chain.known) // 4, 2)
        spread = _spread(worst, few=few, inside=_share(chain, whole) >= limits.MOST)
        no_skips = bool(plain) and not chain.has_skips
        remedy = _remedy(shown, one=one, plain=no_skips, gains=gains)
    scale = ""
    if gains is not None and by_gain:
        scale = (
            f" The weights have gain {gains.mean:.3g} where {gains.right:.3g} keeps norms, which "
            f"accounts for {min(gains.total / whole, 1):.0%} of the logarithm."
        )
    return Finding(
        "gradient-vanishes" if lost else "gradient-explodes", "problem",
        _weight(chain.product, limit), tuple(b.name for b in shown) if one else (),
        f"{_changed(chain)}; healthy nets of this depth stay {'above' if lost else 'below'} "
        f"{limit:.2g}. {spread}{scale}",
        remedy, chain.product, limit, chain.evidence,
    )  # fmt: skip


def _spread(worst: Sequence[BlockReading], *, few: bool, inside: bool) -> str:
    """Which blocks change the gradient most."""
    names = _listed(worst[:_SHOWN])
    if not inside:
        among = f"; of the blocks most in {names}" if names else ""
        return f"Most of that happens between the blocks{among}."
    if few:
        return f"Most of that happens in {names}."
    return (
        f"It is spread over the depth: half of it comes from {len(worst)} blocks, most of all "
        f"{names}."
    )


def _share(chain: Chain, whole: float) -> float:
    """How much of the logarithm happens inside of blocks."""
    return sum(log(block.ratio.value) for block in chain.known) / whole


def _between(chain: Chain, whole: float) -> str | None:
    """The names of the two blocks between which most of the gradient is lost or gained, if any."""
    if _share(chain, whole) >= limits.MOST:
        return None
    jumps = [
        (log(jump.value) / whole, first.name, after.name)
        for first, after in chain.gaps
        if not math.isnan((jump := quotient(first.grad_out, after.grad_in)).value)
    ]
    share, first, after = max(jumps, default=(0.0, "", ""))
    return f"'{first}' and '{after}'" if share >= limits.MOST else None


def _changed(chain: Chain) -> str:
    """The beginning of a sentence: what the blocks do to the gradient."""
    way = f"on its way back through {len(chain.covered)} blocks"
    if not chain.product.value:
        return f"Nothing is left of the gradient {way}"
    if chain.product.value < 1:
        return f"The gradient keeps only {chain.product.brief()} of its norm {way}"
    return f"The norm of the gradient is multiplied by {chain.product.brief()} {way}"


def _remedy(worst: Sequence[BlockReading], *, one: bool, plain: bool, gains: _Gains | None) -> str:
    if one and worst[0].kind == "transition":
        name = worst[0].name
        return (
            f"Make the layers of '{name}' norm-preserving: "
            f"conditioning.Procrustes(['{name}.*'], model=model)."
        )
    if one:
        return f"Look into '{worst[0].name}': its weights, biases and activations."
    if plain:
        gain = f", and draw the weights with gain {gains.right:.3g}" if gains else ""
        return f"Lead identity skips around every two or three layers{gain}."
    return "Put normalisations into the branches, and keep the skips free of layers."


def _listed(blocks: Sequence[BlockReading]) -> str:
    return ", ".join(f"'{b.name}' ({b.ratio.value:.3g})" for b in blocks)


# ---------------------------------------------------------------------- the scale of weights


def _plain_layers(report: Checkup, chain: Chain) -> list[LayerReading]:
    """Layers in blocks without a skip, in them or around them."""
    plain = [block for block in chain.blocks if block.kind == "plain" and not is_added(block)]
    return [layer for layer in report.layers if any(holds(b.name, layer.name) for b in plain)]


def _gains(report: Checkup, chain: Chain) -> _Gains | None:
    """Layers of plain blocks in front of an activation with a right gain, not normalised.

    The layers of blocks that the product does not cover are left out, and so is the head.
    """
    unknown = {base(b.name) for b in chain.blocks if b not in chain.known}
    chosen, rights = [], []
    for layer in _plain_layers(report, chain):
        if layer.normalised or layer.role in ("head", "transition"):
            continue
        if any(holds(name, layer.name) for name in unknown):
            continue
        right = limits.RIGHT_GAIN.get(layer.followed_by or _next_activation(report, layer))
        if right is not None:
            chosen.append(layer)
            rights.append(right)
    return _Gains(tuple(chosen), tuple(rights)) if len(chosen) >= limits.FEWEST_LAYERS else None


def _next_activation(report: Checkup, layer: LayerReading) -> str:
    """The activation that runs after a layer and before the next one, as behind a pooling."""
    after = [other.depth for other in report.layers if other.depth > layer.depth]
    between = [
        use.function
        for use in report.activations
        if layer.depth < use.depth < min(after, default=math.inf)
    ]
    return between[0] if between else ""


def _gain(report: Checkup, chain: Chain, gains: _Gains, beyond: float) -> Finding:
    count = len(gains.layers)
    mean, right = gains.mean, gains.right
    # The gain at which the layers alone would bring the product to the limit.
    limit = right * beyond ** (1 / count)
    worst = sorted(
        zip(gains.layers, gains.rights, strict=True),
        key=lambda pair: -abs(log(pair[0].weight_gain / pair[1])),
    )
    names = tuple(layer.name for layer, _ in worst[:_SHOWN])
    index = report.layers.index(worst[0][0])
    kaiming = abs(right - math.sqrt(2)) < 0.01
    call = (
        "torch.nn.init.kaiming_normal_(weight, nonlinearity='relu')"
        if kaiming
        else f"torch.nn.init.normal_(weight, std={right:.3g} / sqrt(fan_in))"
    )
    return Finding(
        "weight-gain", "problem", _weight(chain.product, beyond), names,
        f"The weights of {count} layers have gain {mean:.3g} (geometric mean of sqrt(fan_in) times "
        f"their root mean square) where {right:.3g} keeps norms. {_changed(chain)}, and the gain "
        f"accounts for {min(gains.total / logs(chain.product).value, 1):.0%} of the logarithm.",
        f"Draw them with gain {right:.3g}: {call}.",
        Estimate.exact(mean), limit, f"layers[{index}].weight_gain",
    )  # fmt: skip


# ---------------------------------------------------------------------- activations


def _activations(chain: Chain) -> Finding | None:
    found: list[Finding] = []
    for segment in chain.segments:
        growth = growth_of(segment)
        limit = None if math.isnan(growth.value) else _fair(growth, segment)
        if limit is not None:
            found.append(_out_of_range(growth, limit, segment))
    return max(found, key=lambda finding: finding.weight, default=None)


def _out_of_range(growth: Estimate, limit: float, segment: Sequence[BlockReading]) -> Finding:
    lost = limit < 1
    grown = [(growth_of([block]).value, block) for block in segment if block.act_in.value > 0]
    change, worst = (min if lost else max)(grown, key=lambda pair: pair[0])
    name = worst.name
    return Finding(
        "activations-vanish" if lost else "activations-explode", "problem",
        _weight(growth, limit), (name,),
        f"The root mean square of the activations changes by a factor of {growth.brief()} over "
        f"{len(segment)} blocks, most in '{name}' ({change:.3g}), while the gradient stays in "
        f"range.",
        f"Look into '{name}': the scale of its weights and biases, and a normalisation that hides "
        f"it from the gradient.",
        growth, limit, f"blocks[{worst.depth}].act_out",
    )  # fmt: skip


def _collapse(report: Checkup, chain: Chain) -> Finding | None:
    """Plain nets whose gates no longer tell one sample from another."""
    if chain.has_skips or report.setting.num_samples < limits.FEWEST_SAMPLES:
        return None
    if len(_plain_layers(report, chain)) < limits.PLAIN_DEPTH:
        return None
    uses = [(i, use) for i, use in enumerate(report.activations) if use.function == "relu"]
    last = uses[-(len(uses) // 3) :] if len(uses) >= 3 else []
    closed = sum(use.flat_share for _, use in last)
    if not closed:
        return None
    share = sum(use.dead_share for _, use in last) / closed
    if not share > limits.COLLAPSED:
        return None
    number = Estimate.exact(share)
    return Finding(
        "inputs-collapse", "problem", _weight(number, limits.COLLAPSED), (),
        f"In the last {len(last)} ReLUs of this plain net {min(share, 1):.0%} of the closed gates "
        f"are closed for all {report.setting.num_samples} samples: the layers there are nearly one "
        f"linear map, and hardly tell samples apart.",
        "Lead identity skips around every two or three layers, or put BatchNorm in front of the "
        "activations.",
        number, limits.COLLAPSED, f"activations[{last[-1][0]}].dead_share",
    )  # fmt: skip
