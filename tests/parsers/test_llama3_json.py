"""The llama3_json family: calls that look like any other JSON."""

from __future__ import annotations

from typing import Any

import pytest

from agentrl.parsers import Parsed, get_parser

TOOLS: dict[str, dict[str, Any]] = {"add": {}, "search": {}}


def parse(text: str) -> Parsed:
    return get_parser("llama3_json").parse(text, tools=TOOLS)


def outcomes(text: str) -> list[tuple[str, str, Any]]:
    return [(call.name, call.status, call.arguments) for call in parse(text).calls]


ADD = '{"name": "add", "parameters": {"a": 1}}'
ADDED = ("add", "ok", {"a": 1})


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (ADD, ""),
        (f"<|python_tag|>{ADD}", ""),
        (f"Here it is: {ADD} Would you like more?", "Here it is:\nWould you like more?"),
        ('{"name": "add", "arguments": {"a": 1}}', ""),
        ('{"type": "function", "name": "add", "parameters": {"a": 1}}', ""),
        ('{"parameters": {"a": 1}, "name": "add"}', ""),
        ('{\n  "name": "add",\n  "parameters": {\n    "a": 1\n  }\n}', ""),
        ('{"name": "add", "parameters": "{\\"a\\": 1}"}', ""),
    ],
)
def test_a_call_is_read_in_each_of_its_forms(text: str, content: str) -> None:
    assert outcomes(text) == [ADDED]
    assert parse(text).content == content


@pytest.mark.parametrize("joint", ["; ", ";", "\n", " "])
def test_several_calls_are_read(joint: str) -> None:
    assert outcomes(joint.join([ADD, ADD, ADD])) == [ADDED] * 3
    assert parse(joint.join([ADD, ADD])).content == ""


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ('{"name": "add", "parameters": {"a": }}', "invalid_json"),
        ('{"name": "add", "parameters": {"a": NaN}}', "invalid_json"),
        ('{"name": "add", "parameters": {"a": 1, "a": 2}}', "invalid_json"),
        ('{"name": "add", "parameters": {"a": 1}', "unclosed"),
        ('{"name": "add", "parameters": [1]}', "not_object"),
        ('{"name": "add"}', "not_object"),
    ],
)
@pytest.mark.parametrize("joint", ["; ", "\n"])
def test_a_bad_call_between_good_ones_spoils_neither(bad: str, status: str, joint: str) -> None:
    assert outcomes(joint.join([ADD, bad, ADD])) == [ADDED, ("add", status, None), ADDED]


@pytest.mark.parametrize(
    "answer",
    [
        '{"answer": 4}',
        '{"name": "Bob", "age": 3}',
        'a call looks like {"name": "other", "parameters": {}} there',
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}',
        "the set {1, 2} and {",
    ],
)
def test_json_that_calls_nothing_is_content(answer: str) -> None:
    assert parse(answer) == Parsed(answer)


def test_what_follows_the_python_tag_is_an_attempt() -> None:
    assert outcomes('<|python_tag|>brave_search.call(query="x")\nprint(1)') == [("", "invalid_json", None)]
    assert outcomes('<|python_tag|>{"answer": 4}') == [("", "invalid_json", None)]


def test_a_call_cut_in_its_name_is_unclosed() -> None:
    assert outcomes('{"name": "ad') == [("ad", "unclosed", None)]


@pytest.mark.parametrize(
    "bad",
    [
        '{"name": "add", "parameters": {"a": x}}',
        '{"name": "add", "parameters": {"a": 1}',
        '{"name": "search", "parameters": {"q": x, "t": "} {"}}',
    ],
)
def test_a_good_call_right_behind_a_bad_one_is_read(bad: str) -> None:
    calls = parse(f"{bad} {ADD}").calls
    assert [call.raw for call in calls] == [bad, ADD]
    assert calls[1].status == "ok"


@pytest.mark.parametrize(
    "bad",
    [
        f'{{"name": "search", "parameters": {{"q": x, "t": "}} {ADD}}}',  # it may stand in a string
        '{"name": "search", "parameters": {"q": x}} {"name": "Bob"}',
    ],
)
def test_what_may_belong_to_a_bad_call_does(bad: str) -> None:
    assert [call.raw for call in parse(bad).calls] == [bad]
