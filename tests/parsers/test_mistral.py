"""The mistral family: lists of objects, and names with objects."""

from __future__ import annotations

from typing import Any

import pytest

from agentrl.parsers import Parsed, get_parser

TOOLS: dict[str, dict[str, Any]] = {"add": {}, "search": {}}


def parse(text: str) -> Parsed:
    return get_parser("mistral").parse(text, tools=TOOLS)


def outcomes(text: str) -> list[tuple[str, str, Any]]:
    return [(call.name, call.status, call.arguments) for call in parse(text).calls]


ADDED = ("add", "ok", {"a": 1})
OLD = '{"name": "add", "arguments": {"a": 1}, "id": "123456789"}'


@pytest.mark.parametrize(
    "text",
    [
        f"[TOOL_CALLS] [{OLD}]",
        f"[TOOL_CALLS][ {OLD} ]",
        f"[TOOL_CALLS]{OLD}",
        '[TOOL_CALLS]add{"a": 1}',
        '[TOOL_CALLS] add {"a": 1}',
        '[TOOL_CALLS]add[ARGS]{"a": 1}',
        '[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}',
    ],
)
def test_a_call_is_read_in_each_of_its_forms(text: str) -> None:
    assert outcomes(text) == [ADDED]
    assert parse(f"Well. {text} Done.").content == "Well.\nDone."
    assert parse(f"[THINK]{text}[/THINK]").calls == ()


def test_the_calls_of_a_list_share_its_brackets_and_commas() -> None:
    text = f"[TOOL_CALLS] [{OLD}, {OLD}]"
    assert [call.raw for call in parse(text).calls] == [f"[TOOL_CALLS] [{OLD}, ", f"{OLD}]"]


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ('{"name": "add", "arguments": {"a": }}', "invalid_json"),
        ('{"name": add, "arguments": {}}', "invalid_json"),
        ('{"name": "add", "arguments": {"a": 1}', "unclosed"),
        ('{"name": "add", "arguments": [1]}', "not_object"),
        ("{}", "not_object"),
    ],
)
def test_a_bad_object_of_a_list_spoils_no_other(bad: str, status: str) -> None:
    assert [call[1] for call in outcomes(f"[TOOL_CALLS] [{OLD}, {bad}, {OLD}]")] == ["ok", status, "ok"]


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ('[TOOL_CALLS]add{"a": ', "unclosed"),
        ('[TOOL_CALLS]add{"a": "x', "unclosed"),
        ("[TOOL_CALLS]add{a: 1}", "invalid_json"),
        ("[TOOL_CALLS]add[ARGS]", "unclosed"),
        ("[TOOL_CALLS]", "unclosed"),
        ("[TOOL_CALLS]add 12", "not_object"),
    ],
)
def test_a_bad_call_ends_at_the_next_tag(bad: str, status: str) -> None:
    good = '[TOOL_CALLS]add{"a": 1}'
    assert [call[1] for call in outcomes(good + bad + good)] == ["ok", status, "ok"]


def test_a_tag_inside_a_string_begins_no_call() -> None:
    assert outcomes('[TOOL_CALLS]add{"a": "[TOOL_CALLS]x{}"}') == [("add", "ok", {"a": "[TOOL_CALLS]x{}"})]


@pytest.mark.parametrize(
    "cut", ["[TOOL_CALLS]", "[TOOL_CALLS]ad", '[TOOL_CALLS]add{"a"', '[TOOL_CALLS] [{"name": "add']
)
def test_a_cut_call_is_unclosed(cut: str) -> None:
    assert [call[1] for call in outcomes(cut)] == ["unclosed"]


@pytest.mark.parametrize(
    "bad",
    [
        '[TOOL_CALLS]search{"q": "one\n[TOOL_CALLS]add{}"}',
        '[TOOL_CALLS]search{"q": "[TOOL_CALLS]add{}", "n": 1e999}',
        '[TOOL_CALLS]search{"q": "[TOOL_CALLS]add{}",}',
        '[TOOL_CALLS]search{"n": 1, "n": 2, "q": "[TOOL_CALLS]add{}"}',
    ],
)
def test_a_bad_call_whose_brackets_and_quotes_pair_up_ends_with_them(bad: str) -> None:
    assert outcomes(bad) == [("search", "invalid_json", None)]
    assert [call.raw for call in parse(f"{bad} I wait.").calls] == [bad]
    assert parse(f"{bad} I wait.").content == "I wait."
