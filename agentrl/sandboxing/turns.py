"""One run at a time in a session: others wait, and a run's own talk is told that it can't."""

from __future__ import annotations

import threading
from typing import Self

from agentrl.errors import BadConfig

__all__ = ["Turn"]


class Turn:
    """A lock for ``with`` that names its user's mistake where another would wait for itself for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None  # that has it

    def __enter__(self) -> Self:
        """Raises BadConfig in the thread that has it already."""
        if self._thread == threading.get_ident():
            raise BadConfig(
                "a sandbox was used or closed from within the talk of its own run: let the talk return first"
            )
        self._lock.acquire()
        self._thread = threading.get_ident()
        return self

    def __exit__(self, *raised: object) -> None:
        self._thread = None
        self._lock.release()
