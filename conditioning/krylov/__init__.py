"""Krylov methods on "a symmetric matvec": linear algebra, no networks."""

from conditioning.krylov.methods import (
    BlockLanczos,
    Lanczos,
    PowerIteration,
    block_lanczos,
    lanczos,
    power_iteration,
)
from conditioning.krylov.run import LanczosRun, make_generator, random_start, start_for

__all__ = [
    "BlockLanczos",
    "Lanczos",
    "LanczosRun",
    "PowerIteration",
    "block_lanczos",
    "lanczos",
    "make_generator",
    "power_iteration",
    "random_start",
    "start_for",
]
