"""Trajectories to samples: the ids are the engine's, the mask is the sampler's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agentrl.samples import oldest_version, to_samples
from agentrl.types import Completion, IntArray, Score, Trajectory, Turn


def ids(values: Sequence[int]) -> IntArray:
    return np.array(values, np.int32)


def turn(given_ids: Sequence[int], said: Sequence[int], *, reward: float = 0.0, extends: bool = True) -> Turn:
    logprobs = [-0.25 * (1 + index) for index in range(len(said))]
    completion = Completion(ids(said), np.array(logprobs, np.float32), ids([3] * len(said)), "stop")
    return Turn(ids(given_ids), completion, reward, extends)


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(
        task_id="t", sibling=2, seed=0, turns=turns, messages=(), stop_reason="answered", score=Score(1.0)
    )


def test_a_samples_oldest_version_is_that_of_its_oldest_sampled_token() -> None:
    versions = ([5, 5], [6, 7], [4])
    turns = [
        Turn(ids([1]), Completion(ids([2] * len(each)), np.zeros(len(each)), ids(each), "stop"))
        for each in versions
    ]
    (whole,), (later,) = to_samples(trajectory(*turns)), to_samples(trajectory(turns[1]))
    assert (oldest_version(whole), oldest_version(later)) == (4, 6)


IDS = st.lists(st.integers(0, 999), max_size=4)
TURNS = st.builds(turn, IDS, IDS, reward=st.sampled_from([0.0, 0.5, -1.0, 2.0]), extends=st.booleans())
EPISODES = st.builds(
    lambda first, rest: trajectory(first, *rest),
    st.builds(turn, IDS.filter(bool), IDS, reward=st.sampled_from([0.0, 0.25])),
    st.lists(TURNS.filter(lambda t: t.extends or len(t.new_ids) > 0), max_size=6),
)


def stretches(episode: Trajectory) -> list[range]:
    """The turns of each prompt that only grew, if anything was sampled in them."""
    starts = [k for k, t in enumerate(episode.turns) if k == 0 or not t.extends]
    found = [range(a, b) for a, b in zip(starts, [*starts[1:], len(episode.turns)], strict=True)]
    return [turns for turns in found if any(len(episode.turns[k].completion.token_ids) for k in turns)]


@given(episode=EPISODES)
def test_a_sample_is_what_the_engine_saw_and_said_last(episode: Trajectory) -> None:
    expected = [
        [*episode.prompt_ids(turns[-1]), *episode.turns[turns[-1]].completion.token_ids]
        for turns in stretches(episode)
    ]
    assert [sample.token_ids.tolist() for sample in to_samples(episode)] == expected


@given(episode=EPISODES)
def test_the_mask_is_true_exactly_on_sampled_tokens(episode: Trajectory) -> None:
    for sample, turns in zip(to_samples(episode), stretches(episode), strict=True):
        said = [episode.turns[k].completion for k in turns]
        assert sample.token_ids[sample.mask].tolist() == [i for c in said for i in c.token_ids]
        assert sample.logprobs[sample.mask].tolist() == [x for c in said for x in c.logprobs]
        for k in turns:  # each completion lies right after the prompt that it was sampled from
            start = len(episode.prompt_ids(k))
            stop = start + len(episode.turns[k].completion.token_ids)
            assert sample.mask[start:stop].all()
        assert (sample.versions[sample.mask] == 3).all()
        assert (sample.versions[~sample.mask] == -1).all()
        assert not sample.logprobs[~sample.mask].any()


@given(episode=EPISODES)
def test_no_reward_is_lost_and_all_of_it_is_on_sampled_tokens(episode: Trajectory) -> None:
    samples = to_samples(episode)
    for sample in samples:
        assert not sample.rewards[~sample.mask].any()
    if samples:
        assert math.fsum(float(sample.rewards.sum()) for sample in samples) == episode.reward


def test_turns_that_extend_are_one_sample() -> None:
    (sample,) = to_samples(trajectory(turn([1, 2], [3, 4], reward=0.5), turn([5], [6], reward=1.0)))
    assert sample.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert sample.mask.tolist() == [False, False, True, True, False, True]
    assert sample.rewards.tolist() == [0, 0, 0, 0.5, 0, 1.0]
    assert (sample.task_id, sample.sibling) == ("t", 2)


def test_a_turn_that_does_not_extend_the_last_starts_a_new_sample() -> None:
    samples = to_samples(trajectory(turn([1, 2], [3]), turn([1, 9], [4], extends=False, reward=1.0)))
    assert [sample.token_ids.tolist() for sample in samples] == [[1, 2, 3], [1, 9, 4]]
    assert [sample.mask.tolist() for sample in samples] == [[False, False, True]] * 2
    assert [sample.rewards.tolist() for sample in samples] == [[0, 0, 0], [0, 0, 1.0]]


def test_the_reward_of_a_turn_without_tokens_moves_to_the_token_sampled_before() -> None:
    turns = (
        turn([1], [2, 3], reward=0.5),
        turn([4], [], reward=-1.0),
        turn([5], [], reward=2.0, extends=False),
    )
    (sample,) = to_samples(trajectory(*turns))
    assert sample.token_ids.tolist() == [1, 2, 3, 4]
    assert sample.rewards.tolist() == [0, 0, 1.5, 0]


def test_a_reward_before_any_token_moves_to_the_first_turn_with_one() -> None:
    (sample,) = to_samples(trajectory(turn([1], [], reward=-1.0), turn([2], [3, 4], reward=2.0)))
    assert sample.rewards.tolist() == [0, 0, 0, 1.0]


def test_an_episode_in_which_nothing_was_sampled_has_no_sample() -> None:
    assert to_samples(trajectory(turn([1], [], reward=1.0))) == []
