"""Hermes tool calls: ``<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>``.

The format of Hermes, Qwen2.5 and Qwen3. A call is read from its opening tag as JSON, so a ``</tool_call>``
inside a string does not end it. A bad call ends with the tag behind its last brace where its brackets and
quotes pair up, else at the next tag, so its neighbours survive.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from agentrl.parsers import Parsed
from agentrl.parsers.reading import (
    THOUGHTS,
    Attempt,
    compile_ends,
    find_attempts,
    find_end,
    from_object,
    to_parsed,
)
from agentrl.parsers.strict_json import InvalidJSON, decode, skip_space

__all__ = ["HermesParser"]

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_MARKS = re.compile(f"{_OPEN}|{THOUGHTS}")
_ENDS = compile_ends(_OPEN, _CLOSE)


class HermesParser:
    """The ``hermes`` family of :class:`agentrl.parsers.Parser`."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn. Linear in ``text``; never raises."""
        return to_parsed(text, find_attempts(text, marks=_MARKS, read=_read), tools=tools)

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call."""
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"{_OPEN}{body}{_CLOSE}"


def _read(text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
    start = skip_space(text, mark.end())
    tag = find_end(text, mark.end(), ends=_ENDS)
    try:
        value, end = decode(text, start, stop=tag.start() if tag else len(text))
        note = ""
    except InvalidJSON as error:
        value, end, note = None, error.end or mark.end(), f"invalid JSON: {error}"
    if tag is not None and tag.start() < end:
        tag = find_end(text, end, ends=_ENDS)  # the first one was inside a JSON string
    closed = tag is not None and tag[0] == _CLOSE
    stop = len(text) if tag is None else tag.end() if closed else tag.start()
    rest = text[end : tag.start() if tag else len(text)]
    if not note and rest.strip():
        value, note = None, "invalid JSON: there is more text after the object"
    return [_attempt((mark.start(), stop), value, closed=closed, note=note)], stop


def _attempt(span: tuple[int, int], value: Any, *, closed: bool, note: str) -> Attempt:
    attempt = from_object(span, value)
    if not closed:
        note = f"the call does not end with {_CLOSE}"
        return replace(attempt, arguments=None, status="unclosed", note=note)
    return replace(attempt, arguments=None, status="invalid_json", note=note) if note else attempt
