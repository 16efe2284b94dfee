"""What holds of every tool-call format: what is written is read, nothing raises, nothing is lost."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentrl.parsers import Parsed, get_parser

FAMILIES = ("deepseek_v3", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_xml")
TAGS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[THINK]", "[/THINK]",
    "<function=add>", "</function>", "<parameter=a>", "</parameter>",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|python_start|>", "<|python_end|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    '{"name": "add"', '"parameters": ', '"arguments": ', "[add(", "add(a=", ")]", "; ", ", ",
    "\n```json\n", "\n```",
    "{", "}", "[", "]", "'", '"', "\\", "\n", " ", "é🙂", "1", "x",
]  # fmt: skip
# The XML format escapes nothing: a value can't spell the end of itself or the beginning of a call. When
# one is cut, the end of a thought and a call behind it look as if the thought had begun in the prompt.
AMBIGUOUS = re.compile(
    r"</parameter>\s*<(?:parameter=|/function>\s*<(?:/tool_call>|tool_call>|function=))"
    r"|<tool_call>\s*<function=|(?:</?think>|\[/?THINK\]).*<function=",
    re.DOTALL,
)

texts = st.text(max_size=12) | st.lists(st.sampled_from(TAGS), max_size=5).map("".join)
strings = texts.filter(lambda text: not AMBIGUOUS.search(text))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
).filter(lambda value: not AMBIGUOUS.search(repr(value).replace("\\n", "\n")))
calls = st.dictionaries(st.sampled_from(["a", "b_2", "from", "query"]), values, max_size=3)
around = st.text("ab é\n", max_size=8)
few = settings(max_examples=40, deadline=None)
families = pytest.mark.parametrize("family", FAMILIES)


def schema_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Says which arguments are strings, which is what the XML format needs to know."""
    return {
        "properties": {
            key: {"type": "string"} if isinstance(value, str) else {} for key, value in arguments.items()
        }
    }


def parse(family: str, text: str, arguments: Mapping[str, Any] | None = None) -> Parsed:
    return get_parser(family).parse(text, tools={"add": schema_of(arguments or {}), "search": {}})


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_nothing_is_lost(text: str, parsed: Parsed) -> None:
    outside, at = "", 0
    for call in parsed.calls:
        assert at <= call.span[0] < call.span[1]
        assert text[slice(*call.span)] == call.raw
        assert (call.note == "") == (call.status == "ok")
        assert (call.arguments is not None) == (call.status in ("ok", "unknown_tool"))
        outside, at = outside + text[at : call.span[0]], call.span[1]
    assert squeezed(parsed.content) == squeezed(outside + text[at:])
    assert parsed.calls or parsed.content == text


@families
@given(arguments=calls)
@few
def test_what_is_rendered_is_read_back(family: str, arguments: dict[str, Any]) -> None:
    text = get_parser(family).render("add", arguments)
    parsed = parse(family, text, arguments)
    assert [(call.name, call.status, call.arguments) for call in parsed.calls] == [("add", "ok", arguments)]
    assert (parsed.content, parsed.calls[0].raw) == ("", text)


@families
@given(before=around, between=around, after=around, arguments=calls)
@few
def test_the_text_around_calls_is_kept(
    family: str, before: str, between: str, after: str, arguments: dict[str, Any]
) -> None:
    said = get_parser(family).render("add", arguments)
    parsed = parse(family, before + said + between + said + after, arguments)
    assert [call.arguments for call in parsed.calls] == [arguments, arguments]
    assert parsed.content == "\n".join(filter(None, [before.rstrip(), between.strip(), after.strip()]))


@families
@given(arguments=calls)
@example(arguments={"a": {"[TOOL_CALLS]": {}}})
@settings(max_examples=15, deadline=None)
def test_a_cut_text_has_no_call_that_was_not_said(family: str, arguments: dict[str, Any]) -> None:
    said = get_parser(family).render("add", arguments)
    text = f"So. {said}\n{said}"
    for stop in range(len(text)):
        parsed = parse(family, text[:stop], arguments)
        check_nothing_is_lost(text[:stop], parsed)
        good = [(call.name, call.arguments) for call in parsed.calls if call.status in ("ok", "unknown_tool")]
        assert good == [("add", arguments)] * len(good)


@families
@given(text=st.text() | st.lists(st.sampled_from(TAGS), max_size=25).map("".join))
@settings(max_examples=150, deadline=None)
def test_no_text_raises_and_nothing_of_it_is_lost(family: str, text: str) -> None:
    check_nothing_is_lost(text, parse(family, text))


@families
@given(raw=st.binary(max_size=60))
@few
def test_no_bytes_raise(family: str, raw: bytes) -> None:
    text = raw.decode("utf-8", "replace")
    check_nothing_is_lost(text, parse(family, text))


