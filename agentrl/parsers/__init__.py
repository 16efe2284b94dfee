"""Tool-call formats: the text of an assistant turn in, its content and every attempted call out.

A parser never raises on any text and never drops an attempt: a bad call comes back with a status, its raw
text and a note that the model can read. It runs in linear time. Whether arguments fit a tool's schema is for
the environment to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from agentrl.errors import UnknownName, UnsupportedModel, did_you_mean
from agentrl.types import CallStatus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VLLM_PREFIX", "Parsed", "ParsedCall", "Parser", "detect_parser", "get_parser"]

VLLM_PREFIX: Final = "vllm:"  # before the name of one of vLLM's parsers
# What the templates of each family contain, the surest first.
_TEMPLATES: Final[Mapping[str, re.Pattern[str]]] = {
    "deepseek_v3": re.compile("<｜tool▁call▁begin｜>"),
    "mistral": re.compile(r"\[TOOL_CALLS\]"),
    "qwen3_xml": re.compile(r"<tool_call>.{0,40}?<function=.*?<parameter=", re.DOTALL),
    # Hermes announces or renders a call as <tool_call>{"name": ...; another family puts tags after it.
    "hermes": re.compile(r"""<tool_call>(?:\\n|[\s{])*\\?["']name"""),
    "llama3_json": re.compile(r"""\{\\?"name\\?": .*?\\?"parameters\\?": """, re.DOTALL),
    "pythonic": re.compile(r"""\[func_name1\(|\.name\s*[+~]\s*["']\("""),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCall:
    """One attempted call, as it stands in the text."""

    name: str  # "" where the attempt does not say
    arguments: Mapping[str, Any] | None  # None where status is neither ok nor unknown_tool
    raw: str  # the text from span[0] to span[1]
    status: CallStatus
    note: str  # why the status is not ok, for the model to read
    span: tuple[int, int]  # characters [start, stop) of the text, delimiters included


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an assistant turn says."""

    content: str  # the text around the calls, as it was said; without the white space next to a call
    calls: tuple[ParsedCall, ...] = ()  # in the order of the text


class Parser(Protocol):
    """What ``chat`` needs of a tool-call format."""

    def parse(self, text: str, *, tools: Mapping[str, Mapping[str, Any]]) -> Parsed:
        """Read one assistant turn; ``tools`` are the parameters' JSON schemas by tool name. Never raises."""
        ...


def get_parser(name: str, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Parser:
    """The parser called ``name``; ``vllm:NAME`` is one of vLLM's, which asks the model's ``tokenizer``.

    Raises UnknownName; of vLLM's also MissingExtra and UnsupportedModel.
    """
    if name.startswith(VLLM_PREFIX):
        from agentrl.parsers.vllm import VLLMParser

        if tokenizer is None:
            raise ValueError(f"get_parser({name!r}) needs the model's tokenizer: pass tokenizer=")
        return VLLMParser(name.removeprefix(VLLM_PREFIX), tokenizer=tokenizer)
    from agentrl.parsers.deepseek_v3 import DeepSeekV3Parser
    from agentrl.parsers.hermes import HermesParser
    from agentrl.parsers.llama3_json import Llama3JsonParser
    from agentrl.parsers.mistral import MistralParser
    from agentrl.parsers.pythonic import PythonicParser
    from agentrl.parsers.qwen3_xml import Qwen3XmlParser

    parsers: dict[str, type[Parser]] = {
        "deepseek_v3": DeepSeekV3Parser,
        "hermes": HermesParser,
        "llama3_json": Llama3JsonParser,
        "mistral": MistralParser,
        "pythonic": PythonicParser,
        "qwen3_coder": Qwen3XmlParser,
        "qwen3_xml": Qwen3XmlParser,
    }
    if name not in parsers:
        known = ", ".join(sorted(parsers))
        raise UnknownName(
            f"no tool-call parser named {name!r}{did_you_mean(name, parsers)}; there is: {known}, "
            "and vllm:NAME for vLLM's. Choose the one whose format the model's chat template shows."
        )
    return parsers[name]()


def detect_parser(chat_template: str) -> str:
    """The name of the parser for the calls that a chat template writes.

    A template that knows no tools gets "hermes": nothing it says is a call. Raises UnsupportedModel for a
    template whose calls no parser here reads.
    """
    for name, pattern in _TEMPLATES.items():
        if pattern.search(chat_template):
            return name
    if "tools" not in chat_template:
        return "hermes"
    raise UnsupportedModel(
        "the chat template writes tool calls in a format that no parser here reads; "
        f"there is: {', '.join(sorted(_TEMPLATES))}. "
        "Give the tokenizer a chat template of such a format, or name the parser where it is one: "
        "model.parser, which also takes vllm:NAME, any of vLLM's."
    )
