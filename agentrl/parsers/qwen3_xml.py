"""Qwen3-Coder's tool calls: ``<tool_call><function=add><parameter=a>1</parameter></function></tool_call>``.

A value is plain text, without the line break on either side of it; the tool's schema says what it means.
Where a string is allowed and nothing else, it is the text; where something else is allowed, it is read as
JSON (``True``, ``False`` and ``None`` count), and stays text if that fails and a string, or anything, is
allowed.

The format escapes nothing. A ``</parameter>`` ends a value where ``<parameter=`` or the end of the call
follows, so tags inside a value survive unless they spell that; ``<tool_call><function=`` always begins one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agentrl.parsers import Parsed
from agentrl.parsers.reading import THOUGHTS, Attempt, find_attempts, to_parsed
from agentrl.parsers.strict_json import decode, skip_space
from agentrl.types import CallStatus

__all__ = ["Qwen3XmlParser"]

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_MARKS = re.compile(rf"{_OPEN}|{THOUGHTS}")
_TAGS = re.compile(rf"{_OPEN}|{_CLOSE}|{THOUGHTS}")
_HEAD = re.compile(r"\s*+<function=(?P<name>[^<>\n]*+)>")
_NEXT_CALL = re.compile(rf"{_OPEN}\s*+<function=")
_PARAMETER = re.compile(r"\s*+<parameter=(?P<name>[^<>\n]*+)>\n?+")
_VALUE_END = re.compile(rf"\n?</parameter>(?=\s*+(?:<parameter=|</function>\s*+{_CLOSE}))")
_END = re.compile(rf"\s*+</function>\s*+{_CLOSE}")
_WORDS: Final[Mapping[str, Any]] = {"True": True, "False": False, "None": None}
_TYPES: Final[Mapping[type, str]] = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object",
    type(None): "null",
}  # fmt: skip


class Qwen3XmlParser:
    """The ``qwen3_xml`` family of :class:`agentrl.parsers.Parser`, also called ``qwen3_coder``."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn. Linear in ``text``; never raises."""
        return to_parsed(text, find_attempts(text, marks=_MARKS, read=_Reading(tools).read), tools=tools)

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call."""
        lines = [f"{_OPEN}\n<function={name}>\n"]
        for key, value in arguments.items():
            said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"<parameter={key}>\n{said}\n</parameter>\n")
        return "".join([*lines, f"</function>\n{_CLOSE}"])


class _Malformed(Exception):
    """The text is no call; the message is for the model."""


class _Unclosed(_Malformed):
    """The text is no call yet."""


@dataclass(frozen=True, slots=True)
class _Reading:
    tools: Mapping[str, Mapping[str, Any]]

    def read(self, text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
        """The attempt at ``mark``: up to its end, or a bad one up to the next call at most."""
        head = _HEAD.match(text, mark.end())
        if head is None:
            return self._without_head(text, mark)
        following = _NEXT_CALL.search(text, head.end())
        bound = len(text) if following is None else following.start()
        try:
            arguments, end = self._body(text, head, bound=bound)
        except _Malformed as error:
            stop, closed = _bad_end(text, head.end(), bound=bound)
            unclosed = isinstance(error, _Unclosed) or not closed
            status: CallStatus = "unclosed" if unclosed else "invalid_json"
            name, note = head["name"].strip(), str(error)
            return [Attempt(span=(mark.start(), stop), name=name, status=status, note=note)], stop
        name = head["name"].strip()
        if not name:
            note = "a call names its tool: <function=name>"
            return [Attempt(span=(mark.start(), end), status="not_object", note=note)], end
        return [Attempt(span=(mark.start(), end), name=name, arguments=arguments)], end

    def _without_head(self, text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
        tag = _TAGS.search(text, mark.end())
        closed = tag is not None and tag[0] == _CLOSE
        stop = len(text) if tag is None else tag.end() if closed else tag.start()
        status: CallStatus = "invalid_json" if closed else "unclosed"
        note = f"<function=name> must follow {_OPEN}" if closed else f"the call does not end with {_CLOSE}"
        return [Attempt(span=(mark.start(), stop), status=status, note=note)], stop

    def _body(self, text: str, head: re.Match[str], *, bound: int) -> tuple[dict[str, Any], int]:
        """The arguments after ``head`` and where the call ends. Raises _Malformed."""
        schema = self.tools.get(head["name"].strip(), {})
        properties = schema.get("properties", {})
        arguments: dict[str, Any] = {}
        at = head.end()
        while (parameter := _PARAMETER.match(text, at, bound)) is not None:
            name = parameter["name"].strip()
            end = _VALUE_END.search(text, parameter.end(), bound)
            if end is None:
                raise _Unclosed(f"the parameter {name[:80]!r} does not end with </parameter>")
            if name in arguments:
                raise _Malformed(f"the parameter {name[:80]!r} is given twice")
            try:
                arguments[name] = _read_value(text[parameter.end() : end.start()], properties.get(name))
            except ValueError as error:
                raise _Malformed(f"the parameter {name[:80]!r} is no valid JSON: {error}") from error
            at = end.end()
        end = _END.match(text, at, bound)
        if end is None:
            raise _Malformed(f"after its parameters a call ends with </function> and {_CLOSE}")
        return arguments, end.end()


def _bad_end(text: str, start: int, *, bound: int) -> tuple[int, bool]:
    """Where a bad call ends, and whether its closing tag is there."""
    close = text.find(_CLOSE, start, bound)
    return (bound, False) if close < 0 else (close + len(_CLOSE), True)


def _read_value(said: str, schema: Any) -> Any:
    """What ``said`` means under ``schema``. Raises ValueError where it must be JSON and is not."""
    types = frozenset(_types(schema))
    if types == {"string"}:
        return said
    try:
        value = _decode_all(said)
    except ValueError:
        if types and "string" not in types:
            raise
        return said
    if types and "string" not in types:
        return value
    fits = not types or _TYPES[type(value)] in types or (type(value) is int and "number" in types)
    return value if fits and not isinstance(value, str) else said


def _decode_all(said: str) -> Any:
    word = said.strip()
    if word in _WORDS:
        return _WORDS[word]
    start = skip_space(said, 0)
    value, end = decode(said, start, stop=len(said))
    if said[end:].strip():
        raise ValueError("there is more text after the value")
    return value


def _types(schema: Any) -> Iterator[str]:
    """The JSON types that ``schema`` names; none where it allows anything or does not say."""
    if not isinstance(schema, Mapping):
        return
    named = schema.get("type", ())
    yield from (named,) if isinstance(named, str) else named
    for option in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _types(option)
    for value in schema.get("enum", ()):
        yield _TYPES.get(type(value), "object")
