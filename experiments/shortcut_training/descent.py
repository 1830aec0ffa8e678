r"""Full-batch gradient descent of many shortcut nets at once: all learning rates and seeds.

Nets are lanes of one stack of weights ``(n, R, lanes, d, d)``; a step is a few batched products of
matrices. A linear net sees the moments of its data alone, so its step costs the same for any number
of samples: with ``A`` the net's matrix and ``W*`` the best one, the loss above its least value is
:math:`\frac12 \mathrm{tr}((A - W^*) \Sigma_{XX} (A - W^*)^T)`, exact where the difference of two
losses would be rounding. Nets with a ReLU between the matrices of a unit are trained on samples.

The stacks hold *transposed* weights ``V = Wᵀ``. Then every product of a linear net's step, forward,
backward and for the gradient, is of two matrices as they lie in memory, which is up to twice as
fast for small ones as with a transposed factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experiments.moments import Moments

# Diverged lanes are dropped this often: rarely enough that asking the device costs nothing.
_STEPS_BETWEEN_CHECKS = 10


class Objective(Protocol):
    """A loss of many nets, with its gradient in closed form."""

    def __call__(self, weights: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``(lanes,)``, and gradients times ``rates``, in a buffer of the objective."""


def stack(nets: Iterable[Tensor]) -> Tensor:
    """Weights ``(R, n, d, d)`` of several nets as one transposed stack ``(n, R, lanes, d, d)``."""
    return torch.stack([net.detach().transpose(0, 1).mT for net in nets], dim=2).contiguous()


def unstack(weights: Tensor) -> list[Tensor]:
    """Weights ``(R, n, d, d)`` of each net of a stack, not transposed."""
    return [net.transpose(0, 1).mT for net in weights.unbind(2)]


def mean_frobenius_norms(weights: Tensor) -> Tensor:
    """Mean Frobenius norm of the matrices of each net of a stack, shape ``(lanes,)``."""
    norms: Tensor = torch.linalg.matrix_norm(weights)
    return norms.mean((0, 1))


def active_share(weights: Tensor) -> Tensor:
    r"""Share of the units that carry the weights of each net, shape ``(lanes,)``.

    The participation ratio :math:`(\sum_r a_r)^2 / (R \sum_r a_r^2)` of the units' squared
    Frobenius norms: 1 where all are alike, ``1/R`` where one is all there is.
    """
    sizes = weights.square().sum((0, 3, 4))
    return sizes.sum(0).square() / (len(sizes) * sizes.square().sum(0))


