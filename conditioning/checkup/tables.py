"""The parts of a checkup as tables: blocks, layers, activations, recurrent layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from conditioning.blocks.block import table
from conditioning.checkup.readings import ActivationReading, BlockReading, LayerReading
from conditioning.operators.modules import join_names
from conditioning.spectrum import Estimate

if TYPE_CHECKING:
    from conditioning.checkup.results import Checkup

T = TypeVar("T")

WIDTH = 96
_ALL_ROWS = 24  # so many rows are shown in full
_FEW_ROWS = 14  # of more than that so many are, those between them as one line
_ENDS = 3
_NAME = 26
JOINED = "\N{NO-BREAK SPACE}"  # between a number and its unit
_CLOSED = ("exact", "exhausted", "certified")


def count(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"


def wrapped(line: str, indent: str = "", first: str | None = None) -> str:
    """A paragraph of lines that fit; ``first`` is the indent of the first one."""
    filled = textwrap.fill(
        line, WIDTH, initial_indent=indent if first is None else first, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return filled.replace(JOINED, " ")


def label(name: str) -> str:
    """The name as it is printed: the model itself has an empty one."""
    return name or "(model)"


def shown(number: Estimate | None) -> str:
    """A number with its enclosure; a dash where there is none."""
    if number is None:
        return "-"
    if math.isnan(number.value) or number.low == number.high:
        return "infinite" if number.value == math.inf else f"{number.value:.4g}"
    return str(number) if number.value else _about_zero(number)


def short(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return f"{value:#.3g}".removesuffix(".") if math.isfinite(value) and value else f"{value:g}"


def span(low: float, high: float) -> str:
    """Two ends in three digits, or one where they agree."""
    return short(low) if short(low) == short(high) else f"{short(low)} .. {short(high)}"


def ranged(number: Estimate) -> str:
    """Three digits; where the ends differ in these, the same digits as everywhere else."""
    if not number.value or not math.isfinite(number.value):
        return _about_zero(number)
    return number.brief()


def _about_zero(number: Estimate) -> str:
    """Digits that do not depend on the value, which says nothing of them where it is zero."""
    low, high = short(number.low), short(number.high)
    return short(number.value) + (f" [{low}, {high}]" if low != high else "")


def _sigma(smallest: Estimate | None, largest: Estimate | None, status: str) -> str:
    if smallest is None or largest is None:
        return ""
    doubt = "" if status in _CLOSED else " ?"
    return span(smallest.value, largest.value) + doubt


def _chosen(
    items: Sequence[T],
    named: Callable[[T], bool],
    badness: Callable[[T], float],
) -> list[int]:
    """Positions of the rows that are shown: all of a few, else ends, named ones and the worst."""
    if len(items) <= _ALL_ROWS:
        return list(range(len(items)))
    places = range(len(items))
    kept = {place for place in places if place < _ENDS or place >= len(items) - _ENDS}

    def key(place: int) -> tuple[bool, float]:
        bad = badness(items[place])
        return not named(items[place]), -(math.inf if math.isnan(bad) else bad)

    for place in sorted(places, key=key):
        if len(kept) >= _FEW_ROWS:
            break
        kept.add(place)
    # A line that says "1 more" is no shorter than that one.
    kept |= {place for place in places if {place - 1, place + 1} <= kept}
    return sorted(kept)


def _rows(
    items: Sequence[T],
    chosen: Sequence[int],
    row: Callable[[int, T], list[str]],
    gap: Callable[[Sequence[T]], list[str]],
) -> list[list[str]]:
    """The chosen rows, and one line for each stretch between them."""
    rows, after = [], 0
    for place in [*chosen, len(items)]:
        if place > after:
            rows.append(gap(items[after:place]))
        if place < len(items):
            rows.append(row(place, items[place]))
        after = place + 1
    return rows


def _range_of(values: Iterable[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return span(min(known), max(known)) if known else ""


def cut(name: str, width: int = _NAME) -> str:
    """A name by its end, which tells blocks apart."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _logarithm(value: float) -> float:
    return abs(math.log(value)) if 0 < value < math.inf else math.inf


def _named(report: Checkup) -> set[str]:
    return {name for finding in report.findings for name in finding.where}


def _title(noun: str, number: int, kept: int) -> str:
    rest = "" if kept == number else f", {kept} of them shown"
    return f"{count(number, noun)}{rest}"


