"""Where the two operands of an addition part, and what lies on the way."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from conditioning.blocks.tape import Call, Op, Tape

# How many common origins of two operands to try: a gate and what makes it, then its input. In a
# recurrent network everything before is a common origin.
_ORIGINS = 16
# These also gather what several branches make (experts): only an identity skip is one there.
_COLLECTING = ("index_add", "scatter_add")


@dataclass(frozen=True)
class Residual:
    """An addition whose operands come from one tensor, at least one of them through a layer.

    Attributes
    ----------
    op : int
        The addition.
    fork : int
        The operation that made the tensor at which the operands part.
    path : frozenset of int
        What lies between.
    skip_is_left : bool
    skip : int or None
        The operation that made the skip, where it is a term of one of the operands.
    identity : bool
        Whether the skip operand is that tensor itself, or a multiple of it.
    scale : float
        That multiple; 1 where the skip is no identity.
    through : tuple of str
        What the skip goes through where it is no identity.
    call : int
        The innermost module call that contains all of it.
    skip_path : frozenset of int
        The part of ``path`` that the skip goes through where it is no identity.
    """

    op: int
    fork: int
    path: frozenset[int]
    skip_is_left: bool
    skip: int | None
    identity: bool
    scale: float
    through: tuple[str, ...]
    call: int
    skip_path: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Walk:
    """What was met on the way back from a tensor.

    Attributes
    ----------
    met : frozenset of int
        Operations passed through.
    stops : frozenset of int
        Those where the way ended: wanted ones, and those from before.
    """

    met: frozenset[int]
    stops: frozenset[int]


@dataclass(frozen=True)
class _Parting:
    """Where two operands may come from: what lies on the way to each, and whether that is all."""

    fork: int
    left: frozenset[int]
    right: frozenset[int]
    whole: bool


class Flow:
    """Questions about a tape.

    Parameters
    ----------
    tape : Tape
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.ops: list[Op] = tape.ops
        self.calls: list[Call] = tape.calls
        sums = (
            i
            for i, op in enumerate(self.ops)
            if op.total is not None and not self._in_cell(op.call)
        )
        self.residuals = [item for item in map(self._residual, sums) if item is not None]

    def _in_cell(self, call: int) -> bool:
        """Whether a call is part of a recurrent layer of torch: additions there are gates."""
        cells = (nn.RNNBase, nn.RNNCellBase)
        return any(isinstance(self.calls[c].module, cells) for c in self.chain(call))

    def chain(self, call: int) -> list[int]:
        """Return a call and those around it, innermost first."""
        chain = []
        while call >= 0:
            chain.append(call)
            call = self.calls[call].parent
        return chain

    def mixes(self, ops: Iterable[int]) -> bool:
        """Whether features are mixed in any of these."""
        return any(self.ops[op].mixing for op in ops)

    def back(self, start: int, stops: Collection[int], since: int = 0) -> Walk:
        """Go back from an operation to others, or to what happened before ``since``."""
        met, ends, todo = set(), set(), [start]
        while todo:
            op = todo.pop()
            if op in met or op in ends:
                continue
            if op in stops or op < since:
                ends.add(op)
                continue
            met.add(op)
            todo.extend(self.ops[op].parents)
        return Walk(frozenset(met), frozenset(ends))

    def between(self, first: int, last: int) -> frozenset[int] | None:
        """Operations after ``first`` that lead from it to ``last``, which is one of them.

        ``None`` if there is no way; empty if both are one.
        """
        if first == last:
            return frozenset()
        met = self.back(last, (), since=first + 1).met
        inside: set[int] = set()
        for op in sorted(met):
            if any(parent == first or parent in inside for parent in self.ops[op].parents):
                inside.add(op)
        if last not in inside:
            return None
        wanted, todo = set(), [last]
        while todo:
            op = todo.pop()
            if op in inside and op not in wanted:
                wanted.add(op)
                todo.extend(self.ops[op].parents)
        return frozenset(wanted)

    def multiple(self, op: int, of: int) -> float | None:
        """Return the number that turns one tensor into another up to layout, if there is one."""
        scale = 1.0
        while op != of:
            step = self.ops[op].scale
            varying = [p for p in self.ops[op].parents if self.ops[p].varying]
            if step is None or len(varying) != 1 or op < of:
                return None
            scale *= step
            op = varying[0]
        return scale

    def _residual(self, index: int) -> Residual | None:
        total = self.ops[index].total
        assert total is not None
        mixing = self.ops[index].mixing
        for parted in self._parts(total.left, total.right):
            fork, left_path, right_path = parted.fork, parted.left, parted.right
            scale = self.multiple(total.left, fork)
            other = self.multiple(total.right[0], fork) if len(total.right) == 1 else None
            if scale is not None and other is not None and not mixing:
                return None  # x + x
            if scale is None and other is None:
                if not self.ops[fork].varying:
                    continue  # a weight that both sides use
                regrouped = self._regrouped(index)
                if regrouped is not None or self.ops[index].name.startswith(_COLLECTING):
                    return regrouped
                left = self._weight(left_path) <= self._weight(right_path)
            else:
                left = scale is not None
            skip, branch = (left_path, right_path) if left else (right_path, left_path)
            if not (mixing or self.mixes(branch)):
                if parted.whole:
                    return None
                continue  # a gate that both sides share: the input lies further back
            identity = scale is not None or other is not None
            factor = total.scales[0 if left else 1] * ((scale if left else other) or 1.0)
            return Residual(
                op=index,
                fork=fork,
                path=left_path | right_path,
                skip_is_left=left,
                skip=None,
                identity=identity,
                scale=factor if identity else 1.0,
                through=() if identity else self.names(skip),
                call=self._around(index, left_path | right_path),
                skip_path=frozenset() if identity else skip,
            )
        return None

    def _regrouped(self, index: int) -> Residual | None:
        """``(x + f(x)) + g(x)``: one skip and a branch of several terms."""
        terms = list(self._terms(index, 1.0, self.ops[index].call))
        for op, scale in terms if len(terms) > 2 else ():
            rest = tuple(other for other, _ in terms if other != op)
            parted = next(self._parts(op, rest), None)
            if parted is None or len(rest) != len(terms) - 1:
                continue
            fork, skip, branch = parted.fork, parted.left, parted.right
            factor = self.multiple(op, fork)
            if factor is not None and self.mixes(branch):
                # The partial sums lie on the way, too.
                met = self.back(index, (), since=fork + 1).met - {index}
                path = skip | branch | {o for o in met if self.ops[o].total is not None}
                around = self._around(index, path)
                return Residual(index, fork, path, True, op, True, factor * scale, (), around)
        return None

    def _terms(self, index: int, scale: float, call: int) -> Iterator[tuple[int, float]]:
        """Terms of an addition and of those inside it in one forward, and their factors."""
        total = self.ops[index].total
        nested = total is not None and len(total.right) == 1 and len(set(total.shapes)) == 1
        if total is None or not nested or self.ops[index].call != call:
            yield index, scale
            return
        for op, factor in ((total.left, total.scales[0]), (total.right[0], total.scales[1])):
            yield from self._terms(op, scale * factor, call)

    def _around(self, index: int, path: Collection[int]) -> int:
        """Return the innermost call that an addition and all that leads to it happened in."""
        chain = self.chain(self.ops[index].call)
        return next(
            (call for call in chain if self.calls[call].start <= min(path, default=index)), -1
        )

    def _weight(self, path: frozenset[int]) -> tuple[int, int]:
        return sum(self.ops[op].mixing for op in path), len(path)

    def names(self, path: Iterable[int]) -> tuple[str, ...]:
        """Names of operations that do more than multiply or reshape, each once, in order."""
        names = (self.ops[op].name for op in sorted(path) if self.ops[op].scale is None)
        return tuple(dict.fromkeys(names))

    def _parts(self, left: int, right: tuple[int, ...]) -> Iterator[_Parting]:
        """Common origins of two operands, latest first, and what lies on either side."""
        sides = {left: 1}
        for op in right:
            sides[op] = sides.get(op, 0) | 2
        heap = [-op for op in sides]
        heapq.heapify(heap)
        passed: list[int] = []
        found = 0
        while heap and found < _ORIGINS:
            op = -heapq.heappop(heap)
            if sides[op] == 3 and self.ops[op].floating:
                found += 1
                whole = not any(self.ops[-other].varying for other in heap)
                yield _Parting(op, *self._sides(op, passed, sides), whole)
            passed.append(op)
            for parent in self.ops[op].parents:
                if parent not in sides:
                    heapq.heappush(heap, -parent)
                sides[parent] = sides.get(parent, 0) | sides[op]

    def _sides(
        self, fork: int, passed: list[int], sides: dict[int, int]
    ) -> tuple[frozenset[int], frozenset[int]]:
        inside = {fork}
        for op in reversed(passed):
            if any(parent in inside for parent in self.ops[op].parents):
                inside.add(op)
        inside.discard(fork)
        one, other = (frozenset(op for op in inside if sides[op] & side) for side in (1, 2))
        return one, other
