import pickle
from typing import Any

import pytest

import agentrl
from agentrl.errors import BadData
from agentrl.reward import Evidence
from agentrl.types import Message, Score, Task


def score(said: str, truth: Any, **options: Any) -> Score:
    reward = pickle.loads(pickle.dumps(agentrl.make_reward("exact", **options)))
    result: Score = reward(
        Evidence(Task(id="t", prompt=(), truth={"answer": truth}), (Message("assistant", said),))
    )
    return result


@pytest.mark.parametrize(
    ("said", "truth", "options"),
    [
        (r"\boxed{ Paris }", "Paris", {}),
        ("\\boxed{New \n York}", "New York", {}),
        (r"\boxed{paris}", "PARIS", {"casefold": True}),
        ("\\boxed{Cafe\u0301}", "Caf\u00e9", {}),
        (r"\boxed{7}", 7, {}),
        (" Paris\n", "Paris", {"boxed": False}),
        ("<think>hm</think> Paris", "Paris", {"boxed": False}),
        (r"\boxed{a} and again \boxed{a}", "a", {}),
    ],
)
def test_the_same_text_after_normalisation_scores_one(said: str, truth: Any, options: Any) -> None:
    assert score(said, truth, **options) == Score(1.0, {"correct": 1.0})


@pytest.mark.parametrize(
    ("said", "options", "note"),
    [
        (r"\boxed{paris}", {}, "another text"),
        ("Paris", {}, "no boxed answer"),
        (r"\boxed{Paris} or \boxed{Rome}", {}, "2 different"),
        ("It is Paris", {"boxed": False}, "another text"),
    ],
)
def test_any_other_text_scores_zero_and_says_why(said: str, options: Any, note: str) -> None:
    wrong = score(said, "Paris", **options)
    assert (wrong.value, wrong.parts) == (0.0, {"correct": 0.0})
    assert note in wrong.note


def test_a_truth_that_is_no_text_is_the_datas_fault() -> None:
    with pytest.raises(BadData, match="list"):
        score(r"\boxed{a}", ["a"])
