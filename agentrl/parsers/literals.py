"""Python's literals inside free text, read without Python's parser: strings, numbers, lists, dicts, words.

Strings are read with their prefixes, escapes and triple quotes, and joined where one follows another. JSON
has neither tuples nor sets: they are lists. Strict as JSON is elsewhere: finite numbers, text keys that
differ, no lone surrogates, at most 64 levels. JSON's ``true``, ``false`` and ``null`` count, and a string may
hold line breaks: models write both. Reading is linear and runs no code: an f-string is read without braces.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any, Final

from agentrl.parsers.strict_json import skip_space

__all__ = ["STRING", "Literals", "Malformed", "Unclosed"]

_MAX_DEPTH: Final = 64
# One string; three quotes are never an empty one before a quote.
STRING: Final = (
    r"(?:[rR][fF]?|[fF][rR]?|[uU])?+(?:"
    r'"""[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*+"""|"(?!"")[^"\\]*+(?:\\.[^"\\]*+)*+"|'
    r"'''[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+'''|'(?!'')[^'\\]*+(?:\\.[^'\\]*+)*+')"
)
_STRING = re.compile(STRING, re.DOTALL)
_OPENING = re.compile(r"(?P<prefix>\w*)(?P<quotes>\"{3}|'{3}|[\"'])")
_OPENED = re.compile(r"(?:[rR][fF]?|[fF][rR]?|[uU])?+[\"']")
_DIGITS: Final = r"[0-9]++(?:_[0-9]++)*+"
_NUMBER = re.compile(
    r"[+-]?+(?:(?P<based>0(?:[xX](?:_?[0-9a-fA-F])++|[oO](?:_?[0-7])++|[bB](?:_?[01])++))"
    rf"|(?:{_DIGITS}(?:\.(?:{_DIGITS})?+)?+|\.{_DIGITS})(?:[eE][+-]?+{_DIGITS})?+)(?!\w)"
)
_WORD = re.compile(r"[A-Za-z]++")
_WORDS: Final = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_CUT = re.compile(r"\w*+\s*+\Z")
_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U(00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})"
    r"|([0-7]{1,3})|N\{([^{}\n]{1,100})\}|([\\'\"abfnrtv])|(\n))"
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
        if character and character in "[{(":
            if depth == _MAX_DEPTH - 1:
                raise Malformed(f"nested more than {_MAX_DEPTH} deep", at=at)
            return self._dict_or_set(at, depth=depth) if character == "{" else self._list(at, depth=depth)
        if _OPENED.match(self._text, at):
            return self._strings(at)
        return self._number_or_word(at)

    def fault(self, at: int, message: str) -> Malformed:
        """What to raise at ``at``: the text may just end there."""
        if _CUT.match(self._text, at):
            return Unclosed("the text ends", at=at)
        return Malformed(message, at=at)

    def _list(self, at: int, *, depth: int) -> tuple[Any, int]:
        """A list or a tuple; one value in parentheses without a comma is that value."""
        close = "]" if self._text[at] == "[" else ")"
        values: list[Any] = []
        comma = False
        at = skip_space(self._text, at + 1)
        while self._text[at : at + 1] != close:
            value, at = self.read(at, depth=depth + 1)
            values.append(value)
            at, comma = self._after(at, close)
        alone = close == ")" and len(values) == 1 and not comma
        return values[0] if alone else values, at + 1

    def _dict_or_set(self, at: int, *, depth: int) -> tuple[dict[str, Any] | list[Any], int]:
        pairs: dict[str, Any] = {}
        values: list[Any] = []
        at = skip_space(self._text, at + 1)
        while self._text[at : at + 1] != "}":
            begin = at
            value, at = self.read(at, depth=depth + 1)
            at = skip_space(self._text, at)
            if self._text[at : at + 1] == ":" and not values:
                if not isinstance(value, str):
                    raise Malformed("a key is a string", at=begin)
                if value in pairs:
                    raise Malformed("a dict has the same key twice", at=begin)
                pairs[value], at = self.read(skip_space(self._text, at + 1), depth=depth + 1)
            elif pairs:
                raise self.fault(at, "a colon must follow a key")
            else:
                values.append(value)
            at, _ = self._after(at, "}")
        return values or pairs, at + 1

    def _after(self, at: int, close: str) -> tuple[int, bool]:
        """Past the comma after a value, to the next one or to ``close``; and whether there is a comma."""
        at = skip_space(self._text, at)
        if self._text[at : at + 1] == ",":
            return skip_space(self._text, at + 1), True
        if self._text[at : at + 1] != close:
            raise self.fault(at, f"a comma or {close} must follow a value")
        return at, False

    def _strings(self, at: int) -> tuple[str, int]:
        """The string at ``at`` and those right behind it, which Python joins."""
        said: list[str] = []
        begin = at
        while _OPENED.match(self._text, begin):
            found = _STRING.match(self._text, begin)
            if found is None:
                raise Unclosed("a string has no closing quote", at=len(self._text))
            said.append(_text_of(found))
            at = found.end()
            begin = skip_space(self._text, at)
        return "".join(said), at

    def _number_or_word(self, at: int) -> tuple[Any, int]:
        number = _NUMBER.match(self._text, at)
        if number is not None:
            return self._number(number), number.end()
        word = _WORD.match(self._text, at)
        if word is not None and word[0] in _WORDS:
            return _WORDS[word[0]], word.end()
        raise self.fault(at, "a value is a number, a string, a list, a tuple, a dict, True, False or None")

    def _number(self, found: re.Match[str]) -> int | float:
        digits, base = found[0], 0 if found["based"] else 10
        try:
            value = float(digits) if base and re.search(r"[.eE]", digits) else int(digits, base)
            str(value)  # as whoever writes it must be able to
        except ValueError as error:
            raise Malformed("a number has too many digits", at=found.end()) from error
        if not math.isfinite(value):
            raise Malformed(f"{digits[:40]} is too large for a number", at=found.end())
        return value


def _text_of(found: re.Match[str]) -> str:
    """What one string says. Raises Malformed."""
    opening = _OPENING.match(found[0])
    assert opening is not None  # a string begins with one
    prefix, body = opening["prefix"].lower(), found[0][opening.end() : -len(opening["quotes"])]
    if "f" in prefix and ("{" in body or "}" in body):
        raise Malformed("an f-string with braces is no literal", at=found.end())
    text = body if "r" in prefix or "\\" not in body else _ESCAPE.sub(_character, body)
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeError as error:
        raise Malformed("a string holds half of a surrogate pair", at=found.end()) from error


def _character(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2] or escape[3]
    if code:
        return chr(int(code, 16))
    if escape[4]:
        return chr(int(escape[4], 8))
    if escape[5]:
        return _named(escape[5]) or escape[0]
    return _ESCAPED[escape[6]] if escape[6] else ""


def _named(name: str) -> str:
    """The character of this Unicode name; "" where there is none."""
    try:
        return unicodedata.lookup(name)
    except KeyError:
        return ""
