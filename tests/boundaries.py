"""Gradients at the borders of blocks from ``torch.autograd.grad`` alone, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def first_tensor(tree: Any) -> Tensor:
    """The first floating-point tensor of an output, whatever holds it."""
    if isinstance(tree, Tensor):
        return tree
    values = tree.values() if isinstance(tree, dict) else tree
    return next(first_tensor(v) for v in values if isinstance(v, (Tensor, dict, tuple, list)))


def squares(outputs: Any) -> Tensor:
    """A loss that depends on every entry of the first output."""
    out = first_tensor(outputs)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)
    return (weights * out.square()).mean() + out.mean()


def _with_first(tree: Any, old: Tensor, new: Tensor) -> Any:
    if tree is old:
        return new
    if isinstance(tree, dict):
        return type(tree)({k: _with_first(v, old, new) for k, v in tree.items()})
    if isinstance(tree, (tuple, list)):
        items = [_with_first(v, old, new) for v in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


@dataclass
class Border:
    """One call of one block: the tensors themselves, and the norms of their gradients."""

    block: str
    entered: Tensor
    left: Tensor
    grad_in: float = 0.0
    grad_out: float = 0.0
    act_in: float = 0.0
    act_out: float = 0.0


def boundaries(
    model: nn.Module,
    inputs: Any,
    blocks: Any,
    loss: Callable[[Any], Tensor] = squares,
) -> list[Border]:
    """Norms at the borders of every call of every block, in the order of execution.

    What enters and leaves a block is replaced by a copy, so that no operation in place reaches
    the tensors that the gradients are taken by.
    """
    found: list[Border] = []
    open_calls: dict[int, list[Border]] = {}
    handles = []
    for index, block in enumerate(blocks):

        def enter(module: Any, args: Any, kwargs: Any, index: int = index, block: Any = block):
            first = first_tensor(args) if args else first_tensor(kwargs)
            border = Border(block.name, first, first)
            border.act_in = float(torch.linalg.vector_norm(first.detach()))
            found.append(border)
            open_calls.setdefault(index, []).append(border)
            copy = first.clone()
            return _with_first(args, first, copy), _with_first(kwargs, first, copy)

        def leave(module: Any, args: Any, output: Any, index: int = index):
            border = open_calls[index].pop()
            border.left = first_tensor(output)
            border.act_out = float(torch.linalg.vector_norm(border.left.detach()))
            return _with_first(output, border.left, border.left.clone())

        handles.append(block.module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.last.register_forward_hook(leave))
    value = loss(run(model, inputs))
    for handle in handles:
        handle.remove()
    wanted = [t for b in found for t in (b.entered, b.left) if t.requires_grad]
    unique = list({id(t): t for t in wanted}.values())
    gradients = torch.autograd.grad(value, unique, allow_unused=True)
    norms = {
        id(t): float(torch.linalg.vector_norm(g)) if g is not None else None
        for t, g in zip(unique, gradients, strict=True)
    }
    for border in found:
        border.grad_in, border.grad_out = (norms.get(id(t)) for t in (border.entered, border.left))
    return found
