"""A layer as the matrix that it applies, known by its products: the layer as it really runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from conditioning.errors import (
    AsymmetricOperatorError,
    LossWithoutGraphError,
    NonFiniteError,
    RandomForwardError,
    ShapeError,
    UnsupportedLayerError,
)
from conditioning.krylov import random_start
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.operators.checks import random_message, refuse_norms_in_training
from conditioning.operators.guards import SavedBytes
from conditioning.operators.modules import random_modules, tracking_norms
from conditioning.singular.fixed import FixedLayer, checked_shape
from conditioning.singular.scales import norm_of, scale_of


class LayerOperator(LinearOperator):
    r"""The linear part of a layer, from its input to its output, both flattened.

    Any affine module on which a batch can be put: a convolution with its own padding, stride and
    hooks, a low-rank adapter, a pooling layer, a sequence of such, also with tied weights. Products
    run the forward pass of the layer on ``k`` vectors as a batch, less its response to zero;
    products with the transpose are the backward pass of the same.

    The weights are copied in the precision of the products. The layer itself is left as it was,
    with its gradients, buffers, hooks, mode and the random state; later changes of its weights do
    not show here. A linear or convolutional layer with hooks, own or global ones, is compared on
    random inputs of ``input_shape`` with the same layer without, forwards and backwards: where
    they agree to a thousand rounding units, products leave the hooks out.

    Parameters
    ----------
    layer : nn.Module
        Evaluated in the mode that it is in.
    input_shape : sequence of int
        Of one input, without the batch: ``(channels, height, width)``.
    dtype : torch.dtype
        float64 or float32.
    memory_budget : int, optional
        Bytes for the activations of one batch, of at least one vector. Default: a quarter of
        what is free.

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
        If the layer does not take such an input, or has no entries.
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
        given = isinstance(layer, FixedLayer)
        fixed = layer if isinstance(layer, FixedLayer) else FixedLayer(layer, dtype)
        self._fixed = fixed
        self.input_shape = checked_shape(input_shape)
        fixed.verify(self.input_shape)
        response = fixed.respond(torch.zeros(1, *self.input_shape, **fixed.placement))
        self.output_shape = tuple(response.shape[1:])
        shape = (math.prod(self.output_shape), math.prod(self.input_shape))
        if 0 in shape:
            msg = f"The {fixed.name} as an operator of shape {shape} has no singular values."
            raise ShapeError(msg)
        super().__init__(shape, fixed.dtype, fixed.device)
        budget = available_bytes(self.device) // 4 if memory_budget is None else memory_budget
        # Input, output, their gradients, and what the layer makes in between.
        self._batch = max(1, budget // (8 * sum(shape) * self.dtype.itemsize))
        self._graph: tuple[Tensor, Tensor] | None = None
        # A fixed layer that is given takes care of its scale itself.
        self._factor = 1.0 if given else fixed.scale
        # A known layer has no bias left; to subtract a zero response would cost time.
        self._response = None
        if fixed.geometry is None:
            self._response = response
            self._check_affine()
            size = self.check_transpose()
            if given:
                fixed.scale = scale_of(size)
                self._factor = 1 / fixed.scale

    def _dense_block(self) -> int:
        return min(self._batch, 64)

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._products(self._forward, vectors)

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        return self._products(self._backward, vectors)

    def _products(self, product: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        # Modules may take views of what they get, so it has to lie in one piece.
        parts = [product(part.contiguous()) for part in vectors.T.split(self._batch)]
        products = torch.cat(parts).T
        return products if self._factor == 1 else products * self._factor

    def _forward(self, rows: Tensor) -> Tensor:
        outputs = self._fixed.respond(rows.reshape(-1, *self.input_shape))
        if self._response is not None:
            outputs = outputs - self._response
        return outputs.reshape(len(rows), -1)

    def _backward(self, rows: Tensor) -> Tensor:
        with self._fixed.evaluation():
            if self._graph is None or len(self._graph[0]) != len(rows):
                self._graph = None  # two may not fit
                self._graph = self._fixed.trace(
                    torch.zeros(len(rows), *self.input_shape, **self._fixed.placement)
                )
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
        """Refuse what is not affine, on random inputs of some sizes, or not sample by sample."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        sizes, fault = [1.0, 1e3], ""
        while sizes and not fault:
            size = sizes.pop(0)
            drawn = torch.randn(
                2, *self.input_shape, generator=generator, device="cpu", dtype=torch.float64
            )
            one, other = size * drawn
            inputs = torch.stack([0 * one, one, other, 0.7 * one - 1.3 * other])
            fault, gain, constant = self._fault(inputs)
            if size == 1e3 and gain > 0 and constant > 0.1 * gain * size:
                # A large response to zero may keep the others away from every kink.
                sizes.append(min(100 * constant / gain, torch.finfo(self.dtype).max ** 0.5))
        if not fault:
            return
        fixed = self._fixed
        owners = {"": fixed.layer}
        if names := random_modules(owners):
            raise RandomForwardError(random_message(names, ["output"], drew=True))
        refuse_norms_in_training(owners, {id(module) for _, module in tracking_norms(owners)})
        msg = (
            f"The {fixed.name} is not affine: {fault}. It has no matrix. For its Jacobian at a "
            f"given input use singular_range(JacobianOperator(module, inputs))."
        )
        raise UnsupportedLayerError(msg)

    def _fault(self, inputs: Tensor) -> tuple[str, float, float]:
        """What is wrong with outputs for 0, x, y and 0.7 x - 1.3 y; gain; response to zero."""
        fixed = self._fixed
        with fixed.evaluation(), SavedBytes([]) as saved:
            outputs = fixed.trace(inputs)[1].detach()
        eps = max(saved.eps, torch.finfo(self.dtype).eps)
        if not bool(torch.isfinite(outputs).all()):
            msg = f"The output of the {fixed.name} on random inputs holds NaN or an infinity."
            raise NonFiniteError(msg)
        outputs = outputs.to(torch.float64)
        zero, left, right, both = outputs
        constant = norm_of(zero)
        gain = norm_of(left - zero) / norm_of(inputs[1])
        bound = 1e3 * eps * norm_of(outputs)
        rest = norm_of((both - zero) - 0.7 * (left - zero) + 1.3 * (right - zero))
        alone = fixed.respond(inputs[1:2])[0].to(torch.float64)
        if norm_of(alone - left) > bound:
            return "the output for a sample depends on the other samples of the batch", 0.0, 0.0
        if rest > bound:
            share = rest / max(norm_of(both), bound)
            return f"a sum of inputs misses the sum of outputs by {share:.1g} of its size", 0.0, 0.0
        # A difference that is rounding is no gain.
        return "", gain if norm_of(left - zero) > bound else 0.0, constant

    def check_transpose(self) -> Tensor:
        """Refuse a backward pass that is not the transpose of the forward pass.

        Takes two products that do not count. Returns that of a normal vector.
        """
        u, v = (random_start(n, 0, self.device).to(self.dtype) for n in self.shape)
        spent = self.num_matvecs
        pushed, pulled = self.matvec(v), self.rmatvec(u)
        self.num_matvecs = spent
        unit = scale_of(torch.cat([pushed, pulled]))
        scaled, returned = pushed / unit, pulled / unit
        left, right = float(torch.dot(u, scaled)), float(torch.dot(returned, v))
        if abs(left - right) > 1e-3 * (norm_of(scaled) + norm_of(returned)):
            msg = (
                f"The backward pass of the {self._fixed.name} is not the transpose of its forward "
                f"pass: <u, W v> = {left * unit:.9g} and <W^T u, v> = {right * unit:.9g}. Look "
                f"for a custom autograd.Function, .detach(), or hooks that change gradients."
            )
            raise AsymmetricOperatorError(msg)
        return pushed
