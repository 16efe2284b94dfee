"""Where synchronous work runs beside the event loop, and where asynchronous work runs without one.

``in_thread`` gives every call a daemon thread at once: the pool has as many threads as calls in flight, so a
hung call delays no other, and leaving the program does not wait for it. ``run_sync`` runs a coroutine on one
background loop. ``in_compute_thread`` is where this process does its tensor work. All of them start afresh in
a forked child.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from agentrl.allocator import keep_freed_memory

__all__ = ["in_compute_thread", "in_thread", "run_sync", "threads_in_flight", "usable_cores"]

P = ParamSpec("P")
T = TypeVar("T")

_END_S = 10.0  # for work that was interrupted to close what it has open
_IDLE_S = 30.0  # an unused thread ends after this; new ones cost about 0.1 ms


def usable_cores() -> int:
    """How many logical cores the system schedules this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Await ``function(*args, **kwargs)`` in a daemon thread.

    Cancelling the wait does not stop the function: it runs on, unheard, and frees its thread if it ever ends.
    """
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    # A future of the loop itself: by way of one of concurrent.futures a call costs 60 instead of 30 us.
    answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    _pool.submit(call, answer)
    return await answer


async def in_compute_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Await ``function(*args, **kwargs)`` in the one thread that engine and learner share.

    Every thread that calls a parallel kernel gets a team of OpenMP threads of its own for good, and with more
    such threads than cores each waits for the others asleep instead of spinning: after one checkpoint written
    from another thread, decoding took twice as long on two cores.
    """
    keep_freed_memory()  # before the thread starts: only then it shares the heap that keeps large blocks
    return await asyncio.wrap_future(_compute.submit(function, *args, **kwargs))


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of ``coroutine``, run on the background loop while this thread waits.

    Works whether or not the calling thread has a running event loop of its own. A SystemExit that leaves the
    coroutine is a bug of whoever raised it, RuntimeError here: a tool that runs ``exit()`` ends no program.
    """
    loop = _background_loop()
    if asyncio._get_running_loop() is loop:
        coroutine.close()
        raise RuntimeError(
            "a tool stepped an environment on the loop that runs the tool: await its astep instead"
        )
    begun, ended = threading.Event(), threading.Event()

    async def work() -> T:
        begun.set()
        try:
            return await coroutine
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(work(), loop)
    try:
        return future.result()
    except BaseException as error:
        if future.done() and not future.cancelled() and future.exception() is error:
            if isinstance(error, SystemExit | KeyboardInterrupt):
                raise RuntimeError(f"{error!r} was raised beside the main thread") from error
            raise
        future.cancel()  # Ctrl-C here must end the work there, too; it has things to close
        if begun.is_set():
            ended.wait(_END_S)
        raise


def threads_in_flight() -> int:
    """How many calls of ``in_thread`` have not returned, the ones that nobody waits for any more included."""
    return _pool.busy


class _Pool:
    """Daemon threads, one per call in flight; idle ones are used again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[_Job]] = []
        self.busy = 0

    def submit(self, call: Callable[[], T], answer: asyncio.Future[T]) -> None:
        with self._lock:
            self.busy += 1
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = SimpleQueue()
            threading.Thread(target=self._work, args=(inbox,), name="agentrl-call", daemon=True).start()
        inbox.put((call, answer))

    def _work(self, inbox: SimpleQueue[_Job]) -> None:
        while True:
            try:
                call, answer = inbox.get(timeout=_IDLE_S)
            except Empty:
                with self._lock:
                    if inbox not in self._idle:  # a call was given to this thread just now
                        continue
                    self._idle.remove(inbox)
                return
            _run(call, answer, done=functools.partial(self._rest, inbox))
            del call, answer  # an idle thread keeps no environment alive

    def _rest(self, inbox: SimpleQueue[_Job]) -> None:
        with self._lock:
            self.busy -= 1
            self._idle.append(inbox)


_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]


def _run(call: Callable[[], T], answer: asyncio.Future[T], *, done: Callable[[], None]) -> None:
    """Run ``call``, declare the thread free, then hand over the outcome: the waiter decides about it."""
    if answer.cancelled():  # before it began
        return done()
    try:
        result = call()
    except StopIteration as error:  # asyncio can't carry it: the waiter would never wake
        bug = RuntimeError("a function run in a thread raised StopIteration")
        bug.__cause__ = error
        done()
        _hand_over(answer, answer.set_exception, bug)
    except BaseException as error:
        done()
        _hand_over(answer, answer.set_exception, error)
    else:
        done()
        _hand_over(answer, answer.set_result, result)
        del call, answer, result  # whoever keeps an exception keeps the frames above it, of which this is one


def _hand_over(answer: asyncio.Future[Any], settle: Callable[[Any], None], outcome: Any) -> None:
    def settle_if_awaited() -> None:
        if not answer.done():
            settle(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        answer.get_loop().call_soon_threadsafe(settle_if_awaited)


def _background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_keep_running, args=(_loop,), name="agentrl-loop", daemon=True).start()
        return _loop


def _keep_running(loop: asyncio.AbstractEventLoop) -> None:
    """A SystemExit also leaves the loop of the task that raised it: whoever waits would wait for ever."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue


def _forget_threads() -> None:
    """A forked child has none of its parent's threads."""
    global _pool, _compute, _loop, _loop_lock
    _pool, _compute = _Pool(), ThreadPoolExecutor(1, thread_name_prefix="agentrl-compute")
    _loop, _loop_lock = None, threading.Lock()


_pool: _Pool
_compute: ThreadPoolExecutor
_loop: asyncio.AbstractEventLoop | None
_loop_lock: threading.Lock
_forget_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
