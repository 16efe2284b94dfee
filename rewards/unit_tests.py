"""Does a program pass the task's tests? 1.0 where it passes all, or the share that it passes.

The program is the last block fenced as Python in the last assistant message, outside its thinking, else the
last one fenced without a language, or the whole message where no line opens a fence. It runs in a sandbox,
and the verdict is reached outside of it (``agentrl.judge``). What a submission runs into is its own doing;
where the world fails twice, SandboxLost is raised, and there is no score. All rewards of one configuration in
a process share one judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from agentrl.answers import truth_of
from agentrl.errors import BadConfig, BadData
from agentrl.judge import AssertTest, Judgement, Problem, problem_from_json, shared_judge
from agentrl.reward import Evidence
from agentrl.sandbox import Limits
from agentrl.sandboxing.backends import limits_for, prove_backend
from agentrl.types import Score

__all__ = ["UnitTests", "program_in"]

_WALL_S = 60.0  # where CPU time is not limited
_MOST_CODE = 2000  # characters of a test in a note
_FENCE = re.compile(r"([ \t]*)(`{3,}+|~{3,}+)([^`]*)")  # a whole line that opens or closes a block
_BEHIND_TEXT = re.compile(r"(?<![`~])(`{3,}+|~{3,}+)[ \t]*+([^\s`~]++)[ \t]*+\Z")  # one that ends a line
_THINKING = re.compile(r"</?think>")
_DEEP = 4  # columns: further in, a fence is part of an indented block (CommonMark 0.31, section 4.5)
# What stands behind an opening fence: ``python``, ``py3``, ``{.python}``, ``python3.11``, ``python:name.py``.
_LABEL = re.compile(r"\{?\.?([^\s{}:,=]*)")
_PYTHON = re.compile(r"py(thon)?[\d.]*", re.ASCII)


class UnitTests:
    """1.0 or 0.0 (``mode="all"``), or the share of tests passed (``mode="fraction"``).

    The task's ``truth["problem"]`` is what ``problem_to_json`` wrote. Parts: ``compiled``, ``passed`` (the
    share; with "all" of what ran before the first failure) and ``hack_flags``, how many things looked like an
    attack: telemetry, which changes no value. Raises BadData where the truth is no problem, SandboxLost.
    """

    def __init__(
        self,
        *,
        mode: Literal["all", "fraction"] = "all",
        sandbox: str = "auto",
        cpu_s: float | None = 6.0,
        memory_mib: int | None = 512,
    ) -> None:
        """``cpu_s`` and ``memory_mib``: None for no limit. The sandbox "process", for trusted code only,
        needs both so, and is then asked for none but a wall clock."""
        if mode not in ("all", "fraction"):
            raise BadConfig(f"unit_tests has mode={mode!r}: it is 'all' or 'fraction'")
        self.mode = mode
        self.sandbox = sandbox
        wall_s = _WALL_S if cpu_s is None else 5 * cpu_s
        self.limits = limits_for(sandbox, Limits(cpu_s=cpu_s, wall_s=wall_s, memory_mib=memory_mib))

    def check_host(self) -> None:
        """Raises BadConfig where there is no such sandbox here."""
        prove_backend(self.sandbox, self.limits)

    def __call__(self, evidence: Evidence) -> Score:
        """Judge the program that the conversation ends with."""
        truth = truth_of(evidence.task, "problem")
        if not isinstance(truth, Mapping):
            raise BadData(f"task {evidence.task.id!r} has a problem that is no mapping: use problem_to_json")
        problem = problem_from_json(truth)
        # Looked up at every call: this object can be pickled, and a forked child gets a judge of its own.
        judge = shared_judge(self.sandbox, limits=self.limits)
        judgement = judge.judge(program_in(evidence.answer), problem, stop_early=self.mode == "all")
        passed = judgement.fraction
        value = passed if self.mode == "fraction" else float(judgement.verdict == "AC")
        parts = {
            "compiled": float(judgement.compiled),
            "passed": passed,
            "hack_flags": float(len(judgement.flags)),
            "visible_only": float(judgement.visible_only),
        }
        why = f"{judgement.verdict}: {judgement.note}" if judgement.verdict != "AC" else ""
        return Score(value, parts, why + _failed_assertion(problem, judgement))


def _failed_assertion(problem: Problem, judgement: Judgement) -> str:
    """The text of the assertion that decided, where the policy may see it: an error alone names no test."""
    for test, outcome in zip(problem.tests, judgement.outcomes, strict=True):
        is_told = test.visible and outcome.ran and outcome.verdict != "AC" and outcome.note == judgement.note
        if is_told:
            shown = test.code[:_MOST_CODE] if isinstance(test, AssertTest) else ""
            return f"\nThe test:\n{shown}" if shown else ""
    return ""


def program_in(answer: str) -> str:
    """The last fenced block of Python in ``answer``, outside thinking; all of it where there is no fence.

    A block labelled as Python goes before those without a language; where only other languages are fenced,
    there is no program. As far as an opening fence is indented, so are its lines; one that stands behind text
    opens a block if its label is Python's. A fence closes what one of its kind and at most its length opened,
    at the end of a line of code too; a last block that nothing closes runs to the end. A line that is only a
    fence, four columns or more further in than the opening one, is code if a fence further out closes the
    block. One pass, whatever a policy writes.
    """
    text = _outside_thinking(answer.replace("\r\n", "\n"))
    lines = text.split("\n")
    if not any(map(_opening, lines)):
        return text
    last: dict[bool, str] = {}  # by whether the block is labelled
    for language, block in _blocks(lines):
        if not language or _PYTHON.fullmatch(language):
            last[bool(language)] = block
    return last.get(True, last.get(False, ""))


def _outside_thinking(text: str) -> str:
    """As ``agentrl.answers.visible_text``, but what is quoted on a line of a fenced block is code, no tag.

    What is thinking stays so: in a thought that a tag opened, a quoted tag ends nothing either, and a thought
    that the prompt opened is told from an answer only by the tag that ends it.
    """
    start, end = 0, len(text)  # of what is visible
    at, fence = 0, ""
    for line in text.split("\n"):
        rest = line
        tags = [*_THINKING.finditer(line)]
        quoted = [(line.find(quote), line.rfind(quote)) for quote in "'\"" if quote in line] if tags else []
        for tag in tags:
            if fence and any(first < tag.start() and tag.end() <= last for first, last in quoted):
                continue
            if tag[0] == "</think>":
                start, end = at + tag.end(), len(text)
            else:
                end = min(end, at + tag.start())
            fence, rest = "", line[tag.end() :]
        if fence:
            fence = "" if _closes(rest, fence) else fence
        elif opening := _opening(rest):
            fence = opening.fence
        at += len(line) + 1
    return text[start:end]


@dataclass(frozen=True, slots=True)
class _Opening:
    """A fence that opens a block."""

    indent: str  # the blanks before it
    fence: str
    language: str  # in lower case; "" without one
    is_behind_text: bool = False


def _opening(line: str) -> _Opening | None:
    if match := _FENCE.fullmatch(line):
        return _Opening(match[1], match[2], _language(match[3]))
    if (match := _BEHIND_TEXT.search(line)) and _PYTHON.fullmatch(language := _language(match[2])):
        return _Opening(_blanks(line), match[1], language, is_behind_text=True)
    return None


def _blocks(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The language and the text of every fenced block."""
    at = sure = 0
    while at < len(lines):
        opening = _opening(lines[at])
        at += 1
        if opening is None:
            continue
        end, sure = _end(lines, at, opening, sure=sure)
        code = [*lines[at:end]]
        first = next((line for line in code if line.strip()), None)
        is_closed = end < len(lines)
        if opening.is_behind_text and (first is None or (is_closed and _is_labelled(lines[end]))):
            at = end  # a word about a fence, and not one: here stands the fence
            continue
        indent = _blanks(first or "") if opening.is_behind_text else opening.indent
        if is_closed:
            code.append(lines[end].rstrip().rstrip(opening.fence[0]))
        code = [_outdented(line, indent) for line in code]
        if is_closed and not code[-1].strip():
            code[-1] = ""
        if is_closed or first is not None:
            yield opening.language, "\n".join(code)
        at = end + 1