class LinearObjective:
    """The loss of linear nets above its least value, from moments.

    Parameters
    ----------
    moments : Moments
    shortcut : bool
        Whether the identity is added to the product of each unit.
    device, dtype
        Of the weights.
    """

    def __init__(
        self,
        moments: Moments,
        *,
        shortcut: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.best_map = moments.best_map.to(device, dtype)
        self.input_moment = moments.sigma_xx.to(device, dtype)
        self.identity = torch.eye(len(self.input_moment), device=device, dtype=dtype)
        self.shortcut = shortcut
        self._shape: torch.Size | None = None

    def _make_buffers(self, weights: Tensor) -> None:
        depth = len(weights)
        self._inner = [torch.empty_like(weights[0]) for _ in range(depth - 1)]
        plain = depth > 1 and not self.shortcut
        self._units = self._inner[-1] if plain else torch.empty_like(weights[0])
        self._above = torch.empty_like(weights[0])
        # Unit 0 has nothing below it.
        self._below = self.identity.expand_as(weights[0]).contiguous()
        self._behind = [torch.empty_like(weights[0]) for _ in range(2)]
        self._gradient = torch.empty_like(weights)
        # Their units one by one: cutting them anew in every step would cost a tenth of it.
        self._cut = [t.unbind(0) for t in (self._units, self._below, self._above)]
        self._shape = weights.shape

    def __call__(self, weights: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, and gradients times rates, of all lanes."""
        if weights.shape != self._shape:
            self._make_buffers(weights)
        depth, num_units = weights.shape[:2]
        # Products from the unit's input on: V_1, V_1 V_2, ...
        inner = [weights[0]]
        for layer in range(1, depth):
            _multiply(inner[-1], weights[layer], self._inner[layer - 1])
            inner.append(self._inner[layer - 1])
        # unit: transposed units; below: the product of those before one; above: gradient behind it.
        unit, below, above = self._cut
        if self.shortcut:
            torch.add(inner[-1], self.identity, out=self._units)
        elif depth == 1:
            self._units.copy_(weights[0])
        for r in range(1, num_units):
            torch.bmm(below[r - 1], unit[r - 1], out=below[r])
        error = torch.bmm(below[-1], unit[-1]).mT - self.best_map
        slopes = error @ self.input_moment
        losses = (error * slopes).sum((-2, -1)) / 2
        # Everything below is linear in this, so the rates need to be applied to it alone.
        torch.mul(slopes, rates[:, None, None], out=above[-1])
        for r in range(num_units - 1, 0, -1):
            torch.bmm(unit[r], above[r], out=above[r - 1])
        behind, spare = self._behind
        _multiply(self._above, self._below, behind)
        for layer in range(depth - 1, 0, -1):
            _multiply(behind, inner[layer - 1], self._gradient[layer])
            _multiply(weights[layer], behind, spare)
            behind, spare = spare, behind
        self._gradient[0].copy_(behind)
        return losses, self._gradient.mT


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Product of contiguous stacks: ``bmm`` takes one leading axis."""
    torch.bmm(*(stacked.view(-1, *stacked.shape[-2:]) for stacked in (left, right)),
              out=out.view(-1, *out.shape[-2:]))  # fmt: skip


class ReluObjective:
    """The half mean squared error of nets of two-matrix units with a ReLU between, on samples.

    Parameters
    ----------
    inputs, targets : Tensor of shape (m, d)
    shortcut : bool
        Whether the input of each unit is added to its result.
    device, dtype
        Of the weights.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        shortcut: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.inputs = inputs.T.to(device, dtype).contiguous()
        self.targets = targets.T.to(device, dtype).contiguous()
        self.shortcut = shortcut
        self._shape: torch.Size | None = None

    def _make_buffers(self, weights: Tensor) -> None:
        num_units, lanes = weights.shape[1:3]

        def signals(*leading: int) -> Tensor:
            return self.inputs.new_empty(*leading, lanes, *self.inputs.shape)

        self._stream, self._hidden = signals(num_units + 1), signals(num_units)
        self._stream[0] = self.inputs
        self._slopes, self._branch = signals(2), signals()
        self._gradient = torch.empty_like(weights)
        self._shape = weights.shape

    def __call__(self, weights: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, and gradients times rates, of all lanes."""
        if weights.shape != self._shape:
            self._make_buffers(weights)
        num_units, count = weights.shape[1], self.inputs.shape[1]
        first, second = weights[0].unbind(0), weights[1].unbind(0)
        stream, hidden = self._stream.unbind(0), self._hidden.unbind(0)
        for r in range(num_units):
            torch.bmm(first[r].mT, stream[r], out=hidden[r]).relu_()
            self._add(stream[r], second[r].mT, hidden[r], stream[r + 1])
        slopes, spare = self._slopes.unbind(0)
        torch.sub(stream[-1], self.targets, out=slopes)
        losses = slopes.square().sum((-2, -1)) / (2 * count)
        slopes.mul_((rates / count)[:, None, None])
        for r in range(num_units - 1, -1, -1):
            torch.bmm(hidden[r], slopes.mT, out=self._gradient[1, r])
            torch.bmm(second[r], slopes, out=self._branch)
            # As autograd does it: relu'(0) = 0.
            torch.ops.aten.threshold_backward(self._branch, hidden[r], 0.0, grad_input=self._branch)
            torch.bmm(stream[r], self._branch.mT, out=self._gradient[0, r])
            if r:
                self._add(slopes, first[r], self._branch, spare)
                slopes, spare = spare, slopes
        return losses, self._gradient

    def _add(self, skipped: Tensor, matrix: Tensor, vectors: Tensor, out: Tensor) -> None:
        if self.shortcut:
            torch.baddbmm(skipped, matrix, vectors, out=out)
        else:
            torch.bmm(matrix, vectors, out=out)


@dataclass(frozen=True, eq=False)
class Descent:
    """What became of every lane.

    Parameters
    ----------
    losses : Tensor of shape (lanes,)
        After the last step; infinite where the loss overflowed at any step.
    norms, shares : Tensor of shape (lanes,)
        Mean Frobenius norm of the matrices and share of active units after the last step; NaN
        where it overflowed.
    steps : tuple of int
        When the curves were recorded; 0 is before the first step.
    loss_curves, norm_curves : Tensor of shape (len(steps), lanes)
        The same along the way.
    """

    losses: Tensor
    norms: Tensor
    shares: Tensor
    steps: tuple[int, ...]
    loss_curves: Tensor
    norm_curves: Tensor


def descend(
    objective: Objective,
    weights: Tensor,
    rates: Tensor,
    num_steps: int,
    record: Sequence[int] = (),
) -> Descent:
    """Run gradient descent in all lanes.

    Parameters
    ----------
    objective : Objective
    weights : Tensor of shape (n, R, lanes, d, d)
        Transposed, see :func:`stack`; left as it is.
    rates : Tensor of shape (lanes,)
        Learning rates.
    num_steps : int
    record : sequence of int
        Steps in 0 ... num_steps at which losses and norms are kept.

    Returns
    -------
    Descent
        On the CPU.

    Notes
    -----
    A lane whose loss is no longer finite is taken out of the stack, so diverged nets cost nothing.
    """
    lanes = weights.shape[2]
    weights, rates = weights.clone(), rates.to(weights)
    alive = torch.arange(lanes, device=weights.device)
    wanted = sorted({*record, num_steps})
    losses = weights.new_full((len(wanted), lanes), float("inf"))
    norms = weights.new_full((len(wanted), lanes), float("nan"))
    for step in range(num_steps + 1):
        current, change = objective(weights, rates)
        if step in wanted or step % _STEPS_BETWEEN_CHECKS == 0:
            finite = torch.isfinite(current)
            if not bool(finite.all()):
                weights, rates, alive = weights[:, :, finite], rates[finite], alive[finite]
                weights, change = weights.contiguous(), change[:, :, finite]
                current = current[finite]
            if not len(alive):
                break
            if step in wanted:
                row = wanted.index(step)
                losses[row, alive] = current
                norms[row, alive] = mean_frobenius_norms(weights)
        if step < num_steps:
            weights -= change
    shares = torch.full_like(norms[-1], float("nan"))
    shares[alive] = active_share(weights)
    return Descent(
        losses[-1].cpu(), norms[-1].cpu(), shares.cpu(), tuple(wanted), losses.cpu(), norms.cpu()
    )


def spaced_steps(num_steps: int, count: int) -> list[int]:
    """About ``count`` steps from 0 to the last, at equal distances of their logarithms."""
    logs = torch.linspace(0, float(torch.tensor(num_steps + 1.0).log()), count, dtype=torch.float64)
    return sorted({round(value) - 1 for value in logs.exp().tolist()})
