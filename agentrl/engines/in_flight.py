"""What is in flight while an engine swaps its weights or is closed: tasks that may be given up, and who uses
a version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from agentrl.errors import EngineError

T = TypeVar("T")

__all__ = ["InFlight", "Users"]


class InFlight:
    """Work that :meth:`abort` may end before its time."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def track(self, work: Coroutine[Any, Any, T], *, aborted: str) -> T:
        """What ``work`` returns; EngineError with the text ``aborted`` where :meth:`abort` ends it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise EngineError(aborted) from None

    async def abort(self) -> None:
        """Give up what is in flight, and wait for its end."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class Users:
    """The requests that are using something."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """One user for as long as the block lasts."""
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._none.set()

    async def gone(self) -> None:
        """Wait until nobody uses it."""
        await self._none.wait()
