"""Calculator: reproducible, exact, disjoint splits, solvable by gold, cheap at any index."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

import agentrl
from agentrl.errors import UserError
from agentrl.types import Message, Task, ToolCall

_ROOT = Path(__file__).parent.parent.parent


def calculator(**settings: Any) -> Any:
    return agentrl.make("calculator", **settings)


def tasks(count: int, split: str = "train", **settings: Any) -> list[Task]:
    return list(calculator(**settings).task_list(split)[:count])


def text(task: Task) -> str:
    return task.prompt[-1].content


@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_needs_as_many_calls_as_the_level_and_is_right(split: str) -> None:
    env = calculator()
    for index in range(40):
        env.reset(options={"split": split, "index": index})
        *calls, last = env.gold(env.task)
        assert len(calls) == env.task.meta["level"] == index % 4 + 1
        for call, following in zip(calls, calls[1:], strict=False):
            (result,), *_ = env.step(call)
            assert int(result.content) == following.tool_calls[0].arguments["a"]
        (result,), *_ = env.step(calls[-1])
        assert result.content == env.task.truth["answer"]
        assert env.step(last)[1:4] == (1.0, True, False)


def test_expressions_say_what_the_truth_computes() -> None:
    for task in tasks(60, levels=[1, 2, 3]):
        found = re.search(r"[0-9(][0-9()+*\- ]*", text(task))
        assert found is not None
        assert str(eval(found.group())) == task.truth["answer"]  # digits, brackets and operators alone


def test_stories_name_every_number_in_order() -> None:
    for task in tasks(60, levels=[4]):
        numbers = [int(number) for number in re.findall(r"\d+", text(task))]
        assert numbers == [task.truth["start"], *(operand for _, operand in task.truth["steps"])]


def test_every_result_on_the_way_is_between_0_and_a_million() -> None:
    env = calculator(max_operand=999)
    for task in env.task_list("train")[:400]:
        value = task.truth["start"]
        for call in env.gold(task)[:-1]:
            arguments = call.tool_calls[0].arguments
            assert arguments["a"] == value
            assert 1 <= arguments["b"] <= 999
            value = eval(f"{value}{arguments['op']}{arguments['b']}")
            assert 0 <= value <= 1_000_000


def test_no_operand_is_smaller_than_it_may_be_and_every_length_is_drawn_as_often() -> None:
    given = [
        (task.truth["start"], task.truth["steps"][0][1]) for task in tasks(400, levels=[1], min_operand=100)
    ]
    assert min(min(pair) for pair in given) >= 100
    lengths = [len(str(task.truth["start"])) for task in tasks(600, levels=[1])]
    assert all(150 < lengths.count(length) < 250 for length in (1, 2, 3))


def test_tasks_are_the_same_in_every_process() -> None:
    made = "agentrl.make('calculator').task_list('test')[:8]"
    code = f"import agentrl; print([task.prompt[0].content for task in {made}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == str([text(task) for task in tasks(8, "test")]), done.stderr


def test_another_seed_gives_other_tasks() -> None:
    assert not {*map(text, tasks(50, seed=0))} & {*map(text, tasks(50, seed=1))}


def test_no_problem_lies_in_both_splits_however_it_is_worded() -> None:
    small = {"levels": [1], "max_operand": 20}  # few enough problems that they would meet
    seen = {split: {str(task.truth) for task in tasks(1500, split, **small)} for split in ("train", "test")}
    assert min(map(len, seen.values())) > 50
    assert not seen["train"] & seen["test"]


def test_any_task_of_a_billion_is_made_without_those_before_it() -> None:
    env = calculator(train_tasks=10**9)  # a list of them would need hours, and more memory than there is
    env.reset(options={"index": 10**9 - 1})
    env.reset(options={"task_id": "train-999999999"})
    assert env.task.id == "train-999999999"


def test_splits_have_their_sizes() -> None:
    env = calculator(train_tasks=5, test_tasks=3)
    assert [len(env.task_list(split)) for split in env.splits] == [5, 3]
    assert env.task_list("test")[-1].id == "test-2"
    with pytest.raises(IndexError):
        env.task_list("test")[3]
    for task_id in ("test-3", "test-x", "eval-0"):
        with pytest.raises(UserError, match="has no task"):
            env.find_task(task_id)


def test_a_right_answer_without_the_tool_is_right_and_a_bare_number_is_not() -> None:
    env = calculator()
    for reply, reward in ((r"It is \boxed{%s}.", 1.0), ("It is %s.", 0.0)):
        env.reset(options={"index": 0})
        assert env.step(Message("assistant", reply % env.task.truth["answer"]))[1] == reward


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"a": 2, "op": "+", "b": -5}, "-3"),
        ({"a": 2, "op": "/", "b": 1}, "error: wrong arguments for calculate: op: Input should be"),
        (
            {"a": "2", "op": "+", "b": 1},
            "error: wrong arguments for calculate: a: Input should be a valid integer",
        ),
        ({"a": 10**16, "op": "*", "b": 1}, "error: the operands must not exceed"),
    ],
)
def test_the_tool_does_one_operation_on_integers(arguments: dict[str, Any], text: str) -> None:
    env = calculator()
    env.reset(seed=0)
    call = ToolCall(id="x", name="calculate", arguments=arguments)
    (result,), *_ = env.step(Message("assistant", "", (call,)))
    assert result.content.startswith(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"levels": []},
        {"levels": [5]},
        {"max_operand": 8},
        {"max_operand": 10**6},
        {"min_operand": 500},
        {"test_tasks": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        calculator(**settings)


def test_it_passes_the_shared_checks() -> None:
    report = agentrl.check("calculator")
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["agentrl/Calculator-v0", "agentrl:agentrl/Calculator-v0"])
def test_gymnasium_makes_it_and_its_checker_passes_without_a_warning(name: str) -> None:
    env = gymnasium.make(name, levels=[2])
    check_env(env.unwrapped)
    assert env.reset(seed=1)[1]["task_id"].startswith("train-")


@pytest.mark.parametrize(
    "vector",
    [SyncVectorEnv, lambda make: AsyncVectorEnv(make, shared_memory=False, context="spawn")],
    ids=["sync", "async"],
)
def test_it_works_in_vector_environments(vector: Any) -> None:
    envs = vector([_make_one, _make_one])
    try:
        observations, _ = envs.reset(seed=[1, 1])
        assert observations[0] == observations[1]
        envs.action_space.seed(0)
        for _ in range(5):
            observations, rewards, *_ = envs.step(envs.action_space.sample())
        assert rewards.shape == (2,)
        assert all(observation in envs.single_observation_space for observation in observations)
    finally:
        envs.close()


def _make_one() -> Any:
    import agentrl

    return agentrl.make("calculator")


def test_make_vec_works() -> None:
    envs = gymnasium.make_vec("agentrl/Calculator-v0", num_envs=2, vectorization_mode="sync")
    observations, infos = envs.reset(seed=4)
    assert len(observations) == len(infos["task_id"]) == 2
    *_, terminated, _, infos = envs.step((Message("assistant", "?"),) * 2)
    assert terminated.all()
    assert list(infos["stop_reason"]) == ["answered"] * 2
