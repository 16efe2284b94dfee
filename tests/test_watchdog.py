"""Who waits for what, said when nothing gets on."""

from __future__ import annotations

import asyncio

from agentrl.watchdog import Watchdog


def test_a_quiet_step_says_who_waits_for_what() -> None:
    said: list[str] = []
    reported = asyncio.Event()

    def on_stall(text: str) -> None:
        said.append(text)
        reported.set()

    async def stall() -> None:
        async with Watchdog(quiet_s=0.02, on_stall=on_stall) as watchdog:
            with watchdog.waiting(lambda: "task 'train-1', on the engine"):
                await asyncio.wait_for(reported.wait(), 30)

    asyncio.run(stall())
    assert "no episode got on" in said[0]
    assert "task 'train-1', on the engine" in said[0]


def test_a_stall_is_reported_again_while_it_lasts() -> None:
    said: list[str] = []
    enough = asyncio.Event()

    def on_stall(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            enough.set()

    async def stall() -> None:
        async with Watchdog(quiet_s=0.01, on_stall=on_stall) as watchdog:
            with watchdog.waiting(lambda: "nothing moves"):
                await asyncio.wait_for(enough.wait(), 30)

    asyncio.run(stall())
    assert len(said) >= 3


def test_progress_keeps_it_silent() -> None:
    said: list[str] = []

    async def busy() -> None:
        async with Watchdog(quiet_s=60.0, on_stall=said.append) as watchdog:
            for _ in range(100):
                with watchdog.waiting(lambda: "a moment"):
                    await asyncio.sleep(0)

    asyncio.run(busy())
    assert said == []


def test_a_report_names_the_longest_waits_and_counts_the_others() -> None:
    async def many() -> str:
        watchdog = Watchdog(quiet_s=60.0, on_stall=lambda text: None)
        waits = [watchdog.waiting(lambda index=index: f"task {index}") for index in range(8)]  # type: ignore[misc]
        for wait in waits:
            wait.__enter__()
        waits[0].__exit__(None, None, None)
        return watchdog.report()

    report = asyncio.run(many())
    assert "task 0" not in report
    assert [f"task {index}" in report for index in range(1, 8)] == [True] * 5 + [False] * 2
    assert report.endswith("and 2 more")


def test_one_watch_is_kept_for_all_who_have_it_open_and_ends_with_the_last() -> None:
    said: list[str] = []
    reported = asyncio.Event()

    def on_stall(text: str) -> None:
        said.append(text)
        reported.set()

    async def shared() -> None:
        watchdog = Watchdog(quiet_s=0.02, on_stall=on_stall)
        async with watchdog:
            async with watchdog:
                assert len(asyncio.all_tasks()) == 2
            await asyncio.wait_for(reported.wait(), 30)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(shared())
    assert said
