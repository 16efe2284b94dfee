"""Hermes tool calls: ``<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>``.

The format of Hermes, Qwen2.5 and Qwen3. A call is read from its opening tag as JSON, so a ``</tool_call>``
inside a string does not end it; a bad call ends at the next tag, so its neighbours survive. What stands in a
thought (``<think>...</think>``, or all before a ``</think>`` whose opening tag was part of the prompt) is
content and no call. JSON is strict: no NaN, no infinity, no duplicate keys, no lone surrogates, at most 64
levels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from agentrl.errors import did_you_mean
from agentrl.parsers import Parsed, ParsedCall
from agentrl.types import CallStatus

__all__ = ["HermesParser"]

_MAX_DEPTH: Final = 64  # deeper arguments would exhaust the stack of whoever walks them next
_TAG = re.compile(r"</?(?:tool_call|think)>")
_SPACE = re.compile(r"\s*")
# One step through JSON: a string, a bracket, or a run of the rest. Valid JSON has no "<" or "\" outside
# strings; stopping there is what keeps many nested unclosed attempts linear.
_STEP = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]|[^"\[\]{}<\\]++', re.DOTALL)


class HermesParser:
    """The ``hermes`` family of :class:`agentrl.parsers.Parser`."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn. Linear in ``text``; never raises."""
        calls = [_classified(attempt, tools) for attempt in _attempts(text)]
        return Parsed(content=_content(text, calls), calls=tuple(calls))

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call."""
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>{body}</tool_call>"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt before anyone asked what it calls."""

    raw: str
    span: tuple[int, int]  # characters
    value: Any = None  # what the JSON says; None where there is a note
    closed: bool = True  # the closing tag is there
    note: str = ""  # what is wrong with the JSON


def _attempts(text: str) -> list[_Attempt]:
    """The calls outside thoughts, each from its opening tag to where it ends."""
    tags = list(_TAG.finditer(text))
    found: list[_Attempt] = []
    index = 0
    while index < len(tags):
        tag = tags[index]
        index += 1
        if tag[0] == "<tool_call>":
            attempt = _attempt(text, tag, tags, index)
            found.append(attempt)
            while index < len(tags) and tags[index].start() < attempt.span[1]:
                index += 1
        elif tag[0] == "<think>":
            while index < len(tags) and tags[index][0] != "</think>":
                index += 1
            index += 1
        elif tag[0] == "</think>":
            found.clear()  # the thought began in the prompt: all so far was part of it
    return found


def _attempt(text: str, tag: re.Match[str], tags: list[re.Match[str]], index: int) -> _Attempt:
    """The attempt that ``tag`` opens; ``tags[index:]`` are the tags after it."""
    start = _skip_space(text, tag.end())
    try:
        value, end = _decode(text, start, stop=tags[index].start() if index < len(tags) else len(text))
        note = ""
    except ValueError as error:
        value, end, note = None, start, f"invalid JSON: {error}"
    while index < len(tags) and tags[index].start() < end:
        index += 1  # a tag inside a JSON string
    close = tags[index] if index < len(tags) else None
    closed = close is not None and close[0] == "</tool_call>"
    stop = len(text) if close is None else close.end() if closed else close.start()
    rest = text[end : stop if close is None or not closed else close.start()]
    if not note and rest.strip():
        value, note = None, "invalid JSON: there is more text after the object"
    return _Attempt(text[tag.start() : stop], (tag.start(), stop), value, closed, note)


def _classified(attempt: _Attempt, tools: Mapping[str, Mapping[str, Any]]) -> ParsedCall:
    """Decide the status: what is wrong with the text comes before what is wrong with the meaning."""
    value = attempt.value if isinstance(attempt.value, dict) else {}
    name = value.get("name") if isinstance(value.get("name"), str) else ""
    arguments = _arguments(value.get("arguments"))
    status: CallStatus = "ok"
    note = attempt.note
    if not attempt.closed:
        status, note = "unclosed", "the call does not end with </tool_call>"
    elif note:
        status = "invalid_json"
    elif not name or arguments is None:
        status, note = "not_object", 'a call is an object with "name", a string, and "arguments", an object'
    elif name not in tools:
        status, note = "unknown_tool", _unknown(name, tools)
    return ParsedCall(
        name=name or "",
        arguments=arguments if status in ("ok", "unknown_tool") else None,
        raw=attempt.raw,
        status=status,
        note=note,
        span=attempt.span,
    )


def _arguments(value: Any) -> Mapping[str, Any] | None:
    """An object, or a string that holds one: models trained on OpenAI's format say the latter."""
    if isinstance(value, str):
        try:
            value, end = _decode(value, _skip_space(value, 0), stop=len(value))
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _unknown(name: str, tools: Mapping[str, Mapping[str, Any]]) -> str:
    known = f"there is: {', '.join(tools)}" if tools else "there are no tools"
    return f"no tool named {name[:80]!r}{did_you_mean(name[:80], tools)}; {known}"


def _content(text: str, calls: list[ParsedCall]) -> str:
    """All but the calls; where there are none, the text as it is."""
    if not calls:
        return text
    starts = [0, *(call.span[1] for call in calls)]
    stops = [*(call.span[0] for call in calls), len(text)]
    pieces = [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
    kept = [pieces[0].rstrip(), *(piece.strip() for piece in pieces[1:])]
    return "\n".join(piece for piece in kept if piece)


def _decode(text: str, start: int, *, stop: int) -> tuple[Any, int]:
    """The JSON value at ``start`` and where it ends; an object that does not end is read up to ``stop``.

    Raises ValueError with a note for the model.
    """
    end = _balanced_end(text, start)
    end = stop if end is None else end
    try:
        value = json.loads(
            text[start:end],
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from error
    _refuse_surrogates(value)
    return value, end


def _balanced_end(text: str, start: int) -> int | None:
    """The end of the object or list that begins at ``start``, or None. Too deep a one: ValueError."""
    if text[start : start + 1] not in ("{", "["):
        return None
    depth = 0
    for step in _steps(text, start):
        character = step[0][0]
        if character in "{[":
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return step.end()
    return None


def _steps(text: str, start: int) -> Iterator[re.Match[str]]:
    step = _STEP.match(text, start)
    while step is not None:
        yield step
        step = _STEP.match(text, step.end())


def _skip_space(text: str, start: int) -> int:
    return start + len(_SPACE.match(text, start)[0])  # type: ignore[index]  # the pattern matches everywhere


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value


def _refuse_surrogates(value: Any) -> None:
    """A lone ``\\ud800`` can't be written as UTF-8: whoever stores or tokenises the arguments would crash."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair") from error
