"""A record of one forward pass: which operation made which tensor from which, and in which call.

It is taken below autograd and Python, where every operation passes: additions by ``+``, ``+=``,
``torch.add`` or inside compiled C++ modules look the same there. No tensor's data is kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from conditioning.blocks.record import run_quietly, stream_tensors
from conditioning.blocks.wrappers import unwrapped
from conditioning.errors import BlockSelectionError
from conditioning.operators.batches import tensors_in

Shape = tuple[int, ...]

# The same numbers in another layout, shape or dtype.
_SAME = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "squeeze",
    "unsqueeze", "clone", "alias", "contiguous", "_to_copy", "to", "detach", "lift", "lift_fresh",
    "view_as", "flatten", "unflatten", "movedim",
})  # fmt: skip
# Features are mixed: what goes through these has gone through a layer.
_MIXING = frozenset({
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "addr", "mv", "dot", "matmul", "linear",
    "bilinear", "_trilinear", "einsum", "convolution", "_convolution", "mkldnn_rnn_layer", "lstm",
    "gru", "embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only",
    "_addmm_activation", "_int_mm", "_scaled_mm",
})  # fmt: skip
_MIXING_STARTS = (
    "conv", "cudnn_conv", "mkldnn_conv", "miopen_", "_cudnn_rnn", "_thnn_fused", "_fft_",
    "avg_pool", "max_pool", "_adaptive_avg_pool", "adaptive_", "upsample_", "mkldnn_max_pool",
)  # fmt: skip
_SUMS = frozenset({
    "add", "sub", "addcmul", "addmm", "baddbmm", "addbmm", "addmv", "addr", "lerp", "index_add",
    "scatter_add",
})  # fmt: skip
# What is added has a smaller or another shape, and goes to places that an index says.
_SCATTERED = frozenset({"index_add", "scatter_add"})
# Only shape, dtype and device of the operand matter.
_FRESH_ENDS = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
_FRESH_STARTS = ("new_zeros", "new_ones", "new_full", "new_empty")
# Where the first operand is multiplied by ``beta``, and the rest by ``alpha`` or ``value``.
_FUSED = {"addcmul": "value"}


@dataclass(frozen=True)
class Sum:
    """An addition of two tensors: operations that made the operands, and what they are worth.

    Attributes
    ----------
    left : int
        The operation that made the left operand.
    right : tuple of int
        Those that made the right one: two for a fused product and sum.
    scales : tuple of float
        What the operands are multiplied by on the way in.
    shapes : tuple of tuple
    """

    left: int
    right: tuple[int, ...]
    scales: tuple[float, float]
    shapes: tuple[Shape, Shape]


@dataclass(eq=False)
class Op:
    """One operation, or one tensor that came in from outside.

    Attributes
    ----------
    name : str
    parents : tuple of int
        Operations that made its operands.
    call : int
        The module call that it happened in, innermost.
    floating : bool
        Whether its output is floating point.
    shape : tuple of int
    varying : bool
        Whether its output depends on the model's inputs.
    scale : float or None
        Its output is this multiple of its only tensor operand, up to layout; else ``None``.
    mixing : bool
    total : Sum or None
        Set for an addition of two tensors.
    """

    name: str
    parents: tuple[int, ...]
    call: int
    floating: bool
    shape: Shape
    varying: bool = True
    scale: float | None = None
    mixing: bool = False
    total: Sum | None = None


@dataclass(frozen=True)
class Port:
    """A floating-point tensor at a module's input or output.

    Attributes
    ----------
    op : int
        The operation that made it.
    shape : tuple of int
    index : int
        Its position among the floating-point and complex tensors there.
    """

    op: int
    shape: Shape
    index: int = 0


@dataclass(eq=False)
class Call:
    """One call of a module: operations ``start`` to ``stop`` happened in it.

    Attributes
    ----------
    index : int
    module : nn.Module
    parent : int
        The call that it happened in, -1 for the model's own.
    start, stop : int
    inputs, outputs : list of Port
    """

    index: int
    module: nn.Module
    parent: int
    start: int
    stop: int = -1
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)


class Tape(TorchDispatchMode):
    """Operations and module calls of one forward pass, in order.

    Attributes
    ----------
    ops : list of Op
    calls : list of Call
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self._stack: list[int] = []
        # A tensor is told by its storage and its place in it, so that views and in-place
        # changes are seen. A weak reference lets the data go, but not the address: else a tensor
        # that is made without an operation (torch.tensor) could be taken for one that was there
        # before.
        self._made: dict[int, dict[Any, int]] = {}
        self._written: dict[int, int] = {}
        self._held: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _tensors((*args, *kwargs.values()))
        parents = tuple(dict.fromkeys(op for op in map(self.op_of, operands) if op >= 0))
        name = func._schema.name.rpartition("::")[2]
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if in_place else name
        if name.endswith(_FRESH_ENDS) or name.startswith(_FRESH_STARTS):
            parents, operands = (), []
        total = self._sum(name, args, kwargs) if name in _SUMS else None
        output = func(*args, **kwargs)
        outputs = _tensors((output,))
        written = _written(func, args, kwargs)
        if not outputs and not written:
            return output
        first = (outputs or written)[0]
        op = len(self.ops)
        self.ops.append(
            Op(
                name=func._schema.name.rpartition("::")[2],
                parents=parents,
                call=self._stack[-1] if self._stack else -1,
                floating=any(t.dtype.is_floating_point for t in outputs or written),
                shape=tuple(first.shape),
                varying=any(self.ops[parent].varying for parent in parents),
                scale=_scale(name, args, kwargs, operands),
                mixing=_mixes(func.namespace, name),
                total=total,
            )
        )
        for tensor in outputs:
            self._note(tensor, op)
        for tensor in written:
            storage = self._hold(tensor)
            if storage is not None:
                self._written[storage] = op
        return output

    def op_of(self, tensor: Tensor) -> int:
        """Return the operation that made a tensor as it is now, -1 if that was before the tape."""
        storage = _storage(tensor)
        if storage is None:
            return -1
        made = self._made.get(storage, {}).get(_place(tensor), -1)
        return max(made, self._written.get(storage, -1))

    def leaf(self, tensor: Tensor) -> int:
        """Take a tensor from outside into the record."""
        self.ops.append(Op("input", (), -1, tensor.dtype.is_floating_point, tuple(tensor.shape)))
        self._note(tensor, len(self.ops) - 1)
        return len(self.ops) - 1

    def release(self) -> None:
        """Let the addresses of all tensors go: :meth:`op_of` knows none of them any more."""
        self._made.clear()
        self._written.clear()
        self._held.clear()

    def _note(self, tensor: Tensor, op: int) -> None:
        storage = self._hold(tensor)
        if storage is not None:
            self._made.setdefault(storage, {})[_place(tensor)] = op

    def _hold(self, tensor: Tensor) -> int | None:
        storage = _storage(tensor)
        if storage is not None and storage not in self._held:
            self._held[storage] = StorageWeakRef(tensor.untyped_storage())
        return storage

    def enter(self, module: nn.Module, args: Any) -> None:
        """Begin a module call."""
        parent = self._stack[-1] if self._stack else -1
        call = Call(len(self.calls), module, parent, len(self.ops))
        self.calls.append(call)
        if parent < 0:
            for tensor in tensors_in(args):
                if self.op_of(tensor) < 0:
                    self.leaf(tensor)
            call.start = len(self.ops)
        call.inputs = self._ports(args)
        self._stack.append(call.index)

    def leave(self, module: nn.Module, output: Any) -> None:
        """End it, and what did not end inside it."""
        while self._stack:
            call = self.calls[self._stack.pop()]
            call.stop = len(self.ops)
            if call.module is module:
                call.outputs = self._ports(output)
                return

    def _ports(self, tree: Any) -> list[Port]:
        return [
            Port(self.op_of(tensor), tuple(tensor.shape), index)
            for index, tensor in enumerate(stream_tensors(tree))
            if tensor.dtype.is_floating_point
        ]

    def _sum(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sum | None:
        left, *right = operands = summed(name, args)
        if not all(isinstance(t, Tensor) and t.dtype.is_floating_point for t in operands):
            return None
        ops = [self.op_of(t) for t in operands]
        if ops[0] < 0 or all(op < 0 for op in ops[1:]):
            return None
        alpha = kwargs.get("alpha", kwargs.get(_FUSED.get(name, ""), 1.0))
        scales = float(kwargs.get("beta", 1.0)), float(-alpha if name == "sub" else alpha)
        shape = tuple(right[0].shape) if len(right) == 1 else tuple(left.shape)
        if name == "lerp":
            weight = None if self._varies(args[2]) else _number(args[2])
            if weight is None or weight == 1 or not math.isfinite(weight):
                return None
            scales = 1 - weight, weight
        if name in _SCATTERED:
            # An operation of its own: even the stream itself, scattered, is no identity.
            varying = self.ops[ops[1]].varying
            call = self._stack[-1] if self._stack else -1
            shape = tuple(left.shape)
            self.ops.append(Op("scatter", (ops[1],), call, True, shape, varying))
            ops[1] = len(self.ops) - 1
        return Sum(ops[0], tuple(o for o in ops[1:] if o >= 0), scales, (tuple(left.shape), shape))

    def _varies(self, value: Any) -> bool:
        op = self.op_of(value) if isinstance(value, Tensor) else -1
        return op >= 0 and self.ops[op].varying


def record_tape(
    model: nn.Module, inputs: Any, modules: Sequence[nn.Module], tape: Tape | None = None
) -> Tape:
    """Run the model once, without a trace in it, and record it.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor, tuple or dict
    modules : sequence of nn.Module
        Whose calls to record.
    tape : Tape, optional
        An empty one to record on.

    Raises
    ------
    BlockSelectionError
        If the model is compiled to TorchScript.
    """
    if isinstance(unwrapped(model), torch.jit.ScriptModule):
        msg = (
            f"The model is compiled to TorchScript ({type(unwrapped(model)).__name__}): its "
            f"modules cannot be watched. Pass the Python module that it was made of."
        )
        raise BlockSelectionError(msg)
    tape = Tape() if tape is None else tape
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            # Next to forward itself: what a user's hooks do belongs to the caller.
            before = module.register_forward_pre_hook(
                lambda module, args, kwargs: tape.enter(module, (args, kwargs)), with_kwargs=True
            )
            stack.callback(before.remove)
            after = module.register_forward_hook(
                lambda module, _, output: tape.leave(module, output),
                prepend=True,
                always_call=True,  # a model may catch what its parts raise
            )
            stack.callback(after.remove)
        stack.callback(tape.release)
        run_quietly(model, inputs, tape)
    return tape


def summed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands of an addition: two, or three where the last two are multiplied."""
    if name in _SCATTERED:
        return args[0], args[3]
    return args[: 2 if name in ("add", "sub", "lerp") else 3]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the operands that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return _tensors(found)


def _storage(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's memory, ``None`` where it has no single one."""
    if tensor.layout != torch.strided:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None  # subclasses that wrap other tensors


def _place(tensor: Tensor) -> Any:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _mixes(namespace: str, name: str) -> bool:
    # What other libraries register may be anything: a fused layer, most likely.
    return namespace not in ("aten", "prim", "prims") or (
        name in _MIXING or name.startswith(_MIXING_STARTS) or "attention" in name
    )


def _scale(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]
) -> float | None:
    """Return the number that an operation multiplies its only varying operand by."""
    if name in _SAME:
        return 1.0 if len(operands) == 1 else None
    if name == "neg":
        return -1.0
    if name in ("mul", "div") and len(args) == 2 and not kwargs:
        factor = _number(args[1])
        if factor is None and name == "mul":
            factor = _number(args[0])
        if factor is not None and math.isfinite(factor) and factor != 0:
            return factor if name == "mul" else 1 / factor
    if name == "add" and len(operands) == 1 and len(args) == 2 and args[1] == 0:
        return 1.0  # sum() begins with a zero
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if (
        isinstance(value, Tensor)
        and value.numel() == 1
        and not (value.is_meta or value.is_complex())
    ):
        return float(value)
    return None
