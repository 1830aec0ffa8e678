"""The Gauss-Newton matrix of a loss with respect to a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from conditioning.errors import LossWithoutGraphError
from conditioning.operators.batches import map_tensors
from conditioning.operators.graphs import (
    Parts,
    differentiate,
    nodes_behind,
    refuse_dead_ends,
)
from conditioning.operators.losses import LossOperator


class JacobianGraph:
    """The retained graph of outputs, for products with their Jacobian and its transpose.

    ``J v`` is the derivative of the linear function ``u -> J^T u``, so it needs no
    forward-mode rule from any operation.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = inputs
        self._live = [i for i, output in enumerate(outputs) if output.requires_grad]
        self._outputs = [outputs[i] for i in self._live]
        self._count = len(outputs)
        self._seeds = [torch.zeros_like(o, requires_grad=True) for o in self._outputs]
        pulled = differentiate(self._outputs, inputs, self._seeds, create_graph=True)
        refuse_dead_ends(self._outputs, pulled)
        self._active = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._pulled = [g for g in pulled if g is not None and g.requires_grad]
        self.used = [g is not None for g in pulled]

    def push(self, tangents: Sequence[Tensor], *, batched: bool) -> list[Tensor | None]:
        """Multiply the Jacobian with vectors in the shapes of the inputs."""
        pushed = differentiate(
            self._pulled, self._seeds, [tangents[i] for i in self._active], batched=batched
        )
        result: list[Tensor | None] = [None] * self._count
        for index, value in zip(self._live, pushed, strict=True):
            result[index] = value
        return result

    def pull(self, cotangents: Parts, *, batched: bool) -> Parts:
        """Multiply the transposed Jacobian with vectors in the shapes of the outputs."""
        pairs = [
            (output, cotangents[index])
            for index, output in zip(self._live, self._outputs, strict=True)
        ]
        used = [(output, c) for output, c in pairs if c is not None]
        return differentiate(
            [output for output, _ in used],
            self._inputs,
            [c for _, c in used],
            batched=batched,
        )

    def size(self) -> int:
        """Count the nodes of the graphs that two products go through."""
        return sum(1 for _ in nodes_behind([*self._outputs, *self._pulled]))


class GaussNewtonGraph:
    """The retained graphs of one batch: the outputs by parameters, the loss by outputs."""

    by_parameter = True  # as HessianGraph

    def __init__(
        self, outputs: Any, loss_of: Callable[[Any], Tensor], parameters: Sequence[Tensor]
    ) -> None:
        attached: list[Tensor] = []
        self._leaves: list[Tensor] = []

        def cut(output: Tensor) -> Tensor:
            if not output.requires_grad:
                return output
            attached.append(output)
            self._leaves.append(output.detach().requires_grad_())
            return self._leaves[-1]

        detached = map_tensors(cut, outputs)
        if not attached:
            msg = (
                "The model's outputs have no autograd graph. Look for .detach(), .data, "
                "torch.no_grad(), or parameters whose requires_grad is off."
            )
            raise LossWithoutGraphError(msg)
        loss = loss_of(detached)
        slopes = differentiate([loss], self._leaves, create_graph=True)
        self.loss = loss.detach()
        self._jacobian = JacobianGraph(attached, parameters)
        refuse_dead_ends([loss], slopes)
        # The matrix is not the derivative of the gradient, so it is not compared with that.
        self.custom: list[str] = []
        self._active = [i for i, s in enumerate(slopes) if s is not None and s.requires_grad]
        self._slopes = [s for s in slopes if s is not None and s.requires_grad]
        fixed = [None if s is None else s.detach() for s in slopes]
        pulled = self._jacobian.pull(fixed, batched=False)
        self.gradient = [
            None if g is None or not used else g.detach()
            for g, used in zip(pulled, self._jacobian.used, strict=True)
        ]

    def apply(self, tangents: list[Tensor], *, batched: bool) -> Parts:
        """Multiply the Gauss-Newton matrix of the batch with vectors in parameter shapes."""
        pushed = self._jacobian.push(tangents, batched=batched)
        pairs = [
            (slope, pushed[index]) for index, slope in zip(self._active, self._slopes, strict=True)
        ]
        used = [(slope, p) for slope, p in pairs if p is not None]
        curved = differentiate(
            [slope for slope, _ in used], self._leaves, [p for _, p in used], batched=batched
        )
        return self._jacobian.pull(curved, batched=batched)

    def size(self) -> int:
        """Count the nodes of the graphs that a product goes through."""
        return self._jacobian.size()


class GaussNewtonOperator(LossOperator):
    r"""The Gauss-Newton matrix :math:`J^T (\nabla^2_f L)\, J` of a loss.

    ``J`` is the Jacobian of the model's outputs ``f`` by the parameters. For a loss that
    is convex in the outputs the matrix is positive semidefinite, and it is the Hessian
    without the part that comes from the curvature of the model. The loss function itself
    is what is differentiated twice, the model only once.

    Takes what :class:`HessianOperator` takes. ``loss_fn`` cannot be ``None``, because the
    matrix depends on where the model ends and the loss begins. Outputs may be a tensor
    or nested tuples, lists and dicts of tensors.

    Raises
    ------
    InvalidArgumentError
        If ``loss_fn`` is ``None``.
    ConditioningError
        As :class:`HessianOperator`.
    """

    _takes_bare_loss = False

    def _graph(self, batch: Any) -> GaussNewtonGraph:
        outputs, targets = self._forward(batch)
        return GaussNewtonGraph(
            outputs, lambda detached: self._loss_of(detached, targets, batch), self._parameters
        )