def block_table(report: Checkup) -> str:
    """Blocks in the order of execution, and what the columns mean; empty if there are none."""
    blocks, named = report.blocks, _named(report)
    if not blocks:
        return ""
    chosen = _chosen(blocks, lambda b: b.name in named, lambda b: _logarithm(b.ratio.value))

    def row(place: int, block: BlockReading) -> list[str]:
        jacobian = block.jacobian
        sigma = ""
        if jacobian is not None:
            sigma = _sigma(jacobian.smallest, jacobian.largest, jacobian.status)
        return [
            str(place), cut(label(block.name)), block.kind, short(block.growth),
            ranged(block.ratio), short(block.product.value), short(block.branch_share), sigma,
        ]  # fmt: skip

    def gap(left: Sequence[BlockReading]) -> list[str]:
        return [
            "...", f"({len(left)} more)", "", _range_of(b.growth for b in left),
            _range_of(b.ratio.value for b in left), _range_of(b.product.value for b in left),
            _range_of(b.branch_share for b in left if b.branch_share is not None), "",
        ]  # fmt: skip

    head = ("#", "block", "kind", "growth", "ratio", "product", "branch", "sigma")
    classes = join_names(list(dict.fromkeys(block.classes for block in blocks)))
    legend = (
        "growth: norm of the activations, back over front. ratio: norm of the gradient, front over "
        "back. product: gradient in front of the block over that behind the last. branch: norm of "
        "the branch over that of the skip."
    )
    if any(block.jacobian is not None for block in blocks):
        legend += (
            " sigma: singular values of the Jacobian, smallest .. largest, with a question mark "
            "where they are not enclosed."
        )
    return "\n".join([
        wrapped(f"{_title('block', len(blocks), len(chosen))}: {classes}", "  ", ""),
        table(head, _rows(blocks, chosen, row, gap)),
        wrapped(legend, "  "),
    ])  # fmt: skip


def layer_table(report: Checkup) -> str:
    """Layers in the order of execution, and what the columns mean; empty if there are none."""
    layers, named = report.layers, _named(report)
    if not layers:
        return ""

    def badness(layer: LayerReading) -> float:
        # A normalisation behind a layer makes up for the scale of its weights, a ReLU needs more.
        if layer.normalised:
            return 0.0
        keeps = math.sqrt(2) if layer.followed_by == "relu" else 1.0
        return _logarithm(layer.weight_gain / keeps)

    chosen = _chosen(layers, lambda x: x.name in named or x.role == "transition", badness)

    def row(_: int, layer: LayerReading) -> list[str]:
        return [
            cut(label(layer.name)), layer.classes, layer.role, str(layer.fan_in),
            short(layer.weight_gain), layer.followed_by,
            _sigma(layer.smallest, layer.largest, layer.status),
            "" if layer.largest is None else short(layer.target),
        ]  # fmt: skip

    def gap(left: Sequence[LayerReading]) -> list[str]:
        gains = _range_of(layer.weight_gain for layer in left)
        return [f"... ({len(left)} more)", "", "", "", gains, "", "", ""]

    head = ("layer", "class", "role", "fan_in", "gain", "then", "sigma", "target")
    legend = (
        "gain: sqrt(fan_in) rms(weight); 1 keeps the size of a signal, sqrt(2) does so through a "
        "ReLU. then: what follows."
    )
    if any(layer.largest is not None for layer in layers):
        legend += (
            " sigma: singular values of the layer, smallest .. largest. target: the one with which "
            "random gradients keep their norm."
        )
    return "\n".join([
        _title("layer", len(layers), len(chosen)),
        table(head, _rows(layers, chosen, row, gap)), wrapped(legend, "  "),
    ])  # fmt: skip


def activation_table(report: Checkup) -> str:
    """Uses of activation functions, and what the columns mean; empty if there are none."""
    uses, named = report.activations, _named(report)
    if not uses:
        return ""
    chosen = _chosen(uses, lambda u: u.name in named, lambda u: u.dead_share + u.flat_share / 100)

    def row(_: int, use: ActivationReading) -> list[str]:
        return [
            cut(label(use.name)), use.function, short(use.rms_in), _percent(use.flat_share),
            _percent(use.dead_share), str(use.num_units),
        ]  # fmt: skip

    def gap(left: Sequence[ActivationReading]) -> list[str]:
        flat = _percent(min(u.flat_share for u in left), max(u.flat_share for u in left))
        dead = _percent(min(u.dead_share for u in left), max(u.dead_share for u in left))
        return [f"... ({len(left)} more)", "", _range_of(u.rms_in for u in left), flat, dead, ""]

    head = ("activation", "function", "rms in", "flat", "dead", "units")
    legend = (
        "flat: share of entries with hardly any slope. dead: share of units flat at every sample."
    )
    return "\n".join([
        _title("activation", len(uses), len(chosen)),
        table(head, _rows(uses, chosen, row, gap)), wrapped(legend, "  "),
    ])  # fmt: skip


def _percent(low: float, high: float | None = None) -> str:
    ends = [f"{100 * end:.3g} %" for end in (low, low if high is None else high)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0][:-2]} .. {ends[1]}"


def recurrent_table(report: Checkup) -> str:
    """Recurrent layers, and what the columns mean; empty if there are none."""
    if not report.recurrent:
        return ""
    rows = [
        [
            cut(label(layer.name)), layer.classes, str(layer.num_steps),
            short(layer.gradient_first.value), short(layer.gradient_last.value),
            ranged(layer.growth_per_step), short(layer.recurrent_norm),
        ]
        for layer in report.recurrent
    ]  # fmt: skip
    head = ("layer", "class", "steps", "first tenth", "last tenth", "per step back", "norm")
    legend = (
        "first tenth, last tenth: norm of the gradient at the inputs of these steps. per step "
        "back: the factor by which it changes. norm: largest singular value of the recurrent "
        "weight."
    )
    title = _title("recurrent layer", len(rows), len(rows))
    return "\n".join([title, table(head, rows), wrapped(legend, "  ")])
