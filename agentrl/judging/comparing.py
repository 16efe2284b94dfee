"""Whether a sandbox's answer is the expected one, decided on the outside without building what was sent.

Answers stay the JSON trees that ``agentrl.judging.plain`` defines: they are checked, compared and shown as
such, since a set or dict made of chosen keys can take quadratic time. Equal means: the same type, but an int
equals a float of its value (a bool only a bool), a set a frozenset, and -0.0 equals 0.0; nan equals nan;
lists and tuples differ unless ``alike``; dicts and sets have no order. A tolerance t allows a number x to be
off by t * max(1, \\|x\\|), in lists, tuples and dict values at any depth, not in keys and sets; with
``numbers_alike`` a bool is equal to its int there, and a complex number to a real one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from agentrl.judging.plain import MOST_BYTES, MOST_DEPTH, MOST_NODES

__all__ = ["Garbled", "check_tree", "is_equal", "parse", "same_output", "show"]

_SEQUENCES = ("tuple", "set", "frozenset")
_FLOATS = ("nan", "inf", "-inf")
_SHOWN_PARTS = 2_000  # pieces of a shown value: what is cut away later need not be made


class Garbled(Exception):
    """What a sandbox said is not what the protocol allows."""


def parse(body: bytes) -> Any:
    """The message of a frame, as JSON. Raises Garbled for none, and for too much of it."""
    if len(body) > MOST_BYTES or sum(map(body.count, (b",", b"[", b"{"))) > 3 * MOST_NODES:
        raise Garbled("a message that is too large")
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:  # also digits without end: Python refuses more than 4,300
        raise Garbled(f"no JSON: {type(error).__name__}") from None


def check_tree(tree: Any) -> None:
    """Raise Garbled unless ``tree`` is what ``agentrl.judging.plain.encode`` writes for some value."""
    _check(tree, MOST_DEPTH + 1)


def _check(tree: Any, depth: int, *, hashable: bool = False) -> None:
    kind = type(tree)
    if kind is list:
        if hashable or depth == 0:
            raise Garbled("a list where none can be, or too deep")
        for item in tree:
            if type(item) is list or type(item) is dict:
                _check(item, depth - 1)
        return
    if kind is not dict:
        return
    if len(tree) != 1 or depth == 0:
        raise Garbled("no tagged value, or too deep")
    ((tag, inner),) = tree.items()
    _check_tagged(tag, inner, depth, hashable=hashable)


def _check_tagged(tag: str, inner: Any, depth: int, *, hashable: bool) -> None:
    is_list, is_text = type(inner) is list, type(inner) is str
    if tag in _SEQUENCES and is_list and not (hashable and tag == "set"):
        for item in inner:
            _check(item, depth - 1, hashable=hashable or tag != "tuple")
    elif tag == "dict" and is_list and not hashable:
        for pair in inner:
            if type(pair) is not list or len(pair) != 2:
                raise Garbled("a dict of something else than pairs")
            _check(pair[0], depth - 1, hashable=True)
            _check(pair[1], depth - 1)
    elif tag == "complex" and is_list and len(inner) == 2:
        if not all(map(_is_float, inner)):
            raise Garbled("a complex number of something else than floats")
    elif tag == "float" and is_text:
        if inner not in _FLOATS:
            raise Garbled("a float that is none")
    elif tag in ("int", "bytes") and is_text:
        try:
            int(inner, 16) if tag == "int" else bytes.fromhex(inner)
        except ValueError:
            raise Garbled(f"{tag} that is none") from None
    else:
        raise Garbled("an unknown kind of value")


def _is_float(part: Any) -> bool:
    if type(part) is not dict:
        return type(part) is float
    return list(part) == ["float"] and type(part["float"]) is str and part["float"] in _FLOATS


def _opened(tree: Any) -> tuple[str, Any]:
    """The type's name of a checked tree, and its JSON content; numbers as numbers."""
    if type(tree) is not dict:
        return ("None" if tree is None else type(tree).__name__), tree
    ((tag, inner),) = tree.items()
    if tag == "int":
        return "int", int(inner, 16)
    if tag == "float" and inner in _FLOATS:
        return "float", float(inner)
    return str(tag), inner


