"""Verdicts on untrusted code, reached outside of it.

Three zones: a solution runs in a sandbox, the text of tests in another, and this process carries plain data
between them. No exit code, line of output or file made inside is a verdict: that is a record of every test
that was expected, made here or in the tests' own sandbox. Expected values and the text of tests never enter
a solution's sandbox, except for tests marked ``trust="shared"``, whose Judgement says so: there a solution
that means to can make up its verdict.

Limits bound one run: all function tests of a submission together, each program of an IOTest and each test of
a workspace by itself. Only the wall clock is one for all of a submission's runs, so that what waits in every
test goes over its own limit and not over its caller's deadline. CPU time counts first; the wall clock is a
guard, and time spent waiting for a core or a sandbox counts for nothing. A limit that is hit inside is the
submission's own doing. What the world does (SandboxLost) is tried once more in fresh sandboxes and then
raised; it is also the world where a known-good program fails.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

from agentrl.errors import BadConfig
from agentrl.faults import healed, in_line
from agentrl.judging.submission import judge_once
from agentrl.judging.verdicts import (
    AssertTest,
    CallTest,
    FileTests,
    IOTest,
    Judgement,
    Problem,
    Test,
    TestOutcome,
    Verdict,
    problem_from_json,
    problem_to_json,
)
from agentrl.judging.workspace import judge_workspace_once
from agentrl.sandbox import Backend, Limits, Sandbox, SandboxLost
from agentrl.sandboxing.backends import new_backend, shared_backend
from agentrl.threads import usable_cores

__all__ = [
    "AssertTest",
    "CallTest",
    "FileTests",
    "IOTest",
    "Judge",
    "Judgement",
    "Problem",
    "Test",
    "TestOutcome",
    "Verdict",
    "problem_from_json",
    "problem_to_json",
    "shared_judge",
]


class Judge:
    """Judges submissions in fresh sandboxes of one backend. Any number of threads may call.

    ``sandbox``: a backend's name, "auto" for the strongest that this host can enforce, or a backend, which
    stays its owner's to close. ``at_once``: submissions judged at a time; None: one per core, counted over
    all such judges of the process. ``limits``: of each run; those of a submission share one ``wall_s``, which
    waiting uses up and work does not. Raises BadConfig where the backend can't enforce them here.
    """

    def __init__(
        self, sandbox: str | Backend = "auto", *, limits: Limits | None = None, at_once: int | None = None
    ) -> None:
        if at_once is not None and at_once < 1:
            raise BadConfig(f"a judge has at_once={at_once!r}: it is at least 1, or None for one per core")
        self.limits = limits or Limits()
        self._owns = isinstance(sandbox, str)
        self._backend = new_backend(sandbox, self.limits) if isinstance(sandbox, str) else sandbox
        self._places = _cores if at_once is None else threading.Semaphore(at_once)
        self._at_once = at_once or usable_cores()
        self._is_proved, self._proving = False, threading.Lock()
        self._backend.sweep()

    def judge(self, solution: str, problem: Problem, *, stop_early: bool = True) -> Judgement:
        """The verdict on one submission; ``stop_early``: what follows a test that failed is not run.

        Raises SandboxLost where the world failed twice, BadData where a test can't be what it says.
        """
        return self._with_place(
            lambda open_sandbox: judge_once(
                solution, problem, open_sandbox=open_sandbox, limits=self.limits, stop_early=stop_early
            )
        )

    def judge_all(
        self,
        solutions: Sequence[str],
        problem: Problem,
        *,
        stop_early: bool = True,
        deadline_s: float | None = None,
    ) -> list[Judgement]:
        """The verdicts on many submissions to one problem, in their order; equal texts are judged once.

        What has had no turn ``deadline_s`` after the call, and what the world failed twice, comes back with
        the fault "world": it has no verdict and must be left out or judged again, never scored.
        """
        until = None if deadline_s is None else time.monotonic() + deadline_s

        def judged(solution: str) -> Judgement:
            try:
                return self._with_place(
                    lambda open_sandbox: judge_once(
                        solution,
                        problem,
                        open_sandbox=open_sandbox,
                        limits=self.limits,
                        stop_early=stop_early,
                    ),
                    until=until,
                )
            except SandboxLost as error:
                return Judgement(verdict="RE", fault="world", note=str(error))

        distinct = list(dict.fromkeys(solutions))
        with ThreadPoolExecutor(min(self._at_once, len(distinct)) or 1, "agentrl-judge") as pool:
            verdicts = dict(zip(distinct, pool.map(judged, distinct), strict=True))
        return [verdicts[solution] for solution in solutions]

    def judge_files(self, files: Mapping[str, bytes], tests: FileTests) -> Judgement:
        """The verdict on a workspace: the hidden tests run in a fresh sandbox over ``files``.

        Test and solution share a process there, so its trust is "shared". Raises like ``judge``, and
        BadConfig for a file's name that leads out of the workspace.
        """
        return self._with_place(
            lambda open_sandbox: judge_workspace_once(
                files, tests, open_sandbox=open_sandbox, limits=self.limits
            )
        )

    def close(self) -> None:
        """Close the backend if this judge made it; what is being judged raises SandboxLost. Idempotent."""
        if self._owns:
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _with_place(
        self, work: Callable[[Callable[[Limits], Sandbox]], Judgement], *, until: float | None = None
    ) -> Judgement:
        with _place(self._places, until=until) as waited_s:
            try:
                judgement = self._proved(work)
            except SandboxLost as error:
                judgement = self._proved(work)
                healed(error)
        return replace(judgement, queue_ms=judgement.queue_ms + waited_s * 1000)

    def _proved(self, work: Callable[[Callable[[Limits], Sandbox]], Judgement]) -> Judgement:
        """What ``work`` gives where a known-good program is accepted: at first, and after one that went over
        its time, as all do where a machine hangs. Raises SandboxLost."""
        with self._proving:
            if not self._is_proved:
                self._prove()
                self._is_proved = True
        judgement = work(self._backend.open)
        if judgement.verdict == "TLE":
            self._prove()
        return judgement

    def _prove(self) -> None:
        good = judge_once(_GOOD, _PROBE, open_sandbox=self._backend.open, limits=self.limits, stop_early=True)
        if good.verdict != "AC":
            raise SandboxLost(
                f"a known-good program got {good.verdict} in the sandbox {self._backend.name!r}: "
                f"{good.note}; the machine is overloaded, the limits are too low, or there is no python3"
            )


_GOOD = "def double(x):\n    return 2 * x\n"
_PROBE = Problem(entry_point="double", tests=(CallTest(id="probe", args=(21,), expected=42, visible=True),))


@contextmanager
def _place(places: threading.Semaphore, *, until: float | None) -> Iterator[float]:
    """One of the places while it is entered, and the seconds that it took to get one."""
    asked = time.monotonic()
    with in_line():
        in_time = until is None or until > asked
        if not (in_time and places.acquire(timeout=None if until is None else until - asked)):
            raise SandboxLost("no turn before the deadline of its group: ask for fewer, or give it longer")
    try:
        yield time.monotonic() - asked
    finally:
        places.release()


def shared_judge(sandbox: str = "auto", *, limits: Limits | None = None) -> Judge:
    """This process's one judge of that configuration, over its one backend; a forked child has its own."""
    limits = limits or Limits()
    with _shared_lock:
        if (sandbox, limits) not in _shared:
            _shared[sandbox, limits] = Judge(shared_backend(sandbox, limits), limits=limits)
        return _shared[sandbox, limits]


def _start_anew() -> None:
    """In a forked child: sandboxes are the parent's, and its threads' places are taken for ever."""
    global _shared, _shared_lock, _cores
    _shared, _shared_lock, _cores = {}, threading.Lock(), threading.Semaphore(usable_cores())


_cores = threading.Semaphore(usable_cores())
_shared: dict[tuple[str, Limits], Judge] = {}
_shared_lock = threading.Lock()
os.register_at_fork(after_in_child=_start_anew)
