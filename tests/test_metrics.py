"""A step's groups as numbers."""

from __future__ import annotations

import pytest

from agentrl.metrics import describe_groups
from agentrl.types import Completion, Group, Message, Score, Task, ToolCall, Trajectory, Turn


def episode(
    reward: float = 0.0,
    *,
    sibling: int = 0,
    tokens: tuple[int, ...] = (2,),
    calls: tuple[str, ...] = (),
    stop_reason: str = "answered",
    fault: str = "",
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
    )


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


def test_calls_are_counted_with_the_bad_ones() -> None:
    described = describe_groups(
        [group(episode(calls=("ok", "invalid_json", "ok")), episode(calls=("unclosed",)))]
    )
    assert (described["call/per_episode"], described["call/bad"]) == (2.0, 0.5)
    assert describe_groups([group(episode())])["call/bad"] == 0.0


def test_a_step_that_the_world_failed_altogether_has_no_means() -> None:
    assert describe_groups([group(episode(fault="engine"), episode(fault="environment"))]) == {
        "episode/valid": 0.0,
        "fault/engine": 1.0,
        "fault/environment": 1.0,
    }
