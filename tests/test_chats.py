"""One certified chat for each set of tools."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from agentrl.chats import Chats
from agentrl.env import Env
from agentrl.errors import UnknownName, UnsupportedModel
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task


class Talk(ToolEnv):
    """No tools."""

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id="a", prompt=(Message("user", "Hello"),))]

    def reward(self, evidence: Any) -> float:
        return 1.0


def test_environments_with_the_same_tools_share_a_chat_that_was_certified_once(
    sums: type[Env], tokenizer: Any
) -> None:
    notes: list[str] = []
    chats = Chats(tokenizer, on_certificate=notes.append)
    assert chats(sums()) is chats(sums())
    assert len(notes) == 1
    assert notes[0].endswith("(tool calls: hermes)")
    assert chats(Talk()) is not chats(sums())
    assert len(notes) == 2


def test_a_chat_has_its_environments_tools_and_the_models_stop_tokens(
    sums: type[Env], tokenizer: Any
) -> None:
    chats = Chats(tokenizer, stop_token_ids=(7,))
    assert [tool["function"]["name"] for tool in chats(sums()).tools] == ["add"]
    assert chats(Talk()).tools == []
    assert set(chats(sums()).stop_token_ids) == {7, tokenizer.eos_token_id}


def test_a_template_that_can_not_carry_the_conversations_is_refused(sums: type[Env], tokenizer: Any) -> None:
    deaf = copy.deepcopy(tokenizer)
    deaf.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(
        UnsupportedModel, match=r"can't carry these conversations exactly: tool-call \(.*Use another"
    ):
        Chats(deaf, parser="hermes")(sums())
    assert Chats(deaf, parser="hermes")(Talk()).tools == []


def test_what_no_chat_can_be_made_of_is_refused_at_once(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UnsupportedModel, match="no chat template"):
        Chats(bare)
    with pytest.raises(UnknownName, match="hermez"):
        Chats(tokenizer, parser="hermez")


@pytest.mark.parametrize(("parser", "printed"), [(None, "hermes"), ("mistral", "mistral")])
def test_the_parser_can_be_named_and_is_printed(tokenizer: Any, parser: str | None, printed: str) -> None:
    notes: list[str] = []
    Chats(tokenizer, parser=parser, on_certificate=notes.append)(Talk())
    assert notes[0].endswith(f"(tool calls: {printed})")
