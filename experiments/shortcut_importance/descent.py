r"""Gradient descent of many nets at once: as vectors, and exactly reduced to three numbers.

A *lane* is one net with its teacher, its step sizes and its start; lanes of different numbers of
patches run in one program once each is three numbers (:mod:`conditioning.theory.shortcut_basins`).
The filter is normalised after every step; :func:`descend_vectors` can leave that out.

Lanes are looked at every some hundred steps. One that has entered a set from which there is but
one way, to the global or to the spurious optimum, is decided and taken out: no threshold on angles
or losses says what is a success.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from conditioning import theory
from conditioning.theory.shortcut_importance import gradients_of

# What became of a lane.
OPTIMUM, SPURIOUS, OPEN = 1, -1, 0
_TWO_PI = 2 * math.pi
# Looking costs as much as some ten steps, and more where the device has to be waited for.
_FIRST_LOOK, _LOOK_AGAIN = 50, 1.15


@dataclass(frozen=True)
class Lanes:
    """Nets reduced to three numbers each, their teachers and their step sizes.

    Parameters
    ----------
    mean, other, angle : Tensor of shape (lanes,)
        ``s``, ``c`` and the angle of the nets.
    patches : Tensor of shape (lanes,)
        ``k``.
    teacher_mean, teacher_other : Tensor of shape (lanes,)
        ``S`` and ``C``.
    output_rate, filter_rate : Tensor of shape (lanes,)
        Step sizes of ``a`` and of the filter, after the warm-up.
    warm_rate : Tensor of shape (lanes,)
        Step size of the filter during the warm-up.
    warm_up : Tensor of shape (lanes,)
        Steps of the warm-up, whole numbers.
    """

    mean: Tensor
    other: Tensor
    angle: Tensor
    patches: Tensor
    teacher_mean: Tensor
    teacher_other: Tensor
    output_rate: Tensor
    filter_rate: Tensor
    warm_rate: Tensor
    warm_up: Tensor

    def __post_init__(self) -> None:
        """Check shapes, and step sizes for which the sets of the theory are not left again."""
        shapes = {tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            msg = f"every entry of lanes has one shape (lanes,), got {sorted(shapes)}"
            raise ValueError(msg)
        # Up to rounding, so that the limit itself is allowed.
        stable = self.output_rate * (self.patches + math.pi - 1) <= _TWO_PI * (1 + 1e-12)
        if not bool(stable.all()):
            msg = "step sizes of outputs must not exceed 2 pi/(k + pi - 1)"
            raise ValueError(msg)
        if bool((self.filter_rate < self.warm_rate).any()):
            msg = "the filter's steps must not be larger in a warm-up than after it"
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.mean)

    def take(self, chosen: Tensor) -> Lanes:
        """Some of the lanes, by indices or a mask."""
        return Lanes(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def to(self, device: torch.device | str) -> Lanes:
        """The same on another device."""
        return Lanes(*(getattr(self, field.name).to(device) for field in fields(self)))

    @classmethod
    def join(cls, some: Sequence[Lanes]) -> Lanes:
        """One after the other."""
        return cls(*(torch.cat([getattr(s, f.name) for s in some]) for f in fields(cls)))

    @property
    def alignment(self) -> Tensor:
        """``a^T a*``."""
        return self.mean * self.teacher_mean + self.other * self.teacher_other

    @property
    def share(self) -> Tensor:
        """``r = (1^T a*)^2 / (k |a*|^2)``."""
        return self.teacher_mean**2 / (self.teacher_mean**2 + self.teacher_other**2)

    @property
    def loss(self) -> Tensor:
        """Population loss, but for what other components of ``a`` add."""
        return theory.conv_loss_reduced(
            self.mean, self.other, self.angle, self.patches, self.teacher_mean, self.teacher_other
        )

    def fate(self) -> Tensor:
        """``OPTIMUM``, ``SPURIOUS`` or ``OPEN``, by the sets that descent does not leave."""
        state = (
            self.mean, self.other, self.angle, self.patches, self.teacher_mean, self.teacher_other,
            self.filter_rate,
        )  # fmt: skip
        good, bad = theory.absorbed_by_optimum(*state), theory.absorbed_by_spurious(*state)
        return good.to(torch.int64) * OPTIMUM + bad.to(torch.int64) * SPURIOUS


def advance(lanes: Lanes, first: int, count: int) -> Lanes:
    """So many steps from step ``first`` on, within which no warm-up begins or ends."""
    warming = lanes.warm_up > first
    if bool((warming & (lanes.warm_up < first + count)).any()):
        msg = "a warm-up ends within these steps: cut them there"
        raise ValueError(msg)
    k, big_s, big_c = lanes.patches, lanes.teacher_mean, lanes.teacher_other
    rate = lanes.output_rate / _TWO_PI
    turn_rate = torch.where(warming, lanes.warm_rate, lanes.filter_rate) / _TWO_PI
    keep_s, keep_c = 1 - rate * (k + math.pi - 1), 1 - rate * (math.pi - 1)
    gain_s, gain_c, base_s = rate * big_s, rate * big_c, rate * (k - 1) * big_s
    turn_s, turn_c = turn_rate * big_s, turn_rate * big_c
    s, c, phi = lanes.mean.clone(), lanes.other.clone(), lanes.angle.clone()
    rest = math.pi - phi
    for _ in range(count):
        sine = torch.sin(phi)
        g = torch.cos(phi).mul_(rest).add_(sine)
        turn = (s * turn_s).addcmul_(c, turn_c).mul_(rest).mul_(sine).atan_()
        s.mul_(keep_s).addcmul_(g, gain_s).add_(base_s)
        c.mul_(keep_c).addcmul_(g.sub_(1), gain_c)
        # Below 0 the filter is on the other side of v*, beyond pi on that of -v*.
        torch.sub(math.pi, phi.sub_(turn).abs_(), out=rest).abs_()
        torch.sub(math.pi, rest, out=phi)
    return Lanes(
        s, c, phi, k, big_s, big_c, lanes.output_rate, lanes.filter_rate, lanes.warm_rate,
        lanes.warm_up,
    )  # fmt: skip


@dataclass(frozen=True)
class Fates:
    """What became of every lane.

    Parameters
    ----------
    fate : Tensor of shape (lanes,)
        ``OPTIMUM``, ``SPURIOUS``, or ``OPEN`` if no set was entered in time.
    step : Tensor of shape (lanes,)
        When that was seen; the last step where open.
    """

    fate: Tensor
    step: Tensor

    def successes(self) -> int:
        """How many end at the global optimum."""
        return int((self.fate == OPTIMUM).sum())


def descend(
    lanes: Lanes,
    max_steps: int,
    *,
    first_look: int = _FIRST_LOOK,
    look_again: float = _LOOK_AGAIN,
) -> Fates:
    """Run all lanes until each is decided, or for ``max_steps`` steps.

    Parameters
    ----------
    lanes : Lanes
    max_steps : int
    first_look : int
        Lanes are looked at after so many steps at least,
    look_again : float
        and when the steps have grown by this factor: how exact ``Fates.step`` is.

    Returns
    -------
    Fates
        On the CPU.
    """
    count = len(lanes)
    fate = torch.full((count,), OPEN)
    when = torch.full((count,), max_steps)
    alive = torch.arange(count)
    ends = sorted({int(end) for end in lanes.warm_up.unique().tolist()})
    step = 0
    while True:
        found = lanes.fate().cpu()
        decided = found != OPEN
        fate[alive[decided]], when[alive[decided]] = found[decided], step
        if bool(decided.any()):
            lanes, alive = lanes.take((~decided).to(lanes.mean.device)), alive[~decided]
        if not len(alive) or step >= max_steps:
            return Fates(fate, when)
        target = min(max(step + first_look, int(step * look_again)), max_steps)
        target = min([target, *(end for end in ends if step < end)])
        lanes = advance(lanes, step, target - step)
        step = target


def follow(lanes: Lanes, steps: Sequence[int]) -> list[Lanes]:
    """States at these steps, which ascend; a warm-up may end in between."""
    ends = {int(end) for end in lanes.warm_up.unique().tolist()}
    found, step = [], 0
    wanted = set(steps)
    for target in sorted({*wanted, *(end for end in ends if end < max(wanted))}):
        lanes = advance(lanes, step, target - step)
        step = target
        if step in wanted:
            found.append(lanes)
    return found


# ------------------------------------------------------------------------- as vectors


@dataclass(frozen=True)
class Nets:
    """Nets as vectors, with teachers of the same sizes.

    Parameters
    ----------
    filters, outputs : Tensor of shape (lanes, p) and (lanes, k)
        ``u`` and ``a``.
    teacher_filters, teacher_outputs : Tensor of shape (lanes, p) and (lanes, k)
    """

    filters: Tensor
    outputs: Tensor
    teacher_filters: Tensor
    teacher_outputs: Tensor

    def take(self, chosen: Tensor) -> Nets:
        """Some of the nets, by indices or a mask."""
        return Nets(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def join(cls, some: Sequence[Nets]) -> Nets:
        """One after the other."""
        return cls(*(torch.cat([getattr(s, f.name) for s in some]) for f in fields(cls)))

    @property
    def angle(self) -> Tensor:
        """Between the filters of net and teacher."""
        return theory.angle_between(self.filters, self.teacher_filters)

    @property
    def alignment(self) -> Tensor:
        """``a^T a*``."""
        return (self.outputs * self.teacher_outputs).sum(-1)

    def to(self, device: torch.device | str) -> Nets:
        """The same on another device."""
        return Nets(*(getattr(self, field.name).to(device) for field in fields(self)))

    def reduce(self, **rates: Tensor) -> Lanes:
        """The same as three numbers each; ``rates`` are the other entries of :class:`Lanes`."""
        a, a_star = self.outputs, self.teacher_outputs
        k = a.shape[-1]
        total = a_star.sum(-1)
        rest = a_star - a_star.mean(-1, keepdim=True)
        size = torch.linalg.vector_norm(rest, dim=-1)
        along = (a * rest).sum(-1) / torch.where(size > 0, size, 1.0)
        sign = torch.where(total < 0, -1.0, 1.0).to(a)
        return Lanes(
            sign * a.sum(-1) / math.sqrt(k), along, self.angle,
            torch.full_like(size, k), total.abs() / math.sqrt(k), size, **rates,
        )  # fmt: skip


def descend_vectors(
    nets: Nets,
    output_rate: Tensor,
    filter_rates: Sequence[tuple[int, Tensor]],
    *,
    normalised: bool = True,
) -> Nets:
    """Gradient descent by the closed form of the gradients.

    Parameters
    ----------
    nets : Nets
    output_rate : Tensor of shape (lanes,)
        Step size of ``a``.
    filter_rates : sequence of (int, Tensor)
        Stages: so many steps with these step sizes of ``w``.
    normalised : bool
        Whether the net divides its filter by its norm, and every step is followed by one that
        gives it norm 1.
    """
    u, a = nets.filters, nets.outputs
    teacher = nets.teacher_filters, nets.teacher_outputs
    for count, rate in filter_rates:
        for _ in range(count):
            in_u, in_a = gradients_of(u, a, *teacher, normalised=normalised)
            u, a = u - rate[:, None] * in_u, a - output_rate[:, None] * in_a
            if normalised:
                u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return Nets(u, a, *teacher)
