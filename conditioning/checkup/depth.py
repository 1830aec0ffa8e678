"""Norms along the depth: the chain of blocks that a gradient goes through, and who changes it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conditioning.checkup import limits
from conditioning.checkup.readings import ActivationReading, BlockReading, LayerReading
from conditioning.checkup.results import Checkup
from conditioning.spectrum import Estimate
from conditioning.spectrum.full import NAN

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
    covered : tuple of BlockReading
        The blocks that the product goes over.
    evidence : str
        Where the product stands in the checkup.
    begin : BlockReading or None
        The block at whose output the product ends, in front of those that it covers, if any.
    segments : tuple of tuple of BlockReading
        Blocks that hand their output to the next one as it is, without the head.
    """

    blocks: tuple[BlockReading, ...]
    product: Estimate
    covered: tuple[BlockReading, ...]
    evidence: str
    begin: BlockReading | None
    segments: tuple[tuple[BlockReading, ...], ...]

    @property
    def known(self) -> list[BlockReading]:
        """Blocks with a ratio, of those that the product covers."""
        return [block for block in self.covered if not math.isnan(block.ratio.value)]

    @property
    def gaps(self) -> list[tuple[BlockReading, BlockReading]]:
        """Neighbours between which the product goes, the earlier block first."""
        way = self.covered if self.begin is None else (self.begin, *self.covered)
        return list(itertools.pairwise(way))

    def of_kind(self, *kinds: str) -> list[BlockReading]:
        """Blocks of these kinds with a ratio."""
        return [block for block in self.known if block.kind in kinds]

    @property
    def has_skips(self) -> bool:
        """Whether there are identity skips, inside of blocks or around them."""
        return any(block.kind == "identity" or is_added(block) for block in self.blocks)


def is_added(block: BlockReading) -> bool:
    """Whether a block without a skip of its own lies in a branch that the model adds on."""
    return block.kind == "plain" and block.branch_share is not None


def chain_of(report: Checkup) -> Chain:
    """Take the blocks of a checkup that lie in no other, and the norms over all of them.

    The gradient in front of a plain first block that holds the first layer is one by the data,
    which moves no parameter: the product then begins behind that block. It ends in front of a
    last block with a sigmoid that returns probabilities: where they are right that is flat.
    """
    names = {base(block.name) for block in report.blocks}
    times = [entry.name for entry in report.recurrent]

    def inside(name: str) -> bool:
        return any(other != name and holds(other, name) for other in names)

    outer = tuple(block for block in report.blocks if not inside(base(block.name)))
    kept = tuple(b for b in outer if not any(holds(b.name, name) for name in times))
    product, covered, evidence, begin = report.product, kept, "product", None
    if len(kept) < len(outer):
        product = over(b.ratio for b in kept)
    elif kept and kept[0].kind == "plain" and _comes_first(kept[0], report.layers):
        covered = kept[1:]
        product, evidence, begin = _behind(report, kept[0], covered)
    if covered and covered[-1].kind == "plain" and _returns_shares(covered[-1], report):
        product = quotient(product, covered[-1].ratio)
        covered = covered[:-1]
        if not covered:
            product = NAN
    return Chain(kept, product, covered, evidence, begin, tuple(_segments(kept, report.layers)))


def _behind(
    report: Checkup, first: BlockReading, covered: Sequence[BlockReading]
) -> tuple[Estimate, str, BlockReading | None]:
    """Gradient norm behind the first block over that behind the last, and where it stands."""
    if not covered:
        return NAN, "", None
    after = covered[0]
    evidence = f"blocks[{report.blocks.index(after)}].product"
    if _same(first.grad_out, after.grad_in) or _rescaled(first, after, report.layers):
        return after.product, evidence, None
    # Something stands between them, or other ways than through the next block lead there, as in a
    # U-Net.
    evidence = f"blocks[{report.blocks.index(first)}].grad_out"
    return quotient(first.grad_out, covered[-1].grad_out), evidence, first


def _rescaled(first: BlockReading, after: BlockReading, layers: Sequence[LayerReading]) -> bool:
    """Whether a normalisation brings what a block returns to a scale of its own.

    In front of one the scale of the gradient is the inverse of that of the data, and says nothing.
    A layer in front of one is known for that. Behind an activation it is one if the scale of what
    the next block takes accounts for most of the jump of the gradient: a factor ``c`` on a tensor
    is a factor ``c`` on the gradient that comes back.
    """
    inside = [layer for layer in layers if holds(first.name, layer.name)]
    if inside and max(inside, key=lambda layer: layer.depth).normalised:
        return True
    if not (first.grad_out.value > 0 and after.grad_in.value > 0 and after.act_in.value > 0):
        return False
    jump = log(first.grad_out.value / after.grad_in.value)
    scale = log(after.act_in.value / _size_in(after)) - log(first.act_out.value / _size_out(first))
    return limits.MOST <= scale / jump <= 1 / limits.MOST if jump else False


def _same(one: Estimate, other: Estimate) -> bool:
    return math.isclose(one.value, other.value, rel_tol=_SAME)


