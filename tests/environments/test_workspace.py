"""workspace: repairs judged by hidden tests, tools in one sandbox an episode, what is copied out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import trusting

import agentrl
from agentrl.attacks import cheating
from agentrl.errors import BadData
from agentrl.probes import Subject, Unsound
from agentrl.sandbox import SandboxLost
from agentrl.types import Message, ToolCall

FAKE = {"sandbox": "trusting:Trusting"}  # plain processes: everything that runs here is our own
DONE = Message("assistant", "Done.")


@pytest.fixture
def env() -> Iterator[Any]:
    made = agentrl.make("workspace", **FAKE)
    made.reset(options={"task_id": "shared-default"})
    yield made
    made.close()


def call(name: str, **arguments: Any) -> Message:
    return Message("assistant", "", (ToolCall(id="call_0", name=name, arguments=arguments),))


def told(env: Any, name: str, **arguments: Any) -> str:
    (message,), *_ = env.step(call(name, **arguments))
    return str(message.content)


def test_every_bundled_task_is_repaired_by_its_gold_and_its_own_test_fails_before() -> None:
    env = agentrl.make("workspace", **FAKE)
    names = []
    for split in env.splits:
        for index, task in enumerate(env.task_list(split)):
            env.reset(options={"split": split, "index": index})
            (own,) = (path for path in task.meta["files"] if path.startswith("test_"))
            assert "[exit code 1]" in told(env, "run", command=f"python3 {own}"), task.id
            *work, last = env.gold(task)
            for message in work:
                env.step(message)
            assert told(env, "run", command=f"python3 {own}") == "[no output]", task.id
            assert env.step(last)[1:3] == (1.0, True), task.id
            names.append(task.id)
    assert len(names) == len(set(names)) >= 12


def test_the_hidden_tests_reject_every_task_as_it_was() -> None:
    env = agentrl.make("workspace", **FAKE)
    for split in env.splits:
        for index, task in enumerate(env.task_list(split)):
            env.reset(options={"split": split, "index": index})
            path = next(iter(task.truth["gold"]))
            told(env, "write_file", path=path, content=task.meta["files"][path] + "\n# looked at\n")
            _, reward, *_, info = env.step(DONE)
            assert (reward, info["reward_parts"]["passed"] < 1) == (0.0, True), task.id


def test_tools_list_read_write_and_run_in_one_sandbox(env: Any) -> None:
    assert told(env, "list_files") == "basket.py\ntest_basket.py\n"
    assert "class Basket" in told(env, "read_file", path="basket.py")
    assert told(env, "write_file", path="notes/a.txt", content="é") == "wrote 2 bytes"
    assert told(env, "run", command="cat notes/a.txt; echo no >&2; exit 3") == "éno\n[exit code 3]"
    assert "notes/a.txt" in told(env, "list_files")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a\0b", "none", "notes", "link"])
def test_a_file_that_is_none_is_told_to_the_model(env: Any, path: str) -> None:
    told(env, "run", command="mkdir notes; ln -s /etc/passwd link")
    assert told(env, "read_file", path=path).startswith("error: ")


def test_calls_of_a_message_run_in_their_order(env: Any) -> None:
    calls = tuple(
        ToolCall(id=f"call_{n}", name="run", arguments={"command": f"echo {n} >> log; cat log"})
        for n in range(5)
    )
    observation, *_ = env.step(Message("assistant", "", calls))
    assert observation[-1].content == "0\n1\n2\n3\n4"


def test_a_command_that_takes_too_long_is_the_models_fault() -> None:
    env = agentrl.make("workspace", **FAKE, seconds=1.0)
    env.reset(seed=0)
    assert told(env, "run", command="sleep 60") == "[ended at the wall limit]"
    assert told(env, "run", command="echo 1") == "1"
    env.close()


def test_only_files_that_were_there_are_judged(env: Any) -> None:
    told(env, "write_file", path="conftest.py", content="import os; os._exit(0)")
    told(env, "write_file", path="test_hidden.py", content="def test_baskets_are_apart(): pass")
    _, reward, *_, info = env.step(DONE)
    assert (reward, info["reward_note"]) == (0.0, "nothing was changed")


def test_a_file_that_is_gone_or_a_link_is_not_there_for_the_judge(env: Any) -> None:
    gold = env.gold(env.task)[1].tool_calls[0].arguments["content"]
    told(env, "write_file", path="elsewhere.py", content=gold)
    told(env, "run", command="ln -sf elsewhere.py basket.py")
    assert env.step(DONE)[1] == 0.0


def test_a_fraction_pays_for_what_passes() -> None:
    env = agentrl.make("workspace", **FAKE, mode="fraction")
    env.reset(options={"task_id": "shared-default"})
    told(
        env, "write_file", path="basket.py", content=env.task.meta["files"]["basket.py"].replace("={}", "=()")
    )
    assert 0.0 <= env.step(DONE)[1] < 1.0


def test_nothing_hidden_is_in_the_agents_sandbox_or_in_what_it_is_shown(env: Any) -> None:
    assert "hidden" not in told(env, "run", command="ls -aR; cat *.py")
    assert "what_is_handed_in" not in str(env.messages)


def test_the_sandbox_is_closed_with_the_episode() -> None:
    env = agentrl.make("workspace", **FAKE)
    for end in (lambda: env.step(DONE), lambda: env.truncate("length"), env.close, env.reset):
        env.reset(seed=0)
        told(env, "run", command="true")
        session = trusting.Trusting.opened[-1]
        end()
        with pytest.raises(SandboxLost):
            session.run(["true"])


def test_a_lost_sandbox_is_the_worlds_fault(env: Any) -> None:
    told(env, "run", command="true")
    trusting.Trusting.opened[-1].close()
    with pytest.raises(SandboxLost) as raised:
        env.step(call("run", command="true"))
    assert raised.value.boundary == "sandbox"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "begins with '##### NAME SPLIT'"),
        ("##### a train\n=== about\nx\n=== file a.py\n", "lacks gold, hidden"),
        ("##### a train\n=== about\nx\n=== file ../a.py\n", "names no file"),
    ],
)
def test_a_file_of_tasks_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tasks.txt").write_text(text)
    with pytest.raises(BadData, match=said):
        agentrl.make("workspace", path=str(tmp_path / "tasks.txt")).task_list("train")
    with pytest.raises(BadData, match="can't read"):
        agentrl.make("workspace", path=str(tmp_path / "none.txt")).task_list("train")


@pytest.mark.slow
def test_it_passes_the_shared_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = [attack for attack in cheating.VERDICTS if attack.name in ("leave-os-exit", "text-prose")]
    monkeypatch.setattr(cheating, "VERDICTS", harmless)  # programs are plain processes here
    report = agentrl.check("workspace", episodes=1, endurance=20, **FAKE)
    assert report.ok, str(report)


@pytest.mark.bwrap
@pytest.mark.slow
def test_no_attack_of_the_catalogue_is_paid(hardened: str) -> None:
    env = agentrl.make("workspace", sandbox=hardened)
    check = cheating.attacks_on_its_verdict_score_no_more_than_wrong_answers
    assert int(check(Subject(env, episodes=2, endurance=10)).split()[0]) > 150


_COMPARES_ALONE = """##### {name} {split}
=== about
`{name}` multiplies.
=== file arithmetics.py
def {name}(n):
    return n
