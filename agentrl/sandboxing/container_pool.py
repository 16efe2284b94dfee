"""Containers kept ready, and the threads that make and remove them beside their users.

A container is handed out once. Making waits its turn, since an engine that makes many at once takes longer
for each; what waits for removal is bounded, and so is the number of shapes that are kept.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from agentrl.errors import BadConfig
from agentrl.sandbox import SandboxLost
from agentrl.sandboxing.container_engine import Container, Engine, Shape

__all__ = ["Crew", "Pool"]

_MOST_SHAPES = 4  # of which containers are kept ready
_MOST_LEAVING = 16  # containers that wait for their removal, before closing a session waits too
_LEAVE_S = 60.0


class Crew:
    """A bounded number of threads for what need not be waited for; they end when there is nothing to do."""

    def __init__(self, *, at_once: int) -> None:
        self._at_once = at_once
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._changed = threading.Condition()

    def do(self, *jobs: Callable[[], None]) -> None:
        """Have them done."""
        with self._changed:
            self._jobs += jobs
            for _ in jobs:
                if len(self._threads) < self._at_once:
                    self._start()

    def join(self, until: float, *, most: int = 0) -> None:
        """Wait until at most ``most`` jobs are waiting or being done."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._jobs) + len(self._threads) <= most, max(until - time.monotonic(), 0)
            )

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="agentrl-docker")
        self._threads.add(thread)
        try:
            thread.start()
        except BaseException:  # no room for one, or a signal's handler
            self._threads.discard(thread)
            raise

    def _work(self) -> None:
        """Until nothing is left. What a job raises ends this thread, which says so; another goes on."""
        try:
            while (job := self._next()) is not None:
                job()
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())
                self._changed.notify_all()
                if self._jobs and len(self._threads) < self._at_once:
                    self._start()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._changed.notify_all()
            if self._jobs:
                return self._jobs.popleft()
            self._threads.discard(threading.current_thread())  # before a job comes that nobody would do
            return None


class Pool:
    """Containers that are ready, by shape, refilled in the background; at size 0 none are."""

    def __init__(self, engine: Engine, crew: Crew, *, size: int) -> None:
        self._engine, self._crew, self._size = engine, crew, size
        self._ready: OrderedDict[Shape, deque[Container]] = OrderedDict()
        self._coming: dict[Shape, int] = {}
        self._at_once = max(os.cpu_count() or 1, 2)  # more take longer each
        self._making = threading.Semaphore(self._at_once)
        self._lock = threading.Lock()
        self._is_closed = False

    def take(self, shape: Shape) -> Container:
        """A fresh one, ready or made now; waits its turn. Raises SandboxLost and BadConfig."""
        try:
            while (container := self._pop(shape)) is not None:
                if container.link.is_fresh():
                    return container
                self.leave(container)  # the engine was stopped meanwhile
            return self._make(shape)
        finally:
            self._refill(shape)

    def leave(self, container: Container) -> None:
        """Have it removed soon; what it waits for is dead at once."""
        container.link.close()
        self._crew.do(lambda: self._remove(container.id))
        self._crew.join(time.monotonic() + _LEAVE_S, most=_MOST_LEAVING)

    def close(self) -> None:
        """Keep nothing ready any more, and wait for what is being made."""
        with self._lock:
            self._is_closed = True
            ready = [container for containers in self._ready.values() for container in containers]
            self._ready.clear()
        for container in ready:
            self.leave(container)
        for _ in range(self._at_once):  # whoever is making one now sees that it is too late
            self._making.acquire(timeout=_LEAVE_S)
        for _ in range(self._at_once):
            self._making.release()

    def _pop(self, shape: Shape) -> Container | None:
        with self._lock:
            ready = self._ready.get(shape)
            return ready.popleft() if ready else None

    def _make(self, shape: Shape) -> Container:
        with self._making:
            self._check_open()
            container = self._engine.create(shape)
            try:
                self._check_open()  # still
            except SandboxLost:
                container.link.close()
                self._remove(container.id)
                raise
            return container

    def _check_open(self) -> None:
        with self._lock:
            if self._is_closed:
                raise SandboxLost("this docker backend is closed: make another")

    def _remove(self, container: str) -> None:
        with suppress(
            SandboxLost
        ):  # its connection is closed, so it ends, and the engine removes it by itself
            self._engine.remove(container)

    def _refill(self, shape: Shape) -> None:
        """Order what is missing, and drop what has not been asked for longest."""
        dropped: list[Container] = []
        with self._lock:
            if self._is_closed or not self._size:
                return
            ready = self._ready.setdefault(shape, deque())
            self._ready.move_to_end(shape)
            while len(self._ready) > _MOST_SHAPES:
                dropped += self._ready.popitem(last=False)[1]
            lacking = self._size - len(ready) - self._coming.get(shape, 0)
            self._coming[shape] = self._coming.get(shape, 0) + max(lacking, 0)
        self._crew.do(*[partial(self._fill, shape)] * lacking)
        for container in dropped:
            self.leave(container)

    def _fill(self, shape: Shape) -> None:
        container = None
        try:
            with suppress(SandboxLost, BadConfig):  # whoever needs one learns of it
                container = self._make(shape)
        finally:
            with self._lock:
                self._coming[shape] -= 1
        with self._lock:
            ready = self._ready.get(shape)
            if container is not None and ready is not None and not self._is_closed:
                ready.append(container)
                return
        if container is not None:
            container.link.close()
            self._remove(container.id)
