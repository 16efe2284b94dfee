"""Ctrl-C and SIGTERM as a request that a loop reads when it suits it, or as an exception at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "StopSignal"]


class Interrupted(KeyboardInterrupt):
    """A signal that ended the work at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number  # of the signal


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM while it is held into a request; any other raises Interrupted.

    Works in the main thread; elsewhere signals do what they did before.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that asks to stop
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this is open a signal waits; outside it interrupts."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None or not self._held:
            raise Interrupted(number)
        self.number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
