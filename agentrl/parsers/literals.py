"""Python's literals inside free text, read without Python's parser: strings, numbers, lists, dicts, words.

Strict as JSON is elsewhere: finite numbers, text keys that differ, no lone surrogates, at most 64 levels.
JSON's ``true``, ``false`` and ``null`` count, and a string may hold line breaks: models write both.
Reading is linear and runs no code.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

from agentrl.parsers.strict_json import skip_space

__all__ = ["Literals", "Malformed", "Unclosed"]

_MAX_DEPTH: Final = 64
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|' + r"'[^'\\]*+(?:\\.[^'\\]*+)*+'", re.DOTALL)
_NUMBER = re.compile(r"[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][+-]?+[0-9]++)?+(?!\w)")
_WORD = re.compile(r"[A-Za-z]++")
_WORDS: Final = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_CUT = re.compile(r"\w*+\s*+\Z")
_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U(00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})|([\\'\"abfnrtv])|(\n))",
    re.DOTALL,
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED: Final = dict(zip("\\'\"abfnrtv", "\\'\"\a\b\f\n\r\t\v", strict=True))


class Malformed(Exception):
    """What stands at ``at`` can't be read; the message is for the model."""

    def __init__(self, message: str, *, at: int) -> None:
        super().__init__(message)
        self.at = at  # characters of the text that were read


class Unclosed(Malformed):
    """The text ends in the middle."""


class Literals:
    """The literals of one text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read(self, at: int, *, depth: int = 0) -> tuple[Any, int]:
        """The literal at ``at`` and where it ends. Raises Malformed."""
        character = self._text[at : at + 1]
        if character in ("[", "{"):
            if depth == _MAX_DEPTH - 1:
                raise Malformed(f"nested more than {_MAX_DEPTH} deep", at=at)
            return self._list(at, depth=depth) if character == "[" else self._dict(at, depth=depth)
        if character in ("'", '"'):
            return self._string(at)
        return self._number_or_word(at)

    def fault(self, at: int, message: str) -> Malformed:
        """What to raise at ``at``: the text may just end there."""
        if _CUT.match(self._text, at):
            return Unclosed("the text ends", at=at)
        return Malformed(message, at=at)

    def _list(self, at: int, *, depth: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        at = skip_space(self._text, at + 1)
        while self._text[at : at + 1] != "]":
            value, at = self.read(at, depth=depth + 1)
            values.append(value)
            at = self._after(at, "]")
        return values, at + 1

    def _dict(self, at: int, *, depth: int) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at = skip_space(self._text, at + 1)
        while self._text[at : at + 1] != "}":
            begin = at
            if self._text[at : at + 1] not in ("'", '"'):
                raise self.fault(at, "a key is a string")
            key, at = self._string(at)
            if key in values:
                raise Malformed("a dict has the same key twice", at=begin)
            at = skip_space(self._text, at)
            if self._text[at : at + 1] != ":":
                raise self.fault(at, "a colon must follow a key")
            values[key], at = self.read(skip_space(self._text, at + 1), depth=depth + 1)
            at = self._after(at, "}")
        return values, at + 1

    def _after(self, at: int, close: str) -> int:
        """Past the comma after a value, to the next one or to ``close``."""
        at = skip_space(self._text, at)
        if self._text[at : at + 1] == ",":
            return skip_space(self._text, at + 1)
        if self._text[at : at + 1] != close:
            raise self.fault(at, f"a comma or {close} must follow a value")
        return at

    def _string(self, at: int) -> tuple[str, int]:
        found = _STRING.match(self._text, at)
        if found is None:
            raise Unclosed("a string has no closing quote", at=len(self._text))
        try:
            return _unescape(found[0][1:-1]), found.end()
        except ValueError as error:
            raise Malformed("a string holds half of a surrogate pair", at=found.end()) from error

    def _number_or_word(self, at: int) -> tuple[Any, int]:
        number = _NUMBER.match(self._text, at)
        if number is not None:
            return self._number(number), number.end()
        word = _WORD.match(self._text, at)
        if word is not None and word[0] in _WORDS:
            return _WORDS[word[0]], word.end()
        raise self.fault(at, "a value is a number, a string, a list, a dict, True, False or None")

    def _number(self, found: re.Match[str]) -> int | float:
        try:
            value = float(found[0]) if re.search(r"[.eE]", found[0]) else int(found[0])
        except ValueError as error:
            raise Malformed("a number has too many digits", at=found.end()) from error
        if not math.isfinite(value):
            raise Malformed(f"{found[0][:40]} is too large for a number", at=found.end())
        return value


def _unescape(body: str) -> str:
    """Raises ValueError (a UnicodeError, too) for half of a surrogate pair."""
    text = _ESCAPE.sub(_character, body) if "\\" in body else body
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    return text


def _character(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2] or escape[3]
    if code:
        return chr(int(code, 16))
    return _ESCAPED[escape[4]] if escape[4] else ""
