"""How much of a residual block's output came through its skip, how much through its branch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from conditioning.blocks.block import Kind, table
from conditioning.blocks.flow import Residual
from conditioning.blocks.measure import Measurement
from conditioning.blocks.selection import select_blocks
from conditioning.blocks.structure import Tree
from conditioning.blocks.tape import Sum, Tape, record_tape, summed
from conditioning.errors import BlockSelectionError, RandomForwardError
from conditioning.operators.checks import exact
from conditioning.spectrum.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class BlockSplit(Result):
    """The two operands of one addition of a block.

    Attributes
    ----------
    name : str
        The block's.
    call, addition : int
        Which call of the block in this pass, and which addition in that call, from 0.
    kind : {"identity", "transition", "plain"}
    skip, branch : float
        Euclidean norms of what is added, over the whole batch.
    cosine : float
        Of the angle between them; NaN where one is zero.
    """

    name: str
    call: int
    addition: int
    kind: Kind
    skip: float
    branch: float
    cosine: float

    @property
    def ratio(self) -> float:
        """Branch over skip; infinite where the skip is zero."""
        if self.skip == 0:
            return math.inf if self.branch else math.nan
        return self.branch / self.skip

    def __str__(self) -> str:
        return (
            f"{self.name or '(model)'}: skip {self.skip:.4g}, branch {self.branch:.4g} "
            f"({self.ratio:.3g} of it), cosine {self.cosine:.3f}"
        )


class BlockSplits(Sequence[BlockSplit]):
    """The splits of all blocks in the order of the additions, printable as a table."""

    def __init__(self, splits: Sequence[BlockSplit]) -> None:
        self._splits = tuple(splits)

    @overload
    def __getitem__(self, key: int) -> BlockSplit: ...
    @overload
    def __getitem__(self, key: slice) -> BlockSplits: ...
    def __getitem__(self, key: int | slice) -> BlockSplit | BlockSplits:
        """One split, or several by a slice."""
        return BlockSplits(self._splits[key]) if isinstance(key, slice) else self._splits[key]

    def __len__(self) -> int:
        return len(self._splits)

    def __iter__(self) -> Iterator[BlockSplit]:
        return iter(self._splits)

    def to_frame(self) -> pd.DataFrame:
        """One row for each addition: block, call, addition, kind, skip, branch, ratio, cosine."""
        import pandas as pd

        rows = [
            (s.name, s.call, s.addition, s.kind, s.skip, s.branch, s.ratio, s.cosine) for s in self
        ]
        columns = ["block", "call", "addition", "kind", "skip", "branch", "ratio", "cosine"]
        return pd.DataFrame(rows, columns=columns)

    def __str__(self) -> str:
        head = ("block", "call", "addition", "kind", "|skip|", "|branch|", "ratio", "cosine")
        numbers = [(f"{s.skip:.4g}", f"{s.branch:.4g}", f"{s.ratio:.3g}") for s in self]
        return table(
            head,
            [
                (s.name or "(model)", s.call, s.addition, s.kind, *shown, f"{s.cosine:.3f}")
                for s, shown in zip(self, numbers, strict=True)
            ],
        )

    def __repr__(self) -> str:
        return f"BlockSplits({len(self)} additions)"


def split_blocks(model: nn.Module, inputs: Any, blocks: Any = None) -> BlockSplits:
    r"""Measure what is added in residual blocks: the norms of skip and branch, and their angle.

    At every addition :math:`y = s + b` of a block these are :math:`\|s\|`, :math:`\|b\|` and
    :math:`\langle s, b \rangle / (\|s\| \|b\|)`, over the whole batch, in double precision from the
    tensors that the model adds. Factors on the way into the addition count:
    ``torch.add(x, b, alpha=0.1)`` has the branch ``0.1 * b``.

    Parameters
    ----------
    model : nn.Module
        Runs twice, in the mode that it is in, and is left as it was.
    inputs : Tensor, tuple or dict
        As :class:`JacobianOperator` takes them.
    blocks : optional
        As :func:`select_blocks` takes them; ``None`` for all residual blocks that are found.

    Returns
    -------
    BlockSplits
        One entry for each addition of each call; a transformer layer has two. Blocks without an
        addition have none.

    Raises
    ------
    BlockSelectionError
        If there is no residual addition in any of the blocks.
    RandomForwardError
        If the second run took another course than the first.

    Examples
    --------
    >>> class Twice(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = nn.Linear(3, 3, bias=False)
    ...     def forward(self, x):
    ...         return x + self.inner(x)
    >>> block = Twice()
    >>> block.inner.load_state_dict({"weight": 0.5 * torch.eye(3)})
    <All keys matched successfully>
    >>> print(split_blocks(block, torch.ones(1, 3)))
    block    call  addition  kind      |skip|  |branch|  ratio  cosine
    (model)  0     0         identity  1.732   0.866     0.5    1.000
    """
    tree = Tree(model)
    chosen = None if blocks is None else select_blocks(model, blocks)
    measured = Measurement(model, inputs, tree)
    found = measured.blocks() if chosen is None else measured.describe(chosen)
    rows = [
        (block, call, addition, residual)
        for block in found
        for call, residuals in enumerate(measured.residuals(block))
        for addition, residual in enumerate(residuals)
    ]
    if not rows:
        names = ", ".join(repr(block.label) for block in found[:6])
        msg = (
            f"No residual addition in {names or 'the model'}: there is nothing to split. "
            f"find_blocks(model, inputs) lists the blocks and their kinds."
        )
        raise BlockSelectionError(msg)
    rows.sort(key=lambda row: row[3].op)
    tape = _Measuring({row[3].op: row[3] for row in rows})
    record_tape(model, inputs, [node.inner for node in tree.nodes.values()], tape)
    if [op.name for op in tape.ops] != [op.name for op in measured.ops]:
        msg = (
            "The model took another course in the second of two runs on the same inputs, random "
            "state and buffers. Look for state of its own that the forward pass changes."
        )
        raise RandomForwardError(msg)
    splits = []
    for block, call, addition, residual in rows:
        skip, branch, product = (float(value) for value in tape.measured[residual.op])
        length = math.sqrt(skip) * math.sqrt(branch)
        cosine = max(-1.0, min(1.0, product / length)) if length else math.nan
        splits.append(
            BlockSplit(
                block.name, call, addition, block.kind, math.sqrt(skip), math.sqrt(branch), cosine
            )
        )
    return BlockSplits(splits)


class _Measuring(Tape):
    """A second run, in which the operands of known additions are measured.

    Attributes
    ----------
    measured : dict of int to tuple of Tensor
        By addition: squared norms of skip and branch, and their inner product.
    """

    def __init__(self, wanted: Mapping[int, Residual]) -> None:
        super().__init__()
        self._wanted = wanted
        self._terms = {r.skip for r in wanted.values() if r.skip is not None}
        self._kept: dict[int, Tensor] = {}
        self.measured: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _note(self, tensor: Tensor, op: int) -> None:
        super()._note(tensor, op)
        if op in self._terms:
            # The model may change it in place before it is measured.
            self._kept[op] = tensor.detach().clone()

    def _sum(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
        total = super()._sum(name, args, kwargs)
        op = len(self.ops)  # the one that is about to be noted
        residual = self._wanted.get(op)
        if total is not None and residual is not None:
            left, right = _operands(name, args, total)
            if residual.skip is None:
                skip, branch = (left, right) if residual.skip_is_left else (right, left)
            else:
                skip = residual.scale * exact(self._kept[residual.skip])
                branch = left + right - skip
            skip, branch = torch.broadcast_tensors(skip, branch)
            self.measured[op] = skip.square().sum(), branch.square().sum(), (skip * branch).sum()
        return total


def _operands(name: str, args: tuple[Any, ...], total: Sum) -> tuple[Tensor, Tensor]:
    """What an addition adds, factors and fused products included, in double precision."""
    left, *right = (exact(value) for value in summed(name, args))
    if name in ("index_add", "scatter_add"):
        other = getattr(torch.zeros_like(left), name)(*args[1:3], right[0])
    elif len(right) == 1:
        other = right[0]
    elif name == "addbmm":
        other = torch.bmm(*right).sum(0)
    else:
        product = {"addcmul": torch.mul, "addr": torch.outer}.get(name, torch.matmul)
        other = product(*right)
    return total.scales[0] * left, total.scales[1] * other
