"""Trajectory to samples: turns are merged for as long as each prompt extends the last.

Nothing is tokenised here: a sample's ids are the prompts that the engine was given and the tokens that it
sampled, in the order in which they were. The mask is True exactly on the sampled ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from agentrl.types import Completion, Sample, Trajectory, Turn

__all__ = ["oldest_version", "to_samples"]


def to_samples(trajectory: Trajectory) -> list[Sample]:
    """One sample for each stretch of turns whose prompts extend one another, if anything was sampled in it.

    A turn's reward stands on its last sampled token. The reward of a turn that sampled nothing moves to the
    last token sampled before it in the episode, or to the first turn after it if there is none.
    """
    rewards = _earned(trajectory.turns)
    samples: list[Sample] = []
    for start, stop in _stretches(trajectory.turns):
        turns = trajectory.turns[start:stop]
        if any(len(turn.completion.token_ids) for turn in turns):
            samples.append(_merged(trajectory, turns, rewards[start:stop]))
    return samples


def oldest_version(sample: Sample) -> int:
    """The oldest adapter version that sampled one of the sample's tokens: what its staleness counts from."""
    return int(sample.versions[sample.mask].min())


def _earned(turns: Sequence[Turn]) -> list[float]:
    """The reward of each turn, (K,), once those of turns without tokens have moved."""
    earned = [0.0] * len(turns)
    bearer: int | None = None  # the last turn with tokens
    waiting = 0.0  # rewards before the first of them
    for index, turn in enumerate(turns):
        if len(turn.completion.token_ids):
            bearer = index
        if bearer is None:
            waiting += turn.reward
        else:
            earned[bearer] += waiting + turn.reward
            waiting = 0.0
    return earned


def _stretches(turns: Sequence[Turn]) -> Iterable[tuple[int, int]]:
    """[start, stop) of the turns that share one growing prompt."""
    starts = [index for index, turn in enumerate(turns) if index == 0 or not turn.extends]
    return zip(starts, [*starts[1:], len(turns)], strict=True)


def _merged(trajectory: Trajectory, turns: Sequence[Turn], rewards: Sequence[float]) -> Sample:
    parts = [_columns(turn, reward) for turn, reward in zip(turns, rewards, strict=True)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Sample(
        task_id=trajectory.task_id,
        sibling=trajectory.sibling,
        token_ids=columns["token_ids"],
        mask=columns["mask"],
        logprobs=columns["logprobs"],
        rewards=columns["rewards"],
        versions=columns["versions"],
    )


def _columns(turn: Turn, reward: float) -> dict[str, np.ndarray]:
    """The per-token fields of one turn: what was added to the prompt, then what was sampled."""
    given, said = len(turn.new_ids), len(turn.completion.token_ids)
    rewards = np.zeros(given + said, np.float32)
    if said:
        rewards[-1] = reward
    completion: Completion = turn.completion
    return {
        "token_ids": np.concatenate([turn.new_ids, completion.token_ids]),
        "mask": np.repeat([False, True], [given, said]),
        "logprobs": np.concatenate([np.zeros(given, np.float32), completion.logprobs]),
        "rewards": rewards,
        "versions": np.concatenate([np.full(given, -1, np.int32), completion.versions]),
    }
