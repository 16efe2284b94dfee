r"""A text against a text.

1.0 where the answer is the truth, letter for letter after normalisation (Unicode NFC, outer and repeated
white space), else 0.0.
"""

from __future__ import annotations

import unicodedata

from agentrl.answers import boxed_answers, truth_of, visible_text
from agentrl.errors import BadData
from agentrl.reward import Evidence
from agentrl.types import Score

__all__ = ["Exact"]


class Exact:
    r"""Is the text in ``\boxed{...}`` (``boxed=False``: the whole last message) the truth? 1.0 or 0.0.

    Only the last assistant message counts, outside its thinking; more than one distinct box there is 0.0.
    Raises BadData where the task's truth is neither text nor a number.
    """

    inline = True

    def __init__(self, *, key: str = "answer", boxed: bool = True, casefold: bool = False) -> None:
        self.key = key
        self.boxed = boxed
        self.casefold = casefold

    def __call__(self, evidence: Evidence) -> Score:
        """1.0 or 0.0, with parts ``correct``."""
        truth = truth_of(evidence.task, self.key)
        if not isinstance(truth, (str, int, float)):
            raise BadData(
                f"task {evidence.task.id!r} has the truth {truth!r} of type {type(truth).__name__}: "
                "'exact' compares with text or a number; correct the task or name another key="
            )
        texts = boxed_answers(evidence.answer) if self.boxed else (visible_text(evidence.answer),)
        said = {self._normal(text) for text in texts}
        correct = float(said == {self._normal(str(truth))})
        return Score(correct, {"correct": correct}, _why(len(said), correct))

    def _normal(self, text: str) -> str:
        text = " ".join(unicodedata.normalize("NFC", text).split())
        return text.casefold() if self.casefold else text


def _why(answers: int, correct: float) -> str:
    if correct:
        return ""
    reasons = {0: "no boxed answer", 1: "another text than the truth"}
    return reasons.get(answers, f"{answers} different boxed answers")
