"""Numbers of an earlier replication on MNIST, to be put beside those measured here.

The paper shows curves and no table. These numbers were made for this project before it had this
experiment, by other code: 10,000 images of MNIST, ten principal components, centred and exactly
whitened, 1000 steps of full-batch gradient descent, a logarithmic grid of learning rates (some on a
finer one than here), 10 seeds (3 for ReLU nets on 2000 images, 2 or 5 for spectra). They are for
comparison only: no claim's tolerance rests on them, and other data need not agree with them.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.models.shortcut_kinds import ONE, ORTHOGONAL, THREE, TWO, TWO_XAVIER, XAVIER

NAME = "MNIST 10k, earlier replication"
DEPTHS = (6, 12, 24, 48, 96)
LEAST_LOSS = 0.33429
_INF = float("inf")

#: Mean loss above the least one at the best learning rate, at :data:`DEPTHS`.
EXCESS: Mapping[str, tuple[float, ...]] = {
    TWO: (1.4e-5, 3e-6, 1.3e-5, 2.4e-5, 3e-6),
    ONE: (1.1e-4, 3.0e-4, 4.3e-4, 5.5e-4, 6.7e-4),
    ORTHOGONAL: (2.8e-4, 4.5e-4, 4.8e-4, 9.2e-4, 8.0e-4),
    THREE: (3.1e-4, 1.1e-3, 1.5e-3, 1.5e-3, 4.2e-4),
    XAVIER: (1.6e-3, 2.5e-2, 9.8e-2, 1.4e-1, 1.3e-1),
    TWO_XAVIER: (4.1e-3, 4.7e-2, _INF, _INF, _INF),
}
#: That learning rate.
RATE: Mapping[str, tuple[float, ...]] = {
    TWO: (1.3, 2.4, 2.4, 5.6, 4.2),
    ONE: (0.32, 0.18, 0.10, 0.056, 0.018),
    ORTHOGONAL: (0.32, 0.18, 0.10, 0.056, 0.032),
    THREE: (0.32, 0.32, 0.18, 0.32, 1.0),
    XAVIER: (0.10, 0.056, 0.010, 0.003, 0.03),
}
#: Mean Frobenius norm of the matrices at the end, at that learning rate.
NORM: Mapping[str, tuple[float, ...]] = {
    ONE: (1.35, 0.76, 0.41, 0.22, 0.11),
    TWO: (2.3, 1.9, 1.4, 1.2, 0.8),
    THREE: (2.3, 1.6, 1.1, 0.73, 0.60),
}
RELU_DEPTHS = (6, 12, 24)
#: Mean final loss with a ReLU in the middle, at :data:`RELU_DEPTHS`.
RELU: Mapping[str, tuple[float, ...]] = {
    TWO: (0.158, 0.104, 0.055),
    ORTHOGONAL: (0.160, 0.160, 0.262),
    XAVIER: (0.164, 0.182, 0.406),
}


START_DEPTHS = (2, 4, 8, 16, 32)
#: κ₁₀ at initial weights, at :data:`START_DEPTHS`.
START: Mapping[str, tuple[float, ...]] = {
    TWO: (1.49, 1.49, 1.49, 1.49, 1.49),
    ONE: (3.78, 9.4, 20.6, 42.9, 87.4),
    ORTHOGONAL: (3.7, 9.2, 20.4, 41.6, 86.6),
    XAVIER: (40, 3.6e3, 7e5, 6e8, 2e13),
}
PATH_DEPTH = 12
#: Losses along trainings of that depth, :data:`LEAST_LOSS` included.
PATH_LOSSES = (4.5, 2.0, 1.0, 0.7, 0.55, 0.45, 0.40, 0.37)
#: κ₁₀ at :data:`PATH_LOSSES`: the geometric mean of the ends where a range was noted.
PATH: Mapping[str, tuple[float, ...]] = {
    TWO: (1.4, 4, 12, 30, 71, 300, 1.7e3, 8.9e3),
    ORTHOGONAL: (30, 33, 43, 57, 80, 150, 380, 1.7e3),
}


def tables() -> dict[str, tuple[tuple[int, ...], Mapping[str, tuple[float, ...]]]]:
    """What there is over depth, by what it is called in ``comparison.csv``: depths and values."""
    return {
        "κ₁₀ at initial weights": (START_DEPTHS, START),
        "final loss above the least one": (DEPTHS, EXCESS),
        "best learning rate": (DEPTHS, RATE),
        "mean Frobenius norm": (DEPTHS, NORM),
        "final loss, ReLU in the middle": (RELU_DEPTHS, RELU),
    }
