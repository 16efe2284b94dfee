"""``vllm:NAME``: what becomes of what one of vLLM's parsers returns or raises. vLLM itself is faked here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agentrl.errors import MissingExtra, UnknownName, UnsupportedModel
from agentrl.parsers import Parsed, get_parser

TOOLS: Mapping[str, Mapping[str, Any]] = {"add": {"type": "object"}, "search": {}}
TOKENIZER: Any = SimpleNamespace(name_or_path="some/model")


class Refusing:
    """Looks for tokens in its tokenizer and does not find them."""

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        raise RuntimeError("could not locate <call>")


def found(*calls: tuple[str, str], content: str | None = None) -> Any:
    """What vLLM returns."""
    functions = [SimpleNamespace(function=SimpleNamespace(name=n, arguments=a)) for n, a in calls]
    return SimpleNamespace(tools_called=bool(calls), tool_calls=functions, content=content)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Parsed]:
    """Reads a text with a parser of vLLM's that returns, or raises, ``result``; ``tag`` opens its calls."""
    asked: list[Any] = []
    parsers: dict[str, Any] = {"refusing": Refusing}
    manager = SimpleNamespace(list_registered=lambda: sorted(parsers), get_tool_parser=parsers.__getitem__)
    for name, contents in {
        "vllm": {},
        "vllm.tool_parsers": {"ToolParserManager": manager},
        "vllm.tokenizers": {},
        "vllm.tokenizers.hf": {"get_cached_tokenizer": lambda tokenizer: tokenizer},
        "vllm.entrypoints": {},
        "vllm.entrypoints.openai": {},
        "vllm.entrypoints.openai.chat_completion": {},
        "vllm.entrypoints.openai.chat_completion.protocol": {
            "ChatCompletionRequest": lambda **fields: SimpleNamespace(**fields)
        },
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    def read(
        text: str, result: Any, *, tag: str = "<call>", tools: Mapping[str, Mapping[str, Any]] = TOOLS
    ) -> Parsed:
        class Scripted:
            bot_token = tag

            def __init__(self, tokenizer: Any, tools: Any = None) -> None:
                assert tokenizer is TOKENIZER

            def extract_tool_calls(self, said: str, request: Any) -> Any:
                asked.append((said, request))
                if isinstance(result, Exception):
                    raise result
                return result

        parsers["scripted"] = Scripted
        return get_parser("vllm:scripted", tokenizer=TOKENIZER).parse(text, tools=tools)

    read.asked = asked  # type: ignore[attr-defined]
    return read


def test_calls_share_the_text_from_their_opening_tag_on(parse: Any) -> None:
    text = "So.\n<call>one</call><call>two</call> end"
    parsed = parse(text, found(("add", '{"a": "é"}'), ("search", "{}"), content="So."))
    assert parsed.content == "So."
    assert [(call.name, call.arguments, call.status) for call in parsed.calls] == [
        ("add", {"a": "é"}, "ok"),
        ("search", {}, "ok"),
    ]
    assert {(call.span, call.raw) for call in parsed.calls} == {((4, len(text)), text[4:])}


@pytest.mark.parametrize(
    ("content", "span"), [("So.\n", (4, 12)), (None, (0, 12)), ("vLLM put it differently", (0, 12))]
)
def test_without_a_tag_they_begin_where_vllms_content_ends(parse: Any, content: str, span: Any) -> None:
    (call,) = parse("So.\n[add(a)]", found(("add", "{}"), content=content), tag="").calls
    assert call.span == span


@pytest.mark.parametrize(
    ("name", "arguments", "status"),
    [
        ("add", '{"a": 1', "invalid_json"),
        ("add", '{"a": 1} 2', "invalid_json"),
        ("add", "[1]", "not_object"),
        ("add", '{"a": NaN}', "invalid_json"),
        ("sub", "{}", "unknown_tool"),
    ],
)
def test_bad_calls_have_our_statuses(parse: Any, name: str, arguments: str, status: str) -> None:
    (call,) = parse("<call>x", found((name, arguments))).calls
    assert (call.name, call.status, bool(call.note)) == (name, status, True)
    assert (call.arguments is None) == (status != "unknown_tool")


@pytest.mark.parametrize("result", [found(content="..."), KeyError("name"), RecursionError()])
def test_a_tag_without_a_call_is_a_bad_call_and_no_answer(parse: Any, result: Any) -> None:
    parsed = parse("So.\n<call>{{{", result)
    (call,) = parsed.calls
    assert (parsed.content, call.status, call.raw) == ("So.", "invalid_json", "<call>{{{")
    assert call.note.startswith("invalid call: ")


def test_a_parser_that_raises_makes_the_whole_turn_a_bad_call(parse: Any) -> None:
    (call,) = parse("[add(", ValueError("unbalanced"), tag="").calls
    assert (call.span, call.status, call.note) == (
        (0, 5),
        "invalid_json",
        "invalid call: it could not be read: ValueError",
    )


@pytest.mark.parametrize("tag", ["<call>", "functools"])
def test_a_turn_without_calls_is_content(parse: Any, tag: str) -> None:
    text = " Python's functools is a module. "
    assert parse(text, found(content=text), tag=tag) == Parsed(text)


@pytest.mark.parametrize("thought", ["<think>a <call></think>", "a <call></think>", "[THINK]a[/THINK]"])
def test_thoughts_are_content_and_call_nothing(parse: Any, thought: str) -> None:
    parsed = parse(f"{thought}\n<call>x", found(("add", "{}"), content="\n"))
    assert parsed.content == thought
    assert [call.raw for call in parsed.calls] == ["<call>x"]
    assert parse.asked[-1][0] == "\n<call>x"


@pytest.mark.parametrize("tag", ["<call>", ""])
def test_the_end_of_a_thought_in_an_argument_ends_no_thought(parse: Any, tag: str) -> None:
    text = 'So.\n<call>{"a": "x</think>"}'
    (call,) = parse(text, found(("add", '{"a": "x</think>"}'), content="So.\n"), tag=tag).calls
    assert (call.arguments, call.raw) == ({"a": "x</think>"}, text[4:])


@pytest.mark.parametrize(
    "text", ['a <call></think>\n<call>{"a": "</think>"}', '<think>a</think><call>{"a": "</think>"}']
)
def test_a_thought_ends_before_an_argument_that_spells_its_end(parse: Any, text: str) -> None:
    (call,) = parse(text, found(("add", '{"a": "</think>"}'))).calls
    assert call.raw == '<call>{"a": "</think>"}'


def test_a_parser_that_raises_on_a_thought_sees_what_follows_it(parse: Any) -> None:
    (call,) = parse("a <call></think>\n<call>x", ValueError("unbalanced")).calls
    assert (call.raw, call.status) == ("<call>x", "invalid_json")


def test_a_thought_that_does_not_end_calls_nothing(parse: Any) -> None:
    text = "<think><call>x"
    assert parse(text, found()) == Parsed(text)


def test_the_request_has_the_tools_and_without_them_nothing_is_asked(parse: Any) -> None:
    parse("hello", found(content="hello"))
    ((_, request),) = parse.asked
    assert request.tool_choice == "auto"
    assert [tool["function"] for tool in request.tools] == [
        {"name": "add", "parameters": {"type": "object"}},
        {"name": "search", "parameters": {}},
    ]
    assert parse("<call>x", found(("add", "{}")), tools={}) == Parsed("<call>x")
    assert len(parse.asked) == 1


def test_a_name_that_vllm_does_not_have_is_refused(parse: Any) -> None:
    with pytest.raises(UnknownName, match=r"'refusin'; did you mean 'refusing'\?; there is: refusing"):
        get_parser("vllm:refusin", tokenizer=TOKENIZER)


def test_a_tokenizer_without_the_parsers_tokens_is_refused(parse: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"'refusing' does not take the tokenizer 'some/model': could"):
        get_parser("vllm:refusing", tokenizer=TOKENIZER)


def test_without_vllm_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "vllm.tool_parsers", raising=False)
    with pytest.raises(MissingExtra, match=r"'vllm:hermes' is vLLM's .* pip install \"agentrl-gym\[vllm\]\""):
        get_parser("vllm:hermes", tokenizer=TOKENIZER)


def test_a_parser_of_vllms_needs_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        get_parser("vllm:hermes")