def _end(lines: Sequence[str], first: int, opening: _Opening, *, sure: int) -> tuple[int, int]:
    """Which line ends a block that begins with line ``first``, ``len(lines)`` if none, and a new ``sure``.

    Before line ``sure`` no fence further out follows one that is deep inside, as an earlier block found out:
    so no line is looked at more than twice.
    """
    deep, deepest = None, _width(opening.indent) + _DEEP
    for at in range(first, len(lines)):
        match = _FENCE.fullmatch(lines[at])
        is_deep = match is not None and _width(match[1]) >= deepest
        if not _closes(lines[at], opening.fence):
            opens = match is not None and bool(match[3].strip()) and not is_deep
            if opens and (deep is not None or opening.is_behind_text):
                return (at if deep is None else deep), at
        elif not is_deep or at < sure or _is_labelled(lines[at]):
            return at, sure
        elif deep is None:
            deep = at
    return (len(lines) if deep is None else deep), len(lines)


def _closes(line: str, fence: str) -> bool:
    return line.rstrip().endswith(fence)


def _is_labelled(line: str) -> bool:
    match = _FENCE.fullmatch(line)
    return match is not None and bool(match[3].strip())


def _language(label: str) -> str:
    match = _LABEL.match(label.strip().lower())
    return match[1] if match else ""


def _blanks(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


def _width(blanks: str) -> int:
    return len(blanks.expandtabs(4))


def _outdented(line: str, indent: str) -> str:
    """Without the blanks that stand before the fence, as CommonMark has it."""
    return line[min(len(_blanks(line)), len(indent)) :]
