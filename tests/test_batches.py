from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentrl.attention import Branch
from agentrl.batches import Batch, make_batches, split_minibatches, unpack
from agentrl.errors import BadConfig
from agentrl.types import Sample


def sample(length: int, *, seed: int = 0, trained: float = 0.5) -> Sample:
    rng = np.random.default_rng([seed, length])
    mask = rng.random(length) < trained
    mask[0] = False
    return Sample(
        task_id=f"task-{seed}",
        sibling=0,
        token_ids=rng.integers(0, 100, length, dtype=np.int32),
        mask=mask,
        logprobs=np.where(mask, -rng.random(length), 0.0),
        rewards=np.zeros(length, dtype=np.float32),
        versions=np.where(mask, 0, -1),
        advantages=np.where(mask, rng.normal(size=length), 0.0),
    )


def samples_of(lengths: list[int]) -> list[Sample]:
    return [sample(length, seed=seed) for seed, length in enumerate(lengths)]


def segments(batch: Batch) -> list[torch.Tensor]:
    return list(torch.split(batch.token_ids, list(batch.lengths)))


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


@given(lengths=LENGTHS)
def test_every_sample_is_whole_in_exactly_one_batch_within_the_budget(lengths: list[int]) -> None:
    samples = samples_of(lengths)
    batches = make_batches(samples, tokens_per_microbatch=20)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(samples)))
    for batch in batches:
        assert len(batch.token_ids) == sum(batch.lengths) <= 20
        assert list(batch.lengths) == sorted(batch.lengths, reverse=True)  # equal ones are neighbours
        for index, ids in zip(batch.indices, segments(batch), strict=True):
            assert ids.tolist() == samples[index].token_ids.tolist()


@given(lengths=LENGTHS)
def test_batches_are_at_least_half_full_but_for_one(lengths: list[int]) -> None:
    batches = make_batches(samples_of(lengths), tokens_per_microbatch=20)
    assert sum(len(batch.token_ids) * 2 <= 20 for batch in batches) <= 1


def test_positions_restart_at_every_sample() -> None:
    (batch,) = make_batches(samples_of([3, 2, 4]), tokens_per_microbatch=9)
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert batch.positions.dtype == batch.token_ids.dtype == torch.int64


@given(lengths=LENGTHS)
def test_what_precedes_a_trained_token_is_of_the_same_sample(lengths: list[int]) -> None:
    for batch in make_batches(samples_of(lengths), tokens_per_microbatch=20):
        owner = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
        assert owner[batch.trained - 1].tolist() == batch.sample.tolist()


def test_trained_tokens_carry_their_own_sample_s_numbers() -> None:
    samples = samples_of([6, 9, 4])
    for batch in make_batches(samples, tokens_per_microbatch=13):
        assert batch.advantages is not None
        offsets = np.cumsum([0, *batch.lengths])
        expected = [
            (offsets[place] + t, place, samples[index].logprobs[t], samples[index].advantages[t])  # type: ignore[index]
            for place, index in enumerate(batch.indices)
            for t in np.flatnonzero(samples[index].mask)
        ]
        columns = batch.trained, batch.sample, batch.logprobs, batch.advantages
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
        assert batch.trained_tokens == len(expected) > 0


def test_fields_that_no_sample_has_are_absent_and_those_of_some_are_refused() -> None:
    samples = samples_of([4, 5])
    (batch,) = make_batches(samples, tokens_per_microbatch=9)
    assert batch.old is None
    assert batch.reference is None
    scored = dataclasses.replace(samples[0], old=samples[0].logprobs)
    with pytest.raises(ValueError, match="1 of 2 samples have old"):
        make_batches([scored, samples[1]], tokens_per_microbatch=9)


def test_a_sample_longer_than_the_budget_names_the_setting_to_change() -> None:
    with pytest.raises(BadConfig, match=r"21 tokens .* 20; .* batch\.tokens_per_microbatch to at least 21"):
        make_batches(samples_of([5, 21]), tokens_per_microbatch=20)


def test_a_sample_without_trained_tokens_is_packed_and_comes_back_as_zeros() -> None:
    silent = sample(3, trained=0.0)
    (batch,) = make_batches([silent], tokens_per_microbatch=3)
    assert batch.trained_tokens == 0
    assert unpack([batch], [torch.zeros(0)])[0].tolist() == [0.0, 0.0, 0.0]


def test_no_samples_give_no_batches() -> None:
    assert make_batches([], tokens_per_microbatch=8) == []
    assert unpack([], []) == []


@given(lengths=LENGTHS)
def test_unpacking_gives_back_what_was_packed_in_the_order_handed_in(lengths: list[int]) -> None:
    samples = samples_of(lengths)
    batches = make_batches(samples, tokens_per_microbatch=20)
    result = unpack(batches, [batch.logprobs for batch in batches])
    assert [values.tolist() for values in result] == [s.logprobs.tolist() for s in samples]
    assert all(values.dtype == np.float32 for values in result)


