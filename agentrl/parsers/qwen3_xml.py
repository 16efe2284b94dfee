"""Qwen3-Coder's tool calls: ``<tool_call><function=add><parameter=a>1</parameter></function></tool_call>``.

A value is plain text, without the line break on either side of it; the tool's schema says what it means.
Where a string is allowed and nothing else, it is the text; where something else is allowed, it is read as
JSON (``True``, ``False`` and ``None`` count), and stays text if that fails and a string, or anything, is
allowed.

The format escapes nothing. A ``</parameter>`` ends a value where ``<parameter=`` or the end of the call
follows, so tags inside a value survive unless they spell that; ``<tool_call><function=`` always begins one.

Models forget tags, and what is plain without them is read. ``<function=add>`` without ``<tool_call>`` begins
a call at the start of a line, and elsewhere where it names a tool and no prose follows. Such a call ends with
``</function>``, its ``</tool_call>`` may be missing, and its values hold no tags of calls or thoughts. One
``<tool_call>`` may hold several functions, each of which is a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agentrl.parsers import Parsed
from agentrl.parsers.reading import THOUGHTS, Attempt, begins_line, find_attempts, to_parsed
from agentrl.parsers.strict_json import decode, skip_space
from agentrl.types import CallStatus

__all__ = ["Qwen3XmlParser"]

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_AFTER_VALUE: Final = "another one or the end of the call must follow its </parameter>"
_FUNCTION: Final = r"<function=(?P<name>[^<>\n]*+)(?:>|\Z)"
_MARKS = re.compile(rf"{_OPEN}|{_FUNCTION}|{THOUGHTS}")
_HEAD = re.compile(rf"\s*+{_FUNCTION}")
_NO_PROSE = re.compile(r"\s*+(?:[<{]|\Z)")
_PARAMETER = re.compile(r"\s*+<parameter=(?P<name>[^<>\n]*+)>\n?+")
# Where a value without an end ends at the latest, before another call.
_CLOSING = re.compile(rf"{_CLOSE}|</think>|\[/THINK\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How a call is read that has its opening tag, or has not."""

    value_end: re.Pattern[str]  # or, as "bound", what no value goes beyond
    end: re.Pattern[str]  # after the parameters
    bad_end: re.Pattern[str]  # of a call that does not go on as it must


_TAGS: Final = rf"{_OPEN}|{_CLOSE}|(?<=\n)<function=|{THOUGHTS}"
_TAGGED = _Form(
    value_end=re.compile(
        r"\n?</parameter>(?=\s*+(?:<parameter=|</function>\s*+"
        rf"(?:{_CLOSE}|{_OPEN}\s*+<function=|<function=|\Z)))|(?P<bound>{_OPEN}\s*+<function=)"
    ),
    end=re.compile(rf"\s*+</function>(?:\s*+{_CLOSE}|(?=\s*+{_FUNCTION}))"),
    bad_end=re.compile(_TAGS),
)
_BARE = _Form(
    value_end=re.compile(
        r"\n?</parameter>(?=\s*+(?:<parameter=|</function>))"
        rf"|(?P<bound>{_OPEN}|{_CLOSE}|{THOUGHTS})"
    ),
    end=re.compile(rf"\s*+</function>(?:\s*+{_CLOSE})?+"),
    bad_end=re.compile(rf"</function>(?:\s*+{_CLOSE})?+|{_TAGS}"),
)
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


