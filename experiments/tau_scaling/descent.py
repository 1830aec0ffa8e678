r"""Gradient descent on many nets of the theory at once, with gradients written out.

The nets are those of :class:`experiments.models.tau_stack.TauStack`: the loss of a sample is
:math:`\frac12 |B h_L - y|^2`, the stem ``A`` and the head ``B`` stay as they are drawn, and
all matrices between them are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.models.tau_stack import TauStack

# Steps between two looks at which nets have diverged: the others go on without them.
_CHECK_EVERY = 5
_DIVERGED = 1e6
# So many samples at a time where nothing is trained.
_EVALUATED = 512


@dataclass
class Lanes:
    """Weights of N nets of the same sizes.

    Parameters
    ----------
    tau : Tensor of shape (N, 1, 1)
    stem : Tensor of shape (N, m, in_features)
    blocks : Tensor of shape (L - 1, N, m, m)
    last : Tensor of shape (N, m, m)
    head : Tensor of shape (N, out_features, m)
    """

    tau: Tensor
    stem: Tensor
    blocks: Tensor
    last: Tensor
    head: Tensor

    @classmethod
    def of(cls, nets: Sequence[TauStack], device: torch.device | str = "cpu") -> Lanes:
        """Copies of the weights of some nets."""

        def stacked(name: str, dim: int = 0) -> Tensor:
            return torch.stack([getattr(net, name).detach() for net in nets], dim).to(device)

        tau = torch.tensor([net.tau for net in nets], dtype=nets[0].last.dtype, device=device)
        return cls(
            tau[:, None, None], stacked("stem"), stacked("blocks", 1), stacked("last"),
            stacked("head"),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.last)

    def some(self, chosen: Tensor) -> Lanes:
        """Those at some positions."""
        return Lanes(
            self.tau[chosen], self.stem[chosen], self.blocks[:, chosen], self.last[chosen],
            self.head[chosen],
        )  # fmt: skip

    def put(self, places: Tensor, lanes: Lanes) -> None:
        """Take over the trained weights of nets that came from these positions."""
        if lanes is not self:
            self.blocks[:, places], self.last[places] = lanes.blocks, lanes.last

    def outputs(self, x: Tensor) -> Tensor:
        """Outputs of shape (N, samples, out_features) for inputs (samples, features)."""
        # Not all samples at once, and no state but the last: test sets are large.
        found = []
        for some in x.split(_EVALUATED):
            h = torch.relu(some @ self.stem.mT)
            for weight in self.blocks:
                h = torch.baddbmm(h, h * self.tau, weight.mT).relu_()
            found.append(torch.relu(h @ self.last.mT) @ self.head.mT)
        return torch.cat(found, dim=1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        """All states, each (N, samples, m): of the stem, of the blocks, and of the last layer."""
        states = [torch.relu(x @ self.stem.mT)]
        for weight in self.blocks:
            h = states[-1]
            # h + tau h W^T
            states.append(torch.baddbmm(h, h * self.tau, weight.mT).relu_())
        states.append(torch.relu(states[-1] @ self.last.mT))
        return states

    def step(self, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Take a step of descent on the mean loss of some samples.

        Parameters
        ----------
        x : Tensor of shape (N, samples, features)
        y : Tensor of shape (N, samples, out_features)
        rate : float
            Learning rate.

        Returns
        -------
        loss : Tensor of shape (N,)
            Before the step.
        outputs : Tensor of shape (N, samples, out_features)
            Before the step.
        """
        states = self._forward(x)
        outputs = states[-1] @ self.head.mT
        error = outputs - y
        loss = error.square().sum((1, 2)) / (2 * x.shape[1])
        size = -rate / x.shape[1]
        g = (error @ self.head) * (states[-1] > 0)
        below = g @ self.last
        self.last.baddbmm_(g.mT, states[-2], alpha=size)
        g = below
        for index in range(len(self.blocks) - 1, -1, -1):
            g = g * (states[index + 1] > 0)
            scaled = g * self.tau
            below = torch.baddbmm(g, scaled, self.blocks[index])
            self.blocks[index].baddbmm_(scaled.mT, states[index], alpha=size)
            g = below
        return loss, outputs


def descend(
    lanes: Lanes,
    batch: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    rate: float,
    num_steps: int,
) -> Tensor:
    """Losses along a descent; infinite from where a net diverged.

    Parameters
    ----------
    lanes : Lanes
        Trained in place; a net that diverged is left as it was when that was seen.
    batch : callable
        Takes a step and the positions of nets, and returns inputs and targets for them, of shape
        (nets, samples, ...).
    rate : float
        Learning rate, for the mean loss.
    num_steps : int

    Returns
    -------
    Tensor of shape (num_steps, N)
        Of the batches, before each step. A net has diverged when its loss is not finite or a
        million times the first; it is left out from then on.
    """
    total, everything = len(lanes), lanes
    losses = torch.full((num_steps, total), math.inf, dtype=lanes.last.dtype)
    losses = losses.to(lanes.last.device)
    alive = torch.arange(total, device=lanes.last.device)
    for step in range(num_steps):
        x, y = batch(step, alive)
        losses[step, alive], _ = lanes.step(x, y, rate)
        if step % _CHECK_EVERY == _CHECK_EVERY - 1 or step == 0:
            good = losses[: step + 1, alive]
            good = (good.isfinite() & (good <= _DIVERGED * losses[0, alive])).all(0)
            good &= lanes.last.isfinite().flatten(1).all(1)
            if not bool(good.all()):
                everything.put(alive, lanes)
                alive, lanes = alive[good], lanes.some(good)
                if not len(alive):
                    break
    everything.put(alive, lanes)
    bad = ~losses.isfinite() | (losses > _DIVERGED * losses[:1])
    return losses.masked_fill(bad.cummax(0).values, math.inf)
