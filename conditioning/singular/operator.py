"""A layer as the matrix that it applies, known by its products: the layer as it really runs."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from conditioning.errors import (
    AsymmetricOperatorError,
    InvalidArgumentError,
    LossWithoutGraphError,
    NonFiniteError,
    RandomForwardError,
    ShapeError,
    UnsupportedLayerError,
    UnsupportedParameterError,
)
from conditioning.krylov import random_start
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.operators.checks import random_message, refuse_norms_in_training
from conditioning.operators.guards import SavedBytes, differentiable, isolated_randomness
from conditioning.operators.modules import random_modules, tracking_norms
from conditioning.singular.geometry import Geometry, geometry_of

T = TypeVar("T")
DTYPES = (torch.float64, torch.float32)


class LayerOperator(LinearOperator):
    r"""The linear part of a layer, from its input to its output, both flattened.

    Any affine module on which a batch can be put: a convolution with its own padding, stride and
    hooks, a low-rank adapter, a pooling layer, a sequence of such. Products run the forward pass of
    the layer on ``k`` vectors as a batch, less its response to zero; products with the transpose
    are the backward pass of the same.

    The weights are copied in the precision of the products. The layer itself is left as it was,
    with its gradients, buffers, hooks, mode and the random state; later changes of its weights do
    not show here.

    Parameters
    ----------
    layer : nn.Module
        Evaluated in the mode that it is in.
    input_shape : sequence of int
        Of one input, without the batch: ``(channels, height, width)``.
    dtype : torch.dtype
        float64 or float32.
    memory_budget : int, optional
        Bytes for the activations of one batch. Default: a quarter of what is free.

    Attributes
    ----------
    shape : tuple of int
        Elements of the output and of the input.
    input_shape, output_shape : tuple of int

    Raises
    ------
    UnsupportedLayerError
        If the module is not affine, couples the samples of a batch, or returns no single tensor.
    UnsupportedParameterError
        If a parameter is complex, integer, sparse, sharded, or has no data.
    NonFiniteError
        If a parameter or an output is not finite.
    ShapeError
        If the layer does not take such an input.
    RandomForwardError
        If the layer is in training mode, and random in it or normalising by the batch.
    LossWithoutGraphError, AsymmetricOperatorError
        If the backward pass is cut off, or not the transpose of the forward pass.

    Examples
    --------
    >>> import torch
    >>> pool = LayerOperator(torch.nn.AvgPool1d(2), (1, 4))
    >>> pool.dense()
    tensor([[0.5000, 0.5000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """

    def __init__(
        self,
        layer: nn.Module | FixedLayer,
        input_shape: Sequence[int],
        dtype: torch.dtype = torch.float64,
        memory_budget: int | None = None,
    ) -> None:
        fixed = layer if isinstance(layer, FixedLayer) else FixedLayer(layer, dtype)
        self._fixed = fixed
        self.input_shape = checked_shape(input_shape)
        response = fixed.respond(torch.zeros(1, *self.input_shape, **fixed.placement))
        self.output_shape = tuple(response.shape[1:])
        # A known layer without its bias responds with zero; to subtract that would cost digits.
        self._response = None if fixed.without_bias else response
        shape = (math.prod(self.output_shape), math.prod(self.input_shape))
        super().__init__(shape, fixed.dtype, fixed.device)
        budget = available_bytes(self.device) // 4 if memory_budget is None else memory_budget
        # Input, output, their gradients, and what the layer makes in between.
        self._batch = max(1, budget // (8 * sum(shape) * self.dtype.itemsize))
        self._graph: tuple[Tensor, Tensor] | None = None
        if fixed.geometry is None:
            self._check_affine()
            self._check_transpose()
            self.num_matvecs = 0

    def _dense_block(self) -> int:
        return min(self._batch, 64)

    def _matmat(self, vectors: Tensor) -> Tensor:
        products = [self._forward(part) for part in vectors.T.split(self._batch)]
        return torch.cat(products).T

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        products = [self._backward(part) for part in vectors.T.split(self._batch)]
        return torch.cat(products).T

    def _forward(self, rows: Tensor) -> Tensor:
        outputs = self._fixed.respond(rows.reshape(-1, *self.input_shape))
        if self._response is not None:
            outputs = outputs - self._response
        return outputs.reshape(len(rows), -1)

    def _backward(self, rows: Tensor) -> Tensor:
        with self._fixed.evaluation():
            if self._graph is None or len(self._graph[0]) != len(rows):
                self._graph = None  # two may not fit
                self._graph = self._fixed.trace(torch.zeros(len(rows), *self.input_shape))
            inputs, outputs = self._graph
            if not outputs.requires_grad:
                msg = (
                    "The output does not depend on the input through autograd. Look for "
                    ".detach(), .data, torch.no_grad() or integer operations on the way."
                )
                raise LossWithoutGraphError(msg)
            seeds = rows.reshape(outputs.shape).to(outputs.dtype)
            (gradient,) = torch.autograd.grad(outputs, inputs, seeds.clone(), retain_graph=True)
        return gradient.reshape(len(rows), -1)

    def _check_affine(self) -> None:
        """Refuse what is not affine, on random inputs of two sizes, or not sample by sample."""
        generator = torch.Generator().manual_seed(0)
        fixed = self._fixed
        owners = {"": fixed.layer}
        fault = ""
        for size in (1.0, 1e3):
            one, other = size * torch.randn(2, *self.input_shape, generator=generator).double()
            inputs = torch.stack([0 * one, one, other, 0.7 * one - 1.3 * other])
            with fixed.evaluation(), SavedBytes([]) as saved:
                outputs = fixed.trace(inputs)[1].detach()
            eps = max(saved.eps, torch.finfo(self.dtype).eps)
            if not bool(torch.isfinite(outputs).all()):
                msg = f"The output of the {fixed.name} on random inputs holds NaN or an infinity."
                raise NonFiniteError(msg)
            zero, left, right, both = outputs.to(torch.float64)
            bound = 1e3 * eps * float(torch.linalg.vector_norm(outputs.to(torch.float64)))
            rest = (both - zero) - 0.7 * (left - zero) + 1.3 * (right - zero)
            alone = fixed.respond(inputs[1:2])[0].to(torch.float64)
            if float(torch.linalg.vector_norm(alone - left)) > bound:
                fault = "the output for a sample depends on the other samples of the batch"
            elif float(torch.linalg.vector_norm(rest)) > bound:
                share = float(torch.linalg.vector_norm(rest) / torch.linalg.vector_norm(both))
                fault = f"a sum of inputs misses the sum of outputs by {share:.1g} of its size"
            if fault:
                break
        if not fault:
            return
        if names := random_modules(owners):
            raise RandomForwardError(random_message(names, ["output"], drew=True))
        refuse_norms_in_training(owners, {id(module) for _, module in tracking_norms(owners)})
        msg = (
            f"The {fixed.name} is not affine: {fault}. It has no matrix. For its Jacobian at a "
            f"given input use singular_range(JacobianOperator(module, inputs))."
        )
        raise UnsupportedLayerError(msg)

    def _check_transpose(self) -> None:
        """Refuse a backward pass that is not the transpose of the forward pass."""
        u, v = (random_start(n, 0, self.device).to(self.dtype) for n in self.shape)
        pushed, pulled = self.matvec(v), self.rmatvec(u)
        left, right = float(torch.dot(u, pushed)), float(torch.dot(pulled, v))
        if abs(left - right) > 1e-3 * float(pushed.norm() + pulled.norm()):
            msg = (
                f"The backward pass of the {self._fixed.name} is not the transpose of its forward "
                f"pass: <u, W v> = {left:.9g} and <W^T u, v> = {right:.9g}. Look for a custom "
                f"autograd.Function, .detach(), or hooks that change gradients."
            )
            raise AsymmetricOperatorError(msg)


class FixedLayer:
    """A layer with its weights at one moment, in the precision of the products.

    Attributes
    ----------
    layer : nn.Module
    geometry : Geometry or None
        Where the weight alone says what the layer computes.
    why_not : UnsupportedLayerError or None
        Why there is no geometry.
    without_bias : bool
        Whether zero is what it responds to zero with.
    device, dtype, name
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        if dtype not in DTYPES:
            msg = f"dtype must be torch.float64 or torch.float32, got {dtype}."
            raise InvalidArgumentError(msg)
        if not isinstance(layer, nn.Module):
            msg = (
                f"Expected a layer (nn.Module), got {type(layer).__name__}. For a matrix use "
                f"singular_range."
            )
            raise UnsupportedLayerError(msg)
        layer = getattr(layer, "_orig_mod", layer)  # what torch.compile wraps
        self.layer, self.dtype, self.name = layer, dtype, type(layer).__name__
        self._modules = list(layer.modules())
        self._host = _Host(layer)
        given = dict(layer.named_parameters(remove_duplicate=False))
        for name, parameter in given.items():
            _refuse_unusable(parameter, name, self.name)
        buffers = dict(layer.named_buffers(remove_duplicate=False))
        floating = [t for t in (*given.values(), *buffers.values()) if t.is_floating_point()]
        self.device = floating[0].device if floating else torch.device("cpu")
        with torch.inference_mode(mode=False), torch.no_grad():
            self._weights = {f"layer.{n}": self._lifted(p) for n, p in given.items()}
            for name in given:
                _refuse_nonfinite(self._weights[f"layer.{name}"], name, self.name)
            self._buffers = {f"layer.{n}": self._lifted(b) for n, b in buffers.items()}
        self.without_bias = False
        self.geometry: Geometry | None = None
        self.why_not: UnsupportedLayerError | None = None
        try:
            self.geometry = geometry_of(layer)
        except UnsupportedLayerError as error:
            self.why_not = error
        else:
            self._weight = self._read_weight(self.geometry)
            if "layer.bias" in self._weights:
                self._weights["layer.bias"] = torch.zeros_like(self._weights["layer.bias"])
                self.without_bias = True
            else:
                self.without_bias = layer.bias is None

    @property
    def placement(self) -> dict[str, Any]:
        """Arguments that make a tensor for the layer."""
        return {"dtype": self.dtype, "device": self.device}

    @property
    def weight(self) -> Tensor:
        """The weight that the layer applies, for layers of known geometry."""
        if self.geometry is None:
            assert self.why_not is not None
            raise self.why_not
        return self._weight

    def _lifted(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        copy = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return copy.clone() if copy.is_inference() else copy

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """In which the layer may run without leaving a trace."""
        with (
            isolated_randomness(),
            differentiable(self._modules, self.device),
            _without_autocast(self.device),
            _kept(self._modules),
        ):
            for module in self._modules:
                # To compile for float64 and a few products does not pay.
                vars(module)["_compiled_call_impl"] = None
            yield

    def run(self, action: Callable[[nn.Module], T]) -> T:
        """Let something be done with the layer while it has the fixed weights."""
        # What the forward pass does to its buffers, it does to copies.
        tensors = self._weights | {name: b.clone() for name, b in self._buffers.items()}
        result: T = torch.func.functional_call(self._host, tensors, (action,))
        return result

    def trace(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of inputs as a leaf, and the outputs with their graph."""
        leaf = inputs.detach().to(**self.placement).clone().requires_grad_()
        # A copy once more, because a first layer that works in place may not touch a leaf.
        return leaf, self.run(lambda layer: layer(leaf.clone()))

    def respond(self, inputs: Tensor) -> Tensor:
        """Outputs for a batch of inputs, without a graph."""
        with self.evaluation(), torch.no_grad():
            inputs = inputs.to(**self.placement)
            try:
                # A copy, because a layer may work in place, and because inputs that were made in
                # a caller's inference mode forbid to save them.
                outputs = self.run(lambda layer: layer(inputs.clone()))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                shape = tuple(inputs.shape[1:])
                msg = (
                    f"The {self.name} does not take a {self.dtype} input of shape {shape}, which "
                    f"is without the batch: {first}"
                )
                raise ShapeError(msg) from error
        if not isinstance(outputs, Tensor):
            msg = f"The {self.name} returns a {type(outputs).__name__}, not one tensor: wrap it."
            raise UnsupportedLayerError(msg)
        if outputs.ndim == 0 or len(outputs) != len(inputs):
            msg = (
                f"The {self.name} turns a batch of {len(inputs)} into an output of shape "
                f"{tuple(outputs.shape)}: it does not keep the samples apart."
            )
            raise UnsupportedLayerError(msg)
        return outputs

    def _read_weight(self, geometry: Geometry) -> Tensor:
        """The weight as the forward pass finds it: parametrised, or set by a hook."""
        layer = self.layer
        plain = not (layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer))
        sizes = [
            d * (k - 1) + 1 + s + max(ends)
            for k, d, s, ends in zip(
                geometry.kernel, geometry.dilation, geometry.stride, geometry.padding, strict=True
            )
        ]
        probe = torch.randn(
            1, geometry.in_channels, *sizes, generator=torch.Generator().manual_seed(0)
        ).to(**self.placement)

        def read(module: nn.Module) -> Tensor:
            if not plain:
                # Hooks may set the weight, as those of older spectral and weight norms do, or
                # only look on. What they do to input or output, the weight does not tell.
                hooked = module(probe)
                own = type(module).forward(module, probe)
                same = isinstance(hooked, Tensor) and hooked.shape == own.shape
                if not same or float((hooked - own).norm()) > 1e-5 * float(own.norm()):
                    msg = (
                        f"Hooks of the {self.name}, or a forward of its own, change what it "
                        f"computes, so the weight alone does not say what that is."
                    )
                    raise UnsupportedLayerError(msg)
            return module.weight.detach().clone()  # type: ignore[operator]

        try:
            with self.evaluation(), torch.no_grad():
                weight = self.run(read)
        except UnsupportedLayerError as error:
            self.geometry, self.why_not = None, error
            return torch.empty(0)
        _refuse_nonfinite(weight, "weight", self.name)
        return weight


class _Host(nn.Module):
    """Gives something to do with a layer the place of a forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, action: Callable[[nn.Module], T]) -> T:
        return action(self.layer)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    known = device.type in ("cpu", "cuda")
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


@contextlib.contextmanager
def _kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back what the modules hold as attributes: buffers, caches, weights that hooks set."""
    kept = [
        (vars(module), dict(vars(module)), [dict(vars(module)[name]) for name in _REGISTRIES])
        for module in modules
    ]
    try:
        yield
    finally:
        for attributes, before, registries in kept:
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            attributes.update(before)
            for name, registry in zip(_REGISTRIES, registries, strict=True):
                attributes[name].clear()
                attributes[name].update(registry)


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one input as a tuple of positive integers."""
    try:
        shape = tuple(map(operator.index, input_shape))
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        msg = f"input_shape must be a tuple of positive integers, got {input_shape!r}."
        raise ShapeError(msg)
    return shape


def _refuse_unusable(parameter: Tensor, name: str, owner: str) -> None:
    fault = None
    if isinstance(parameter, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        fault = "is not initialised yet (lazy module): run the layer once on a batch"
    elif hasattr(parameter, "full_tensor"):
        fault = (
            "is sharded over devices (DTensor): measure a layer that holds "
            "parameter.full_tensor(), which every rank has to call"
        )
    elif parameter.layout != torch.strided:
        fault = f"is sparse ({parameter.layout}): pass a layer with a dense weight"
    elif parameter.device.type == "meta":
        fault = "is on the meta device and has no data: load the weights first"
    elif parameter.dtype.is_complex:
        fault = f"is complex ({parameter.dtype}); supported are real weights"
    elif not parameter.is_floating_point():
        fault = f"is not floating-point ({parameter.dtype}): dequantise the layer first"
    if fault:
        msg = f"Parameter {name!r} of the {owner} {fault}."
        raise UnsupportedParameterError(msg)


def _refuse_nonfinite(tensor: Tensor, name: str, owner: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        msg = (
            f"Parameter {name!r} of the {owner} holds NaN or an infinity in {bad} of "
            f"{tensor.numel()} entries, so it has no singular values."
        )
        raise NonFiniteError(msg)
