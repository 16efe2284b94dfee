"""Pythonic tool calls, as Llama 3.2 and 4 write them: ``[add(a=1, b=2), search(query="x")]``.

Arguments are given by name; values are Python's or JSON's literals. The brackets and commas belong to the
call before them, the opening ones to the first, and so do ``<|python_start|>`` and ``<|python_end|>``. The
format has no tags of its own: a bracket begins calls where the name of a tool and a parenthesis follow, and
at the start of a line also where it is any name with arguments by name, or without any. Other brackets are
content.
A call is complete with its closing parenthesis. After a bad one reading goes on at ``), name(`` outside of
strings, or wherever that stands once a quote has been met that nothing closes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from agentrl.parsers import Parsed
from agentrl.parsers.literals import STRING, Literals, Malformed, Unclosed
from agentrl.parsers.reading import THOUGHTS, Attempt, begins_line, find_attempts, to_parsed
from agentrl.types import CallStatus

__all__ = ["PythonicParser"]

_NAME: Final = r"[A-Za-z_][\w.-]*+"
_MARKS = re.compile(
    rf"(?P<tag><\|python_start\|>\s*+)?+\[\s*+(?P<name>{_NAME})\((?P<named>\s*+(?:\)|\w++\s*+=|\Z))?+"
    rf"|{THOUGHTS}"
)
_CALL = re.compile(rf"\s*+(?P<name>{_NAME})\(\s*+")
_KEYWORD = re.compile(r"(?P<name>[^\W\d]\w*+)\s*+=\s*+")
_COMMA = re.compile(r"\s*+,\s*+")
_CLOSE = re.compile(r"\s*+\)")
_NEXT_CALL = re.compile(rf"\s*+,\s*+(?={_NAME}\()")
_END = re.compile(r"\s*+,?+\s*+\](?:\s*+<\|python_end\|>)?+")
# Where a bad call ends: before the comma of the next call, or before the end of the list.
_SYNC = re.compile(rf"\)(?=\s*+,\s*+{_NAME}\(|\s*+,?+\s*+\])|{THOUGHTS}")
# A single quote behind a letter is an apostrophe.
_PIECES = re.compile(
    rf"(?P<sync>{_SYNC.pattern})|(?:(?<!\w)|(?=\")){STRING}|\\.|(?P<unclosed>(?<!\w)'|\")", re.DOTALL
)

# A thought that ends in a bad call does so outside of the strings that are whole on one line.
_CROSSED = re.compile(
    rf"(?P<thought>{THOUGHTS})"
    r"""|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|(?<!\w)'[^'\\\n]*+(?:\\.[^'\\\n]*+)*+'|\\."""
)


class PythonicParser:
    """The ``pythonic`` family of :class:`agentrl.parsers.Parser`."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn. Linear in ``text``; never raises."""
        reading = _Reading(tools)
        return to_parsed(text, find_attempts(text, marks=_MARKS, read=reading.read), tools=tools)

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call; the arguments' names must be Python's identifiers."""
        said = ", ".join(f"{key}={_literal(value)}" for key, value in arguments.items())
        return f"[{name}({said})]"


@dataclass(slots=True)
class _Reading:
    """One text's reading."""

    tools: Mapping[str, Any]
    quotes_pair_up: bool = True  # as far as it was looked at

    def read(self, text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
        """The calls of the list that begins at ``mark``, if it is one."""
        by_name = mark["named"] is not None and begins_line(text, mark.start())
        if mark["tag"] is None and mark["name"] not in self.tools and not by_name:
            return (), mark.end()
        attempts: list[Attempt] = []
        begin, at = mark.start(), mark.start("name")
        while True:
            attempt = self._read_call(text, begin, at=at)
            following = _NEXT_CALL.match(text, attempt.span[1])
            end = following or _END.match(text, attempt.span[1])
            begin = at = end.end() if end is not None else attempt.span[1]
            attempts.append(replace(attempt, span=(attempt.span[0], at)))
            if following is None:
                return attempts, at

    def _read_call(self, text: str, begin: int, *, at: int) -> Attempt:
        """The call whose name is at ``at``; its span begins at ``begin``."""
        head = _CALL.match(text, at)
        assert head is not None  # both ways here have seen it
        try:
            arguments, end = _read_arguments(text, head.end())
        except Malformed as error:
            unclosed = isinstance(error, Unclosed)
            status: CallStatus = "unclosed" if unclosed else "invalid_json"
            note = f"the call does not end: {error}" if unclosed else f"invalid call: {error}"
            pieces = _CROSSED.finditer(text, head.end(), error.at)
            thought = next((piece for piece in pieces if piece["thought"]), None)
            span = (begin, self._sync(text, error.at) if thought is None else thought.start())
            return Attempt(span=span, name=head["name"], status=status, note=note)
        return Attempt(span=(begin, end), name=head["name"], arguments=arguments)

    def _sync(self, text: str, at: int) -> int:
        """Where a bad call ends of which all up to ``at`` is read."""
        found: re.Match[str] | None = None
        if self.quotes_pair_up:
            pieces = _PIECES.finditer(text, at)
            found = next((piece for piece in pieces if piece["sync"] or piece["unclosed"]), None)
            # Never again: else as many bad calls before one quote would each be read up to it.
            self.quotes_pair_up = found is None or found["unclosed"] is None
        if not self.quotes_pair_up:
            found = _SYNC.search(text, at)
        if found is None:
            return len(text)
        return found.end() if found[0] == ")" else found.start()


def _read_arguments(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The arguments from ``at`` on and where the closing parenthesis ends. Raises Malformed."""
    literals = Literals(text)
    arguments: dict[str, Any] = {}
    while (close := _CLOSE.match(text, at)) is None:
        keyword = _KEYWORD.match(text, at)
        if keyword is None:
            raise literals.fault(at, "an argument is given by name, as in name=value")
        if keyword["name"] in arguments:
            raise Malformed(f"the argument {keyword['name'][:80]!r} is given twice", at=at)
        arguments[keyword["name"]], at = literals.read(keyword.end())
        comma = _COMMA.match(text, at)
        if comma is None and _CLOSE.match(text, at) is None:
            raise literals.fault(at, "a comma or a closing parenthesis must follow a value")
        at = comma.end() if comma is not None else at
    return arguments, close.end()


def _literal(value: Any) -> str:
    """Python's text for a JSON value."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
