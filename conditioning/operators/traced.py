"""A linear map written down as a list of tensor operations, with its constants evaluated once.

What is traced is the retained graph's own backward pass, below autograd, so it covers what that
covers: recurrent layers, batch statistics, tied weights, custom functions. Operations that do not
depend on the vector are carried out once and become constants.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from conditioning.memory import format_bytes

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default: (aten.addmm.default, aten.addmm_.default),
    aten.bmm.default: (aten.baddbmm.default, aten.baddbmm_.default),
}
_IN_PLACE = "a product changes tensors in place that it did not make"
_RESHAPES = (aten.view.default, aten._unsafe_view.default)

Run = Callable[[Tensor], Tensor]
Rows = Callable[[Tensor], Tensor]


class UntraceableError(RuntimeError):
    """Why a map cannot be written down."""


class LinearProgram:
    """A linear map as a graph of operations on constants and a vector.

    Parameters
    ----------
    graph : fx.Graph
        Its first placeholders are the constants, the last one is the vector.
    constants : list of Tensor
    """

    def __init__(self, graph: fx.Graph, constants: list[Tensor]) -> None:
        self.graph = graph
        self.constants = constants
        self._multiply = self.by(_executable(_with_fused_sums(graph)))

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply."""
        return self._multiply(vector)

    def by(self, run: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        """Return the map carried out by another form of the graph."""
        constants = self.constants

        def multiply(vector: Tensor) -> Tensor:
            with torch.no_grad():
                (result,) = run(*constants, vector)
            return cast("Tensor", result)

        return multiply

    def for_blocks(self, block: Tensor, budget: float) -> LinearProgram:
        """Trace the map for as many vectors at once as ``block`` has rows.

        Raises
        ------
        UntraceableError
            If its constants do not fit ``budget`` bytes.
        """
        flags = [False] * len(self.constants) + [True]

        def run(*arguments: Tensor) -> list[Tensor]:
            return _batched(self.graph, arguments, flags, len(block))

        traced = _recorded(run, [*self.constants, block], hold=False)
        return LinearProgram(*_folded(traced, self.constants, budget))

    def signature(self) -> tuple[Any, ...]:
        """Return what is equal in programs that differ in the values of their constants only."""
        layouts = [(tuple(c.shape), c.stride(), c.dtype, c.device) for c in self.constants]
        return str(self.graph), tuple(layouts)


def trace(multiply: Callable[[Tensor], Tensor], vector: Tensor, budget: float) -> LinearProgram:
    """Write a linear map down.

    Parameters
    ----------
    multiply : callable
        The map. What it does in Python happens now, once.
    vector : Tensor
        A vector to trace with.
    budget : float
        Bytes that constants may take beyond what the map itself holds.

    Raises
    ------
    UntraceableError
        If the map changes what it holds, or its constants do not fit.
    """
    traced = _recorded(lambda *arguments: [multiply(*arguments)], [vector])
    if _mutates(traced.graph):
        traced = _recorded(torch.func.functionalize(traced), [vector])
        if _mutates(traced.graph):
            raise UntraceableError(_IN_PLACE)
    _use_weight_gradients(traced.graph)
    return LinearProgram(*_folded(traced, [], budget))


def compiled(program: LinearProgram, vector: Tensor) -> Callable[..., Any]:
    """Compile a program; constants are arguments, so that another one of this form can use it."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    arguments = [*program.constants, vector]
    # In this process: workers would stay behind.
    with torch.no_grad(), config.patch(compile_threads=1):
        run: Any = compile_fx(_executable(_copied(program.graph)), arguments)
        run(*arguments)
    return cast("Callable[..., Any]", run)


def one_by_one(run: Run) -> Rows:
    """Multiply the rows of a block one after the other."""

    def rows(block: Tensor) -> Tensor:
        return run(block[0])[None] if len(block) == 1 else torch.stack([run(row) for row in block])

    return rows


def in_chunks(run: Run, rest: Rows, width: int) -> Rows:
    """Multiply in chunks of the traced width; what is left is filled up, or done otherwise."""

    def rows(block: Tensor) -> Tensor:
        results = []
        for chunk in block.split(width):
            count = len(chunk)
            if 2 * count < width:
                results.append(rest(chunk))
                continue
            if count < width:
                chunk = torch.cat([chunk, chunk.new_zeros(width - count, chunk.shape[1])])
            results.append(run(chunk)[:count])
        return results[0] if len(results) == 1 else torch.cat(results)

    return rows


def _executable(graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule(torch.nn.Module(), graph)


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


class _Recorder(TorchDispatchMode):
    """Writes down the operations that are carried out below autograd.

    ``make_fx`` does it as well, but describes every tensor to a compiler, which takes milliseconds
    per operation: 13 s against 2 s for a transformer of 8 layers.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here; and importing the compiler to say so takes half a second.
        return False

    def __init__(self, arguments: Sequence[Tensor], *, hold: bool = True) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._root = torch.nn.Module()
        self._nodes: dict[int, fx.Node] = {}
        # Tensors are told apart by id, as long as they live. They are held where autograd is at
        # work: what nothing else holds, it adds to in place.
        self._hold = hold
        self._alive: dict[int, Any] = {}
        for index, tensor in enumerate(arguments):
            self._is(tensor, self.graph.placeholder(f"argument_{index}"))
        self._moving = set(self._nodes.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the names are torch's
        result = func(*args, **(kwargs or {}))
        node = self.graph.call_function(
            func, fx.node.map_aggregate(args, self._node_of),
            fx.node.map_aggregate(kwargs or {}, self._node_of),
        )  # fmt: skip
        moves = not self._moving.isdisjoint(node.all_input_nodes)
        self._moving |= {node} if moves else set()
        if isinstance(result, Tensor):
            self._is(result, node)
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, index))
                    self._moving |= {item} if moves else set()
                    self._is(part, item)
        elif moves and result is not None:
            msg = f"{func} makes a number from the vector"
            raise UntraceableError(msg)
        return result

    def _is(self, tensor: Tensor, node: fx.Node) -> None:
        key = id(tensor)
        self._alive[key] = tensor if self._hold else weakref.ref(tensor, self._forget(key))
        self._nodes[key] = node
        node.meta["shape"] = tuple(tensor.shape), tensor.dtype

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(gone: Any) -> None:
            if self._alive.get(key) is gone:  # else another tensor has the place already
                del self._alive[key], self._nodes[key]

        return forget

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            name = f"held_{len(self._root._buffers)}"
            self._root.register_buffer(name, value.detach())
            self._is(value, self.graph.get_attr(name))
        return self._nodes[id(value)]

    def module(self, outputs: Sequence[Tensor]) -> fx.GraphModule:
        """Return what was written down, once its outputs are known."""
        self.graph.output([self._node_of(output) for output in outputs])
        return fx.GraphModule(self._root, self.graph)


