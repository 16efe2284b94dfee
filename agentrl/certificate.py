"""What a chat template does to a growing conversation, found out before a run trusts it.

For each kind of conversation: is opening it, saying its assistant messages and extending it turn by turn
equal, id for id, to rendering the whole? And does the parser read back every message that the template
writes? The turns are replayed append-only; where a template rewrites history, the row shows the first
difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from agentrl.chat import Chat, History
from agentrl.errors import UnsupportedModel
from agentrl.parsers import Parser
from agentrl.types import IntArray, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Certificate", "CertificateRow", "certify"]

# Without these a model can be trained all the same: it just can't be shown them as gold episodes.
_OPTIONAL: Final = ("parallel-call", "text-and-call", "thinking")
_KEPT: Final[Mapping[History, str]] = {
    "append": "kept as sampled",
    "template": "a new sample begins at the next user message",
}


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """One kind of conversation."""

    kind: str
    status: Literal["extends", "rewrites", "unsupported"]
    detail: str = ""  # rewrites: the first difference; unsupported: why


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was found."""

    rows: tuple[CertificateRow, ...]
    history: History

    @property
    def ok(self) -> bool:
        """No row makes exact training impossible. Rewriting history does not: what was sampled stands."""
        return not any(row.status == "unsupported" and row.kind not in _OPTIONAL for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: "chat template: 7 of 8 kinds extend; rewritten: thinking (kept as sampled)"."""
        kinds: dict[str, list[str]] = {}
        for row in self.rows:
            kinds.setdefault(row.status, []).append(row.kind)
        parts = [f"{len(kinds.get('extends', ()))} of {len(self.rows)} kinds extend"]
        if "rewrites" in kinds:
            parts.append(f"rewritten: {', '.join(kinds['rewrites'])} ({_KEPT[self.history]})")
        if "unsupported" in kinds:
            parts.append(f"unsupported: {', '.join(kinds['unsupported'])}")
        return f"chat template: {'; '.join(parts)}"


def certify(
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]],
    *,
    parser: Parser,
    history: History = "append",
) -> Certificate:
    """Try every kind of conversation that an environment with these ``tools`` can bring about.

    Raises UnsupportedModel for a tokenizer that can't chat at all: no template, or no token that ends a turn.
    """
    chat = Chat(tokenizer, tools, parser=parser)
    rows = [_row(chat, kind, conversation) for kind, conversation in _conversations(tools).items()]
    return Certificate(tuple(rows), history)


def _row(chat: Chat, kind: str, conversation: Sequence[Message]) -> CertificateRow:
    try:
        _check_announcement(chat, conversation)
        replayed = _replay(chat, conversation)
    except UnsupportedModel as error:
        return CertificateRow(kind, "unsupported", str(error))
    whole = chat.encode_conversation(conversation, generate=False)
    ended = int(np.flatnonzero(whole == chat.end_of_turn)[-1]) + 1  # white space may follow
    if np.array_equal(replayed, whole[:ended]):
        return CertificateRow(kind, "extends")
    return CertificateRow(kind, "rewrites", _difference(chat, replayed, whole[:ended]))


def _replay(chat: Chat, conversation: Sequence[Message]) -> IntArray:
    """The ids of the conversation as an episode makes them, turn by turn, to its last assistant message."""
    turns = [index for index, message in enumerate(conversation) if message.role == "assistant"]
    ids = chat.open(conversation[: turns[0]])
    for turn, following in zip(turns, [*turns[1:], len(conversation)], strict=True):
        said = chat.say(conversation[:turn], conversation[turn])
        _check_round_trip(chat, conversation[turn], said)
        pieces = [ids, said]
        new = conversation[turn + 1 : following]
        if new:
            pieces.append(chat.extend(ids, said, messages=conversation[: turn + 1], new=new).new_ids)
        ids = np.concatenate(pieces)
    return ids


def _check_round_trip(chat: Chat, message: Message, said: IntArray) -> None:
    read = chat.parse(said)
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    read_calls = [(call.name, call.arguments) for call in read.tool_calls if call.status == "ok"]
    # A template may put an empty thought before an answer, and may open the thought in its generation prompt.
    thought, answer = _thought_and_answer(message.content)
    if calls != read_calls or answer != _thought_and_answer(read.content)[1] or thought not in read.content:
        raise UnsupportedModel(
            f"the parser reads {chat.tokenizer.decode(said)!r} as {read.content!r} with calls {read_calls}, "
            f"where {message.content!r} with calls {calls} was said. "
            "Name the parser for this template's format."
        )


def _check_announcement(chat: Chat, conversation: Sequence[Message]) -> None:
    if not any(message.tool_calls for message in conversation):
        return
    text = chat.render(conversation[:1], generate=True)
    unknown = [tool["function"]["name"] for tool in chat.tools if tool["function"]["name"] not in text]
    if unknown:
        raise UnsupportedModel(
            f"the chat template ignores tools=: it does not tell the model about {', '.join(unknown)}. "
            "Give the tokenizer a template that writes them, or describe them in the system message."
        )


def _thought_and_answer(content: str) -> tuple[str, str]:
    thought, found, answer = content.rpartition("</think>")
    return thought.partition("<think>")[2].strip(), (answer if found else content).strip()


def _difference(chat: Chat, replayed: IntArray, whole: IntArray) -> str:
    """The first place where two renderings part, as text."""
    shared = min(len(replayed), len(whole))
    unequal = np.flatnonzero(replayed[:shared] != whole[:shared])
    at = int(unequal[0]) if len(unequal) else shared
    texts = [chat.tokenizer.decode(ids[max(at - 4, 0) : at + 8]) for ids in (replayed, whole)]
    return f"token {at}: the episode has {texts[0]!r}, the template would now write {texts[1]!r}"


def _conversations(tools: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Message, ...]]:
    asked, answered = Message("user", "What is 2 + 2?"), Message("assistant", "It is 4.")
    thought = Message("assistant", "<think>\nTwo and two.\n</think>\n\nIt is 4.")
    again = Message("user", "Are you sure?")
    kinds: dict[str, tuple[Message, ...]] = {
        "plain": (asked, answered),
        "multi-turn": (asked, answered, again, Message("assistant", "Yes."), again, answered),
        "unicode": (
            Message("user", "Grüße, 你好 👩‍🔬!"),
            Message("assistant", "naïve café — ½ 🙂"),
            Message("user", "e\u0301 \u202eאב"),
            answered,
        ),
        "thinking": (asked, thought, again, thought),
    }
    return kinds | (_tool_conversations(str(tools[0]["function"]["name"])) if tools else {})


def _tool_conversations(name: str) -> dict[str, tuple[Message, ...]]:
    asked, answered = Message("user", "What is 2 + 2?"), Message("assistant", "It is 4.")
    call = ToolCall(id="call_0", name=name, arguments={"text": "2 + 2", "count": 1})
    nested = ToolCall(
        id="call_1", name=name, arguments={"text": 'é "</tool_call>" 🙂', "deep": {"list": [1, None]}}
    )
    calling = Message("assistant", "", (call,))
    result = Message("tool", "4\nexactly", tool_call_id="call_0", name=name)
    other = Message("tool", '{"é": [1.5]}', tool_call_id="call_1", name=name)
    later = ToolCall(id="call_2", name=name, arguments={})
    return {
        "tool-call": (asked, calling),
        "tool-result": (
            asked,
            calling,
            result,
            Message("assistant", "", (later,)),
            Message("tool", "4", tool_call_id="call_2", name=name),
            answered,
        ),
        "text-and-call": (asked, Message("assistant", "I look it up.", (call,)), result, answered),
        "parallel-call": (asked, Message("assistant", "Both.", (call, nested)), result, other, answered),
    }
