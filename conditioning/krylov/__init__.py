"""Krylov methods on "a symmetric matvec": linear algebra, no networks."""

from conditioning.krylov.block import BlockLanczos, BlockRun, block_lanczos
from conditioning.krylov.methods import Lanczos, PowerIteration, lanczos, power_iteration
from conditioning.krylov.run import LanczosRun, make_generator, random_start, start_for

__all__ = [
    "BlockLanczos",
    "BlockRun",
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