def is_equal(
    expected: Any,
    got: Any,
    *,
    tolerance: float = 0.0,
    alike: bool = False,
    numbers_alike: bool = False,
) -> bool:
    """Whether two checked trees stand for equal values, as the module says it."""
    kind, value = _opened(expected)
    other_kind, other = _opened(got)
    if numbers_alike and kind != other_kind:
        is_complex = "complex" in (kind, other_kind)
        kind, value = _as_number(kind, value, is_complex=is_complex)
        other_kind, other = _as_number(other_kind, other, is_complex=is_complex)
    if kind in ("int", "float") and other_kind in ("int", "float"):
        return _is_close(value, other, tolerance)
    if {kind, other_kind} == {"list", "tuple"} and alike:
        kind = other_kind = "list"
    if {kind, other_kind} == {"set", "frozenset"}:
        kind = other_kind = "set"
    if kind != other_kind:
        return False
    if kind in ("set", "frozenset"):
        return set(map(_key, value)) == set(map(_key, other))
    are_equal = partial(is_equal, tolerance=tolerance, alike=alike, numbers_alike=numbers_alike)
    if kind == "dict":
        wanted = {_key(key): item for key, item in value}
        there = {_key(key): item for key, item in other}
        return wanted.keys() == there.keys() and all(
            are_equal(item, there[key]) for key, item in wanted.items()
        )
    if kind in ("list", "tuple", "complex"):
        return len(value) == len(other) and all(map(are_equal, value, other))
    return bool(value == other)


def _as_number(kind: str, value: Any, *, is_complex: bool) -> tuple[str, Any]:
    """A bool as an int, and what is real as a complex number where the other one is."""
    if kind == "bool":
        kind, value = "int", int(value)
    return ("complex", [value, 0.0]) if is_complex and kind in ("int", "float") else (kind, value)


def _is_close(wanted: float, got: float, tolerance: float) -> bool:
    if wanted == got or (wanted != wanted and got != got):
        return True
    try:
        slack = tolerance * max(1.0, abs(wanted))
        return math.isfinite(wanted) and math.isfinite(got) and abs(wanted - got) <= slack
    except OverflowError:  # an int beyond what a float can be
        return False


def _key(tree: Any) -> str:
    """The same text for equal keys; texts have a hash that nobody can choose."""
    kind, value = _opened(tree)
    if kind == "float" and math.isfinite(value) and value == int(value):
        kind, value = "int", int(value)
    if kind == "int":
        return hex(value)
    if kind == "str":
        return json.dumps(value)
    if kind in ("tuple", "complex"):
        return f"{kind}({','.join(map(_key, value))})"
    if kind in ("set", "frozenset"):
        return f"set({','.join(sorted(set(map(_key, value))))})"
    return f"{kind}:{value}"


def same_output(expected: str, got: bytes) -> bool:
    """Whether a program's output is the expected one: line by line, without blanks at the ends of lines and
    empty lines at the end."""
    return _lines(expected.encode(errors="surrogatepass")) == _lines(got)


def _lines(data: bytes) -> list[bytes]:
    return [line.rstrip() for line in data.rstrip().split(b"\n")]


def show(tree: Any, *, most: int = 200) -> str:
    """A checked tree as Python writes the value, at most ``most`` characters of it."""
    parts: list[str] = []
    for part in _pieces(tree):
        parts.append(part if len(part) <= most else part[:most])
        if len(parts) > min(_SHOWN_PARTS, most):
            break
    text = "".join(parts)
    return text if len(text) <= most else text[: most - 3] + "..."


def _pieces(tree: Any) -> Iterator[str]:
    kind, value = _opened(tree)
    if kind == "int":
        yield hex(value) if abs(value) >= 1 << 200 else str(value)
    elif kind == "complex":
        real, imaginary = value
        yield f"({show(real)}{'' if show(imaginary).startswith('-') else '+'}{show(imaginary)}j)"
    elif kind == "bytes":
        yield f"bytes.fromhex({value[:200]!r})"
    elif kind == "str":
        yield repr(value[:400])
    elif kind in ("list", "tuple", "set", "frozenset", "dict"):
        opening, closing = {
            "list": ("[", "]"),
            "tuple": ("(", ",)" if len(value) == 1 else ")"),
            "frozenset": ("frozenset({", "})"),
        }.get(kind, ("{", "}"))
        yield opening
        for index, item in enumerate(value):
            yield ", " if index else ""
            if kind == "dict":
                yield from _pieces(item[0])
                yield ": "
                item = item[1]
            yield from _pieces(item)
        yield closing
    else:
        yield repr(value)
