"""Teachers, methods, and random starts: what a net of the experiment is, before it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.shortcut_importance.descent import Lanes, Nets
from experiments.store import seed_from


@dataclass(frozen=True)
class Teacher:
    """A family of teachers, one for each number of patches.

    Parameters
    ----------
    name : str
        In cells, tables and figures.
    squared_norm : callable
        ``|a*|^2`` from ``k``.
    share : callable
        ``r = (1^T a*)^2 / (k |a*|^2)`` from ``k``.
    angle : float
        Between the first filter of a net with a shortcut and the teacher's, over pi.
    """

    name: str
    squared_norm: Callable[[int], float]
    share: Callable[[int], float]
    angle: float = 1 / 3

    def parts(self, k: int) -> tuple[float, float]:
        """``S`` and ``C``: norms of the constant part of ``a*`` and of the rest."""
        size, share = self.squared_norm(k), self.share(k)
        return math.sqrt(share * size), math.sqrt((1 - share) * size)


def quarter(k: int) -> float:
    """The share at ``1^T a* = |a*|/4``."""
    return 1 / (16 * k)


UNIT = Teacher("|a*|² = 1", lambda _: 1.0, quarter)
LARGE = Teacher("|a*|² = 64k", lambda k: 64.0 * k, quarter)
LARGE_SUM = Teacher("|a*|² = 64k, r = 0.2", lambda k: 64.0 * k, lambda _: 0.2)
# Beyond the prior of the theorem, which ends at a third of pi.
STEEP = Teacher("|a*|² = 64k, φ₀ = 0.45π", lambda k: 64.0 * k, quarter, 0.45)
STEEPER = Teacher("|a*|² = 16k, φ₀ = 0.48π", lambda k: 16.0 * k, quarter, 0.48)
STEEPEST = Teacher("|a*|² = k^1.5, φ₀ = 0.48π", lambda k: k**1.5, quarter, 0.48)
PRIOR = (UNIT, LARGE, LARGE_SUM)
STRESS = (STEEP, STEEPER, STEEPEST)
TEACHERS: Mapping[str, Teacher] = {teacher.name: teacher for teacher in (*PRIOR, *STRESS)}


@dataclass(frozen=True)
class Method:
    """A net and how it is trained.

    Parameters
    ----------
    name : str
        In cells, tables and figures.
    shortcut : bool
        With one the first filter is ``1/sqrt(p)``, else it is drawn from the sphere.
    warm_up : callable
        Steps of the warm-up from ``k``.
    """

    name: str
    shortcut: bool
    warm_up: Callable[[int], int]


WARM = Method("shortcut, warm-up of 10k² steps", True, lambda k: 10 * k * k)
SHORT = Method("shortcut, warm-up of 1000 steps", True, lambda _: 1000)
COLD = Method("shortcut, no warm-up", True, lambda _: 0)
CNN = Method("no shortcut", False, lambda _: 0)
METHODS: Mapping[str, Method] = {method.name: method for method in (WARM, SHORT, COLD, CNN)}


def generator(**drawn_from: Any) -> torch.Generator:
    """Random numbers that depend on what they are for, and on nothing else."""
    # 32 bits: the generator of the CPU ignores all others.
    return torch.Generator().manual_seed(seed_from(drawn_from))


def normals(source: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def in_ball(source: torch.Generator, count: int, dim: int) -> Tensor:
    """Points ``(count, dim)`` drawn uniformly from the unit ball."""
    rows = on_sphere(source, count, dim)
    radii: Tensor = torch.rand(count, 1, generator=source, dtype=torch.float64) ** (1 / dim)
    return rows * radii


def on_sphere(source: torch.Generator, count: int, dim: int) -> Tensor:
    """Points ``(count, dim)`` drawn uniformly from the unit sphere."""
    rows = normals(source, count, dim)
    size: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / size


def step_sizes(like: Tensor, k: int, warm_up: int) -> dict[str, Tensor]:
    """Rates of lanes or nets: ``1/k^2``, and ``1/k^4`` of the filter in a warm-up."""
    one = torch.ones_like(like)
    return {
        "output_rate": one / k**2, "filter_rate": one / k**2, "warm_rate": one / k**4,
        "warm_up": torch.full(like.shape, warm_up, device=like.device),
    }  # fmt: skip


def make_lanes(
    mean: Tensor, other: Tensor, angle: Tensor | float, k: int, parts: tuple[float, float],
    warm_up: int,
) -> Lanes:  # fmt: skip
    """Lanes of one teacher with the experiment's step sizes."""
    one = torch.ones_like(mean)
    return Lanes(
        mean, other, one * angle, one * k, one * parts[0], one * parts[1],
        **step_sizes(mean, k, warm_up),
    )  # fmt: skip


