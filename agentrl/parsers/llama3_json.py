"""Llama 3's JSON tool calls: ``{"name": "add", "parameters": {"a": 1}}``, several joined by ``; ``.

``<|python_tag|>`` may stand before a call and belongs to it, as the ``;`` after it does. The format has no
tags of its own, so text is told from calls by what it says: an object is a call where it names one of the
tools, and at the start of a line where it has a name and parameters, or is too broken to tell. Other JSON,
such as an answer or an example in prose, is content. What follows ``<|python_tag|>`` is a call in any
case. A bad call whose brackets and quotes pair up ends with its last brace; another one with its line, or
before the next call, which a ``;`` announces, or a brace before it and the name of a tool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agentrl.parsers import Parsed
from agentrl.parsers.reading import (
    THOUGHTS,
    Attempt,
    begins_line,
    compile_ends,
    find_attempts,
    from_object,
    to_parsed,
)
from agentrl.parsers.strict_json import Extent, decode, find_extent
from agentrl.types import CallStatus

__all__ = ["Llama3JsonParser"]

_TAG: Final = "<|python_tag|>"
_KEYS: Final = ("arguments", "parameters")
_MARKS = re.compile(
    r'(?P<tag><\|python_tag\|>\s*+)?+\{\s*+"(?:type"\s*+:\s*+"function"\s*+,\s*+")?+'
    r'(?:name"\s*+:\s*+"(?P<name>[^"\\<\n]*+)"?+|(?:type|function|parameters|arguments)"\s*+:)'
    rf"|<\|python_tag\|>|{THOUGHTS}"
)
_THOUGHT = re.compile(THOUGHTS)
_SEPARATOR = re.compile(r"[ \t]*+;\s*+(?=\{|<\|python_tag\|>)")
_ENDS = compile_ends(
    r";\s*+(?=\{)",
    r"<\|python_tag\|>",
    r"\n",
    rf"(?:{THOUGHTS})(?=\s*+\{{)",
    also=rf'{THOUGHTS}|(?<=\}})\s*+(?=\{{\s*+"name"\s*+:\s*+"(?P<next>[^"\\]*+)")',
)
_TAGS = re.compile(rf"<\|python_tag\|>|{THOUGHTS}")


class Llama3JsonParser:
    """The ``llama3_json`` family of :class:`agentrl.parsers.Parser`."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn. Linear in ``text``; never raises."""
        reading = _Reading(tools)
        return to_parsed(text, find_attempts(text, marks=_MARKS, read=reading.read), tools=tools)

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call."""
        return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Reading:
    tools: Mapping[str, Any]

    def read(self, text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
        """The attempt at ``mark``, if it is one."""
        brace = mark[0].find("{")
        if brace < 0:  # a python tag before what is no call of this format
            following = _TAGS.search(text, mark.end())
            stop = len(text) if following is None else following.start()
            note = 'invalid JSON: {"name": ..., "parameters": {...}} must follow <|python_tag|>'
            return [Attempt(span=(mark.start(), stop), status="invalid_json", note=note)], stop
        start = mark.start() + brace
        extent = find_extent(text, start)
        sure = mark["tag"] is not None or mark["name"] in self.tools
        if not sure and not begins_line(text, mark.start(), after=(";",)):
            at = max(extent.stop, mark.end())
            thought = _THOUGHT.search(text, mark.end(), at) if extent.fault else None
            return (), at if thought is None else thought.start()
        attempt = self._attempt(text, mark.start(), start, extent=extent)
        if not sure and attempt.status == "not_object":
            return (), extent.stop  # JSON that calls nothing: an answer
        return [attempt], attempt.span[1]

    def _attempt(self, text: str, begin: int, start: int, *, extent: Extent) -> Attempt:
        """The object at ``start``, whose span begins at ``begin``."""
        stop = extent.stop
        status: CallStatus = "invalid_json"
        try:
            value, _ = decode(text, start, stop=stop)
            note = ""
        except ValueError as error:
            value, note = None, f"invalid JSON: {error}"
        if extent.fault:
            stop = self._boundary(text, start + 1, after=stop)
        if extent.fault == "unclosed" or (extent.fault and text[extent.stop : extent.stop + 1] == ";"):
            status, note = "unclosed", note and "the call does not end: a brace or a quote is missing"
        separator = _SEPARATOR.match(text, stop)
        span = (begin, separator.end() if separator else stop)
        if not note:
            return from_object(span, value, keys=_KEYS)
        return Attempt(span=span, name=_name(text, start), status=status, note=note)

    def _boundary(self, text: str, start: int, *, after: int) -> int:
        """Where a bad call ends: before the next one, or with its line, but not with one before ``after``."""
        for piece in _ENDS.finditer(text, start):
            early = piece["end"] == "\n" and piece.start() < after
            unknown = piece["next"] is not None and piece["next"] not in self.tools
            if piece["end"] is not None and not early and not unknown:
                return piece.start()
        return len(text)


def _name(text: str, start: int) -> str:
    mark = _MARKS.match(text, start)
    return (mark["name"] or "") if mark is not None else ""
