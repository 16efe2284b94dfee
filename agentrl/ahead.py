"""Work on the steps to come: begun in the steps' order, a bounded number ahead, handed over in that order.

What fails ahead of its turn is raised when the next step is asked for, or at once where that is being waited
for: nothing goes on for hours beside a bug. Nothing outlives the context: what is in flight is cancelled
there and has ended, its environments closed, before anything after it runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

__all__ = ["Ahead"]


class Ahead(Generic[T]):
    """Runs ``work(step)`` for ``steps``, at most ``most`` of them beside the one that is asked for."""

    def __init__(
        self, work: Callable[[int], Coroutine[Any, Any, T]], steps: Iterable[int], *, most: int
    ) -> None:
        self._work, self._steps, self._most = work, deque(steps), most
        self._begun: deque[asyncio.Task[T]] = deque()  # in the order of their steps

    async def next(self) -> T:
        """What the next step's work returned; the ``most`` steps behind it are begun, too, and go on
        afterwards.

        Raises what any of them raised, IndexError behind the last step.
        """
        while len(self._begun) <= self._most and self._steps:
            self._begun.append(asyncio.create_task(self._work(self._steps.popleft())))
        while True:
            for task in self._begun:
                if task.done():
                    task.result()
            if self._begun[0].done():
                return self._begun.popleft().result()
            waiting = [task for task in self._begun if not task.done()]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises what the work of a step raised that nobody asked for any more, unless something else is
        raised already."""
        for task in self._begun:
            task.cancel()
        if self._begun:
            await asyncio.wait(self._begun)
        failures = [task.exception() for task in self._begun if not task.cancelled()]
        for failure in failures:
            if failure is not None and error is None:
                raise failure