def _recorded(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], *, hold: bool = True
) -> fx.GraphModule:
    """The operations that a function carries out, tensors that it holds as attributes."""
    with torch.no_grad():
        recorder = _Recorder(arguments, hold=hold)
        with recorder:
            outputs = function(*arguments)
        return recorder.module(outputs)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _mutates(graph: fx.Graph) -> bool:
    """Whether anything that depends on the vector is changed in place."""
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
    return any(_is_mutable(node) for node in moving)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _folded(
    traced: fx.GraphModule, leading: Sequence[Tensor], budget: float
) -> tuple[fx.Graph, list[Tensor]]:
    """Evaluate what does not depend on the vector, and pass it as arguments.

    The first placeholders stand for ``leading``: constants as well.
    """
    nodes = list(traced.graph.nodes)
    spare = iter(leading)
    values: dict[fx.Node, Any] = {}
    held = {_storage(t) for t in leading}
    kept = set(held)  # what belongs to the retained graph, or to the model
    extra = 0.0
    for node in nodes:
        if node.op == "placeholder":
            constant = next(spare, None)
            if constant is not None:
                values[node] = constant
        elif node.op == "get_attr":
            values[node] = getattr(traced, str(node.target))
            held.add(_storage(values[node]))
            kept.add(_storage(values[node]))
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            if _is_mutable(node) and _storage(values[node.args[0]]) in kept:
                raise UntraceableError(_IN_PLACE)
            value = values[node] = _at(node, values)
            if isinstance(value, Tensor) and _storage(value) not in held:
                held.add(_storage(value))
                extra += value.untyped_storage().nbytes()
                if extra > budget:
                    msg = f"its constants do not fit {format_bytes(budget)}"
                    raise UntraceableError(msg)
    graph = fx.Graph()
    constants: list[Tensor] = []
    places: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in values and any(user not in values for user in node.users):
            places[node] = graph.placeholder(f"constant_{len(constants)}")
            places[node].meta = dict(node.meta)
            # Tracing leaves requires_grad on saved parameters.
            constants.append(values[node].detach())
    for node in nodes:
        if node not in values:
            places[node] = graph.node_copy(node, places.__getitem__)
    graph.eliminate_dead_code()
    return graph, constants


