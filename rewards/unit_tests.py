"""Does a program pass the task's tests? 1.0 where it passes all, or the share that it passes.

The program is the last block fenced as Python in the last assistant message, outside its thinking, else the
last one fenced without a language, or the whole message where it has no fence at all. It runs in a sandbox,
and the verdict is reached outside of it (``agentrl.judge``). What a submission runs into is its own doing;
where the world fails twice, SandboxLost is raised, and there is no score. All rewards of one configuration in
a process share one judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from agentrl.answers import truth_of, visible_text
from agentrl.errors import BadConfig, BadData
from agentrl.judge import problem_from_json, shared_judge
from agentrl.reward import Evidence
from agentrl.sandbox import Limits
from agentrl.types import Score

__all__ = ["UnitTests", "program_in"]

_FENCE = re.compile(r"([ \t]*)(`{3,}+|~{3,}+)([^`]*)")  # a whole line that opens or closes a block
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
        cpu_s: float = 6.0,
        memory_mib: int = 512,
    ) -> None:
        if mode not in ("all", "fraction"):
            raise BadConfig(f"unit_tests has mode={mode!r}: it is 'all' or 'fraction'")
        self.mode = mode
        self.sandbox = sandbox
        self.limits = Limits(cpu_s=cpu_s, wall_s=5 * cpu_s, memory_mib=memory_mib)

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
        return Score(value, parts, why)


def program_in(answer: str) -> str:
    """The last fenced block of Python in ``answer``, outside thinking; all of it where there is no fence.

    A block labelled as Python goes before those without a language; where only other languages are fenced,
    there is no program. As far as an opening fence is indented, so are its lines. A fence closes what one of
    its kind and at most its length opened, at the end of a line of code too; a last block that nothing closes
    runs to the end. One pass, whatever a policy writes.
    """
    text = visible_text(answer).replace("\r\n", "\n")
    if "```" not in text and "~~~" not in text:
        return text
    last: dict[bool, str] = {}  # by whether the block is labelled
    for language, block in _blocks(text):
        if not language or _PYTHON.fullmatch(language):
            last[bool(language)] = block
    return last.get(True, last.get(False, ""))


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Every fenced block: its language in lower case, "" without one, and its lines."""
    indent, fence, language = "", "", ""
    lines: list[str] = []
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line)
        if not fence:
            if match:
                indent, fence, lines = match[1], match[2], []
                language = _language(match[3])
        elif line.rstrip().endswith(fence):
            code = _outdented(line, indent).rstrip().rstrip(fence[0])
            yield language, "\n".join((*lines, code if code.strip() else ""))
            fence = ""
        else:
            lines.append(_outdented(line, indent))
    if fence and any(line.strip() for line in lines):
        yield language, "\n".join(lines)


def _language(label: str) -> str:
    match = _LABEL.match(label.strip().lower())
    return match[1] if match else ""


def _outdented(line: str, indent: str) -> str:
    """Without the blanks that stand before the fence, as CommonMark has it."""
    blanks = len(line) - len(line.lstrip(" \t"))
    return line[min(blanks, len(indent)) :]
