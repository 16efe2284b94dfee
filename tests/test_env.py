"""The contract: tasks, starts, ends, tool calls, three faults, budgets from outside, Gymnasium's checker."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from agentrl.env import Env, Step
from agentrl.errors import BadData, ToolError, UserError, WorldError
from agentrl.reward import Evidence
from agentrl.tool_env import ToolEnv
from agentrl.tools import tool
from agentrl.types import Message, Score, Task, ToolCall


def task(split: str, index: int) -> Task:
    return Task(
        id=f"{split}-{index}",
        prompt=(Message("user", f"Say {split} {index}."),),
        truth={"answer": str(index)},
    )


def right(evidence: Evidence) -> Score:
    value = float(evidence.answer == evidence.task.truth["answer"])
    return Score(value, {"right": value}, "compared")


class Desk(ToolEnv):
    """Tools of every kind; the right answer is the task's index."""

    reward = right
    all_here: asyncio.Barrier  # where the tool `meet` waits for the others

    def setup(self, task: Task) -> None:
        self.log: list[str] = []

    def tasks(self, split: str) -> Sequence[Task]:
        return [task(split, index) for index in range(5)]

    def gold(self, task: Task) -> Sequence[Message]:
        return (calls(("echo", {"text": "hi"})), Message("assistant", task.truth["answer"]))

    @tool
    def echo(self, text: str) -> str:
        """Say it again."""
        self.log.append(text)
        return text

    @tool
    async def wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return f"waited {seconds}"

    @tool
    async def meet(self) -> str:
        await self.all_here.wait()
        return "met"

    @tool
    def refuse(self) -> str:
        raise ToolError("not today")

    @tool
    def lose(self) -> str:
        raise WorldError("the sandbox is gone")

    @tool
    def crash(self) -> str:
        raise ZeroDivisionError("a bug")

    @tool
    def flood(self) -> str:
        return "x" * 1000

    @tool
    def submit(self) -> str:
        self.end("submitted")
        return "received"

    @staticmethod
    @tool
    def double(n: int) -> int:
        return 2 * n


class Echo(Env):
    """The smallest environment without tools: says everything once more, three times."""

    splits = ("all",)

    def tasks(self, split: str) -> Iterator[Task]:
        return (task(split, index) for index in itertools.count())

    def gold(self, task: Task) -> Sequence[Message]:
        return (Message("assistant", "a"),) * 3

    def setup(self, task: Task) -> None:
        self.left = 3

    def step(self, action: Message) -> Step:
        self.accept(action)
        self.left -= 1
        reply = Message("user", action.content)
        return self.transition(reply, score=0.5, stop_reason="" if self.left else "solved")


def calls(*wanted: tuple[str, dict[str, Any]]) -> Message:
    made = [
        ToolCall(id=f"c{index}", name=name, arguments=given) for index, (name, given) in enumerate(wanted)
    ]
    return Message("assistant", "", tuple(made))


def answer(text: str) -> Message:
    return Message("assistant", text)


def begun(**settings: Any) -> Desk:
    env = Desk(**settings)
    env.reset(seed=1, options={"split": "train", "index": 2})
    return env


# Gymnasium


class Safe(Desk):
    """Without the tools that fail on purpose: random actions would call them."""

    lose = None  # type: ignore[assignment]
    crash = None  # type: ignore[assignment]
    wait = None  # type: ignore[assignment]
    meet = None  # type: ignore[assignment]


@pytest.mark.parametrize("env", [Safe(), Safe(max_turns=1), Echo()], ids=["tools", "single turn", "plain"])
def test_gymnasiums_checker_passes(env: Env) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not having a spec.*")  # made without gymnasium.make
        check_env(env)


def test_it_is_a_gymnasium_environment_with_its_five_values() -> None:
    env = begun()
    assert isinstance(env, gymnasium.Env)
    observation, reward, terminated, truncated, info = env.step(answer("2"))
    assert (observation, reward, terminated, truncated) == ((), 1.0, True, False)
    assert info == {
        "stop_reason": "answered",
        "is_valid": True,
        "reward_parts": {"right": 1.0},
        "reward_note": "compared",
    }


def test_a_copied_episode_goes_on_by_itself() -> None:
    env = begun()
    env.step(calls(("echo", {"text": "one"})))
    other = copy.deepcopy(env)
    other.step(calls(("echo", {"text": "two"})))
    assert (env.log, other.log) == (["one"], ["one", "two"])
    assert len(other.messages) == len(env.messages) + 2


