"""Evaluate a user's model without leaving a trace in it, or in the global state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(frozen=True)
class RandomState:
    """The state of every global random generator, and of some others."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any
    others: tuple[tuple[torch.Generator, Tensor], ...]

    @classmethod
    def capture(cls, others: Iterable[torch.Generator] = ()) -> RandomState:
        """Read the states."""
        return cls(
            cpu=torch.get_rng_state(),
            cuda=tuple(g.get_state() for g in _cuda_generators()),
            numpy=np.random.get_state(),  # noqa: NPY002 -- the global state is what is guarded
            python=random.getstate(),
            others=tuple((g, g.get_state()) for g in others),
        )

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.cpu)
        for generator, state in zip(_cuda_generators(), self.cuda, strict=False):
            generator.set_state(state)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
        for generator, state in self.others:
            generator.set_state(state)

    def unchanged(self) -> bool:
        """Whether nothing drew from the global generators since."""
        now = RandomState.capture()
        return (
            torch.equal(self.cpu, now.cpu)
            and len(self.cuda) == len(now.cuda)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, now.cuda, strict=True))
            and self.numpy[2:] == now.numpy[2:]
            and bool(np.array_equal(self.numpy[1], now.numpy[1]))
            and self.python == now.python
        )

    def reseed(self) -> None:
        """Move every generator to a state that differs from this one."""
        seed = (torch.initial_seed() + 0x9E3779B97F4A7C15) % 2**63
        # torch.manual_seed would queue a seed for a CUDA that is not initialised yet.
        torch.default_generator.manual_seed(seed)
        for generator in (*_cuda_generators(), *(g for g, _ in self.others)):
            generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)


def _cuda_generators() -> tuple[torch.Generator, ...]:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return ()
    return tuple(torch.cuda.default_generators)


@contextlib.contextmanager
def isolated_randomness(others: Iterable[torch.Generator] = ()) -> Iterator[RandomState]:
    """Restore the random state of torch, NumPy and Python afterwards, also on failure."""
    state = RandomState.capture(others)
    try:
        yield state
    finally:
        state.restore()


class BufferGuard:
    """Give the modules copies of their buffers, and the originals back afterwards.

    The forward pass may change the copies as it likes, in place and by kernels that
    do not count versions, and what autograd saved of them stays valid, because
    nothing writes into them once the originals are back.

    Attributes
    ----------
    changed : set of int
        After the guard has ended: ids of the modules whose buffers the forward pass
        changed. Only filled with ``compare=True``, since it costs a host sync.
    """

    def __init__(self, modules: Sequence[nn.Module], *, compare: bool = False) -> None:
        self._modules = modules
        self._compare = compare
        self.changed: set[int] = set()

    def __enter__(self) -> BufferGuard:
        self._saved = [
            (module, name, buffer)
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._modes = [module.training for module in self._modules]
        copies = {id(b): b for _, _, b in self._saved}
        with torch.no_grad():
            copies = {key: b.detach().clone() for key, b in copies.items()}
        for module, name, buffer in self._saved:
            module._buffers[name] = copies[id(buffer)]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for module, name, buffer in self._saved:
            left = module._buffers.get(name)
            if left is not None and (left.shape != buffer.shape or left.dtype != buffer.dtype):
                # A cache that grew with the input: the module's own attributes describe the
                # new one, so the old one would break its next forward pass.
                continue
            if self._compare and (left is None or not torch.equal(left, buffer)):
                self.changed.add(id(module))
            module._buffers[name] = buffer
        for module, mode in zip(self._modules, self._modes, strict=True):
            if module.training != mode:
                module.training = mode
        del self._saved


_evaluations = 0


def evaluating() -> bool:
    """Whether an operator evaluates a model now: trackers must not take that for training."""
    return _evaluations > 0


@contextlib.contextmanager
def differentiable(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Switch to kernels that can be differentiated twice, with gradients on.

    Fused attention and cuDNN's recurrent layers have no second derivative; that of oneDNN's, on a
    CPU, takes 1.6 times as long as that of plain operations.
    """
    global _evaluations
    with contextlib.ExitStack() as stack:
        _evaluations += 1
        stack.callback(_end_evaluation)
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in modules):
            _disabled(torch.backends.cudnn, stack)
        elif device.type == "cpu" and _better_without_onednn(modules):
            _disabled(torch.backends.mkldnn, stack)
        yield


def _disabled(backend: Any, stack: contextlib.ExitStack) -> None:
    # Not by its flags(), which set (and warn of) what is not asked for here.
    stack.callback(setattr, backend, "enabled", backend.enabled)
    backend.enabled = False


def _better_without_onednn(modules: Sequence[nn.Module]) -> bool:
    """Whether layers are recurrent, and none would be slower: convolutions, half precision."""
    dtypes = {p.dtype for module in modules for p in module._parameters.values() if p is not None}
    return (
        any(isinstance(module, nn.RNNBase) for module in modules)
        and not any(isinstance(module, nn.modules.conv._ConvNd) for module in modules)
        and dtypes <= {torch.float32, torch.float64}
    )


def _end_evaluation() -> None:
    global _evaluations
    _evaluations -= 1


_fused_steps = 0


def _count_fused_steps(optimizer: Any, *_: Any) -> None:
    # Fused kernels (torch 2.13) write into parameters without counting a version.
    global _fused_steps
    _fused_steps += any(group.get("fused") for group in optimizer.param_groups)


register_optimizer_step_post_hook(_count_fused_steps)


def fingerprint(tensors: Iterable[Tensor], modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Return what changes when a parameter, buffer or mode changes, without reading the data."""
    marks: list[Any] = [_fused_steps]
    found: list[Tensor | None] = list(tensors)
    for module in modules:  # a loop without calls: this is done before every product
        marks.append(module.training)
        found.extend(module._parameters.values())
        if module._buffers:
            found.extend(module._buffers.values())
    for tensor in found:
        if tensor is not None:
            marks.append(-1 if tensor.is_inference() else tensor._version)
            marks.append(tensor.data_ptr())
    return tuple(marks)


class GraphTooLarge(Exception):
    """A graph holds more than it may."""


class SavedBytes:
    """Counts the bytes that a graph keeps for its backward passes, each storage once.

    Graphs built under it work, but save detached tensors: build them to throw away.

    Parameters
    ----------
    known : iterable of Tensor
        What is in memory anyway: parameters and data.
    limit : int, optional
        The most bytes.

    Raises
    ------
    GraphTooLarge
        Where the graph is built, as soon as it holds more.

    Attributes
    ----------
    total : int
        The bytes.
    eps : float
        Rounding unit of the coarsest floating dtype that the graph computes in.
    """

    def __init__(self, known: Iterable[Tensor], limit: int | None = None) -> None:
        self._limit = limit
        self._seen = {t.untyped_storage().data_ptr() for t in known}
        self.total = 0
        self.eps = 0.0
        # Returning the tensor itself would tie a node to its own output: a reference cycle.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, _same)

    def _count(self, tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.total += storage.nbytes()
                if self._limit is not None and self.total > self._limit:
                    raise GraphTooLarge
        return tensor.detach()

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)
        # The bound method would otherwise refer back to this object.
        del self._hooks


def _same(tensor: Tensor) -> Tensor:
    return tensor
