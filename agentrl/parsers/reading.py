"""What every tool-call format shares: thoughts are no calls, and an attempt becomes a call with a status.

A family gives the marks at which an attempt may begin and a function that reads one; here the text is walked,
thoughts are left out and every attempt is kept. What stands in a thought (``<think>...</think>``, or all
before a ``</think>`` whose opening tag was part of the prompt; Mistral writes ``[THINK]``) is content. Where
the text has opened or closed a thought already, a further ``</think>`` is only text, and so is a ``<think>``
that nothing closes, unless the text begins with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agentrl.errors import did_you_mean
from agentrl.parsers import Parsed, ParsedCall
from agentrl.parsers.strict_json import decode, skip_space
from agentrl.types import CallStatus

__all__ = [
    "THOUGHTS",
    "Attempt",
    "Reader",
    "begins_line",
    "compile_ends",
    "find_attempts",
    "find_end",
    "from_arguments",
    "from_object",
    "to_parsed",
]

THOUGHTS: Final = r"</?think>|\[/?THINK\]"  # what a family's pattern of marks must find beside its own
_CLOSING: Final[Mapping[str, str]] = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_LINE_STARTS: Final = ("\n", *_CLOSING.values())
_SHAPE: Final = 'a call is an object with "name", a string, and "arguments", an object'


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt before anyone asked which tool it calls."""

    span: tuple[int, int]  # characters
    name: str = ""  # "" where it does not say
    arguments: Mapping[str, Any] | None = None  # None where status is not ok
    status: CallStatus = "ok"  # of the text alone
    note: str = ""  # why the status is not ok


# Reads the attempts that begin at a mark and says from where to go on: not before the end of the mark.
Reader = Callable[[str, "re.Match[str]"], tuple[Sequence[Attempt], int]]


def find_attempts(text: str, *, marks: re.Pattern[str], read: Reader) -> list[Attempt]:
    """The attempts outside thoughts, in the order of the text."""
    found: list[Attempt] = []
    at = 0
    lead: int | None = 0  # only white space and thoughts stand before it; None: a text has begun
    last = {closing: text.rfind(closing) for closing in _CLOSING.values()}
    thought = False  # one was opened or closed
    while (mark := marks.search(text, at)) is not None:
        closing = _CLOSING.get(mark[0])
        if closing is not None:
            leads = lead is not None and skip_space(text, lead) == mark.start()
            at = mark.end()
            if last[closing] >= at:
                thought, at = True, text.find(closing, at) + len(closing)
            elif leads:
                break
            lead = at if leads else None
        elif mark[0] in last:
            at = mark.end()
            if not thought:
                found.clear()  # the thought began in the prompt: all so far was part of it
                thought, lead = True, at
        else:
            attempts, at = read(text, mark)
            found += attempts
    return found


def compile_ends(*tags: str, also: str = THOUGHTS) -> re.Pattern[str]:
    """For find_end: where a bad call ends at the latest.

    ``tags`` end it wherever they stand: a missing quote hides none. What ``also`` matches does outside of the
    call's strings, as far as those are whole, on one line and without ``tags``. These begin with ``<``,
    ``[``, ``;`` or a line break.
    """
    ends = "|".join(tags)
    return re.compile(rf'(?P<end>{ends}|{also})|"(?:[^"\\\n<\[;]++|\\["\\]|(?!{ends})[^"\n])*+"|\\["\\]')


def find_end(text: str, start: int, *, ends: re.Pattern[str]) -> re.Match[str] | None:
    """Where the bad call whose content begins at ``start`` ends; ``ends`` are of compile_ends."""
    return next((piece for piece in ends.finditer(text, start) if piece["end"] is not None), None)


def begins_line(text: str, start: int, *, after: tuple[str, ...] = ()) -> bool:
    """Nothing but blanks stands before ``start`` on its line, or behind a thought or one of ``after``."""
    before = text[max(start - 64, 0) : start].rstrip(" \t")
    return not before or before.endswith((*_LINE_STARTS, *after))


def to_parsed(text: str, attempts: Sequence[Attempt], *, tools: Mapping[str, Any]) -> Parsed:
    """The content and the calls: each attempt with its raw text, and whether its tool exists."""
    calls = tuple(_to_call(text, attempt, tools) for attempt in attempts)
    return Parsed(content=_content(text, calls), calls=calls)


def from_object(span: tuple[int, int], value: Any, *, keys: Sequence[str] = ("arguments",)) -> Attempt:
    """The attempt that a JSON value makes: an object with a name and, under one of ``keys``, arguments."""
    value = value if isinstance(value, dict) else {}
    name = value.get("name")
    given = next((value[key] for key in keys if key in value), None)
    return from_arguments(span, name if isinstance(name, str) else "", given, note=_SHAPE)


def from_arguments(span: tuple[int, int], name: str, value: Any, *, note: str) -> Attempt:
    """The attempt to call ``name`` with a JSON value; ``note`` is said where that is no call."""
    arguments = _arguments(value)
    if not name or arguments is None:
        return Attempt(span=span, name=name, status="not_object", note=note)
    return Attempt(span=span, name=name, arguments=arguments)


def _arguments(value: Any) -> Mapping[str, Any] | None:
    """An object, or a string that holds one: models trained on OpenAI's format say the latter."""
    if isinstance(value, str):
        try:
            value, _ = decode(value, skip_space(value, 0), stop=len(value))
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _to_call(text: str, attempt: Attempt, tools: Mapping[str, Any]) -> ParsedCall:
    """What is wrong with the text comes before what is wrong with the meaning."""
    status, note = attempt.status, attempt.note
    if status == "ok" and attempt.name not in tools:
        status, note = "unknown_tool", _unknown(attempt.name, tools)
    return ParsedCall(
        name=attempt.name,
        arguments=attempt.arguments if status in ("ok", "unknown_tool") else None,
        raw=text[slice(*attempt.span)],
        status=status,
        note=note,
        span=attempt.span,
    )


def _unknown(name: str, tools: Mapping[str, Any]) -> str:
    known = f"there is: {', '.join(tools)}" if tools else "there are no tools"
    return f"no tool named {name[:80]!r}{did_you_mean(name[:80], tools)}; {known}"


def _content(text: str, calls: Sequence[ParsedCall]) -> str:
    """All but the calls; where there are none, the text as it is."""
    if not calls:
        return text
    starts = [0, *(call.span[1] for call in calls)]
    stops = [*(call.span[0] for call in calls), len(text)]
    pieces = [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
    kept = [pieces[0].rstrip(), *(piece.strip() for piece in pieces[1:])]
    return "\n".join(piece for piece in kept if piece)
