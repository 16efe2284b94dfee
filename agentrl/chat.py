"""Messages to token ids and back, append-only: tokens are sampled once and never tokenised again.

``open`` gives the first prompt, ``parse`` reads what the engine said, ``extend`` gives the ids to append for
the next prompt. With ``history="append"`` no id that exists is ever changed, whatever the template would have
rewritten (old thinking, say); with ``history="template"`` the conversation is rendered anew at every user
message, and where that does not extend the ids so far, a new prompt begins; where the template refuses what
the model has said, such as two calls at once, the turn is appended. ``agentrl.certificate`` says how a
template behaves.

Contents can't forge turns. Text inside a message that spells a special token (``<|im_end|>`` in a tool's
result) is tokenised as the ordinary characters that it is: no id of a special token, nothing of the text
lost. In tool messages the same holds for every token that the template names, such as ``</tool_response>``.
All other text is tokenised together with the template's text around it, so innocent conversations equal the
template's plain rendering.

A :class:`Chat` holds no conversation: one serves any number of episodes with the same tools.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import jinja2
import numpy as np

from agentrl.errors import UnsupportedModel
from agentrl.parsers import ParsedCall, Parser
from agentrl.types import IntArray, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "Extension", "History", "template_of"]

History = Literal["append", "template"]

# Stands for what an assistant said: plain, so that no template alters it, and in no tool's description.
_SENTINEL: Final = "Sentinel7c1e"
# Around the number of a text that must not become a token: the last private-use character, which no font has.
_MARK: Final = "\U0010fffd"
_MARKED = re.compile(f"{_MARK}([0-9]+){_MARK}")
# Most templates take any id; Mistral's want nine letters or digits.
_CALL_IDS: Final = ("call_{}", "{:09d}")
_REMEMBERED: Final = 128  # openings, and what was added to conversations: as many as are in flight, or fewer


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """How the next prompt begins."""

    new_ids: IntArray  # (N,) after the last completion; the whole prompt if not `extends`
    extends: bool  # False: the history was rewritten


class Chat:
    """One model's chat template with one set of tools.

    ``tools`` are schemas as OpenAI writes them: ``{"type": "function", "function": {"name", "description",
    "parameters"}}``. ``stop_token_ids`` are the model's further stop tokens (its generation config's eos).
    Raises UnsupportedModel for a tokenizer without a template, or a template whose end of turn is no token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any]],
        *,
        parser: Parser,
        history: History = "append",
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.tools = [dict(tool) for tool in tools]
        self.parser = parser
        self.history = history
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
        self._added = {index: token.content for index, token in self.tokenizer.added_tokens_decoder.items()}
        self._forgeries = _Forgeries(self.tokenizer, template_of(tokenizer))
        self._pieces: dict[int, str] = {}  # the text of single tokens; at most the vocabulary
        self.end_of_turn = self._find_end_of_turn()
        stops = {self.end_of_turn, *stop_token_ids, self.tokenizer.eos_token_id} - {None}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(stops))
        self._call_id = self._find_call_id()
        # Siblings begin alike, and many of them hear the same from their tools.
        self._opened_before = functools.lru_cache(maxsize=_REMEMBERED)(self._opened)
        self._added_before = functools.lru_cache(maxsize=_REMEMBERED)(self._suffix)

    def open(self, messages: Sequence[Message]) -> IntArray:
        """The first prompt, (P,): the messages, the tools, and the header of the assistant's turn."""
        return (self._opened_before if _is_hashable(messages) else self._opened)(tuple(messages))

    def _opened(self, messages: tuple[Message, ...]) -> IntArray:
        return self._encode(self.render(messages, generate=True))

    def say(self, conversation: Sequence[Message], message: Message) -> IntArray:
        """What a model says to say ``message`` next, (C,), its end of turn included: for gold episodes.

        Raises UnsupportedModel where the template does not render it after its own generation prompt.
        """
        before = self.render(conversation, generate=True)
        after = self.render([*conversation, message], generate=False)
        end = self._added[self.end_of_turn]
        if not after.startswith(before) or end not in after[len(before) :]:
            raise UnsupportedModel(
                "the chat template does not write this assistant turn after its generation prompt: "
                f"{_shorten(after[_common(before, after) :])!r} should go on from {before[-40:]!r}. "
                "Gold episodes can't be tokenised; give the tokenizer another chat template."
            )
        said = after[len(before) :]
        return self._encode(said[: said.index(end) + len(end)])

    def parse(self, token_ids: IntArray, *, first_call: int = 0) -> Message:
        """The assistant message that ``token_ids`` (C,) spell, after ``first_call`` earlier calls."""
        spoken = list(map(int, token_ids))
        if spoken and spoken[-1] in self.stop_token_ids:
            spoken.pop()
        text = self._decode(spoken)
        parsed = self.parser.parse(text, tools=self._schemas)
        ends = self._token_ends(spoken, text) if parsed.calls else []
        calls = tuple(
            self._tool_call(call, number=first_call + index, ends=ends)
            for index, call in enumerate(parsed.calls)
        )
        return Message("assistant", parsed.content, tool_calls=calls)

    def extend(
        self, prompt_ids: IntArray, said: IntArray, *, messages: Sequence[Message], new: Sequence[Message]
    ) -> Extension:
        """What follows ``said`` (C,), the completion of ``prompt_ids`` (P,), up to the assistant's next turn.

        ``messages`` is the conversation so far, the message of ``said`` last; ``new`` comes after it.
        """
        if self.history == "template" and any(message.role == "user" for message in new):
            with suppress(UnsupportedModel):
                return self._rendered_anew([*messages, *new], np.concatenate([prompt_ids, said]))
        suffix_of = self._added_before if _is_hashable(new) else self._suffix
        suffix = suffix_of(tuple(new))  # begins with the end of turn
        ended = len(said) > 0 and int(said[-1]) == self.end_of_turn
        return Extension(suffix[1:] if ended else suffix, extends=True)

    def render(self, messages: Sequence[Message], *, generate: bool) -> str:
        """The template's text, with marks where a content spells a special token; ``generate`` opens a turn.

        Raises UnsupportedModel where the template refuses the messages.
        """
        rows = [self._forgeries.neutral(message) for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                rows, tools=self.tools or None, add_generation_prompt=generate, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise UnsupportedModel(
                f"the chat template refuses a conversation of {roles}: {error}. "
                "Use an environment whose turns the template knows, or give the tokenizer another template."
            ) from error
        return text

    def encode_conversation(self, messages: Sequence[Message], *, generate: bool) -> IntArray:
        """The ids of a whole conversation rendered at once, (T,): what the certificate compares with."""
        return self._encode(self.render(messages, generate=generate))

    def _rendered_anew(self, messages: Sequence[Message], seen: IntArray) -> Extension:
        """What follows ``seen`` (S,) where the template writes it so, else the whole prompt."""
        whole = self.open(messages)
        if len(whole) > len(seen) and np.array_equal(whole[: len(seen)], seen):
            return Extension(whole[len(seen) :], extends=True)
        return Extension(whole, extends=False)

    def _suffix(self, new: tuple[Message, ...]) -> IntArray:
        """The ids from the end of an assistant's turn through ``new`` to the next turn's header.

        They are cut from a short conversation, so a turn costs its own length and not the conversation's.
        """
        text = self._after_sentinel(new)
        end = self._added[self.end_of_turn]
        # With its end of turn in front, because a token may swallow the white space after it.
        return self._encode(text[text.index(end) :])

    def _after_sentinel(self, new: Sequence[Message]) -> str:
        answered = [message for message in new if message.role == "tool"]
        calls = tuple(
            ToolCall(id=m.tool_call_id or "", name=m.name or "tool", arguments={"x": _SENTINEL})
            for m in answered
        )
        try:
            text = self.render([_ASKED, Message("assistant", _SENTINEL, calls), *new], generate=True)
        except UnsupportedModel:
            if not calls:
                raise
            # Llama 3 writes one call a turn only, but any number of results.
            text = self.render([_ASKED, Message("assistant", _SENTINEL), *new], generate=True)
        return text[text.index(_SENTINEL) + len(_SENTINEL) :]

    def _find_end_of_turn(self) -> int:
        """The first token that the template writes after what the assistant said."""
        text = self.render([_ASKED, Message("assistant", _SENTINEL)], generate=False)
        _, found, tail = text.rpartition(_SENTINEL)
        for index in self._encode(tail) if found else ():
            if self._added.get(int(index), "").strip():
                return int(index)
        raise UnsupportedModel(
            f"the chat template ends an assistant's turn with {_shorten(tail)!r}, in which no token is "
            "special: where a completion ends can't be told. It needs a token such as <|im_end|> there. "
            "Add one to the tokenizer or give it another chat template."
        )

    def _find_call_id(self) -> str:
        name = next(iter(self._schemas), "")
        for pattern in _CALL_IDS if name else ():
            call = ToolCall(id=pattern.format(0), name=name, arguments={})
            result = Message("tool", "x", tool_call_id=call.id, name=name)
            try:
                self.render([_ASKED, Message("assistant", "", (call,)), result], generate=True)
            except UnsupportedModel:
                continue
            return pattern
        return _CALL_IDS[0]  # a template without tool turns: the certificate reports it

    def _tool_call(self, call: ParsedCall, *, number: int, ends: Sequence[int]) -> ToolCall:
        start, stop = call.span
        covered = np.searchsorted(ends, [start, stop - 1], side="right")
        return ToolCall(
            id=self._call_id.format(number),
            name=call.name,
            arguments=call.arguments,
            raw=call.raw,
            status=call.status,
            note=call.note,
            span=(int(covered[0]), int(covered[1]) + 1),
        )

    def _token_ends(self, token_ids: Sequence[int], text: str) -> Sequence[int]:
        """How many characters of ``text`` are there once each token is said, (C,)."""
        for index in set(token_ids) - self._pieces.keys():
            self._pieces[index] = self._decode([index])
        pieces = [self._pieces[index] for index in token_ids]
        if "".join(pieces) == text:
            return np.cumsum([len(piece) for piece in pieces]).tolist()  # type: ignore[no-any-return]
        return self._streamed_ends(token_ids)

    def _streamed_ends(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The same where tokens share characters: decode a few tokens with a few before them."""
        ends: list[int] = []
        length = context = read = 0
        for index in range(len(token_ids)):
            known = self._decode(token_ids[context:read])
            whole = self._decode(token_ids[context : index + 1])
            # A character has at most four bytes: after that many tokens a torn one is not going to be whole.
            torn = whole.endswith("\ufffd") and index - read < 4 and index + 1 < len(token_ids)
            if not torn:
                length += len(whole) - len(known)
                context, read = read, index + 1
            ends.append(length)
        return ends

    def _encode(self, text: str) -> IntArray:
        token_ids = np.array(self._forgeries.encode(text), dtype=np.int32)
        token_ids.setflags(write=False)  # conversations share it
        return token_ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class _Forgeries:
    """Texts inside contents that would become tokens of the protocol, and how they are kept from it."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        named = [t.content for t in added if not t.special and t.content.strip() and t.content in template]
        self._texts = [_MARK, *special, *named]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._anywhere = _any_of([_MARK, *special])
        self._in_results = _any_of(self._texts)

    def neutral(self, message: Message) -> dict[str, Any]:
        """The message as templates take it, with marks for the texts that must stay text."""
        pattern = self._in_results if message.role == "tool" else self._anywhere
        good = [call for call in message.tool_calls if call.arguments is not None]
        # A template writes objects only: the text of a bad call stays with the content.
        bad = [call.raw for call in message.tool_calls if call.arguments is None]
        content = "\n".join(filter(None, [message.content, *bad]))
        row: dict[str, Any] = {"role": message.role, "content": self._marked(content, pattern)}
        if good:
            row["tool_calls"] = [self._call_row(call) for call in good]
        if message.role == "tool":
            row |= {"tool_call_id": message.tool_call_id, "name": message.name or ""}
        return row

    def encode(self, text: str) -> list[int]:
        """The ids of rendered text; each marked text as ordinary characters."""
        ids: list[int] = []
        for index, piece in enumerate(_MARKED.split(text)):
            if index % 2 == 0:
                ids += self._ids(piece)
            else:  # no tokenizer finds a token in its two halves
                forged = self._texts[int(piece)]
                ids += self._ids(forged[:1]) + self._ids(forged[1:])
        return ids

    def _call_row(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": self._marked_value(call.arguments)}
        return {"id": call.id, "type": "function", "function": function}

    def _marked_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marked(value, self._anywhere)
        if isinstance(value, Mapping):
            return {self._marked_value(key): self._marked_value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked_value(item) for item in value]
        return value

    def _marked(self, text: str, pattern: re.Pattern[str]) -> str:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair would stop the tokenizer
        return pattern.sub(lambda match: f"{_MARK}{self._numbers[match[0]]}{_MARK}", text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False) if text else []
        return ids


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template; the one for tools where it has several. None: UnsupportedModel."""
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("tool_use", template.get("default"))
    if not template:
        raise UnsupportedModel(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; a chat needs one. Use an "
            "instruction-tuned model (names often end in -it or -Instruct), or put a chat_template.jinja "
            "beside its tokenizer_config.json."
        )
    return str(template)


_ASKED: Final = Message("user", "Hello")


def _is_hashable(messages: Sequence[Message]) -> bool:
    """Arguments of calls are mappings, which are not."""
    return not any(message.tool_calls for message in messages)


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def _common(one: str, other: str) -> int:
    """How many characters two texts share at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
