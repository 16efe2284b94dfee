"""Gymnasium spaces of language: conversations, what an assistant may say, and any text.

Gymnasium's own ``Text`` refuses spaces, "" and "é", and its ``Sequence(Dict)`` messages with tool calls.
These three compare by value, pickle, sample from their own seed, and work in ``SyncVectorEnv`` and in
``AsyncVectorEnv(shared_memory=False)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from gymnasium.spaces import Space

from agentrl.errors import UserError
from agentrl.tools import Tool
from agentrl.transcript import message_from_json, message_to_json
from agentrl.types import Message, ToolCall

__all__ = ["Assistant", "Chat", "Unicode"]

# What samples are made of: quotes, braces, tags and scripts on which parsers and templates stumble.
_ALPHABET = " \n\tabcxyzABC0123456789.,:;+-*/=\"'\\{}[]<>&|éßж中😀"
_MOST_CALLS = 3  # in one sampled message
_MOST_CHARS = 24  # in one sampled text


class Unicode(Space[str]):
    """Any text of at most ``max_chars`` code points that UTF-8 can carry, the empty one included."""

    def __init__(self, max_chars: int, *, seed: int | np.random.Generator | None = None) -> None:
        if max_chars < 0:
            raise UserError(f"Unicode(max_chars={max_chars}): a text has 0 characters or more")
        self.max_chars = max_chars
        super().__init__(seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A random text of at most 24 characters, short ones likelier than their number."""
        _refuse_masks(mask, probability)
        return _random_text(self.np_random, min(self.max_chars, _MOST_CHARS))

    def contains(self, x: Any) -> bool:
        return (
            isinstance(x, str)
            and len(x) <= self.max_chars
            and not any("\ud800" <= char <= "\udfff" for char in x)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unicode) and other.max_chars == self.max_chars

    def __repr__(self) -> str:
        return f"Unicode({self.max_chars})"


