"""Blocks and their kinds from one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, TypedDict

from torch import nn

from conditioning.blocks.block import Block, Kind, Shape
from conditioning.blocks.flow import Flow, Residual
from conditioning.blocks.structure import Node, Tree, has_weights, structural_blocks, width_change
from conditioning.blocks.tape import Call, Op, Port, record_tape
from conditioning.blocks.units import Unit, Units


class Measurement:
    """One forward pass of a model, and what can be told from it.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor, tuple or dict
    tree : Tree
        Of the model.
    """

    def __init__(self, model: nn.Module, inputs: Any, tree: Tree) -> None:
        self._tree = tree
        tape = record_tape(model, inputs, [node.inner for node in tree.nodes.values()])
        self._flow = Flow(tape)
        self._units = Units(self._flow, tree)
        self._first: dict[nn.Module, Call] = {}
        for call in self._flow.calls:
            self._first.setdefault(call.module, call)

    def blocks(self) -> list[Block]:
        """Return the blocks that the pass shows, in the order in which they ran."""
        units = self._units.chosen
        if units:
            found = [self._unit_block(unit) for unit in units]
            found.extend(self._siblings(units))
            found.extend(self._bare_layers(units))
        elif self._units.loose:
            found = list(self._branches())
        else:
            found = self.describe(structural_blocks(self._tree), only_run=True)
        return self._in_order({block.name: block for block in reversed(found)}.values())

    def describe(self, blocks: Iterable[Block], *, only_run: bool = False) -> list[Block]:
        """Return given blocks with their kind, in the order in which they ran."""
        found = []
        # A bare layer is a transition by what stands around it, not by itself.
        known = {} if only_run else {block.parts: block for block in self.blocks()}
        for block in blocks:
            if block.parts in known:
                found.append(known[block.parts])
            elif self._call(block.module) is not None and self._call(block.last) is not None:
                found.append(self._described(block))
            elif not only_run:
                note = "did not run on these inputs"
                found.append(dataclasses.replace(block, kind="unknown", note=note))
        return self._in_order(found)

    @property
    def ops(self) -> list[Op]:
        """What ran."""
        return self._flow.ops

    @property
    def flow(self) -> Flow:
        """From where to where."""
        return self._flow

    @property
    def units(self) -> list[Unit]:
        """The residual units, in the order in which they ran."""
        return self._units.chosen

    def residuals(self, block: Block) -> list[list[Residual]]:
        """Additions of a block, call by call; of a branch, those of its output to its input."""
        node = self._node(block.module)
        calls = [call for call in self._flow.calls if call.module is node.inner]
        if len(block.parts) > 1:
            return []
        units = {unit.call.index: unit for unit in self._units.chosen}
        if any(call.index in units for call in calls):
            return [list(units[c.index].residuals) for c in calls if c.index in units]
        own = [self._units.own(call) for call in calls]
        if any(own):
            return own
        return [
            [residual]
            for residual in self._units.loose
            if node.inner in (c.module for c in self._units.branch_calls(residual))
        ]

    def _call(self, module: nn.Module) -> Call | None:
        node = self._tree.of(module)
        return None if node is None else self._first.get(node.inner)

    def _in_order(self, blocks: Iterable[Block]) -> list[Block]:
        def when(block: Block) -> int:
            call = self._call(block.module)
            return len(self._flow.calls) if call is None else call.index

        return sorted(blocks, key=when)

    def _node(self, module: nn.Module) -> Node:
        node = self._tree.of(module)
        assert node is not None
        return node

    def _unit_block(self, unit: Unit) -> Block:
        calls = [u for u in self._units.chosen if u.call.module is unit.call.module]
        first, kinds = calls[0], {u.kind for u in calls}
        note = first.note
        if len(calls) > 1:
            note = "; ".join(filter(None, [note, f"{len(calls)} calls"]))
        return self._tree.block(
            self._node(unit.call.module),
            kind="transition" if len(kinds) > 1 else first.kind,
            note=note,
            **_known(first.source, first.target),
        )

    def _siblings(self, units: list[Unit]) -> Iterator[Block]:
        """Modules of a unit's class that were none in this pass: without a skip, or skipped."""
        classes = {type(unit.call.module) for unit in units}
        known = {unit.call.module for unit in units}
        for module, call in self._first.items():
            if type(module) not in classes or module in known or isinstance(module, nn.Sequential):
                continue
            around = self._flow.chain(call.index)[1:]
            inside = any(self._flow.calls[c].module in known for c in around)
            holds = any(call.index in self._flow.chain(unit.call.index) for unit in units)
            if not inside and not holds:
                yield self._one(self._node(module), call, beside_units=True)

    def _bare_layers(self, units: list[Unit]) -> Iterator[Block]:
        """Layers between two units that follow each other: the transitions of some networks."""
        taken = {type(unit.call.module) for unit in units}
        for one, other in pairwise(units):
            way = self._flow.between(one.target.op, other.source.op)
            changed = one.target.shape != other.source.shape
            if not way or not (changed or self._flow.mixes(way)):
                continue
            around = {*self._flow.chain(one.call.index), *self._flow.chain(other.call.index)}
            tops = []
            for op in sorted(way):
                chain = [c for c in self._flow.chain(self._flow.ops[op].call) if c not in around]
                if chain and chain[-1] not in tops:
                    tops.append(chain[-1])
            nodes = [self._node(self._flow.calls[top].module) for top in tops]
            nodes = [node for node in nodes if type(node.inner) not in taken]
            for block in self._joined(nodes):
                yield self._described(block, beside_units=True)

    def _joined(self, nodes: list[Node]) -> Iterator[Block]:
        """Modules as blocks, those that follow each other in a chain as one; no activations."""
        groups: list[list[Node]] = []
        for node in nodes:
            parent = self._tree.parent(node)
            siblings = list(parent.children.values()) if parent.is_chain else []
            last = groups[-1][-1] if groups else None
            if (
                last in siblings
                and node in siblings
                and siblings.index(last) + 1 == siblings.index(node)
            ):
                groups[-1].append(node)
            else:
                groups.append([node])
        for group in groups:
            shapes = self._ends(group[0], group[-1])
            changes = shapes is not None and shapes[0].shape != shapes[1].shape
            if not changes and not any(has_weights(node.inner) for node in group):
                continue
            parent = self._tree.parent(group[0])
            ends = (node.name.rpartition(".")[2] for node in (group[0], group[-1]))
            yield self._tree.run(parent, *ends)

    def _branches(self) -> Iterator[Block]:
        """Modules whose output is added to their input by a loop around them."""
        for residual in self._units.loose:
            calls = self._units.branch_calls(residual)
            outer = self._node(self._flow.calls[residual.call].module)
            for call in calls:
                if call.inputs and call.outputs:
                    yield self._tree.block(
                        self._node(call.module),
                        kind="plain",
                        note=f"a branch: the skip is added in {outer.name or 'the model'}",
                        **_lone(call, call),
                    )

    def _ends(self, first: Node, last: Node) -> tuple[Port, Port] | None:
        """Return the first input and the first output of a run of modules."""
        entry, leave = self._first.get(first.inner), self._first.get(last.inner)
        if entry is None or leave is None or not entry.inputs or not leave.outputs:
            return None
        return entry.inputs[0], leave.outputs[0]

    def _described(self, block: Block, *, beside_units: bool = False) -> Block:
        node = self._node(block.module)
        unit = next((u for u in self._units.chosen if u.call.module is node.inner), None)
        if len(block.parts) == 1 and unit is not None:
            return self._unit_block(unit)
        call = self._first[node.inner]
        if len(block.parts) == 1:
            return self._one(node, call, beside_units=beside_units)
        ends = self._ends(node, self._node(block.last))
        if ends is None:
            return dataclasses.replace(block, kind="plain", note="")
        kind, note = self._plain(block, ends, beside_units=beside_units)
        known = _lone(call, self._first[self._node(block.last).inner])
        return dataclasses.replace(block, kind=kind, note=note, **known)

    def _one(self, node: Node, call: Call, *, beside_units: bool) -> Block:
        """A module that is no unit itself: it may be a chain of them, or have no skip."""
        block = self._tree.block(node)
        if not call.inputs or not call.outputs:
            return dataclasses.replace(block, kind="plain", note="")
        source, target = call.inputs[0], call.outputs[0]
        known = _lone(call, call)
        passed = next((port for port in call.inputs if port.op == target.op), None)
        inside = [u for u in self._units.chosen if call.index in self._flow.chain(u.call.index)]
        kind: Kind
        if passed is not None and has_weights(node.inner):
            kind, note = "identity", "passed its input through in this run"
            known = _known(passed, target)
        elif inside:
            kind, note, ends = self._chain_of(call, inside)
            known = known if ends is None else _known(*ends)
        else:
            kind, note = self._plain(block, (source, target), beside_units=beside_units)
        return dataclasses.replace(block, kind=kind, note=note, **known)

    def _plain(
        self, block: Block, ends: tuple[Port, Port], *, beside_units: bool
    ) -> tuple[Kind, str]:
        source, target = ends
        changed = source.shape != target.shape
        notes = [change for part in block.parts if (change := width_change(part))]
        if not notes and changed:
            notes = [_change(source.shape, target.shape)]
        if self._concatenates(source, target):
            notes.append("its input is concatenated to its output")
        if beside_units and changed:
            return "transition", "; ".join(["no skip", *notes])
        return "plain", "; ".join(notes)

    def _concatenates(self, source: Port, target: Port) -> bool:
        op = self._flow.ops[target.op] if target.op >= 0 else None
        return op is not None and op.name in ("cat", "concat") and source.op in op.parents

    def _chain_of(
        self, call: Call, inside: list[Unit]
    ) -> tuple[Kind, str, tuple[Port, Port] | None]:
        """The kind of a module that runs units one after the other, and where its stream is."""
        first, last = inside[0].source.op, inside[-1].target.op
        sources = [p for p in call.inputs if self._flow.between(p.op, first) is not None]
        targets = [p for p in call.outputs if self._flow.between(last, p.op) is not None]
        ends = None
        if sources and targets:
            # The ways without a layer come first.
            ends = (
                min(sources, key=lambda port: self._mixes_between(port.op, first)),
                min(targets, key=lambda port: self._mixes_between(last, port.op)),
            )
        source, target = ends or (call.inputs[0], call.outputs[0])
        note = f"holds {len(inside)} residual block{'s' if len(inside) > 1 else ''}"
        at, met = target.op, False
        for unit in reversed(inside):
            way = self._flow.between(unit.target.op, at)
            if way is None:
                return "transition", note, ends
            met, at = met or self._flow.mixes(way), unit.source.op
        way = self._flow.between(source.op, at)
        clean = way is not None and not met and not self._flow.mixes(way)
        same = source.shape == target.shape and all(unit.kind == "identity" for unit in inside)
        return ("identity" if clean and same else "transition"), note, ends

    def _mixes_between(self, first: int, last: int) -> bool:
        return self._flow.mixes(self._flow.between(first, last) or ())


class _Known(TypedDict, total=False):
    input_shape: Shape
    output_shape: Shape
    input_index: int | None
    output_index: int | None


def _known(source: Port, target: Port) -> _Known:
    """What is known of a block whose stream was seen."""
    return {
        "input_shape": source.shape,
        "output_shape": target.shape,
        "input_index": source.index,
        "output_index": target.index,
    }


def _lone(first: Call, last: Call) -> _Known:
    """What is known where no skip tells which tensor the stream is: something if it is alone."""
    known: _Known = {
        "input_shape": first.inputs[0].shape,
        "output_shape": last.outputs[0].shape,
    }
    if len(first.inputs) == 1:
        known["input_index"] = first.inputs[0].index
    if len(last.outputs) == 1:
        known["output_index"] = last.outputs[0].index
    return known


def _change(before: Shape, after: Shape) -> str:
    one, other = ("x".join(map(str, shape)) for shape in (before, after))
    return f"{one} -> {other}"
