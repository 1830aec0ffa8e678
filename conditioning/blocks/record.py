"""One forward pass that leaves no trace, and what goes in and out of blocks in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from conditioning.blocks.block import Block
from conditioning.blocks.wrappers import inner_of, uncompiled
from conditioning.errors import BatchFormatError, BlockSelectionError
from conditioning.operators.batches import call_with, map_tensors, tensors_in
from conditioning.operators.guards import BufferGuard, isolated_randomness


@dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of a block within a forward pass.

    Attributes
    ----------
    block : Block
    args : tuple
    kwargs : dict
        What the block was called with.
    output : object
        What it returned. Tensors here and in ``args`` and ``kwargs`` are detached copies from
        before anything changed them in place, in the same order and containers. A tensor that
        is passed twice has one copy: ``attention(x, x, x)`` stays such a call.
    call : int
        How many times the block had been called before in this pass.
    """

    block: Block
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    call: int


def record_calls(model: nn.Module, inputs: Any, blocks: Iterable[Block]) -> list[BlockCall]:
    """Run the model once and copy what each call of each block got and gave.

    Parameters
    ----------
    model : nn.Module
        Runs in the mode that it is in. Its buffers, random state and gradients stay as they are.
    inputs : Tensor, tuple or dict
        As :class:`JacobianOperator` takes them.
    blocks : iterable of Block

    Returns
    -------
    list of BlockCall
        In the order in which the calls ended. A block that did not run has none.
    """
    calls: list[BlockCall] = []
    counts: dict[Block, int] = {}
    open_calls: dict[Block, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def entered(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        open_calls.setdefault(block, []).append(copied((args, kwargs)))

    def left(block: Block, output: Any) -> None:
        # A run whose last child is also called from elsewhere leaves without having been entered.
        if open_calls.get(block):
            args, kwargs = open_calls[block].pop()
            count = counts.get(block, 0)
            counts[block] = count + 1
            calls.append(BlockCall(block, args, kwargs, copied(output), count))

    with contextlib.ExitStack() as stack:
        for block in blocks:
            # First among the hooks before, last among those after: what the caller gives and gets.
            before = block.module.register_forward_pre_hook(
                lambda _, args, kwargs, block=block: entered(block, args, kwargs),
                prepend=True,
                with_kwargs=True,
            )
            stack.callback(before.remove)
            after = block.last.register_forward_hook(
                lambda _, __, output, block=block: left(block, output)
            )
            stack.callback(after.remove)
        run_quietly(model, inputs)
    return calls


def run_quietly(
    model: nn.Module, inputs: Any, around: contextlib.AbstractContextManager[Any] | None = None
) -> Any:
    """Run a model once on copies of the inputs, without gradients and without a trace.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor, tuple or dict
    around : context manager, optional
        Entered around the forward pass only.
    """
    refuse_lazy(model)
    if isinstance(inputs, (str, bytes, int, float, np.ndarray, nn.Module, DataLoader)):
        msg = (
            f"inputs is a {type(inputs).__name__}, expected one batch as the model takes it: a "
            f"tensor, a tuple of positional arguments, or a dict of keywords."
        )
        raise BatchFormatError(msg)
    called = model
    # Data parallelism would copy the model, or talk to other processes; sharding has to be called.
    while (found := inner_of(called)) is not None and found[0] in ("module", "_orig_mod"):
        called = found[1]
    with quiet(model):
        # A first layer that works in place would change the caller's inputs.
        copies = copied(inputs)
        with around or contextlib.nullcontext():
            return call_with(called, copies)


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Forward passes under this leave no trace in the model or in the global state."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(isolated_randomness())
        stack.enter_context(BufferGuard(list(model.modules())))
        stack.enter_context(uncompiled(model))
        # Autocast would keep the weights that it casts here, without their graph, for a training
        # step in the same context.
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        # The fused encoder layer calls none of the modules inside it.
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(warnings.catch_warnings())
        # Reentrant checkpointing says that there is nothing to differentiate: so it is meant.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        yield


def refuse_lazy(model: nn.Module) -> None:
    """Raise if a parameter has no shape yet: running the model would create it."""
    for name, module in model.named_modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            msg = (
                f"{name or 'The model'} ({type(module).__name__}) is not initialised yet. Run the "
                f"model once on a batch first."
            )
            raise BlockSelectionError(msg)


def copied(tree: Any) -> Any:
    """Nested containers with a detached copy of each tensor, one for all places where it is."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        return copies[id(tensor)]

    return map_tensors(copy, tree)


def stream_tensors(tree: Any) -> list[Tensor]:
    """Tensors that can be a residual stream, in order: floating point or complex."""
    return [t for t in tensors_in(tree) if t.dtype.is_floating_point or t.dtype.is_complex]
