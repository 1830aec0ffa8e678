"""Data-parallel products: every rank has its own batches, and all get the mean over all of them.

A product takes one sum of ``n`` numbers over the ranks. It goes off in pieces, parameters from the
last to the first, as the backward pass gets them ready. The pieces are the same on every rank
whatever engine multiplies there, and so is their order: what differs between the ranks is noticed,
and nobody waits for a rank that failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conditioning.distributed import Group, checksum, digest
from conditioning.errors import RankMismatchError, UnsupportedParameterError
from conditioning.operators import checks
from conditioning.operators.base import LinearOperator
from conditioning.operators.modules import join_names, named_modules
from conditioning.operators.parameters import FlatLayout

if TYPE_CHECKING:
    from conditioning.operators.graphs import LossGraph
    from conditioning.operators.losses import LossOperator
    from conditioning.operators.sharded import Shards

# As DistributedDataParallel's: large enough for the bandwidth, small enough to start early.
BUCKET_BYTES = 25 * 2**20
_DIFFERENT = (
    "The ranks do not do the same: each has to multiply equally many vectors, equal to the last "
    "bit (one seed for all ranks), with one operator, in one order. Give process_group=None to "
    "keep a rank to itself."
)


class Reduction:
    """One sum over the ranks, of a number of pieces that are sent as they get ready.

    Parameters
    ----------
    group : Group
    label : tuple
        What is summed; it has to be the same on all ranks.
    vectors : Tensor, optional
        What is multiplied: the same.
    """

    def __init__(self, group: Group, label: tuple[Any, ...], vectors: Tensor | None) -> None:
        self._group = group
        mark: int | Tensor = digest(label)
        if vectors is not None:
            mark = checksum(vectors) ^ mark
        self._compare: Callable[[], bool] | None = group.start_comparison(mark)
        self._waits: list[Callable[[], Tensor]] = []

    def confirm(self) -> None:
        """Wait until it is known that all ranks mean the same sum."""
        if self._compare is None:
            return
        same = self._compare()
        self._compare = None
        if not same:
            raise RankMismatchError(_DIFFERENT)

    def send(self, piece: Tensor) -> None:
        """Add a piece; goes on while it is under way."""
        self.confirm()
        self._waits.append(self._group.start_sum(piece))

    def finish(
        self, lengths: Sequence[int], weight: float, like: Tensor, *, failed: bool
    ) -> tuple[list[Tensor], float]:
        """Send what is missing as zeros if this rank failed; wait for the pieces and the weight."""
        for length in lengths[len(self._waits) :]:
            self.send(like.new_zeros(length))
        end = torch.tensor([weight, float(failed)], dtype=torch.float64, device=like.device)
        last = self._group.start_sum(end)
        pieces = [wait() for wait in self._waits]
        total, failures = last().tolist()
        if failures and not failed:
            msg = "Another rank failed in this product: see its own error."
            raise RankMismatchError(msg)
        return pieces, total


class VectorsOfRanks(LinearOperator):
    """A symmetric operator whose data, and with sharded parameters its vectors, lie on ranks."""

    _layout: FlatLayout
    _shards: Shards | None
    _parallel: DataParallel | None

    @property
    def local_size(self) -> int:
        """Entries of a vector that this process holds: all ``n``, unless the model is sharded."""
        return self._layout.numel

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold different entries of a vector."""
        return self._shards is not None

    def local_part(self, vector: Tensor) -> Tensor:
        """Of a whole vector ``(n,)`` or block ``(n, k)``, the entries that this process holds."""
        return vector if self._shards is None else self._shards.local_part(vector)

    def whole(self, part: Tensor) -> Tensor:
        """Inverse of :meth:`local_part`: every process gets the whole vector or block."""
        return part if self._shards is None else self._shards.whole(part)

    def sum_over_shards(self, partial: Tensor) -> Tensor:
        """Add up what the processes found on their entries: inner products, squared norms."""
        return partial if self._shards is None else self._shards.sum(partial)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector into named tensors of the parameters' shapes.

        Parameters
        ----------
        vector : Tensor of shape ``(n,)`` or ``(n, k)``

        Returns
        -------
        dict of str to Tensor
            Shapes ``(*shape)``, or ``(*shape, k)``. Views where that is possible.

        Raises
        ------
        ShapeError
            If the length is not ``n``.
        """
        return self._layout.unflatten(vector)

    def flatten(self, mapping: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`unflatten`.

        Raises
        ------
        ShapeError
            If a name is missing or unknown, or a tensor has another shape.
        """
        return self._layout.flatten(mapping)

    def agree(self, flag: bool) -> bool:
        """Whether a process says so: what depends on memory or time is decided alike on all."""
        together = self._shards or self._parallel
        return flag if together is None else together.group.any(flag)

    def least(self, value: int) -> int:
        """The smallest over the processes, of bytes that are free and the like."""
        together = self._shards or self._parallel
        return value if together is None else int(min(together.group.gather(value)))


