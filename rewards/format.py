r"""Did the conversation follow the protocol? 1.0 where every rule holds, else 0.0; the parts say which broke.

``calls``: every tool call could be read and fits its tool's schema. ``answer``: the conversation ends with an
assistant message that says something outside thinking, calls nothing and was not cut off. ``box``: that
message has exactly one ``\boxed{...}``.
"""

from __future__ import annotations

from agentrl.answers import boxed_answers, visible_text
from agentrl.reward import Evidence
from agentrl.types import Message, Score

__all__ = ["Format"]


class Format:
    """The rules of the module, as 1.0 or 0.0; with ``boxed=False`` the rule ``box`` is not applied."""

    inline = True

    def __init__(self, *, boxed: bool = True) -> None:
        self.boxed = boxed

    def __call__(self, evidence: Evidence) -> Score:
        """1.0 or 0.0, with one part per rule."""
        last = evidence.messages[-1] if evidence.messages else Message("assistant", "")
        bad = [call for message in evidence.messages for call in message.tool_calls if call.status != "ok"]
        spoke = last.role == "assistant" and not last.tool_calls and not evidence.is_cut
        answered = spoke and bool(visible_text(last.content).strip())
        broken = {
            "calls": f"a tool call with status {bad[0].status}" if bad else "",
            "answer": "" if answered else "no final answer",
        }
        if self.boxed:
            boxes = len(boxed_answers(last.content)) if answered else 0
            broken["box"] = "" if boxes == 1 else f"{boxes} boxes in the final answer"
        note = "; ".join(why for why in broken.values() if why)
        return Score(float(not note), {rule: float(not why) for rule, why in broken.items()}, note)
