"""What is measured: one function for each kind of cell, from a description to plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditioning import theory
from experiments.shortcut_importance import checks, critical, trainings
from experiments.shortcut_importance.descent import OPEN, OPTIMUM, Fates, Lanes, descend, follow
from experiments.shortcut_importance.setting import (
    METHODS,
    TEACHERS,
    against,
    disc,
    generator,
    in_ball,
    make_lanes,
    random_lanes,
    spread,
)

if TYPE_CHECKING:
    from experiments.shortcut_importance import Sizes

Cell = Mapping[str, Any]
# Descents that are followed have about so many records.
_RECORDS = 160
# Between these, in k^2 steps after the warm-up, what is left is small and far above rounding.
RATE_WINDOW = (30, 40)


class Laboratory:
    """The measurements; there is no data but what is drawn."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        p = sizes.filter_size
        self._kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "gradients": lambda cell: checks.gradients(cell, p, device),
            "monte-carlo": lambda cell: checks.monte_carlo(cell, device),
            "reduction": lambda cell: checks.reduction(cell, p, device),
            "fates": lambda cell: checks.fates(cell, p, device),
            "critical": lambda cell: critical.measure(cell["k"], p, cell["ratio"], device),
            "crossing": lambda cell: critical.crossing(cell["k"], p, device),
            "rates": self.rates,
            "starts": self.starts,
            "time": self.time,
            "edge": self.edge,
            "below": self.below,
            "follow": self.follow,
            "plain": lambda cell: trainings.without_normalisation(cell, p, device),
            "samples": lambda cell: trainings.on_samples(cell, p, device),
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; ``cell["part"]`` says which kind it is."""
        return self._kinds[cell["part"]](cell)

    def _descend(self, lanes: Lanes, **more: Any) -> Fates:
        return descend(lanes.to(self.device), self.sizes.max_steps, **more)

    def rates(self, cell: Cell) -> dict[str, Any]:
        """How many random starts end where, for all numbers of patches at once."""
        teacher, method, count = TEACHERS[cell["teacher"]], METHODS[cell["method"]], cell["seeds"]
        drawn = {key: cell[key] for key in ("part", "teacher", "method", "first")}
        lanes = Lanes.join(
            [
                random_lanes(
                    teacher, method, k, self.sizes.filter_size, count, generator(**drawn, k=k)
                )[0]
                for k in cell["patches"]
            ]
        )
        return by_group(self._descend(lanes), count)

    def starts(self, cell: Cell) -> dict[str, Any]:
        """Where a grid over the ball leads, and the start against the teacher's outputs.

        The grid is one over ``s`` and ``c``, and their rim: no draw from the ball, in most of which
        both are small.
        """
        x, y = disc(cell["points"])
        method, some = METHODS[cell["method"]], []
        teachers = [
            (k, (math.sqrt(size * k * share), math.sqrt(size * k * (1 - share))))
            for size in cell["sizes"]
            for share in cell["shares"]
            for k in cell["patches"]
        ]
        for k, parts in teachers:
            s, c = against(parts)
            s, c = torch.cat([s, parts[0] * x]), torch.cat([c, parts[0] * y])
            some.append(make_lanes(s, c, math.pi / 3, k, parts, method.warm_up(k)))
        fates = self._descend(Lanes.join(some))
        by_teacher = fates.fate.reshape(len(teachers), -1)
        adversarial, grid = by_teacher[:, 0], by_teacher[:, 1:]
        return {
            "adversarial": adversarial,
            "successes": (grid == OPTIMUM).sum(1),
            "starts": grid.shape[1],
            "open": (grid == OPEN).sum(1),
        }

    def time(self, cell: Cell) -> dict[str, Any]:
        """Steps from the adversarial start until all is decided, in the warm-up."""
        some = []
        for k in cell["patches"]:
            parts = math.sqrt(cell["share"] * k), math.sqrt((1 - cell["share"]) * k)
            warm_up = METHODS[cell["method"]].warm_up(k)
            some.append(make_lanes(*against(parts), math.pi / 3, k, parts, warm_up))
        # Looked at often: the steps are the result.
        fates = self._descend(Lanes.join(some), first_look=10, look_again=1.01)
        return {"fates": fates.fate, "steps": fates.step}

    def edge(self, cell: Cell) -> dict[str, Any]:
        """Successes of warm-up at first angles around the largest one that the theory allows."""
        share = cell["share"]
        limits = {k: theory.warm_up_limit(share, k) for k in cell["patches"]}
        angles = [[limit + math.pi * x for x in cell["offsets"]] for limit in limits.values()]
        wrong = [angle for row in angles for angle in row if not 0 < angle < math.pi]
        if wrong:
            msg = f"edge_offsets lead to first angles that are none: {wrong[0]:g}"
            raise ValueError(msg)
        teachers = [(k, share, row) for k, row in zip(limits, angles, strict=True)]
        return {
            "limits": list(limits.values()),
            "angles": angles,
            **self._at_angles(cell, teachers, 1.0),
        }

    def below(self, cell: Cell) -> dict[str, Any]:
        """Successes of warm-up at first angles up to a right one, of teachers of one norm."""
        angles = [math.pi * angle for angle in cell["angles"]]
        teachers = [(k, share, angles) for share in cell["shares"] for k in cell["patches"]]
        return self._at_angles(cell, teachers, cell["size"])

    def _at_angles(
        self, cell: Cell, teachers: Sequence[tuple[int, float, Sequence[float]]], size: float
    ) -> dict[str, Any]:
        """Rows of teachers, columns of angles: random starts, and what the adversarial one does."""
        method, count, some = METHODS[cell["method"]], cell["seeds"], []
        for k, share, angles in teachers:
            parts = math.sqrt(size * k * share), math.sqrt(size * k * (1 - share))
            source = generator(part=cell["part"], size=size, share=share, k=k)
            for angle in angles:
                a = parts[0] * in_ball(source, count, k)
                s, c = against(parts)
                s, c = torch.cat([s, a[:, 0]]), torch.cat([c, a[:, 1]])
                some.append(make_lanes(s, c, angle, k, parts, method.warm_up(k)))
        fate = self._descend(Lanes.join(some)).fate.reshape(len(teachers), -1, count + 1)
        return {
            "adversarial": fate[..., 0],
            "successes": (fate[..., 1:] == OPTIMUM).sum(-1),
            "open": (fate[..., 1:] == OPEN).sum(-1),
            "runs": count,
        }

    def follow(self, cell: Cell) -> dict[str, Any]:
        """Some descents from step to step."""
        teacher, method, k = TEACHERS[cell["teacher"]], METHODS[cell["method"]], cell["k"]
        count, shown = cell["seeds"], slice(0, cell["shown"])
        source = generator(**{key: cell[key] for key in ("part", "teacher", "method", "k")})
        lanes, beside = random_lanes(teacher, method, k, self.sizes.filter_size, count, source)
        lanes, beside = lanes.to(self.device), beside.to(self.device)
        warm_up = method.warm_up(k)
        last = warm_up + cell["length"] * k * k
        window = [warm_up + at * k * k for at in RATE_WINDOW if at <= cell["length"]]
        steps = spread(_RECORDS, last, (0, warm_up, *window))
        states = follow(lanes, steps)
        # Components of a beside the two that count shrink on their own.
        keep = 1 - float(lanes.output_rate[0]) * (math.pi - 1) / (2 * math.pi)
        besides = [beside * keep**step for step in steps]
        away = [_distance(state, rest) for state, rest in zip(states, besides, strict=True)]
        losses = [_loss(state, rest) for state, rest in zip(states, besides, strict=True)]
        size = teacher.squared_norm(k)
        at_end = states[steps.index(warm_up)]
        return {
            "steps": steps,
            "warm_up": warm_up,
            "fate": self._descend(lanes.take(torch.arange(count)[shown])).fate,
            "angle": torch.stack([state.angle[shown] for state in states]),
            "alignment": torch.stack([state.alignment[shown] / size for state in states]),
            "loss": torch.stack([row[shown] for row in losses]) / size,
            "outputs_distance": torch.stack([row[shown] for row in away]) / math.sqrt(size),
            "largest_angle": torch.stack(
                [s.angle for s, step in zip(states, steps, strict=True) if step <= warm_up]
            ).amax(0),
            "warm_alignment": at_end.alignment / size,
            "warm_expected": theory.relaxed_alignment(at_end.angle, teacher.share(k), k),
            "warm_angle": at_end.angle,
            "angle_rate": _rate([states[steps.index(at)].angle for at in window]),
            "outputs_rate": _rate([away[steps.index(at)] for at in window]),
        }  # fmt: skip


def by_group(fates: Fates, size: int) -> dict[str, Any]:
    """Counts of what became of each of several groups of so many lanes."""
    fate, step = fates.fate.reshape(-1, size), fates.step.reshape(-1, size)
    return {
        "successes": (fate == OPTIMUM).sum(1),
        "open": (fate == OPEN).sum(1),
        "runs": size,
        "last_step": step.amax(1),
    }


def _distance(state: Lanes, beside: Tensor) -> Tensor:
    """``|a - a*|``."""
    squares = (state.mean - state.teacher_mean) ** 2 + (state.other - state.teacher_other) ** 2
    return (squares + beside**2).sqrt()


def _loss(state: Lanes, beside: Tensor) -> Tensor:
    return state.loss + (math.pi - 1) / (4 * math.pi) * beside**2


def _rate(ends: list[Tensor]) -> Tensor | None:
    """Decay rate in units of the step size ``1/k^2``; None if the descent is too short for it."""
    if len(ends) < len(RATE_WINDOW):
        return None
    rate: Tensor = (ends[0] / ends[1]).log() / (RATE_WINDOW[1] - RATE_WINDOW[0])
    return rate