@dataclass(frozen=True, slots=True)
class _Reading:
    tools: Mapping[str, Mapping[str, Any]]

    def read(self, text: str, mark: re.Match[str]) -> tuple[Sequence[Attempt], int]:
        """The attempts at ``mark``: its call, and those that follow before a closing tag."""
        tagged = mark[0] == _OPEN
        if not tagged and not self._begins_call(text, mark):
            return (), mark.end()
        head = _HEAD.match(text, mark.end() if tagged else mark.start())
        if head is None:
            attempt = _without_head(text, mark)
            return [attempt], attempt.span[1]
        attempts: list[Attempt] = []
        begin, at = mark.start(), mark.start()
        while head is not None:
            attempts.append(self._read_call(text, head, begin=begin, form=_TAGGED if tagged else _BARE))
            at = attempts[-1].span[1]
            begin = skip_space(text, at)
            head = None if text.endswith(_CLOSE, 0, at) else _HEAD.match(text, at)
        return attempts, at

    def _begins_call(self, text: str, mark: re.Match[str]) -> bool:
        """Whether a ``<function=name>`` without ``<tool_call>`` is meant as a call."""
        if begins_line(text, mark.start(), after=(_CLOSE, "</function>")):
            return True
        return mark["name"].strip() in self.tools and _NO_PROSE.match(text, mark.end()) is not None

    def _read_call(self, text: str, head: re.Match[str], *, begin: int, form: _Form) -> Attempt:
        """The call of the function at ``head``; its span begins at ``begin``."""
        name = head["name"].strip()
        said: list[tuple[str, str]] = []
        at = head.end()
        while (parameter := _PARAMETER.match(text, at)) is not None:
            key = parameter["name"].strip()
            value_end = form.value_end.search(text, parameter.end())
            if value_end is None or value_end["bound"] is not None:
                bound = len(text) if value_end is None else value_end.start()
                stop = _find_stop(text, parameter.end(), bound=bound)
                note = f"the parameter {key[:80]!r} does not end: {_AFTER_VALUE}"
                return Attempt(span=(begin, stop), name=name, status="unclosed", note=note)
            said.append((key, text[parameter.end() : value_end.start()]))
            at = value_end.end()
        end = form.end.match(text, at)
        if end is None:
            return _bad_end(text, at, begin=begin, name=name, form=form)
        return self._attempt((begin, end.end()), name, said)

    def _attempt(self, span: tuple[int, int], name: str, said: Sequence[tuple[str, str]]) -> Attempt:
        """A call that is complete, with the text of each of its parameters."""
        if not name:
            return Attempt(span=span, status="not_object", note="a call names its tool: <function=name>")
        properties = self.tools.get(name, {}).get("properties", {})
        arguments: dict[str, Any] = {}
        note = ""
        for key, value in said:
            try:
                if key in arguments:
                    note = note or f"the parameter {key[:80]!r} is given twice"
                arguments[key] = _read_value(value, properties.get(key))
            except ValueError as error:
                note = note or f"the parameter {key[:80]!r} is no valid JSON: {error}"
        if note:
            return Attempt(span=span, name=name, status="invalid_json", note=note)
        return Attempt(span=span, name=name, arguments=arguments)


def _without_head(text: str, mark: re.Match[str]) -> Attempt:
    tag = _TAGGED.bad_end.search(text, mark.end())
    closed = tag is not None and tag[0] == _CLOSE
    stop = len(text) if tag is None else tag.end() if closed else tag.start()
    status: CallStatus = "invalid_json" if closed else "unclosed"
    note = f"<function=name> must follow {_OPEN}" if closed else f"the call does not end with {_CLOSE}"
    return Attempt(span=(mark.start(), stop), status=status, note=note)


def _bad_end(text: str, at: int, *, begin: int, name: str, form: _Form) -> Attempt:
    """The call whose parameters end at ``at``, but not itself."""
    tag = form.bad_end.search(text, at)
    closed = tag is not None and tag[0].startswith("</") and tag[0] != "</think>"
    stop = len(text) if tag is None else tag.end() if closed else tag.start()
    status: CallStatus = "invalid_json" if closed else "unclosed"
    note = f"after its parameters a call ends with </function> and {_CLOSE}"
    return Attempt(span=(begin, stop), name=name, status=status, note=note)


def _find_stop(text: str, start: int, *, bound: int) -> int:
    """Where the call ends whose last value begins at ``start`` and, without an end, goes up to ``bound``."""
    tag = _CLOSING.search(text, start, bound)
    if tag is None:
        return bound + len(_CLOSE) if text.startswith(_CLOSE, bound) else bound
    if tag[0] != _CLOSE:
        return tag.start()
    # The text of a value that was cut may spell a call that nobody made.
    return bound if text.find("<function=", tag.end(), bound) >= 0 else tag.end()


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
