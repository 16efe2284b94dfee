"""One submission against one problem: which sandboxes, what is said over their pipes, what it means.

A solution and what judges it never share a process, a user or a folder: each has a session of its own, and
this module, in the host's process, only carries checked plain data from one to the other. What a solution's
sandbox says can be an answer, right or wrong, and nothing else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from agentrl.errors import BadData
from agentrl.judging.comparing import Garbled, check_tree, is_equal, same_output, show
from agentrl.judging.line import Line, python
from agentrl.judging.plain import encode, frame
from agentrl.judging.record import Record, how_it_ended, is_over_cpu, verdict_of
from agentrl.judging.verdicts import AssertTest, CallTest, IOTest, Judgement, Problem, Test, Verdict
from agentrl.sandbox import Channel, ExecResult, Gone, Limits, Sandbox, SandboxLost

__all__ = ["judge_once"]

# Answers gather in the pipe meanwhile: woken for each, both sides would spend more on that than on the calls.
_GATHER_S = 0.0003
_BATCH_CALLS = 64
_PRINTING_CALLS = 16  # that one output's limit is for
_BATCH_BYTES = 32 << 10  # of one message of calls: what a pipe takes in without waiting


def judge_once(
    solution: str,
    problem: Problem,
    *,
    open_sandbox: Callable[[Limits], Sandbox],
    limits: Limits,
    stop_early: bool,
) -> Judgement:
    """Judge in fresh sandboxes. Raises SandboxLost, and BadData where a test can't be what it says."""
    record = Record(solution, problem, open_sandbox, limits, stop_early)
    # What is said of a visible test is written down before the program has seen anything of a hidden one.
    in_order = sorted(problem.tests, key=lambda test: not test.visible)
    for kind, run in _RUNS.items():
        tests = [test for test in in_order if _kind(test) == kind]
        if tests and not record.is_over and record.compiled:
            run(record, tests)
    return record.judgement()


def _kind(test: Test) -> str:
    return test.trust if isinstance(test, AssertTest) else type(test).__name__


# -- calls, compared here --


