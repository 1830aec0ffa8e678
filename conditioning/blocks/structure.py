"""Blocks by the modules' nesting alone: nothing is run, so no kind of skip is claimed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from conditioning.blocks.block import Block
from conditioning.blocks.wrappers import unwrapped, walk

# Layers beside the blocks that a stage may have: a normalisation and a convolution, say.
_BESIDE = 2
# So many attributes of one class are blocks; two may be the towers of a network that compares.
_ATTRIBUTES = 3


@dataclass(eq=False)
class Node:
    """A module in the tree of a model.

    Attributes
    ----------
    name : str
    called : nn.Module
        The module as the model calls it, wrappers included.
    inner : nn.Module
        What is inside the wrappers.
    children : dict of str to Node
    """

    name: str
    called: nn.Module
    inner: nn.Module
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def is_chain(self) -> bool:
        """Whether the children run one after the other, and nothing else happens."""
        return isinstance(self.inner, nn.Sequential) and (
            type(self.inner).forward is nn.Sequential.forward
        )

    @property
    def is_container(self) -> bool:
        """Whether the module only holds others."""
        return self.is_chain or isinstance(self.inner, (nn.ModuleList, nn.ModuleDict))

    def __iter__(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child


class Tree:
    """The modules of a model by name, looked at through wrappers."""

    def __init__(self, model: nn.Module) -> None:
        self.nodes: dict[str, Node] = {}
        self.by_module: dict[nn.Module, Node] = {}
        for name, called, inner in walk(model):
            node = Node(name, called, inner)
            self.nodes[name] = node
            self.by_module[inner] = node
            if name:
                parent, _, key = name.rpartition(".")
                self.nodes[parent].children[key] = node

    @property
    def root(self) -> Node:
        """The model."""
        return self.nodes[""]

    def of(self, module: nn.Module) -> Node | None:
        """The node of a module or of its wrapper, if it is part of the model."""
        return self.by_module.get(unwrapped(module))

    def parent(self, node: Node) -> Node:
        """What holds a module; the model holds itself."""
        return self.nodes[node.name.rpartition(".")[0]]

    def block(self, node: Node, **known: object) -> Block:
        """A block that is one module."""
        return Block(node.name, node.called, node.called, **known)  # type: ignore[arg-type]

    def run(self, parent: Node, first: str, last: str) -> Block:
        """A block that is a run of children of a chain."""
        keys = list(parent.children)
        inside = keys[keys.index(first) : keys.index(last) + 1]
        if len(inside) == 1:
            return self.block(parent.children[first])
        if len(inside) == len(keys) and parent.name:
            return self.block(parent)
        name = f"{parent.name}.{first}-{last}" if parent.name else f"{first}-{last}"
        parts = tuple(parent.children[key].called for key in inside)
        return Block(name, parts[0], parts[-1], parts=parts)


def has_weights(module: nn.Module) -> bool:
    """Whether a module mixes features by something it learns: a matrix, a kernel, a table."""
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _weight_layers(node: Node) -> int:
    if _owns_weights(node):
        return 1
    return sum(_weight_layers(child) for child in node.children.values())


def structural_blocks(tree: Tree) -> list[Block]:
    """Repeated composite modules in containers, or else the layers of a plain stack."""
    units = _repeated(tree)
    if not units:
        return layer_runs(tree)
    return [*_with_bare_layers(tree, units)]


def _repeated(tree: Tree) -> list[Node]:
    """Composite modules whose class is repeated, at the level that is the block."""
    listed: list[Node] = []
    named: list[Node] = []
    for node in tree.root:
        children = [
            child
            for child in node.children.values()
            if not child.is_container and child.children and has_weights(child.inner)
        ]
        if node.is_container:
            listed.extend(children)
        else:
            counts = Counter(type(child.inner) for child in children)
            named.extend(c for c in children if counts[type(c.inner)] >= _ATTRIBUTES)
    # A convolution with its normalisation is a class of its own in many libraries.
    for items, layers in ((listed, 2), (named, 2), (listed, 1), (named, 1)):
        large = [node for node in items if _weight_layers(node) >= layers]
        counts = Counter(type(node.inner) for node in large)
        found = _blocks_among(large, {kind for kind, count in counts.items() if count >= 2})
        if found:
            classes = {type(node.inner) for node in found}
            inside = {inner for node in found for inner in node if inner is not node}
            holds = {outer for outer in tree.root if any(node in found for node in outer)}
            # The same class outside of any container: the middle of a U-Net.
            return [
                node
                for node in tree.root
                if node in found
                or (type(node.inner) in classes and node not in inside and node not in holds)
            ]
    # One block in a list: a model of depth one, or a block that is called again and again.
    single = [node for node in listed if not tree.parent(node).is_chain]
    return _blocks_among(single, {type(node.inner) for node in single})


def _blocks_among(items: list[Node], classes: set[type]) -> list[Node]:
    """Of nested items of repeated classes those that are blocks, neither stages nor parts."""
    found = [node for node in items if type(node.inner) in classes]
    for node in list(found):
        inside = [other for other in node if other in found and other is not node]
        if node not in found:
            continue
        if inside and _is_stage(node, classes):
            found.remove(node)
        else:
            found = [other for other in found if other not in inside]
    return found


def _is_stage(node: Node, classes: set[type]) -> bool:
    """Whether a module is little more than a chain or list of modules of one repeated class."""
    for holder in node:
        if holder is node or not holder.is_container:
            continue
        items = [child for child in holder.children.values() if has_weights(child.inner)]
        kinds = {type(child.inner) for child in items}
        if len(kinds) == 1 and kinds <= classes:
            beside = _weight_layers(node) - _weight_layers(holder)
            if beside <= _BESIDE:
                return True
    return False


def _with_bare_layers(tree: Tree, units: list[Node]) -> Iterator[Block]:
    """Blocks, and the single layers that stand beside them in a chain and change the width."""
    places = [place for place, node in enumerate(tree.root) if node in units]
    for place, node in enumerate(tree.root):
        if node in units:
            yield tree.block(node)
            continue
        if not places[0] < place < places[-1]:
            continue  # a stem or a head
        parent = tree.parent(node)
        if node is not parent and _between(node, parent, units):
            yield tree.block(node)
            continue
        if parent.is_chain and node is not parent and any(c in units for c in parent):
            change = width_change(node.inner)
            if change:
                yield tree.block(node, kind="transition", note=f"bare layer, {change}")


def _between(node: Node, parent: Node, units: list[Node]) -> bool:
    """Whether a composite module stands between units of one chain: what it does counts too."""
    if not parent.is_chain or not node.children or not has_weights(node.inner):
        return False
    siblings = list(parent.children.values())
    place = siblings.index(node)
    return (
        not any(inner in units for inner in node)
        and any(other in units for other in siblings[:place])
        and any(other in units for other in siblings[place + 1 :])
    )


def width_change(module: nn.Module) -> str:
    """How a single layer changes the shape for certain, empty where it may not."""
    inner = unwrapped(module)
    if isinstance(inner, nn.Linear):
        before, after, what, stride = inner.in_features, inner.out_features, "features", 1
    elif isinstance(inner, nn.modules.conv._ConvNd):
        before, after, what = inner.in_channels, inner.out_channels, "channels"
        stride = max(inner.stride)
    else:
        return ""
    changes = [f"{before} -> {after} {what}"] if before != after else []
    return ", ".join([*changes, f"stride {stride}"] if stride > 1 else changes)


def layer_runs(tree: Tree) -> list[Block]:
    """Layers with weights; in a chain with what follows them up to the next, in a list the items.

    Tables are none: what goes in cannot be differentiated by.
    """
    items = {
        child
        for node in tree.root
        if isinstance(node.inner, (nn.ModuleList, nn.ModuleDict))
        for child in node.children.values()
        if _is_layer(child) and not _splits(child)
    }
    # An item that holds items is a stage.
    items = {node for node in items if not any(n in items for n in node if n is not node)}

    def visit(node: Node) -> Iterator[Block]:
        if node in items or (_is_layer(node) and _owns_weights(node)):
            yield tree.block(node)
            return
        if node.is_chain:
            yield from _runs_of(tree, node)
        for child in node.children.values():
            # What a chain does not split is part of one of its runs.
            if not node.is_chain or _splits(child):
                yield from visit(child)

    return list(visit(tree.root))


def _is_layer(node: Node) -> bool:
    table = isinstance(node.inner, (nn.Embedding, nn.EmbeddingBag))
    return has_weights(node.inner) and not table


def _owns_weights(node: Node) -> bool:
    return any(p is not None and p.ndim >= 2 for p in node.inner._parameters.values()) or (
        # A reparametrised weight belongs to a child of this name.
        "parametrizations" in node.children
    )


def _splits(node: Node) -> bool:
    """Whether a part of a chain is itself a chain (or list) of several layers."""
    return node.is_container and _weight_layers(node) > 1


def _runs_of(tree: Tree, chain: Node) -> Iterator[Block]:
    keys = list(chain.children)
    starts = [
        i
        for i, child in enumerate(chain.children.values())
        if _is_layer(child) and not _splits(child)
    ]
    breaks = {i for i, child in enumerate(chain.children.values()) if _splits(child)}
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else len(keys)
        stop = min([stop, *(b for b in breaks if b > start)])
        yield tree.run(chain, keys[start], keys[stop - 1])
