"""Parameters that are cut into stretches over ranks: gathered, and scattered as sums.

Each of the two is the other's derivative, so they can be differentiated as often as is wanted.
Small parameters go together, as a collective takes its time however little it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from conditioning.distributed import Group


class Stretch:
    """Where the entries of one parameter lie: each rank has equally many in a row, or the rest.

    Parameters
    ----------
    group : Group
    tensor : Tensor
        A DTensor that is sharded along its first axis; or one that every rank has whole, of which
        each takes a stretch of its own.

    Attributes
    ----------
    leaf : Tensor
        This rank's entries, sharing memory with the parameter; what is differentiated by.
    shape : tuple of int
        Of the whole parameter.
    begin, end : int
        The entries of this rank, counted in the flat parameter.
    length : int
        Entries of each rank, the last ones filled up.
    """

    def __init__(self, group: Group, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.numel = tensor.numel()
        placements = getattr(tensor, "placements", ())
        local = local_tensor(tensor).detach()
        if placements and placements[0].is_shard():
            rows = -(-self.shape[0] // group.size)
            self.length = rows * (self.numel // max(self.shape[0], 1))
        else:
            self.length = -(-self.numel // group.size)
        self.begin = min(group.rank * self.length, self.numel)
        self.end = min(self.begin + self.length, self.numel)
        if not (placements and placements[0].is_shard()):
            local = local.reshape(-1)[self.begin : self.end]
        self.leaf = local.requires_grad_() if tensor.requires_grad else local


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.contiguous()


def _joined(rows: list[Tensor], dim: int = 0) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim)  # a large one is not copied


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return getattr(tensor, "_local_tensor", tensor)


class Bundle:
    """Parameters of one dtype that take one collective together; one alone as well.

    Parameters
    ----------
    group : Group
    stretches : sequence of Stretch
    """

    def __init__(self, group: Group, stretches: Sequence[Stretch]) -> None:
        self._group = group
        self.stretches = stretches
        self._lengths = [s.length for s in stretches]

    def gather(self) -> Sequence[Tensor]:
        """The whole tensors, as something to differentiate."""
        leaves = [s.leaf for s in self.stretches]
        return cast("Sequence[Tensor]", _Exchange.apply(self, False, *leaves))

    def gather_rows(self, local: Sequence[Tensor]) -> list[Tensor]:
        """Put the stretches of all ranks together: each ``(m, ...)`` to ``(numel, ...)``."""
        tail = local[0].shape[1:]
        rows = [_padded(part, n) for part, n in zip(local, self._lengths, strict=True)]
        whole = self._group.all_gather(_joined(rows).view(-1))
        parts = whole.view(self._group.size, -1, *tail).split(self._lengths, dim=1)
        pairs = zip(parts, self.stretches, strict=True)
        return [part.reshape(-1, *tail)[: s.numel] for part, s in pairs]

    def scatter_rows(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """Add up over the ranks, and take this rank's stretches: the way back."""
        size, tail = self._group.size, whole[0].shape[1:]
        rows = [
            _padded(part, n * size).view(size, n, *tail)
            for part, n in zip(whole, self._lengths, strict=True)
        ]
        local = self._group.reduce_scatter(_joined(rows, dim=1).view(-1))
        parts = local.view(-1, *tail).split(self._lengths)
        pairs = zip(parts, self.stretches, strict=True)
        return [part[: s.end - s.begin] for part, s in pairs]


class _Exchange(torch.autograd.Function):
    """From the entries of each rank to whole tensors, or from those to its entries of their sums.

    What has no gradient gets none, so that it is seen where a parameter is not used.
    """

    @staticmethod
    def forward(ctx: Any, bundle: Bundle, scatter: bool, *given: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.bundle, ctx.scatter = bundle, scatter
        local = [tuple(s.leaf.shape) for s in bundle.stretches]
        whole = [s.shape for s in bundle.stretches]
        if scatter:
            return _batched(given, bundle.scatter_rows, whole, local)
        return _batched(given, bundle.gather_rows, local, whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found = _Exchange.apply(ctx.bundle, not ctx.scatter, *gradients)
        pairs = zip(gradients, found, strict=True)
        return None, None, *(None if g is None else part for g, part in pairs)


def _batched(
    given: Sequence[Tensor | None],
    function: Callable[[list[Tensor]], list[Tensor]],
    before: Sequence[tuple[int, ...]],
    after: Sequence[tuple[int, ...]],
) -> tuple[Tensor, ...]:
    """Apply a collective for flat vectors to tensors, or to such with a hidden axis of vectors.

    ``torch.autograd.grad(is_grads_batched=True)`` hides the axis in a tensor of its own kind, for
    which collectives have no rule.
    """
    some = next(t for t in given if t is not None)
    hidden = [t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in given]
    if not any(hidden):
        flat = [
            some.new_zeros(shape).view(-1) if t is None else t.reshape(-1)
            for t, shape in zip(given, before, strict=True)
        ]
        return tuple(t.view(shape) for t, shape in zip(function(flat), after, strict=True))
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # Of those without the axis, one in place of each vector's.
    blocks: list[Any] = [
        torch._remove_batch_dim(cast("Tensor", t), level, 0, 0) if there else t
        for t, there in zip(given, hidden, strict=True)
    ]
    width = len(blocks[hidden.index(True)])
    rows = []
    for block, there, shape in zip(blocks, hidden, before, strict=True):
        if not there:
            one = torch.zeros(shape, dtype=some.dtype, device=some.device)
            block = (one if block is None else block).expand(width, *shape)
        rows.append(block.reshape(width, -1 if block.numel() else 0).T)
    return tuple(
        torch._add_batch_dim(t.T.reshape(width, *shape), 0, level)
        for t, shape in zip(function(rows), after, strict=True)
    )
