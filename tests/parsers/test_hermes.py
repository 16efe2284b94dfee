"""The hermes family: every attempt is kept, nothing raises, nothing is quadratic."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.parsers import Parsed, ParsedCall, get_parser

TOOLS: dict[str, dict[str, Any]] = {"add": {}, "search": {}}
GOOD = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FRAGMENTS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        GOOD,
        "{",
        "}",
        "[",
        '"',
        "\\",
        '{"name": ',
        "x",
        " ",
        "<",
    ]
)


def parse(text: str) -> Parsed:
    return get_parser("hermes").parse(text, tools=TOOLS)


def only(text: str) -> ParsedCall:
    (call,) = parse(text).calls
    return call


def test_text_without_calls_is_content_as_it_is() -> None:
    assert parse("  2 < 3, so {} \n") == Parsed("  2 < 3, so {} \n")


def test_a_call_is_read_with_its_raw_text_and_span() -> None:
    text = f"Let me see.\n{GOOD}\nDone. "
    parsed = parse(text)
    assert parsed.content == "Let me see.\nDone."
    assert parsed.calls == (
        ParsedCall(name="add", arguments={"a": 1}, raw=GOOD, status="ok", note="", span=(12, 12 + len(GOOD))),
    )


@pytest.mark.parametrize(
    ("body", "status", "note"),
    [
        ('{"name": "add", "arguments": {"a": }}', "invalid_json", "Expecting value at character 35"),
        ("{'name': 'add', 'arguments': {}}", "invalid_json", "double quotes"),
        ("add(1)", "invalid_json", "Expecting value"),
        ("", "invalid_json", "Expecting value"),
        ('{"name": "add", "arguments": {}} and more', "invalid_json", "more text after the object"),
        ('{"name": "add", "arguments": {"a": NaN}}', "invalid_json", "NaN is not JSON"),
        ('{"name": "add", "arguments": {"a": -Infinity}}', "invalid_json", "Infinity is not JSON"),
        ('{"name": "add", "arguments": {"a": 1e999}}', "invalid_json", "too large"),
        ('{"name": "add", "arguments": {"a": 1, "a": 2}}', "invalid_json", "same key twice"),
        ('{"name": "add", "arguments": {"a": "\\ud800"}}', "invalid_json", "surrogate"),
        ('["add", {}]', "not_object", "a call is an object"),
        ('"add"', "not_object", "a call is an object"),
        ('{"name": 3, "arguments": {}}', "not_object", "a string"),
        ('{"arguments": {}}', "not_object", "a string"),
        ('{"name": "add"}', "not_object", "an object"),
        ('{"name": "add", "arguments": [1]}', "not_object", "an object"),
        ('{"name": "add", "arguments": "1"}', "not_object", "an object"),
        (
            '{"name": "ad", "arguments": {}}',
            "unknown_tool",
            "no tool named 'ad'; did you mean 'add'?; there is: add",
        ),
    ],
)
def test_a_bad_call_is_kept_with_its_status_and_a_note(body: str, status: str, note: str) -> None:
    call = only(f"<tool_call>{body}</tool_call>")
    assert (call.status, call.raw) == (status, f"<tool_call>{body}</tool_call>")
    assert note in call.note
    assert (call.arguments is None) == (status != "unknown_tool")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<tool_call>", ""),
        ('<tool_call>{"name": "add", "argum', ""),
        ('<tool_call>{"name": "add", "arguments": {}}', "add"),
        ('<tool_call>{"name": "add", "arguments": {}} and then', ""),
    ],
)
def test_a_call_without_its_closing_tag_is_unclosed(text: str, name: str) -> None:
    call = only(text)
    assert (call.status, call.name, call.arguments, call.raw) == ("unclosed", name, None, text)
    assert parse(text).content == ""


def test_a_closing_tag_inside_a_string_does_not_end_the_call() -> None:
    arguments = {"a": 'see </tool_call> and <tool_call>{"x": 1}</tool_call> or </think>'}
    call = only(get_parser("hermes").render("search", arguments))
    assert (call.status, call.arguments) == ("ok", arguments)


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "add", "arguments": {"n": 1, "n": 2, "q": "see </tool_call> tag"}}',
        '{"name": "add", "arguments": {"q": "two\nlines and </tool_call>"}}',
        '{"name": "add", "arguments": {"q": "<tool_call>{}</tool_call>",}}',
        '{"name": "add", "arguments": {"q": "</tool_call>", "n": 1e999}}',
    ],
)
def test_a_bad_call_whose_brackets_and_quotes_pair_up_ends_behind_them(body: str) -> None:
    call = only(f"<tool_call>{body}</tool_call> Done.")
    assert (call.status, call.raw) == ("invalid_json", f"<tool_call>{body}</tool_call>")


def test_the_note_of_a_bad_call_is_about_its_fault_and_not_about_a_tag_in_its_string() -> None:
    call = only('<tool_call>{"name": "add", "arguments": {"a": "</think>", "b": x}}</tool_call>')
    assert call.note == "invalid JSON: Expecting value at character 52"


@pytest.mark.parametrize(
    "bad",
    ["<tool_call>{}}</tool_call>", '<tool_call>{"name": "x</tool_call>', "<tool_call>{", "<tool_call>[1, 2"],
)
def test_a_bad_call_between_good_ones_spoils_neither(bad: str) -> None:
    calls = parse(f"one {GOOD} two {bad}\n{GOOD} three").calls
    assert [call.status == "ok" for call in calls] == [True, False, True]


def test_arguments_may_be_a_string_that_holds_an_object() -> None:
    call = only('<tool_call>{"name": "add", "arguments": "{\\"a\\": {\\"b\\": [1]}}"}</tool_call>')
    assert (call.status, call.arguments) == ("ok", {"a": {"b": [1]}})


@pytest.mark.parametrize(
    "text", [f"<think>perhaps {GOOD}</think>", f"<think>{GOOD}", f"perhaps {GOOD} or {GOOD[:20]}</think>"]
)
def test_a_call_in_a_thought_is_no_call(text: str) -> None:
    after = f"\n\nNow. {GOOD}" if text.endswith("</think>") else ""
    parsed = parse(text + after)
    assert parsed.content == text + ("\n\nNow." if after else "")
    assert len(parsed.calls) == (1 if after else 0)


@pytest.mark.parametrize(
    "bomb", ["[" * 100_000, '{"a":' * 100_000, '{"name": "add", "arguments": ' + "[" * 100_000]
)
@pytest.mark.parametrize("end", ["", "</tool_call>"])
def test_a_depth_bomb_is_invalid_and_exhausts_nothing(bomb: str, end: str) -> None:
    call = only(f"<tool_call>{bomb}{end}")
    assert call.status == ("invalid_json" if end else "unclosed")


def test_arguments_are_at_most_sixty_four_levels_deep() -> None:
    def nested(depth: int) -> str:
        body = '{"name": "add", "arguments": {"a": ' + "[" * depth + "]" * depth + "}}"
        return only(f"<tool_call>{body}</tool_call>").status

    assert (nested(62), nested(63)) == ("ok", "invalid_json")


def test_a_number_of_ten_thousand_digits_is_invalid() -> None:
    call = only('<tool_call>{"name": "add", "arguments": {"a": ' + "7" * 10_000 + "}}</tool_call>")
    assert call.status == "invalid_json"


@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_call>{",
     '<tool_call>{"', '<tool_call>{"a\\"',
     '<tool_call>["",', '<tool_call>{"a": "', "<tool_call> ", "<tool_call>\n", "<tool_call>1", "{", '"', "\\",
     '<tool_call>x\\"</think>', "<think></think>", "x <think>", '<tool_call>"\\"</think>',
     GOOD, "<tool_call>{}", '<tool_call>{"x": [{"', "<tool_call></think>", "<think><tool_call>"],
)  # fmt: skip
def test_time_is_linear_in_the_text(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        started = time.process_time()
        parse(text)
        return time.process_time() - started

    # Quadratic work would take sixteen times as long.
    small, large = min(seconds(25_000) for _ in range(2)), min(seconds(100_000) for _ in range(2))
    assert large < 9 * small + 0.02


@given(text=st.text() | st.lists(FRAGMENTS, max_size=30).map("".join) | st.text(st.characters()))
def test_no_text_raises_and_every_attempt_is_where_its_span_says(text: str) -> None:
    parsed = parse(text)
    stop = 0
    for call in parsed.calls:
        assert call.span[0] >= stop
        assert text[slice(*call.span)] == call.raw
        assert call.raw.startswith("<tool_call>")
        assert (call.note == "") == (call.status == "ok")
        stop = call.span[1]
    assert (parsed.content == text) or parsed.calls


@given(
    calls=st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=3),
    text=st.text("ab <\n"),
)
def test_what_is_rendered_is_read_back(calls: list[dict[str, Any]], text: str) -> None:
    parser = get_parser("hermes")
    parsed = parse(text + "\n".join(parser.render("add", arguments) for arguments in calls))
    assert [(call.status, call.arguments) for call in parsed.calls] == [
        ("ok", arguments) for arguments in calls
    ]
    assert parsed.content == text.rstrip()


def test_json_of_other_spacing_and_escapes_is_read() -> None:
    body = json.dumps({"arguments": {"é": "🙂"}, "name": "add"}, indent=2)
    call = only(f"<tool_call>\n{body}\n</tool_call>")
    assert (call.status, call.arguments) == ("ok", {"é": "🙂"})


def test_without_tools_every_call_is_unknown() -> None:
    (call,) = get_parser("hermes").parse(GOOD, tools={}).calls
    assert (call.status, call.note) == ("unknown_tool", "no tool named 'add'; there are no tools")


def test_the_recursion_limit_is_as_it_was() -> None:
    before = sys.getrecursionlimit()
    parse("<tool_call>" + "[" * 5000)
    assert sys.getrecursionlimit() == before
