"""Work ahead: bounded, in order, and nothing of it is lost or left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from agentrl.ahead import Ahead


class Work:
    """Steps that begin when they are asked to and end when they are let."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []  # cancelled or not
        self._gates: dict[int, asyncio.Future[None]] = {}

    def gate(self, step: int) -> asyncio.Future[None]:
        """Done: the step returns; with an exception: it raises."""
        return self._gates.setdefault(step, asyncio.get_running_loop().create_future())

    async def __call__(self, step: int) -> str:
        self.begun.append(step)
        try:
            await self.gate(step)
        finally:
            await asyncio.sleep(0)  # as where an environment is closed
            self.ended.append(step)
        return f"step {step}"


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("most", "begun"), [(0, [4]), (2, [4, 5, 6])])
def test_so_many_steps_are_begun_behind_the_one_that_is_asked_for_and_no_more(
    most: int, begun: list[int]
) -> None:
    async def test() -> None:
        work = Work()
        async with Ahead(work, range(4, 9), most=most) as ahead:
            assert work.begun == []
            for step in (4, 5):
                work.gate(step).set_result(None)
            assert await ahead.next() == "step 4"
            await settle()
            assert work.begun == begun
            assert await ahead.next() == "step 5"
            await settle()
            assert work.begun == [4, *(step + 1 for step in begun)]

    run(test())


def test_results_come_in_the_steps_order_whichever_is_ready_first() -> None:
    async def test() -> None:
        work = Work()
        async with Ahead(work, range(3), most=2) as ahead:
            for step in (2, 1):
                work.gate(step).set_result(None)
            first = asyncio.create_task(ahead.next())
            await settle()
            assert not first.done()
            work.gate(0).set_result(None)
            assert [await first, await ahead.next(), await ahead.next()] == ["step 0", "step 1", "step 2"]
            with pytest.raises(IndexError):
                await ahead.next()

    run(test())


def test_a_failure_ahead_is_raised_while_an_earlier_step_is_waited_for() -> None:
    work = Work()

    async def fail() -> None:
        async with Ahead(work, range(5), most=2) as ahead:
            waiting = asyncio.create_task(ahead.next())
            await settle()
            work.gate(2).set_exception(ZeroDivisionError())
            await waiting

    with pytest.raises(ZeroDivisionError):
        run(fail())
    assert sorted(work.ended) == work.begun == [0, 1, 2]


def test_a_failure_ahead_is_raised_when_the_next_step_is_asked_for() -> None:
    work = Work()

    async def fail() -> None:
        async with Ahead(work, range(5), most=2) as ahead:
            for step in (0, 1):
                work.gate(step).set_result(None)
            await ahead.next()
            work.gate(2).set_exception(ZeroDivisionError())
            await settle()
            await ahead.next()

    with pytest.raises(ZeroDivisionError):
        run(fail())


def test_what_is_in_flight_has_ended_when_the_context_has() -> None:
    async def test() -> None:
        work, before = Work(), asyncio.all_tasks()
        async with Ahead(work, range(5), most=2) as ahead:
            work.gate(0).set_result(None)
            await ahead.next()
            await settle()
        assert (work.begun, work.ended) == ([0, 1, 2], [0, 1, 2])
        assert asyncio.all_tasks() == before

    run(test())


@pytest.mark.parametrize(("own", "raised"), [(None, ZeroDivisionError), (KeyError, KeyError)])
def test_a_failure_that_nobody_asked_for_is_raised_at_the_end_unless_the_caller_failed(
    own: type[Exception] | None, raised: type[Exception]
) -> None:
    work = Work()

    async def fail() -> None:
        async with Ahead(work, range(5), most=2) as ahead:
            work.gate(0).set_result(None)
            await ahead.next()
            work.gate(1).set_exception(ZeroDivisionError())
            await settle()
            if own is not None:
                raise own

    with pytest.raises(raised):
        run(fail())
    assert work.ended == [0, 1, 2]