class DataParallel:
    """Adds up over ranks what an operator finds on the batches of each.

    Parameters
    ----------
    group : Group
    layout : FlatLayout
    """

    def __init__(self, group: Group, layout: FlatLayout) -> None:
        self.group = group
        self._layout = layout
        self._dtype = torch.promote_types(layout.dtype, torch.float32)
        self._buckets = _buckets(layout.sizes, self._dtype.itemsize)
        self._bucket_of = {i: b for b, bucket in enumerate(self._buckets) for i in bucket}

    def loss_and_gradient(self, operator: LossOperator) -> list[Tensor]:
        """Loss and flat gradient over the batches of all ranks."""

        def work(reduction: Reduction) -> float:
            (loss, gradient), weight = operator._sums(operator._loss_and_gradient)
            reduction.send(torch.cat([loss.reshape(1), gradient]).to(self._dtype))
            return weight

        (both,), total = self._run(("gradient",), None, [1 + self._layout.numel], work)
        both = both / total if operator._needs_sizes else both
        return [both[0], both[1:]]

    def product(self, operator: LossOperator, block: Tensor) -> Tensor:
        """Rows ``(k, n)`` times the matrix over the batches of all ranks."""
        count, n = block.shape
        by_row = count * n * self._dtype.itemsize > BUCKET_BYTES or count == 1
        widths = [sum(self._layout.sizes[i] for i in bucket) for bucket in self._buckets]

        def work(reduction: Reduction) -> float:
            kept = operator._fresh_graphs()
            one_by_one = by_row and (count == 1 or operator.block_engine != "batched")
            # Other engines give a product as a whole.
            one_by_one &= operator._engine.wanted in ("auto", "retained")
            # A graph in segments differentiates by parameters inside, where hooks are called too.
            one_by_one &= not operator._checkpointed
            if one_by_one and kept and all(getattr(g, "by_parameter", False) for g, _ in kept):
                for row in block:
                    self._send_overlapped(reduction, operator, kept, row)
                return sum(size for _, size in kept)
            (rows,), weight = operator._sums(lambda graph: [operator._rows(graph, block)])
            rows = rows.to(self._dtype)
            if not by_row:
                reduction.send(rows.reshape(-1))
                return weight
            for row in rows:
                parts = row.split(self._layout.sizes)
                for bucket in self._buckets:
                    reduction.send(torch.cat([parts[i] for i in bucket]))
            return weight

        lengths = widths * count if by_row else [count * n]
        pieces, total = self._run(("product", count), block, lengths, work)
        if by_row:
            step = len(self._buckets)
            rows = [self._joined(pieces[i : i + step]) for i in range(0, len(pieces), step)]
            result = rows[0][None] if len(rows) == 1 else torch.stack(rows)
        else:
            result = pieces[0].reshape(count, n)
        return result / total if operator._needs_sizes else result

    def _run(
        self,
        label: tuple[Any, ...],
        vectors: Tensor | None,
        lengths: list[int],
        work: Callable[[Reduction], float],
    ) -> tuple[list[Tensor], float]:
        marks = (*label, self._layout.names, self._layout.shapes, str(self._layout.dtype))
        reduction = Reduction(self.group, marks, vectors)
        like = torch.zeros(0, dtype=self._dtype, device=self._layout.device)
        try:
            weight = work(reduction)
        except RankMismatchError:
            raise
        except Exception:
            # The others wait for this rank's pieces: they get zeros, and word of the failure.
            with contextlib.suppress(Exception):  # of the network: this rank's own error says more
                reduction.finish(lengths, 0.0, like, failed=True)
            raise
        return reduction.finish(lengths, weight, like, failed=False)

    def _send_overlapped(
        self,
        reduction: Reduction,
        operator: LossOperator,
        kept: Sequence[tuple[LossGraph, float]],
        row: Tensor,
    ) -> None:
        """Multiply one row, and send each bucket as soon as the last batch's part of it is done."""
        layout, parameters = self._layout, operator._parameters
        weighted = operator._needs_sizes
        tangents = layout.split(row)
        sums: list[Tensor | None] = [None] * len(tangents)

        def add(index: int, part: Tensor | None, weight: float) -> None:
            if part is None:
                return
            part = part.detach().to(self._dtype) * (weight if weighted else 1.0)
            before = sums[index]
            sums[index] = part if before is None else before + part

        *others, (last, size) = kept
        for graph, weight in others:
            for index, part in enumerate(graph.apply(tangents, batched=False)):
                add(index, part, weight)
        missing = [len(bucket) for bucket in self._buckets]
        sent = 0

        def send() -> None:
            nonlocal sent
            bucket = self._buckets[sent]
            sent += 1
            parts = [
                torch.zeros(layout.sizes[i], dtype=self._dtype, device=layout.device)
                if sums[i] is None
                else sums[i].reshape(-1)  # type: ignore[union-attr]
                for i in bucket
            ]
            for i in bucket:
                sums[i] = None
            reduction.send(torch.cat(parts) if len(parts) > 1 else parts[0].clone())

        def ready(index: int, part: Tensor) -> None:
            add(index, part, size)
            missing[self._bucket_of[index]] -= 1
            # In the order of the buckets only: it is the same on every rank.
            while sent < len(missing) and missing[sent] == 0:
                send()

        handles = [
            parameter.register_hook(lambda part, index=index: ready(index, part))
            for index, parameter in enumerate(parameters)
        ]
        try:
            last.apply(tangents, batched=False)
        finally:
            for handle in handles:
                handle.remove()
        while sent < len(self._buckets):  # what the loss does not depend on gets no gradient
            send()

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        parts: list[Tensor] = [pieces[0]] * len(self._layout.sizes)
        for bucket, piece in zip(self._buckets, pieces, strict=True):
            sizes = [self._layout.sizes[i] for i in bucket]
            for index, part in zip(bucket, piece.split(sizes), strict=True):
                parts[index] = part
        return torch.cat(parts)


