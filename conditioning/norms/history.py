"""The recorded steps as tables: tidy, one row per block, one column per block, verdicts."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from conditioning.errors import InvalidArgumentError
from conditioning.norms.steps import SIDES, Call, divide
from conditioning.spectrum.results import Estimate, Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class BlockLabel:
    """What tables say of a tracked block.

    Parameters
    ----------
    name, kind : str
    containers : tuple of int
        Positions of the tracked blocks that contain this one.
    """

    name: str
    kind: str
    containers: tuple[int, ...] = ()

    @property
    def level(self) -> int:
        """How many tracked blocks contain this one."""
        return len(self.containers)


_PLACES = ("block", "call", "visit", "pass_id", "order", "backward")


@dataclass(frozen=True, eq=False)
class StepRecord:
    """The calls of one sampled step, packed: a run has as many records as sampled steps.

    Parameters
    ----------
    step : int
    places : ndarray of int32, shape (calls, 6)
        What says which call it is, see :class:`Call`.
    quantities : tuple of str
    values : ndarray of float64, shape (calls, quantities)
    known : ndarray of bool, shape (calls, quantities)
        Which calls have which quantities; NaN is a value like others.
    """

    step: int
    places: NDArray[np.int32]
    quantities: tuple[str, ...]
    values: NDArray[np.float64]
    known: NDArray[np.bool_]

    @classmethod
    def pack(cls, step: int, calls: Sequence[Call]) -> StepRecord:
        """Make a record of calls."""
        quantities = tuple(dict.fromkeys(name for call in calls for name in call.values))
        places = [[getattr(call, place) for place in _PLACES] for call in calls]
        values = [[call.values.get(name, math.nan) for name in quantities] for call in calls]
        known = [[name in call.values for name in quantities] for call in calls]
        return cls(
            step, np.array(places, dtype=np.int32), quantities, np.array(values), np.array(known)
        )

    @property
    def calls(self) -> list[Call]:
        """The calls, in the order of execution."""
        rows = zip(self.places.tolist(), self.values.tolist(), self.known.tolist(), strict=True)
        found = []
        for place, values, known in rows:
            block, call, visit, pass_id, order, backward = place
            kept = {
                name: value
                for name, value, there in zip(self.quantities, values, known, strict=True)
                if there
            }
            found.append(Call(block, call, visit, pass_id, order, backward, kept))
        return found

    def state(self) -> dict[str, Any]:
        """Plain Python, for a checkpoint."""
        return {
            "step": self.step,
            "places": self.places.tolist(),
            "quantities": list(self.quantities),
            "values": self.values.tolist(),
            "known": self.known.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> StepRecord:
        """Undo :meth:`state`."""
        places = np.array(state["places"], dtype=np.int32)
        return cls(
            state["step"], places, tuple(state["quantities"]),
            np.array(state["values"]), np.array(state["known"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A block in one step, all its calls at the same place of their forward passes together.

    Several forward passes in a step (gradient accumulation) are combined as the root of the sum
    of squares, which is the norm over all their samples. A shared block has a point for each
    place, named ``block#1``, ``block#2``, ...; and so has each further backward pass through the
    same forward pass, named ``block@1``, ...: norms of gradients of several losses do not add up.

    Parameters
    ----------
    name : str
    block, visit, backward : int
    kind : str
    level : int
    values : dict of str to float
        ``grad_in``, ``grad_out``, ``act_in``, ``act_out`` where known, ``ratio``, and ``product``:
        ``grad_in`` over the ``grad_out`` of the last block that is nested equally deep.
    """

    name: str
    block: int
    visit: int
    backward: int
    kind: str
    level: int
    values: dict[str, float]


@dataclass(frozen=True)
class NonFinite(Result):
    """Where NaN or an infinity came up first.

    Parameters
    ----------
    step : int
    block : str
    where : {"forward", "backward"}
        Whether an activation was affected, or only gradients.
    message : str
    """

    step: int
    block: str
    where: Literal["forward", "backward"]
    message: str


