"""What a step's groups say, as numbers for the log. Keys are ``stage/quantity`` and fixed for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from agentrl.advantages import is_informative
from agentrl.types import Group, Trajectory

__all__ = ["describe_groups"]


def describe_groups(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths, calls and faults of a step's episodes; means are over the valid ones.

    ``reward/*`` (the environment's units), ``group/informative`` (fraction of groups whose rewards differ),
    ``episode/*`` (turns, tokens, fractions), ``call/*`` (fractions of attempted calls), ``fault/*``
    (episodes).
    """
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    valid = [trajectory for trajectory in episodes if trajectory.valid]
    faults = Counter(trajectory.fault for trajectory in episodes if not trajectory.valid)
    described = {f"fault/{boundary}": float(count) for boundary, count in sorted(faults.items())}
    described["episode/valid"] = len(valid) / max(1, len(episodes))
    if valid:
        described |= _rewards(groups, valid) | _lengths(valid) | _calls(valid)
    return described


def _rewards(groups: Sequence[Group], valid: Sequence[Trajectory]) -> dict[str, float]:
    rewards = np.array([trajectory.reward for trajectory in valid])
    spread = [is_informative([trajectory.reward for trajectory in group.valid]) for group in groups]
    parts: dict[str, list[float]] = {}
    for trajectory in valid:
        for name, value in (trajectory.score.parts if trajectory.score else {}).items():
            parts.setdefault(name, []).append(value)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "group/informative": float(np.mean(spread)),
        **{f"reward/part/{name}": float(np.mean(values)) for name, values in sorted(parts.items())},
    }


def _lengths(valid: Sequence[Trajectory]) -> dict[str, float]:
    tokens = [sum(len(turn.completion.token_ids) for turn in trajectory.turns) for trajectory in valid]
    return {
        "episode/turns": float(np.mean([len(trajectory.turns) for trajectory in valid])),
        "episode/tokens": float(np.mean(tokens)),
        "episode/cut": float(np.mean([t.stop_reason in ("length", "context") for t in valid])),
    }


def _calls(valid: Sequence[Trajectory]) -> dict[str, float]:
    calls = [call for t in valid for message in t.messages for call in message.tool_calls]
    bad = sum(call.status != "ok" for call in calls)
    return {"call/per_episode": len(calls) / len(valid), "call/bad": bad / max(1, len(calls))}
