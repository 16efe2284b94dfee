"""Failures of the world: their boundary, their ledger, and how many are too many."""

from __future__ import annotations

import asyncio

import pytest

from agentrl.errors import EngineError, TooManyInvalid, WorkerLost, WorldError
from agentrl.faults import (
    BOUNDARIES,
    Ledger,
    as_fault,
    blamed_on,
    check_invalid,
    count_call,
    healed,
    in_line,
    in_line_s,
)
from agentrl.threads import in_thread
from agentrl.types import Fault, Group, Message, Task, Trajectory


def episode(boundary: str = "", message: str = "") -> Trajectory:
    return Trajectory(
        task_id="train-3",
        sibling=0,
        seed=0,
        turns=(),
        messages=(Message("user", "?"),),
        stop_reason="fault" if boundary else "answered",
        score=None,
        valid=not boundary,
        fault=boundary,
        faults=(Fault(boundary, message),) if boundary else (),
    )


def group(*episodes: Trajectory) -> Group:
    return Group(Task(id="train-3", prompt=()), episodes)


def test_a_failure_is_blamed_on_the_innermost_boundary_that_it_crosses() -> None:
    with pytest.raises(WorldError) as caught, blamed_on("reward"), blamed_on("tool"):
        raise WorldError("gone")
    assert as_fault(caught.value) == Fault("tool", "gone")
    with pytest.raises(WorldError) as caught, blamed_on("reward"):
        raise WorkerLost("killed")
    assert as_fault(caught.value).boundary == "worker"
    assert as_fault(EngineError("gone")).boundary == "engine"
    assert as_fault(WorldError("gone")).boundary == "environment"
    assert {"tool", "worker", "sandbox", "engine", "environment", "reward"} == set(BOUNDARIES)


def test_a_bug_is_blamed_on_nobody() -> None:
    with pytest.raises(KeyError), blamed_on("tool"):
        raise KeyError("price")


def test_a_ledger_holds_what_happened_on_its_behalf_also_in_threads_and_tasks() -> None:
    async def work(name: str) -> Ledger:
        ledger = Ledger()
        with ledger.opened():
            await asyncio.gather(in_thread(healed, WorkerLost(name)), in_thread(count_call, "late"))
            await asyncio.sleep(0)
            count_call(name)
        return ledger

    async def both() -> list[Ledger]:
        return await asyncio.gather(work("first"), work("second"))

    for name, ledger in zip(("first", "second"), asyncio.run(both()), strict=True):
        assert ledger.faults == [Fault("worker", name)]
        assert ledger.calls == {"late": 1, name: 1}


def test_outside_of_episodes_nothing_is_kept() -> None:
    healed(WorkerLost("killed"))
    count_call("late")
    with (ledger := Ledger()).opened():
        pass
    assert ledger == Ledger()


def test_a_run_stops_above_its_share_of_invalid_episodes_and_names_the_commonest_cause() -> None:
    groups = [
        group(episode(), episode("tool", "no route"), episode("engine", "out of memory")),
        group(episode(), episode("tool", "the sandbox is gone")),
    ]
    check_invalid(groups, most=0.6)
    with pytest.raises(TooManyInvalid) as caught:
        check_invalid(groups, most=0.59)
    said = str(caught.value)
    for part in (
        "3 of 5 episodes",
        "0.59",
        "2 failed",
        "'tool'",
        "the sandbox is gone",
        "'train-3'",
        "--resume",
    ):
        assert part in said


def test_a_step_without_failures_passes_however_strict_a_run_is() -> None:
    check_invalid([group(episode(), episode())], most=0.0)
    check_invalid([], most=0.0)
    with pytest.raises(TooManyInvalid, match="1 of 2"):
        check_invalid([group(episode(), episode("reward", "gone"))], most=0.0)


def test_waits_in_line_are_summed_and_those_at_the_same_time_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("agentrl.faults.time.monotonic", lambda: now)
    with Ledger().opened():
        with in_line():
            now = 1.0
            with in_line():
                now = 3.0
            now = 4.0
        now = 10.0
        assert in_line_s() == 4.0
        with in_line():
            now = 11.0
            assert in_line_s() == 5.0
    with in_line():  # outside of an episode nothing is kept
        assert in_line_s() == 0.0