def _batched(
    graph: fx.Graph, arguments: Sequence[Tensor], flags: Sequence[bool], width: int
) -> list[Tensor]:
    """Carry a graph out with a leading axis on the arguments that are flagged.

    Every operation goes through ``vmap`` but the matrix product: of a linear map's factors
    only one depends on the vector, and vmap would transpose, copy and transpose back.
    """
    values: dict[fx.Node, Any] = {}
    along: set[fx.Node] = set()
    given = zip(arguments, flags, strict=True)
    last = {source: node for node in graph.nodes for source in node.all_input_nodes}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node], flag = next(given)
            along |= {node} if flag else set()
        elif node.op == "output":
            return [
                values[n] if n in along else values[n].expand(width, *values[n].shape)
                for n in node.args[0]
            ]
        else:
            moving = [n for n in node.all_input_nodes if n in along]
            if moving:
                along.add(node)
                values[node] = _batched_node(node, moving, values, width)
            else:
                values[node] = _at(node, values)
            for source in node.all_input_nodes:
                if last[source] is node:
                    del values[source]
    raise AssertionError


def _at(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    arguments, keywords = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    # Products made in another way may come in another layout, which not every view allows.
    target = aten.reshape.default if node.target in _RESHAPES else node.target
    return target(*arguments, **keywords)  # type: ignore[operator]


def _batched_node(
    node: fx.Node, moving: list[fx.Node], values: dict[fx.Node, Any], width: int
) -> Any:
    if node.target is aten.mm.default and len(moving) == 1:
        left, right = (values[n] for n in node.args)  # type: ignore[index]
        if node.args[0] is not moving[0]:
            return torch.bmm(left.expand(width, *left.shape), right)
        if left.is_contiguous():
            return torch.mm(left.flatten(0, 1), right).unflatten(0, left.shape[:2])
        return torch.bmm(left, right.expand(width, *right.shape))
    if all(isinstance(values[n], tuple) for n in moving):  # an item of several outputs
        return _at(node, values)
    tensors: list[bool] = []

    def one(*parts: Any) -> Any:
        result = _at(node, values | dict(zip(moving, parts, strict=True)))
        if isinstance(result, Tensor):
            return result
        # Outputs that were not asked for are None, which vmap does not return.
        tensors[:] = [isinstance(part, Tensor) for part in result]
        return tuple(part for part in result if isinstance(part, Tensor))

    result = torch.vmap(one)(*(values[n] for n in moving))
    if not tensors:
        return result
    found: Iterator[Tensor] = iter(result)
    return tuple(next(found) if there else None for there in tensors)


def _use_weight_gradients(graph: fx.Graph) -> None:
    """Replace convolutions with whole images as kernels by the gradient of a kernel.

    Autograd's second derivative of a convolution convolves the inputs, channels for samples,
    with the slopes. The gradient of the kernel is the same sum, and libraries have it tuned:
    on a CPU 1.5 to 2.5 times as fast.
    """
    for node in list(graph.nodes):
        if node.target is not aten.convolution.default:
            continue
        inputs, slopes, bias, stride, padding, dilation, transposed, extra, groups = node.args
        sources = [_swapped(inputs), _swapped(slopes)]
        end = node
        while len(end.users) == 1 and _trims_the_end(next(iter(end.users))):
            end = next(iter(end.users))
        last = next(iter(end.users)) if len(end.users) == 1 else None
        if (
            None in sources
            or last is None
            or bias is not None
            or transposed
            or groups != 1
            or _swapped(last) is None
        ):
            continue
        with graph.inserting_before(last):
            # Only its shape matters.
            kernel = graph.call_function(
                aten.new_empty.default, (sources[1], list(last.meta["shape"][0]))
            )
            gradients = graph.call_function(
                aten.convolution_backward.default,
                (
                    sources[1], sources[0], kernel, None, dilation, padding, stride, False, extra,
                    1, [False, True, False],
                ),
            )  # fmt: skip
            replaced = graph.call_function(_item, (gradients, 1))
            replaced.meta = dict(last.meta)
        last.replace_all_uses_with(replaced)
    graph.eliminate_dead_code()


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _swapped(node: Any) -> fx.Node | None:
    """Return what a node swaps the first two axes of."""
    if isinstance(node, fx.Node) and node.target is aten.transpose.int:
        source, *axes = node.args
        if sorted(axes) == [0, 1]:  # type: ignore[type-var]
            return source  # type: ignore[return-value]
    return None


def _trims_the_end(node: fx.Node) -> bool:
    arguments: Any = node.args
    return bool(node.target is aten.slice.Tensor and arguments[1] >= 2 and arguments[2] == 0)


def _with_fused_sums(graph: fx.Graph) -> fx.Graph:
    """Return a copy in which products are added to what they would be added to afterwards.

    In place where nothing else reads it, so that the sum costs no pass over memory.
    """
    copied = _copied(graph)
    fresh = {
        node
        for node in copied.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and all(r.alias_info is None for r in node.target._schema.returns)
        and node.target not in (aten._unsafe_view.default, aten._reshape_alias.default)
    }
    for node in list(copied.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        for product, other in (node.args[::-1], node.args):
            if _fuse(copied, node, product, other, fresh):
                break
    for node in copied.nodes:
        if node.target in _RESHAPES:  # as in _at
            node.target = aten.reshape.default
    copied.eliminate_dead_code()
    return copied


def _shape(node: Any) -> Any:
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


def _fuse(graph: fx.Graph, node: fx.Node, product: Any, other: Any, fresh: set[fx.Node]) -> bool:
    shape = _shape(product)
    if shape is None or shape != _shape(other) or shape != _shape(node) or product is other:
        return False
    folded = product.target in _RESHAPES
    inner = product.args[0] if folded else product
    if inner.target not in _PRODUCTS or len(inner.users) > 1 or len(product.users) > 1:
        return False
    outside, inside = _PRODUCTS[inner.target]
    alone = other in fresh and len(other.users) == 1
    with graph.inserting_before(node):
        if folded:
            into = graph.call_function(aten.reshape.default, (other, list(_shape(inner)[0])))
            total = graph.call_function(inside if alone else outside, (into, *inner.args))
            total = graph.call_function(aten.reshape.default, (total, list(shape[0])))
        else:
            total = graph.call_function(inside if alone else outside, (other, *inner.args))
        total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    if alone or not folded:
        fresh.add(total)
    return True
