"""Says on what a step waits when nothing in it gets on.

Whoever waits registers while it does; an entry or an exit is progress. It watches from the event loop: code
that blocks the loop itself blocks it, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

__all__ = ["Watchdog"]

_NAMED = 5  # waiting episodes that one report names


class Watchdog:
    """Watches while it is open as an asynchronous context, by one or by several at once."""

    def __init__(self, *, quiet_s: float, on_stall: Callable[[str], None]) -> None:
        """``on_stall`` gets one line after every ``quiet_s`` seconds without progress."""
        self._quiet_s, self._on_stall = quiet_s, on_stall
        self._waiting: dict[object, tuple[float, Callable[[], str]]] = {}  # since when, and for what
        self._moved = time.monotonic()
        self._watch: asyncio.Task[None] | None = None
        self._open = 0  # how many have it open

    @contextmanager
    def waiting(self, describe: Callable[[], str]) -> Iterator[None]:
        """Somebody waits meanwhile; ``describe`` says who for what, as it is when it is asked."""
        key = object()
        self._moved = time.monotonic()
        self._waiting[key] = (self._moved, describe)
        try:
            yield
        finally:
            del self._waiting[key]
            self._moved = time.monotonic()

    def report(self) -> str:
        """Who waits for what, the longest first."""
        now = time.monotonic()
        lines = [f"{describe()} ({now - since:.0f} s)" for since, describe in self._waiting.values()]
        rest = f", and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        waiting = ", ".join(lines[:_NAMED]) or "none waits for anything known"
        return f"no episode got on for {now - self._moved:.0f} s: {waiting}{rest}"

    async def __aenter__(self) -> Self:
        self._moved = time.monotonic()
        self._open += 1
        if self._open == 1:
            self._watch = asyncio.create_task(self._keep_watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open -= 1
        if self._open:
            return
        assert self._watch is not None
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch

    async def _keep_watch(self) -> None:
        reports = 0  # since anything moved
        moved = self._moved
        while True:
            await asyncio.sleep(max(0.0, self._moved + (reports + 1) * self._quiet_s - time.monotonic()))
            if self._moved != moved:
                moved, reports = self._moved, 0
            if time.monotonic() - moved >= (reports + 1) * self._quiet_s:
                reports += 1
                self._on_stall(self.report())
