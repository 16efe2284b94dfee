"""The contract: tasks, starts, ends, budgets from outside, Gymnasium's checker."""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import pytest
from desk import Desk, Echo, answer, begun, calls
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from agentrl.checks import check_environment
from agentrl.env import Env, Step
from agentrl.errors import BadData, UserError
from agentrl.types import Message, Task, ToolCall

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
    env.step(replace(calls(("echo", {"text": "a"})), content="2"))
    observation, reward, terminated, truncated, info = asyncio.run(env.atruncate("context"))
    assert (observation, reward, terminated, truncated) == ((), 1.0, False, True)
    assert info["stop_reason"] == "context"
    assert begun().truncate("context")[1] == 0.0


def test_an_answer_that_was_cut_off_is_kept_and_is_no_answer() -> None:
    env = begun()
    _, reward, _, truncated, info = env.truncate("length", answer("2"))
    assert (reward, truncated, info["stop_reason"]) == (0.0, True, "length")
    assert env.messages[-1] == answer("2")
    env.reset(seed=0, options={"split": "train", "index": 2})
    assert env.step(answer("2"))[1] == 1.0


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


# An author's slips


def test_tasks_that_are_none_or_fail_are_named_with_class_and_split() -> None:
    class Forgets(Echo):
        def tasks(self, split: str) -> Any:
            [Task(id="a", prompt=())]

    with pytest.raises(UserError, match=r"tasks\('all'\) of .*Forgets returned None: return a list of Task"):
        Forgets().task_list("all")

    class Fails(Echo):
        def tasks(self, split: str) -> Any:
            return [Task(id={}[split], prompt=())]

    class FailsLater(Echo):
        def tasks(self, split: str) -> Any:
            yield Task(id={}[split], prompt=())

    for fails in (Fails, FailsLater):
        with pytest.raises(KeyError) as raised:
            fails().reset()
        (note,) = raised.value.__notes__
        assert note.startswith("in tasks('all') of environment ")
        assert note.endswith(f".{fails.__name__}")


def test_an_init_that_leaves_ours_out_is_named() -> None:
    class Hasty(Desk):
        def __init__(self) -> None:
            self.words = 0

    message = r"Hasty.__init__ must call super\(\).__init__\(\)"
    with pytest.raises(UserError, match=message):
        Hasty().reset()
    with pytest.raises(UserError, match=message):
        check_environment(Hasty)


def test_splits_that_are_one_text_are_refused() -> None:
    with pytest.raises(UserError, match=r"Single: splits is a tuple of names; write splits = \('train',\)"):
        type("Single", (Echo,), {"splits": "train"})
