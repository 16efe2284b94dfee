"""Does a program pass the task's tests? 1.0 where it passes all, or the share that it passes.

The program is the last fenced block of Python in the last assistant message, outside its thinking, or the
whole message where it has no fence at all. It runs in a sandbox, and the verdict is reached outside of it
(``agentrl.judge``). What a submission runs into is its own doing; where the world fails twice, SandboxLost is
raised, and there is no score. All rewards of one configuration in a process share one judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from agentrl.answers import truth_of, visible_text
from agentrl.errors import BadConfig, BadData
from agentrl.judge import problem_from_json, shared_judge
from agentrl.reward import Evidence
from agentrl.sandbox import Limits
from agentrl.types import Score

__all__ = ["UnitTests", "program_in"]

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)\n(.*?)^[ \t]*\1[ \t]*$", re.M | re.S)
_LANGUAGES = ("python", "python3", "py")


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
        }
        why = f"{judgement.verdict}: {judgement.note}" if judgement.verdict != "AC" else ""
        return Score(value, parts, why)


def program_in(answer: str) -> str:
    """The last fenced block of Python in ``answer``, outside thinking; all of it where there is no fence.

    A fence without a language counts; where only other languages are fenced, there is no program.
    """
    text = visible_text(answer)
    if "```" not in text and "~~~" not in text:
        return text
    blocks = [
        block
        for _, language, block in _FENCE.findall(f"{text}\n")
        if not language.strip() or language.split()[0].lower() in _LANGUAGES
    ]
    return blocks[-1] if blocks else ""
