import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.statistics import (
    Estimate,
    TaskCount,
    avg_at_k,
    estimate,
    paired,
    pass_at_k,
    pass_hat_k,
    report_pass,
)

T_975 = {2: 4.302653, 3: 3.182446, 9: 2.262157}  # Student's t by degrees of freedom


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(10, 3, 1, 0.3), (10, 3, 5, 0.916667), (16, 1, 8, 0.5), (8, 8, 4, 1), (8, 0, 4, 0)],
)
def test_pass_at_k_comes_out_as_fixed(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-6)


def test_pass_hat_k_comes_out_as_fixed() -> None:
    assert pass_hat_k(10, 7, 5) == pytest.approx(0.083333, abs=1e-6)


counts = st.integers(1, 7).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))  # n, c, k
)


@given(counts)
def test_pass_at_k_and_pass_hat_k_are_averages_over_every_choice_of_k_samples(
    nck: tuple[int, int, int],
) -> None:
    n, c, k = nck
    choices = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(chosen) for chosen in choices]), abs=1e-12)
    assert pass_hat_k(n, c, k) == pytest.approx(np.mean([all(chosen) for chosen in choices]), abs=1e-12)
    assert avg_at_k(n, c) == pytest.approx(pass_at_k(n, c, 1), abs=1e-12)


def test_thousands_of_samples_neither_overflow_nor_lose_a_rare_success() -> None:
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5, rel=1e-6)
    assert 0 < pass_at_k(5_000, 3, 100) < 1


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4), (0, 0, 1)])
def test_counts_that_can_not_be_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def test_the_interval_is_students_over_tasks_and_stays_in_range() -> None:
    found = estimate([0.2, 0.4, 0.6])
    assert found.value == pytest.approx(0.4)
    assert found.low == 0.0  # 0.4 - 4.302653 * 0.2 / sqrt(3) is below
    assert found.high == pytest.approx(0.4 + T_975[2] * 0.2 / math.sqrt(3), abs=1e-6)


def test_siblings_of_one_task_are_one_observation() -> None:
    per_task = np.linspace(0.3, 0.7, 10)
    error = per_task.std(ddof=1) / math.sqrt(10)
    assert estimate(per_task).high == pytest.approx(0.5 + T_975[9] * error, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.0] * 10, 0.0, 0.277533),
        ([1.0] * 10, 0.722467, 1.0),
        ([1.0], 0.206549, 1.0),
    ],
)
def test_wilsons_interval_where_every_task_says_the_same(
    values: list[float], low: float, high: float
) -> None:
    found = estimate(values)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_wilsons_interval_near_an_edge_is_at_the_effective_n() -> None:
    p, n, z = 0.97, 99, 1.959964  # effective n: p (1 - p) / SE^2, SE^2 = p (1 - p) / 99
    found = estimate([1.0] * 97 + [0.0] * 3)
    ends = np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2])  # of (p - x)^2 = z^2 x (1 - x) / n
    assert [found.low, found.high] == pytest.approx(sorted(ends), abs=1e-6)


def test_equal_tasks_away_from_the_edges_leave_no_spread() -> None:
    assert estimate([0.3] * 5) == Estimate(pytest.approx(0.3), pytest.approx(0.3), pytest.approx(0.3))


def test_returns_of_any_scale_have_no_range() -> None:
    assert estimate([-5.0, 5.0, 30.0], proportion=False).high > 30
    assert estimate([7.0], proportion=False) == Estimate(7.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="proportion=False"):
        estimate([0.5, 1.5])


@pytest.mark.parametrize("values", [[], [[0.5]], [math.nan]])
def test_values_that_are_not_one_number_per_task_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="per-task"):
        estimate(values)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_interval_holds_the_mean_and_stays_in_the_unit_range(values: list[float]) -> None:
    found = estimate(values)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


