"""Mistral's tool calls, in both of its forms.

Up to version 10 of its tokenizers: ``[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "..."}]``;
the brackets and commas belong to the call before them, the opening ones to the first. From version 11:
``[TOOL_CALLS]add{"a": 1}``, where ``[CALL_ID]...`` and ``[ARGS]`` may follow the name. Neither has a closing
tag: a call ends with its last brace, a bad one too where its brackets and quotes pair up; else it ends at the
next object of the list or the next tag.
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
    from_arguments,
    from_object,
    to_parsed,
)
from agentrl.parsers.strict_json import Extent, decode, find_extent
from agentrl.types import CallStatus

__all__ = ["MistralParser"]

_OPEN: Final = "[TOOL_CALLS]"
_MARKS = re.compile(rf"\[TOOL_CALLS\]|{THOUGHTS}")
_ENDS = compile_ends(r"\[TOOL_CALLS\]")
_LIST = re.compile(r"\s*+\[\s*+(?=\{)")
_OBJECT = re.compile(r"\s*+(?=\{)")
# Neither a quote nor what stands behind one: a tag inside a cut JSON string begins no call.
_NAMED = re.compile(
    r"\s*+(?P<name>[^\s\[\]{}<>\"':,]++)\s*+(?:\[CALL_ID\][^\s\[\]{}]*+\s*+)?+(?:\[ARGS\]\s*+)?+"
)
# Where the next call of a list begins, after a bad one.
_NEXT_OBJECT = re.compile(r'(?<=\})\s*+,\s*+(?=\{\s*+"(?:name|arguments|id)")')
_BETWEEN = re.compile(r"\s*+,\s*+(?=\{)|\s*+\]")
_UNCLOSED: Final = "the call does not end: a brace or a quote is missing"
_NOTE: Final = "a call is a tool's name and its arguments, an object"


class MistralParser:
    """The ``mistral`` family of :class:`agentrl.parsers.Parser`."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn. Linear in ``text``; never raises."""
        return to_parsed(text, find_attempts(text, marks=_MARKS, read=_read), tools=tools)

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call, in the form of version 11."""
        return f"{_OPEN}{name}{json.dumps(arguments, ensure_ascii=False)}"


def _read(text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
    opened = _LIST.match(text, mark.end())
    if opened is not None:
        return _read_list(text, mark, at=opened.end())
    bare = _OBJECT.match(text, mark.end())
    if bare is not None:
        bound = _find_bound(text, mark.end())
        attempt = _read_object(text, mark.start(), at=bare.end(), bound=bound)
    else:
        attempt = _read_named(text, mark)
    return [attempt], attempt.span[1]


def _read_named(text: str, mark: re.Match[str]) -> Attempt:
    """``name{...}``, as from version 11 on."""
    head = _NAMED.match(text, mark.end())
    start = head.end() if head is not None else mark.end()
    name = head["name"] if head is not None else ""
    extent = find_extent(text, start)
    status, value, note = _read_json(text, start, extent=extent)
    if status == "ok":
        return from_arguments((mark.start(), extent.stop), name, value, note=_NOTE)
    stop = _find_bound(text, mark.end()) if extent.fault else extent.stop
    said = text[start:stop]  # without the next call, which a missing quote may have swallowed
    if find_extent(said, 0).fault == "unclosed":
        status, note = "unclosed", _UNCLOSED
    return Attempt(span=(mark.start(), stop), name=name, status=status, note=note)


def _read_list(text: str, mark: re.Match[str], *, at: int) -> tuple[Sequence[Attempt], int]:
    """``[{...}, {...}]``, as up to version 10; ``at`` is the first object."""
    attempts: list[Attempt] = []
    begin, bound = mark.start(), _find_bound(text, mark.end())
    while True:
        bound = bound if bound >= at else _find_bound(text, at)
        attempt = _read_object(text, begin, at=at, bound=bound)
        between = _BETWEEN.match(text, attempt.span[1])
        if between is None:
            return [*attempts, attempt], attempt.span[1]
        attempts.append(replace(attempt, span=(begin, between.end())))
        begin = at = between.end()
        if between[0].endswith("]"):
            return attempts, at


def _read_object(text: str, begin: int, *, at: int, bound: int) -> Attempt:
    """The object at ``at``; its span begins at ``begin``; a bad one ends by ``bound``."""
    extent = find_extent(text, at)
    status, value, note = _read_json(text, at, extent=extent)
    if status == "ok":
        return from_object((begin, extent.stop), value)
    stop = extent.stop
    if extent.fault:
        following = _NEXT_OBJECT.search(text, stop, max(bound, stop))
        stop = following.start() if following is not None else max(bound, stop)
    return Attempt(span=(begin, stop), status=status, note=note)


def _read_json(text: str, start: int, *, extent: Extent) -> tuple[CallStatus, Any, str]:
    """(status, value, note) of the JSON at ``start``."""
    if extent.fault == "unclosed":
        return "unclosed", None, _UNCLOSED
    try:
        value, _ = decode(text, start, stop=extent.stop)
    except ValueError as error:
        return "invalid_json", None, f"invalid JSON: {error}"
    return "ok", value, ""


def _find_bound(text: str, start: int) -> int:
    """Where a bad call ends at the latest."""
    end = find_end(text, start, ends=_ENDS)
    return len(text) if end is None else end.start()
