"""Which module calls are residual units, judged by the additions in them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from conditioning.blocks.block import Kind
from conditioning.blocks.flow import Flow, Residual
from conditioning.blocks.structure import Node, Tree
from conditioning.blocks.tape import Call, Port

# As many parts of one class with an addition each (self- and cross-attention) make one layer.
_PARTS = 2


@dataclass(frozen=True, eq=False)
class Unit:
    """One call of a module that is a residual block.

    Attributes
    ----------
    call : Call
    source, target : Port
        Where the skip begins and ends, at the module's boundary.
    residuals : tuple of Residual
        The additions on the way, in order.
    kind : {"identity", "transition"}
    note : str
    lone : bool
        Whether layers before, between or after the additions make it doubtful that this is a block.
    """

    call: Call
    source: Port
    target: Port
    residuals: tuple[Residual, ...]
    kind: Kind
    note: str
    lone: bool


class Units:
    """The residual units of a recorded forward pass.

    Attributes
    ----------
    chosen : list of Unit
        In the order in which they ran; none is inside another.
    loose : list of Residual
        Additions that belong to no unit and to no branch of one: made by a loop over branches.
    """

    def __init__(self, flow: Flow, tree: Tree) -> None:
        self.flow = flow
        self.tree = tree
        self._additions: dict[int, list[Residual]] = defaultdict(list)
        for residual in flow.residuals:
            if residual.call >= 0:
                self._additions[residual.call].append(residual)
        self._children: dict[int, list[Call]] = defaultdict(list)
        for call in flow.calls:
            self._children[call.parent].append(call)
        units = [unit for call in self._children[-1] for unit in self._inside(call)]
        self.chosen = self._plausible(sorted(units, key=lambda unit: unit.call.start))
        self.loose = self._loose()

    def _inside(self, call: Call) -> list[Unit]:
        """Units at and below a call."""
        inner = [unit for child in self._children[call.index] for unit in self._inside(child)]
        own = self._outer(self._additions[call.index])
        if not own:
            return inner
        parts = [unit for unit in inner if self._is_part(call, unit, own)]
        if max(Counter(type(u.call.module) for u in parts).values(), default=0) > _PARTS:
            parts = []
        rest = [unit for unit in inner if unit not in parts]
        if self._is_loop(own):
            return inner
        unit = self._unit(call, own, parts)
        if unit is None or self._holds_a_chain(rest):
            return inner
        if unit.lone and any(not other.lone for other in inner):
            return inner
        return [unit]

    def own(self, call: Call) -> list[Residual]:
        """Additions of a call itself, without those within a branch of another one."""
        return self._outer(self._additions.get(call.index, []))

    def _outer(self, residuals: Iterable[Residual]) -> list[Residual]:
        """Drop additions within a branch or skip of another one that is kept."""
        kept: list[Residual] = []
        for residual in sorted(residuals, key=lambda r: -r.op):
            if not any(residual.op in other.path for other in kept):
                kept.append(residual)
        return kept[::-1]

    def _is_part(self, call: Call, unit: Unit, own: list[Residual]) -> bool:
        """Whether a unit is a step of the same stream, held as an attribute: half a layer."""
        on_stream = not any(r.op in other.path for r in unit.residuals for other in own)
        return on_stream and not self._listed(call, unit.call)

    def _listed(self, outer: Call, inner: Call) -> bool:
        """Whether a module is held by another one as the item of a container."""
        above = self._above(self.tree.of(inner.module), self.tree.of(outer.module))
        return any(node.is_container for node in above)

    def _is_loop(self, own: list[Residual]) -> bool:
        """Whether the additions are made in a loop over branches that a container holds."""
        seen: set[tuple[object, ...]] = set()
        for residual in own:
            for branch in self.branches(residual):
                if branch in seen:
                    return True
                seen.add(branch)
        return False

    def branches(self, residual: Residual) -> set[tuple[object, ...]]:
        """Keys of the layers on a branch that are alike whenever a loop made the additions."""
        keys: set[tuple[object, ...]] = set()
        outer = self.tree.of(self.flow.calls[residual.call].module)
        for call in self.branch_calls(residual):
            node = self.tree.of(call.module)
            if node is None:
                continue
            keys.add((node,))
            keys |= {(up, type(node.inner)) for up in self._above(node, outer) if up.is_container}
        return keys

    def _above(self, node: Node | None, top: Node | None) -> list[Node]:
        """What holds a module, up to another one and without it."""
        found = []
        while node is not None and node is not top and node.name:
            node = self.tree.parent(node)
            if node is not top:
                found.append(node)
        return found

    def branch_calls(self, residual: Residual) -> list[Call]:
        """Outermost calls on the way of an addition that mix features."""
        found: dict[int, Call] = {}
        for op in sorted(residual.path):
            if not self.flow.ops[op].mixing:
                continue
            chain = self.flow.chain(self.flow.ops[op].call)
            if residual.call in chain and chain[0] != residual.call:
                top = chain[chain.index(residual.call) - 1]
                found.setdefault(top, self.flow.calls[top])
        return list(found.values())

    def _unit(self, call: Call, own: list[Residual], parts: list[Unit]) -> Unit | None:
        """Return the call as a unit, if its output is reached through its additions only."""
        flow = self.flow
        residuals = sorted(
            [*own, *(r for part in parts for r in part.residuals)], key=lambda r: r.op
        )
        ops = {r.op for r in (*residuals, *self._additions[call.index])}
        entries = {port.op: port for port in reversed(call.inputs)}
        first = residuals[0]
        way = flow.back(first.fork, entries, since=call.start)
        sources = [entries[op] for op in way.stops if op in entries]
        if not sources:
            return None
        source = min(sources, key=call.inputs.index)
        outputs = [port for port in call.outputs if port.op in ops or port.op >= call.start]
        for target in (*outputs[:1], *(port for port in outputs if port.shape == source.shape)):
            end = flow.back(target.op, ops | set(entries), since=call.start)
            if end.stops & ops and source.op not in end.stops:
                break
        else:
            return None
        before, after = flow.mixes(way.met), flow.mixes(end.met)
        gaps = False
        for residual in residuals[1:]:
            gap = flow.back(residual.fork, ops | set(entries), since=call.start)
            gaps |= bool(gap.stops & ops) and flow.mixes(gap.met)
        kind, note = self._judge(residuals, source, target, way.met, (before, after or gaps))
        return Unit(call, source, target, tuple(residuals), kind, note, before or after or gaps)

    def _judge(
        self,
        residuals: list[Residual],
        source: Port,
        target: Port,
        way: Iterable[int],
        layers: tuple[bool, bool],
    ) -> tuple[Kind, str]:
        notes = []
        through = list(dict.fromkeys(name for r in residuals for name in r.through))
        changed = source.shape != target.shape
        if not all(r.identity for r in residuals):
            notes.append(f"skip through {_enumerated(through)}")
        if layers[0]:
            notes.append("a layer before the skip begins")
        if layers[1]:
            notes.append("a layer after an addition")
        if changed and not through:
            notes.append("shape changes")
        kind: Kind = "transition" if notes else "identity"
        scales = list(dict.fromkeys(f"{r.scale:.4g}" for r in residuals if r.scale != 1))
        if scales:
            notes.append(f"skip times {', '.join(scales)}")
        moved = self.flow.names(op for op in way if not self.flow.ops[op].mixing)
        if moved:
            notes.append(f"skip begins after {_enumerated(moved)}")
        if len(residuals) > 1:
            notes.append(f"{len(residuals)} additions")
        return kind, "; ".join(notes)

    def _holds_a_chain(self, inner: list[Unit]) -> bool:
        """Whether the smaller units inside are the blocks: several in a row."""
        steps = [unit for unit in inner if unit.kind == "identity" and not unit.lone]
        for one, other in pairwise(steps):
            way = self.flow.between(one.target.op, other.source.op)
            if way is not None and not self.flow.mixes(way):
                return True
        return False

    def _plausible(self, units: list[Unit]) -> list[Unit]:
        """Drop what only sums two branches somewhere, rather than being one of the blocks."""
        sure = {type(unit.call.module) for unit in units if unit.kind == "identity"}
        if not sure:
            return units if len({unit.call.module for unit in units}) > 1 else []
        kept = []
        for i, unit in enumerate(units):
            near = [
                *(self.flow.between(u.target.op, unit.source.op) for u in units[max(i - 1, 0) : i]),
                *(self.flow.between(unit.target.op, u.source.op) for u in units[i + 1 : i + 2]),
            ]
            chained = any(way is not None and not self.flow.mixes(way) for way in near)
            if type(unit.call.module) in sure or chained:
                kept.append(unit)
        return kept

    def _loose(self) -> list[Residual]:
        """Several additions of one call that is no unit, made there and not further in."""
        inside = {unit.call.index for unit in self.chosen}
        loose: list[Residual] = []
        for call, residuals in sorted(self._additions.items()):
            made_here = [
                residual
                for residual in self._outer(residuals)
                if residual.identity and self.flow.ops[residual.op].call == call
            ]
            if len(made_here) > 1 and not inside & set(self.flow.chain(call)):
                loose.extend(made_here)
        return loose


def _enumerated(names: Iterable[str], limit: int = 4) -> str:
    names = [name.removeprefix("native_") for name in names]
    shown = names[:limit] + (["..."] if len(names) > limit else [])
    return ", ".join(shown)
