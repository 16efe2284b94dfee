"""Where the time went: seconds and amounts by metric name, added up until someone takes them.

For one thread. What a device computes is waited for only where ``wait`` says how: a kernel's seconds belong
to the stage that started it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up what happens between two calls of ``take``."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        """``wait`` returns when the device has done what it was given so far."""
        self._wait = wait
        self._totals: dict[str, float] = {}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the block's seconds to ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.count(name, time.perf_counter() - began)

    def count(self, name: str, amount: float) -> None:
        """Add ``amount`` to ``name``."""
        self._totals[name] = self._totals.get(name, 0.0) + amount

    def take(self) -> dict[str, float]:
        """Everything since the last call."""
        taken, self._totals = self._totals, {}
        return taken
