"""On well-formed input our parsers read what vLLM's parsers of the same names read; and theirs under ours.

Where the two differ by design, the input leaves it out, with the reason beside it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from agentrl.chats import Chats
from agentrl.env import Env
from agentrl.errors import UnsupportedModel
from agentrl.parsers import get_parser
from agentrl.tiny import TinyShape, make_tiny_model

pytestmark = pytest.mark.vllm

TOKENS = (
    "<|python_tag|>", "[TOOL_CALLS]", "<think>", "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)  # fmt: skip
Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """How a model writes several calls, and what of the rest vLLM keeps."""

    name: str
    join: Callable[[Sequence[Call]], str]
    tokens: tuple[str, ...] = TOKENS
    whole_floats: bool = True  # False: vLLM's grammars make 1.0 an integer
    keeps: str = "before"  # before: the text before the calls; nothing; refuses: reads no call after text
    # What vLLM's parser takes for the end of a call, or of a value, inside a string too; ours does not.
    breaks: str = r"(?!)"


def rendered(name: str, separator: str) -> Callable[[Sequence[Call]], str]:
    return lambda calls: separator.join(get_parser(name).render(*call) for call in calls)  # type: ignore[attr-defined]


def mistral_list(calls: Sequence[Call]) -> str:
    rows = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"[TOOL_CALLS] {json.dumps(rows, ensure_ascii=False)}"


def pythonic_list(calls: Sequence[Call]) -> str:
    return "[" + ", ".join(rendered("pythonic", "")([call])[1:-1] for call in calls) + "]"


FORMATS = {
    "hermes": Format("hermes", rendered("hermes", "\n"), breaks="</tool_call>"),
    "llama3_json": Format("llama3_json", rendered("llama3_json", "; "), keeps="nothing"),
    "pythonic": Format("pythonic", pythonic_list, keeps="refuses"),
    "mistral up to 10": Format("mistral", mistral_list, breaks=r"\[TOOL_CALLS\]"),
    "mistral from 11": Format(
        "mistral",
        rendered("mistral", ""),
        tokens=(*TOKENS, "[ARGS]"),
        whole_floats=False,
        breaks=r"\[TOOL_CALLS\]|\[ARGS\]",
    ),
    "qwen3_xml": Format(
        "qwen3_xml",
        rendered("qwen3_xml", "\n"),
        whole_floats=False,
        breaks="</?parameter|</?function|tool_call>",
    ),
    "deepseek_v3": Format("deepseek_v3", rendered("deepseek_v3", "\n"), breaks="<｜tool"),
}

pieces = st.sampled_from([*'"\\{}[]()<>/=:;, \n', "</tool_call>", "é", "🙂", "\u2028", "1", "null", "True"])
texts = st.text(max_size=10) | st.lists(pieces, max_size=8).map("".join)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
called = st.tuples(
    st.sampled_from(["add", "search"]),
    st.dictionaries(st.sampled_from(["a", "b_2", "query"]), values, max_size=3),
)
conversations = st.lists(called, min_size=1, max_size=3)
before = st.sampled_from(["", "Let me see.\n", "é 你好 🙂\n\n"])
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def schema_of(calls: Sequence[Call], name: str) -> dict[str, Any]:
    """Of all calls of ``name``; an argument that is given in two types, or as null, may be either."""
    properties: dict[str, Any] = {}
    for _, arguments in (call for call in calls if call[0] == name):
        for key, value in arguments.items():
            kind = {"type": TYPES.get(type(value), "null")}
            options = properties.setdefault(key, {"anyOf": []})["anyOf"]
            options += [kind] if kind not in options else []
    return {
        "type": "object",
        "properties": {
            key: given["anyOf"][0] if len(given["anyOf"]) == 1 else given for key, given in properties.items()
        },
    }


def reads_as_another_type(calls: Sequence[Call], tools: Mapping[str, Any]) -> bool:
    """Whether a text such as "0" stands where the schema also allows another type: vLLM's grammars, which
    read arguments by the schema, take it for that."""
    return any(
        isinstance(value, str) and "anyOf" in tools[name]["properties"][key]
        for name, arguments in calls
        for key, value in arguments.items()
    )


def exactly(value: Any, *, whole_floats: bool) -> str:
    """As text, where True is not 1, and 1.0 not 1 with ``whole_floats``."""
    text = json.dumps(value, ensure_ascii=False)
    return text if whole_floats else json.dumps(json.loads(text, parse_float=_as_integer), ensure_ascii=False)


def _as_integer(digits: str) -> float | int:
    value = float(digits)
    return int(value) if value.is_integer() else value


Loader = Callable[[tuple[str, ...]], Any]
Reader = Callable[[Format, str, Mapping[str, Any]], tuple[list[Call], str | None]]


@pytest.fixture(scope="module", autouse=True)
def vllm_imported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what vLLM imports
        import vllm.entrypoints.openai.chat_completion.protocol
        import vllm.tool_parsers  # noqa: F401


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """A tokenizer with these special tokens beside its own."""
    path = tmp_path_factory.mktemp("tiny")
    shape = TinyShape(hidden_size=8, intermediate_size=8, layers=1, heads=2, kv_heads=1, vocab_size=300)
    make_tiny_model(path, texts=["What is 2 + 2?"] * 30, seed=0, shape=shape)

    @cache
    def tokenizer(tokens: tuple[str, ...]) -> Any:
        loaded = AutoTokenizer.from_pretrained(path)
        loaded.add_tokens([AddedToken(text, special=True) for text in tokens])
        return loaded

    return tokenizer


@pytest.fixture(scope="module")
def theirs(load: Loader) -> Reader:
    """Reads a text with vLLM's parser as its server does: (calls, content)."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    def read(form: Format, text: str, tools: Mapping[str, Any]) -> tuple[list[Call], str | None]:
        listed = [
            {"type": "function", "function": {"name": name, "parameters": schema}}
            for name, schema in tools.items()
        ]
        request = ChatCompletionRequest(messages=[], tools=listed, tool_choice="auto")
        make = ToolParserManager.get_tool_parser(form.name)
        found = make(load(form.tokens), request.tools).extract_tool_calls(text, request)
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
        return calls, found.content

    return read