@families
def test_a_call_in_a_thought_is_no_call(family: str) -> None:
    said = get_parser(family).render("add", {"a": 1})
    parsed = parse(family, f"<think>perhaps {said}</think>\n{said}")
    assert (len(parsed.calls), parsed.content) == (1, f"<think>perhaps {said}</think>")
    assert len(parse(family, f"perhaps {said}</think>\n{said}").calls) == 1
    assert parse(family, f"<think>{said}").calls == ()


@families
@pytest.mark.parametrize("gap", ["\n\n", "\nNow. "])
def test_a_thought_that_began_in_the_prompt_is_content_wherever_a_call_in_it_breaks_off(
    family: str, gap: str
) -> None:
    said = get_parser(family).render("add", {"a": "xy, z", "b": 1})
    for before in ("perhaps ", "So\n", f"{said} or "):
        for stop in range(1, len(said) + 1):
            thought = f"{before}{said[:stop]} hm</think>"
            parsed = parse(family, f"{thought}{gap}{said}", {"a": "", "b": 1})
            assert [(call.status, call.raw) for call in parsed.calls] == [("ok", said)], thought
            assert parsed.content == f"{thought}{gap}".rstrip()


@families
@pytest.mark.parametrize(
    "text",
    [
        "<think>x</think>\n{}\n</think>",
        "x</think>\n{}\n</think>",
        "The tag <think> opens a thought.\n{}",
        "<think>x</think> Well, <think>\n{}",
        "[THINK]x[/THINK]\n{}\n[/THINK]",
    ],
)
def test_a_tag_that_opens_or_closes_no_thought_hides_no_call(family: str, text: str) -> None:
    said = get_parser(family).render("add", {"a": 1})
    parsed = parse(family, text.format(said))
    assert [call.raw for call in parsed.calls] == [said]
    assert squeezed(parsed.content) == squeezed(text.format(""))


@families
def test_an_open_thought_hides_what_follows_where_only_thoughts_come_before(family: str) -> None:
    said = get_parser(family).render("add", {"a": 1})
    assert parse(family, f"<think>x</think>\n<think>{said}").calls == ()
    assert parse(family, f"x</think>\n<think>{said}").calls == ()


@families
@pytest.mark.parametrize("wrong", ["nil", "1e999"])
def test_the_end_of_a_thought_in_a_string_of_a_bad_call_hides_no_call(family: str, wrong: str) -> None:
    parser = get_parser(family)
    good = parser.render("add", {"a": "x"})
    bad = parser.render("add", {"a": "so </think> ends", "b": 1234}).replace("1234", wrong)
    tools = {"add": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}}
    parsed = parser.parse(f"{good}\n{bad}", tools=tools)
    assert [(call.status, call.raw) for call in parsed.calls] == [("ok", good), ("invalid_json", bad)]


@families
def test_a_call_to_a_tool_that_is_not_there_is_kept_with_its_arguments(family: str) -> None:
    (call,) = parse(family, get_parser(family).render("ad", {"a": 1})).calls
    assert (call.status, call.name, call.arguments) == ("unknown_tool", "ad", {"a": 1})
    assert call.note == "no tool named 'ad'; did you mean 'add'?; there is: add, search"


@families
@pytest.mark.parametrize("depth", [60, 200, 20_000])
def test_deep_arguments_exhaust_nothing(family: str, depth: int) -> None:
    said = get_parser(family).render("add", {"a": ["?"]}).replace('["?"]', "[" * depth + "]" * depth)
    statuses = [call.status for call in parse(family, said, {"a": []}).calls]
    assert (statuses == ["ok"]) if depth == 60 else ("ok" not in statuses or family == "qwen3_xml")
    assert statuses


def work(family: str, text: str) -> int:
    """How many functions, those written in C included, are called to read ``text``."""
    counted = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    parser = get_parser(family)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        parser.parse(text, tools={"add": {}})
    finally:
        sys.setprofile(before)
    return counted


@families
@pytest.mark.parametrize(
    "end", ["", '"', '{"', '{"name": "add", ', "add{", "a=[", "<function=add><parameter=a>"]
)
def test_twice_the_text_is_twice_the_work(family: str, end: str) -> None:
    opening = {
        "deepseek_v3": "<｜tool▁call▁begin｜>add<｜tool▁sep｜>",
        "hermes": "<tool_call>",
        "llama3_json": "<|python_tag|>",
        "mistral": "[TOOL_CALLS]",
        "pythonic": "[add(",
        "qwen3_xml": "<tool_call>",
    }[family]
    for unit in (opening + end, end or opening, opening + end + "]}"):
        assert work(family, unit * 400) <= 2.3 * work(family, unit * 200) + 200