@dataclass(frozen=True)
class NormVerdict(Result):
    """Whether the ratios of gradient norms stayed within a bound.

    Parameters
    ----------
    verdict : {"holds", "fails", "not decided"}
        ``holds``: in every recorded step every tracked block has a ratio, and it lies within;
        ``fails``: some ratio does not; ``not decided``: none lies outside, but some is missing.
    low, high : float
        The bound.
    deviation : Estimate
        Mean over blocks of ``|1 - ratio|``, averaged over the recorded steps; its ends are the
        least and the largest of a step. Steps of a training run are no independent samples, so
        this is a range and no confidence interval.
    deviation_by_kind : dict of str to float
        The same for each kind of block.
    worst_block : str
    worst_step : int
    worst_ratio : float
        The ratio that lies farthest from 1, in logarithm.
    outside : tuple of (str, float)
        Blocks with ratios outside, and the share of steps in which they were.
    missing : tuple of str
        Blocks without a ratio in some step: they did not run, no gradient came to their input or
        output, or both norms are zero or not finite.
    num_steps, num_ratios : int
    """

    verdict: Literal["holds", "fails", "not decided"]
    low: float
    high: float
    deviation: Estimate
    deviation_by_kind: dict[str, float]
    worst_block: str
    worst_step: int
    worst_ratio: float
    outside: tuple[tuple[str, float], ...]
    missing: tuple[str, ...]
    num_steps: int
    num_ratios: int

    def __str__(self) -> str:
        steps = f"{self.num_steps} step" + ("s" if self.num_steps > 1 else "")
        lines = [
            f"{self.verdict}: ratios of gradient norms within [{self.low:.4g}, {self.high:.4g}] "
            f"({self.num_ratios} ratios in {steps})"
        ]
        if self.num_ratios:
            mean = self.deviation
            span = f" ({mean.low:.4g} ... {mean.high:.4g} over steps)" if self.num_steps > 1 else ""
            lines.append(
                f"mean |1 - ratio| = {mean.value:.4g}{span}; farthest from 1: "
                f"{self.worst_ratio:.4g} at {self.worst_block!r} in step {self.worst_step}"
            )
        if self.outside:
            shown = ", ".join(f"{name} ({share:.0%})" for name, share in self.outside[:6])
            more = f" and {len(self.outside) - 6} more" if len(self.outside) > 6 else ""
            lines.append(f"outside (share of steps): {shown}{more}")
        if self.missing:
            more = f" and {len(self.missing) - 6} more" if len(self.missing) > 6 else ""
            lines.append(f"without a ratio in some step: {', '.join(self.missing[:6])}{more}")
        return "\n".join(lines)


def points(record: StepRecord, labels: Sequence[BlockLabel]) -> list[Point]:
    """A step block by block, in the order of execution."""
    groups: dict[tuple[int, int, int], list[Call]] = defaultdict(list)
    for call in record.calls:
        groups[call.backward, call.block, call.visit].append(call)
    order = {
        key: (key[0], min((c.pass_id, c.order) for c in group)[1]) for key, group in groups.items()
    }
    found = []
    for key in sorted(groups, key=lambda key: order[key]):
        (backward, block, visit), group = key, groups[key]
        values = {}
        for side in SIDES:
            numbers = [c.values[side] for c in group if side in c.values]
            if len(numbers) == len(group):
                values[side] = math.hypot(*numbers)
        values["ratio"] = divide(values.get("grad_in"), values.get("grad_out"))
        label = labels[block]
        name = label.name + (f"#{visit}" if visit else "") + (f"@{backward}" if backward else "")
        found.append(Point(name, block, visit, backward, label.kind, label.level, values))
    last = {(p.backward, p.level): p.values.get("grad_out") for p in found}
    for point in found:
        reference = last[point.backward, point.level]
        point.values["product"] = divide(point.values.get("grad_in"), reference)
    return found


