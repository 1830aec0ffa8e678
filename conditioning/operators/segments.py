"""Graphs that hold only what enters the parts of a model, for a memory that is short.

``torch.utils.checkpoint`` does not save memory here: the graph of a gradient holds what its first
backward pass computed again. A segment therefore hides both passes. It keeps its inputs and, for
the second derivative, what came back to its outputs; every product runs it again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.operators.batches import map_tensors, tensors_in
from conditioning.operators.graphs import custom_functions, nodes_behind, refuse_dead_ends
from conditioning.operators.guards import (
    BufferGuard,
    RandomState,
    differentiable,
    isolated_randomness,
)


class NotInSegments(Exception):
    """Why a model cannot be run again part by part."""


class _Run:
    """One call of a part of a model, which can be made again with the same result."""

    def __init__(
        self,
        function: Callable[..., Any],
        modules: list[nn.Module],
        parameters: list[Tensor],
        elsewhere: set[int],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        device: torch.device,
    ) -> None:
        self._function, self._modules, self._device = function, modules, device
        self._parameters = parameters
        self._elsewhere = elsewhere
        # What was not a tensor, with empty tensors in the place of the others.
        self._frame = map_tensors(lambda _: torch.empty(0), arguments)
        self._count = len(tensors_in(arguments))
        self._random = RandomState.capture()
        self._buffers = [
            (module, name, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._autocast = (
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
        )
        self.structure: Any = None
        self.custom: list[str] = []

    def again(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves in the place of what entered, then the parameters; and the outputs' tensors."""
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors[: self._count]]
        enabled, dtype = self._autocast
        with (
            differentiable(self._modules, self._device),
            isolated_randomness(),
            BufferGuard(self._modules),
            torch.autocast(self._device.type, dtype=dtype, enabled=enabled),
        ):
            self._random.restore()
            for module, name, buffer in self._buffers:
                module._buffers[name] = buffer.clone()
            # Copies, because a first layer that works in place may touch neither leaves nor data.
            copies = iter([t.clone() for t in leaves])
            args, kwargs = map_tensors(lambda _: next(copies), self._frame)
            result = self._function(*args, **kwargs)
        outputs = tensors_in(result)
        if self.structure is None:
            self.structure = map_tensors(lambda _: torch.empty(0), result)
            self.custom = custom_functions(outputs)
            self._refuse_others(outputs)
        return [*leaves, *self._parameters], outputs

    def _refuse_others(self, outputs: Sequence[Tensor]) -> None:
        for node in nodes_behind(outputs):
            # What leads out of this part: to another one, or to a parameter that is not its own.
            leaf = getattr(node, "variable", None)
            if isinstance(getattr(node, "run", None), _Run) or id(leaf) in self._elsewhere:
                msg = "a block uses tensors that depend on parameters and are none of its inputs"
                raise NotInSegments(msg)


def _live(tensors: Sequence[Tensor]) -> list[int]:
    return [i for i, t in enumerate(tensors) if t.requires_grad]


class _RunAgain(torch.autograd.Function):
    """Run a part of a model, and keep what entered."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, outputs = run.again(tensors)
        ctx.run, ctx.custom = run, run.custom
        ctx.save_for_backward(*tensors)
        results = tuple(o.detach() for o in outputs)
        fixed = [r for r, o in zip(results, outputs, strict=True) if not o.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        found = _PullAgain.apply(ctx.run, len(cotangents), *cotangents, *ctx.saved_tensors)
        return None, *found


class _PullAgain(torch.autograd.Function):
    """The backward pass of a part, itself run again where it is differentiated."""

    @staticmethod
    def forward(ctx: Any, run: _Run, count: int, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        leaves, outputs = run.again(tensors[count:])
        gradients: list[Tensor | None] = [None] * len(leaves)
        live, wanted = _live(outputs), _live(leaves)
        found = torch.autograd.grad(
            [outputs[i] for i in live],
            [leaves[i] for i in wanted],
            [tensors[i] for i in live],
            allow_unused=True,
        )
        for place, gradient in zip(wanted, found, strict=True):
            gradients[place] = gradient
        return tuple(gradients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        cotangents = [
            t.detach().requires_grad_(t.is_floating_point() or t.is_complex())
            for t in tensors[: ctx.count]
        ]
        leaves, outputs = ctx.run.again(tensors[ctx.count :])
        live, wanted = _live(outputs), _live(leaves)
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                [outputs[i] for i in live],
                [leaves[i] for i in wanted],
                [cotangents[i] for i in live],
                create_graph=True,
                allow_unused=True,
            )
        if ctx.run.custom:
            refuse_dead_ends(outputs, pulled)
        pairs = [
            (gradient, tangents[place])
            for place, gradient in zip(wanted, pulled, strict=True)
            if gradient is not None and gradient.requires_grad and tangents[place] is not None
        ]
        result: list[Tensor | None] = [None] * len(tensors)
        places = [*live, *(ctx.count + i for i in wanted)]
        sources = [*(cotangents[i] for i in live), *(leaves[i] for i in wanted)]
        if pairs:
            gradients, directions = zip(*pairs, strict=True)
            found = torch.autograd.grad(gradients, sources, directions, allow_unused=True)
            for place, value in zip(places, found, strict=True):
                result[place] = value
        return None, None, *result


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is, or has inside, a list of at least two modules with parts of their own."""
    return any(
        isinstance(part, (nn.Sequential, nn.ModuleList)) and sum(map(_has_parts, part)) >= 2
        for part in module.modules()
    )