def test_a_batch_moves_as_a_whole() -> None:
    (batch,) = make_batches(samples_of([4, 5]), tokens_per_microbatch=9)
    moved = batch.to("meta")
    tensors = [
        moved.token_ids,
        moved.positions,
        moved.trained,
        moved.sample,
        moved.logprobs,
        moved.advantages,
    ]
    assert {str(t.device) for t in tensors if t is not None} == {"meta"}
    assert (moved.lengths, moved.indices, moved.old) == (batch.lengths, batch.indices, None)


def test_a_batch_whose_shapes_disagree_is_refused() -> None:
    (batch,) = make_batches(samples_of([4, 5]), tokens_per_microbatch=9)
    with pytest.raises(ValueError, match="logprobs has shape"):
        dataclasses.replace(batch, logprobs=torch.zeros(99))
    with pytest.raises(ValueError, match="token_ids"):
        dataclasses.replace(batch, sequences=(4, 6))


def siblings(opening: int, lengths: list[int], *, seed: int = 0) -> list[Sample]:
    """Samples of one task that begin with the same ``opening`` tokens and train all that follows."""
    rng = np.random.default_rng([seed, opening])
    shared = rng.integers(0, 100, opening, dtype=np.int32)
    made = []
    for length in lengths:
        mask = np.arange(opening + length) >= opening
        made.append(
            Sample(
                task_id=f"family-{seed}",
                sibling=len(made),
                token_ids=np.concatenate([shared, rng.integers(0, 100, length, dtype=np.int32)]),
                mask=mask,
                logprobs=np.where(mask, -rng.random(len(mask)), 0.0),
                rewards=np.zeros(len(mask), dtype=np.float32),
                versions=np.where(mask, 0, -1),
            )
        )
    return made


FAMILIES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=6)), max_size=5
)


@given(families=FAMILIES, budget=st.integers(18, 60))
def test_an_opening_that_siblings_share_is_packed_once_a_batch(
    families: list[tuple[int, list[int]]], budget: int
) -> None:
    samples = [s for seed, (opening, own) in enumerate(families) for s in siblings(opening, own, seed=seed)]
    batches = make_batches(samples, tokens_per_microbatch=budget)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(samples)))
    for batch in batches:
        assert len(batch.token_ids) <= budget
        openings = {samples[i].task_id: int(samples[i].mask.argmax()) for i in batch.indices}
        own = sum(samples[i].trained_tokens for i in batch.indices)
        assert len(batch.token_ids) == sum(openings.values()) + own


@given(families=FAMILIES, budget=st.integers(18, 60))
def test_a_trained_token_follows_the_token_before_it_wherever_that_is_packed(
    families: list[tuple[int, list[int]]], budget: int
) -> None:
    samples = [s for seed, (opening, own) in enumerate(families) for s in siblings(opening, own, seed=seed)]
    batches = make_batches(samples, tokens_per_microbatch=budget)
    for batch in batches:
        for name, shift in (("trained", 0), ("previous", 1)):
            packed = getattr(batch, name)
            expected = [
                (samples[i].token_ids[t - shift], t - shift)
                for i in batch.indices
                for t in np.flatnonzero(samples[i].mask)
            ]
            found = zip(batch.token_ids[packed].tolist(), batch.positions[packed].tolist(), strict=True)
            assert list(found) == expected
    unpacked = unpack(batches, [batch.logprobs for batch in batches])
    assert [values.tolist() for values in unpacked] == [s.logprobs.tolist() for s in samples]


def test_branches_stand_behind_all_sequences_and_point_at_their_trunk() -> None:
    family, alone = siblings(3, [2, 4]), siblings(5, [1], seed=1)
    (batch,) = make_batches([*family, *alone], tokens_per_microbatch=99)
    assert batch.sequences == (6, 3)
    assert batch.branches == (Branch(start=6, trunk=3, length=4), Branch(start=6, trunk=3, length=2))
    assert batch.indices == (2, 1, 0)
    assert batch.lengths == (6, 7, 5)


@given(lengths=LENGTHS, count=st.integers(1, 6), seed=st.integers(0, 2**63 - 1))
def test_minibatches_cover_the_samples_once_with_about_equal_trained_tokens(
    lengths: list[int], count: int, seed: int
) -> None:
    samples = samples_of(lengths)
    parts = split_minibatches(samples, count, seed=seed)
    assert len(parts) == count
    assert sorted(id(s) for part in parts for s in part) == sorted(id(s) for s in samples)
    tokens = [sum(s.trained_tokens for s in part) for part in parts]
    assert max(tokens) - min(tokens) <= max(s.trained_tokens for s in samples)


def test_minibatches_depend_on_the_seed_alone() -> None:
    samples = samples_of(list(range(2, 22)))

    def drawn(seed: int) -> list[list[str]]:
        return [[s.task_id for s in part] for part in split_minibatches(samples, 4, seed=seed)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_no_part_is_empty_while_samples_last() -> None:
    silent = [sample(3, seed=seed, trained=0.0) for seed in range(4)]
    assert [len(part) for part in split_minibatches(silent, 4, seed=0)] == [1, 1, 1, 1]
