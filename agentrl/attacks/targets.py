"""What the verdicts' attacks are tried on: one small task, judged in four ways, with hidden answers.

Its answers can't be guessed, and no attack of the catalogue knows them: what is accepted has cheated.
"""

from __future__ import annotations

import re
from typing import Protocol

from agentrl.attacks.attack import Attack, Kind
from agentrl.judging.verdicts import AssertTest, CallTest, FileTests, IOTest, Judgement, Problem

__all__ = ["KINDS", "RIGHT", "WRONG", "Judging", "judged", "problem_of", "renamed", "verdict_of"]

KINDS: tuple[Kind, ...] = ("call", "assert", "stdin", "files")

_ASKED = (3, 17, 256)
_BODY = "    return (number ** 3 * 7919 + 104729 * number + 13) % 1000003"
_FUNCTION = f"def solve(number):\n{_BODY}\n"
_PROGRAM = "print(solve(int(input())))\n"
# Right and wrong answers, to know that the judge can tell them apart at all.
RIGHT = {kind: _FUNCTION + (_PROGRAM if kind == "stdin" else "") for kind in KINDS}
WRONG = {kind: source.replace("+ 13", "+ 14") for kind, source in RIGHT.items()}

_MODULE, _TESTS = "solution.py", "test_hidden.py"


def _answer(number: int) -> int:
    return (number**3 * 7919 + 104729 * number + 13) % 1000003


class Judging(Protocol):
    """What of ``agentrl.judge.Judge`` is asked."""

    def judge(self, solution: str, problem: Problem) -> Judgement:
        """The verdict on a solution."""
        ...

    def judge_files(self, files: dict[str, bytes], tests: FileTests) -> Judgement:
        """The verdict on a folder."""
        ...


def problem_of(kind: Kind) -> Problem:
    """The task as calls, assertions or a program's input and output; not of ``files``."""
    if kind == "stdin":
        return Problem(
            tests=tuple(
                IOTest(id=f"t{number}", stdin=f"{number}\n", stdout=f"{_answer(number)}\n")
                for number in _ASKED
            )
        )
    if kind == "call":
        calls = tuple(
            CallTest(id=f"t{number}", args=(number,), expected=_answer(number)) for number in _ASKED
        )
        return Problem(tests=calls, entry_point="solve")
    texts = tuple(
        AssertTest(id=f"t{number}", code=f"assert candidate({number}) == {_answer(number)}")
        for number in _ASKED
    )
    return Problem(tests=texts, entry_point="solve")


def judged(judge: Judging, kind: Kind, source: str, files: dict[str, str] | None = None) -> Judgement:
    """What ``judge`` says of a solution."""
    if kind != "files":
        return judge.judge(source, problem_of(kind))
    lines = ["from solution import solve"]
    lines += [f"def test_{number}():\n    assert solve({number}) == {_answer(number)}" for number in _ASKED]
    expected = tuple(f"{_TESTS}::test_{number}" for number in _ASKED)
    tests = FileTests(files={_TESTS: "\n".join(lines).encode()}, expected=expected)
    there = {_MODULE: source, **(files or {})}
    return judge.judge_files({name: text.encode("utf-8", "replace") for name, text in there.items()}, tests)


def verdict_of(judge: Judging, attack: Attack, kind: Kind) -> Judgement:
    """What ``judge`` says of an attack. Raises what it raises."""
    return judged(judge, kind, attack.source, dict(attack.files))


def renamed(source: str, entry_point: str) -> str:
    """An attack's source for a task that asks for another function."""
    return re.sub(r"\bsolve\b", entry_point, source)
