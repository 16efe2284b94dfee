"""The qwen3_xml family: values as plain text, which the schema gives a type."""

from __future__ import annotations

from typing import Any

import pytest

from agentrl.parsers import Parsed, get_parser

TOOLS: dict[str, dict[str, Any]] = {
    "add": {
        "properties": {
            "s": {"type": "string"},
            "i": {"type": "integer"},
            "b": {"type": "boolean"},
            "o": {"type": "object"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "number_or_text": {"type": ["number", "string"]},
            "choice": {"enum": ["a", "b"]},
        }
    },
    "search": {},
}


def parse(text: str) -> Parsed:
    return get_parser("qwen3_xml").parse(text, tools=TOOLS)


def outcomes(text: str) -> list[tuple[str, str, Any]]:
    return [(call.name, call.status, call.arguments) for call in parse(text).calls]


def call_of(*parameters: tuple[str, str], name: str = "add") -> str:
    said = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{said}</function>\n</tool_call>"


GOOD = call_of(("i", "1"))


@pytest.mark.parametrize(
    ("key", "said", "value"),
    [
        ("s", "1", "1"),
        ("s", '"quoted"', '"quoted"'),
        ("s", "\n two \n", "\n two \n"),
        ("s", "", ""),
        ("s", "</parameter> <tool_call> </tool_call>", "</parameter> <tool_call> </tool_call>"),
        ("i", "12", 12),
        ("b", "True", True),
        ("b", "false", False),
        ("o", '{"k": [1, null]}', {"k": [1, None]}),
        ("maybe", "None", None),
        ("maybe", "12", "12"),
        ("number_or_text", "12", 12),
        ("number_or_text", "twelve", "twelve"),
        ("choice", "b", "b"),
        ("unknown", "2 + 2", "2 + 2"),
        ("unknown", '{"k": 1}', {"k": 1}),
    ],
)
def test_a_value_means_what_the_schema_says(key: str, said: str, value: Any) -> None:
    assert outcomes(call_of((key, said))) == [("add", "ok", {key: value})]


def test_calls_are_read_with_the_text_around_them() -> None:
    inline = "<tool_call><function=search></function></tool_call>"
    assert outcomes(f"Well.\n{GOOD}\n{inline} Done.") == [("add", "ok", {"i": 1}), ("search", "ok", {})]
    assert parse(f"Well.\n{GOOD}\n{inline} Done.").content == "Well.\nDone."


@pytest.mark.parametrize(
    ("bad", "status", "note"),
    [
        (call_of(("i", "one")), "invalid_json", "'i' is no valid JSON"),
        (call_of(("o", '{"k": }')), "invalid_json", "'o' is no valid JSON"),
        (call_of(("i", "1"), ("i", "2")), "invalid_json", "given twice"),
        ("<tool_call>\n<function=add>\nx</function>\n</tool_call>", "invalid_json", "after its parameters"),
        ('<tool_call>\n{"name": "add"}\n</tool_call>', "invalid_json", "<function=name> must follow"),
        ("<tool_call><function=></function></tool_call>", "not_object", "names its tool"),
        ("<tool_call><function=add><parameter=i>1</function></tool_call>", "unclosed", "'i' does not end"),
        ("<tool_call><function=add><parameter=i>1", "unclosed", "'i' does not end"),
        ("<tool_call><function=add>", "unclosed", "after its parameters"),
        ("<tool_call>", "unclosed", "does not end with"),
    ],
)
def test_a_bad_call_between_good_ones_spoils_neither(bad: str, status: str, note: str) -> None:
    calls = parse(f"{GOOD} {bad}\n{GOOD}").calls
    assert [call.status for call in calls] == ["ok", status, "ok"]
    assert note in calls[1].note


def test_an_unclosed_parameter_is_never_an_empty_call() -> None:
    (call,) = parse("<tool_call>\n<function=add>\n<parameter=s>\nabc").calls
    assert (call.name, call.status, call.arguments) == ("add", "unclosed", None)
