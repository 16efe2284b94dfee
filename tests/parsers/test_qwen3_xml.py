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
        (GOOD.removesuffix("\n</tool_call>"), "unclosed", "ends with </function> and </tool_call>"),
        (GOOD.removesuffix("</tool_call>") + "So", "unclosed", "the end of the call must follow its </par"),
        (call_of(("i", "one"), ("s", "a </tool_call> b")), "invalid_json", "'i' is no valid JSON"),
        (
            "<tool_call>\n<function=search></function> so\n</tool_call>",
            "invalid_json",
            "after its parameters",
        ),
        ("\n<function=add>{1}</function>", "invalid_json", "after its parameters"),
        ("\n<function=add>\n<parameter=i>\n1\n</tool_call>", "unclosed", "'i' does not end"),
        ("\n<function=add>", "unclosed", "after its parameters"),
    ],
)
def test_a_bad_call_between_good_ones_spoils_neither(bad: str, status: str, note: str) -> None:
    calls = parse(f"{GOOD} {bad}\n{GOOD}").calls
    assert [call.status for call in calls] == ["ok", status, "ok"]
    assert note in calls[1].note
    assert calls[1].raw.strip() == bad.strip()


def test_an_unclosed_parameter_is_never_an_empty_call() -> None:
    (call,) = parse("<tool_call>\n<function=add>\n<parameter=s>\nabc").calls
    assert (call.name, call.status, call.arguments) == ("add", "unclosed", None)


BARE = GOOD.removeprefix("<tool_call>\n")
ADDED = ("add", "ok", {"i": 1})


@pytest.mark.parametrize("call", [BARE, BARE.removesuffix("\n</tool_call>")])
@pytest.mark.parametrize("before", ["", "Well.\n", "Well. ", "<think>x</think>", f"{GOOD}\n", f"{GOOD} "])
def test_a_call_without_its_opening_tag_is_read(call: str, before: str) -> None:
    parsed = parse(f"{before}{call}\nThen.\n{GOOD} Done.")
    assert {(one.name, one.status) for one in parsed.calls} == {("add", "ok")}
    assert [one.raw for one in parsed.calls][-2:] == [call, GOOD]
    assert parsed.content.endswith("Then.\nDone.")
    assert outcomes(f"{before}{call}\n{call}")[-2:] == [ADDED, ADDED]


def test_a_call_without_its_opening_tag_may_name_no_tool_at_the_start_of_a_line() -> None:
    assert outcomes("So:\n<function=ad>\n</function>") == [("ad", "unknown_tool", {})]
    assert outcomes("So:\n<function=ad") == [("ad", "unclosed", None)]


@pytest.mark.parametrize(
    "text",
    ["a <function=f> of x", "write <function=add> in your answer, then stop.", "<function", "x <function="],
)
def test_a_function_in_prose_is_content(text: str) -> None:
    assert parse(text) == Parsed(text)


def test_a_value_without_its_opening_tag_holds_no_tags_of_calls() -> None:
    text = "<function=add>\n<parameter=s>\nabc </tool_call> def\n</parameter>\n</function>"
    assert outcomes(text) == [("add", "unclosed", None)]
    assert outcomes(f"<function=add>\n<parameter=s>\nabc\n{GOOD}") == [("add", "unclosed", None), ADDED]


def test_several_functions_in_one_pair_of_tags_are_as_many_calls() -> None:
    first, second = call_of(("s", "<function=x>")), call_of(("i", "2"), name="search")
    text = first.removesuffix("\n</tool_call>") + "\n" + second.removeprefix("<tool_call>\n")
    assert outcomes(f"Well.\n{text}\n{GOOD}") == [
        ("add", "ok", {"s": "<function=x>"}),
        ("search", "ok", {"i": 2}),
        ADDED,
    ]
    assert "\n".join(call.raw for call in parse(text).calls) == text
    cut = text.removesuffix("\n</tool_call>")
    assert outcomes(cut) == [("add", "ok", {"s": "<function=x>"}), ("search", "unclosed", None)]


def test_a_bad_function_between_good_ones_of_one_pair_of_tags_spoils_neither() -> None:
    good = "<function=add>\n<parameter=i>\n1\n</parameter>\n</function>\n"
    text = f"<tool_call>\n{good}<function=search>\nx\n{good}</tool_call>"
    assert outcomes(text) == [ADDED, ("search", "unclosed", None), ADDED]


@pytest.mark.parametrize(
    ("mention", "call"),
    [
        ("<tool_call><function=add> here", GOOD),
        ("<tool_call><function=add><parameter=i> so", GOOD),
        *(
            (mention, call)
            for mention in (
                "<tool_call>",
                "<function=add>",
                "\n<function=add>\n<parameter=i>\n1",
                f"{GOOD}, {BARE}, <tool_call>",
            )
            for call in (GOOD, BARE)
        ),
    ],
)
def test_what_a_thought_mentions_is_no_call(mention: str, call: str) -> None:
    text = f"I'd write {mention}.</think>\n\n"
    assert outcomes(text + call) == [ADDED]
    assert parse(text + call).content == text.rstrip()


def test_a_value_that_is_cut_behind_a_closing_tag_makes_no_call() -> None:
    said = call_of(("s", "</tool_call>\n<function=search></function>\n</tool_call>\n"))
    for stop in range(1, len(said)):
        assert "ok" not in [call[1] for call in outcomes(said[:stop])]
