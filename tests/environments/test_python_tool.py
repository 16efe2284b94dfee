"""python_tool: questions, cells in one interpreter an episode, budgets of a message, whose fault is what."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.vector import SyncVectorEnv

import agentrl
from agentrl.errors import BadConfig, UserError
from agentrl.sandbox import SandboxLost
from agentrl.types import Message, ToolCall

# What the process backend does not enforce; it is for trusted code, as here.
TRUSTED = {"cpu_s": None, "memory_mib": None, "pids": None, "disk_mib": None, "network": True}
SETTINGS: dict[str, Any] = {"sandbox": "process", "limits": TRUSTED}


@pytest.fixture
def env() -> Iterator[Any]:
    made = agentrl.make("python_tool", **SETTINGS)
    yield made
    made.close()


def cells(*codes: str) -> Message:
    calls = (
        ToolCall(id=f"call_{n}", name="python", arguments={"code": code}) for n, code in enumerate(codes)
    )
    return Message("assistant", "", tuple(calls))


def shown(env: Any, *codes: str) -> list[str]:
    observation, *_ = env.step(cells(*codes))
    return [message.content for message in observation]


def test_gold_computes_the_answer_with_a_program(env: Any) -> None:
    for index in range(5):  # one of each kind
        env.reset(options={"split": "test", "index": index})
        program, answer = env.gold(env.task)
        (result,), *_ = env.step(program)
        assert result.content.strip() == env.task.truth["answer"]
        assert env.step(answer)[1:3] == (1.0, True)


def test_variables_stay_within_an_episode_and_no_longer(env: Any) -> None:
    env.reset(seed=0)
    assert shown(env, "x = 3", "x + 1") == ["", "4\n"]
    assert shown(env, "x") == ["3\n"]
    env.reset(seed=0)
    assert "NameError" in shown(env, "x")[0]


def test_calls_of_a_message_run_in_their_order(env: Any) -> None:
    env.reset(seed=0)
    assert shown(env, "x = []", *(f"x.append({n})" for n in range(6)), "x")[-1] == "[0, 1, 2, 3, 4, 5]\n"


def test_the_calls_of_a_message_share_their_seconds() -> None:
    env = agentrl.make("python_tool", **SETTINGS, seconds=1.0)
    env.reset(seed=0)
    late, refused = shown(env, "while True: pass", "1")
    assert late.startswith("error: the cell took longer than 1 s: all variables and files are lost")
    assert refused.startswith("error: not run: the calls of one message")
    assert shown(env, "1") == ["1\n"]
    assert len([text for text in shown(env, *["1"] * 20) if text == "1\n"]) == 16
    env.close()


def test_an_interpreter_ends_with_its_episode(env: Any) -> None:
    for end in (lambda: env.step(Message("assistant", "?")), lambda: env.truncate("length"), env.close):
        env.reset(seed=0)
        shown(env, "x = 1")
        end()
        assert not [thread for thread in threading.enumerate() if thread.name == "agentrl-interpreter"]


def test_a_sandbox_that_goes_away_is_the_worlds_fault(env: Any) -> None:
    env.reset(seed=0)
    shown(env, "x = 1")
    timer = threading.Timer(0.5, lambda: env._interpreter._sandbox.close())
    timer.start()
    with pytest.raises(SandboxLost) as raised:
        env.step(cells("import time; time.sleep(9)"))
    timer.join()
    assert raised.value.boundary == "sandbox"


def test_questions_are_the_same_everywhere_and_splits_are_disjoint() -> None:
    one, other = (agentrl.make("python_tool", **SETTINGS, train_tasks=400) for _ in range(2))
    texts = {split: [task.prompt[0].content for task in one.task_list(split)] for split in one.splits}
    assert texts["train"] == [task.prompt[0].content for task in other.task_list("train")]
    assert not {*texts["train"]} & {*texts["test"]}
    assert one.find_task("test-3").id == "test-3"
    with pytest.raises(UserError, match="has no task 'train-400'"):
        one.find_task("train-400")


def test_a_data_set_of_questions_is_read_as_math_reads_it(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}))
    env = agentrl.make("python_tool", **SETTINGS, dataset=str(tmp_path))
    env.reset(options={"task_id": "train-0"})
    assert env.step(*env.gold(env.task))[1] == 1.0
    with pytest.raises(BadConfig, match=r"limit=\.\.\.\) has no effect without a dataset"):
        agentrl.make("python_tool", limit=3)


def test_limits_are_named(env: Any) -> None:
    with pytest.raises(BadConfig, match="'cpus'; did you mean 'cpu_s'"):
        agentrl.make("python_tool", limits={"cpus": 3})


def test_a_wall_clock_is_refused_since_it_would_run_while_the_model_writes() -> None:
    with pytest.raises(BadConfig, match=r"'wall_s': 2.*None.*set seconds"):
        agentrl.make("python_tool", **SETTINGS | {"limits": {**TRUSTED, "wall_s": 2}})
    agentrl.make("python_tool", **SETTINGS | {"limits": {**TRUSTED, "wall_s": None}}).close()


def test_an_interpreter_that_ends_between_messages_says_what_is_lost(env: Any) -> None:
    env.reset(seed=0)
    shown(env, "import threading, os; x = 5; threading.Timer(0.2, os._exit, [0]).start()")
    assert env._interpreter._run.ended.wait(30)
    (text,) = shown(env, "x")
    assert text.startswith("before this cell the interpreter was ended: all variables are lost\n")
    assert "NameError" in text


@pytest.mark.slow
def test_it_passes_the_shared_checks() -> None:
    report = agentrl.check("python_tool", episodes=2, endurance=20, **SETTINGS)
    assert report.ok, str(report)


def test_gymnasium_makes_it_and_vectors_of_it() -> None:
    assert gymnasium.make("agentrl/PythonTool-v0", **SETTINGS).reset(seed=1)[1]["task_id"]
    envs = SyncVectorEnv([lambda: agentrl.make("python_tool", **SETTINGS)] * 2)
    envs.reset(seed=[1, 1])
    observations, *_ = envs.step((cells("2 + 2"), cells("3 + 3")))
    assert [observation[0].content for observation in observations] == ["4\n", "6\n"]
    envs.close()