@pytest.mark.parametrize("family", FORMATS)
@given(calls=conversations, text=before)
# The same examples every time: what is met here for the first time is as likely vLLM's as ours.
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much],
)
def test_well_formed_calls_are_read_alike(theirs: Reader, family: str, calls: list[Call], text: str) -> None:
    form = FORMATS[family]
    said = form.join(calls)
    if re.search(form.breaks, json.dumps([arguments for _, arguments in calls], ensure_ascii=False)):
        return
    tools = {name: schema_of(calls, name) for name in ("add", "search")}
    if not form.whole_floats and reads_as_another_type(calls, tools):
        return
    text = "" if form.keeps == "refuses" else text
    expected, content = theirs(form, text + said, tools)
    ours = get_parser(form.name).parse(text + said, tools=tools)
    read = [[(call.name, call.arguments) for call in ours.calls], expected, calls]
    assert len({exactly(said, whole_floats=form.whole_floats) for said in read}) == 1, read
    if form.keeps == "before":
        assert ours.content.strip() == (content or "").strip() == text.strip()


PYTHONIC = (
    r"[add(a='\033[0m\0\x41\u00e9\N{BULLET}')]",
    '[add(a=\'\'\'it\'s\n\\t\'\'\', b="""say "hi" """)]',
    r"[add(a=r'\d\'', b=u'x' R'\n' '\n'), search()]",
    "[add(a=(1, 2), b=(), c=(1,), d=(1), e={'x', 2}, f=[(True, null)])]",
    "[add(a=1_000, b=0xff, c=-0b11, d=0o17, e=1_0.5e1_0, f=f'plain')]",
    "[add(a={'k' 'l': ('m'\n'n')})]",
)
ONE = "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>"
XML = (
    f"{ONE}\n</tool_call>",
    f"Let me see.\n{ONE}\n</tool_call>\n{ONE}\n</tool_call>",
    f"<tool_call>\n{ONE}\n</tool_call>\n{ONE}",
    f"Let me see. {ONE}",
    f"<tool_call>\n{ONE}\n<function=search>\n</function>\n</tool_call>",
    f"<tool_call>\n{ONE}\n{ONE}\n{ONE}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>",
)


