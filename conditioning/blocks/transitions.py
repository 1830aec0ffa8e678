"""The layers through which a residual stream changes its shape, and the one that begins it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from conditioning.blocks.measure import Measurement
from conditioning.blocks.structure import Node, Tree, structural_blocks, width_change

Wanted = Callable[[nn.Module], bool]


def transition_layers(
    model: nn.Module, inputs: Any, wanted: Wanted, *, stem: bool = True
) -> dict[str, nn.Module]:
    """Layers on skips that are no identities, bare layers between blocks, and those before them.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    inputs : Tensor, tuple or dict, or None
        Of one forward pass, which tells where the skips are. With ``None`` nothing is run: the
        layers on skips are then those that some of the repeated blocks have and others lack, and
        that lead from the width of the block's input to that of its output; where all blocks of a
        class have the same layers, those that lead there beside a chain of the others.
    wanted : callable
        Says of a module whether it is a layer in question.
    stem : bool
        Whether layers before the first block belong to them.

    Returns
    -------
    dict of str to nn.Module
        In the order of the model's modules. Empty if the model has no residual blocks, or no such
        layers.
    """
    tree = Tree(model)
    modules = (
        _by_structure(tree, wanted, stem=stem)
        if inputs is None
        else _by_running(Measurement(model, inputs, tree), wanted, stem=stem)
    )
    found = {module for module in modules if wanted(module)}
    return {node.name: node.inner for node in tree.nodes.values() if node.inner in found}


def why_none(model: nn.Module, inputs: Any) -> str:
    """Why :func:`transition_layers` found nothing, as a clause.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor, tuple or dict, or None
        As given there.
    """
    tree = Tree(model)
    if inputs is None:
        units = _units(tree)
        if not units:
            return "no composite module in it is repeated, as residual blocks are"
        kinds = ", ".join(dict.fromkeys(type(node.inner).__name__ for node in units))
        return (
            f"of its {len(units)} blocks ({kinds}) none has a layer that changes the width beside "
            f"the others, and no layer of the kinds asked for stands before or between them"
        )
    count = len(Measurement(model, inputs, tree).units)
    if not count:
        return "no residual block was seen when it ran"
    return (
        f"the skips of its {count} residual blocks are identities or hold no layer of the kinds "
        f"asked for, and none stands before or between them"
    )


def _by_running(measured: Measurement, wanted: Wanted, *, stem: bool) -> Iterator[nn.Module]:
    units, flow = measured.units, measured.flow
    if not units:
        return
    for unit in units:
        for residual in unit.residuals:
            yield from _modules(measured, residual.skip_path)
    inside = {unit.call.module for unit in units}
    # With several layers it is a block without a skip, as those of MobileNets that change shape.
    skipless: set[nn.Module] = set()
    for block in measured.blocks():
        if block.kind == "transition" and block.module not in inside:
            layers = [m for part in block.parts for m in part.modules() if wanted(m)]
            if len(layers) == 1:
                yield layers[0]
            else:
                skipless.update(layers)
    if stem:
        before = _modules(measured, flow.back(units[0].source.op, ()).met)
        yield from (module for module in before if module not in skipless)


def _modules(measured: Measurement, ops: Iterable[int]) -> Iterator[nn.Module]:
    """Modules in which features are mixed on a way."""
    flow = measured.flow
    for op in ops:
        call = flow.ops[op].call
        if flow.ops[op].mixing and call >= 0:
            yield flow.calls[call].module


def _units(tree: Tree) -> list[Node]:
    found = (tree.of(block.module) for block in structural_blocks(tree))
    return [node for node in found if node is not None and node.children]


def _by_structure(tree: Tree, wanted: Wanted, *, stem: bool) -> Iterator[nn.Module]:
    units = _units(tree)
    if not units:
        return
    layers = [(node, _relative(node, lambda m: wanted(m) or bool(_widths(m)))) for node in units]
    alike = Counter(type(node.inner) for node in units)
    having = Counter((type(node.inner), name) for node, inside in layers for name in inside)
    for node, inside in layers:
        kind = type(node.inner)
        rare = [m for name, m in inside.items() if having[kind, name] < alike[kind]]
        others = [m for m in inside.values() if m not in rare]
        yield from (module for module in rare if _bypasses(module, others))
        if all(count == alike[kind] for (one, _), count in having.items() if one is kind):
            yield from _beside_the_chain(list(inside.values()))
    inside_units = {inner for node in units for inner in node}
    nodes = list(tree.root)
    first, last = nodes.index(units[0]), nodes.index(units[-1])
    # What holds the first block comes before it, too, but is no layer.
    yield from (node.inner for node in nodes[:first] if stem)
    for node in nodes[first:last]:
        if node not in inside_units and width_change(node.inner):
            yield node.inner


def _bypasses(module: nn.Module, others: list[nn.Module]) -> bool:
    """Whether a layer changes the shape as all others of its block do together.

    What else some blocks have and others lack does not: squeeze and excitation, an expansion.
    """
    known = [widths for other in others if (widths := _widths(other))]
    if not known or not _widths(module):
        return True
    return _widths(module) == (known[0][0], known[-1][1]) and bool(width_change(module))


def _beside_the_chain(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The layer that changes the shape as a chain of all others does, if there is one.

    Of several the one with the smallest kernel: a convolution of a chain of two might be the other
    way as well.
    """
    known = [layer for layer in layers if _widths(layer)]
    found = []
    for layer in known:
        others = [other for other in known if other is not layer]
        if others and _is_chain(others) and _bypasses(layer, others):
            strides = math.prod(_stride(other) for other in others)
            if strides == _stride(layer):
                found.append((math.prod(getattr(layer, "kernel_size", ())), layer))
    least = min((taps for taps, _ in found), default=0)
    smallest = [layer for taps, layer in found if taps == least]
    if len(smallest) == 1:
        yield smallest[0]


def _is_chain(layers: list[nn.Module]) -> bool:
    widths = [found for layer in layers if (found := _widths(layer))]
    return all(one[1] == other[0] for one, other in itertools.pairwise(widths))


def _stride(layer: nn.Module) -> int:
    return max(getattr(layer, "stride", (1,)))


def _widths(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, module.out_channels
    return None


def _relative(node: Node, wanted: Wanted) -> dict[str, nn.Module]:
    """Layers of a block by their name in it."""
    prefix = len(node.name) + 1 if node.name else 0
    return {inner.name[prefix:]: inner.inner for inner in node if wanted(inner.inner)}
