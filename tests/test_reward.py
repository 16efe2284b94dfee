import math
import pickle
from typing import Any

import numpy as np
import pytest

from agentrl import make_reward
from agentrl.errors import BadConfig, UnknownName, WorldError
from agentrl.reward import Evidence, Gate, Rubric, WeightedSum, as_score
from agentrl.types import Message, Score, Task

EVIDENCE = Evidence(Task(id="t", prompt=(), truth={"answer": "3"}), (Message("assistant", r"\boxed{3}"),))
NO_BOX = Evidence(EVIDENCE.task, (Message("assistant", "3"),))


class Fixed:
    """A reward of always the same, that counts how often it was asked."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.calls = 0

    def __call__(self, evidence: Evidence) -> Any:
        self.calls += 1
        return self.result


def raising(error: Exception) -> Any:
    def reward(evidence: Evidence) -> float:
        raise error

    return reward


@pytest.mark.parametrize("number", [1, 1.0, True, np.float32(1), np.int64(1), np.bool_(True)])
def test_a_number_becomes_a_score_without_parts(number: Any) -> None:
    score = as_score(number)
    assert score == Score(1.0)
    assert type(score.value) is float


def test_a_score_stays_itself() -> None:
    score = Score(0.5, {"a": 1.0}, "note")
    assert as_score(score) is score


@pytest.mark.parametrize("result", [None, "1", [1.0], 1j, np.array([1.0])])
def test_what_is_no_number_is_refused_with_the_rewards_name(result: Any) -> None:
    with pytest.raises(TypeError, match=r"Fixed returned .* a reward returns a float or a Score"):
        as_score(result, Fixed(result))


@pytest.mark.parametrize("result", [math.nan, math.inf, np.float64("-inf")])
def test_a_number_that_is_not_finite_is_refused_with_the_rewards_name(result: float) -> None:
    with pytest.raises(ValueError, match="shop returned"):
        as_score(result, "shop")


def test_a_weighted_sum_keeps_the_raw_values_and_the_parts_of_its_parts() -> None:
    reward = WeightedSum({"a": (Fixed(Score(1.0, {"x": 7.0}, "why")), 2.0), "b": (Fixed(0.5), -1.0)})
    assert reward(EVIDENCE) == Score(1.5, {"a": 1.0, "a/x": 7.0, "b": 0.5}, "a: why")


def test_registered_names_do_wherever_a_reward_is_expected() -> None:
    assert WeightedSum({"correct": ("numeric", 1.0)})(EVIDENCE).value == 1.0
    assert Gate("format", "exact")(EVIDENCE).value == 1.0
    with pytest.raises(UnknownName, match="did you mean 'numeric'"):
        WeightedSum({"correct": ("numerik", 1.0)})


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_must_be_finite(weight: float) -> None:
    with pytest.raises(BadConfig, match="'a'"):
        WeightedSum({"a": (Fixed(1.0), weight)})


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(BadConfig, match="at least one"):
        WeightedSum({})


@pytest.mark.parametrize(("condition", "is_open"), [(1.0, True), (0.5, True), (0.49, False), (0, False)])
def test_a_gate_opens_at_its_threshold(condition: float, is_open: bool) -> None:
    then = Fixed(Score(0.7, {"x": 2.0}))
    score = Gate(Fixed(condition), then, at_least=0.5, closed=-1.0, name="ready")(EVIDENCE)
    assert score.value == (0.7 if is_open else -1.0)
    assert score.parts == ({"ready": condition, "x": 2.0} if is_open else {"ready": condition})
    assert then.calls == is_open


def test_a_closed_gate_says_why() -> None:
    score = Gate("format", Fixed(1.0), name="format")(NO_BOX)
    assert score.note == "format is closed: 0 boxes in the final answer"
    assert score.parts["format/box"] == 0.0


def test_a_rubric_is_a_weighted_sum_behind_gates() -> None:
    rubric = Rubric(
        {"correct": ("numeric", 1.0), "style": (Fixed(0.5), 0.2)}, gates={"format": "format"}, closed=-0.5
    )
    score = rubric(EVIDENCE)
    assert score.value == pytest.approx(1.1)
    assert {"format", "format/box", "correct", "style"} <= set(score.parts)
    assert rubric(NO_BOX).value == -0.5


def test_the_first_closed_gate_of_a_rubric_decides() -> None:
    second, part = Fixed(1.0), Fixed(1.0)
    rubric = Rubric({"part": (part, 1.0)}, gates={"first": Fixed(0.0), "second": second})
    assert rubric(EVIDENCE) == Score(0.0, {"first": 0.0}, "first is closed")
    assert (second.calls, part.calls) == (0, 0)


def test_a_name_stands_for_one_thing_in_a_rubric() -> None:
    with pytest.raises(BadConfig, match="'a'"):
        Rubric({"a": (Fixed(1.0), 1.0)}, gates={"a": Fixed(1.0)})


@pytest.mark.parametrize("error", [WorldError("gone"), ZeroDivisionError("bug")])
def test_what_a_reward_raises_is_never_a_score(error: Exception) -> None:
    for reward in (
        Rubric({"a": (raising(error), 1.0)}),
        Rubric({"a": (Fixed(1.0), 1.0)}, gates={"b": raising(error)}),
    ):
        with pytest.raises(type(error)):
            reward(EVIDENCE)


def test_a_rubric_survives_pickling_and_is_a_reward_of_its_own() -> None:
    rubric = Rubric({"correct": ("numeric", 1.0)}, gates={"format": "format"})
    assert make_reward(pickle.loads(pickle.dumps(rubric)))(EVIDENCE) == rubric(EVIDENCE)
