import pickle
from collections.abc import Sequence

import pytest

import agentrl
from agentrl.reward import Evidence
from agentrl.types import Message, Score, Task, ToolCall

GOOD = ToolCall(id="a", name="add", arguments={})
BAD = ToolCall(id="b", name="add", arguments=None, raw="{", status="unclosed")
FINAL = Message("assistant", r"\boxed{3}")


def score(messages: Sequence[Message], **options: bool) -> Score:
    reward = pickle.loads(pickle.dumps(agentrl.make_reward("format", **options)))
    result: Score = reward(Evidence(Task(id="t", prompt=()), tuple(messages)))
    return result


def called(call: ToolCall) -> tuple[Message, Message]:
    return Message("assistant", "", (call,)), Message("tool", "3", tool_call_id=call.id)


def test_a_conversation_that_keeps_every_rule_scores_one() -> None:
    assert score([Message("user", "?"), *called(GOOD), FINAL]) == Score(
        1.0, {"calls": 1.0, "answer": 1.0, "box": 1.0}
    )


@pytest.mark.parametrize(
    ("messages", "broken"),
    [
        ([*called(BAD), FINAL], {"calls"}),
        ([*called(GOOD)], {"answer", "box"}),
        ([Message("assistant", r"\boxed{3}", (GOOD,))], {"answer", "box"}),
        ([Message("assistant", "  ")], {"answer", "box"}),
        ([Message("assistant", r"<think>\boxed{3}</think>")], {"answer", "box"}),
        ([Message("assistant", "3")], {"box"}),
        ([Message("assistant", r"\boxed{3} \boxed{3}")], {"box"}),
        ([], {"answer", "box"}),
    ],
)
def test_a_broken_rule_makes_it_zero_and_is_named(messages: list[Message], broken: set[str]) -> None:
    result = score(messages)
    assert result.value == 0.0
    assert {rule for rule, held in result.parts.items() if not held} == broken
    assert result.note


def test_a_message_that_was_cut_off_is_no_answer() -> None:
    evidence = Evidence(Task(id="t", prompt=()), (FINAL,), is_cut=True)
    assert agentrl.make_reward("format")(evidence).parts == {"calls": 1.0, "answer": 0.0, "box": 0.0}


def test_without_boxes_any_text_is_an_answer() -> None:
    assert score([Message("assistant", "Paris")], boxed=False) == Score(1.0, {"calls": 1.0, "answer": 1.0})
