"""The Hessian of a loss with respect to a model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conditioning.operators.graphs import (
    Parts,
    differentiate,
    nodes_behind,
    refuse_dead_ends,
)
from conditioning.operators.losses import LossOperator
from conditioning.operators.parameters import FlatLayout

# Up to so many parameters a gradient is kept in one piece as well: autograd takes some
# microseconds for each of its outputs, which matters while a product takes less than milliseconds.
_SMALL = 2**16


class HessianGraph:
    """The retained graph of one batch's gradient; a product is one backward pass through it."""

    by_parameter = True  # a product's parts come one after the other, as it ends at the parameters

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        gradient = differentiate([loss], parameters, create_graph=True)
        self.custom = refuse_dead_ends([loss], gradient)
        self.loss = loss.detach()
        self.gradient = [None if g is None else g.detach() for g in gradient]
        # A gradient that is constant in the parameters has no graph, and zero rows.
        self._active = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
        self._outputs = [g for g in gradient if g is not None and g.requires_grad]
        self._flat: Tensor | None = None
        kinds = {(g.dtype, g.layout) for g in self._outputs}
        whole = len(kinds) == 1 and len(self._outputs) == len(parameters) > 1
        if whole and sum(g.numel() for g in self._outputs) <= _SMALL:
            with torch.enable_grad():
                self._flat = torch.cat([g.reshape(-1) for g in self._outputs])

    def apply_flat(self, vector: Tensor, layout: FlatLayout) -> Parts:
        """Multiply the Hessian of the batch with one flat vector."""
        if self._flat is None:
            return self.apply(layout.split(vector), batched=False)
        return differentiate([self._flat], self._parameters, [vector])

    def apply(self, tangents: list[Tensor], *, batched: bool) -> Parts:
        """Multiply the Hessian of the batch with vectors cut into parameter shapes."""
        return differentiate(
            self._outputs,
            self._parameters,
            [tangents[i] for i in self._active],
            batched=batched,
        )

    def size(self) -> int:
        """Count the nodes of the graph that a product goes through."""
        return sum(1 for _ in nodes_behind(self._outputs))


class HessianOperator(LossOperator):
    r"""The Hessian :math:`\nabla^2 L(\theta)` of a loss, known by its products.

    The gradient's graph is built once per batch and kept; a product is one backward
    pass through it. If the graphs of all batches do not fit ``memory_budget``, as many are kept
    as fit, and the others are rebuilt once per block of vectors. If the graph of one batch alone
    does not fit, only what enters the model's blocks is kept, and every product runs the blocks
    again: about a third of the memory, twice the time, the same numbers up to rounding. The
    model's parameters, ``.grad``, buffers and mode, and every global random state, are left as
    they are.

    Parameters
    ----------
    model : nn.Module or callable
        Called with the inputs; or, with ``loss_fn=None``, called with a whole batch to
        return the loss.
    loss_fn : callable or None
        ``loss_fn(outputs, targets)`` returns one number, the mean (or sum, see
        ``reduction``) over the batch.
    data : tuple, or re-iterable of batches
        One batch ``(inputs, targets)``, or a list or ``DataLoader`` of them. Inputs are a
        tensor, a tuple (passed as ``*args``) or a dict (``**kwargs``). With
        ``loss_fn=None`` a tensor, dict or tuple is one batch, anything else that can
        be iterated holds batches. Tensors are moved to the parameters' device.
    params : optional
        ``None``: every parameter that requires a gradient. Or a submodule, parameters,
        a dict of names and parameters, or name patterns such as ``"layer3.*"``. The flat
        vector is always in ``named_parameters`` order, tied weights count once.
    reduction : {"mean", "sum"}
        How the batches' losses add up: weighted by their sizes, or as they are.
    check : bool
        Evaluate twice, to see that the loss is finite, has second derivatives, and does not
        depend on chance; and on the first batch multiply two vectors, to see that the operator
        is symmetric and not at a kink (``NonsmoothPointWarning``). About 7 gradients for one
        batch. Without it a graph is not measured before it is built, so one batch alone is
        always kept whole.
    batch_size_fn : callable, optional
        ``batch -> number``: the batch's weight in the mean. Default: the leading axis of
        the targets, or of the first tensor among the inputs. Give the number of terms
        that the loss averages where that is another one (tokens that are not padding).
    memory_budget : int, optional
        Bytes that kept graphs may hold. Default: a quarter of what is free, and half of it for
        the graph of one batch. A model without blocks is built whole in any case, with a
        ``LargeGraphWarning``.
    process_group : "auto", ProcessGroup or None
        Ranks whose batches the loss is taken over, so that each has the products of the mean over
        all samples: ``"auto"`` takes all ranks if the model is wrapped in DDP or sharded; then
        every rank must multiply the same vectors. ``None`` keeps a rank to itself. With
        parameters sharded along their first axis (``fully_shard``), vectors are sharded too:
        ``H @ v`` takes and gives the ``H.local_size`` entries of this rank.
    engine : {"auto", "retained", "linearized", "compiled"}
        How products are computed. ``"retained"`` goes through the kept graph of the gradient.
        ``"linearized"`` writes that pass down as a list of operations, once, and keeps what does
        not depend on the vector; ``"compiled"`` compiles that list. Both are compared with the
        retained graph on first use and fall back to it. ``"auto"`` begins with the retained graph
        and builds another when the time spent on products has come to what building takes; it
        stays with what is fastest. Named, the engine gives equal bits from run to run.

    Attributes
    ----------
    shape : tuple of int
        ``(n, n)``.
    num_matvecs : int
        Products so far; a block of ``k`` vectors counts ``k``.
    engine : Engine
        What is in use, its cost in gradients, and why. Can be set to one of the names.

    Raises
    ------
    ConditioningError
        One of its subclasses in :mod:`conditioning.errors`; each text says what was
        found and what to do about it.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> H = HessianOperator(model, torch.nn.MSELoss(), (inputs, torch.zeros_like(inputs[:, :1])))
    >>> H.dense()
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """

    def _graph(self, batch: Any) -> HessianGraph:
        outputs, targets = self._forward(batch)
        return HessianGraph(self._loss_of(outputs, targets, batch), self._parameters)