# Tasks and starts


def test_options_choose_the_task_and_its_prompt_is_the_first_observation() -> None:
    env = Desk()
    opening, info = env.reset(options={"split": "test", "index": 3})
    assert opening == (Message("user", "Say test 3."),) == env.messages
    assert info == {"task_id": "test-3"}
    assert env.reset(options={"task_id": "train-4"})[1] == {"task_id": "train-4"}


def test_without_an_index_the_seed_draws_from_the_split() -> None:
    drawn = [Desk().reset(seed=seed)[1]["task_id"] for seed in range(40)]
    assert drawn == [Desk().reset(seed=seed)[1]["task_id"] for seed in range(40)]
    assert set(drawn) == {f"train-{index}" for index in range(5)}
    assert Desk().reset(seed=1, options={"split": "test"})[1]["task_id"].startswith("test-")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"spilt": "train"}, UserError, "no option 'spilt'; did you mean 'split'"),
        ({"split": "trian"}, BadData, "no split 'trian'; did you mean 'train'.*it has train, test"),
        ({"split": "train", "index": 5}, UserError, "no task 5: an index lies in 0 to 4"),
        ({"index": -1}, UserError, "no task -1"),
        ({"index": "2"}, UserError, "index='2' is no integer"),
        ({"task_id": "train-9"}, UserError, "no task with the id 'train-9'"),
        ({"task_id": "train-1", "index": 1}, UserError, "stands alone"),
    ],
)
def test_options_that_point_nowhere_are_refused(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Desk().reset(options=options)


def test_a_stream_of_unknown_size_is_read_as_far_as_needed() -> None:
    env = Echo()
    assert env.reset(options={"index": 7})[1] == {"task_id": "all-7"}
    assert env.reset(seed=3)[1] == Echo().reset(seed=3)[1]


def test_equal_settings_share_their_task_list_and_others_do_not() -> None:
    made = []

    class Costly(Desk):
        def __init__(self, *, levels: Sequence[int] = (1,), **settings: Any) -> None:
            super().__init__(**settings)

        def tasks(self, split: str) -> Sequence[Task]:
            made.append(split)
            return super().tasks(split)

    for settings in ({}, {}, {"levels": [1, 2]}, {"levels": [1, 2]}, {"levels": [2]}):
        Costly(**settings).reset()
    assert made == ["train"] * 3


def test_an_empty_split_is_refused() -> None:
    class Empty(Desk):
        def tasks(self, split: str) -> Sequence[Task]:
            return []

    with pytest.raises(BadData, match="has no tasks"):
        Empty().reset()


def test_a_system_text_comes_before_the_prompt() -> None:
    opening, _ = Desk(system="Be brief.").reset(options={"index": 0})
    assert opening == (Message("system", "Be brief."), Message("user", "Say train 0."))


def test_two_system_texts_are_refused() -> None:
    class Own(Desk):
        def tasks(self, split: str) -> Sequence[Task]:
            return [Task(id="own", prompt=(Message("system", "Mine."),))]

    with pytest.raises(UserError, match="brings its own"):
        Own(system="Ours.").reset()


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
        ("wait", {"seconds": 60}, "error: wait took longer than 0.2 s"),
        ("flood", {}, "x" * 100 + "\n[cut: 900 of 1000 characters are not shown]"),
    ],
)
def test_the_models_fault_is_an_observation_and_the_episode_goes_on(
    name: str, given: dict[str, Any], text: str
) -> None:
    env = begun(tool_deadline_s=0.2, max_result_chars=100)
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


# Ends


def test_the_turn_limit_truncates_and_scores_what_stands() -> None:
    env = begun(max_turns=2, reward=lambda evidence: len(evidence.messages))
    env.step(calls(("echo", {"text": "a"})))
    observation, reward, terminated, truncated, info = env.step(calls(("echo", {"text": "b"})))
    assert (terminated, truncated, info["stop_reason"]) == (False, True, "max_turns")
    assert reward == 5.0
    assert [message.content for message in observation] == ["b"]


def test_a_single_turn_environment_terminates() -> None:
    _, _, terminated, truncated, info = begun(max_turns=1).step(calls(("echo", {"text": "a"})))
    assert (terminated, truncated, info["stop_reason"]) == (True, False, "max_turns")


