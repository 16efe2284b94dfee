"""The seam to verification: a conversation in, a finite score with its parts out. The catalogue is in ``agentrl.rewards``.

A reward is any callable that takes :class:`Evidence` and returns a float or a :class:`Score`. It runs in a worker
thread, never on the event loop, and must not keep state between calls. A limit hit while judging the policy's output
is the policy's fault (the minimum); only a failure of the world raises :class:`WorldError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agentrl.types import Message, Score, Task

__all__ = ["Evidence", "Gate", "Reward", "Rubric", "WeightedSum", "as_score"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a reward may look at."""

    task: Task  # with its truth
    messages: tuple[Message, ...]  # the whole conversation
    env: Any = None  # the environment in its final state, for rewards that inspect it
    completion_tokens: int = 0  # sampled in this episode so far; 0 where nobody counted (stepped by hand)

    @property
    def answer(self) -> str:
        """The text of the last assistant message; "" if the assistant said nothing."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


class Reward(Protocol):
    """What environments need of a reward."""

    def __call__(self, evidence: Evidence, /) -> Score | float:
        """Score an episode. Raises WorldError for a failure of the world; anything else raised is a bug."""
        ...
