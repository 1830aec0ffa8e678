"""Batches of several ranks side by side, where every step takes one of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conditioning.distributed import Group
from conditioning.operators.batches import Batches


def batches_of(data: Any, group: Group | None, *, mean: bool, **options: Any) -> Batches:
    """Data as batches: of this process, or in step with a group of ranks."""
    if group is None:
        return Batches(data, **options)
    return LockstepBatches(group, data, mean=mean, **options)


class LockstepBatches(Batches):
    """Batches of every rank side by side: one step takes one of each.

    A rank that has no more takes part with its last one, which counts nothing.

    Attributes
    ----------
    share : float
        By what this rank's loss counts in the step that was last begun.
    """

    def __init__(self, group: Group, data: Any, *, mean: bool, **options: Any) -> None:
        # Data that is no data on one rank must not leave the others waiting.
        error = None
        try:
            super().__init__(data, **options)
        except Exception as found:
            error = found
        group.raise_together(error)
        self._group = group
        self._mean = mean
        self.share = 1.0
        self._size = 1.0
        # What several steps take is decided by all: one rank with one batch may have to wait.
        self.single = not group.any(not self.single)

    def __iter__(self) -> Iterator[Any]:
        """Go through the steps once; each rank gets its own batch."""
        own = super().__iter__()
        batch: Any = None
        size, has = 0.0, 1.0
        while True:
            error = None
            try:
                following = next(own, None) if has else None
                has = float(following is not None)
                batch = following if has else batch
                size = has * (super().size(batch) if self._mean else 1.0)
            except Exception as found:
                error = found
            if error is not None:
                self._group.sums([0.0, 0.0, 1.0])
                self._group.raise_together(error)
            total, more, failed = self._group.sums([size, has, 0.0])
            if failed:
                self._group.raise_together(None)
            if not more:
                return
            self._size = total if self._mean else 1.0
            self.share = size / total if self._mean else has
            yield batch

    def size(self, batch: Any) -> float:  # noqa: ARG002 -- of the step, whatever this rank has
        """How much the step that was last begun counts: its samples on all ranks."""
        return self._size
