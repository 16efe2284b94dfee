"""Conversations as JSON, for a terminal and for a browser."""

from __future__ import annotations

import json

from agentrl.transcript import message_from_json, message_to_json, to_ansi, to_html, to_json
from agentrl.types import Message, ToolCall

CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "é \x1b[2J <b>"),
    Message(
        "assistant",
        "",
        (
            ToolCall(id="1", name="look", arguments={"at": "<i>"}, raw='{"at"}', span=(3, 9)),
            ToolCall(id="2", name="", arguments=None, raw="{<u>", status="unclosed", note="no end"),
        ),
    ),
    Message("tool", "a door", tool_call_id="1", name="look"),
)


def test_messages_survive_json() -> None:
    kept = json.loads(json.dumps([message_to_json(message) for message in CONVERSATION]))
    assert tuple(map(message_from_json, kept)) == CONVERSATION
    assert json.loads(to_json(CONVERSATION)) == kept


def test_fields_that_say_nothing_are_left_out() -> None:
    assert message_to_json(CONVERSATION[0]) == {"role": "system", "content": "Be brief."}


def test_a_terminal_shows_control_characters_and_does_not_obey_them() -> None:
    shown = to_ansi(CONVERSATION)
    assert "é \\x1b[2J <b>" in shown
    assert "-> look(at='<i>')" in shown
    assert "-> ? [unclosed] {<u>" in shown
    assert "tool look" in shown


def test_html_escapes_contents_calls_and_raw_texts() -> None:
    page = to_html(CONVERSATION)
    for hostile in ("<i>", "<u>", " <b>\n"):
        assert hostile not in page
    for escaped in ("&lt;i&gt;", "&lt;u&gt;", "&lt;b&gt;"):
        assert escaped in page
