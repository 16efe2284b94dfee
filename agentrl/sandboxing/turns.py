"""One run at a time in a session: others wait, and a run's own talk is told that it can't."""

from __future__ import annotations

import _thread
from contextlib import suppress
from typing import Self

from agentrl.errors import BadConfig

__all__ = ["Turn"]


class Turn(_thread.RLock):  # type: ignore[misc]
    """A lock for ``with`` that names its user's mistake where another would wait for itself for ever.

    What a signal's handler raises leaves it free: its ``__exit__`` is C's, and nothing comes between.
    """

    def __enter__(self) -> Self:  # type: ignore[override]
        """Raises BadConfig in the thread that has it already."""
        if self._is_owned():  # type: ignore[attr-defined]
            raise BadConfig(
                "a sandbox was used or closed from within the talk of its own run: let the talk return first"
            )
        try:
            self.acquire()
        except BaseException:  # raised before it was had, or after
            with suppress(RuntimeError):
                self.release()
            raise
        return self