class Chat(Space[tuple[Message, ...]]):
    """Any number of messages of any role: what an environment shows."""

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> tuple[Message, ...]:
        """Up to three short messages of the user."""
        _refuse_masks(mask, probability)
        count = int(self.np_random.integers(4))
        return tuple(Message("user", _random_text(self.np_random, _MOST_CHARS)) for _ in range(count))

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(isinstance(message, Message) for message in x)

    def to_jsonable(self, sample_n: Iterable[tuple[Message, ...]]) -> list[Any]:
        return [[message_to_json(message) for message in messages] for messages in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[tuple[Message, ...]]:
        return [tuple(message_from_json(data) for data in messages) for messages in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chat)

    def __repr__(self) -> str:
        return "Chat()"


class Assistant(Space[Message]):
    """One message of the assistant, with or without tool calls.

    Good and bad calls alike are contained: a policy may say anything, and the environment must survive it.
    """

    def __init__(self, tools: Iterable[Tool] = (), *, seed: int | np.random.Generator | None = None) -> None:
        # Schemas only: a space is pickled and compared, an environment's bound methods can't be.
        self.parameters: Mapping[str, Mapping[str, Any]] = {tool.name: tool.parameters for tool in tools}
        super().__init__(seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> Message:
        """A random text, or one to three random calls that fit the schemas (patterns and formats aside)."""
        _refuse_masks(mask, probability)
        random = self.np_random
        text = _random_text(random, _MOST_CHARS)
        if not self.parameters or random.random() < 0.3:
            return Message("assistant", text)
        count = 1 + int(random.integers(_MOST_CALLS))
        return Message("assistant", text, tuple(self._sample_call() for _ in range(count)))

    def _sample_call(self) -> ToolCall:
        random = self.np_random
        names = list(self.parameters)
        name = names[int(random.integers(len(names)))]
        call_id = f"call_{int(random.integers(1 << 48)):012x}"  # unique but for one pair in 10^14
        return ToolCall(id=call_id, name=name, arguments=_random_value(random, self.parameters[name]))

    def contains(self, x: Any) -> bool:
        return isinstance(x, Message) and x.role == "assistant"

    def to_jsonable(self, sample_n: Iterable[Message]) -> list[Any]:
        return [message_to_json(message) for message in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[Message]:
        return [message_from_json(data) for data in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assistant) and other.parameters == self.parameters

    def __repr__(self) -> str:
        return f"Assistant({', '.join(self.parameters)})"


def _refuse_masks(mask: Any, probability: Any) -> None:
    if mask is not None or probability is not None:
        raise UserError("spaces of language sample without a mask and without probabilities: leave both out")


def _random_text(random: np.random.Generator, most: int, least: int = 0) -> str:
    length = int(random.integers(least, most + 1))
    return "".join(_ALPHABET[int(index)] for index in random.integers(len(_ALPHABET), size=length))


def _random_value(random: np.random.Generator, schema: Mapping[str, Any]) -> Any:
    """A value that fits a JSON schema as :mod:`agentrl.tools` writes them."""
    if "const" in schema:
        return schema["const"]
    for key in ("enum", "anyOf", "oneOf"):
        if key in schema:
            choice = schema[key][int(random.integers(len(schema[key])))]
            return choice if key == "enum" else _random_value(random, choice)
    kind = schema.get("type", "string")
    return _SAMPLERS[kind](random, schema)


def _random_string(random: np.random.Generator, schema: Mapping[str, Any]) -> str:
    least = int(schema.get("minLength", 0))
    return _random_text(
        random, max(least, min(_MOST_CHARS, int(schema.get("maxLength", _MOST_CHARS)))), least
    )


def _random_integer(random: np.random.Generator, schema: Mapping[str, Any]) -> int:
    low, high = _bounds(schema)
    step = int(schema.get("multipleOf", 1))
    first = math.floor(schema["exclusiveMinimum"]) + 1 if "exclusiveMinimum" in schema else math.ceil(low)
    last = math.ceil(schema["exclusiveMaximum"]) - 1 if "exclusiveMaximum" in schema else math.floor(high)
    return step * int(random.integers(-(-first // step), last // step + 1))


def _random_number(random: np.random.Generator, schema: Mapping[str, Any]) -> float:
    low, high = _bounds(schema)
    return float(
        low + (high - low) * (0.01 + 0.98 * random.random())
    )  # inside, so that exclusive bounds hold too


def _bounds(schema: Mapping[str, Any]) -> tuple[float, float]:
    """Where numbers are drawn: the schema's bounds, a thousand wide where one or both are open."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None:
        low = -500 if high is None else high - 1000
    return low, (low + 1000 if high is None else high)


def _random_array(random: np.random.Generator, schema: Mapping[str, Any]) -> list[Any]:
    fixed = [_random_value(random, item) for item in schema.get("prefixItems", ())]
    least = max(len(fixed), int(schema.get("minItems", 0)))
    most = max(least, min(least + 2, int(schema.get("maxItems", least + 2))))
    count = int(random.integers(least, most + 1)) - len(fixed)
    return fixed + [_random_value(random, schema.get("items", {})) for _ in range(count)]


def _random_object(random: np.random.Generator, schema: Mapping[str, Any]) -> dict[str, Any]:
    required = schema.get("required", ())
    named = {
        name: _random_value(random, item)
        for name, item in schema.get("properties", {}).items()
        if name in required or random.random() < 0.5
    }
    extra = schema.get("additionalProperties")
    if isinstance(extra, Mapping):
        named |= {f"key{index}": _random_value(random, extra) for index in range(int(random.integers(3)))}
    return named


_SAMPLERS: Mapping[str, Callable[[np.random.Generator, Mapping[str, Any]], Any]] = {
    "string": _random_string,
    "integer": _random_integer,
    "number": _random_number,
    "boolean": lambda random, schema: bool(random.random() < 0.5),
    "null": lambda random, schema: None,
    "array": _random_array,
    "object": _random_object,
}