def _pieces(chain: nn.Sequential) -> list[list[nn.Module]]:
    """Neighbours that go together: more of them the longer the chain.

    A cut keeps two tensors, one layer in between takes about two and one block about eight: with
    ``s`` of ``n`` together the sum is least at about the square root of ``n``, and at half of it.
    """
    step = max(1, round(len(chain) ** 0.5 / (2 if _holds_blocks(chain) else 1)))
    pieces: list[list[nn.Module]] = []
    for child in chain:
        if (
            pieces
            and len(pieces[-1]) < step
            and not any(map(_holds_blocks, (child, pieces[-1][0])))
        ):
            pieces[-1].append(child)
        else:
            pieces.append([child])
    return pieces


def _cuts(root: nn.Module) -> Iterator[nn.Module]:
    """Chains to be cut into pieces, and single parts, that together make up a model."""
    if type(root) is nn.Sequential:
        yield root
    for child in root.children():
        lone_chain = type(child) is nn.Sequential and type(root) is not nn.Sequential
        if lone_chain or _holds_blocks(child) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _cuts(child)
        elif type(root) is not nn.Sequential and _has_parts(child):
            yield child


@contextlib.contextmanager
def segmented(
    roots: Sequence[nn.Module], parameters: Sequence[Tensor], device: torch.device
) -> Iterator[None]:
    """Let the parts of models keep no more than their inputs.

    Parameters
    ----------
    roots : sequence of Module
        Models; what they do outside of their parts is kept as ever.
    parameters : sequence of Tensor
        What is differentiated by.
    device : torch.device

    Raises
    ------
    NotInSegments
        If there is no part worth running again; or, where the model runs, if a part uses a tensor
        with a graph that is none of its inputs.
    """
    cuts = dict.fromkeys(cut for root in roots for cut in _cuts(root))
    if not cuts:
        msg = "it has no blocks"
        raise NotInSegments(msg)
    wanted = {id(p) for p in parameters}

    def part(modules: list[nn.Module], function: Callable[..., Any]) -> Callable[..., Any]:
        inside = [m for module in modules for m in module.modules()]
        here = [p for m in inside for p in m._parameters.values() if p is not None]
        own: list[Tensor] = list({id(p): p for p in here if id(p) in wanted}.values())
        mine = {id(p) for p in own}

        def forward(*args: Any, **kwargs: Any) -> Any:
            entered = [*tensors_in((args, kwargs)), *own]
            if not any(t.requires_grad for t in entered):
                return function(*args, **kwargs)
            run = _Run(function, inside, own, wanted - mine, (args, kwargs), device)
            outputs = iter(_RunAgain.apply(run, *entered))
            return map_tensors(lambda _: next(outputs), run.structure)

        return forward

    def chained(functions: list[Callable[..., Any]]) -> Callable[[Any], Any]:
        return lambda value: functools.reduce(lambda x, function: function(x), functions, value)

    with contextlib.ExitStack() as stack:
        for module in cuts:
            if type(module) is nn.Sequential:
                pieces = _pieces(module)
                apart = [
                    len(p) > 1 or (_has_parts(p[0]) and not _holds_blocks(p[0])) for p in pieces
                ]
                replacement = chained(
                    [
                        part(piece, chained(list(piece))) if cut else piece[0]
                        for piece, cut in zip(pieces, apart, strict=True)
                    ]
                )
            else:
                replacement = part([module], module.forward)
            before = module.__dict__.get("forward")
            module.__dict__["forward"] = replacement
            if before is None:
                stack.callback(module.__dict__.pop, "forward")
            else:
                stack.callback(module.__dict__.__setitem__, "forward", before)
        yield