def against(parts: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The adversarial start of a ball, ``-S a*/|a*|``, as ``s`` and ``c``, each of shape (1,)."""
    place = -parts[0] * torch.tensor(parts, dtype=torch.float64) / math.hypot(*parts)
    return place[:1], place[1:]


def random_lanes(
    teacher: Teacher, method: Method, k: int, p: int, count: int, source: torch.Generator
) -> tuple[Lanes, Tensor]:
    """Random starts of the paper: ``a`` uniform in the ball of radius ``S``.

    In coordinates of which the first two axes lie along the two parts of ``a*``, and the first
    axis of the filter's along the teacher's. The second result is the norm of ``a`` beside these
    two, ``(count,)``.
    """
    parts = teacher.parts(k)
    a = parts[0] * in_ball(source, count, k)
    angle: Tensor | float = math.pi * teacher.angle
    if not method.shortcut:
        u = normals(source, count, p)
        angle = torch.atan2(torch.linalg.vector_norm(u[:, 1:], dim=1), u[:, 0])
    lanes = make_lanes(a[:, 0], a[:, 1], angle, k, parts, method.warm_up(k))
    return lanes, torch.linalg.vector_norm(a[:, 2:], dim=1)


def random_nets(
    teacher: Teacher, method: Method, k: int, p: int, count: int, source: torch.Generator
) -> Nets:
    """The same as vectors, each with a teacher drawn at random."""
    mean, other = teacher.parts(k)
    a_star = teacher_outputs(source, count, k, mean, other)
    first = torch.full((count, p), 1 / math.sqrt(p), dtype=torch.float64)
    # A random direction across the first filter, then so far from the one towards the other.
    across = normals(source, count, p)
    across -= (across * first).sum(1, keepdim=True) * first
    across /= torch.linalg.vector_norm(across, dim=1, keepdim=True)
    phi = math.pi * teacher.angle
    v_star = math.cos(phi) * first + math.sin(phi) * across
    u = first if method.shortcut else on_sphere(source, count, p)
    return Nets(u, mean * in_ball(source, count, k), v_star, a_star)


def teacher_outputs(
    source: torch.Generator, count: int, k: int, mean: float, other: float
) -> Tensor:
    """Outputs ``(count, k)`` with parts of these norms, the rest in a random direction."""
    rest = normals(source, count, k)
    rest -= rest.mean(1, keepdim=True)
    rest /= torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    return mean / math.sqrt(k) + other * rest


def disc(points: int) -> tuple[Tensor, Tensor]:
    """A grid over the unit disc with so many points across, its rim and axes among them."""
    axis = torch.linspace(-1, 1, points, dtype=torch.float64)
    x, y = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    inside = x**2 + y**2 <= 1
    turns = torch.linspace(0, 2 * math.pi, 4 * points + 1, dtype=torch.float64)[:-1]
    return torch.cat([x[inside], turns.cos()]), torch.cat([y[inside], turns.sin()])


def spread(count: int, last: int, first: Sequence[int] = (0,)) -> list[int]:
    """About ``count`` steps up to the last, at equal distances of their logarithms."""
    logs = torch.linspace(0, math.log(last + 1), count, dtype=torch.float64)
    return sorted({*first, *(round(value) - 1 for value in logs.exp().tolist())})
