"""Threads beside the event loop, and one event loop beside the threads."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from agentrl.threads import in_thread, run_sync, threads_in_flight

_ROOT = Path(__file__).parent.parent


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=20
    )


def test_as_many_calls_run_at_once_as_are_made() -> None:
    meeting = threading.Barrier(40, timeout=10)

    async def together() -> None:
        await asyncio.gather(*(in_thread(meeting.wait) for _ in range(40)))

    asyncio.run(together())


def test_calls_one_after_the_other_share_a_thread() -> None:
    async def twice() -> tuple[int, int]:
        return await in_thread(threading.get_ident), await in_thread(threading.get_ident)

    first, second = asyncio.run(twice())
    assert first == second != threading.get_ident()


def test_a_call_that_nobody_waits_for_is_still_counted() -> None:
    release = threading.Event()

    async def give_up() -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_thread(release.wait, 10), 0.01)
        return threads_in_flight()

    before = threads_in_flight()
    assert asyncio.run(give_up()) == before + 1
    release.set()
    deadline = time.monotonic() + 5
    while threads_in_flight() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threads_in_flight() == before


def test_what_a_call_raises_reaches_the_waiter() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(lambda: 1 // 0))


def test_an_exception_that_is_kept_keeps_no_result_of_the_call_that_caught_it() -> None:
    kept: list[BaseException] = []

    class Result:
        pass

    def call() -> Result:
        try:
            raise ValueError
        except ValueError as error:
            kept.append(error)
        return Result()

    result = asyncio.run(in_thread(call))
    seen = weakref.ref(result)
    del result
    gc.collect()
    assert kept
    assert seen() is None


def test_a_call_sees_the_context_of_its_caller() -> None:
    episode = contextvars.ContextVar("episode", default=0)
    episode.set(7)
    assert asyncio.run(in_thread(episode.get)) == 7


def test_run_sync_waits_for_a_coroutine_also_under_a_running_loop() -> None:
    async def inner() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    async def outer() -> str:
        return run_sync(inner())

    assert run_sync(inner()) == asyncio.run(outer()) == "agentrl-loop"


def test_an_interrupt_comes_out_when_the_work_has_closed_what_it_had_open() -> None:
    closed = []
    main = threading.main_thread().ident
    assert main is not None

    async def work() -> None:
        threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.3)
            closed.append("everything")
            raise

    with pytest.raises(KeyboardInterrupt):
        run_sync(work())
    assert closed == ["everything"]


def test_run_sync_on_its_own_loop_is_refused_and_does_not_hang() -> None:
    async def inner() -> None: ...

    async def outer() -> None:
        run_sync(inner())

    with pytest.raises(RuntimeError, match="await its astep instead"):
        run_sync(outer())


@pytest.mark.parametrize("end", [SystemExit(0), KeyboardInterrupt()])
def test_what_would_end_the_program_beside_the_main_thread_is_a_bug_and_ends_no_loop(
    end: BaseException,
) -> None:
    def leave() -> None:
        raise end

    async def leave_at_once() -> None:
        leave()

    for leaving in (in_thread(leave), leave_at_once()):
        with pytest.raises(RuntimeError, match="beside the main thread") as caught:
            run_sync(asyncio.wait_for(leaving, 10))
        assert caught.value.__cause__ is end
    assert run_sync(in_thread(lambda: 7)) == 7


def test_leaving_the_program_does_not_wait_for_a_hung_call() -> None:
    code = """
import asyncio, time
from agentrl.threads import in_thread

async def main():
    try:
        await asyncio.wait_for(in_thread(time.sleep, 60), 0.05)
    except TimeoutError:
        print("gave up")

asyncio.run(main())
"""
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "gave up\n"), done.stderr


def test_a_forked_child_has_threads_and_a_loop_of_its_own() -> None:
    code = """
import os
from agentrl.threads import in_thread, run_sync

run_sync(in_thread(int))
child = os.fork()
if child == 0:
    os._exit(run_sync(in_thread(lambda: 7)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = python(code)
    assert done.stdout == "7\n", done.stderr
