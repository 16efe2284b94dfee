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
from agentrl.contract import keeps_its_splits_apart
from agentrl.errors import BadConfig, BadData
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


def test_names_are_listed_so_that_they_can_be_read(env: Any) -> None:
    told(env, "write_file", path="café.py", content="x = 1")
    told(env, "run", command="echo > \"$(printf 'new\\nline')\"")
    assert told(env, "list_files") == "basket.py\ncafé.py\nnew\\nline\ntest_basket.py\n"
    assert told(env, "read_file", path="café.py") == "x = 1"


def test_a_path_may_begin_where_the_repository_lies(env: Any) -> None:
    assert told(env, "write_file", path="/work/notes/a.txt", content="é") == "wrote 2 bytes"
    for path in ("./notes/a.txt", "././notes/a.txt", "/work/./notes/a.txt"):
        assert told(env, "read_file", path=path) == "é"
    for path in ("./../x", "/work//etc/passwd", "/workshop/a.txt"):
        assert "names no file of a sandbox" in told(env, "read_file", path=path)


def test_a_script_that_is_rewritten_can_still_be_run(env: Any) -> None:
    told(env, "write_file", path="run.sh", content="#!/bin/sh\necho one\n")
    assert "[exit code 126]" in told(env, "run", command="./run.sh")
    told(env, "run", command="chmod 755 run.sh")
    told(env, "write_file", path="run.sh", content="#!/bin/sh\necho two\n")
    assert told(env, "run", command="./run.sh") == "two"


def test_a_list_that_is_not_whole_says_so() -> None:
    env = agentrl.make("workspace", **FAKE, limits={"output_kib": 1})
    env.reset(options={"task_id": "shared-default"})
    told(env, "run", command="for i in $(seq 100); do : > a_file_of_some_name_$i; done")
    assert "[cut: " in told(env, "list_files").splitlines()[-1]
    told(env, "run", command="for i in $(seq 1500); do : > a_file_of_some_name_$i; done")
    assert told(env, "list_files").startswith("error: not listed: ended at the output limit; run 'ls'")
    env.close()


def test_what_is_cut_from_a_commands_output_is_counted_whole(env: Any) -> None:
    shown = told(env, "run", command="""python3 -c "print('é' * 150000, end='')" """)
    head, marker, tail = shown.split("\n")
    assert (head, tail) == ("é" * 2000, "é" * 2000)
    assert marker == f"[cut: {300_000 - 8000} bytes]"
    small = agentrl.make("workspace", **FAKE, limits={"output_kib": 1})
    small.reset(seed=0)
    assert told(small, "run", command="printf '%02000d' 0").endswith("0\n[cut: 976 bytes of its middle]")
    small.close()


@pytest.mark.parametrize("tool", ["read_file", "write_file", "list_files"])
def test_a_host_that_opens_no_sandbox_is_not_the_models_fault(tool: str) -> None:
    env = agentrl.make("workspace", sandbox="process")  # which can't enforce what is asked for
    env.reset(seed=0)
    arguments = {"read_file": {"path": "a"}, "write_file": {"path": "a", "content": ""}}.get(tool, {})
    with pytest.raises(BadConfig, match="can't enforce"):
        env.step(call(tool, **arguments))
    env.close()


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


_FOUR = """##### signs train
=== about
Each says its name.
=== file signs.py
a, b, c, d = "a", "?", "?", "?"
=== gold signs.py
a, b, c, d = "a", "b", "c", "d"
=== hidden test_signs.py
import signs
def test_a(): assert signs.a == "a"
def test_b(): assert signs.b == "b"
def test_c(): assert signs.c == "c"
def test_d(): assert signs.d == "d"
"""


def made(folder: Path, text: str, **settings: Any) -> Any:
    """An environment of tasks in that text."""
    (folder / "tasks.txt").write_text(text, encoding="utf-8")
    return agentrl.make("workspace", path=str(folder / "tasks.txt"), **{**FAKE, **settings})


def paid(env: Any, **files: str) -> float:
    """What the first task's episode is worth with these modules written."""
    env.reset(options={"split": env.splits[0], "index": 0})
    for name, content in files.items():
        told(env, "write_file", path=f"{name}.py", content=content)
    return float(env.step(DONE)[1])