def test_a_smaller_confidence_gives_a_narrower_interval() -> None:
    values = [0.2, 0.5, 0.4, 0.6, 0.5]
    assert estimate(values, confidence=0.5).high < estimate(values).high


def test_a_pair_of_runs_is_compared_task_by_task() -> None:
    found = paired([0.0, 0.5, 1.0, 0.25], [0.5, 0.5, 1.0, 0.75])
    reach = T_975[3] * 0.288675 / 2
    assert found == Estimate(
        0.25, pytest.approx(0.25 - reach, abs=1e-5), pytest.approx(0.25 + reach, abs=1e-5)
    )


def test_a_gain_on_every_task_is_seen_through_the_spread_between_tasks() -> None:
    before = np.linspace(0, 0.8, 50)
    after = before + 0.1 + 0.02 * np.sin(np.arange(50))
    assert paired(before, after).low > 0
    assert estimate(after).low < estimate(before).high  # unpaired, it would be lost


def test_one_task_shows_no_gain() -> None:
    assert paired([0.0], [1.0]) == Estimate(1.0, -1.0, 1.0)


def test_only_the_same_tasks_can_be_paired() -> None:
    with pytest.raises(ValueError, match="2 tasks before, 1 after"):
        paired([0.1, 0.2], [0.1])


def task(valid: int, correct: int, invalid: int = 0) -> TaskCount:
    return TaskCount(task_id=f"{valid}-{correct}-{invalid}", valid=valid, correct=correct, invalid=invalid)


def test_a_report_without_invalid_samples_has_a_headline_and_equal_bounds() -> None:
    report = report_pass([task(8, 2), task(8, 6)], 1)
    assert report.headline == report.estimate == estimate([0.25, 0.75])
    assert report.best == report.worst == 0.5
    assert (report.tasks, report.short_tasks, report.invalid) == (2, (), 0.0)


def test_tasks_with_too_few_valid_samples_are_named_and_bounded() -> None:
    report = report_pass([task(8, 4), task(3, 1, invalid=5)], 4)
    assert report.short_tasks == ("3-1-5",)
    assert report.estimate == estimate([pass_at_k(8, 4, 4)])
    assert report.best == pytest.approx((pass_at_k(8, 4, 4) + pass_at_k(8, 6, 4)) / 2)
    assert report.worst == pytest.approx((pass_at_k(8, 4, 4) + pass_at_k(8, 1, 4)) / 2)


@pytest.mark.parametrize(("invalid", "has_headline"), [(2, True), (3, False)])
def test_above_two_per_cent_invalid_there_is_no_headline(invalid: int, has_headline: bool) -> None:
    report = report_pass([task(100 - invalid, 50, invalid=invalid)], 1)
    assert report.invalid == invalid / 100
    assert (report.headline is not None) == has_headline
    assert report.estimate is not None


def test_where_no_task_has_enough_valid_samples_there_is_no_estimate() -> None:
    report = report_pass([task(0, 0, invalid=4)], 4)
    assert report.estimate is None
    assert (report.worst, report.best) == (0.0, 1.0)


def test_pass_hat_k_is_reported_the_same_way() -> None:
    assert report_pass([task(10, 7)], 5, measure=pass_hat_k).worst == pytest.approx(0.083333, abs=1e-6)


def test_more_samples_than_were_drawn_can_not_be_reported() -> None:
    for counted, k in (([task(4, 1)], 5), ([], 1), ([task(4, 1)], 0)):
        with pytest.raises(ValueError, match=f"k = {k}"):
            report_pass(counted, k)


@pytest.mark.parametrize(("valid", "correct", "invalid"), [(2, 3, 0), (2, -1, 0), (2, 1, -1)])
def test_counts_of_a_task_must_fit_together(valid: int, correct: int, invalid: int) -> None:
    with pytest.raises(ValueError, match="at most valid"):
        task(valid, correct, invalid)


def test_importing_it_does_not_load_scipy_stats() -> None:
    code = "import sys, agentrl.statistics; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
