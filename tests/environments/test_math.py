import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import agentrl
from agentrl.env import Env
from agentrl.errors import BadConfig, BadData
from agentrl.reward import Evidence
from agentrl.types import Message, Task

GSM8K_ROW = {
    "question": "How many clips?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=1072>>1,072.\n#### 1,072",
}
MATH_ROW = {"problem": "Half?", "solution": r"It is $\boxed{\frac12}$.", "answer": r"\frac12", "level": 2}
DATA = os.environ.get("AGENTRL_DATA", "")
real_data = pytest.mark.skipif(not DATA, reason="AGENTRL_DATA names no folder with gsm8k/ and math500/")


def write(path: Path, *rows: Mapping[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_math(dataset: str | Path, **options: Any) -> Env:
    return agentrl.make("math", dataset=str(dataset), **options)


def tasks(env: Env, split: str = "train") -> Sequence[Task]:
    found = env.task_list(split)
    assert isinstance(found, Sequence)
    return found


def scores_of_gold(env: Env, chosen: Sequence[Task], reward: str) -> list[float]:
    score = agentrl.make_reward(reward)
    with ThreadPoolExecutor(8) as threads:  # boxed has two workers: more threads only keep them busy
        return [
            found.value  # type: ignore[union-attr]
            for found in threads.map(lambda task: score(Evidence(task, tuple(env.gold(task)))), chosen)
        ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", GSM8K_ROW, {"question": "1+1?", "answer": "#### 2"})
    write(tmp_path / "test.jsonl", GSM8K_ROW)
    return tmp_path


def test_an_episode_is_one_question_and_one_answer(folder: Path) -> None:
    env = make_math(folder)
    opening, _ = env.reset(options={"split": "train", "index": 0})
    assert opening[0].content.startswith("How many clips?\n\n")
    assert r"\boxed{}" in opening[0].content
    _, reward, terminated, truncated, info = env.step(Message("assistant", r"\boxed{1072}"))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["stop_reason"] == "answered"


def test_the_policy_never_sees_the_answer(folder: Path) -> None:
    opening, info = make_math(folder).reset(options={"index": 0})
    assert "1072" not in str(opening).replace(",", "")
    assert "1072" not in str(info).replace(",", "")


def test_gymnasium_can_make_it(folder: Path) -> None:
    env = gymnasium.make("agentrl/Math-v0", dataset=str(folder))
    assert len(env.reset(seed=1)[0]) == 1


def test_gold_of_gsm8k_is_the_worked_solution_without_its_calculator_notes(folder: Path) -> None:
    env = make_math(folder)
    task, bare = tasks(env)
    (message,) = env.gold(task)
    assert message.content == "She sold 48/2 = 24 clips.\n48+24 = 1,072.\n\n\\boxed{1,072}"
    assert env.gold(bare)[0].content == r"\boxed{2}"


@pytest.mark.parametrize(
    ("row", "answer", "gold"),
    [
        (MATH_ROW, r"\frac12", r"It is $\boxed{\frac12}$."),
        ({"problem": "?", "solution": r"Hence \boxed{3}."}, "3", r"Hence \boxed{3}."),
        ({"question": "?", "answer": 7}, "7", r"\boxed{7}"),
        ({"question": "?", "answer": "7", "solution": "Count them."}, "7", "Count them.\n\n\\boxed{7}"),
    ],
)
def test_answer_and_gold_come_from_whatever_columns_there_are(
    tmp_path: Path, row: Mapping[str, Any], answer: str, gold: str
) -> None:
    env = make_math(write(tmp_path / "rows.jsonl", row))
    (task,) = tasks(env)
    assert task.truth["answer"] == answer
    assert [message.content for message in env.gold(task)] == [gold]


@pytest.mark.parametrize("reward", ["boxed", "numeric"])
def test_gold_scores_the_maximum_and_silence_the_minimum(folder: Path, reward: str) -> None:
    env = make_math(folder, reward=reward)
    for split in env.splits:
        for index, task in enumerate(tasks(env, split)):
            for answer, expected in ((env.gold(task)[-1], 1.0), (Message("assistant", ""), 0.0)):
                env.reset(options={"split": split, "index": index})
                assert env.step(answer)[1] == expected


def test_columns_and_prompt_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"q": r"Use {braces} and \boxed?", "a": "yes", "question": "no"})
    env = make_math(path, question_key="q", answer_key="a", prompt="Q: {question}\nA:", reward="exact")
    (task,) = tasks(env)
    assert task.prompt[0].content == "Q: Use {braces} and \\boxed?\nA:"
    assert task.truth["answer"] == "yes"


def test_ids_say_split_and_position_and_the_hash_is_of_the_question(folder: Path) -> None:
    env = make_math(folder)
    assert [task.id for task in tasks(env)] == ["train-0", "train-1"]
    held_out, trained = tasks(env, "test")[0], tasks(env)
    assert held_out.meta["content_hash"] == trained[0].meta["content_hash"] != trained[1].meta["content_hash"]


def test_a_limit_takes_the_first_tasks(folder: Path) -> None:
    assert [task.id for task in tasks(make_math(folder, limit=1))] == ["train-0"]


def test_tasks_are_read_once_for_equal_settings(folder: Path) -> None:
    assert tasks(make_math(folder)) is tasks(make_math(folder))


def test_splits_are_the_files_that_are_there(folder: Path) -> None:
    assert make_math(folder).splits == ("train", "test")
    assert make_math(folder / "test.jsonl").splits == ("test",)
    (folder / "train.jsonl").rename(folder / "other.jsonl")
    assert make_math(folder).splits == ("test",)
    assert make_math(folder / "other.jsonl").splits == ("train",)
    assert len(tasks(make_math(folder, splits={"train": "other.jsonl"}))) == 2


def test_an_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(BadData, match="no split 'tset'; did you mean 'test'"):
        make_math(folder).task_list("tset")


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("gsm8", "did you mean 'gsm8k'"),
        ("./missing/train.jsonl", "check the path"),
        ("/missing", "check the path"),
    ],
)
def test_a_data_set_that_is_nowhere_is_refused(dataset: str, said: str) -> None:
    with pytest.raises(BadData, match=said):
        make_math(dataset)


