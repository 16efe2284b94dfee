"""What a step's groups say, as numbers for the log. Keys are ``stage/quantity`` and fixed for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from agentrl.advantages import is_informative
from agentrl.faults import BOUNDARIES, CALL_ENDS
from agentrl.types import Group, IntArray, Trajectory

__all__ = ["describe_groups", "describe_rollout", "describe_staleness", "repetition"]

_NGRAM = 8  # tokens: longer than what separate calls or sums share by chance, shorter than most loops
_FEWEST_WINDOWS = 16  # of an episode that can repeat itself: "000000" may be an answer
_REPEATED = 0.5  # share of windows from which an episode counts as repeating itself
# Odd and mixed powers modulo 2^64: a window's code is one number, and two windows share it by accident with a
# probability of about 2^-64.
_POWERS = np.uint64(0x9E3779B97F4A7C15) ** np.arange(_NGRAM, dtype=np.uint64)


def describe_groups(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths, endings, calls and faults of a step's episodes; means are over the valid ones, and
    ``fault/*`` and ``tool/*`` count over all attempts at all episodes.

    ``reward/*`` (the environment's units), ``sandbox/hack_flags`` (an episode's parts of that name, summed),
    ``group/*`` (fraction of groups whose rewards differ, standard deviation within groups), ``episode/*``
    (turns, sampled tokens, fractions), ``stop/*`` (fractions of episodes), ``call/*`` (fractions of attempted
    calls), ``tool/*`` (calls that a ToolError ended, that the deadline ended, whose result was cut),
    ``fault/<boundary>`` (failures of the world, those that a retry healed included), ``fault/retried`` (how
    many of these were healed or tried again).
    """
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    valid = [trajectory for trajectory in episodes if trajectory.valid]
    described = _faults(episodes) | {"episode/valid": len(valid) / max(1, len(episodes))}
    if valid:
        described |= _rewards(groups, valid) | _lengths(valid) | _endings(valid) | _calls(valid)
    return described


