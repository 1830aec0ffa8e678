"""One training loop for every experiment: deterministic by seed, resumable, never lost to a NaN.

What is trained, on which samples in which order, and with which random numbers follows from the
model, the data, the :class:`Recipe` and the seed alone. A training that diverges ends with a
result that says so: it is an outcome to report, not an error.
"""

from experiments.training.evaluate import evaluate
from experiments.training.recipe import (
    Loss,
    Precision,
    Recipe,
    TrainingError,
    Transform,
    deterministic_kernels,
)
from experiments.training.results import Evaluation, Step, TrainingResult
from experiments.training.trainer import Callback, Stateful, Trainer

__all__ = [
    "Callback",
    "Evaluation",
    "Loss",
    "Precision",
    "Recipe",
    "Stateful",
    "Step",
    "Trainer",
    "TrainingError",
    "TrainingResult",
    "Transform",
    "deterministic_kernels",
    "evaluate",
]
