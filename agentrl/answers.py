r"""Where in a message the answer is: what was said outside thinking, and what stands in ``\boxed{...}``.

Everything here takes one pass over the text, whatever a policy writes. No mathematics: what a box is worth is
a reward's business.
"""

from __future__ import annotations

import re
from typing import Any

from agentrl.errors import BadData
from agentrl.types import Task

__all__ = ["boxed_answers", "shortened", "truth_of", "visible_text"]

# An escaped character is one token, so that the braces of a set, \{1, 2\}, open and close nothing.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def visible_text(text: str) -> str:
    """What follows the last ``</think>``, up to a ``<think>`` that never ends: thinking is not an answer."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def boxed_answers(text: str) -> tuple[str, ...]:
    r"""The contents of every closed ``\boxed{...}`` outside thinking, in order; a box in a box is content."""
    text = visible_text(text)
    closed: list[tuple[int, str]] = []  # (where the box opens, content)
    open_braces: list[tuple[bool, int]] = []  # (is a box, where its content starts)
    for token in _TOKEN.finditer(text):
        symbol = token.group()
        if symbol.endswith("{") and symbol != "\\{":
            open_braces.append((symbol != "{", token.end()))
        elif symbol == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, text[start : token.start()].strip()))
    return tuple(content for _, content in closed)


def truth_of(task: Task, key: str) -> Any:
    """``task.truth[key]``; BadData names what there is instead."""
    if key not in task.truth:
        there = ", ".join(map(repr, task.truth)) or "nothing"
        raise BadData(
            f"task {task.id!r} has no truth {key!r} to score against; its truth has {there}: "
            "name one of them with the reward's key="
        )
    return task.truth[key]


def shortened(text: str, limit: int = 60) -> str:
    """``text`` quoted for a note, at most ``limit`` characters of it."""
    return repr(text if len(text) <= limit else text[:limit] + "...")