def _comes_first(block: BlockReading, layers: Sequence[LayerReading]) -> bool:
    first = min(layers, key=lambda layer: layer.depth, default=None)
    return first is not None and holds(block.name, first.name)


def returns_shares(use: ActivationReading, layers: Sequence[LayerReading]) -> bool:
    """Whether a sigmoid runs behind all layers, as one that returns probabilities does.

    Such a one is flat wherever the network is sure, as it should be once it is trained.
    """
    last = max((layer.depth for layer in layers), default=math.inf)
    return use.function == "sigmoid" and use.depth > last


def _returns_shares(block: BlockReading, report: Checkup) -> bool:
    return any(
        holds(block.name, use.name) and returns_shares(use, report.layers)
        for use in report.activations
    )


def _segments(
    blocks: Sequence[BlockReading], layers: Sequence[LayerReading]
) -> list[tuple[BlockReading, ...]]:
    """Blocks that follow each other with nothing between them, without a plain head.

    What a head returns has the size of the targets, and what a normalisation or a pooling between
    blocks returns has one of its own.
    """
    last = max(layers, key=lambda layer: layer.depth, default=None)
    segments: list[list[BlockReading]] = []
    before: BlockReading | None = None
    for block in blocks:
        if block.kind == "plain" and last is not None and holds(block.name, last.name):
            before = None
            continue
        sides = (before.shapes.split(" -> ")[-1], block.shapes.split(" -> ")[0]) if before else ()
        linked = before is not None and _same(before.act_out, block.act_in)
        if linked and sides and sides[0] == sides[1]:
            segments[-1].append(block)
        else:
            segments.append([block])
        before = block
    return [tuple(segment) for segment in segments]


def growth_of(segment: Sequence[BlockReading]) -> Estimate:
    """Root mean square behind the last block over that in front of the first one."""
    scale = _size_in(segment[0]) / _size_out(segment[-1])
    whole = quotient(segment[-1].act_out, segment[0].act_in)
    return Estimate(whole.value * scale, whole.low * scale, whole.high * scale)


def _sides(block: BlockReading) -> list[list[int]]:
    """Shapes of input and output; empty where they are not those of two tensors."""
    sides = [side.split("x") for side in block.shapes.split(" -> ")]
    if len(sides) != 2 or not all(size.isdigit() for side in sides for size in side):
        return []
    return [[int(size) for size in side] for side in sides]


def _size_in(block: BlockReading) -> float:
    """Root of the number of entries, between a Frobenius norm and a root mean square."""
    sides = _sides(block)
    return math.sqrt(math.prod(sides[0])) or 1.0 if sides else 1.0


def _size_out(block: BlockReading) -> float:
    sides = _sides(block)
    return math.sqrt(math.prod(sides[1])) or 1.0 if sides else 1.0


def pooled(block: BlockReading) -> float:
    """Over how many positions a block without skip takes the mean at most, by its shapes.

    A mean over ``k`` positions divides the norm of a gradient by ``sqrt(k)``, with nothing wrong.
    """
    sides = _sides(block)
    if block.kind != "plain" or not sides:
        return 1.0
    taken, returned = sides
    if len(taken) == 3 and len(returned) == 2:
        # A sequence, whose time is the second axis or the last: the one that is no more there.
        return float(max((s for s in taken[1:] if s != returned[1]), default=taken[1]))
    if len(taken) < 4:
        return 1.0
    before, after = math.prod(taken[2:]), math.prod(returned[2:])
    return max(before / max(after, 1), 1.0)


def pooled_between(first: BlockReading, after: BlockReading) -> float:
    """The same of what runs between two blocks, by what one returns and the next one takes.

    Of images and sequences only: what has no positions has none to take the mean over.
    """
    one, other = _sides(first), _sides(after)
    if not one or not other or len(one[1]) < 3:
        return 1.0
    return max(math.prod(one[1]) / max(math.prod(other[0]), 1), 1.0)


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
        return NAN
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


def additions_of(chain: Chain) -> list[list[BlockReading]]:
    """Runs of branches that the model itself adds to a stream, each branch as one identity block.

    A branch begins at a block whose input carries the gradient that the addition before it gets,
    which is the stream. Behind a normalisation no block does, and then there are no such runs.
    """
    runs: list[list[list[BlockReading]]] = []
    before: BlockReading | None = None
    for block in chain.blocks:
        if is_added(block):
            if before is None or not is_added(before):
                runs.append([[block]])
            elif _same(before.grad_out, block.grad_in):
                runs[-1].append([block])
            else:
                runs[-1][-1].append(block)
        before = block
    return [[_merged(branch) for branch in run] for run in runs]


def _merged(branch: Sequence[BlockReading]) -> BlockReading:
    first, last = branch[0], branch[-1]
    ratio = quotient(first.grad_in, last.grad_out)
    return dataclasses.replace(first, kind="identity", grad_out=last.grad_out, ratio=ratio)


def layers_in(block: str, layers: Sequence[LayerReading]) -> list[LayerReading]:
    """Layers that a block holds."""
    return [layer for layer in layers if holds(block, layer.name)]
