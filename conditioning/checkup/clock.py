"""The budget of a checkup: seconds and products, shared out over its stages."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from conditioning.errors import InvalidArgumentError

DEFAULT_MATVECS = 2000  # of a stage, where neither seconds nor products are limited
_PATIENCE = 2.0  # seconds before a bar shows


class Clock:
    """What is left of a budget, and what was spent by which stage.

    Parameters
    ----------
    seconds : float or None
    num_matvecs : int or None
        Products with all operators together.
    progress : bool
        Show a bar on a terminal, for what takes longer than two seconds.
    """

    def __init__(self, seconds: float | None, num_matvecs: int | None, *, progress: bool) -> None:
        for name, value in (("seconds", seconds), ("num_matvecs", num_matvecs)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                msg = f"{name} must be positive, or None for no limit, got {value!r}."
                raise InvalidArgumentError(msg)
        if num_matvecs is not None and (num_matvecs != int(num_matvecs) or num_matvecs < 50):
            msg = f"num_matvecs must be an integer of at least 50, got {num_matvecs!r}."
            raise InvalidArgumentError(msg)
        self._begin = time.monotonic()
        self._seconds = seconds
        self._num_matvecs = num_matvecs
        self._progress = progress and sys.stderr.isatty()
        self.spent: dict[str, float] = {}
        self.num_matvecs = 0
        self.reached = False  # whether the budget has ended something

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def seconds_left(self, share: float = 1.0) -> float:
        """A share of the seconds that are left; infinite without a limit."""
        if self._seconds is None:
            return float("inf")
        return max(self._seconds - self.elapsed, 0.0) * share

    def matvecs_left(self, share: float = 1.0) -> int:
        """A share of the products that are left."""
        if self._num_matvecs is None:
            return DEFAULT_MATVECS
        return int(max(self._num_matvecs - self.num_matvecs, 0) * share)

    @property
    def is_out(self) -> bool:
        """Whether nothing is left."""
        return self.seconds_left() <= 0 or self.matvecs_left() <= 0

    @property
    def remedy(self) -> str:
        """What would have gone on longer."""
        if self._seconds is None:
            return "the products ended before: give more (num_matvecs)"
        if self._num_matvecs is None or self.seconds_left() < 0.1 * self._seconds:
            return "the budget ended before: give more seconds"
        return "the budget ended before: give more seconds or products (num_matvecs)"

    def deadline(self, share: float) -> Deadline:
        """The end of a share of what is left."""
        return Deadline(self, time.monotonic() + self.seconds_left(share))

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        """Time a stage, under a bar whose ``update`` counts its steps."""
        begin = time.monotonic()
        try:
            with self._bar(name, total, unit) as bar:
                yield bar
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - begin

    def _bar(self, name: str, total: int | None, unit: str) -> Any:
        from tqdm import tqdm

        return tqdm(
            desc=name, total=total, unit=unit, leave=False, dynamic_ncols=True, delay=_PATIENCE,
            disable=not self._progress, file=sys.stderr,
        )  # fmt: skip


class Deadline:
    """Calls as the answer to "should I stop?", and notes that it has said yes."""

    def __init__(self, clock: Clock, end: float) -> None:
        self._clock = clock
        self._end = end

    @property
    def left(self) -> float:
        """Seconds until then; infinite without a limit."""
        return max(self._end - time.monotonic(), 0.0)

    def __call__(self) -> bool:
        """Whether the time is over."""
        over = time.monotonic() >= self._end
        self._clock.reached |= over
        return over
