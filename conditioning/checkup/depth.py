"""Norms along the depth: the chain of blocks that a gradient goes through, and who changes it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conditioning.checkup.readings import BlockReading, LayerReading
from conditioning.checkup.results import Checkup
from conditioning.spectrum import Estimate

#: Stands for zero in logarithms: below any positive float64.
_TINY = 1e-320
#: Norms this near to each other, relative to them, are those of one tensor.
_SAME = 1e-2
_RUN = re.compile(r"(?:(?P<parent>.*)\.)?(?P<first>\w+)-(?P<last>\w+)$")


def log(value: float) -> float:
    """Logarithm of a norm or ratio that may be zero."""
    return math.log(max(value, _TINY)) if value < math.inf else math.inf


def logs(number: Estimate) -> Estimate:
    """Logarithms of an estimate and its ends."""
    return Estimate(log(number.value), log(number.low), log(number.high))


def base(name: str) -> str:
    """A block without the number of its call."""
    return name.split("#")[0].split("@")[0]


def holds(block: str, name: str) -> bool:
    """Whether a block of this name contains the module ``name`` (or is it).

    A run of children such as ``features.3-5`` holds ``features.4.relu``. Where children have
    names instead of numbers, only the ends of a run are known to lie in it.
    """
    block, name = base(block), base(name)
    if name == block or name.startswith(f"{block}."):
        return True
    run = _RUN.match(block)
    if run is None:
        return False
    prefix = f"{run['parent']}." if run["parent"] else ""
    if not name.startswith(prefix):
        return False
    child = name[len(prefix) :].split(".")[0]
    first, last = run["first"], run["last"]
    if first.isdigit() and last.isdigit() and child.isdigit():
        return int(first) <= int(child) <= int(last)
    return child in (first, last)


@dataclass(frozen=True)
class Chain:
    """The outermost blocks in order, those of recurrent layers left out.

    Attributes
    ----------
    blocks : tuple of BlockReading
    product : Estimate
        Gradient norm in front of the first block over that behind the last.
    growth : Estimate
        Norm of the activations behind the last over that in front of the first.
    covered : tuple of BlockReading
        The blocks that the product goes over.
    evidence : str
        Where the product stands in the checkup.
    """

    blocks: tuple[BlockReading, ...]
    product: Estimate
    growth: Estimate
    covered: tuple[BlockReading, ...]
    evidence: str

    @property
    def known(self) -> list[BlockReading]:
        """Blocks with a ratio, of those that the product covers."""
        return [block for block in self.covered if not math.isnan(block.ratio.value)]

    def of_kind(self, *kinds: str) -> list[BlockReading]:
        """Blocks of these kinds with a ratio."""
        return [block for block in self.known if block.kind in kinds]


def chain_of(report: Checkup) -> Chain:
    """Take the blocks of a checkup that lie in no other, and the norms over all of them.

    The gradient in front of a plain first block that holds the first layer is one by the data,
    which moves no parameter: the product then begins behind that block.
    """
    names = {base(block.name) for block in report.blocks}
    times = [entry.name for entry in report.recurrent]

    def inside(name: str) -> bool:
        return any(other != name and holds(other, name) for other in names)

    outer = tuple(block for block in report.blocks if not inside(base(block.name)))
    kept = tuple(b for b in outer if not any(holds(b.name, name) for name in times))
    product, covered, evidence = report.product, kept, "product"
    if len(kept) < len(outer):
        product = over(b.ratio for b in kept)
    elif kept and kept[0].kind == "plain" and _comes_first(kept[0], report.layers):
        covered = kept[1:]
        product, evidence = _behind(report, kept[0], covered)
    growth = nan()
    if kept and len(kept) == len(outer):
        growth = quotient(kept[-1].act_out, kept[0].act_in)
    return Chain(kept, product, growth, covered, evidence)


def _behind(
    report: Checkup, first: BlockReading, covered: Sequence[BlockReading]
) -> tuple[Estimate, str]:
    """Gradient norm behind the first block over that behind the last, and where it stands."""
    if not covered:
        return nan(), ""
    after = covered[0]
    if math.isclose(first.grad_out.value, after.grad_in.value, rel_tol=_SAME):
        return after.product, f"blocks[{report.blocks.index(after)}].product"
    # Other ways than through the next block lead there, as in a U-Net.
    evidence = f"blocks[{report.blocks.index(first)}].grad_out"
    return quotient(first.grad_out, covered[-1].grad_out), evidence


def _comes_first(block: BlockReading, layers: Sequence[LayerReading]) -> bool:
    first = min(layers, key=lambda layer: layer.depth, default=None)
    return first is not None and holds(block.name, first.name)


def pooled(block: BlockReading) -> float:
    """Over how many positions a block without skip takes the mean at most, by its shapes.

    A mean over ``k`` positions divides the norm of a gradient by ``sqrt(k)``, with nothing wrong.
    """
    sides = [side.split("x") for side in block.shapes.split(" -> ")]
    if block.kind != "plain" or len(sides) != 2 or len(sides[0]) < 4:
        return 1.0
    before, after = (math.prod(int(size) for size in side[2:]) for side in sides)
    return max(before / max(after, 1), 1.0)


def nan() -> Estimate:
    """No number."""
    return Estimate(math.nan, math.nan, math.nan)


def quotient(over_: Estimate, under: Estimate) -> Estimate:
    """Quotient of two numbers that are not negative, with what their enclosures allow."""

    def ratio(a: float, b: float) -> float:
        return a / b if b else (math.nan if not a else math.inf)

    return Estimate(
        ratio(over_.value, under.value), ratio(over_.low, under.high), ratio(over_.high, under.low)
    )


def over(ratios: Iterable[Estimate]) -> Estimate:
    """Product of those that are numbers; NaN of none."""
    known = [logs(ratio) for ratio in ratios if not math.isnan(ratio.value)]
    if not known:
        return nan()
    ends = (sum(getattr(r, end) for r in known) for end in ("value", "low", "high"))
    return Estimate(*(math.exp(min(end, 700.0)) for end in ends))


def carriers(blocks: Sequence[BlockReading], share: float) -> list[BlockReading]:
    """The fewest blocks that make up a share of what is lost or gained, the worst first.

    Parameters
    ----------
    blocks : sequence of BlockReading
        With ratios.
    share : float
        Of the sum of the logarithms that have the sign of the whole.
    """
    values = [(log(block.ratio.value), block) for block in blocks]
    sign = 1.0 if sum(value for value, _ in values) >= 0 else -1.0
    values = sorted(values, key=lambda pair: -sign * pair[0])
    whole = sum(max(sign * value, 0.0) for value, _ in values)
    found: list[BlockReading] = []
    done = 0.0
    for value, block in values:
        if done >= share * whole or sign * value <= 0:
            break
        found.append(block)
        done += sign * value
    return found


def runs_of(chain: Chain) -> list[list[BlockReading]]:
    """Identity blocks that follow one another at one shape."""
    runs: list[list[BlockReading]] = []
    before: BlockReading | None = None
    for block in chain.blocks:
        if block.kind == "identity" and not math.isnan(block.ratio.value):
            goes_on = before is not None and before.shapes == block.shapes
            if goes_on and before is not None and before.kind == "identity" and runs:
                runs[-1].append(block)
            else:
                runs.append([block])
        before = block
    return runs


def layers_in(block: str, layers: Sequence[LayerReading]) -> list[LayerReading]:
    """Layers that a block holds."""
    return [layer for layer in layers if holds(block, layer.name)]
