"""The records of judging: what is tried against a solution, and what became of it.

A verdict is a record of every test that was expected: one that is missing is failed. ``fault`` says who is to
blame and is read first: "world" means that there is no verdict, and the submission must not be scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agentrl.errors import BadData
from agentrl.judging.plain import NotPlain, decode, encode
from agentrl.sandbox import Fault

__all__ = [
    "AssertTest",
    "CallTest",
    "FileTests",
    "IOTest",
    "Judgement",
    "Problem",
    "Test",
    "TestOutcome",
    "Trust",
    "Verdict",
    "problem_from_json",
    "problem_to_json",
]

# Accepted; wrong answer; crashed or left early; over the time, memory or output limit; no Python.
Verdict = Literal["AC", "WA", "RE", "TLE", "MLE", "OLE", "CE"]
# remote: tests and solution never shared a process; shared: they did, which a solution can abuse.
Trust = Literal["remote", "shared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IOTest:
    """A program's output on an input, compared outside: line by line, trailing blanks ignored."""

    id: str
    stdin: str
    stdout: str
    visible: bool = False  # the policy may see it, and how it went


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTest:
    """What a function returns for plain arguments, compared outside as ``agentrl.judging.comparing`` says."""

    id: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    expected: Any = None
    tolerance: float = 0.0  # absolute below 1, relative above
    alike: bool = False  # lists and tuples are equal: for what was written as JSON
    numbers_alike: bool = False  # as in Python: a bool and its int, a complex number and a real one
    visible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AssertTest:
    """A text of Python that raises nothing where the solution is right. It is run as it stands.

    ``remote``: in a sandbox of its own, where ``candidate`` and the entry point's name are stubs: plain
    arguments go to the solution, plain results or a builtin exception come back. The arguments are copies,
    so that a solution can't spoil what it is compared with; ``in_place`` sends back what became of lists,
    dicts and sets among them. ``shared``: in the solution's own process, for tests that need real objects.
    """

    id: str
    code: str
    visible: bool = False
    trust: Trust = "remote"
    in_place: bool = False


Test = IOTest | CallTest | AssertTest


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The tests of one task. Raises BadData for none, for two of one id, for values that aren't plain."""

    tests: tuple[Test, ...]
    entry_point: str = ""  # the function's name; "" where all tests are of input and output
    setup: str = ""  # source before the solution; also before remote assertions, with the names they use

    def __post_init__(self) -> None:
        if not self.tests:
            raise BadData("a problem without tests has no verdict: give at least one")
        names = [test.id for test in self.tests]
        twice = next((name for name in names if names.count(name) > 1), None) if _repeat(names) else None
        if twice is not None:
            raise BadData(f"two tests have the id {twice!r}: each test has its own")
        for test in self.tests:
            if not isinstance(test, IOTest) and not self.entry_point.isidentifier():
                raise BadData(
                    f"test {test.id!r} needs a function to call, and entry_point is {self.entry_point!r}"
                )
            if isinstance(test, CallTest):
                _check_call(test)


def _repeat(names: list[str]) -> bool:
    return len(set(names)) < len(names)


def _check_call(test: CallTest) -> None:
    if not (math.isfinite(test.tolerance) and test.tolerance >= 0):
        raise BadData(f"test {test.id!r} has tolerance={test.tolerance!r}: it is finite and at least 0")
    try:
        encode([tuple(test.args), dict(test.kwargs), test.expected])
    except NotPlain as error:
        raise BadData(
            f"test {test.id!r} has a value that is no plain data: {error.name}; "
            "write it as an AssertTest with trust='shared'"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTests:
    """Hidden test files for a workspace, and the tests in them that must be reported passed."""

    files: Mapping[str, bytes]  # by path in the workspace; they replace what is there
    expected: tuple[str, ...]  # node ids: "tests/test_a.py::test_one", "tests/test_a.py::TestB::test_two"

    def __post_init__(self) -> None:
        if not self.expected or _repeat(list(self.expected)):
            raise BadData("the expected tests are none, or one is named twice: name each that must pass once")
        for name in self.expected:
            path, _, rest = name.partition("::")
            if path not in self.files or not rest:
                raise BadData(
                    f"the expected test {name!r} lies in no file of these tests: write 'path.py::name', with "
                    f"a path of {', '.join(sorted(self.files)) or 'files, of which there are none'}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class TestOutcome:
    """What became of one test."""

    id: str
    verdict: Verdict
    visible: bool = False
    note: str = ""  # for the policy to read; "" unless the test is visible
    ran: bool = True  # False: it failed because an earlier one had, or nothing could be run

    __test__ = False  # no test of pytest's


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of one submission. ``fault`` first: with "world" the rest means nothing."""

    verdict: Verdict  # AC, or that of the first test that failed
    fault: Fault  # none: accepted; policy: its own doing; world: there is no verdict
    outcomes: tuple[TestOutcome, ...] = ()  # of every test, in the problem's order
    compiled: bool = True
    flags: tuple[str, ...] = ()  # telemetry of what looked like an attack, sorted
    trust: Trust = "remote"  # shared: a test ran in the solution's process
    cpu_ms: float = 0.0  # of all runs
    wall_ms: float = 0.0
    queue_ms: float = 0.0  # waiting for a core or a sandbox; counts against no limit
    peak_bytes: int = 0
    note: str = ""  # for the policy to read: nothing of hidden tests is in it

    @property
    def passed(self) -> tuple[str, ...]:
        """The ids of the tests that passed."""
        return tuple(outcome.id for outcome in self.outcomes if outcome.verdict == "AC")

    @property
    def fraction(self) -> float:
        """The share of all tests that passed; what did not run counts as failed."""
        return len(self.passed) / len(self.outcomes) if self.outcomes else 0.0

    @property
    def visible_only(self) -> bool:
        """Whether every visible test passed and a hidden one did not: the visible ones may be hard-coded."""
        failed = [outcome for outcome in self.outcomes if outcome.verdict != "AC"]
        return (
            bool(failed)
            and not any(outcome.visible for outcome in failed)
            and any(outcome.visible for outcome in self.outcomes)
        )


_KINDS: Mapping[str, type[IOTest] | type[CallTest] | type[AssertTest]] = {
    "io": IOTest,
    "call": CallTest,
    "assert": AssertTest,
}
_TYPED = ("args", "kwargs", "expected")  # of a CallTest: typed data


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """``problem`` as plain JSON data, for a task's truth."""
    return {
        "entry_point": problem.entry_point,
        "setup": problem.setup,
        "tests": [_test_to_json(test) for test in problem.tests],
    }


def _test_to_json(test: Test) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if isinstance(test, cls))
    fields = {name: getattr(test, name) for name in type(test).__slots__}
    if isinstance(test, CallTest):
        fields |= {
            "args": encode(tuple(test.args)),
            "kwargs": encode(dict(test.kwargs)),
            "expected": encode(test.expected),
        }
    return {"kind": kind, **fields}


def problem_from_json(data: Mapping[str, Any]) -> Problem:
    """The problem that ``problem_to_json`` wrote. Raises BadData for anything else."""
    try:
        return Problem(
            tests=tuple(_test_from_json(test) for test in data["tests"]),
            entry_point=data.get("entry_point", ""),
            setup=data.get("setup", ""),
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise BadData(
            f"no problem in JSON: {type(error).__name__}: {error}; write it with problem_to_json"
        ) from error


def _test_from_json(data: Mapping[str, Any]) -> Test:
    fields = {name: decode(value) if name in _TYPED else value for name, value in data.items()}
    return _KINDS[fields.pop("kind")](**fields)
