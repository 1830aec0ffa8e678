"""Which modules are meant: found by running the model, by structure, or named by the caller."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from conditioning.blocks.block import Block, Blocks
from conditioning.blocks.measure import Measurement
from conditioning.blocks.structure import Node, Tree, structural_blocks
from conditioning.errors import BlockSelectionError, InvalidArgumentError


def find_blocks(model: nn.Module, inputs: Any = None) -> Blocks:
    """Find the units of depth of a model: residual blocks, or the layers of a plain stack.

    With ``inputs`` the model runs once, and every addition in it is followed back to where
    its two operands part. A module is a residual block if its output can be reached from its
    input through such additions only; what stands between two of them and changes the shape
    is a transition. Several additions in one forward pass (attention and feed-forward) are one
    block, chains of blocks are none. Where nothing is residual, repeated composite modules are
    the blocks, or else the layers with weights; in ``nn.Sequential`` together with what follows
    them up to the next.

    Without ``inputs`` nothing is run: repeated composite modules or layers, of unknown kind.

    Parameters
    ----------
    model : nn.Module
        Runs in the mode that it is in, and is left bit by bit as it was, as is the random state.
        Data-parallel, compiled and checkpointing wrappers are looked through.
    inputs : Tensor, tuple or dict, optional
        As :class:`JacobianOperator` takes them: a tuple is passed as ``*args``, a dict as
        ``**kwargs``.

    Returns
    -------
    Blocks
        In the order in which they ran, or in that of their definition.

    Raises
    ------
    BlockSelectionError
        If no layer with weights runs, or the model has uninitialised parameters.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> print(find_blocks(model, torch.zeros(5, 3)))
    block  class        kind   input -> output  note
    0-1    Linear+ReLU  plain  5x3 -> 5x4       3 -> 4 features
    2      Linear       plain  5x4 -> 5x2       4 -> 2 features
    """
    _check(model)
    tree = Tree(model)
    found = structural_blocks(tree) if inputs is None else Measurement(model, inputs, tree).blocks()
    if not found:
        msg = (
            f"No block can be told in the {type(tree.root.inner).__name__}: nothing in it is "
            f"residual, and no layer that ran has weights. Name the blocks: "
            f"select_blocks(model, [...]), or blocks=[...]."
        )
        raise BlockSelectionError(msg)
    return Blocks(found)


def select_blocks(model: nn.Module, blocks: Any = None, inputs: Any = None) -> Blocks:
    """Return the blocks that the caller means.

    Parameters
    ----------
    model : nn.Module
    blocks : Blocks, Block, str, nn.Module or iterable of these, optional
        ``None``: what :func:`find_blocks` finds. A name is that of ``named_modules()`` (with or
        without what wrappers add to it), or of a run as ``parent.first-last``. In a glob ``*``
        stands for one part of a name and ``**`` for any number: ``"layer1.*"``. A ``ModuleList``
        stands for its items.
    inputs : Tensor, tuple or dict, optional
        To measure the kinds, and to order by execution instead of definition.

    Returns
    -------
    Blocks
        Each once. :class:`Blocks` as they are given.

    Raises
    ------
    BlockSelectionError
        If something matches nothing, or is not part of the model.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> select_blocks(model, ["0-1", "2"]).names
    ('0-1', '2')
    """
    _check(model)
    if isinstance(blocks, Tensor):
        msg = "blocks is a tensor: a sample batch is given as inputs=..."
        raise BlockSelectionError(msg)
    if blocks is None:
        return find_blocks(model, inputs)
    tree = Tree(model)
    chosen = list(_resolve(tree, blocks))
    for block in chosen:
        if any(tree.of(part) is None for part in block.parts):
            msg = f"The block {block.label!r} is not part of the {_class_of(tree)}."
            raise BlockSelectionError(msg)
    if not chosen:
        msg = "blocks is empty. Pass None to have them found, or names, globs or modules."
        raise BlockSelectionError(msg)
    if isinstance(blocks, Blocks):
        return blocks
    order = {node.inner: i for i, node in enumerate(tree.nodes.values())}
    unique = {block.parts: block for block in reversed(chosen)}.values()
    ordered = sorted(unique, key=lambda block: order[_node(tree, block.module).inner])
    if inputs is None:
        return Blocks(ordered)
    return Blocks(Measurement(model, inputs, tree).describe(ordered))


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        msg = f"model must be an nn.Module, got {type(model).__name__}."
        raise InvalidArgumentError(msg)


def _resolve(tree: Tree, blocks: Any) -> Iterator[Block]:
    if isinstance(blocks, Block):
        yield blocks
    elif isinstance(blocks, str):
        yield from _by_name(tree, blocks)
    elif isinstance(blocks, nn.Module):
        yield from _by_module(tree, blocks)
    elif isinstance(blocks, Iterable):
        for item in blocks:
            yield from _resolve(tree, item)
    else:
        msg = (
            f"blocks should be names, globs, modules or what find_blocks returns, not a "
            f"{type(blocks).__name__}."
        )
        raise BlockSelectionError(msg)


def _by_module(tree: Tree, module: nn.Module) -> Iterator[Block]:
    node = tree.of(module)
    if node is None:
        msg = f"A module of class {type(module).__name__} is not part of the {_class_of(tree)}."
        raise BlockSelectionError(msg)
    yield from _expanded(tree, node)


def _expanded(tree: Tree, node: Node) -> Iterator[Block]:
    """A module, or the items of a list: the list itself never runs."""
    if isinstance(node.inner, (nn.ModuleList, nn.ModuleDict)):
        for child in node.children.values():
            yield from _expanded(tree, child)
    else:
        yield tree.block(node)


def _by_name(tree: Tree, pattern: str) -> Iterator[Block]:
    names = _all_names(tree)
    if pattern in names:
        yield from _expanded(tree, names[pattern])
        return
    runs = list(_as_runs(names, pattern))
    if runs:
        yield from (tree.run(*run) for run in runs)
        return
    matching = {
        names[name].inner: names[name]
        for name in names
        if name and _matches(_parts(name), _parts(pattern))
    }
    if not matching:
        near = difflib.get_close_matches(pattern, [n for n in names if n], n=5, cutoff=0.5)
        msg = f"{pattern!r} matches nothing in the {_class_of(tree)}. " + (
            f"Near it: {', '.join(map(repr, near))}."
            if near
            else "model.named_modules() gives the names that there are."
        )
        raise BlockSelectionError(msg)
    for node in matching.values():
        yield from _expanded(tree, node)


def _all_names(tree: Tree) -> dict[str, Node]:
    """Names as the model without wrappers has them, then those with, and of shared modules."""
    names = dict(tree.nodes)
    for name, module in tree.root.called.named_modules(remove_duplicate=False):
        node = tree.of(module)
        if node is not None:
            names.setdefault(name, node)
    return names


def _as_runs(names: dict[str, Node], pattern: str) -> Iterator[tuple[Node, str, str]]:
    """Read ``parent.first-last``, where the parent may be a glob."""
    parent_pattern, _, keys = pattern.rpartition(".")
    dashes = [i for i, letter in enumerate(keys) if letter == "-"]
    for name, parent in names.items() if dashes else ():
        if not parent.is_chain or not _matches(_parts(name), _parts(parent_pattern)):
            continue
        children = list(parent.children)
        for i in dashes:
            first, last = keys[:i], keys[i + 1 :]
            if first in children and last in children[children.index(first) :]:
                yield parent, first, last


def _parts(name: str) -> list[str]:
    return name.split(".") if name else []


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a name fits a glob part by part, ``**`` standing for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def _node(tree: Tree, module: nn.Module) -> Node:
    node = tree.of(module)
    assert node is not None
    return node


def _class_of(tree: Tree) -> str:
    return type(tree.root.inner).__name__