def _faults(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Counts over all attempts, each key in every step."""
    faults = Counter(fault.boundary for trajectory in episodes for fault in trajectory.faults)
    lost = sum(not trajectory.valid for trajectory in episodes)  # their last fault was the end
    calls = {end: sum(trajectory.calls.get(end, 0) for trajectory in episodes) for end in CALL_ENDS}
    return {
        **{f"fault/{boundary}": float(faults[boundary]) for boundary in BOUNDARIES},
        "fault/retried": float(faults.total() - lost),
        **{f"tool/{end}": float(count) for end, count in calls.items()},
    }


def describe_staleness(behind: Sequence[int], *, most: int) -> dict[str, float]:
    """``staleness/*`` of a step's samples: ``behind``, for each, how many versions before the one that is
    trained its oldest token was sampled; those above ``most`` are dropped."""
    return {
        "staleness/mean": float(np.mean(behind)) if behind else 0.0,
        "staleness/max": float(max(behind, default=0)),
        "staleness/dropped": float(sum(versions > most for versions in behind)),
    }


def describe_rollout(groups: Sequence[Group], *, waited_s: float, rolled_s: float) -> dict[str, float]:
    """Where a step's rollouts took ``time/*``, in seconds.

    ``waited_s`` is how long the update waited for them, ``rolled_s`` how long they took, from the beginning
    of the first episode to the end of the last: more than that where they ran ahead of the update.
    """
    episodes = [trajectory for group in groups for trajectory in group.trajectories if trajectory.turns]
    described = {
        "time/rollout_s": waited_s,
        "time/rollout_tokens_per_s": float(_tokens(episodes).sum()) / max(rolled_s, 1e-9),
    }
    if episodes:
        stages = sorted({stage for trajectory in episodes for stage in trajectory.timings})
        for stage in stages:
            spent = [trajectory.timings.get(stage, 0.0) for trajectory in episodes]
            described[f"time/episode_{stage}_s"] = float(np.mean(spent))
        # What the environment reports of itself is part of "env".
        whole = [t.timings.get("engine", 0.0) + t.timings.get("env", 0.0) for t in episodes]
        described["time/episode_max_s"] = max(whole)
    return described


def repetition(trajectory: Trajectory) -> float:
    """The share of an episode's 8-token windows that stood earlier in the same turn, in [0, 1].

    ``1 - distinct / all``, both summed over the turns; 0 for fewer than 16 windows. Turns are compared with
    themselves alone, because a tool may rightly be called again.
    """
    windows = repeated = 0
    for turn in trajectory.turns:
        codes = _window_codes(turn.completion.token_ids)
        windows += len(codes)
        repeated += len(codes) - len(np.unique(codes))
    return repeated / windows if windows >= _FEWEST_WINDOWS else 0.0


def _window_codes(token_ids: IntArray) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A number for each window of the turn, (C - 7,), equal where the windows are."""
    if len(token_ids) < _NGRAM:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(token_ids.astype(np.uint64), _NGRAM)
    codes: np.ndarray[tuple[int], np.dtype[np.uint64]] = windows @ _POWERS
    return codes


def _rewards(groups: Sequence[Group], valid: Sequence[Trajectory]) -> dict[str, float]:
    rewards = np.array([trajectory.reward for trajectory in valid])
    parts: dict[str, list[float]] = {}
    flags: list[float] = []
    for trajectory in valid:
        scored = trajectory.score.parts if trajectory.score else {}
        signs = [value for name, value in scored.items() if _is_flag(name)]
        flags += [sum(signs)] if signs else []
        for name, value in scored.items():
            if not _is_flag(name):
                parts.setdefault(name, []).append(value)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        **_spread(groups),
        **{f"reward/part/{name}": float(np.mean(values)) for name, values in sorted(parts.items())},
        **({"sandbox/hack_flags": float(np.mean(flags))} if flags else {}),
    }


def _spread(groups: Sequence[Group]) -> dict[str, float]:
    """How the returns of siblings differ; nothing where no episode was to have one."""
    if all(len(group.trajectories) == 1 for group in groups):
        return {}
    siblings = [[trajectory.reward for trajectory in group.valid] for group in groups]
    return {
        "group/informative": float(np.mean([is_informative(returns) for returns in siblings])),
        "group/reward_std": float(np.mean([np.std(returns) for returns in siblings if returns])),
    }


def _is_flag(name: str) -> bool:
    """A part that counts what looked like cheating, also where a rubric put its name before it."""
    return name.rpartition("/")[2] == "hack_flags"


def _lengths(valid: Sequence[Trajectory]) -> dict[str, float]:
    tokens = _tokens(valid)
    turns = np.array([len(trajectory.turns) for trajectory in valid])
    return {
        "episode/turns": float(turns.mean()),
        "episode/turns_max": float(turns.max()),
        "episode/tokens": float(tokens.mean()),
        "episode/tokens_min": float(tokens.min()),
        "episode/tokens_max": float(tokens.max()),
        "episode/repeated": float(np.mean([repetition(trajectory) > _REPEATED for trajectory in valid])),
    }


def _tokens(episodes: Sequence[Trajectory]) -> IntArray:
    """Sampled tokens of each episode, (episodes,)."""
    return np.array([sum(len(turn.completion.token_ids) for turn in t.turns) for t in episodes], np.int32)


def _endings(valid: Sequence[Trajectory]) -> dict[str, float]:
    reasons = Counter(trajectory.stop_reason for trajectory in valid)
    return {
        "episode/cut": (reasons["length"] + reasons["context"]) / len(valid),
        **{f"stop/{reason}": count / len(valid) for reason, count in sorted(reasons.items()) if reason},
    }


def _calls(valid: Sequence[Trajectory]) -> dict[str, float]:
    calls = [[call for message in t.messages for call in message.tool_calls] for t in valid]
    statuses = Counter(call.status for made in calls for call in made)
    attempted = statuses.total()
    bad = {status: count for status, count in sorted(statuses.items()) if status != "ok"}
    return {
        "call/per_episode": attempted / len(valid),
        "call/episodes": float(np.mean([bool(made) for made in calls])),
        "call/bad": sum(bad.values()) / max(1, attempted),
        **{f"call/bad/{status}": count / attempted for status, count in bad.items()},
    }