=== gold arithmetics.py
def {name}(n):
    return {factor} * n
=== hidden test_{name}.py
from arithmetics import {name}
def test_{name}():
    assert {name}(4) == {factor} * 4
"""


def test_hidden_tests_that_only_compare_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = (("double", "train", 2), ("triple", "test", 3))
    texts = (_COMPARES_ALONE.format(name=name, split=split, factor=factor) for name, split, factor in tasks)
    (tmp_path / "tasks.txt").write_text("".join(texts))
    env = agentrl.make("workspace", path=str(tmp_path / "tasks.txt"), **FAKE)
    equal = [attack for attack in cheating.VERDICTS if attack.name == "pytest-returns-equal"]
    monkeypatch.setattr(cheating, "VERDICTS", equal)
    check = cheating.attacks_on_its_verdict_score_no_more_than_wrong_answers
    with pytest.raises(Unsound, match="'pytest-returns-equal' .* scores 1, a wrong answer 0: .* declared"):
        check(Subject(env, episodes=2, endurance=10))
    monkeypatch.setattr(type(env), "declared", {"pytest-returns-equal": "these tests are all there are"})
    assert check(Subject(env, episodes=2, endurance=10)) == "0 attacks; declared: pytest-returns-equal"


def test_gymnasium_makes_it() -> None:
    assert gymnasium.make("agentrl/Workspace-v0", **FAKE).reset(seed=1)[1]["task_id"]
    assert len(gymnasium.make_vec("agentrl/Workspace-v0", 2, "sync", **FAKE).reset(seed=3)[0]) == 2
