r"""Two-layer convolutional nets with one filter, which may have a shortcut and a normalisation.

From Liu, Chen, Zhou, Du, Zhou, Zhao, *Towards Understanding the Importance of Shortcut Connections
in Residual Networks*, arXiv:1909.04653: :math:`f(Z) = \sum_j a_j \mathrm{relu}(Z_j^T v)` on patches
:math:`Z_1, \dots, Z_k`, with the filter :math:`u = 1/\sqrt p + w` with a shortcut and
:math:`u = w` without, and :math:`v = u/|u|` with the normalisation layer. The shortcut is that of
average pooling: with :math:`w = 0` a patch is mapped to its mean, times :math:`\sqrt p`.

Parameters may have leading axes: a module then is as many nets, which run in one program.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory.shortcut_importance import angle_of, overlap_of


class TwoLayerConv(nn.Module):
    """The net, or a stack of such nets.

    Parameters
    ----------
    weights : Tensor of shape (..., p)
        ``w`` at the start.
    outputs : Tensor of shape (..., k)
        ``a`` at the start.
    shortcut : bool
        Whether ``1/sqrt(p)`` is added to every entry of ``w``.
    normalised : bool
        Whether the filter is divided by its norm.

    Raises
    ------
    ShapeError
        If the leading axes differ, or one of the two has no axis.
    InvalidArgumentError
        If the two have different dtypes, one is not floating, or a filter is zero: it has no
        direction, and the loss no derivative there.

    Examples
    --------
    >>> net = TwoLayerConv(torch.zeros(4), torch.ones(2), shortcut=True)
    >>> net.filters
    tensor([0.5000, 0.5000, 0.5000, 0.5000], grad_fn=<DivBackward0>)
    >>> net(torch.ones(3, 2, 4)).tolist()
    [4.0, 4.0, 4.0]
    """

    def __init__(
        self, weights: Tensor, outputs: Tensor, *, shortcut: bool, normalised: bool = True
    ) -> None:
        super().__init__()
        no_axis = weights.ndim == 0 or outputs.ndim == 0
        if no_axis or weights.shape[:-1] != outputs.shape[:-1]:
            msg = (
                "weights and outputs must have shape (..., p) and (..., k) with the same leading "
                f"axes, got {tuple(weights.shape)} and {tuple(outputs.shape)}."
            )
            raise ShapeError(msg)
        if weights.dtype != outputs.dtype or not weights.is_floating_point():
            found = f"{weights.dtype} and {outputs.dtype}"
            msg = f"weights and outputs need one floating dtype, got {found}."
            raise InvalidArgumentError(msg)
        self.weights = nn.Parameter(weights.detach().clone())
        self.outputs = nn.Parameter(outputs.detach().clone())
        self.normalised = normalised
        self.offset = 1 / math.sqrt(weights.shape[-1]) if shortcut else 0.0
        if not bool((self.weights.detach() + self.offset).abs().amax(-1).gt(0).all()):
            msg = "a filter is zero: without a shortcut start from weights that are not."
            raise InvalidArgumentError(msg)

    @property
    def filters(self) -> Tensor:
        """What patches are multiplied with, of shape (..., p): ``v`` if normalised, else ``u``."""
        filters = self.weights + self.offset
        if not self.normalised:
            return filters
        size: Tensor = torch.linalg.vector_norm(filters, dim=-1, keepdim=True)
        return filters / size

    def forward(self, patches: Tensor) -> Tensor:
        """Answers (..., m) to inputs (..., m, k, p), the leading axes those of the nets or none."""
        # All patches of a net in one product: a product for each input would be a small one.
        rows = patches.flatten(-3, -2) @ self.filters[..., None]
        hidden = torch.relu(rows.unflatten(-2, patches.shape[-3:-1])[..., 0])
        answers: Tensor = hidden @ self.outputs[..., None]
        return answers[..., 0]

    @torch.no_grad()
    def renormalise(self) -> None:
        """Move ``w`` so that the filter keeps its direction and gets norm 1."""
        filters = self.weights + self.offset
        size = torch.linalg.vector_norm(filters, dim=-1, keepdim=True)
        self.weights.copy_(filters / size - self.offset)

    def population_loss(self, teacher_filter: Tensor, teacher_outputs: Tensor) -> Tensor:
        """Half the mean squared distance to a teacher over all inputs, of shape (...).

        Twice differentiable wherever the filter is not zero, with the right derivatives at the
        angles 0 and pi, too.

        Parameters
        ----------
        teacher_filter, teacher_outputs : Tensor of shape (..., p) and (..., k)
            The filter has norm 1.

        Raises
        ------
        InvalidArgumentError
            If it does not.
        """
        return population_loss(self.filters, self.outputs, teacher_filter, teacher_outputs)


def population_loss(
    filters: Tensor, outputs: Tensor, teacher_filter: Tensor, teacher_outputs: Tensor
) -> Tensor:
    """The same from filters as patches are multiplied with, normalised if the net does it."""
    norms = torch.linalg.vector_norm(teacher_filter.detach(), dim=-1)
    # Half of the digits of the dtype.
    if bool(((norms - 1).abs() > math.sqrt(torch.finfo(norms.dtype).eps)).any()):
        msg = "teacher_filter must have norm 1: put its norm into teacher_outputs."
        raise InvalidArgumentError(msg)
    size = torch.linalg.vector_norm(filters, dim=-1)
    squares = size.square() * outputs.square().sum(-1) + teacher_outputs.square().sum(-1)
    sums = (size * outputs.sum(-1) - teacher_outputs.sum(-1)).square()
    cross = rectified_kernel(filters, teacher_filter) - size
    cross = cross * (outputs * teacher_outputs).sum(-1)
    loss: Tensor = ((math.pi - 1) * squares - 2 * cross + sums) / (4 * math.pi)
    return loss


def rectified_kernel(filters: Tensor, teacher_filter: Tensor) -> Tensor:
    r""":math:`2 \pi E\, \mathrm{relu}(Z^T u) \mathrm{relu}(Z^T v^*) = |u| g(\varphi)`, (...).

    Written with arccos, its second derivative at the angles 0 and pi would be infinity times 0.
    Here its derivatives are given by what they are: the gradient is
    :math:`(\pi - \varphi) v^* + \sin \varphi \, u/|u|`, and the Hessian is
    :math:`\sin \varphi \, (I - v v^T + e e^T)/|u|` with ``e`` the unit vector along
    :math:`v^* - \cos \varphi \, v`: zero at both ends. Derivatives go backwards, once or twice
    (``torch.autograd``, ``torch.func.grad`` and ``jacrev`` and ``vmap`` of them); there is no
    forward mode, so ``torch.func.hessian`` and ``jacfwd`` raise ``NotImplementedError``: use
    ``jacrev(jacrev(...))``.

    Parameters
    ----------
    filters, teacher_filter : Tensor of shape (..., p)
        ``u``, not zero, and ``v*`` of norm 1, through which no gradient goes.
    """
    value: Tensor = _Kernel.apply(filters, teacher_filter.detach())
    return value


def _split(u: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Norm and direction of ``u``, the part of the target across it, its size, and the angle."""
    size = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    unit = u / size
    across = target - (unit * target).sum(-1, keepdim=True) * unit
    sine = torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    return size, unit, across, sine, angle_of(unit, target)


class _Kernel(torch.autograd.Function):
    """``|u| g``, whose backward pass is differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, target: Tensor) -> Tensor:
        size, _, _, _, angle = _split(u, target)
        return (size * overlap_of(angle))[..., 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[..., None] * _KernelGradient.apply(*ctx.saved_tensors), None


class _KernelGradient(torch.autograd.Function):
    """Its gradient, with the Hessian as backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, target: Tensor) -> Tensor:
        _, unit, _, sine, angle = _split(u, target)
        return (math.pi - angle) * target + sine * unit

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        size, unit, across, sine, _ = _split(*ctx.saved_tensors)
        radial = (unit * tangent).sum(-1, keepdim=True) * unit
        # sin e e^T = across across^T / sin, and that is 0 at the ends.
        along = (across * tangent).sum(-1, keepdim=True) / torch.where(sine > 0, sine, 1.0) * across
        return (sine * (tangent - radial) + along) / size, None
