"""Tool calls: order, three fates for three faults, what a bad one costs; rewards at the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from desk import Desk, answer, begun, calls

from agentrl.errors import UserError, WorldError
from agentrl.reward import Evidence
from agentrl.tools import tool
from agentrl.types import Message, ToolCall

# Tool calls


def test_calls_are_answered_in_order_and_every_id_once() -> None:
    env = begun()
    action = calls(("wait", {"seconds": 0.05}), ("echo", {"text": "é"}), ("double", {"n": 4}))
    observation, reward, terminated, truncated, info = env.step(action)
    assert observation == (
        Message("tool", "waited 0.05", tool_call_id="c0", name="wait"),
        Message("tool", "é", tool_call_id="c1", name="echo"),
        Message("tool", "8", tool_call_id="c2", name="double"),
    )
    assert (reward, terminated, truncated, info["stop_reason"]) == (0.0, False, False, "")
    assert env.messages[-4:] == (action, *observation)


def test_calls_of_one_message_run_at_the_same_time() -> None:
    desk = begun()
    desk.all_here = asyncio.Barrier(8)  # a call alone waits there until its deadline
    observation, *_ = desk.step(calls(*[("meet", {})] * 8))
    assert [message.content for message in observation] == ["met"] * 8


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("refuse", {}, "error: not today"),
        ("ecoh", {}, "error: no tool named 'ecoh'; did you mean 'echo'?; the tools are echo, wait,"),
        ("echo", {"txt": "hi"}, "error: wrong arguments for echo: the argument 'text' is missing"),
        ("wait", {"seconds": 60}, "error: wait took longer than 1 s"),
        ("flood", {}, "x" * 100 + "\n[cut: 900 of 1000 characters are not shown]"),
    ],
)
def test_the_models_fault_is_an_observation_and_the_episode_goes_on(
    name: str, given: dict[str, Any], text: str
) -> None:
    env = begun(tool_deadline_s=1.0, max_result_chars=100)
    (observation,), _, terminated, truncated, _ = env.step(calls((name, given)))
    assert observation.content.startswith(text)
    assert terminated is truncated is False
    assert env.step(answer("2"))[1] == 1.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (ToolCall(id="x", name="", arguments=None, status="invalid_json", note="line 1"), "error: line 1"),
        (ToolCall(id="x", name="", arguments=None, status="unclosed"), "error: the tool call was not closed"),
        (
            ToolCall(id="x", name="echo", arguments=None, status="not_object"),
            "error: the tool call does not give a tool's name and arguments",
        ),
        (ToolCall(id="x", name="echo", arguments={"text": 1}, status="schema_error"), "error: the arguments"),
        (
            ToolCall(id="x", name="zzz", arguments={}, status="unknown_tool"),
            "error: no tool named 'zzz'; the",
        ),
    ],
)
def test_a_bad_call_is_answered_with_why(call: ToolCall, text: str) -> None:
    (observation,), *_ = begun().step(Message("assistant", "", (call,)))
    assert observation.content.startswith(text)
    assert observation.tool_call_id == "x"


def test_the_conversation_keeps_the_status_that_a_call_has_here() -> None:
    env = begun()
    wanted = [("echo", {"text": "a"}), ("echo", {"text": 1}), ("ecoh", {})]
    observation, *_ = env.step(calls(*wanted))
    said = env.messages[-4].tool_calls
    assert [call.status for call in said] == ["ok", "schema_error", "unknown_tool"]
    assert [(call.name, call.arguments) for call in said] == wanted
    assert [f"error: {call.note}" for call in said[1:]] == [message.content for message in observation[1:]]


# What a bad call costs

GOOD = ("echo", {"text": "a"})
BAD = ("echo", {"text": 1})


def test_a_bad_call_may_end_the_episode_once_all_calls_are_answered() -> None:
    env = begun(bad_calls="end", reward=lambda evidence: len(evidence.messages))
    assert env.step(calls(GOOD))[2] is False
    observation, reward, terminated, truncated, info = env.step(calls(BAD, GOOD))
    assert (terminated, truncated, info["stop_reason"]) == (True, False, "bad_call")
    assert [message.content.partition(":")[0] for message in observation] == ["error", "a"]
    assert reward == len(env.messages) == 6


@pytest.mark.parametrize("policy", ["explain", "end"])
def test_each_bad_call_costs_the_penalty(policy: Any) -> None:
    env = begun(bad_calls=policy, bad_call_penalty=0.25)
    assert env.step(calls(GOOD))[1] == 0.0
    assert env.step(calls(BAD, GOOD, ("ecoh", {})))[1] == -0.5
    if policy == "explain":
        assert env.step(answer("2"))[1] == 1.0


def test_what_a_tool_refuses_is_no_bad_call() -> None:
    _, reward, terminated, *_ = begun(bad_calls="end", bad_call_penalty=1).step(calls(("refuse", {})))
    assert (reward, terminated) == (0.0, False)


def test_the_ending_of_a_tool_comes_before_that_of_a_bad_call() -> None:
    *_, info = begun(bad_calls="end").step(calls(BAD, ("submit", {})))
    assert info["stop_reason"] == "submitted"


def test_a_class_has_its_policy_and_an_instance_may_have_another() -> None:
    class Strict(Desk):
        bad_calls = "end"
        bad_call_penalty = 0.5

    assert (Strict().bad_calls, Strict().bad_call_penalty) == ("end", 0.5)
    assert (Strict(bad_calls="explain", bad_call_penalty=0).bad_call_penalty) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bad_calls": "ends"}, r"bad_calls='ends'\); did you mean 'end'\?: explain or end"),
        ({"bad_call_penalty": -0.1}, r"bad_call_penalty=-0.1\): it is subtracted"),
        ({"bad_call_penalty": float("nan")}, r"bad_call_penalty=nan\)"),
    ],
)
def test_a_policy_that_is_none_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Desk(**settings)


def test_the_worlds_fault_leaves_step_and_is_named() -> None:
    with pytest.raises(WorldError) as caught:
        begun().step(calls(("echo", {"text": "a"}), ("lose", {})))
    notes = " ".join(caught.value.__notes__)
    assert "tool 'lose'" in notes
    assert "environment Desk, task 'train-2'" in notes


def test_a_bug_in_a_tool_crashes_with_environment_and_task_named() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        begun().step(calls(("crash", {})))
    assert "environment Desk, task 'train-2'" in " ".join(caught.value.__notes__)


def test_a_failed_call_ends_the_other_calls_of_its_message() -> None:
    ended = []

    class Pair(Desk):
        @tool
        async def linger(self) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("linger")

    env = Pair()
    env.reset()
    with pytest.raises(WorldError):
        env.step(calls(("linger", {}), ("lose", {})))
    assert ended == ["linger"]


def test_a_tool_can_end_the_episode() -> None:
    observation, _, terminated, truncated, info = begun().step(calls(("submit", {})))
    assert observation == (Message("tool", "received", tool_call_id="c0", name="submit"),)
    assert (terminated, truncated, info["stop_reason"]) == (True, False, "submitted")


def test_a_subclass_can_remove_a_tool_but_not_lose_one_by_accident() -> None:
    class Quiet(Desk):
        echo = None  # type: ignore[assignment]

    assert "echo" not in [made.name for made in Quiet().tools]
    with pytest.raises(UserError, match="overrides a tool and is none"):

        class Forgetful(Desk):
            def echo(self, text: str) -> str:
                return text


# Rewards


@pytest.mark.parametrize("worthless", [float("nan"), float("inf"), None, "1"])
def test_a_reward_that_is_no_finite_number_is_a_bug(worthless: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        begun(reward=lambda evidence: worthless).step(answer("2"))


def test_the_worlds_fault_in_a_reward_leaves_step() -> None:
    def judge(evidence: Evidence) -> float:
        raise WorldError("no judge")

    with pytest.raises(WorldError) as caught:
        begun(reward=judge).step(answer("2"))
    assert "reward of environment Desk" in " ".join(caught.value.__notes__)


def test_a_reward_sees_the_environment_the_conversation_and_the_tokens() -> None:
    seen: list[Evidence] = []

    class Judged(Desk):
        def reward(self, evidence: Evidence) -> float:
            seen.append(evidence)
            return 0.25

    env = Judged()
    env.reset(options={"index": 2})
    env.completion_tokens += 17
    assert env.step(answer("2"))[1] == 0.25
    assert seen == [Evidence(env.task, env.messages, env, 17)]


def test_a_named_reward_is_made_once() -> None:
    class Named(Desk):
        reward = "exact"

    assert Named()._reward is Named()._reward


def test_without_a_reward_there_is_no_environment() -> None:
    class Unpaid(Desk):
        reward = ""

    with pytest.raises(UserError, match="has no reward: set reward ="):
        Unpaid()


@pytest.mark.parametrize("setting", ["max_turns", "tool_deadline_s", "max_result_chars"])
def test_limits_are_above_zero(setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting}=0"):
        Desk(**{setting: 0})


@pytest.mark.parametrize("name", ["close", "end", "render", "find_task", "timings", "reward", "spec"])
def test_a_tool_may_not_take_the_place_of_an_environments_own(name: str) -> None:
    @tool
    def taken(self: Any) -> str:
        return "taken"

    with pytest.raises(UserError, match=f"Taking: '{name}' is ToolEnv's own: name the tool otherwise"):
        type("Taking", (Desk,), {name: taken})
