"""code: one turn or several, what is shown of tests, data sets, a lost sandbox, and cheating."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import trusting
from gymnasium.vector import SyncVectorEnv

import agentrl
from agentrl.attacks import cheating
from agentrl.errors import BadConfig, BadData, UserError
from agentrl.probes import Subject, Unsound
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits, SandboxLost
from agentrl.types import Message

FAKE = {"sandbox": "trusting:Trusting"}  # plain processes: every program here is our own
ROWS = [
    {
        "id": f"task-{n}",
        "statement": f"Add {n} to a number.",
        "entry_point": "add",
        "solution": f"def add(x):\n    return x + {n}\n",
        "tests": [
            {"args": [1], "expected": 1 + n, "visible": True},
            {"args": [70_000], "expected": 70_000 + n},
            {"args": [-800], "expected": n - 800},
        ],
    }
    for n in range(3, 7)
]

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "entry_point": "one",
    "prompt": 'def one():\n    """One."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for split, part in (("train", ROWS[:2]), ("test", ROWS[2:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


@pytest.fixture
def code(rows: Path) -> Any:
    """Makes the environment over the small rows."""
    return lambda **settings: agentrl.make("code", **{"dataset": str(rows), **FAKE, **settings})


def program(body: str) -> Message:
    return Message("assistant", f"So:\n```python\ndef add(x):\n    {body}\n```\nDone.")


def test_a_right_program_is_worth_one_and_a_wrong_one_nothing(code: Any) -> None:
    env = code()
    env.reset(options={"task_id": "task-3"})
    _, reward, terminated, _, info = env.step(program("return x + 3"))
    assert (reward, terminated, info["stop_reason"]) == (1.0, True, "answered")
    env.reset(options={"task_id": "task-3"})
    _, reward, terminated, _, info = env.step(program("return 4"))
    assert (reward, terminated) == (0.0, True)
    assert "70000" not in str(info)
    assert info["reward_parts"]["compiled"] == 1.0


def test_a_fraction_pays_for_what_passes(code: Any) -> None:
    env = code(mode="fraction")
    env.reset(options={"task_id": "task-3"})
    assert env.step(program("return 4"))[1] == pytest.approx(1 / 3)


def test_with_several_turns_a_failed_public_test_is_shown_and_nothing_hidden(code: Any) -> None:
    env = code(turns=3)
    env.reset(options={"task_id": "task-3"})
    (told,), reward, terminated, *_ = env.step(program("return x"))
    assert (reward, terminated) == (0.0, False)
    assert told.role == "user"
    assert "add(1) gave 1, expected 4" in told.content
    (told,), *_ = env.step(program("raise ValueError(x)"))
    assert "raised ValueError" in told.content
    assert env.step(program("return x + 3"))[1:4] == (1.0, True, False)
    assert not {"70000", "-800", "70003"} & set(str(env.messages).replace(",", " ").split())


def test_public_tests_that_pass_end_the_episode_whatever_the_hidden_say(code: Any) -> None:
    env = code(turns=3)
    env.reset(options={"task_id": "task-3"})
    assert env.step(program("return 4"))[1:3] == (0.0, True)
    env = code(turns=3, feedback="verdict")
    env.reset(options={"task_id": "task-3"})
    (told,), _, terminated, *_ = env.step(program("return 4"))
    assert (terminated, "a hidden one failed" in told.content, "70" in told.content) == (False, True, False)


def test_a_program_that_prints_its_arguments_shows_no_hidden_ones(code: Any) -> None:
    env = code(turns=2)
    env.reset(options={"task_id": "task-3"})
    (told,), *_ = env.step(program("raise ValueError(repr(x))"))
    assert "70000" not in told.content


def test_the_last_turn_is_scored(code: Any) -> None:
    env = code(turns=2)
    env.reset(options={"task_id": "task-3"})
    assert env.step(program("return x"))[2] is False
    assert env.step(program("return x"))[1:4] == (0.0, True, False)


def test_the_prompt_shows_the_public_test_only(code: Any) -> None:
    env = code()
    opening, info = env.reset(options={"task_id": "task-3"})
    assert "add(1) == 4" in opening[0].content
    assert "70000" not in str((opening, info))


def test_a_lost_sandbox_is_the_worlds_fault_and_no_score(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusting.Losing, "loses", staticmethod(lambda number: True))
    env = code(sandbox="trusting:Losing")
    env.reset(options={"task_id": "task-3"})
    with pytest.raises(SandboxLost) as raised:
        env.step(program("return x + 3"))
    assert raised.value.boundary == "sandbox"


