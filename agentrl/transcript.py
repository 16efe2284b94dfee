"""Conversations as text: JSON there and back, for a terminal, for a browser.

JSON keeps everything that a message holds. The other two are for people; HTML escapes every character that a
policy or a tool could have written.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from agentrl.types import Message, ToolCall

__all__ = ["message_from_json", "message_to_json", "to_ansi", "to_html", "to_json"]

_COLOURS = {"system": "35", "user": "36", "assistant": "32", "tool": "33"}  # ANSI foregrounds
_STYLE = (
    "pre{white-space:pre-wrap;border-left:.3em solid #bbb;padding-left:.6em}"
    ".system{border-color:#959}.user{border-color:#399}.assistant{border-color:#393}.tool{border-color:#b80}"
)


def message_to_json(message: Message) -> dict[str, Any]:
    """A message as plain JSON data; fields that say nothing are left out."""
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        data["tool_calls"] = [_call_to_json(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        data["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        data["name"] = message.name
    return data


def message_from_json(data: Mapping[str, Any]) -> Message:
    """The message that :func:`message_to_json` was given."""
    calls = tuple(_call_from_json(call) for call in data.get("tool_calls", ()))
    return Message(data["role"], data["content"], calls, data.get("tool_call_id"), data.get("name"))


def to_json(messages: Sequence[Message]) -> str:
    """The conversation as a JSON list."""
    return json.dumps([message_to_json(message) for message in messages], ensure_ascii=False)


def to_ansi(messages: Sequence[Message]) -> str:
    """The conversation for a terminal, roles in colour; control characters in it are shown, not obeyed."""
    return "\n".join(
        f"\x1b[{_COLOURS[message.role]};1m{_heading(message)}\x1b[0m\n{_visible(_body(message))}"
        for message in messages
    )


def to_html(messages: Sequence[Message]) -> str:
    """The conversation as a self-contained fragment without scripts."""
    blocks = (
        f'<pre class="{message.role}"><b>{html.escape(_heading(message))}</b>\n'
        f"{html.escape(_body(message))}</pre>"
        for message in messages
    )
    return f"<style>{_STYLE}</style>\n" + "\n".join(blocks)


def _call_to_json(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "name": call.name,
        "arguments": None if call.arguments is None else dict(call.arguments),
        "raw": call.raw,
        "status": call.status,
        "note": call.note,
        "span": call.span,
    }


def _call_from_json(data: Mapping[str, Any]) -> ToolCall:
    span = data.get("span")
    return ToolCall(**{**data, "span": None if span is None else (span[0], span[1])})


def _heading(message: Message) -> str:
    return _visible(f"{message.role} {message.name}" if message.name else message.role)


def _body(message: Message) -> str:
    calls = [_call_line(call) for call in message.tool_calls]
    return "\n".join([message.content, *calls] if message.content or not calls else calls)


def _call_line(call: ToolCall) -> str:
    if call.arguments is None:
        return f"-> {call.name or '?'} [{call.status}] {call.raw}"
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"-> {call.name}({arguments})" + ("" if call.status == "ok" else f" [{call.status}]")


def _visible(text: str) -> str:
    """``text`` with control characters written out: a policy must not steer a reader's terminal."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