def test_a_folder_without_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"neither train.jsonl nor test.jsonl.*splits="):
        make_math(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "?", "answer": 1}\n\n{"question"\n', r"rows.jsonl:3: not JSON \(.*column"),
        ("[1]\n", "rows.jsonl:1: a list, not a JSON object"),
        (
            '{"query": "?", "reply": 1}\n',
            "no text in the column 'question' or 'problem'.* 'query', 'reply'.*question_key",
        ),
        ('{"question": "?", "answer": null}\n', "no text in the column 'answer' or 'solution'"),
        ('{"question": "?", "answer": "so ####"}\n', "rows.jsonl:1: no answer in"),
        ("\n", "the split 'train' of .* has no rows"),
        ("\udcff", "rows.jsonl:1: not UTF-8"),
        ('{"question": "\\ud83d?", "answer": 1}\n', "rows.jsonl:1: question=.*half of a surrogate pair"),
        ('{"question": "?", "answer": "\\udc00"}\n', "rows.jsonl:1: answer=.*half of a surrogate pair"),
        pytest.param('{"question": "?", "answer": ' + "9" * 5000 + "}", "jsonl:1: .*digits", id="digits"),
        pytest.param("[" * 100_000, "rows.jsonl:1: JSON that can't be read", id="brackets"),
    ],
)
def test_rows_that_can_not_be_used_are_refused_with_their_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadData, match=said):
        make_math(tmp_path / "rows.jsonl").task_list("train")


def test_a_file_of_a_split_that_is_missing_is_refused(folder: Path) -> None:
    with pytest.raises(BadData, match="can't read .*none.jsonl"):
        make_math(folder, splits={"train": "none.jsonl"}).task_list("train")


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"prompt": "no place for it"}, {"splits": {"train": "test.jsonl"}}]
)
def test_settings_that_make_no_sense_are_refused(folder: Path, options: Any) -> None:
    with pytest.raises(BadConfig):
        make_math(folder / "train.jsonl", **options)


@real_data
def test_every_gold_answer_of_gsm8k_is_right_by_number_and_a_sample_by_mathematics() -> None:
    env = make_math(Path(DATA) / "gsm8k")
    held_out = tasks(env, "test")
    assert len(held_out) == 1319
    assert set(scores_of_gold(env, held_out, "numeric")) == {1.0}
    assert set(scores_of_gold(env, held_out[::13][:100], "boxed")) == {1.0}


@real_data
def test_every_gold_solution_of_math500_is_right_by_mathematics() -> None:
    env = make_math(Path(DATA) / "math500")
    held_out = tasks(env, "test")
    values = scores_of_gold(env, held_out, "boxed")
    wrong = [task.id for task, value in zip(held_out, values, strict=True) if value < 1]
    assert (len(held_out), wrong) == (500, [])
