"""What is known of a submission while it is judged, and what the ends of its runs mean.

Every test gets an outcome: by an answer that came in time, else by how the run ended; what was never run is
failed as well. Flags are telemetry: no verdict depends on them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agentrl.judging.verdicts import AssertTest, Judgement, Problem, Test, TestOutcome, Trust, Verdict
from agentrl.sandbox import ExecResult, Limits, Sandbox, SandboxLost

__all__ = ["Record", "how_it_ended", "is_over_cpu", "signs_in", "verdict_of"]

_MOST_NOTE = 400  # characters of a note
_LEAST_S = 0.001  # of a run: no limit may be nothing
_VERDICTS: Mapping[str, Verdict] = {"cpu": "TLE", "wall": "TLE", "memory": "MLE", "output": "OLE"}
# Telemetry: what a submission printed, and what stands in it, that no honest one needs.
# Repeats are bounded: this is read in the host's process, of whatever a submission prints.
_MARKERS = re.compile(
    rb"\b\d{1,9} passed(?:, \d{1,9} \w{1,20}){0,8} in \d|^Ran \d{1,9} tests? in |^OK$|\ball tests passed\b",
    re.M | re.I,
)
_SIGNS = {
    "frames": re.compile(
        r"\b_getframe\b|\bget_objects\b|\bget_referrers\b|\bcurrentframe\b|\binspect\.stack\b"
    ),
    "hooks": re.compile(r"\bconftest\b|\bsitecustomize\b|\busercustomize\b"),
    "proc": re.compile(r"/proc/"),
}


@dataclass(slots=True)
class Record:
    """What is known so far of a submission."""

    solution: str
    problem: Problem
    open: Callable[[Limits], Sandbox]
    limits: Limits
    stop_early: bool
    outcomes: dict[str, TestOutcome] = field(default_factory=dict)
    results: list[ExecResult] = field(default_factory=list)  # without what was printed
    flags: set[str] = field(default_factory=set)
    compiled: bool = True
    has_failed: bool = False
    note: str = ""

    def enter(self, test: Test, verdict: Verdict, note: str = "", *, ran: bool = True) -> None:
        """Write an outcome down; the note only where the policy may see the test."""
        self.has_failed |= verdict != "AC"
        shown = _writable(note) if test.visible else ""
        self.outcomes[test.id] = TestOutcome(
            id=test.id, verdict=verdict, visible=test.visible, note=shown, ran=ran
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing more need be run."""
        return self.stop_early and self.has_failed

    @property
    def is_late(self) -> bool:
        """Whether the submission's runs have used up its wall clock."""
        return self._left_s <= 0

    def left(self) -> Limits:
        """The limits of the submission's next run."""
        if self.limits.wall_s is None:
            return self.limits
        return replace(self.limits, wall_s=min(self.limits.wall_s, max(self._left_s, _LEAST_S)))

    @property
    def _left_s(self) -> float:
        """Of one wall clock over all runs. What counts of a run is what it took beyond its work on as busy a
        host as a single run stands: many honest runs are not late, many that wait are."""
        if self.limits.wall_s is None:
            return math.inf
        slower = self.limits.wall_s / self.limits.cpu_s if self.limits.cpu_s else 0.0
        waited_ms = sum(max(result.wall_ms - slower * result.cpu_ms, 0) for result in self.results)
        return self.limits.wall_s - waited_ms / 1000

    def add(self, result: ExecResult, *, expected: str = "") -> ExecResult:
        """Count a run of the solution; ``expected``: what it is to print. Raises SandboxLost where the world
        ended it."""
        if result.status == "lost":
            raise SandboxLost("a sandbox went away while a submission was judged in it")
        self.results.append(replace(result, stdout=b"", stderr=b""))  # which may be megabytes of each run
        self.flags |= {*result.flags}
        printed = b"" if _MARKERS.search(expected.encode(errors="replace")) else result.stdout
        if _MARKERS.search(printed) or _MARKERS.search(result.stderr):
            self.flags.add("runner_markers")
        return result

    def settle(self, tests: Sequence[Test], result: ExecResult, *, garbled: bool = False) -> None:
        """Enter what is missing of ``tests`` after the solution's run, whose limits count in any case."""
        missing = [test for test in tests if test.id not in self.outcomes]
        limit = (
            verdict_of(result, self.limits)
            if result.status != "ok" or is_over_cpu(result, self.limits)
            else "AC"
        )
        if not missing:
            if (
                limit in _VERDICTS.values()
                and not self.is_over
                and self.outcomes[tests[-1].id].verdict == "AC"
            ):
                self.enter(tests[-1], limit)
            return
        if self.is_over:  # the rest was not asked for
            return
        if garbled:
            self.flags.add("garbled")
        elif result.status == "ok":
            self.flags.add("exit_early")
        verdict: Verdict = "RE" if garbled or limit == "AC" else limit
        self.enter(missing[0], verdict, how_it_ended(result, verdict))
        for test in missing[1:]:
            self.enter(test, verdict, ran=False)

    def refuse(self, loaded: list[Any], tests: Sequence[Test]) -> None:
        """Fail all tests, since the program could not be loaded."""
        kind, *said = loaded
        verdict: Verdict = "CE" if kind == "syntax" else "RE"
        self.compiled = self.compiled and kind != "syntax"
        text = ": ".join(str(part) for part in said if type(part) is str)
        self.note = _writable(f"no function named {self.problem.entry_point}" if kind == "missing" else text)
        if kind == "raised" and said[:1] == ["SystemExit"]:
            self.flags.add("exit_early")
        for test in tests:
            self.enter(test, verdict, self.note, ran=False)

    def judgement(self) -> Judgement:
        """What is known at the end."""
        first = next((outcome.verdict for outcome in self.outcomes.values() if outcome.verdict != "AC"), None)
        for test in self.problem.tests:
            if test.id not in self.outcomes:
                self.enter(test, first or "RE", ran=False)
        failed = next((outcome for outcome in self.outcomes.values() if outcome.verdict != "AC"), None)
        outcomes = tuple(self.outcomes[test.id] for test in self.problem.tests)
        shared = any(isinstance(test, AssertTest) and test.trust == "shared" for test in self.problem.tests)
        trust: Trust = "shared" if shared else "remote"
        note = self.note or (failed.note if failed else "")
        return Judgement(
            verdict=failed.verdict if failed else "AC",
            fault="policy" if failed else "none",
            outcomes=outcomes,
            compiled=self.compiled,
            flags=tuple(sorted(self.flags | signs_in(self.solution))),
            trust=trust,
            cpu_ms=sum(result.cpu_ms for result in self.results),
            wall_ms=sum(result.wall_ms for result in self.results),
            queue_ms=sum(result.queue_ms for result in self.results),
            peak_bytes=max((result.peak_bytes for result in self.results), default=0),
            note=note or ("a hidden test failed" if failed else ""),
        )


def _writable(note: str) -> str:
    """As much of ``note`` as is kept, without what no file takes: lone surrogates."""
    return note[:_MOST_NOTE].encode("utf-8", "replace").decode()


# -- what a run means --


def verdict_of(result: ExecResult, limits: Limits) -> Verdict:
    """Of a run that ended before it had said what it should: the limit that it hit, else RE."""
    return "TLE" if is_over_cpu(result, limits) else _VERDICTS.get(result.status, "RE")


def is_over_cpu(result: ExecResult, limits: Limits) -> bool:
    # Between two looks at the clock a program can end that was over.
    return limits.cpu_s is not None and result.cpu_ms > limits.cpu_s * 1000


def how_it_ended(result: ExecResult, verdict: Verdict) -> str:
    if verdict != "RE":
        return f"over the {'cpu' if result.status == 'ok' else result.status} limit"
    how = f"signal {result.signal}" if result.status == "signal" else f"exit code {result.exit_code}"
    return f"it ended with {how}: {result.stderr[-200:].decode(errors='replace')}".strip(": \n")


def signs_in(text: str) -> set[str]:
    """What stands in a submission that no honest one needs."""
    return {name for name, sign in _SIGNS.items() if sign.search(text)}
