"""What the operators of a loss share: parameters, batches, retained graphs, averaging."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conditioning.distributed import AUTO, group_for
from conditioning.errors import InvalidArgumentError, ParameterSelectionError
from conditioning.memory import available_bytes
from conditioning.operators import checks
from conditioning.operators.batches import (
    call_with,
    map_tensors,
    same_tensors,
    tensors_in,
    to_device,
)
from conditioning.operators.engines import Multiplier
from conditioning.operators.graphs import LossGraph
from conditioning.operators.guards import (
    BufferGuard,
    GraphTooLarge,
    SavedBytes,
    differentiable,
    fingerprint,
    isolated_randomness,
)
from conditioning.operators.lockstep import batches_of
from conditioning.operators.modules import find_modules, join_names, named_modules
from conditioning.operators.parallel import (
    VectorsOfRanks,
    checked_together,
    unwrapped,
    without_reducers,
)
from conditioning.operators.parameters import (
    FlatLayout,
    ParameterChoice,
    select_parameters,
    warn_of_mixed_dtypes,
)
from conditioning.operators.scalar import scalar_loss
from conditioning.operators.segments import NotInSegments, segmented
from conditioning.operators.sharded import can_shard, reshard, shards_of
from conditioning.operators.sharded_checks import check_sharded_operator
from conditioning.operators.sums import accumulate, wide
from conditioning.operators.timing import Engine, time_operator

_REDUCTIONS = ("mean", "sum")
# Frames between a user's call and the place in this package that warns.
_STACKLEVEL = 3


class _Held(NamedTuple):
    """A graph that is kept while others are built again and again."""

    batch: Any
    graph: LossGraph
    size: float


class LossOperator(VectorsOfRanks):
    """A symmetric operator on the parameters of a loss, built from one graph per batch.

    A subclass implements :meth:`_graph`, which runs the model on one batch. The
    parameters are those of :class:`HessianOperator`.
    """

    _takes_bare_loss = True

    def __init__(
        self,
        model: Callable[..., Any],
        loss_fn: Callable[..., Any] | None,
        data: Any,
        params: ParameterChoice = None,
        reduction: str = "mean",
        check: bool = True,
        *,
        batch_size_fn: Callable[[Any], float] | None = None,
        memory_budget: int | None = None,
        process_group: Any = AUTO,
        engine: str = "auto",
    ) -> None:
        if reduction not in _REDUCTIONS:
            msg = f"reduction should be 'mean' or 'sum', got {reduction!r}."
            raise InvalidArgumentError(msg)
        if memory_budget is not None and memory_budget < 0:
            msg = f"memory_budget is a number of bytes, got {memory_budget}."
            raise InvalidArgumentError(msg)
        if loss_fn is None and not self._takes_bare_loss:
            msg = (
                f"{type(self).__name__} needs model and loss_fn apart: the matrix depends on where "
                f"the one ends and the other begins. Pass loss_fn, or use HessianOperator."
            )
            raise InvalidArgumentError(msg)
        for role, function in (("model", model), ("loss_fn", loss_fn)):
            if isinstance(function, type):
                msg = f"{role} is the class {function.__name__}. Make one: {function.__name__}()."
                raise InvalidArgumentError(msg)
            if not callable(function) and not (role == "loss_fn" and function is None):
                msg = f"{role} should be callable, got {type(function).__name__}."
                raise InvalidArgumentError(msg)
        modules = [thing for thing in (model, params) if isinstance(thing, torch.nn.Module)]
        together = group_for(process_group, modules)
        self._model = model = unwrapped(model)
        self._loss_fn = loss_fn
        self._owners = find_modules(
            model,
            exact=params is None,
            also={
                "loss_fn": loss_fn,
                "params": params if isinstance(params, torch.nn.Module) else None,
            },
        )
        self._modules = [module for _, module in named_modules(self._owners)]
        is_module = isinstance(model, torch.nn.Module)
        sharded = can_shard(process_group)
        if sharded:
            reshard(self._modules)
        selected = select_parameters(self._owners, params, closed=is_module, sharded=sharded)
        self._shards = shards_of(self._modules, selected, process_group) if sharded else None
        self._parameters = list(selected.values()) if self._shards is None else self._shards.leaves
        self._layout = FlatLayout(list(selected), self._parameters)
        self._owned_then = self._owned_parameters()
        self._reduction = reduction
        self._memory_budget = memory_budget
        self._batches = batches_of(
            data, self._shards.group if self._shards else None, mean=self._needs_sizes,
            paired=loss_fn is not None, batch_size_fn=batch_size_fn,
        )  # fmt: skip
        self._engine = Multiplier(engine)
        self._gradient_seconds: float | None = None
        # The graphs of all batches; or of some, by their place, where not all of them fit.
        self._kept: list[tuple[LossGraph, float]] | None = None
        self._some: dict[int, _Held] = {}
        self._room = 0.0
        self._keep = self._keep_some = True
        # Whether graphs hold only what enters the blocks, or why they cannot where they should.
        self._checkpointed = False
        self._whole_because = ""
        self._bytes_per_size: float | None = None
        self._eps = self._layout.eps
        self._made_at: tuple[Any, ...] = ()
        self._value: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        n = self._layout.numel if self._shards is None else self._shards.numel
        super().__init__((n, n), self._layout.dtype, self._layout.device, symmetric=True)
        warn_of_mixed_dtypes(self._layout, stacklevel=_STACKLEVEL)
        self._parallel = None
        if self._shards is not None:
            self._refuse_engine(engine)
            self._engine.choose("batched")
            check_sharded_operator(self, self._shards.group, check=check, stacklevel=_STACKLEVEL)
        elif together is not None:
            self._parallel = checked_together(self, together, check=check, stacklevel=_STACKLEVEL)
        elif check:
            checks.check_loss_operator(self, stacklevel=_STACKLEVEL)

    # What a subclass provides.

    def _graph(self, batch: Any) -> LossGraph:
        raise NotImplementedError

    # What a user reads.

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order in which they make the flat vector."""
        return self._layout.names

    @property
    def loss(self) -> float:
        """The loss over all batches, reduced as the operator is."""
        return float(self._evaluate()[0])

    @property
    def block_engine(self) -> str:
        """How blocks of vectors are multiplied: ``"loop"``, ``"batched"``, or ``"undecided"``.

        The first block decides by timing both. The two differ by rounding: set one where results
        have to be equal to the last bit from run to run; that also keeps to the retained graph,
        unless ``engine`` is set. A batched pass that an operation or the memory does not allow
        becomes a loop.

        Raises
        ------
        InvalidArgumentError
            If it is set to something else.
        """
        return self._engine.choice

    @block_engine.setter
    def block_engine(self, choice: str) -> None:
        if choice == "undecided" and self._shards is not None:
            msg = "Timing may decide otherwise on other ranks: set 'loop' or 'batched'."
            raise InvalidArgumentError(msg)
        self._engine.choose(choice)

    @property
    def engine(self) -> Engine:
        """How products are computed now, what that costs, and why; see :class:`Engine`.

        Reading it for the first time multiplies three vectors with the first batch and takes three
        gradients. Set to ``"auto"``, ``"retained"``, ``"linearized"`` or ``"compiled"``.

        Raises
        ------
        InvalidArgumentError
            If it is set to something else.
        """
        if self._shards is not None:  # what it costs depends on all ranks
            return self._engine.describe(None)
        self._gradient_seconds = time_operator(self, self._gradient_seconds, self._engine.seconds)
        return self._engine.describe(self._gradient_seconds)

    @engine.setter
    def engine(self, name: str) -> None:
        self._refuse_engine(name)
        self._engine.choose_engine(name)

    def _refuse_engine(self, name: str) -> None:
        if name in ("linearized", "compiled") and self._shards is not None:
            msg = f"Sharded parameters are gathered by the retained graph only, not {name!r}."
            raise InvalidArgumentError(msg)

    def gradient(self) -> Tensor:
        """Gradient of the loss over all batches, flat, shape ``(n,)``."""
        return self._evaluate()[1].clone()

    def refresh(self) -> None:
        """Forget the graphs, so that the next product evaluates model and data anew.

        Changes of parameters (not those in place through ``.data``), buffers and training mode are
        noticed without this. Call it after a change of the data or of what else the loss reads.
        """
        self._kept = None
        self._some.clear()
        self._value = None
        self._keep = self._keep_some = True

    # Graphs: built under guards, kept if they fit.

    def _build(
        self,
        batch: Any,
        *,
        watch: contextlib.AbstractContextManager[Any] | None = None,
        buffers: BufferGuard | None = None,
    ) -> LossGraph:
        """Build the graph of one batch; the caller isolates the random state."""
        with (
            self._guarded(buffers or BufferGuard(self._modules)),
            watch or contextlib.nullcontext(),
            self._segments(),
            self._shards.gathering() if self._shards else contextlib.nullcontext(),
        ):
            graph = self._graph(self._ready(batch))
        if self._shards is not None:  # each rank's loss is its share of the whole
            graph.loss = self._shards.sum(graph.loss)
        return graph

    @contextlib.contextmanager
    def _guarded(self, buffers: BufferGuard) -> Iterator[None]:
        with differentiable(self._modules, self.device), buffers, without_reducers(self._modules):
            yield

    def _plain_loss(self, batch: Any) -> Tensor:
        """The loss of one batch, with nothing else made of its graph."""
        with self._guarded(BufferGuard(self._modules)):
            ready = self._ready(batch)
            return self._loss_of(*self._forward(ready), ready)

    def _ready(self, batch: Any) -> Any:
        """On the device, and not the caller's: some models work in place from the first layer."""
        return map_tensors(torch.clone, to_device(batch, self.device))

    def _forward(self, batch: Any) -> tuple[Any, Any]:
        """Return outputs and targets of a batch; the loss and ``None`` without a ``loss_fn``."""
        with checks.translated_forward_errors(batch, self._parameters):
            if self._loss_fn is None:
                return self._model(batch), None
            inputs, targets = batch
            return call_with(self._model, inputs), targets

    def _loss_of(self, outputs: Any, targets: Any, batch: Any) -> Tensor:
        loss = outputs
        if self._loss_fn is not None:
            with checks.translated_forward_errors(batch, self._parameters):
                loss = self._loss_fn(outputs, targets)
        share = getattr(self._batches, "share", 1.0)  # of ranks that take one step together
        return scalar_loss(loss) if share == 1.0 else scalar_loss(loss) * share

    def _budget(self) -> int:
        if self._memory_budget is not None:
            return self._memory_budget
        return available_bytes(self.device) // 4

    def _measure(
        self,
        batch: Any,
        *,
        watch: contextlib.AbstractContextManager[Any] | None = None,
        buffers: BufferGuard | None = None,
    ) -> LossGraph:
        """Build a graph to throw away, and note how many bytes it holds.

        One that would hold too many is given up on the way, and built in segments.
        """
        counter = SavedBytes([*self._parameters, *tensors_in(batch)], self._graph_limit())
        try:
            with counter:
                graph = self._build(batch, watch=watch, buffers=buffers)
        except GraphTooLarge:
            self._checkpointed = True
            try:
                graph = self._build(batch, watch=watch, buffers=buffers)
            except NotInSegments as error:
                self._checkpointed = False
                self._whole_because = str(error)
                return self._measure(batch, watch=watch, buffers=buffers)
        self._bytes_per_size = counter.total / self._batches.size_or(batch, 1.0)
        self._eps = max(self._eps, counter.eps)
        held, budget = counter.total, self._budget()
        if self._shards is not None:  # chunks of a block have to be the same on all ranks
            held, budget = self._shards.largest(held), -self._shards.largest(-budget)
        self._engine.limit(held, self.shape[0] * self.dtype.itemsize, budget)
        return graph

    def _segments(self) -> contextlib.AbstractContextManager[None]:
        if not self._checkpointed:
            return contextlib.nullcontext()
        return segmented(list(self._owners.values()), self._parameters, self.device)

    def _graph_limit(self) -> int | None:
        """Bytes that one graph may hold before it is built in segments.

        The budget is for what is kept: of several batches one graph has to fit, kept or not.
        """
        if self._checkpointed or self._whole_because or self._kept is not None:
            return None
        if self._shards is not None:  # gathering keeps one order on all ranks, segments change it
            return None
        if self._memory_budget is not None and self._batches.single:
            return self._memory_budget
        return available_bytes(self.device) // 2

    def _marks(self) -> tuple[Any, ...]:
        return fingerprint(self._parameters, self._modules)

    def _fresh_graphs(self) -> list[tuple[LossGraph, float]] | None:
        """Return the graphs of all batches where they are kept; drop those that are stale."""
        if self._kept is None and not self._some:
            self._refuse_replaced_parameters()
        elif self._made_at != self._marks():
            self._kept = None
            self._some.clear()
            self._refuse_replaced_parameters()
        return self._kept

    def _owned_parameters(self) -> set[int]:
        return {id(p) for module in self._modules for p in module._parameters.values()}

    def _refuse_replaced_parameters(self) -> None:
        """Complain where the model no longer has what the flat vector was cut for."""
        left = self._owned_then - self._owned_parameters()
        pairs = zip(self._layout.names, self._parameters, strict=True)
        gone = self._layout.misfits(self._parameters) + [n for n, p in pairs if id(p) in left]
        if gone:
            msg = (
                f"Replaced in the model, or moved to another dtype or device, since this operator "
                f"was made: {join_names(list(dict.fromkeys(gone)))}. Make a new operator."
            )
            raise ParameterSelectionError(msg)

    @property
    def _needs_sizes(self) -> bool:
        return self._reduction == "mean"

    def _stream(self) -> Iterator[tuple[LossGraph, float]]:
        """The graphs of all batches in turn; what fits the budget is kept, the rest is dropped.

        One that was kept counts only for the very batch that it was built from: a loader may give
        other ones in another pass.
        """
        if not self._some:
            self._made_at = self._marks()
            self._room = float(self._budget())
        count = 0
        for index, batch in enumerate(self._batches):
            count += 1
            held = self._some.get(index)
            if held is not None and self._alike(not same_tensors(held.batch, batch)):
                self._some.clear()
                self._keep = self._keep_some = False
                held = None
            if held is None:
                size = self._batches.size(batch) if self._needs_sizes else 1.0
                needed = self._bytes_of(batch) if self._keep_some else 0.0
                held = _Held(batch, self._build(batch), size)
                if self._keep_some and not self._alike(needed > self._room):
                    self._room -= needed
                    self._some[index] = held
                else:
                    self._keep = False
            yield held.graph, held.size
            del held  # before the next one is built: two may not fit
        if len(self._some) == count:
            self._kept = [(held.graph, held.size) for held in self._some.values()]
            self._some.clear()

    def _alike(self, flag: bool) -> bool:
        """Gathering sharded parameters takes all ranks: each has to build the same graphs."""
        return flag if self._shards is None else self.agree(flag)

    def _bytes_of(self, batch: Any) -> float:
        """About what the graph of a batch takes; nothing for one batch alone, always kept."""
        if self._batches.single:
            return 0.0
        if self._bytes_per_size is None:
            self._measure(batch)
        return (self._bytes_per_size or 0.0) * self._batches.size_or(batch, 1.0)

    def _average(
        self,
        graphs: Iterator[tuple[LossGraph, float]] | list[tuple[LossGraph, float]],
        quantity: Callable[[LossGraph], list[Tensor]],
    ) -> list[Tensor]:
        """Reduce quantities of the batches' graphs over all batches."""
        totals, size, count = accumulate(graphs, quantity)
        return [t / size for t in totals] if count > 1 and self._needs_sizes else totals

    def _over_batches(self, quantity: Callable[[LossGraph], list[Tensor]]) -> list[Tensor]:
        kept = self._fresh_graphs()
        if kept is not None:
            return self._average(kept, quantity)
        with isolated_randomness(self._batches.generators()):
            return self._average(self._stream(), quantity)

    def _sums(self, quantity: Callable[[LossGraph], list[Tensor]]) -> tuple[list[Tensor], float]:
        """Quantities summed over this process's batches, times their sizes, and the sizes' sum."""
        kept = self._fresh_graphs()
        with contextlib.ExitStack() as stack:
            if kept is None:
                stack.enter_context(isolated_randomness(self._batches.generators()))
            sums, size, count = accumulate(kept or self._stream(), quantity)
        if count == 1 and self._needs_sizes:
            sums = [t.to(wide(t.dtype)) * size for t in sums]
        return sums, size

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """Loss and flat gradient over all batches."""
        if self._value is None or self._value[0] != self._marks():
            if self._parallel is not None:
                loss, gradient = self._parallel.loss_and_gradient(self)
            else:
                if self._shards is not None:
                    self._shards.confirm("gradient", self._layout.names)
                loss, gradient = self._over_batches(self._loss_and_gradient)
            self._value = (self._marks(), loss, gradient.to(self.dtype))
        return self._value[1], self._value[2]

    def _loss_and_gradient(self, graph: LossGraph) -> list[Tensor]:
        return [graph.loss, self._layout.join(graph.gradient)]

    def _rows(self, graph: LossGraph, block: Tensor) -> Tensor:
        budget = self._budget if self._keep else None
        layout = self._layout
        return self._engine.multiply(graph, layout, layout, block, eps=self._eps, budget=budget)

    def _matmat(self, vectors: Tensor) -> Tensor:
        block = vectors.T.contiguous()
        if self._shards is not None:
            self._shards.confirm("product", len(block), self.block_engine, self._layout.names)
        if len(block) > 1:
            self._size_up()
        if self._parallel is not None:
            return self._parallel.product(self, block).to(self.dtype).T
        (result,) = self._over_batches(lambda graph: [self._rows(graph, block)])
        return result.to(self.dtype).T

    def _size_up(self) -> None:
        """Measure a graph once: what it holds decides how many vectors go along in one pass."""
        if self._bytes_per_size is None:
            with isolated_randomness(self._batches.generators()):
                self._measure(next(iter(self._batches)))

    def _dense_block(self) -> int:
        self._size_up()
        # Without kept graphs every block costs a pass over the data.
        return max(64, self._engine.chunk) if self._keep else 256