def _buckets(sizes: Sequence[int], itemsize: int) -> list[list[int]]:
    """Parameters from the last to the first, the order in which gradients come, in buckets."""
    buckets: list[list[int]] = []
    held = BUCKET_BYTES
    for index in reversed(range(len(sizes))):
        if held >= BUCKET_BYTES:
            buckets.append([])
            held = 0
        buckets[-1].append(index)
        held += sizes[index] * itemsize
    return buckets


def refuse_differences(operator: LossOperator, group: Group) -> None:
    """Compare on all ranks what has to be the same: parameters, buffers, options.

    Raises
    ------
    RankMismatchError
        On every rank, naming what differs.
    """
    names = operator._layout.names
    marks: dict[str, Any] = {
        "kind of operator": type(operator).__name__,
        "reduction": operator._reduction,
        "choice of parameters": names,
    }
    chosen = dict(zip(names, operator._parameters, strict=True)) if operator._shards is None else {}
    marks |= {f"parameter {name}": _mark_of(p) for name, p in chosen.items()}
    seen = {id(p) for p in chosen.values()}
    for prefix, module in named_modules(operator._owners):
        dot = f"{prefix}." if prefix else ""
        for name, held in module._parameters.items():
            if held is not None and id(held) not in seen:
                marks[f"parameter {dot}{name}"] = _mark_of(held)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                marks[f"buffer {dot}{name}"] = _mark_of(buffer)
    different = group.compare(marks)
    if different:
        msg = (
            f"The ranks differ in: {join_names(different)}. They have to hold the same function: "
            f"seed them alike, load one checkpoint, or send those of one rank to all "
            f"(torch.distributed.broadcast). DistributedDataParallel sends buffers, such as "
            f"running statistics, before a forward pass only."
        )
        raise RankMismatchError(msg)


def checked_together(
    operator: LossOperator, group: Group, *, check: bool, stacklevel: int
) -> DataParallel:
    """Let every rank check what it has, and raise on all what one of them met."""
    refuse_differences(operator, group)
    error = None
    try:
        if check:
            checks.check_loss_operator(operator, stacklevel=stacklevel + 1)
    except Exception as found:
        error = found
    group.raise_together(error)
    operator._value = None  # that of this rank's data alone
    return DataParallel(group, operator._layout)


def _mark_of(tensor: Tensor) -> tuple[Any, ...]:
    if nn.parameter.is_lazy(tensor):
        return ()
    if hasattr(tensor, "placements"):  # each rank has other entries
        return tuple(tensor.shape), str(tensor.dtype), tensor.placements
    readable = tensor.layout == torch.strided and tensor.device.type != "meta"
    value = int(checksum(tensor)) if readable and not tensor.dtype.is_complex else 0
    return tuple(tensor.shape), str(tensor.dtype), value


def unwrapped(model: Any) -> Any:
    """The model inside ``DistributedDataParallel``.

    Raises
    ------
    UnsupportedParameterError
        If it is sharded in the first version of FSDP.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, nn.Module):
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
            msg = (
                "The model is sharded by FullyShardedDataParallel, whose flat parameters cannot "
                "be told apart. Shard it by torch.distributed.fsdp.fully_shard."
            )
            raise UnsupportedParameterError(msg)
    return model


@contextlib.contextmanager
def without_reducers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let wrappers of DDP call the module inside and nothing else: no buckets, no broadcasts."""
    wrappers = [m for m in modules if isinstance(m, DistributedDataParallel)]
    before = [vars(m).get("forward") for m in wrappers]
    for wrapper in wrappers:
        vars(wrapper)["forward"] = wrapper.module
    try:
        yield
    finally:
        for wrapper, own in zip(wrappers, before, strict=True):
            if own is None:
                vars(wrapper).pop("forward", None)
            else:
                vars(wrapper)["forward"] = own