@pytest.mark.parametrize(
    ("signs", "worth"),
    [
        ('"a", "?", "?", "?" # looked at', 0.0),
        ('"a", "b", "?", "?"', 1 / 3),
        ('"a", "b", "c", "d"', 1.0),
        ('"?", "b", "?", "?"', 0.0),  # one repaired, one broken
        ('"?", "b", "c", "?"', 1 / 3),
        ('"?", "?", "?", "?"', 0.0),
    ],
)
def test_a_fraction_pays_for_what_is_repaired_and_not_for_what_passed_before(
    tmp_path: Path, signs: str, worth: float
) -> None:
    env = made(tmp_path, _FOUR, mode="fraction")
    assert paid(env, signs=f"a, b, c, d = {signs}\n") == pytest.approx(worth)


@pytest.mark.parametrize("task", ["queue-order", "roman-four"])  # some of their tests pass before
def test_a_fraction_pays_nothing_for_a_blank_line(task: str) -> None:
    env = agentrl.make("workspace", **FAKE, mode="fraction")
    env.reset(options={"task_id": task})
    (path,) = env.task.truth["gold"]
    told(env, "write_file", path=path, content=env.task.meta["files"][path] + "\n")
    _, reward, *_, info = env.step(DONE)
    assert (reward, info["reward_parts"]["passed"] > 0) == (0.0, True)


def test_the_files_as_they_were_are_judged_once_a_task_and_only_for_a_fraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trusting.Losing, "loses", staticmethod(lambda number: False))
    opened = []
    for mode in ("all", "all", "fraction", "fraction"):
        env, before = made(tmp_path, _FOUR, mode=mode, sandbox="trusting:Losing"), trusting.Losing.count
        paid(env, signs='a = "a"\n')
        opened.append(trusting.Losing.count - before)
    # The agent's, and one for each test that is judged; the first time the judge is proved, too.
    assert opened[1:] == [5, 9, 5]


def test_a_fraction_of_nothing_is_refused(tmp_path: Path) -> None:
    env = made(tmp_path, _FOUR.replace('"?", "?", "?"\n', '"b", "c", "d"  #\n'), mode="fraction")
    with pytest.raises(BadData, match="'signs': all its 4 hidden tests pass on the files as they are"):
        paid(env, signs='a, b, c, d = "a", "b", "c", "d"\n')


_KINDS = """
import unittest
class Checks:
    def test_kept(self): assert signs.b == "b"
class TestX(Checks):
    def test_own(self): assert signs.c == "c"
    class TestInner:
        def test_deep(self): assert signs.d == "d"
class Case(unittest.TestCase):
    def test_case(self): self.assertEqual(signs.b, "b")
class Later(unittest.IsolatedAsyncioTestCase):
    async def test_later(self): self.assertEqual(signs.c, "c")
"""


def test_every_kind_of_test_is_judged(tmp_path: Path) -> None:
    env = made(tmp_path, _FOUR + _KINDS)
    assert paid(env, signs='a, b, c, d = "a", "b", "c", "d"\n') == 1.0
    names = env.task.truth["names"]["test_signs.py"]
    assert names[4:] == ["TestX::test_kept", "TestX::test_own", "TestX::TestInner::test_deep", *names[7:]]
    assert names[7:] == ["Case::test_case", "Later::test_later"]
    assert paid(env, signs='a, b, c, d = "a", "b", "c", "?"\n') == 0.0


def test_a_large_file_of_the_tasks_own_is_judged_too(tmp_path: Path) -> None:
    large = _FOUR.replace("=== gold", f"=== file data.txt\n{'x' * 300_000}\n=== gold", 1)
    env = made(tmp_path, f"{large}def test_data(): assert len(open('data.txt').read()) > 300_000\n")
    assert paid(env, signs='a, b, c, d = "a", "b", "c", "d"\n') == 1.0


def test_its_splits_are_those_of_its_file(tmp_path: Path) -> None:
    env = made(tmp_path, "\ufeff" + _FOUR)
    assert env.splits == ("train",)
    assert keeps_its_splits_apart(Subject(env, episodes=1, endurance=1))
    texts = (_FOUR.replace("signs train", f"signs-{split} {split}") for split in ("dev", "test", "train"))
    (tmp_path / "more").mkdir()
    assert made(tmp_path / "more", "".join(texts)).splits == ("train", "test", "dev")
    assert agentrl.make("workspace", **FAKE).splits == ("train", "test")


def test_a_repair_may_change_what_is_no_python(tmp_path: Path) -> None:
    readme = "=== file README.md\nIt's {wrong.\n=== gold README.md\nIt's (right.\n=== gold"
    env = made(tmp_path, _FOUR.replace("=== gold", readme, 1))
    (task,) = env.task_list("train")
    assert "solve" in str(env.as_submission(task, "def solve(): pass"))


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
