"""Ctrl-C: pressed twice it means what it means once, and what was measured is still written."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

_SECOND = 2.0  # seconds within which another Ctrl-C is the same wish


class Interrupts:
    """While this is entered Ctrl-C raises ``KeyboardInterrupt``, but not twice in two seconds.

    After :meth:`hold` it raises nothing any more. Outside of the main thread, where Python
    handles no signals, this does nothing.
    """

    def __init__(self) -> None:
        self._held = False
        self._last = -_SECOND
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            self._last = time.monotonic() - _SECOND
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def hold(self) -> None:
        """From now on what is done is finished."""
        self._held = True

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._held and now - self._last >= _SECOND:
            self._last = now
            raise KeyboardInterrupt