@pytest.mark.parametrize(
    ("family", "text"), [*(("pythonic", text) for text in PYTHONIC), *(("qwen3_xml", text) for text in XML)]
)
def test_rarer_forms_are_read_alike(theirs: Reader, family: str, text: str) -> None:
    tools = {"add": {"type": "object", "properties": {"a": {"type": "integer"}}}, "search": {}}
    tools = tools if family == "qwen3_xml" else {"add": {}, "search": {}}
    expected, _ = theirs(FORMATS[family], text, tools)
    ours = get_parser(family).parse(text, tools=tools)
    assert {call.status for call in ours.calls} == {"ok"}
    assert [(call.name, call.arguments) for call in ours.calls] == expected


@pytest.mark.parametrize("family", ["hermes", "mistral up to 10", "qwen3_xml", "deepseek_v3"])
def test_the_end_of_a_thought_in_an_argument_hides_no_call_of_theirs(load: Loader, family: str) -> None:
    form = FORMATS[family]
    parser = get_parser(f"vllm:{form.name}", tokenizer=load(form.tokens))
    calls = [("add", {"a": "x</think>"}), ("search", {"a": "y"})]
    tools = {name: {"type": "object", "properties": {"a": {"type": "string"}}} for name in ("add", "search")}
    read = parser.parse(form.join(calls), tools=tools).calls
    assert [(call.name, call.arguments) for call in read] == calls


@pytest.mark.parametrize("family", FORMATS)
def test_their_parsers_under_our_contract(load: Loader, family: str) -> None:
    form = FORMATS[family]
    parser = get_parser(f"vllm:{form.name}", tokenizer=load(form.tokens))
    said = form.join([("add", {"a": "é"}), ("divide", {})])
    thought = "<think>not yet</think>\n\n"
    tools = {"add": {"type": "object", "properties": {"a": {"type": "string"}}}, "search": {}}
    text = thought * (form.keeps != "refuses") + said
    parsed = parser.parse(text, tools=tools)
    assert [(call.name, call.arguments, call.status) for call in parsed.calls] == [
        ("add", {"a": "é"}, "ok"),
        ("divide", {}, "unknown_tool"),
    ]
    assert {call.raw.strip() for call in parsed.calls} == {said}
    assert parsed.content == text.removesuffix(said).strip()


def test_none_of_them_raises_on_any_text(load: Loader) -> None:
    from vllm.tool_parsers import ToolParserManager

    tokenizer, tried = load((*TOKENS, "[ARGS]")), 0
    texts = [
        "",
        "hello",
        "<tool_call>",
        '<tool_call>{"name": "add"</tool_call>',
        '{"name": 1}',
        "[add(",
        "\x00",
    ]
    openings = [*TOKENS, "[TOOL_CALLS]add{", "<function=add><parameter=a>", "<tool_calls>[", "functools[{"]
    for name in ToolParserManager.list_registered():
        try:
            parser = get_parser(f"vllm:{name}", tokenizer=tokenizer)
        except UnsupportedModel:  # its model's tokens are not there
            continue
        tried += 1
        for text in (*texts, *openings):
            parsed = parser.parse(text, tools={"add": {"type": "object", "properties": {}}})
            assert all(text[slice(*call.span)] == call.raw for call in parsed.calls), name
            assert parsed.calls or parsed.content == text, name
    assert tried > 30


def test_one_of_them_is_named_in_a_chat_and_printed(tokenizer: Any, sums: type[Env]) -> None:
    notes: list[str] = []
    chat = Chats(tokenizer, parser="vllm:hermes", on_certificate=notes.append)(sums())
    assert notes[0].endswith("(tool calls: vllm:hermes)")
    said = tokenizer.encode(get_parser("hermes").render("add", {"a": 1, "b": 2}))  # type: ignore[attr-defined]
    (call,) = chat.parse(np.array(said, np.int32)).tool_calls
    assert (call.name, call.arguments, call.status, call.span) == (
        "add",
        {"a": 1, "b": 2},
        "ok",
        (0, len(said)),
    )
