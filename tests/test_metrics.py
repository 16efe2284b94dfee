"""A step's groups as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from agentrl.metrics import describe_groups, describe_rollout, describe_staleness, repetition
from agentrl.types import Completion, Fault, Group, Message, Score, Task, ToolCall, Trajectory, Turn


def episode(
    reward: float = 0.0,
    *,
    sibling: int = 0,
    tokens: tuple[int, ...] = (2,),
    calls: tuple[str, ...] = (),
    stop_reason: str = "answered",
    fault: str = "",
    healed: tuple[str, ...] = (),
    ends: Mapping[str, int] | None = None,
    timings: Mapping[str, float] | None = None,
) -> Trajectory:
    """``tokens`` sampled in each turn; the reward comes with the last."""
    made = tuple(
        ToolCall(id=str(index), name="add", arguments={}, status=status)  # type: ignore[arg-type]
        for index, status in enumerate(calls)
    )
    turns = tuple(
        Turn(
            [1],
            Completion([5] * count, [0.0] * count, [0] * count, "stop"),
            reward=reward * (at == len(tokens)),
        )
        for at, count in enumerate(tokens, 1)
    )
    return Trajectory(
        task_id="t",
        sibling=sibling,
        seed=0,
        turns=() if fault else turns,
        messages=(Message("user", "?"), Message("assistant", "!", made)),
        stop_reason="fault" if fault else stop_reason,
        score=None if fault else Score(reward, {"correct": reward}),
        valid=not fault,
        fault=fault,
        faults=tuple(Fault(boundary, "gone") for boundary in (*healed, *([fault] if fault else []))),
        calls=ends or {},
        timings=timings or {},
    )


def saying(*turns: Sequence[int]) -> Trajectory:
    """An episode in which exactly these tokens are sampled, turn by turn."""
    said = tuple(Turn([1], Completion(ids, [0.0] * len(ids), [0] * len(ids), "stop")) for ids in turns)
    return dataclasses.replace(episode(), turns=said)


def group(*episodes: Trajectory) -> Group:
    return Group(Task(id="t", prompt=()), episodes)


def test_means_are_over_the_valid_episodes() -> None:
    described = describe_groups(
        [
            group(episode(1.0, tokens=(3, 5)), episode(0.0, stop_reason="length")),
            group(episode(0.5, stop_reason="context"), episode(fault="engine")),
        ]
    )
    assert described["reward/mean"] == described["reward/part/correct"] == pytest.approx(0.5)
    assert described["episode/valid"] == 0.75
    assert described["episode/turns"] == pytest.approx(4 / 3)
    assert described["episode/tokens"] == pytest.approx((8 + 2 + 2) / 3)
    assert described["episode/cut"] == pytest.approx(2 / 3)
    assert described["fault/engine"] == 1.0


def test_signs_of_cheating_are_counted_apart_from_the_reward() -> None:
    signs = [
        {"hack_flags": 2.0, "passed": 0.0},
        {"code": 0.0, "code/hack_flags": 1.0, "then/hack_flags": 1.0},
    ]
    cheats = [dataclasses.replace(episode(), score=Score(0.0, parts)) for parts in (*signs, {"passed": 1.0})]
    described = describe_groups([group(*cheats)])
    assert described["sandbox/hack_flags"] == 2.0  # of the two that were watched
    assert {key for key in described if key.startswith("reward/part/")} == {
        "reward/part/code",
        "reward/part/passed",
    }
    assert "sandbox/hack_flags" not in describe_groups([group(episode())])


def test_groups_whose_valid_rewards_agree_are_not_informative() -> None:
    described = describe_groups(
        [
            group(episode(1.0), episode(0.0)),
            group(episode(1.0), episode(1.0)),
            group(episode(1.0), episode(fault="environment")),
            group(episode(fault="environment"), episode(fault="environment")),
        ]
    )
    assert described["group/informative"] == 0.25
    assert described["fault/environment"] == 3.0


def test_episodes_without_siblings_have_no_spread() -> None:
    described = describe_groups([group(episode(1.0)), group(episode(0.0))])
    assert not {key for key in described if key.startswith("group/")}
    assert described["reward/std"] == 0.5


def test_calls_are_counted_with_the_bad_ones() -> None:
    described = describe_groups(
        [group(episode(calls=("ok", "invalid_json", "ok")), episode(calls=("unclosed",)))]
    )
    assert (described["call/per_episode"], described["call/bad"]) == (2.0, 0.5)
    assert describe_groups([group(episode())])["call/bad"] == 0.0


def test_a_step_that_the_world_failed_altogether_has_no_means() -> None:
    described = describe_groups([group(episode(fault="engine"), episode(fault="environment"))])
    assert described["episode/valid"] == 0.0
    assert {key for key in described if not key.startswith(("fault/", "tool/"))} == {"episode/valid"}


def test_every_fault_is_counted_by_its_boundary_also_those_that_a_retry_healed() -> None:
    described = describe_groups(
        [group(episode(1.0, healed=("tool", "worker")), episode(fault="tool", healed=("engine",)))]
    )
    assert {key: value for key, value in described.items() if key.startswith("fault/")} == {
        "fault/tool": 2.0,
        "fault/environment": 0.0,
        "fault/reward": 0.0,
        "fault/worker": 1.0,
        "fault/sandbox": 0.0,
        "fault/engine": 1.0,
        "fault/retried": 3.0,
    }


def test_calls_that_ended_badly_are_counted_over_all_attempts() -> None:
    described = describe_groups(
        [group(episode(ends={"error": 2, "late": 1}), episode(fault="engine", ends={"error": 1}))]
    )
    assert (described["tool/error"], described["tool/late"], described["tool/cut"]) == (3.0, 1.0, 0.0)


def test_extremes_stand_beside_the_means() -> None:
    described = describe_groups(
        [group(episode(1.0, tokens=(3, 5)), episode(-2.0)), group(episode(0.5, tokens=(1, 1, 1)))]
    )
    assert (described["reward/min"], described["reward/max"]) == (-2.0, 1.0)
    assert (described["episode/tokens_min"], described["episode/tokens_max"]) == (2.0, 8.0)
    assert (described["episode/turns"], described["episode/turns_max"]) == (2.0, 3.0)


def test_the_spread_within_groups_is_not_the_spread_between_them() -> None:
    apart = [group(episode(1.0), episode(1.0)), group(episode(0.0), episode(0.0))]
    within = [group(episode(1.0), episode(0.0)), group(episode(fault="engine"))]
    assert (describe_groups(apart)["reward/std"], describe_groups(apart)["group/reward_std"]) == (0.5, 0.0)
    assert describe_groups(within)["group/reward_std"] == 0.5  # a group without valid episodes has none


def test_endings_are_shares_of_the_valid_episodes() -> None:
    described = describe_groups(
        [
            group(
                *(episode(stop_reason=reason) for reason in ("answered", "answered", "length", "turns")),
                episode(fault="engine"),
            )
        ]
    )
    stops = {key: value for key, value in described.items() if key.startswith("stop/")}
    assert stops == {"stop/answered": 0.5, "stop/length": 0.25, "stop/turns": 0.25}


def test_bad_calls_are_told_apart_by_their_status() -> None:
    described = describe_groups(
        [
            group(
                episode(calls=("ok", "invalid_json", "ok", "unknown_tool")), episode(), episode(calls=("ok",))
            )
        ]
    )
    calls = {key: value for key, value in described.items() if key.startswith("call/")}
    assert calls == {
        "call/per_episode": pytest.approx(5 / 3),
        "call/episodes": pytest.approx(2 / 3),
        "call/bad": 0.4,
        "call/bad/invalid_json": 0.2,
        "call/bad/unknown_tool": 0.2,
    }


def test_repetition_is_the_share_of_windows_that_stood_there_before() -> None:
    assert repetition(saying(range(40))) == 0.0
    assert repetition(saying([*range(20), *range(20)])) == pytest.approx(13 / 33)  # of 33 windows, 20 differ
    assert repetition(saying([7] * 107)) == pytest.approx(99 / 100)
    assert repetition(saying([1, 2, 3] * 40)) == pytest.approx(110 / 113)


def test_a_short_answer_of_equal_tokens_repeats_nothing() -> None:
    assert repetition(saying([7] * 22)) == 0.0  # 15 windows
    assert repetition(saying([7] * 23)) > 0.9
    assert repetition(saying([], [7])) == 0.0


def test_saying_the_same_in_another_turn_is_no_repetition() -> None:
    assert repetition(saying(range(30), range(30), range(30))) == 0.0


def test_repetition_agrees_with_counting_windows_one_by_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        turns = [generator.integers(0, 2, size=generator.integers(1, 300)).tolist() for _ in range(3)]
        windows = [[tuple(ids[at : at + 8]) for at in range(len(ids) - 7)] for ids in turns]
        total, distinct = sum(map(len, windows)), sum(len(set(found)) for found in windows)
        expected = 1 - distinct / total if total >= 16 else 0.0
        assert repetition(saying(*turns)) == pytest.approx(expected)


def test_an_episode_repeats_itself_when_more_than_half_of_it_does() -> None:
    looping, plain = saying([1, 2, 3] * 40), saying(range(40))
    assert describe_groups([group(looping, plain, plain, plain)])["episode/repeated"] == 0.25


def test_a_rollouts_seconds_are_told_by_where_they_went() -> None:
    groups = [
        group(
            episode(tokens=(30, 10), timings={"engine": 1.0, "env": 3.0}),
            episode(tokens=(20,), timings={"engine": 2.0, "env": 0.0}),
        ),
        group(episode(fault="engine")),
    ]
    assert describe_rollout(groups, waited_s=4.0, rolled_s=4.0) == {
        "time/rollout_s": 4.0,
        "time/rollout_tokens_per_s": 15.0,
        "time/episode_engine_s": 1.5,
        "time/episode_env_s": 1.5,
        "time/episode_max_s": 4.0,
    }


def test_the_speed_of_rollouts_that_ran_ahead_is_that_of_their_own_seconds() -> None:
    described = describe_rollout([group(episode(tokens=(60,)))], waited_s=0.5, rolled_s=4.0)
    assert (described["time/rollout_s"], described["time/rollout_tokens_per_s"]) == (0.5, 15.0)


def test_stale_samples_are_counted_and_those_beyond_the_bound_are_dropped() -> None:
    assert describe_staleness([0, 2, 3, 1, 3], most=2) == {
        "staleness/mean": 1.8,
        "staleness/max": 3.0,
        "staleness/dropped": 2.0,
    }
    assert set(describe_staleness([], most=0).values()) == {0.0}


def test_a_rollout_in_which_nothing_was_said_has_no_speed() -> None:
    assert describe_rollout([group(episode(fault="engine"))], waited_s=2.0, rolled_s=2.0) == {
        "time/rollout_s": 2.0,
        "time/rollout_tokens_per_s": 0.0,
    }
