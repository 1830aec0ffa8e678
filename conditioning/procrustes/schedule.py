"""When layers are projected: after which steps of which optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

from conditioning.errors import InvalidArgumentError, OptimizerMismatchError
from conditioning.procrustes.layers import Layer
from conditioning.spectrum.common import check_counts


class Schedule:
    """Counts the steps of optimizers, and says when their layers are to be projected.

    Parameters
    ----------
    act : callable
        Called as ``act(layers, now=...)`` after each step.
    layers : sequence of Layer
    optimizer, every, probability, seed
        As :meth:`Procrustes.attach` takes them.

    Attributes
    ----------
    num_steps : list of int
        Of each optimizer.
    """

    def __init__(
        self,
        act: Callable[..., None],
        layers: Sequence[Layer],
        optimizer: Any,
        every: int,
        probability: float | None,
        seed: int,
    ) -> None:
        check_counts(every=every)
        number = isinstance(probability, Real) and not isinstance(probability, bool)
        if probability is not None and not (number and 0 < float(probability) <= 1):
            msg = f"probability must lie in (0, 1] or be None, got {probability!r}."
            raise InvalidArgumentError(msg)
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            msg = f"seed must be an integer >= 0, got {seed!r}."
            raise InvalidArgumentError(msg)
        several = isinstance(optimizer, Iterable) and not hasattr(optimizer, "step")
        self._optimizers = [unwrapped(one) for one in (optimizer if several else [optimizer])]
        self._layers = _owned(layers, self._optimizers)
        self._act = act
        self.every, self.probability, self.seed = every, probability, seed
        self.num_steps = [0] * len(self._optimizers)
        self._handles: list[Any] = []

    @property
    def options(self) -> dict[str, Any]:
        """What decides after which steps there is a projection, as plain Python."""
        chance = None if self.probability is None else float(self.probability)
        return {"every": int(self.every), "probability": chance, "seed": int(self.seed)}

    def register(self) -> None:
        """Hook into the optimizers. They hold this object from then on, and not the reverse."""
        for place, optimizer in enumerate(self._optimizers):

            def hook(stepped: Any, *_: Any, place: int = place) -> None:
                if not _skipped(stepped):
                    self._after_step(place)

            # A step that is compiled stops before it.
            self._handles.append(optimizer.register_step_post_hook(torch.compiler.disable(hook)))
        self._optimizers = []

    def remove(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _after_step(self, place: int) -> None:
        self.num_steps[place] += 1
        layers, step = self._layers[place], self.num_steps[place]
        if layers:
            self._act(layers, now=step % self.every == 0 and self._drawn(place, step))

    def _drawn(self, place: int, step: int) -> bool:
        if self.probability is None:
            return True
        return bool(np.random.default_rng([self.seed, place, step]).random() < self.probability)


def _skipped(optimizer: Any) -> bool:
    """Whether ``GradScaler`` had a fused optimizer leave its weights as they were.

    Of other optimizers it does not call the step.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that hold it as an attribute.

    Raises
    ------
    OptimizerMismatchError
        If there is none.
    """
    found, seen = optimizer, set()
    while id(found) not in seen:
        seen.add(id(found))
        inner = getattr(found, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            found = inner
    if not isinstance(found, torch.optim.Optimizer):
        msg = (
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, and holds none as "
            f"`optimizer`. Attach to the optimizer, or call project() after each step yourself."
        )
        raise OptimizerMismatchError(msg)
    return found


def _owned(layers: Sequence[Layer], optimizers: list[torch.optim.Optimizer]) -> list[list[Layer]]:
    """Layers by the optimizer that changes their weight."""
    owners = [
        {id(parameter) for group in one.param_groups for parameter in group["params"]}
        for one in optimizers
    ]
    found: list[list[Layer]] = [[] for _ in optimizers]
    missing = []
    for layer in layers:
        place = next((i for i, own in enumerate(owners) if id(layer.weight) in own), None)
        if place is None:
            missing.append(layer.name)
        else:
            found[place].append(layer)
    if missing:
        msg = (
            f"The optimizer does not own the weight of {', '.join(map(repr, missing))}. Attach to "
            f"the one that does (or to all: attach([first, second])), after the model has reached "
            f"its device and its wrapper; frozen layers need project() only once."
        )
        raise OptimizerMismatchError(msg)
    return found
