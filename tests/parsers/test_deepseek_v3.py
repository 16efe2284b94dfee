"""The deepseek_v3 family: arguments in a fence, or right after the separator."""

from __future__ import annotations

from typing import Any

import pytest

from agentrl.parsers import Parsed, get_parser

TOOLS: dict[str, dict[str, Any]] = {"add": {}, "search": {}}


def parse(text: str) -> Parsed:
    return get_parser("deepseek_v3").parse(text, tools=TOOLS)


def outcomes(text: str) -> list[tuple[str, str, Any]]:
    return [(call.name, call.status, call.arguments) for call in parse(text).calls]


OPEN, SEPARATOR, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
ALL, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
FENCED = f'{OPEN}function{SEPARATOR}add\n```json\n{{"a": 1}}\n```{CLOSE}'
BARE = f'{OPEN}add{SEPARATOR}{{"a": 1}}{CLOSE}'
ADDED = ("add", "ok", {"a": 1})


@pytest.mark.parametrize("call", [FENCED, BARE])
def test_calls_are_read_with_the_text_around_them(call: str) -> None:
    text = f"Well.{ALL}{call}\n{call}{END} Done."
    assert outcomes(text) == [ADDED, ADDED]
    assert parse(text).content == "Well.\nDone."
    assert [call.raw for call in parse(text).calls] == [ALL + call, call + END]


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (f'{OPEN}function{SEPARATOR}add\n```json\n{{"a": }}\n```{CLOSE}', "invalid_json"),
        (f'{OPEN}add{SEPARATOR}{{"a": 1}} x{CLOSE}', "invalid_json"),
        (f"{OPEN}add{CLOSE}", "invalid_json"),
        (f"{OPEN}add{SEPARATOR}[1]{CLOSE}", "not_object"),
        (f"{OPEN}{SEPARATOR}{{}}{CLOSE}", "not_object"),
        (f'{OPEN}add{SEPARATOR}{{"a": 1}}', "unclosed"),
        (f'{OPEN}add{SEPARATOR}{{"a": "x', "unclosed"),
    ],
)
def test_a_bad_call_between_good_ones_spoils_neither(bad: str, status: str) -> None:
    assert [call[1] for call in outcomes(f"{ALL}{FENCED}{bad}{BARE}{END}")] == ["ok", status, "ok"]


def test_a_tag_inside_a_string_ends_no_call() -> None:
    said = get_parser("deepseek_v3").render("search", {"q": f"{CLOSE}\n```{END}{OPEN}"})
    assert outcomes(said) == [("search", "ok", {"q": f"{CLOSE}\n```{END}{OPEN}"})]


@pytest.mark.parametrize("cut", [ALL, ALL + OPEN, f"{OPEN}function{SEPARATOR}ad", FENCED[: -len(CLOSE)]])
def test_a_cut_call_is_unclosed(cut: str) -> None:
    assert [call[1] for call in outcomes(cut)] == ["unclosed"]


def test_a_bad_call_whose_brackets_and_quotes_pair_up_ends_behind_them() -> None:
    bad = f'{OPEN}search{SEPARATOR}{{"q": "one\n{OPEN}add{SEPARATOR}{{}}{CLOSE}"}}{CLOSE}'
    assert outcomes(f"{bad}{BARE}") == [("search", "invalid_json", None), ADDED]
    assert parse(f"{bad} Done.").content == "Done."
