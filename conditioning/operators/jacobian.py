"""The input-output Jacobian of a module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from conditioning.errors import (
    AsymmetricOperatorError,
    BatchFormatError,
    InvalidArgumentError,
    LossWithoutGraphError,
    MixedDevicesError,
    NonFiniteError,
    RandomForwardError,
)
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.operators.batches import call_with, map_tensors, tensors_in
from conditioning.operators.checks import (
    exact,
    norm,
    random_message,
    refuse_norms_in_training,
    translated_forward_errors,
)
from conditioning.operators.engines import Multiplier
from conditioning.operators.gauss_newton import JacobianGraph
from conditioning.operators.graphs import Parts
from conditioning.operators.guards import (
    BufferGuard,
    SavedBytes,
    differentiable,
    fingerprint,
    isolated_randomness,
)
from conditioning.operators.modules import find_modules, named_modules, random_modules
from conditioning.operators.parameters import FlatLayout


class _Forward:
    """A Jacobian as a graph whose product is ``J v``."""

    def __init__(self, graph: JacobianGraph) -> None:
        self._graph = graph

    def apply(self, tangents: list[Tensor], *, batched: bool) -> Parts:
        return self._graph.push(tangents, batched=batched)

    def size(self) -> int:
        return self._graph.size()


class _Adjoint(_Forward):
    """A Jacobian as a graph whose product is ``J^T u``."""

    def apply(self, tangents: list[Tensor], *, batched: bool) -> Parts:
        return self._graph.pull(tangents, batched=batched)


class JacobianOperator(LinearOperator):
    r"""The Jacobian :math:`\partial f(x) / \partial x` of a module's outputs by its inputs.

    Inputs and outputs are flattened with their batch axis, so the Jacobian of a batch of
    independent samples is block diagonal. ``J v`` and ``J^T u`` come from one retained
    graph; no forward-mode rule is needed.

    Parameters
    ----------
    module : nn.Module or callable
    inputs : Tensor, tuple or dict
        As :class:`HessianOperator` takes them: a tuple is passed as ``*args``, a dict as
        ``**kwargs``. Differentiated by all floating-point tensors in it, in order.
    wrt : int or iterable of int, optional
        Differentiate by these only, counted from 0 among the floating-point tensors of the inputs.
        The others are constants: masks, position embeddings, a second stream. The order is that
        of the inputs.
    outputs : int or iterable of int, optional
        Differentiate these only, counted likewise among the floating-point tensors of what the
        module returns.
    batch_statistics : bool
        Allow normalisation layers in training mode. The Jacobian is then that of the whole
        batch, whose samples their statistics couple; running statistics stay as they are. Off by
        default, because a model that was left in training mode by mistake looks the same.
    check : bool
        Evaluate twice, to see that the outputs are finite and do not depend on chance, and
        compare ``<u, J v>`` with ``<J^T u, v>``.

    Attributes
    ----------
    shape : tuple of int
        Elements of the differentiated outputs, elements of the inputs differentiated by.
    num_matvecs : int
        Products so far, with ``J`` or its transpose.

    Raises
    ------
    BatchFormatError
        If inputs or outputs hold no floating-point tensor.
    LossWithoutGraphError
        If the outputs do not depend on the inputs through autograd.
    InvalidArgumentError
        If ``wrt`` or ``outputs`` counts beyond what there is.
    ConditioningError
        As :class:`HessianOperator`.

    Examples
    --------
    >>> import torch
    >>> J = JacobianOperator(torch.sin, torch.zeros(2))
    >>> J.dense()
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(
        self,
        module: Callable[..., Any],
        inputs: Any,
        *,
        wrt: int | Iterable[int] | None = None,
        outputs: int | Iterable[int] | None = None,
        batch_statistics: bool = False,
        check: bool = True,
    ) -> None:
        self._module = module
        self._inputs = inputs
        self._owners = find_modules(module, exact=False)
        self._modules = [m for _, m in named_modules(self._owners)]
        floating = _floating(inputs)
        if not floating:
            msg = "The inputs hold no floating-point tensor to differentiate by."
            raise BatchFormatError(msg)
        self._wrt = _positions(wrt, "wrt", len(floating), "inputs")
        self._wanted_outputs = None if outputs is None else _listed(outputs, "outputs")
        wanted = [floating[i] for i in self._wrt]
        devices = {str(t.device) for t in wanted}
        if len(devices) > 1:
            msg = f"The inputs live on several devices: {', '.join(sorted(devices))}."
            raise MixedDevicesError(msg)
        self._domain = FlatLayout([f"input_{i}" for i in range(len(wanted))], wanted)
        self._engine, self._adjoint_engine = Multiplier(), Multiplier()
        with torch.inference_mode(mode=False), isolated_randomness() as state:
            buffers = BufferGuard(self._modules, compare=check)
            values, graph = self._build(buffers)
            drew = check and not state.unchanged()
            self._codomain = FlatLayout([f"output_{i}" for i in range(len(values))], values)
            super().__init__(
                (self._codomain.numel, self._domain.numel), self._domain.dtype, self._domain.device
            )
            self._graph: JacobianGraph | None = graph
            self._made_at = self._marks()
            if check:
                if not batch_statistics:
                    refuse_norms_in_training(self._owners, buffers.changed)
                state.reseed()
                self._check(values, drew=drew)

    def refresh(self) -> None:
        """Forget the graph, so that the next product evaluates the module anew."""
        self._graph = None

    @property
    def block_engine(self) -> str:
        """How blocks of vectors are multiplied, see :attr:`HessianOperator.block_engine`."""
        return self._engine.choice

    @block_engine.setter
    def block_engine(self, choice: str) -> None:
        for engine in (self._engine, self._adjoint_engine):
            engine.choose(choice)

    def _build(self, buffers: BufferGuard) -> tuple[list[Tensor], JacobianGraph]:
        leaves: list[Tensor] = []
        count = 0

        def leaf(tensor: Tensor) -> Tensor:
            nonlocal count
            if not tensor.dtype.is_floating_point:
                return tensor.clone() if tensor.is_inference() else tensor
            count += 1
            copy = tensor.detach().clone()
            if count - 1 not in self._wrt:
                return copy
            leaves.append(copy.requires_grad_())
            # A copy once more, because a first layer that works in place may not touch a leaf.
            return leaves[-1].clone()

        with differentiable(self._modules, self._domain.device), buffers:
            inputs = map_tensors(leaf, self._inputs)
            with translated_forward_errors(self._inputs, _parameters_of(self._modules)):
                outputs = _floating(call_with(self._module, inputs))
            if not outputs:
                msg = "The outputs hold no floating-point tensor."
                raise BatchFormatError(msg)
            if self._wanted_outputs is not None:
                places = _positions(self._wanted_outputs, "outputs", len(outputs), "outputs")
                outputs = [outputs[i] for i in places]
            graph = None
            if any(output.requires_grad for output in outputs):
                graph = JacobianGraph(outputs, leaves)
            # Outputs of trained parameters alone have a graph too.
            if graph is None or not any(graph.used):
                msg = (
                    "The outputs do not depend on the inputs through autograd. Look for "
                    ".detach(), .data, torch.no_grad() or integer operations on the way."
                )
                raise LossWithoutGraphError(msg)
            return outputs, graph

    def _check(self, first: list[Tensor], *, drew: bool) -> None:
        counter = SavedBytes(_parameters_of(self._modules))
        with counter:
            second, again = self._build(BufferGuard(self._modules))
        for engine in (self._engine, self._adjoint_engine):
            vector = max(self.shape) * self.dtype.itemsize
            engine.limit(counter.total, vector, available_bytes(self.device) // 4)
        eps = max(self._domain.eps, self._codomain.eps, counter.eps)
        flat, flat_again = self._codomain.join(first), self._codomain.join(second)
        generator = torch.Generator(device=self.device).manual_seed(0)
        u, v = (
            torch.randn(layout.numel, dtype=layout.dtype, device=self.device, generator=generator)
            for layout in (self._codomain, self._domain)
        )
        graph = self._current()
        pushed, pushed_again = (
            self._codomain.join(g.push(self._domain.split(v), batched=False))
            for g in (graph, again)
        )
        pulled = self._domain.join(graph.pull(self._codomain.split(u), batched=False))
        for what, values in (("outputs", flat), ("Jacobian", pushed), ("Jacobian", pulled)):
            if not bool(torch.isfinite(values).all()):
                msg = f"The {what} of the module at these inputs hold NaN or an infinity."
                raise NonFiniteError(msg)
        loose = 10 * eps**0.5
        names = random_modules(self._owners)
        wrong = [
            what
            for what, one, two in (
                ("outputs", flat, flat_again),
                ("product with a vector", pushed, pushed_again),
            )
            if norm(one - two) > (1e3 * eps if drew else loose) * norm(one)
        ]
        if wrong or (drew and names):
            raise RandomForwardError(random_message(names, wrong, drew=drew))
        left = float(torch.dot(exact(u), exact(pushed)))
        right = float(torch.dot(exact(pulled), exact(v)))
        if abs(left - right) > loose * (norm(pushed) + norm(pulled)):
            msg = (
                f"<u, J v> = {left:.9g} and <J^T u, v> = {right:.9g} differ by more than "
                f"rounding. Look for a custom autograd.Function whose backward is not linear, or "
                f"detaches, and for gradients changed by hooks."
            )
            raise AsymmetricOperatorError(msg)

    def _marks(self) -> tuple[Any, ...]:
        return fingerprint(tensors_in(self._inputs), self._modules)

    def _current(self) -> JacobianGraph:
        if self._graph is None or self._made_at != self._marks():
            with isolated_randomness():
                self._graph = self._build(BufferGuard(self._modules))[1]
            self._made_at = self._marks()
        return self._graph

    def _matmat(self, vectors: Tensor) -> Tensor:
        graph = _Forward(self._current())
        rows = self._engine.multiply(graph, self._domain, self._codomain, vectors.T.contiguous())
        return rows.to(self.dtype).T

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        graph = _Adjoint(self._current())
        rows = self._adjoint_engine.multiply(
            graph, self._codomain, self._domain, vectors.T.contiguous()
        )
        return rows.to(self.dtype).T


def _listed(positions: int | Iterable[int], name: str) -> list[int]:
    try:
        return [operator.index(positions)]  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        return [operator.index(position) for position in positions]  # type: ignore[union-attr]
    except TypeError:
        msg = f"{name} must be None, an int or an iterable of ints, got {positions!r}."
        raise InvalidArgumentError(msg) from None


def _positions(wanted: int | Iterable[int] | None, name: str, count: int, where: str) -> list[int]:
    """Positions of the wanted tensors among ``count``, ascending."""
    if wanted is None:
        return list(range(count))
    found = _listed(wanted, name)
    if not found or len(set(found)) < len(found) or not all(0 <= i < count for i in found):
        msg = (
            f"{name}={wanted!r} does not choose among the floating-point tensors of the {where}, "
            f"counted from 0 to {count - 1}, each at most once."
        )
        raise InvalidArgumentError(msg)
    return sorted(found)


def _floating(tree: Any) -> list[Tensor]:
    return [t for t in tensors_in(tree) if t.dtype.is_floating_point]


def _parameters_of(modules: list[torch.nn.Module]) -> list[Tensor]:
    return [p for module in modules for p in module._parameters.values() if p is not None]
