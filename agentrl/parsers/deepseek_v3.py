"""DeepSeek's tool calls, as V3 and R1 write them and as V3.1 does.

V3: ``<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME``, a line break, the arguments as JSON in a fence of
three backticks marked json, ``<｜tool▁call▁end｜>``. V3.1: ``<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}
<｜tool▁call▁end｜>``. The tags around the list of calls belong to its first and its last call. The arguments
are read as JSON, so a tag inside a string ends nothing. A bad call ends with the tag behind its last brace
where its brackets and quotes pair up, else at the next tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agentrl.parsers import Parsed
from agentrl.parsers.reading import (
    THOUGHTS,
    Attempt,
    compile_ends,
    find_attempts,
    find_end,
    from_arguments,
    to_parsed,
)
from agentrl.parsers.strict_json import InvalidJSON, decode

__all__ = ["DeepSeekV3Parser"]

_LIST_OPEN: Final = "<｜tool▁calls▁begin｜>"
_LIST_CLOSE: Final = "<｜tool▁calls▁end｜>"
_OPEN: Final = "<｜tool▁call▁begin｜>"
_SEPARATOR: Final = "<｜tool▁sep｜>"
_CLOSE: Final = "<｜tool▁call▁end｜>"
_MARKS = re.compile(rf"{_LIST_OPEN}(?:\s*+{_OPEN})?|{_OPEN}|{THOUGHTS}")
_ENDS = compile_ends(_LIST_OPEN, _LIST_CLOSE, _OPEN, _CLOSE)
_AFTER = re.compile(rf"\s*+{_LIST_CLOSE}")
# What stands before the arguments: with a fence the name comes after the separator, without one before it.
_HEAD = re.compile(
    rf"(?P<first>[^\n<]*+){_SEPARATOR}(?:(?P<name>[^\n<{{`]++)\n```(?:json)?+(?P<fence>\s*+)|\s*+)"
)
_FENCE = re.compile(r"\s*+```")
_NOTE: Final = "a call is a tool's name and its arguments, an object"


class DeepSeekV3Parser:
    """The ``deepseek_v3`` family of :class:`agentrl.parsers.Parser`."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn. Linear in ``text``; never raises."""
        return to_parsed(text, find_attempts(text, marks=_MARKS, read=_read), tools=tools)

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call, as V3 writes it."""
        body = json.dumps(arguments, ensure_ascii=False)
        call = f"{_OPEN}function{_SEPARATOR}{name}\n```json\n{body}\n```{_CLOSE}"
        return f"{_LIST_OPEN}{call}{_LIST_CLOSE}"


def _read(text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
    tag = find_end(text, mark.end(), ends=_ENDS)
    head = _HEAD.match(text, mark.end(), len(text) if tag is None else tag.start())
    name, value, end = "", None, mark.end()
    note = "invalid call: a name, a separator and arguments are wanted"
    if head is not None:
        name = (head["name"] or head["first"]).strip()
        try:
            value, end = decode(text, head.end(), stop=len(text) if tag is None else tag.start())
            note = ""
        except InvalidJSON as error:
            end, note = error.end or end, f"invalid JSON: {error}"
    if tag is not None and tag.start() < end:
        tag = find_end(text, end, ends=_ENDS)  # the first one was inside a JSON string
    fence = _FENCE.match(text, end) if head is not None and head["fence"] is not None else None
    rest = text[fence.end() if fence else end : len(text) if tag is None else tag.start()]
    if not note and rest.strip():
        note = "invalid JSON: there is more text after the arguments"
    stop, closed = _find_stop(text, tag)
    return [_attempt((mark.start(), stop), name, value, note=note, closed=closed)], stop


def _find_stop(text: str, tag: re.Match[str] | None) -> tuple[int, bool]:
    """Where the call ends whose next tag is ``tag``, and whether that tag closes it."""
    if tag is None or tag[0] != _CLOSE:
        return len(text) if tag is None else tag.start(), False
    after = _AFTER.match(text, tag.end())
    return after.end() if after else tag.end(), True


def _attempt(span: tuple[int, int], name: str, value: Any, *, note: str, closed: bool) -> Attempt:
    if not closed:
        note = f"the call does not end with {_CLOSE}"
        return Attempt(span=span, name=name, status="unclosed", note=note)
    if note:
        return Attempt(span=span, name=name, status="invalid_json", note=note)
    return from_arguments(span, name, value, note=_NOTE)
