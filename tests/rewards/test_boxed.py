import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import agentrl
from agentrl.errors import BadConfig, BadData
from agentrl.reward import Evidence
from agentrl.rewards.verification import verdict
from agentrl.types import Message, Score, Task


def score(answer: str, truth: Any = "18", **options: Any) -> Score:
    """Of an answer in a box, or of a whole message with boxes in it."""
    text = answer if "\\boxed" in answer else rf"so \boxed{{{answer}}}"
    task = Task(id="t", prompt=(), truth={"answer": truth})
    result: Score = agentrl.make_reward("boxed", **options)(Evidence(task, (Message("assistant", text),)))
    return result


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("18", "18"),
        ("18", 18),
        ("0.5", 0.5),
        ("10^{22}", 1e22),
        (r"6.02 \times 10^{23}", 6.02e23),
        ("0.000025", 2.5e-05),
        ("1e5", "100000"),
        ("2.5e-7", r"2.5 \times 10^{-7}"),
        (r"\frac{1}{4000000}", r"2.5 \times 10^{-7}"),
        ("2^{-30}", r"\frac{1}{2^{30}}"),
        ("0.333333", r"\frac{1}{3}"),
        (r"1\,234", "1234"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        ("48 + 24 = 72", "72"),
        (r"10 \text{ m/s}", r"10 \text{ m/s}"),
        ("yx", "xy"),
        (r"\frac{36}{2}", "18"),
        ("1{,}000", "1000"),
        (r"\$18.00", "18"),
        (r"18 \text{ dollars}", "18"),
        (r"\dfrac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        (r"\text{Evelyn}", "Evelyn"),
        ("18.", "18"),
        (r"10 \text{ centimeters}", r"10 \text{ cm}"),
        (r"\boxed{18} which is \boxed{\frac{36}{2}}", "18"),
        (r"<think>\boxed{17}</think> \boxed{18}", "18"),
    ],
)
def test_mathematically_equal_answers_score_one(answer: str, truth: Any) -> None:
    assert score(answer, truth) == Score(1.0, {"correct": 1.0, "limit": 0.0})


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("17", "18"),
        (r"17 \text{ or } 18", "18"),
        (r"\pm 18", "18"),
        (r"[0, 100]", "18"),
        ("x > 17", "18"),
        (r"\boxed{2} no wait \boxed{18}", "18"),
        ("".join(rf"\boxed{{{n}}}" for n in range(1000)), "18"),
        (r"<think>\boxed{18}</think>", "18"),
        (r"\boxed{18", "18"),
        ("10 m", "10 cm"),
        ("0.0", r"6.02 \times 10^{-23}"),
        (r"3 \times 10^{-19}", r"1.6 \times 10^{-19}"),
        ("0.0", "e^{-20}"),
        ("0.0", r"\frac{1}{2^{30}}"),
        ("0.0000001", "0.0000003"),
        ("0.0000123", "0.000012"),
        (r"48 + \frac{48}{2}", "72"),
        (r"17 \cdot 23", "391"),
        (r"\gcd(48, 14)", "2"),
        (r"x + 1 = 73", "x = 72"),
        ("ABCD", "BDCA"),
        ("204_7", "204_5"),
        (r"5\text{ m}^3", r"5\text{ m}"),
        (r"10 \text{ m}", r"10 \text{ cm}"),
        (r"\boxed{}", "18"),
        ("(" * 20, "18"),
    ],
)
def test_anything_else_scores_zero_and_says_why(answer: str, truth: str) -> None:
    wrong = score(answer, truth)
    assert (wrong.value, wrong.parts) == (0.0, {"correct": 0.0, "limit": 0.0})
    assert wrong.note


_INTEGERS = ("18", "18.0", "18.", "-18", "0", "-0", "718", "1", "10", "999999999999", "999999999998")


@pytest.mark.parametrize("truth", _INTEGERS)
def test_integers_are_compared_without_a_worker_as_a_worker_would(
    truth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [verdict({"truth": truth, "answers": [answer]}) for answer in _INTEGERS]
    monkeypatch.setattr("agentrl.rewards.boxed.shared_pool", None)
    scores = [score(answer, truth).value for answer in _INTEGERS]
    assert scores == [float(verdict == "correct") for verdict in verdicts]
    assert 1.0 in scores
    several = score(rf"\boxed{{{truth}}} \boxed{{55}}", truth)
    assert (several.value, several.note) == (0.0, "2 different boxed answers, not all right")


@pytest.mark.parametrize("hostile", ["10^{10^{10}}", "((9!)!)!"])
def test_an_answer_built_to_stall_costs_its_budget_and_scores_the_minimum(hostile: str) -> None:
    stalled = score(hostile, "2^{40}")
    assert (stalled.value, stalled.parts) == (0.0, {"correct": 0.0, "limit": 1.0})
    assert "limit" in stalled.note
    assert score(r"\frac{36}{2}").value == 1.0


def test_an_answer_that_needs_more_memory_than_the_cap_scores_the_minimum() -> None:
    hog = score(r"2^{2^{33}}", "2^{40}", deadline_s=5.0, memory_mib=64)  # a gigabyte, asked for at once
    assert hog.value == 0.0
    assert score(r"\frac{36}{2}", deadline_s=5.0, memory_mib=64).value == 1.0


def test_hundreds_of_rewards_in_many_threads_share_two_workers_and_no_verdict_is_lost() -> None:
    def one(n: int) -> tuple[float, float]:
        if n == 7:
            return score("9^{9^{9}}", "2^{40}", deadline_s=1.5).value, 0.0
        return score(rf"\frac{{{2 * n}}}{{2}}", str(n), deadline_s=1.5).value, 1.0

    with ThreadPoolExecutor(64) as threads:
        verdicts = list(threads.map(one, range(300)))
    assert all(found == expected for found, expected in verdicts)


@pytest.mark.parametrize("truth", ["", ["18"], True, None])
def test_a_truth_that_can_not_be_read_is_the_datas_fault(truth: Any) -> None:
    with pytest.raises(BadData, match="'t' has the truth"):
        score("18", truth)


@pytest.mark.parametrize("options", [{"deadline_s": 0}, {"memory_mib": 0}, {"workers": 0}])
def test_limits_that_make_no_sense_are_refused(options: Any) -> None:
    with pytest.raises(BadConfig, match="boxed can't use"):
        agentrl.make_reward("boxed", **options)


def test_it_survives_pickling() -> None:
    reward = pickle.loads(pickle.dumps(agentrl.make_reward("boxed")))
    task = Task(id="t", prompt=(), truth={"value": "2.5"})
    assert (
        pickle.loads(pickle.dumps(agentrl.make_reward("boxed", key="value")))(
            Evidence(task, (Message("assistant", r"\boxed{\frac{5}{2}}"),))
        ).value
        == 1.0
    )
    with pytest.raises(BadData, match="'value'"):
        reward(Evidence(task, (Message("assistant", r"\boxed{2}"),)))
