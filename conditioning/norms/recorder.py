"""The hooks: what happens at the borders of blocks, forward and backward.

A forward hook registers a tensor hook on what enters and what leaves a block. Module backward
hooks are not used: they break when the output of a block is changed in place.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from conditioning.blocks import Block
from conditioning.distributed import inside_ddp
from conditioning.errors import BlockNotSeenWarning
from conditioning.norms.readings import Port, Wanted, is_real_tensor, read
from conditioning.operators.batches import tensors_in
from conditioning.operators.guards import evaluating

_MANY_PASSES = 1000

# "unrecorded": run without gradients inside a pass that has them, as reentrant checkpointing does
# before it runs the same block again, "recomputed", during the backward pass.
Mode = Literal["recorded", "unrecorded", "recomputed"]


@dataclass(slots=True, eq=False)
class Slot:
    """One call of one block."""

    block: int
    order: int
    pass_id: int
    mode: Mode
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    differentiable: bool = True
    finished: bool = False
    #: The backward pass that it ran in, for blocks that are recomputed; else -1.
    inside: int = -1
    #: What it returned, where that held no tensor.
    returned: str = ""


def _uncompiled(function: Callable[..., None]) -> Callable[..., None]:
    """Its bookkeeping cannot be traced: under ``torch.compile`` the graph is cut there.

    Called where a hook is made, not as a decorator, because it imports the compiler.
    """
    reason = (
        "GradientNorms cuts the compiled graph at the borders of blocks, so fullgraph=True is not "
        "possible while it is attached"
    )
    try:
        wrapped: Callable[..., None] = torch.compiler.disable(function, reason=reason)
    except TypeError:  # an older torch, which takes no reason
        wrapped = torch.compiler.disable(function)
    return wrapped


class _Hook:
    """A hook that does not travel: copies and pickles of the module get one that does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = _uncompiled(function)

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert()

    def __copy__(self) -> Callable[..., None]:
        return _inert()

    def __reduce__(self) -> tuple[Any, ...]:
        # A bound method of the standard library that takes anything and returns None: whoever
        # loads the module need not have this package.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _inert() -> Callable[..., None]:
    return contextlib.nullcontext().__exit__


def _backward_number() -> int:
    """The number of the backward pass that this thread is in, or -1."""
    return int(torch._C._current_graph_task_id())


