"""The pythonic family: a list of calls with arguments by name."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentrl.parsers import Parsed, get_parser

TOOLS: dict[str, dict[str, Any]] = {"add": {}, "search": {}}


def parse(text: str) -> Parsed:
    return get_parser("pythonic").parse(text, tools=TOOLS)


def outcomes(text: str) -> list[tuple[str, str, Any]]:
    return [(call.name, call.status, call.arguments) for call in parse(text).calls]


PIECES = st.sampled_from(
    ["r", "u", "'", '"', "'''", '"""', "\\", "\n", " ", "x", "0", "1", "7", "_", "\\N{BULLET}", "\\x4",
     "\\u00e9", "(", ")", "[", "]", ",", ".", "e", "0x", "-1", "True", "None", "é"]
)  # fmt: skip
ADD = "add(a=1)"
ADDED = ("add", "ok", {"a": 1})


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("'it\\'s'", "it's"),
        ('"a\\nb\\t\\u00e9\\x41\\q"', "a\nb\té\x41\\q"),
        ('"\\ud83d\\ude42"', "🙂"),
        ('"two\nlines"', "two\nlines"),
        ('"one\\\nline"', "oneline"),
        ("[1, -2.5, 1e3, .5,]", [1, -2.5, 1000.0, 0.5]),
        ("{'k': {\"l\": []}, 'm': None}", {"k": {"l": []}, "m": None}),
        ("[True, False, None, true, false, null]", [True, False, None, True, False, None]),
        ('"), search(a=1)]"', "), search(a=1)]"),
        (r'"\033[0m\0\377\x41\N{BULLET}\N{no such}\8"', "\x1b[0m\0\xffA•\\N{no such}\\8"),
        (r'"\\033 \\N{BULLET}"', r"\033 \N{BULLET}"),
        ('"""\nx = "a"\n\\"""y"""', '\nx = "a"\n"""y'),
        ("'''it's'''", "it's"),
        ("'' \"\"", ""),
        (r'''r"\d\"" R'\n' "\n"''', '\\d\\"\\n\n'),
        ('f"x" rf"\\d" u"y"', "x\\dy"),
        ('{"a" "b": "c"\n"d"}', {"ab": "cd"}),
        ("(1, (2,), (), (3), ('a' 'b'))", [1, [2], [], 3, "ab"]),
        ("{1, 'a',}", [1, "a"]),
        ("[1_000, 1_0.5, 1e1_0, 0xfF, -0b1_0, 0o17]", [1000, 10.5, 1e10, 255, -2, 15]),
    ],
)
def test_values_are_python_literals(said: str, value: Any) -> None:
    assert outcomes(f"[add(a={said})]") == [("add", "ok", {"a": value})]


@given(
    said=st.lists(PIECES, max_size=8).map("".join)
    | st.builds(
        "{0}{1}{2}{1}".format,
        st.sampled_from(["", "r", "u"]),
        st.sampled_from(["'", '"', "'''", '"""']),
        st.lists(PIECES, max_size=6).map("".join),
    )
)
def test_what_python_reads_is_read_alike(said: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are none
            value = json.loads(json.dumps(ast.literal_eval(f"({said})"), allow_nan=False))
    except (SyntaxError, TypeError, ValueError):
        return
    assume("\\\n" not in said)  # between values it is nothing, which no model writes
    assert outcomes(f"[add(a=({said}))]") == [("add", "ok", {"a": value})]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"[{ADD}, search()]", ""),
        (f"[ {ADD} ,\n search( ) , ]", ""),
        (f"<|python_start|>[{ADD}, search()]<|python_end|>", ""),
        (f"Let me see. [{ADD}, search()]\nDone.", "Let me see.\nDone."),
        (f"[{ADD}] and [search()]", "and"),
    ],
)
def test_calls_are_read_with_the_text_around_them(text: str, content: str) -> None:
    assert outcomes(text) == [ADDED, ("search", "ok", {})]
    assert parse(text).content == content


@pytest.mark.parametrize(
    ("bad", "note"),
    [
        ("add(1, 2)", "by name"),
        ("add(a=b)", "a value is a number"),
        ("add(a=1 b=2)", "a comma"),
        ("add(a=1, a=2)", "given twice"),
        ("add(a=1e999)", "too large"),
        ("add(a=" + "9" * 10_000 + ")", "too many digits"),
        ("add(a={1: 2})", "a key is a string"),
        ("add(a={'k': 1, 'k': 2})", "same key twice"),
        ("add(a='\\ud800')", "surrogate"),
        ("add(a=r'\ud800')", "surrogate"),
        ("add(a=f'{b}')", "f-string"),
        ("add(a=b'x')", "a value is a number"),
        ("add(a=1_)", "a value is a number"),
        ("add(a=0x" + "f" * 10_000 + ")", "too many digits"),
        ("add(a={'a', 'b': 1})", "a comma"),
        ("add(a={'a': 1, 'b'})", "a colon"),
        ("add(a=" + "(" * 100 + ")", "nested more than 64"),
        ("add(a=" + "[" * 100 + ")", "nested more than 64"),
        ("add(a=__import__('os').getcwd())", "a value is a number"),
    ],
)
def test_a_bad_call_between_good_ones_spoils_neither(bad: str, note: str) -> None:
    calls = parse(f"[{ADD}, {bad}, {ADD}]").calls
    assert [call.status for call in calls] == ["ok", "invalid_json", "ok"]
    assert note in calls[1].note


@pytest.mark.parametrize(
    "cut",
    [
        "[add(",
        "[add(a",
        "[add(a=",
        "[add(a='x",
        "[add(a=[1, ",
        "[add(a={'k': Tr",
        "[add(a=1",
        "[add(a=(1",
        "[add(a=r",
        "[add(a='x' 'y",
        '[add(a="""x"',
        '[add(a="""',
    ],
)
def test_a_cut_call_is_unclosed_and_the_one_before_it_stands(cut: str) -> None:
    assert [call[1] for call in outcomes(cut)] == ["unclosed"]
    assert [call[1] for call in outcomes(f"[{ADD}, {cut[1:]}")] == ["ok", "unclosed"]


@pytest.mark.parametrize(
    "text", ["see [1](link) and [max(a, b)]", "a list: [1, 2]", "x [other(a=1)]", "[max(a, b)]"]
)
def test_brackets_that_call_nothing_are_content(text: str) -> None:
    assert parse(text) == Parsed(text)


def test_a_list_that_begins_a_line_may_call_an_unknown_tool() -> None:
    assert outcomes("Well.\n[ad(a=1)]") == [("ad", "unknown_tool", {"a": 1})]


@pytest.mark.parametrize(
    "bad",
    [
        'search(1, ")]")',
        "search(1, '), add(a=2)')",
        'search(q="a" + "), search()]")',
        "search(q=it's)",
        'search(1, """), "search()]""")',
        'search(1, "x)',
        "search(1, \"it's), x\", '\\')]')",
    ],
)
def test_a_bad_call_ends_outside_of_its_strings(bad: str) -> None:
    parsed = parse(f'[{bad}, add(a="1")]')
    assert [(call.name, call.status) for call in parsed.calls] == [("search", "invalid_json"), ("add", "ok")]
    assert parsed.calls[0].raw == f"[{bad}, "