def test_the_bundled_suite_has_two_disjoint_splits_with_gold() -> None:
    env = agentrl.make("code", **FAKE)
    tasks = {split: env.task_list(split) for split in env.splits}
    sizes = [len(list(tasks[split])) for split in ("train", "test")]
    assert sum(sizes) >= 95
    assert 0.1 < sizes[1] / sum(sizes) < 0.35
    texts = {split: {task.meta["content_hash"] for task in tasks[split]} for split in tasks}
    assert not texts["train"] & texts["test"]
    for split in env.splits:
        env.reset(options={"split": split, "index": 0})
        assert env.step(*env.gold(env.task))[1] == 1.0


def test_every_task_is_the_same_every_time(code: Any) -> None:
    one, other = code(), code(limit=1)
    assert one.find_task("task-5").id == "task-5"
    assert [task.id for task in other.task_list("train")] == ["task-3"]
    assert one.task_list("train")[:5] == code().task_list("train")[:5]


def test_a_benchmarks_file_is_its_test_split_and_mbpp_has_its_own(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL))
    mbpp = [
        {"task_id": n, "text": f"{n}?", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
        for n in (1, 11, 510, 511, 601)
    ]
    (tmp_path / "mbpp.json").write_text(json.dumps(mbpp))
    env = agentrl.make("code", dataset=str(tmp_path / "HumanEval.jsonl.gz"), **FAKE)
    assert env.splits == ("test",)
    env.reset(options={"split": "test", "index": 0})
    assert env.step(*env.gold(env.task))[1] == 1.0
    env = agentrl.make("code", dataset=str(tmp_path / "mbpp.json"), **FAKE)
    assert [task.id for task in env.task_list("test")] == ["Mbpp/11", "Mbpp/510"]
    assert len(env.task_list("train")) == 3


def test_what_plus_versions_expect_is_what_their_reference_gives(tmp_path: Path) -> None:
    row = {
        "task_id": "Mbpp/2",
        "prompt": '"""\nPair them.\nassert pair((1,), (2,)) == (1, 2)\n"""\n',
        "entry_point": "pair",
        "canonical_solution": "def pair(a, b):\n    print('noise')\n    return a + b\n",
        "base_input": [[[1], [2]]],
        "plus_input": [[[1.5], []], [["a"], [[2]]], [3, [1]]],
        "atol": 0,
        "assertion": "assert pair((1,), (2,)) == (1, 2)",
    }
    (tmp_path / "plus.jsonl").write_text(json.dumps(row))
    env = agentrl.make("code", dataset=str(tmp_path / "plus.jsonl"), **FAKE)
    (task,) = env.task_list("test")[:1]
    tests = task.truth["problem"]["tests"]
    assert [test.get("expected") for test in tests] == [{"tuple": [1, 2]}, None, {"tuple": ["a", [2]]}]
    assert "(1.5,)" in tests[1]["code"]  # of 3 + (1,) there is none
    env.reset(options={"split": "test", "index": 0})
    assert env.step(*env.gold(env.task))[1] == 1.0
    broken = {**row, "canonical_solution": "def pair(a, b):\n    return 1 / 0\n"}
    (tmp_path / "plus.jsonl").write_text(json.dumps(broken))
    with pytest.raises(BadData, match="plus.jsonl:1: the reference gives plain data for none"):
        agentrl.make("code", dataset=str(tmp_path / "plus.jsonl"), limit=1, **FAKE).task_list("test")[0]


@pytest.mark.parametrize(
    ("gives", "says", "atol", "is_right"),
    [
        ("x * 1.5", "x * 1.5 + 0.9", 0, True),  # at 8e6: 1e-6 + 1e-7 * 1.2e7
        ("x * 1.5", "x * 1.5 + 1.6", 0, False),
        ("x * 1.5", "x * 1.5 + 9", 10, True),
        ("[x / 2, x / 4]", "[x / 2 + 1e-7, x / 4]", 0, True),
        ("[x / 2, x / 4]", "[x / 2]", 0, False),
        ("[x / 2, x / 4]", "'no list'", 0, False),
        ("[0.5, x]", "[0.5, x + 1e-7]", 0, False),  # not floats alone
        ("x > 3", "int(x > 3)", 0, True),
        ("[x > 3]", "[x < 3]", 0, False),
        ("float('inf')", "float('inf')", 0, True),
        ("float('nan')", "float('nan')", 0, True),
        ("[float('inf'), True]", "[float('inf'), 1]", 0, True),
    ],
)
def test_plus_versions_are_compared_as_evalplus_does_it(
    tmp_path: Path, gives: str, says: str, atol: float, is_right: bool
) -> None:
    row = {
        "task_id": "HumanEval/999",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": f"    return {gives}\n",
        "base_input": [[8_000_000]],
        "plus_input": [[8_000_001]],
        "atol": atol,
    }
    (tmp_path / "plus.jsonl").write_text(json.dumps(row))
    env = agentrl.make("code", dataset=str(tmp_path / "plus.jsonl"), **FAKE)
    env.reset(options={"split": "test", "index": 0})
    reward = env.step(Message("assistant", f"```python\ndef f(x):\n    return {says}\n```"))[1]
    assert reward == float(is_right)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"turns": 0}, "turns=0"),
        ({"prompt": "?"}, "{statement}"),
        ({"columns": {"test": "x"}}, "'test'; did you mean 'tests'"),
        ({"dataset": "basics", "splits": {"train": "x"}}, "has its own splits"),
        ({"feedback": "verdict"}, "feedback='verdict'.* has no effect with turns=1: set turns=2"),
        ({"feedback": "public", "turns": 2, "max_turns": 1}, "turns=2, max_turns=1.*leave max_turns out"),
        ({"feedback": "public", "max_turns": 1}, "has no effect with turns=1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(code: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        code(**settings)


def test_turns_without_a_public_test_are_refused(tmp_path: Path) -> None:
    row = {"statement": "Double.", "solution": "def f(x): return 2 * x", "tests": ["assert f(1) == 2"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))

    def tasks(**settings: Any) -> Any:
        env = agentrl.make("code", dataset=str(tmp_path), **FAKE, **settings)
        return env.task_list(env.splits[0])

    with pytest.raises(
        BadConfig, match="no task of the split 'train' .* public test.* visible=1 .* feedback='verdict'"
    ):
        tasks(turns=3)
    for settings in ({}, {"turns": 3, "visible": 1}, {"turns": 3, "feedback": "verdict"}):
        assert len(tasks(**settings)) == 1
    (tmp_path / "train.jsonl").write_text(json.dumps(HUMANEVAL))
    with pytest.raises(BadConfig, match="train.jsonl:1: visible=1 has no effect"):
        tasks(turns=3, visible=1)


def test_an_assertion_that_failed_is_shown_if_it_is_public(tmp_path: Path) -> None:
    row = {"id": "g", "statement": "Add one.", "entry_point": "g", "solution": "def g(x): return x + 1"}
    tests = ["assert g(1) == 2", "assert g(2) == 3", "assert g(7001) == 7002"]
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "tests": tests}))
    env = agentrl.make("code", dataset=str(tmp_path), visible=2, turns=4, feedback="verdict", **FAKE)
    env.reset(options={"split": "train", "index": 0})
    for body, said in (("2", "\nassert g(2) == 3\n"), ("x.y", "\nassert g(1) == 2\n"), ("min(x, 9) + 1", "")):
        (told,), *_ = env.step(Message("assistant", f"```python\ndef g(x):\n    return {body}\n```"))
        assert said in told.content
        assert "700" not in told.content
    assert "a hidden one failed" in told.content


