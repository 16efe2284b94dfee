from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.advantages import (
    ADVANTAGES,
    Estimator,
    dr_grpo,
    group_relative,
    grpo,
    is_informative,
    rloo,
    with_advantages,
)
from agentrl.types import Sample

MIXED = [1.0, 0.0, 0.0, 1.0, 0.5]


def sample(mask: list[bool], *, sibling: int = 0) -> Sample:
    zeros = [0.0] * len(mask)
    return Sample(
        task_id="t",
        sibling=sibling,
        token_ids=np.arange(len(mask), dtype=np.int32),
        mask=np.array(mask),
        logprobs=np.array(zeros),
        rewards=np.array(zeros),
        versions=np.array(zeros),
    )


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (grpo, [0.999998, -0.999998, -0.999998, 0.999998, 0.0]),
        (dr_grpo, [0.5, -0.5, -0.5, 0.5, 0.0]),
        (rloo, [0.625, -0.625, -0.625, 0.625, 0.0]),
    ],
)
def test_a_mixed_group_gives_the_published_numbers(estimator: Estimator, expected: list[float]) -> None:
    result = estimator(MIXED)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@given(reward=st.floats(-1e6, 1e6), siblings=st.integers(2, 17))
def test_a_group_without_spread_gets_exactly_zero(name: str, reward: float, siblings: int) -> None:
    assert ADVANTAGES[name]([reward] * siblings).tolist() == [0.0] * siblings
    assert not is_informative([reward] * siblings)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@given(rewards=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=12))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_the_rewards(
    name: str, rewards: list[float]
) -> None:
    result = ADVANTAGES[name](rewards)
    assert abs(result.sum()) < 1e-9
    assert all(result[i] < result[j] for i, a in enumerate(rewards) for j, b in enumerate(rewards) if a < b)


def test_a_group_of_one_gets_zero_except_from_rloo_which_has_no_others_to_compare_with() -> None:
    assert grpo([0.7]).tolist() == [0.0]
    assert dr_grpo([0.7]).tolist() == [0.0]
    assert rloo([0.7]).tolist() == [0.7]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_whose_siblings_all_failed_is_empty_and_uninformative(name: str) -> None:
    assert ADVANTAGES[name]([]).shape == (0,)
    assert not is_informative([])


def test_rloo_compares_each_sibling_with_the_mean_of_the_others() -> None:
    rewards = np.array([0.2, 1.0, 0.4, 0.9])
    others = [np.delete(rewards, i).mean() for i in range(4)]
    np.testing.assert_allclose(rloo(rewards), rewards - others, atol=1e-12)


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        grpo([1.0, float("nan")])


def test_an_estimator_leaves_the_rewards_it_was_handed_unchanged() -> None:
    rewards = np.array([0.7])
    rloo(rewards)[0] = 5.0
    assert rewards.tolist() == [0.7]


def test_an_advantage_stands_on_every_trained_token_and_nowhere_else() -> None:
    before = sample([False, True, False, True])
    (after,) = with_advantages([before], -1.5)
    assert after.advantages is not None
    assert after.advantages.tolist() == [0.0, -1.5, 0.0, -1.5]
    assert before.advantages is None


def test_the_samples_of_one_episode_share_its_advantage() -> None:
    rewritten = [sample([False, True], sibling=0), sample([False, False, True], sibling=0)]
    plain = [sample([False, True], sibling=1)]
    result = group_relative([1.0, 0.0], [rewritten, plain], estimator=dr_grpo)
    assert [s.sibling for s in result] == [0, 0, 1]
    assert [s.advantages.tolist() for s in result if s.advantages is not None] == [
        [0.0, 0.5],
        [0.0, 0.0, 0.5],
        [0.0, -0.5],
    ]


def test_rewards_and_episodes_that_differ_in_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rewards for 1 episodes"):
        group_relative([1.0, 0.0], [[sample([False, True])]], estimator=grpo)
