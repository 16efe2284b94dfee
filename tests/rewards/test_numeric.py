import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentrl
from agentrl.errors import BadConfig, BadData
from agentrl.reward import Evidence, Reward
from agentrl.rewards.numeric import parse_number
from agentrl.types import Message, Score, Task


def score(said: str, truth: Any, reward: Reward | None = None) -> Score:
    task = Task(id="t", prompt=(Message("user", "?"),), truth={"answer": truth})
    result = (reward or agentrl.make_reward("numeric"))(
        Evidence(task, (*task.prompt, Message("assistant", said)))
    )
    assert isinstance(result, Score)
    return result


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("-18", -18),
        ("+3", 3),
        ("\N{MINUS SIGN}3", -3),
        ("1,234,567", 1_234_567),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("18.", 18),
        ("2.5e3", 2500),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\dfrac{1}{2}", Fraction(1, 2)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"-2\, \frac{3}{4}", Fraction(-11, 4)),
        (r"1\;234\;567", 1_234_567),
        (r"-\,5\ ", -5),
        (r"\$18", 18),
        ("$1,000.50", Fraction(2001, 2)),
        ("1e400", Fraction(10**400)),
        (str(10**3000 + 1), 10**3000 + 1),
    ],
)
def test_numbers_are_read_exactly(text: str, number: Fraction) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1 2",
        r"5\ 3",
        r"1\;2",
        "1~23",
        r"1\,2345",
        r"1\frac{3}{2}",
        r"1.5\frac{1}{2}",
        "2+2",
        "3/0",
        "1/2/3",
        "12,34",
        "1,2345",
        "0x10",
        "nan",
        "inf",
        "1e",
        "--1",
        "1_000",
        "18 km",
        "50%",
    ],
)
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "text", ["1" * 1_000_000, "1e999999999", "1e-999999999", "1e" + "9" * 5000, "1/" + "3" * 5000]
)
def test_numbers_beyond_any_use_are_refused_and_never_written_out(text: str) -> None:
    assert parse_number(text) is None


@given(st.integers() | st.decimals(allow_nan=False, allow_infinity=False, places=6))
def test_every_integer_and_decimal_comes_back(number: int | Decimal) -> None:
    text = f"{number:f}" if isinstance(number, Decimal) else str(number)  # ":f" would round a large int
    assert parse_number(text) == Fraction(number)
    assert parse_number(f"{number:,f}" if isinstance(number, Decimal) else f"{number:,}") == Fraction(number)


@pytest.mark.parametrize(
    "truth", [18, "18", 18.0, "18.00", Fraction(36, 2), Decimal(18), np.int64(18), np.float32(18), "$18"]
)
def test_the_right_number_in_a_box_scores_one_whatever_type_the_truth_has(truth: Any) -> None:
    assert score(r"so \boxed{18}", truth) == Score(1.0, {"correct": 1.0})


def test_a_float_truth_means_its_shortest_decimal() -> None:
    assert score(r"\boxed{0.1}", 0.1).value == 1.0


@pytest.mark.parametrize(
    ("said", "note"),
    [
        (r"\boxed{17}", "another number"),
        ("18", "no boxed answer"),
        (r"\boxed{eighteen}", "no number"),
        (r"<think>\boxed{18}</think> done", "no boxed answer"),
        (r"\boxed{17} or \boxed{18}", "2 different answers"),
        ("".join(rf"\boxed{{{n}}}" for n in range(1000)) + r"\boxed{18}", "1000 different answers"),
    ],
)
def test_anything_else_scores_zero_and_says_why(said: str, note: str) -> None:
    wrong = score(said, 18)
    assert (wrong.value, wrong.parts) == (0.0, {"correct": 0.0})
    assert note in wrong.note


def test_the_same_value_boxed_twice_is_one_answer() -> None:
    assert score(r"\boxed{18} that is \boxed{18.0}", 18).value == 1.0


@pytest.mark.parametrize(
    ("options", "said", "value"),
    [
        ({"absolute": 0.01}, "3.15", 1.0),
        ({"absolute": 0.01}, "3.151", 0.0),
        ({"relative": 0.1}, "3.454", 1.0),
        ({"relative": 0.1}, "3.455", 0.0),
        ({"relative": 0.1, "absolute": 1}, "4.1", 1.0),
    ],
)
def test_the_larger_tolerance_decides_exactly_at_its_edge(options: Any, said: str, value: float) -> None:
    assert score(rf"\boxed{{{said}}}", "3.14", agentrl.make_reward("numeric", **options)).value == value


@pytest.mark.parametrize(
    ("said", "truth"),
    [("first 3, then 5-3.", 3), ("it costs $1,250!", 1250), ("about 2/3", "2/3"), ("it is -4", -4)],
)
def test_without_boxes_the_last_number_counts(said: str, truth: Any) -> None:
    assert score(said, truth, agentrl.make_reward("numeric", boxed=False)).value == 1.0


@pytest.mark.parametrize(
    "hostile", ["1," + "234," * 300_000, " " * 1_000_000, "$ " * 500_000, "9" * 1_000_000, "1/" * 500_000]
)
def test_a_huge_text_without_boxes_is_searched_in_time(hostile: str) -> None:
    assert score(hostile, 18, agentrl.make_reward("numeric", boxed=False)).value == 0.0


def test_only_the_last_assistant_message_counts() -> None:
    task = Task(id="t", prompt=(), truth={"answer": 1})
    messages = (Message("assistant", r"\boxed{1}"), Message("user", "sure?"), Message("assistant", "no"))
    assert agentrl.make_reward("numeric")(Evidence(task, messages)).value == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize("truth", ["eighteen", True, None, [18], float("nan"), Decimal("inf")])
def test_a_truth_that_is_no_number_is_the_datas_fault(truth: Any) -> None:
    with pytest.raises(BadData, match="'t' has the truth .* no number"):
        score(r"\boxed{18}", truth)


@pytest.mark.parametrize(
    "options", [{"absolute": -1}, {"relative": float("nan")}, {"absolute": float("inf")}]
)
def test_a_tolerance_that_makes_no_sense_is_refused(options: Any) -> None:
    with pytest.raises(BadConfig, match="tolerance"):
        agentrl.make_reward("numeric", **options)


def test_it_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(agentrl.make_reward("numeric", absolute=0.5)))
    assert score(r"\boxed{18.5}", 18, copy).value == 1.0
