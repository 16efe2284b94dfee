"""What the verifier tells apart by the text alone, before any mathematics."""

from __future__ import annotations

import time

import pytest

from agentrl.rewards.verification import may_equal, readable, same_word


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r"1\,234\;567", "1234567"),
        ("1 234", "1234"),
        (r"48\,24", r"48\,24"),
        ("1e5", "100000"),
        ("2.5e-05", "0.000025"),
        (r"-6.02 \times 10^{-3}", "-0.00602"),
        ("2e3x", "2e3x"),
        ("18.", "18"),
    ],
)
def test_numbers_are_rewritten_as_math_verify_reads_them_right(text: str, read: str) -> None:
    assert readable(text) == read


@pytest.mark.parametrize(
    "answer",
    [
        "72",
        "+72",
        "-1,234.5",
        "1{,}234",
        r"\$72.00",
        r"72\%",
        r"72^\circ",
        r"72^{\circ}",
        r"72 \text{ cm}^2",
        r"72 \text{ m/s}",
        "72 apples",
        r"72 \text{ (exactly)}",
        r"\frac{144}{2}",
        r"\frac{-3}{4}",
        r"\dfrac34",
        "3/4",
        "3:4",
        r"1\frac{3}{4}",
        r"7.2 \times 10^{1}",
        "10^{-3}",
        r"\frac{1}{10^{3}}",
        "x = 72",
        "f(x) = 72",
        r"\left(72\right)",
        r"\{72\}",
        r"\mathbf{72}",
        "48 + 24 = 72",
        r"\infty",
        "72, 73",
        "[72, 73)",
        r"(-\infty, 2) \cup (3, \infty)",
        r"x \in [-2, 7]",
        r"x = 1 \text{ or } x = -2",
    ],
)
def test_a_number_that_is_written_out_may_equal_a_number(answer: str) -> None:
    assert may_equal("72", answer)


@pytest.mark.parametrize(
    "answer",
    [
        r"48 + \frac{48}{2}",
        "48-24",
        "--5",
        r"17 \cdot 23",
        "17*23",
        "(17)(23)",
        "48 24",
        r"48\,24",
        r"48\frac{48}{2}",
        r"\frac{17 \cdot 2}{3}",
        r"\gcd(48, 14)",
        r"\lfloor 5.5 \rfloor",
        r"\sum_{i=1}^{10} i",
        "5!",
        r"\binom{10}{3}",
        r"\sqrt{9}",
        "2^{10}",
        "|-5|",
        r"7 \mod 3",
        r"32^{1026} - 906\lfloor \frac{32^{1026}}{906} \rfloor",
        "72 = 48 + 24",
        r"48 + 24 \approx 0",
        "3e^2",
        r"3\mathrm{e}^{2}",
        "(3, 48 + 24)",
        "",
    ],
)
def test_an_expression_can_not_equal_a_number(answer: str) -> None:
    assert not may_equal("72", answer)


@pytest.mark.parametrize("truth", [r"3\sqrt{13}", "2^{10}", "2k", "x^2 + 1", "p - q", "y = 2x", r"\pi"])
def test_a_truth_that_is_an_expression_restricts_nothing(truth: str) -> None:
    assert may_equal(truth, r"2 \cdot 3 + \sqrt{9}")


def test_an_equation_is_answered_by_a_name_and_a_number() -> None:
    assert may_equal("x = 5", "5")
    assert may_equal("x = 5", "(x = 5)")
    assert not may_equal("x = 5", "2x + 1 = 11")
    assert not may_equal("x = 5", "x = 2 + 3")


def test_a_matrix_of_numbers_is_written_out() -> None:
    truth = r"\begin{pmatrix} 1 \\ 72 \end{pmatrix}"
    assert may_equal(truth, r"\begin{pmatrix} 1 \\ 72 \end{pmatrix}")
    assert may_equal(truth, r"x = \begin{bmatrix} 1 \\ 72 \\ \end{bmatrix}")
    assert not may_equal(truth, r"\begin{pmatrix} 1 \\ 48 + 24 \end{pmatrix}")


@pytest.mark.parametrize("answer", ["ABCD", "A B C D", r"B \cdot D \cdot C \cdot A", "BDC"])
def test_the_letters_of_a_word_do_not_commute(answer: str) -> None:
    assert not may_equal("BDCA", answer)


@pytest.mark.parametrize("answer", ["BDCA", r"\text{BDCA}", "bdca", "(BDCA)", r"\text{Answer} = \text{BDCA}"])
def test_a_word_is_the_same_in_any_dress(answer: str) -> None:
    assert same_word(r"\text{BDCA}", answer)


def test_two_or_three_small_letters_are_a_product() -> None:
    assert may_equal("xy", "yx")
    assert not may_equal(r"\text{xy}", "yx")


@pytest.mark.parametrize(
    ("truth", "answer", "may"),
    [
        ("204_5", "204_{5}", True),
        ("204_5", "204", True),
        ("204_5", "204_7", False),
        (r"5\text{ m}", "5", True),
        (r"5\text{ m}", "5 meters", True),
        (r"5\text{ m}", r"5\text{ m}^3", False),
        (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}", True),
        (r"15\mbox{ cm}^2", r"15 \text{ cm}^{2}", True),
        (r"15\mbox{ cm}^2", r"15 \text{ cm}^3", False),
        (r"10 \text{ m/s}", r"10 \text{ meters per second}", True),
        (r"10 \text{ m/s}", r"10 \text{ m}", False),
        (r"5 \text{ dollars}", r"\$5 \text{ per hour}", True),
        ("10 cm", "10 m", False),
    ],
)
def test_bases_and_units_are_compared_where_both_name_one(truth: str, answer: str, may: bool) -> None:
    assert may_equal(truth, answer) is may


@pytest.mark.parametrize("truth", ["72", "(3, 4)", "x = 5", "BDCA", r"5 \text{ m}", "204_5"])
@pytest.mark.parametrize(
    "piece", [" ", "1 ", "1,", "$ ", "m^2 ", r"\frac{", r"\text{", "e", "x=", "10^{", "1_"]
)
def test_hostile_answers_take_one_pass(truth: str, piece: str) -> None:
    hostile = f"72{piece * (64_000 // len(piece))}!"
    began = time.perf_counter()
    may_equal(truth, readable(hostile))
    assert time.perf_counter() - began < 2.0
