r"""Training of many res-1 nets at once: ``h_0 = A x``, ``h + alpha V relu(h)``, logits ``B h_L``.

Nets are lanes of stacks of matrices; each lane has a scaling and a learning rate of its own, and
all see the same batches. Gradients of the mean cross-entropy and Adam's steps are written out: a
graph for a thousand layers would cost more than the products. There are no biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from experiments.errors import ExperimentError

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class Lanes:
    """Weights of all nets, or gradients of the same shapes.

    Parameters
    ----------
    first : Tensor of shape (lanes, d, pixels)
        ``A``.
    layers : Tensor of shape (L, lanes, d, d)
        ``V``.
    last : Tensor of shape (lanes, classes, d)
        ``B``.
    """

    first: Tensor
    layers: Tensor
    last: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three."""
        return self.first, self.layers, self.last

    def like(self) -> Lanes:
        """Zeros of the same shapes."""
        return Lanes(*(torch.zeros_like(tensor) for tensor in self.tensors))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Parameters
    ----------
    epochs, batch : int
        The last batch of an epoch may be smaller.
    decay_every, decay : int, float
        After so many epochs the learning rate is multiplied by ``decay``.
    """

    epochs: int
    batch: int
    decay_every: int = 5
    decay: float = 0.1

    def __post_init__(self) -> None:
        """Reject what could not be run."""
        if min(self.epochs, self.batch, self.decay_every) < 1:
            msg = f"epochs, batch and decay_every must be at least 1, got {self}"
            raise ExperimentError(msg)


class ResidualObjective:
    """The loss of all lanes, with its gradient.

    Parameters
    ----------
    alphas : Tensor of shape (lanes,)
        The factor of the branches of each net.
    """

    def __init__(self, alphas: Tensor) -> None:
        self.alphas = alphas[:, None, None]
        self._stream: Tensor | None = None

    def logits(self, weights: Lanes, pixels: Tensor) -> Tensor:
        """Outputs ``(lanes, classes, samples)`` of inputs ``(pixels, samples)``."""
        state = torch.matmul(weights.first, pixels)
        for matrix in weights.layers:
            state = torch.baddbmm(state, matrix, state.relu() * self.alphas)
        return weights.last @ state

    def __call__(
        self, weights: Lanes, pixels: Tensor, labels: Tensor, gradient: Lanes
    ) -> Tensor:  # fmt: skip
        """Mean cross-entropy of each lane, shape ``(lanes,)``; ``gradient`` is overwritten."""
        depth, count = len(weights.layers), pixels.shape[1]
        shape = (depth + 1, *weights.first.shape[:2], count)
        if self._stream is None or self._stream.shape != shape:
            self._stream = pixels.new_empty(shape)
            self._active, self._below = (pixels.new_empty(shape[1:]) for _ in range(2))
        stream, active, below = self._stream, self._active, self._below
        scaled = weights.layers * self.alphas
        torch.matmul(weights.first, pixels, out=stream[0])
        for k in range(depth):
            torch.clamp_min(stream[k], 0.0, out=active)
            torch.baddbmm(stream[k], scaled[k], active, out=stream[k + 1])
        logits = weights.last @ stream[-1]
        wanted = functional.one_hot(labels, logits.shape[1]).to(logits.dtype).T
        logs = torch.log_softmax(logits, dim=1)
        losses = -(logs * wanted).sum((1, 2)) / count
        slopes = (logs.exp() - wanted) / count
        torch.bmm(slopes, stream[-1].mT, out=gradient.last)
        behind = weights.last.mT @ slopes
        for k in range(depth - 1, -1, -1):
            torch.clamp_min(stream[k], 0.0, out=active)
            torch.bmm(behind, active.mT, out=gradient.layers[k])
            torch.bmm(scaled[k].mT, behind, out=below)
            # As autograd does it: relu'(0) = 0.
            torch.ops.aten.threshold_backward(below, stream[k], 0.0, grad_input=below)
            behind += below
        gradient.layers.mul_(self.alphas)
        torch.matmul(behind, pixels.T, out=gradient.first)
        return losses


class Adam:
    """Adam with a learning rate for each lane (Kingma and Ba, arXiv:1412.6980)."""

    def __init__(self, weights: Lanes, rates: Tensor) -> None:
        self.rates = rates[:, None, None]
        self.moments, self.squares = weights.like(), weights.like()
        self.steps = 0

    def step(self, weights: Lanes, gradient: Lanes, factor: float = 1.0) -> None:
        """One step with ``factor`` times the learning rates; overwrites the gradient."""
        self.steps += 1
        first, second = _BETAS
        rates = self.rates * (factor / (1 - first**self.steps))
        correction = (1 - second**self.steps) ** 0.5
        for weight, slope, moment, square in zip(
            weights.tensors, gradient.tensors, self.moments.tensors, self.squares.tensors,
            strict=True,
        ):  # fmt: skip
            moment.lerp_(slope, 1 - first)
            square.mul_(second).addcmul_(slope, slope, value=1 - second)
            torch.sqrt(square, out=slope).div_(correction).add_(_EPSILON)
            weight.sub_(torch.div(moment, slope, out=slope).mul_(rates))


def train(
    weights: Lanes,
    alphas: Tensor,
    rates: Tensor,
    pixels: Tensor,
    labels: Tensor,
    schedule: Schedule,
    generator: Generator,
) -> Tensor:
    """Train all lanes in place.

    Parameters
    ----------
    weights : Lanes
    alphas, rates : Tensor of shape (lanes,)
        Factors of the branches, and learning rates.
    pixels : Tensor of shape (pixels, samples)
    labels : Tensor of shape (samples,)
    schedule : Schedule
    generator : Generator
        On the CPU; shuffles.

    Returns
    -------
    Tensor of shape (epochs, lanes)
        Mean loss over the batches of each epoch; not finite for nets that diverged.
    """
    objective, gradient, adam = ResidualObjective(alphas), weights.like(), Adam(weights, rates)
    means = []
    for epoch in range(schedule.epochs):
        factor = schedule.decay ** (epoch // schedule.decay_every)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        total = torch.zeros_like(alphas)
        for chosen in order.split(schedule.batch):
            losses = objective(weights, pixels[:, chosen].contiguous(), labels[chosen], gradient)
            total += losses * (len(chosen) / len(labels))
            adam.step(weights, gradient, factor)
        means.append(total)
    return torch.stack(means)


def accuracy(weights: Lanes, alphas: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
    """Share of samples that each lane gets right; a prediction that is not finite is wrong."""
    logits = ResidualObjective(alphas).logits(weights, pixels)
    finite = torch.isfinite(logits).all(1)
    return ((logits.argmax(1) == labels) & finite).double().mean(1)
