"""When a run says that it goes wrong, and when it keeps quiet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from agentrl.alarms import BEGINNING_STEPS, CALM_STEPS, RULES, Alarm, Alarms, Rule

HIGH = Rule(name="high", key="a/high", side="above", limit=0.5, steps=3, hint="lower it")
LOW = Rule(name="low", key="a/low", side="below", limit=0.1, relative=True, steps=2, hint="raise it")


def raised(rule: Rule, values: Iterable[float | None]) -> list[int]:
    """The steps, from 1, at which ``rule`` raises its alarm."""
    alarms = Alarms(rules=[rule])
    return [step for step, value in enumerate(values, 1) if alarms.watch(step, {rule.key: value})]


def named(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """The alarms of the default rules."""
    alarms = Alarms()
    return [(step, alarm.name) for step, row in enumerate(rows, 1) for alarm in alarms.watch(step, row)]


def test_an_alarm_comes_when_its_limit_was_reached_in_enough_steps_running() -> None:
    assert raised(HIGH, [0.9, 0.9, 0.1, 0.5, 0.5, 0.5]) == [6]
    assert raised(HIGH, [0.9, 0.9, 0.1] * 5) == []


def test_an_alarm_is_raised_once_until_it_was_quiet_for_a_while() -> None:
    bad, calm = [0.9] * 10, [0.1] * CALM_STEPS
    assert raised(HIGH, bad) == [3]
    assert raised(HIGH, [*bad, *calm[1:], *bad]) == [3]
    assert raised(HIGH, [*bad, *calm, *bad]) == [3, 10 + CALM_STEPS + 3]


def test_a_relative_limit_refers_to_the_mean_of_the_metrics_first_values() -> None:
    beginning = [1.0, 3.0] * BEGINNING_STEPS  # of which the first BEGINNING_STEPS count
    mean = math.fsum(beginning[:BEGINNING_STEPS]) / BEGINNING_STEPS
    just_below, just_above = 0.1 * mean * 0.99, 0.1 * mean * 1.01
    assert raised(LOW, [*beginning[:BEGINNING_STEPS], just_below, just_below]) == [BEGINNING_STEPS + 2]
    assert raised(LOW, [*beginning[:BEGINNING_STEPS], *[just_above] * 9]) == []


def test_nothing_is_compared_with_a_beginning_that_is_not_over() -> None:
    assert raised(LOW, [1.0, *[0.0] * (BEGINNING_STEPS - 1)]) == []


def test_a_step_without_the_metric_neither_raises_nor_calms() -> None:
    alarms = Alarms(rules=[HIGH])
    bad = {"a/high": 0.9}
    for step, row in enumerate([bad, {}, bad, {"b/other": 0.9}], 1):
        assert alarms.watch(step, row) == []
    assert [alarm.step for alarm in alarms.watch(5, bad)] == [5]
    for step in range(6, 30):
        assert alarms.watch(step, {}) == []
    assert alarms.watch(30, bad) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_not_finite_is_beyond_every_limit(value: float | None) -> None:
    assert raised(HIGH, [value] * 3) == [3]
    assert raised(LOW, [*[1.0] * BEGINNING_STEPS, value, value]) == [BEGINNING_STEPS + 2]
    assert raised(LOW, [value, *[1.0] * BEGINNING_STEPS, 0.0, 0.0]) == [BEGINNING_STEPS + 3]


def test_an_alarm_says_what_is_wrong_how_far_since_when_and_what_to_do() -> None:
    alarms = Alarms(rules=[HIGH])
    (alarm,) = [alarm for step in (7, 8, 9) for alarm in alarms.watch(step, {"a/high": 0.75})]
    assert alarm == Alarm(
        name="high", key="a/high", step=9, value=0.75, threshold=0.5, side="above", steps=3, hint="lower it"
    )
    assert str(alarm) == "alarm at step 9: high: a/high is 0.75, at or above 0.5 for 3 steps; next: lower it"


def test_a_resumed_run_that_is_handed_its_rows_goes_on_as_if_it_had_not_stopped() -> None:
    values = [0.9, 0.9, 0.9, 0.1, 0.1, 0.9, None, 0.9, *[0.1] * CALM_STEPS, 0.9, 0.9, 0.9]
    whole = Alarms(rules=[HIGH])
    seen = [whole.watch(step, {HIGH.key: value}) for step, value in enumerate(values, 1)]
    assert sum(map(len, seen)) == 2
    for cut in range(len(values)):
        rows = [{"phase": "train", "step": step, HIGH.key: v} for step, v in enumerate(values[:cut], 1)]
        past = json.loads(json.dumps(rows))
        resumed = Alarms(past, rules=[HIGH])
        assert [
            resumed.watch(step, {HIGH.key: values[step - 1]}) for step in range(cut + 1, len(values) + 1)
        ] == (seen[cut:])


def test_rows_of_other_phases_are_not_watched() -> None:
    past = [{"phase": "warm_start", "step": step, HIGH.key: 0.9} for step in range(9)]
    alarms = Alarms(past, rules=[HIGH])
    assert alarms.watch(1, {HIGH.key: 0.9}) == []


def test_a_rule_that_could_never_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        Rule(name="never", key="a/b", side="above", limit=0.0, steps=0, hint="")


# -- the default rules --

# A step of a healthy run, and what a policy is like that got lost.
HEALTHY: dict[str, float] = {
    "episode/valid": 1.0,
    "group/informative": 0.8,
    "episode/cut": 0.02,
    "episode/repeated": 0.0,
    "call/bad": 0.1,
    "loss/entropy": 0.1,
    "loss/policy_kl": 0.002,
    "loss/kl": 0.05,
    "loss/clip_fraction": 0.01,
    "mismatch/kl": 1e-12,
}


def test_learning_makes_a_policy_sure_and_groups_alike_without_an_alarm() -> None:
    rows = [
        HEALTHY
        | {
            "loss/entropy": 0.1 * 0.985**step,  # to a tenth
            "group/informative": max(0.0, 0.9 - step / 150),
            "loss/policy_kl": 0.03 if step % 20 == 7 else 0.002,  # single peaks
            "episode/cut": 0.4 if step % 10 == 3 else 0.02,
        }
        for step in range(130)
    ]
    assert named(rows) == []


@pytest.mark.parametrize(
    ("name", "key", "value", "steps"),
    [
        ("entropy collapses", "loss/entropy", 0.004, 5),
        ("entropy explodes", "loss/entropy", 0.4, 3),
        ("no reward spread", "group/informative", 0.0, 5),
        ("the policy jumps", "loss/policy_kl", 0.08, 1),
        ("the policy is far from its reference", "loss/kl", 2.0, 5),
        ("too much is clipped", "loss/clip_fraction", 0.2, 3),
        ("episodes end at the token limit", "episode/cut", 0.6, 5),
        ("texts repeat themselves", "episode/repeated", 0.3, 3),
        ("calls are malformed", "call/bad", 0.9, 5),
        ("engine and learner disagree", "mismatch/kl", 0.05, 3),
        ("the world fails", "episode/valid", 0.7, 3),
    ],
)
def test_each_collapse_raises_its_own_alarm_and_no_other(
    name: str, key: str, value: float, steps: int
) -> None:
    before = [HEALTHY] * BEGINNING_STEPS
    assert named([*before, *[HEALTHY | {key: value}] * 20]) == [(BEGINNING_STEPS + steps, name)]


def test_a_policy_without_any_entropy_is_told_apart_from_one_that_became_sure() -> None:
    names = [name for _, name in named([HEALTHY] * 5 + [HEALTHY | {"loss/entropy": 1e-5}] * 5)]
    assert names == ["entropy collapses", "entropy is almost zero"]


def test_a_run_that_gets_lost_and_is_no_longer_updated_keeps_its_alarms() -> None:
    lost = {key: value for key, value in HEALTHY.items() if not key.startswith(("loss/", "mismatch/"))}
    lost |= {"group/informative": 0.0, "episode/cut": 0.5, "call/bad": 1.0}
    rows = [HEALTHY] * 10 + [HEALTHY | {"loss/policy_kl": 0.07}] + [lost] * 30
    assert named(rows) == [
        (11, "the policy jumps"),
        (16, "no reward spread"),
        (16, "episodes end at the token limit"),
        (16, "calls are malformed"),
    ]


def test_every_rule_has_a_name_of_its_own_and_a_hint() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.hint for rule in RULES)
