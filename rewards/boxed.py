r"""A mathematical answer against the truth, by math-verify in killable worker processes.

1.0 where what stands in ``\boxed{...}`` equals the truth as mathematics (fractions, roots, sets, intervals,
matrices, equations, units), else 0.0. Where the truth is a number, an answer is one, not an expression for
it: ``agentrl.rewards.verification`` says what that means. Two integers in plain digits are compared here,
which no answer can make long. Only the last assistant message counts, outside its
thinking, and of several boxes there the worst: a list of guesses is not an answer.

An answer may be built to stall: ``10^{10^{10}}`` never ends and ``((9!)!)!`` eats all memory. Going over the
deadline or the memory cap is the policy's fault: 0.0, with part ``limit`` 1 where the worker had to be
replaced. It is the world's (WorkerLost) only where a known-good answer fails too. All rewards of one
configuration in a process share the same workers.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from agentrl.answers import boxed_answers, truth_of
from agentrl.errors import BadConfig, BadData
from agentrl.reward import Evidence
from agentrl.types import Score
from agentrl.workers import Limit, Probe, shared_pool

__all__ = ["Boxed"]

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,11})(?:\.0{1,6})?")
_PROBE = Probe({"truth": "\\frac{1}{2}", "answers": ["0.5"]}, "correct")


class Boxed:
    """1.0 or 0.0 by mathematical equality. Raises BadData for a truth that is none."""

    def __init__(
        self, *, key: str = "answer", deadline_s: float = 2.0, memory_mib: int = 512, workers: int = 2
    ) -> None:
        if not (0 < deadline_s < 3600 and memory_mib >= 1 and workers >= 1):
            raise BadConfig(
                f"boxed can't use deadline_s={deadline_s!r}, memory_mib={memory_mib!r}, workers={workers!r}: "
                "the deadline lies between 0 and 3600 seconds, the others are at least 1"
            )
        self.key = key
        self.deadline_s = deadline_s
        self.memory_mib = memory_mib
        self.workers = workers

    def __call__(self, evidence: Evidence) -> Score:
        """1.0 or 0.0, with parts ``correct`` and ``limit``."""
        truth = truth_of(evidence.task, self.key)
        if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
            raise _bad_truth(evidence, truth)
        answers = list(dict.fromkeys(boxed_answers(evidence.answer)))
        if not answers:
            return _score(note="no boxed answer")
        is_float = isinstance(truth, float) and math.isfinite(truth)
        text = f"{Decimal(str(truth)):f}" if is_float else str(truth)  # in digits: str(1e22) is 1e+22
        given = [_plain(word) for word in (text, *answers)]
        if all(map(_INTEGER.fullmatch, given)):
            return _told(len({Decimal(word) for word in given}) == 1, len(answers))
        # Looked up at every call: this object can be pickled, and a forked child gets a pool of its own.
        pool = shared_pool(
            "agentrl.rewards.verification:verdict",
            size=self.workers,
            deadline_s=self.deadline_s,
            memory_mib=self.memory_mib,
            probe=_PROBE,
        )
        outcome = pool.call({"truth": text, "answers": answers})
        if isinstance(outcome, Limit):
            return _score(limit=1.0, note=f"checking the answer hit a limit: {outcome.kind}")
        if outcome.value == "no truth":
            raise _bad_truth(evidence, truth)
        return _told(outcome.value == "correct", len(answers))


def _plain(text: str) -> str:
    """As the workers read it, a sentence's end is no part of an answer."""
    return text.strip().removesuffix(".")


def _told(is_right: bool, answers: int) -> Score:
    if is_right:
        return _score(correct=1.0)
    several = f"{answers} different boxed answers, not all right"
    return _score(note=several if answers > 1 else "not equal to the truth")


def _score(*, correct: float = 0.0, limit: float = 0.0, note: str = "") -> Score:
    return Score(correct, {"correct": correct, "limit": limit}, note)


def _bad_truth(evidence: Evidence, truth: object) -> BadData:
    return BadData(
        f"task {evidence.task.id!r} has the truth {truth!r}, which math-verify can't read: "
        "correct the task, or score it with 'exact'"
    )