def _run_calls(record: Record, tests: Sequence[CallTest]) -> None:
    talk = _Calls(record, tests)
    if record.limits.output_kib is not None:  # each call may print something
        output_kib = record.limits.output_kib * (1 + len(tests) // _PRINTING_CALLS)
        record.limits = replace(record.limits, output_kib=output_kib)
    with closing(record.open(record.limits)) as sandbox:
        result = record.add(sandbox.run(python("solution_process"), stdin=talk, limits=record.left()))
    record.settle(tests, result, garbled=talk.garbled)


class _Calls:
    """The conversation about function tests."""

    def __init__(self, record: Record, tests: Sequence[CallTest]) -> None:
        self._record, self._tests = record, tests
        self.garbled = False

    def __call__(self, channel: Channel) -> None:
        line = Line(channel)
        try:
            if _load(self._record, line, self._tests):
                self._ask(line)
        except Garbled:
            self.garbled = True
        if line.has_more and not self._record.is_over:
            self._record.flags.add("extra_replies")

    def _ask(self, line: Line) -> None:
        for first, batch in _batches(self._tests):
            line.send(["calls", batch, False])
            for number in range(first, first + len(batch)):
                if not line.has_more and number > first:
                    time.sleep(_GATHER_S)
                kind, said = _reply(line, number)
                self._record.enter(self._tests[number], *self._judged(self._tests[number], kind, said))
                if self._record.is_over:
                    return

    def _judged(self, test: CallTest, kind: str, said: list[Any]) -> tuple[Verdict, str]:
        name = self._record.problem.entry_point
        if kind == "raised":
            return "RE", f"{name} raised {': '.join(filter(None, said))}"
        if kind == "unplain":
            self._record.flags.add("not_plain")
            return "WA", f"{name} returned {said[0][:100]}, which is no plain data"
        expected = encode(test.expected)
        alike, numbers_alike = test.alike, test.numbers_alike
        if is_equal(expected, said[0], tolerance=test.tolerance, alike=alike, numbers_alike=numbers_alike):
            return "AC", ""
        if not test.visible:
            return "WA", ""
        given = [*(show(encode(value)) for value in test.args)]
        given += [f"{key}={show(encode(value))}" for key, value in test.kwargs.items()]
        return "WA", f"{name}({', '.join(given)}) gave {show(said[0])}, expected {show(expected)}"


def _batches(tests: Sequence[CallTest]) -> Iterator[tuple[int, list[Any]]]:
    """The calls in messages of a size that a pipe takes, each with the number of its first; none has both
    visible and hidden ones."""
    first, batch, size = 0, list[Any](), 0
    for number, test in enumerate(tests):
        call = [number, encode(list(test.args)), encode(dict(test.kwargs))]
        length = len(frame(call))
        is_full = len(batch) == _BATCH_CALLS or size + length > _BATCH_BYTES
        if batch and (is_full or test.visible != tests[first].visible):
            yield first, batch
            first, batch, size = number, [], 0
        batch.append(call)
        size += length
    yield first, batch


def _load(record: Record, line: Line, tests: Sequence[Test]) -> bool:
    """Have the program loaded; whether there is something to call."""
    line.send(["load", record.problem.setup, record.solution, record.problem.entry_point])
    loaded = line.receive()
    if loaded == ["ready"]:
        return True
    if loaded[0] == "setup":
        _prove_setup(record)
    if loaded[0] not in ("syntax", "raised", "missing"):
        raise Garbled("no answer to a program")
    record.refuse(loaded, tests)
    return False


def _prove_setup(record: Record) -> None:
    """Raise BadData where the problem's setup fails by itself, whatever the solution said of it."""

    def talk(channel: Channel) -> None:
        line = Line(channel)
        line.send(["load", record.problem.setup, "", "solve"])
        with suppress(Garbled):
            said = line.receive()
            if said[0] == "setup":
                raise _fails_by_itself(said[1:])

    with closing(record.open(record.limits)) as sandbox:
        if sandbox.run(python("solution_process"), stdin=talk, limits=record.limits).status == "lost":
            raise SandboxLost("a sandbox went away while the setup of a problem was looked at")


def _fails_by_itself(said: Sequence[Any]) -> BadData:
    text = ": ".join(map(str, said))
    return BadData(f"the setup of a problem fails by itself, with {text}: correct it")


def _reply(line: Line, number: int) -> tuple[str, list[Any]]:
    """The checked reply to call ``number``: its kind, and what it says. Raises Garbled, Gone."""
    message = line.receive()
    if len(message) < 3 or type(message[0]) is not int or message[0] != number:
        raise Garbled("a reply to no question, or a second one")
    _, kind, *said = message
    if kind == "value" and len(said) <= 2:
        for tree in said:
            check_tree(tree)
    elif not (kind in ("raised", "unplain") and len(said) <= 2 and all(type(text) is str for text in said)):
        raise Garbled("a reply of no known kind")
    return kind, said


# -- assertions, in a sandbox of the judge's own --


class _TesterGone(Exception):
    """The judge's own sandbox ended while the solution's was talked to."""


def _run_remote(record: Record, tests: Sequence[AssertTest]) -> None:
    relay = _Relay(record, tests)
    # Its wall clock runs while the solution works.
    wall_s = record.limits.wall_s
    limits = replace(record.limits, wall_s=None if wall_s is None else 2 * wall_s + 10)
    with closing(record.open(record.limits)) as solver, closing(record.open(limits)) as tester:
        relay.solver = solver
        judged = tester.run(python("assertion_process"), stdin=relay)
    if judged.status == "lost":
        raise SandboxLost("the judge's own sandbox went away")
    if relay.result is not None and not relay.tester_ended:
        record.settle(tests, record.add(relay.result), garbled=relay.garbled)
    else:  # a limit that the test ran into with what the solution gave it
        record.settle(tests, judged)
        record.flags.add("tester_ended")


class _Relay:
    """The conversation between assertions and a solution: the talk with one inside that with the other."""

    def __init__(self, record: Record, tests: Sequence[AssertTest]) -> None:
        self._record, self._tests = record, tests
        self.solver: Sandbox
        self.result: ExecResult | None = None
        self.garbled = self.tester_ended = False

    def __call__(self, channel: Channel) -> None:
        problem = self._record.problem
        tester = Line(channel, gone=_TesterGone)
        try:
            tester.send(["load", problem.setup, problem.entry_point])
            if (loaded := tester.receive()) != ["ready"]:
                raise _fails_by_itself(loaded[1:])
            self.result = self.solver.run(
                python("solution_process"),
                stdin=lambda channel: self._with_both(Line(channel), tester),
                limits=self._record.left(),
            )
        except _TesterGone:
            self.tester_ended = True
            raise Gone from None

    def _with_both(self, solver: Line, tester: Line) -> None:
        try:
            if not _load(self._record, solver, self._tests):
                return
            calls = 0
            for number, test in enumerate(self._tests):
                tester.send(["test", number, test.code, test.in_place])
                while (said := tester.receive())[0] == "call":
                    check_tree(said[1:])
                    solver.send(["calls", [[calls, *said[1:]]], test.in_place])
                    kind, reply = _reply(solver, calls)
                    tester.send([kind, *reply])
                    calls += 1
                if said[:2] != ["done", number] or len(said) != 4:
                    raise Garbled("no outcome of a test")
                self._record.enter(test, *_asserted(self._record, test, *said[2:]))
                if self._record.is_over:
                    break
        except Garbled:
            self.garbled = True


def _asserted(record: Record, test: AssertTest, outcome: str, text: str) -> tuple[Verdict, str]:
    if outcome == "passed":
        return "AC", ""
    if outcome == "objects" and test.trust == "remote":  # else the solution may have said it
        raise BadData(
            f"test {test.id!r} hands the solution a {text}, no plain data: mark it trust='shared', "
            "or write it with plain data"
        )
    if outcome == "broken" and test.trust == "remote":
        raise BadData(f"test {test.id!r} can't be run, with {text}: correct it, or leave it out")
    if outcome == "unplain":
        record.flags.add("not_plain")
    return ("RE" if outcome == "theirs" else "WA"), f"{text or outcome}"


# -- assertions in the solution's own process --


def _run_shared(record: Record, tests: Sequence[AssertTest]) -> None:
    garbled = False

    def talk(channel: Channel) -> None:
        nonlocal garbled
        line = Line(channel)
        try:
            if not _load(record, line, tests):
                return
            for number, test in enumerate(tests):
                nonce = secrets.token_hex(16)
                line.send(["test", number, test.code, nonce])
                said = line.receive()
                if len(said) != 5 or said[:2] != ["done", number] or said[4] != nonce:
                    raise Garbled("no outcome of a test")
                record.enter(test, *_asserted(record, test, *map(str, said[2:4])))
                if record.is_over:
                    return
        except Garbled:
            garbled = True

    with closing(record.open(record.limits)) as sandbox:
        command = python("assertion_process", function="serve_shared")
        result = record.add(sandbox.run(command, stdin=talk, limits=record.left()))
    record.settle(tests, result, garbled=garbled)


# -- programs --


def _run_programs(record: Record, tests: Sequence[IOTest]) -> None:
    if record.limits.output_kib is not None:  # blanks at the ends of lines are right, too
        longest = max(len(test.stdout.encode(errors="surrogatepass")) + 1 for test in tests)
        output_kib = max(record.limits.output_kib, 2 * longest // 1024 + 1)
        record.limits = replace(record.limits, output_kib=output_kib)
    for test in tests:
        if record.is_late:
            record.enter(test, "TLE", ran=False)
            continue
        command = _WITH_SETUP if record.problem.setup else _PROGRAM
        result = _run(record, command, test.stdin, expected=test.stdout)
        if test is tests[0] and record.problem.setup and result.status == "error":
            _prove_setup(record)
        if test is tests[0] and _may_be_no_python(result) and (wrong := _said_by_the_compiler(record)):
            record.refuse(["syntax", wrong], tests)
            return
        record.enter(test, *_program_verdict(record, test, result))
        if record.is_over:
            return


# With a setup, which stands before the program: not in its text, since that may begin with future imports.
_PROGRAM = ("python3", "solution.py")
_WITH_SETUP = (
    "python3",
    "-c",
    "for file in 'setup.py', 'solution.py':\n"
    "    exec(compile(open(file, 'rb').read(), file, 'exec', dont_inherit=True))",
)
_COMPILE = (
    "python3",
    "-I",
    "-c",
    "import sys\n"
    "try:\n    compile(open('solution.py', 'rb').read(), 'solution.py', 'exec', dont_inherit=True)\n"
    "except (SyntaxError, ValueError, OverflowError) as error:\n"
    "    sys.stdout.buffer.write((str(error) or 'no Python').encode(errors='replace'))",
)


def _run(record: Record, command: Sequence[str], stdin: str = "", *, expected: str = "") -> ExecResult:
    """Run in a session of its own: what a program leaves in its folder must not reach the next test."""
    texts = {"solution.py": record.solution}
    if record.problem.setup:
        texts["setup.py"] = record.problem.setup
    files = {name: text.encode(errors="surrogatepass") for name, text in texts.items()}
    with closing(record.open(record.limits)) as sandbox:
        given = stdin.encode(errors="surrogatepass")
        result = sandbox.run(command, stdin=given, files=files, limits=record.left())
    return record.add(result, expected=expected)


def _program_verdict(record: Record, test: IOTest, result: ExecResult) -> tuple[Verdict, str]:
    if result.status != "ok" or is_over_cpu(result, record.limits):
        verdict = verdict_of(result, record.limits)
        return verdict, how_it_ended(result, verdict)
    if result.truncated and len(result.stdout) >= (record.limits.output_kib or 0) << 10:
        return "OLE", "more output than is kept"
    if same_output(test.stdout, result.stdout):
        return "AC", ""
    printed = result.stdout[:200].decode(errors="replace")
    return "WA", f"for the input {test.stdin[:100]!r} it printed {printed!r}, expected {test.stdout[:100]!r}"


def _may_be_no_python(result: ExecResult) -> bool:
    last = result.stderr.rstrip().rpartition(b"\n")[2]
    return result.exit_code == 1 and last.startswith(_NO_PYTHON)


_NO_PYTHON = (b"SyntaxError", b"IndentationError", b"TabError", b"ValueError", b"OverflowError")


def _said_by_the_compiler(record: Record) -> str:
    """Why the program does not compile; "": it does. Any program can print that of itself, and its input."""
    result = _run(record, _COMPILE)
    return result.stdout.decode(errors="replace") if result.status == "ok" else ""


_RUNS: Mapping[str, Callable[..., None]] = {
    "CallTest": _run_calls,
    "remote": _run_remote,
    "shared": _run_shared,
    "IOTest": _run_programs,
}
