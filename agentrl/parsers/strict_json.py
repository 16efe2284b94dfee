"""JSON inside free text: where a value ends, and what it says.

Strict: no NaN, no infinity, no duplicate keys, no lone surrogates, at most 64 levels. A scan stops at the
first character that no JSON has outside its strings, so many broken values in one text cost linear time:
whoever looks for the next value from where a scan stopped reads every character at most once more.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["Extent", "InvalidJSON", "decode", "find_extent", "refuse_surrogates", "skip_space"]

_MAX_DEPTH: Final = 64  # deeper arguments would exhaust the stack of whoever walks them next
_SPACE = re.compile(r"\s*+")
_STEP = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]|\s++|[,:]|-?[0-9][0-9.eE+-]*+|true|false|null', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Extent:
    """How far an object or a list goes."""

    stop: int  # its end; where there is a fault, what can't belong to it any more
    fault: Literal["", "unclosed", "invalid", "deep"] = ""  # unclosed: right so far, but brackets stay open


class InvalidJSON(ValueError):
    """No JSON stands there; the message is for the model."""

    def __init__(self, message: str, *, end: int | None) -> None:
        super().__init__(message)
        self.end = end  # where its last bracket closes all the same; None where that can't be told


def find_extent(text: str, start: int) -> Extent:
    """Follow the object or list that begins at ``start``. Linear; never raises."""
    at, opened, last = start, "", ""
    resume = start  # after the last closing bracket and the comma that follows it
    while (step := _STEP.match(text, at)) is not None:
        token = step[0][0]
        if token in "{[":
            # As in {"a": {}, {"b": the first one was never closed.
            if last in ("}", "]") or (last == "," and opened[-1:] == "{"):
                return Extent(resume, "unclosed")
            if len(opened) == _MAX_DEPTH:
                return Extent(at, "deep")
            opened += token
        elif token in "}]":
            opened = opened[:-1]
        at = step.end()
        if not opened:
            return Extent(at, "" if token in "}]" else "invalid")
        if not token.isspace():
            resume = resume if token == "," and last in ("}", "]") else at
            last = token
    return Extent(at, "unclosed" if _is_cut(text, at) else "invalid")


def _is_cut(text: str, at: int) -> bool:
    """The text ends in the token at ``at``, which is fine so far."""
    rest = text[at : at + 6]
    return not rest or rest[0] == '"' or any(word.startswith(rest) for word in ("true", "false", "null", "-"))


def decode(text: str, start: int, *, stop: int) -> tuple[Any, int]:
    """The JSON value at ``start`` and where it ends; an object that does not end is read up to ``stop``.

    Raises InvalidJSON.
    """
    end = None
    if text[start : start + 1] in ("{", "["):
        extent = find_extent(text, start)
        if extent.fault == "deep":
            raise InvalidJSON(f"nested more than {_MAX_DEPTH} deep", end=None)
        end = None if extent.fault else extent.stop
    stop = stop if end is None else end
    try:
        value = json.loads(
            text[start:stop],
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        refuse_surrogates(value)
    except json.JSONDecodeError as error:
        raise InvalidJSON(f"{error.msg} at character {error.pos}", end=end) from error
    except ValueError as error:
        raise InvalidJSON(str(error), end=end) from error
    return value, stop


def refuse_surrogates(value: Any) -> None:
    """A lone ``\\ud800`` can't be written as UTF-8: whoever stores or tokenises the arguments would crash.

    Raises ValueError.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair") from error


def skip_space(text: str, start: int) -> int:
    """The first character from ``start`` that is no white space."""
    space = _SPACE.match(text, start)
    return space.end() if space else start


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