def test_an_outside_budget_truncates_and_scores_what_stands() -> None:
    env = begun()
    observation, reward, terminated, truncated, info = asyncio.run(env.atruncate("length", answer("2")))
    assert (observation, reward, terminated, truncated) == ((), 1.0, False, True)
    assert info["stop_reason"] == "length"
    assert env.messages[-1] == answer("2")
    assert begun().truncate("context")[1] == 0.0


def test_calls_of_a_truncated_message_are_not_run() -> None:
    env = begun()
    env.truncate("length", calls(("echo", {"text": "a"})))
    assert env.log == []


@pytest.mark.parametrize("act", [lambda env: env.step(answer("2")), lambda env: env.truncate("length")])
def test_after_the_end_and_before_the_start_acting_is_refused(act: Any) -> None:
    over = begun()
    over.step(answer("2"))
    for env in (over, Desk()):
        with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
            act(env)


@pytest.mark.parametrize("action", ["text", Message("user", "hi"), None])
def test_an_action_is_an_assistant_message(action: Any) -> None:
    with pytest.raises(UserError, match="TextAction"):
        begun().step(action)


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


# Asynchronous stepping, time, threads


def test_many_episodes_interleave_without_touching_each_other() -> None:
    all_here = asyncio.Barrier(50)

    async def episode(index: int) -> tuple[float, list[str]]:
        env = Desk()
        env.all_here = all_here
        env.reset(options={"index": index % 5})
        await env.astep(calls(("echo", {"text": str(index)}), ("meet", {})))
        step = await env.astep(answer(str(index % 5)))
        return step[1], env.log

    async def together() -> list[tuple[float, list[str]]]:
        return await asyncio.gather(*(episode(index) for index in range(50)))

    assert asyncio.run(together()) == [(1.0, [str(index)]) for index in range(50)]


def test_step_works_under_a_running_event_loop() -> None:
    async def notebook() -> float:
        return begun().step(answer("2"))[1]

    assert asyncio.run(notebook()) == 1.0


def test_an_environment_with_a_plain_step_is_awaited_in_a_thread() -> None:
    names = []

    class Named(Echo):
        def step(self, action: Message) -> Step:
            names.append(threading.current_thread().name)
            return super().step(action)

    env = Named()
    env.reset()
    step = asyncio.run(env.astep(answer("hi")))
    assert step[0] == (Message("user", "hi"),)
    assert names == ["agentrl-call"]
    assert set(env.timings) == {"step"}


def test_durations_are_in_timings_and_not_in_info() -> None:
    env = begun()
    *_, info = env.step(calls(("wait", {"seconds": 0.05})))
    assert env.timings["tools"] >= 0.05
    *_, last = env.step(answer("2"))
    assert set(env.timings) == {"tools", "reward"}
    assert not {"seconds", "time"} & {*info, *last}
    env.reset()
    assert env.timings == {}
    assert env.completion_tokens == 0


def test_overriding_step_of_a_tool_environment_is_refused() -> None:
    with pytest.raises(UserError, match="override astep"):

        class Wrong(Desk):
            def step(self, action: Message) -> Step:
                return super().step(action)


def test_a_truncation_needs_a_reason() -> None:
    env = Echo()
    env.reset()
    with pytest.raises(ValueError, match="stop_reason"):
        env.transition(truncated=True)


def test_a_budget_costs_a_plain_environment_nothing_more() -> None:
    env = Echo()
    env.reset()
    env.step(answer("a"))
    assert env.truncate("tokens")[1] == 0.0


# Rendering


def test_html_escapes_what_a_policy_writes() -> None:
    env = Desk(render_mode="html")
    env.reset(options={"index": 0})
    env.step(Message("assistant", "<script>alert(1)</script>", (ToolCall(id="1", name="<b>", arguments={}),)))
    page = env.render()
    assert page is not None
    assert "<script" not in page
    assert "<b>(" not in page
    assert "&lt;script&gt;" in page


def test_each_render_mode_shows_the_conversation() -> None:
    for mode in ("ansi", "json", "html"):
        env = Desk(render_mode=mode)
        env.reset(options={"index": 0})
        assert "Say train 0." in str(env.render())
    assert begun().render() is None


def test_an_unknown_render_mode_is_refused() -> None:
    with pytest.raises(UserError, match="ansi, html or json"):
        Desk(render_mode="rgb_array")