def gaps(found: Sequence[Point], rtol: float = 1e-2) -> list[tuple[str, str, float]]:
    """Neighbours between which the gradient changes its norm outside of tracked blocks.

    Returns
    -------
    list of (str, str, float)
        The two blocks, and the norm at the output of the first over that at the input of the
        second.
    """
    outer = [point for point in found if point.level == 0]
    changed = []
    for one, two in itertools.pairwise(outer):
        factor = divide(one.values.get("grad_out"), two.values.get("grad_in"))
        if one.backward == two.backward and abs(factor - 1) > rtol:
            changed.append((one.name, two.name, factor))
    return changed


def tidy_frame(records: Sequence[StepRecord], labels: Sequence[BlockLabel]) -> pd.DataFrame:
    """One row for each number: step, block, call, quantity, value, kind, depth."""
    import pandas as pd

    depths = depth_order(records, labels)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("step", "block", "call", "quantity", "value", "kind", "depth")
    }
    for record in records:
        chains: dict[tuple[int, int], list[Call]] = defaultdict(list)
        for call in record.calls:
            chains[call.pass_id, call.backward].append(call)
        for _, chain in sorted(chains.items()):
            last = {labels[c.block].level: c.values.get("grad_out") for c in chain}
            for call in chain:
                label = labels[call.block]
                product = divide(call.values.get("grad_in"), last[label.level])
                for quantity, value in {**call.values, "product": product}.items():
                    rows["step"].append(record.step)
                    rows["block"].append(label.name)
                    rows["call"].append(call.call)
                    rows["quantity"].append(quantity)
                    rows["value"].append(value)
                    rows["kind"].append(label.kind)
                    rows["depth"].append(depths[call.block])
    return pd.DataFrame(rows)


def depth_order(records: Sequence[StepRecord], labels: Sequence[BlockLabel]) -> dict[int, int]:
    """Depth of each block: its place in the order of execution when it first ran."""
    order: dict[int, int] = {}
    for record in records:
        for call in sorted(record.calls, key=lambda c: (c.pass_id, c.order)):
            order.setdefault(call.block, len(order))
        if len(order) == len(labels):
            break
    for block in range(len(labels)):
        order.setdefault(block, len(order))
    return order


def ratio_frame(records: Sequence[StepRecord], labels: Sequence[BlockLabel]) -> pd.DataFrame:
    """Ratios: a row for each step, a column for each block in the order of execution."""
    import pandas as pd

    columns: dict[str, None] = {}
    rows = []
    for record in records:
        found = points(record, labels)
        columns |= dict.fromkeys(point.name for point in found)
        rows.append({point.name: point.values["ratio"] for point in found})
    steps = pd.Index([record.step for record in records], name="step")
    return pd.DataFrame(rows, index=steps, columns=list(columns), dtype=float)


def scalars(record: StepRecord, labels: Sequence[BlockLabel], prefix: str) -> dict[str, float]:
    """A step as a flat dict: every block's quantities, and what sums the step up."""
    found = points(record, labels)
    flat = {
        f"{prefix}{quantity}/{point.name}": value
        for point in found
        for quantity, value in point.values.items()
    }
    ratios = np.array([p.values["ratio"] for p in found if math.isfinite(p.values["ratio"])])
    if len(ratios):
        flat |= {
            f"{prefix}ratio_min": float(ratios.min()),
            f"{prefix}ratio_max": float(ratios.max()),
            f"{prefix}mean_deviation": float(np.abs(1 - ratios).mean()),
        }
    outer = [point for point in found if point.level == 0]
    if outer:
        flat[f"{prefix}product"] = outer[0].values["product"]
    return flat


def first_nonfinite(
    records: Sequence[StepRecord], labels: Sequence[BlockLabel]
) -> NonFinite | None:
    """The first step and block in which something was not finite, or None."""
    for record in records:
        found = _nonfinite(record.step, points(record, labels), labels)
        if found is not None:
            return found
    return None


def _bad(point: Point, side: str) -> bool:
    return side in point.values and not math.isfinite(point.values[side])