class Recorder:
    """Collects slots while it listens.

    Parameters
    ----------
    blocks : sequence of Block
    ancestors : sequence of Module
        Modules that contain all blocks: a call of one of them begins a new forward pass.
    wanted : Wanted
        What is kept of each tensor.
    activations : bool
        Whether activations are read.
    every_tensor : bool
        Whether all differentiable tensors count, or the first one only.
    scaler : GradScaler, optional
        Its scale is noted once for each backward pass.

    Attributes
    ----------
    slots : list of Slot
        Calls since the last ``clear()``.
    listening : bool
        Whether calls are recorded; the number of calls is counted in any case.
    seen : bool
        Whether any block ran with gradients on since the last ``clear()``.
    scales : dict of int to Tensor
        The loss scale of each backward pass.
    outer : dict of int to int
        Backward passes that run inside others, where checkpoints are nested.
    inside_ddp : bool
        Whether a pass ran inside the forward pass of a ``DistributedDataParallel``.
    shapes : dict of int to pair of shapes
        What entered and left a block when it was first called.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        ancestors: Sequence[nn.Module],
        wanted: Wanted,
        *,
        activations: bool,
        every_tensor: bool,
        scaler: Any,
    ) -> None:
        self._blocks, self._ancestors = blocks, ancestors
        self._wanted, self._activations, self._every = wanted, activations, every_tensor
        self._scaler = scaler
        self._handles: list[RemovableHandle] = []
        self._epoch = 0
        self.inside_ddp = False
        self.shapes: dict[int, tuple[torch.Size, torch.Size]] = {}
        self.listening = True
        self.paused = 0
        self.wide = False
        self.clear()

    # -- life -----------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks on the blocks."""
        for module in self._ancestors:
            begin, end = _Hook(self._begin_pass), _Hook(self._end_pass)
            self._handles.append(module.register_forward_pre_hook(begin))
            self._handles.append(module.register_forward_hook(end, always_call=True))
        for index, block in enumerate(self._blocks):
            enter = _Hook(functools.partial(self._enter, index))
            leave = _Hook(functools.partial(self._leave, index))
            self._handles.append(block.module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(block.last.register_forward_hook(leave))

    def detach(self) -> None:
        """Take the hooks away; gradients that are still on their way are not recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget all slots."""
        self._epoch += 1
        self.slots: list[Slot] = []
        self.seen = False
        self.scales: dict[int, Tensor] = {}
        self.outer: dict[int, int] = {}
        self._skipped: dict[int, list[int]] = {}
        self._ports: dict[int, tuple[weakref.ref[Tensor], int, Port]] = {}
        # A stack for each block: one that calls itself is open several times.
        self._open: dict[int, list[Slot]] = {}
        self._order = itertools.count()
        self._pass_id = 0
        self._pass_differentiated = False
        self._pass_pending = False
        self._pass_differentiable = True
        self._running: set[int] = set()

    @property
    def _active(self) -> bool:
        return not (self.paused or evaluating())

    # -- forward --------------------------------------------------------------------------------

    def _begin_pass(self, module: nn.Module, *_: Any) -> None:
        if not self._active or _backward_number() >= 0:
            return
        # A part that holds all blocks may be called several times by the model: one pass.
        if not self._running:
            self._pass_pending = True
            self._pass_differentiable = torch.is_grad_enabled()
        self._running.add(id(module))

    def _end_pass(self, module: nn.Module, *_: Any) -> None:
        if _backward_number() < 0:
            self._running.discard(id(module))

    def _enter(self, index: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._active:
            return
        number = _backward_number()
        if number >= 0:
            self._nest(index, number)
            # A checkpoint inside another one, which will run the block a third time.
            if not torch.is_grad_enabled():
                self._skipped.setdefault(index, []).append(number)
                return
        else:
            # Where no module that contains all blocks is called, a backward pass ends the pass.
            if self._pass_pending or (self._pass_differentiated and not self._running):
                self._begin_recording()
            if not self._pass_differentiable:
                return
        if torch.is_grad_enabled():
            self.seen = True
        if not self.listening:
            return
        mode: Mode = "recorded"
        if number >= 0:
            mode = "recomputed"
        elif not torch.is_grad_enabled():
            mode = "unrecorded"
        slot = Slot(index, next(self._order), self._pass_id, mode, inside=number)
        only = len(args) == 1 and not kwargs
        tree = args[0] if only else (args, kwargs)
        chosen = self._chosen(tree, self._blocks[index].input_index, index)
        if chosen and index not in self.shapes:
            self.shapes[index] = (chosen[0].shape, torch.Size())
        slot.inputs = [self._port(t, mode) for t in chosen]
        self.slots.append(slot)
        self._open.setdefault(index, []).append(slot)

    def _nest(self, index: int, number: int) -> None:
        """Note that a backward pass runs inside another: the block was passed over in that one."""
        skipped = self._skipped.get(index)
        if skipped and skipped[-1] < number:
            self.outer.setdefault(number, skipped.pop())

    def _begin_recording(self) -> None:
        """Begin a forward pass with its first block."""
        self._pass_pending = self._pass_differentiated = False
        self._pass_id += 1
        self._ports.clear()
        self._open.clear()
        self.inside_ddp |= inside_ddp()
        if self._pass_id == _MANY_PASSES and self.listening:
            warnings.warn(
                f"{_MANY_PASSES} forward passes were recorded and no optimizer has stepped, so "
                f"that all of them count as one step. Call norms.step() after each step of your "
                f"own, or norms.pause() around passes that are no training.",
                BlockNotSeenWarning,
                stacklevel=2,
            )

    def _leave(self, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        if not self._open.get(index) or not self._active:
            return
        slot = self._open[index].pop()
        chosen = self._chosen(output, self._blocks[index].output_index)
        slot.differentiable = any(t.requires_grad for t in chosen)
        slot.returned = "" if chosen else type(output).__name__
        slot.outputs = [self._port(t, slot.mode) for t in chosen]
        for port in slot.outputs:
            port.left.add(index)
        slot.finished = True
        if chosen and index in self.shapes and not self.shapes[index][1]:
            self.shapes[index] = (self.shapes[index][0], chosen[0].shape)

    def _chosen(self, tree: Any, stream: int | None, entering: int | None = None) -> list[Tensor]:
        """The stream: the tensor that was measured to be it, or the first that needs a gradient.

        Where a block takes its own output again, as recurrent cells do, it is that. All tensors
        where all count.
        """
        if isinstance(tree, Tensor):
            return [tree] if is_real_tensor(tree) and not _transformed(tree) else []
        found = [t for t in tensors_in(tree) if is_real_tensor(t)]
        if stream is not None and stream < len(found) and not self._every:
            found = [found[stream]]
        found = [t for t in found if not _transformed(t)]
        with_gradient = [t for t in found if t.requires_grad]
        chosen = with_gradient or found
        if self._every:
            return chosen
        if stream is None and entering is not None and len(chosen) > 1:
            for tensor in chosen:
                reference, _, port = self._ports.get(id(tensor), (None, 0, None))
                if reference and reference() is tensor and port and entering in port.left:
                    return [tensor]
        return chosen[:1]

    def _port(self, tensor: Tensor, mode: Mode) -> Port:
        version = -1 if tensor.is_inference() else tensor._version
        reference, known_version, port = self._ports.get(id(tensor), (None, 0, None))
        if port is None or reference is None or reference() is not tensor:
            port = None
        if port is None or known_version != version:
            port = Port()
            self._ports[id(tensor)] = (weakref.ref(tensor), version, port)
            if self._activations:
                with torch.no_grad():
                    port.activation = read(tensor, self._wanted, wide=self.wide)
        if mode != "unrecorded" and tensor.requires_grad and not port.hooked:
            port.hooked = True
            tensor.register_hook(self._gradient_hook(port))
            if tensor._base is not None and tensor._base.requires_grad:
                self._hook_base(port, tensor, tensor._base)
        return port

    # -- backward -------------------------------------------------------------------------------

    def _gradient_hook(self, port: Port) -> Callable[[Tensor], None]:
        epoch = self._epoch

        def on_gradient(gradient: Tensor | None) -> None:
            # A hook that returns something would replace the gradient. Of an output that takes no
            # part autograd may pass none.
            if gradient is None or self._epoch != epoch or not self._active:
                return
            if not _transformed(gradient):
                self._note(port, gradient)

        return _uncompiled(on_gradient)

    def _hook_base(self, port: Port, tensor: Tensor, base: Tensor) -> None:
        """Follow a view whose memory may be changed in place later.

        That takes the view's node out of the graph; its base keeps its own, which comes later in
        the backward pass, and the view's gradient is a part of the base's.
        """
        sizes, strides = base.size(), base.stride()
        reach = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
        if reach != base.numel():
            return
        epoch, known, reference = self._epoch, base._version, weakref.ref(base)
        place = (tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset())

        def on_gradient(gradient: Tensor | None) -> None:
            if gradient is None or self._epoch != epoch or not self._active:
                return
            if _transformed(gradient):
                return
            alive = reference()
            untouched = alive is not None and alive._version == known
            if untouched or any(n == _backward_number() for n, _ in port.gradients):
                return
            with torch.no_grad():
                whole = torch.empty_strided(
                    sizes, strides, dtype=gradient.dtype, device=gradient.device
                )
                part = whole.copy_(gradient).as_strided(*place)
            self._note(port, part)

        base.register_hook(_uncompiled(on_gradient))

    def _note(self, port: Port, gradient: Tensor) -> None:
        self._pass_differentiated = True
        number = _backward_number()
        repeat = 0
        while (number, repeat) in port.gradients:
            repeat += 1
        with torch.no_grad():
            port.gradients[number, repeat] = read(gradient, self._wanted, wide=self.wide)
            if self._scaler is not None and number not in self.scales:
                one = torch.ones((), device=gradient.device)
                self.scales[number] = self._scaler.scale(one)


def _transformed(tensor: Tensor) -> bool:
    """Whether it is a tracer of ``torch.func`` or a batch of vectors, not a tensor of numbers."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Call a method as long as its object is alive, without keeping it alive."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call
