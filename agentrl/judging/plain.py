"""Plain data as typed JSON: what may cross from a solution's sandbox to the judge, and nothing else.

Covered: None, bool, int of any size, float (nan, infinities, -0.0), complex, str (lone surrogates too),
bytes, list, tuple, dict with any plain keys in their order, set and frozenset, by their exact builtin types;
the dicts of ``collections`` become dicts. JSON's null, booleans, strings, small integers, finite floats and
arrays stand for themselves; the rest is an object with one key, its type: ``{"tuple": [1, 2]}``,
``{"dict": [[key, value], ...]}``, ``{"float": "nan"}``, ``{"int": "0x..."}``, ``{"bytes": hex}``,
``{"complex": [real, imaginary]}``, ``{"set": [...]}``.

Nothing is pickled or evaluated. Standard library only and Python 3.8: its source also runs inside sandboxes.
What comes from one is checked by ``agentrl.judging.comparing`` first.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict
from typing import Any

__all__ = [
    "HEADER_BYTES",
    "MOST_BYTES",
    "MOST_DEPTH",
    "MOST_NODES",
    "NotPlain",
    "TooMuch",
    "decode",
    "encode",
    "frame",
    "frame_size",
]

HEADER_BYTES = 4
MOST_DEPTH = 100  # containers in one another
MOST_NODES = 2_000_000  # values in one message; HumanEval+ has lists of a million
MOST_BYTES = 16 << 20  # of one frame
_SMALL = 1 << 63  # JSON's own integers: below it; their decimal digits cost quadratic time


class NotPlain(Exception):
    """A value that is no plain data; ``name`` is its type's, or what is too much about it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class TooMuch(NotPlain):
    """Plain data, but more of it than may cross at once."""


_DICTS = (Counter, defaultdict, OrderedDict)  # equal to the dict of their items


def encode(value: Any) -> Any:
    """``value`` as what ``json`` can write. Raises NotPlain; runs no code of the value's own."""
    return _encode(value, MOST_DEPTH, [MOST_NODES])


def _encode(value: Any, depth: int, left: list[int]) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"int": hex(value)}
    if kind is float:
        return value if value - value == 0 else {"float": repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [_encode(value.real, depth, left), _encode(value.imag, depth, left)]}
    if kind in _DICTS:
        kind = dict
    if kind not in (list, tuple, dict, set, frozenset):
        raise NotPlain(kind.__name__)
    left[0] -= len(value)
    if depth == 0 or left[0] < 0:
        raise TooMuch("something nested too deeply" if depth == 0 else "something too large")
    if kind is dict:
        return {
            "dict": [
                [_encode(key, depth - 1, left), _encode(item, depth - 1, left)] for key, item in value.items()
            ]
        }
    items = [_encode(item, depth - 1, left) for item in value]
    return items if kind is list else {kind.__name__: items}


def decode(tree: Any) -> Any:
    """The value that ``tree`` stands for. Raises ValueError for what ``encode`` never writes."""
    if type(tree) is list:
        return [decode(item) for item in tree]
    if type(tree) is not dict:
        return tree
    try:
        ((tag, inner),) = tree.items()
        if tag == "dict":
            return {decode(key): decode(item) for key, item in inner}
        if tag == "complex":
            real, imaginary = inner
            return complex(decode(real), decode(imaginary))
        if tag in _CONTAINERS:
            return _CONTAINERS[tag](decode(item) for item in inner)
        return _SCALARS[tag](inner)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no typed plain data: {error}") from None


_CONTAINERS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_SCALARS: dict[str, Any] = {"int": lambda text: int(text, 16), "float": float, "bytes": bytes.fromhex}


def frame(message: Any) -> bytes:
    """One message of JSON behind its length: four bytes, big-endian."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def frame_size(header: bytes) -> int:
    """How many bytes follow ``header``."""
    return int.from_bytes(header, "big")