def _nonfinite(step: int, found: list[Point], labels: Sequence[BlockLabel]) -> NonFinite | None:
    for where, before, after, chain in (
        ("forward", "act_in", "act_out", found),
        ("backward", "grad_out", "grad_in", found[::-1]),
    ):
        if not any(_bad(point, side) for point in chain for side in (before, after)):
            continue
        what = "activations" if where == "forward" else "gradients"
        # A block that contains another one is affected with it: the innermost says more.
        arising = [p for p in chain if _bad(p, after) and not _bad(p, before)]
        if arising and not _bad(chain[0], before):
            inside = [p for p in arising if arising[0].block in labels[p.block].containers]
            point = max(inside, key=lambda p: p.level, default=arising[0])
            message = (
                f"in step {step} the {what} became NaN or infinite in block {point.name!r}, on "
                f"its {where} pass"
            )
            if where == "backward":
                message += " (or come from another use of what enters it)"
        else:
            point = next(p for p in chain if _bad(p, before) or _bad(p, after))
            outside = "input" if where == "forward" else "output"
            source = "what runs before it" if where == "forward" else "the loss, or the head"
            message = (
                f"in step {step} the {what} were NaN or infinite at the {outside} of block "
                f"{point.name!r} already: they come from {source}"
            )
        return NonFinite(step, point.name, "forward" if where == "forward" else "backward", message)
    return None


def judge(
    records: Sequence[StepRecord],
    labels: Sequence[BlockLabel],
    bound: float | tuple[float, float],
) -> NormVerdict:
    """Compare all recorded ratios with a bound."""
    low, high = _interval(bound)
    rows = [
        (record.step, point.name, point.kind, point.values["ratio"])
        for record in records
        for point in points(record, labels)
    ]
    known = [row for row in rows if not math.isnan(row[3])]
    absent = [
        label.name
        for record in records
        for block, label in enumerate(labels)
        if block not in record.places[:, 0]
    ]
    undefined = [name for _, name, _, ratio in rows if math.isnan(ratio)]
    missing = tuple(dict.fromkeys([*undefined, *absent]))
    steps: dict[int, list[float]] = defaultdict(list)
    by_kind: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, list[bool]] = defaultdict(list)
    for step, name, kind, ratio in known:
        steps[step].append(abs(1 - ratio))
        by_kind[kind].append(abs(1 - ratio))
        shares[name].append(not low <= ratio <= high)
    outside = tuple((name, float(np.mean(flags))) for name, flags in shares.items() if any(flags))
    worst = max(known, key=lambda row: _far(row[3]), default=(-1, "", "", math.nan))
    verdict: Literal["holds", "fails", "not decided"] = "holds"
    if outside:
        verdict = "fails"
    elif missing or not known:
        verdict = "not decided"
    return NormVerdict(
        verdict, low, high, _mean([float(np.mean(step)) for step in steps.values()]),
        {kind: float(np.mean(values)) for kind, values in by_kind.items()},
        worst[1], worst[0], worst[3], outside, missing, len(records), len(known),
    )  # fmt: skip


def _far(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def _interval(bound: float | tuple[float, float]) -> tuple[float, float]:
    try:
        ends = [float(end) for end in (bound if isinstance(bound, (tuple, list)) else [bound])]
    except (TypeError, ValueError, RuntimeError):
        ends = []
    if len(ends) == 1 and ends[0] > 0 and math.isfinite(ends[0]) and not isinstance(bound, bool):
        return max(1 - ends[0], 0.0), 1 + ends[0]
    if len(ends) == 2 and 0 <= ends[0] <= ends[1]:
        return ends[0], ends[1]
    msg = (
        f"bound must be a number delta > 0, for [1 - delta, 1 + delta], or a pair (low, high) with "
        f"0 <= low <= high, got {bound!r}."
    )
    raise InvalidArgumentError(msg)


def _mean(values: Sequence[float]) -> Estimate:
    """Mean with the least and the largest."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate(float(np.mean(values)), min(values), max(values))
