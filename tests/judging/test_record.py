"""What is known of a submission while it is judged: the wall clock over its runs."""

from __future__ import annotations

import pytest

from agentrl.judging.record import Record
from agentrl.judging.verdicts import IOTest, Problem
from agentrl.sandbox import ExecResult, Limits, Sandbox


def _opened(limits: Limits) -> Sandbox:
    raise AssertionError(f"nothing runs here, with {limits}")


def _after(*runs: tuple[float, float], limits: Limits) -> Record:
    """After runs of so many seconds by the wall clock, and of CPU time."""
    problem = Problem(tests=(IOTest(id="t", stdin="", stdout=""),))
    record = Record("", problem, _opened, limits, stop_early=False)
    for wall_s, cpu_s in runs:
        record.add(ExecResult(status="ok", fault="none", wall_ms=wall_s * 1000, cpu_ms=cpu_s * 1000))
    return record


@pytest.mark.parametrize("slower", [1, 5])
def test_work_alone_makes_no_submission_late(slower: int) -> None:
    """A hundred runs within the CPU limit, each on a host as busy as a single one may find it."""
    record = _after(*[(9.0 * slower, 9.0)] * 100, limits=Limits(cpu_s=10, wall_s=50))
    assert not record.is_late
    assert record.left().wall_s == 50


def test_what_waits_in_every_run_has_one_wall_clock() -> None:
    record = _after((20.0, 0.1), (20.0, 0.1), limits=Limits(cpu_s=10, wall_s=50))
    assert record.left().wall_s == pytest.approx(50 - 2 * (20 - 0.5))
    record = _after(*[(20.0, 0.1)] * 3, limits=Limits(cpu_s=10, wall_s=50))
    assert record.is_late
    assert 0 < (record.left().wall_s or 0) < 0.01


def test_work_done_ahead_earns_no_longer_wait() -> None:
    record = _after((9.0, 9.0), (36.0, 0.0), limits=Limits(cpu_s=10, wall_s=50))
    assert record.left().wall_s == 14


def test_without_a_cpu_limit_work_and_waiting_are_the_same() -> None:
    record = _after((3.0, 2.0), limits=Limits(cpu_s=None, wall_s=4))
    assert record.left().wall_s == 1
    assert not record.is_late


def test_without_a_wall_clock_nothing_is_late() -> None:
    limits = Limits(cpu_s=10, wall_s=None)
    record = _after((1e6, 1.0), limits=limits)
    assert not record.is_late
    assert record.left() == limits
