"""Records: what a slip of the pen is answered with where the record is made."""

from __future__ import annotations

from typing import Any

import pytest

from agentrl.types import Message, Task, ToolCall

ASKED = Message("user", "2 + 2?")
CALL = ToolCall(id="call_0", name="add", arguments={})


def test_a_list_becomes_a_tuple() -> None:
    listed: Any = [ASKED]
    assert hash(Task(id="sum", prompt=listed).prompt) == hash((ASKED,))
    calls: Any = [CALL]
    assert Message("assistant", "", calls) == Message("assistant", "", (CALL,))


@pytest.mark.parametrize("prompt", [ASKED, "2 + 2?", ("2 + 2?",), None, {"role": "user"}])
def test_a_prompt_that_is_no_tuple_of_messages_is_refused(prompt: Any) -> None:
    with pytest.raises(
        TypeError, match=r"prompt is a tuple of Message, not .* write prompt=\(Message\(...\),\)"
    ):
        Task(id="sum", prompt=prompt)


@pytest.mark.parametrize("calls", [CALL, ("add",), None, ""])
def test_tool_calls_that_are_no_tuple_of_calls_are_refused(calls: Any) -> None:
    with pytest.raises(TypeError, match="tool_calls is a tuple of ToolCall, not .* with the comma"):
        Message("assistant", "", calls)


def test_an_id_and_a_content_that_are_no_texts_are_refused() -> None:
    number: Any = 3
    with pytest.raises(TypeError, match=r"the id of a task is a text, not 3: write str\(3\)"):
        Task(id=number, prompt=(ASKED,))
    with pytest.raises(TypeError, match="the content of a message is a text, not 3"):
        Message("user", number)