def test_plain_processes_judge_where_nothing_is_limited_but_the_clock() -> None:
    env = agentrl.make("code", sandbox="process", cpu_s=None, memory_mib=None)
    env.reset(options={"split": "train", "index": 0})
    assert env.step(*env.gold(env.task))[1] == 1.0
    env = agentrl.make("code", sandbox="process", memory_mib=None)
    env.reset(options={"split": "train", "index": 0})
    with pytest.raises(BadConfig, match="set cpu_s=None to do without"):
        env.step(*env.gold(env.task))


def test_plain_processes_run_references(tmp_path: Path) -> None:
    row = {
        "task_id": "HumanEval/999",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": "    return x + 1\n",
        "base_input": [[1]],
        "plus_input": [[2]],
        "atol": 0,
    }
    (tmp_path / "plus.jsonl").write_text(json.dumps(row))
    env = agentrl.make(
        "code", dataset=str(tmp_path / "plus.jsonl"), sandbox="process", cpu_s=None, memory_mib=None
    )
    env.reset(options={"split": "test", "index": 0})
    assert env.step(*env.gold(env.task))[1] == 1.0


@pytest.mark.parametrize(
    ("ids", "splits"),
    [
        ((601, 11, 2), {"train": 2, "test": 1}),
        ((12, 13), {"test": 2}),
        ((700,), {"train": 1}),
        ((11, 975), {"train": 2}),
        ((11, "own-1"), {"train": 2}),
        (("11", 12), {"train": 2}),
    ],
)
def test_only_a_file_of_mbpps_own_ids_has_its_splits(
    tmp_path: Path, ids: tuple[Any, ...], splits: dict[str, int]
) -> None:
    rows = [
        {"task_id": n, "text": f"{n}?", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
        for n in ids
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = agentrl.make("code", dataset=str(path), **FAKE)
    assert {split: len(env.task_list(split)) for split in env.splits} == splits
    columns = {"statement": "text", "tests": "test_list", "solution": "code", "id": "task_id"}
    named = agentrl.make("code", dataset=str(path), columns=columns, **FAKE)
    assert {split: len(named.task_list(split)) for split in named.splits} == {"train": len(ids)}


def test_a_program_with_a_fence_in_it_is_fenced_longer(code: Any) -> None:
    env = code()
    (message,) = env.as_submission(None, 'x = """\n```\n"""\n')
    assert message.content.startswith("````python\n")
    assert message.content.endswith("\n````")


def test_two_rows_of_one_id_and_a_task_without_solution_are_refused(tmp_path: Path) -> None:
    lines = [
        json.dumps({key: row[key] for key in row if key != "solution"} | {"id": "x"}) for row in ROWS[:2]
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadData, match="train.jsonl:1 and .*train.jsonl:2: two rows have the id 'x'"):
        agentrl.make("code", dataset=str(tmp_path), **FAKE).task_list("train")
    nameless = json.dumps({key: ROWS[0][key] for key in ROWS[0] if key != "id"})
    (tmp_path / "train.jsonl").write_text(f"{lines[0]}\n{nameless}\n{nameless}\n")
    with pytest.raises(BadData, match="jsonl:2 and .*jsonl:3: two rows have the same statement.* give each"):
        agentrl.make("code", dataset=str(tmp_path), **FAKE).task_list("train")
    (tmp_path / "train.jsonl").write_text(lines[0])
    env = agentrl.make("code", dataset=str(tmp_path), limit=5, **FAKE)
    with pytest.raises(UserError, match="has no solution"):
        env.gold(env.task_list("train")[0])


def test_gymnasium_makes_it_and_vectors_of_it(rows: Path) -> None:
    settings = {"dataset": str(rows), **FAKE}
    assert gymnasium.make("agentrl/Code-v0", **settings).reset(seed=1)[1]["task_id"]
    envs = SyncVectorEnv([lambda: agentrl.make("code", **settings)] * 2)
    envs.reset(seed=[1, 1])
    _, rewards, *_ = envs.step((program("return 4"),) * 2)
    assert rewards.tolist() == [0.0, 0.0]
    envs.close()


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2])
def test_it_passes_the_shared_checks(code: Any, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing that harms a host: here programs are plain processes.
    harmless = [attack for attack in cheating.VERDICTS if attack.name in ("leave-os-exit", "text-prose")]
    monkeypatch.setattr(cheating, "VERDICTS", harmless)
    report = agentrl.check(code(turns=turns), episodes=2, endurance=20)
    assert report.ok, str(report)
    assert "2 attacks" in next(row.detail for row in report.rows if row.name.startswith("attacks on"))


@pytest.mark.bwrap
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "fraction"])
def test_no_attack_of_the_catalogue_is_paid(code: Any, hardened: str, mode: str) -> None:
    env = code(sandbox=hardened, mode=mode, cpu_s=3.0)
    check = cheating.attacks_on_its_verdict_score_no_more_than_wrong_answers
    assert int(check(Subject(env, episodes=1, endurance=10)).split()[0]) > 100


@pytest.mark.bwrap
def test_exit_codes_as_verdicts_are_found_out_by_the_attacks(code: Any, hardened: str) -> None:
    backend = make_sandbox(hardened)

    def exit_code(evidence: Any) -> float:
        source = evidence.answer.partition("python\n")[2].rstrip("`\n")
        tests = "\n".join(f"assert add({n}) == {n + 3}" for n in (1, 70_000))
        with closing(backend.open(replace(Limits(), wall_s=10.0))) as sandbox:
            text = f"{source}\n{tests}\n".encode(errors="replace")
            return float(sandbox.run(["python3", "it.py"], files={"it.py": text}).status == "ok")

    env = code(reward=exit_code, limit=1)
    env.reset(options={"task_id": "task-3"})
    assert env.step(*env.gold(env.task))[1] == 1.0
    with pytest.raises(Unsound, match="the attack 'leave-os-exit' .* scores 1, a wrong answer 0"):
        cheating.attacks_on_its_verdict_score_no_more_than_wrong_answers(
            Subject(env, episodes=1, endurance=10)
        )
    backend.close()
