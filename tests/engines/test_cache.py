from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl.attention import Segments
from agentrl.engines.cache import Decode, KVCache, Prefill, Span

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 4, 3


class Conversation:
    """Query, key and value of every token of a conversation, and what attention makes of them."""

    def __init__(self, tokens: int, *, seed: int, window: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parts = [
            torch.randn(heads, tokens, width, generator=generator, dtype=torch.float64)
            for heads, width in ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTH))
        ]
        self.expected = Segments([tokens]).attend(0, *self.parts, scale=0.5, window=window)

    def slice(self, start: int, stop: int) -> list[Tensor]:
        return [part[:, start:stop] for part in self.parts]


def packed(pieces: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]


def written(cache: KVCache, row: int, tokens: int, *, seed: int = 0) -> Conversation:
    """A conversation whose tokens are all in the cache's row."""
    conversation = Conversation(tokens, seed=seed)
    plan = Prefill(cache, [Span(row, 0, tokens)], CPU)
    plan.attend(0, *conversation.parts, scale=0.5, window=None)
    return conversation


def holds(cache: KVCache, row: int, conversation: Conversation, length: int) -> bool:
    return all(
        torch.equal(stored, part[:, :length])
        for stored, part in zip(cache.read(0, row, length), conversation.parts[1:], strict=True)
    )


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.sampled_from([None, 1, 3, 8]),
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_pieces_attention_is_that_of_the_whole_conversation(
    seed: int, lengths: list[int], window: int | None
) -> None:
    generator = random.Random(seed)
    conversations = [Conversation(length, seed=place, window=window) for place, length in enumerate(lengths)]
    cache = KVCache(len(lengths) + 1)
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        counts = [generator.randint(0, length - at) for at, length in zip(done, lengths, strict=True)]
        spans = [
            Span(row, at, count) for row, (at, count) in enumerate(zip(done, counts, strict=True)) if count
        ]
        if not spans:
            continue
        plan = Prefill(cache, spans, CPU)
        pieces = [conversations[span.row].slice(span.start, span.start + span.count) for span in spans]
        out = plan.attend(0, *packed(pieces), scale=0.5, window=window)
        expected = [conversations[s.row].expected[s.start : s.start + s.count] for s in spans]
        assert torch.allclose(out, torch.cat(expected), atol=1e-12)
        assert plan.positions.tolist() == [t for s in spans for t in range(s.start, s.start + s.count)]
        done = [at + count for at, count in zip(done, counts, strict=True)]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_decoding_rows_of_different_lengths_attends_as_each_would_alone(window: int | None) -> None:
    starts, steps = [9, 1, 4], 6
    conversations = [Conversation(at + steps, seed=at, window=window) for at in starts]
    cache = KVCache(5)
    spans = [Span(row, 0, at) for row, at in enumerate(starts)]
    pieces = [each.slice(0, at) for each, at in zip(conversations, starts, strict=True)]
    Prefill(cache, spans, CPU).attend(0, *packed(pieces), scale=0.5, window=window)
    for step in range(steps):
        positions = torch.tensor(starts) + step
        plan = Decode(cache, positions)
        pieces = [each.slice(at, at + 1) for each, at in zip(conversations, positions.tolist(), strict=True)]
        out = plan.attend(0, *packed(pieces), scale=0.5, window=window)
        expected = [each.expected[at] for each, at in zip(conversations, positions.tolist(), strict=True)]
        assert torch.allclose(out, torch.stack(expected), atol=1e-12)


def test_layers_are_kept_apart_and_may_have_different_shapes() -> None:
    cache = KVCache(2)
    plan = Prefill(cache, [Span(0, 0, 3)], CPU)
    for layer, heads in ((0, 2), (7, 1)):
        key, value = torch.full((heads, 3, 4), float(layer + 1)), torch.full((heads, 3, 2), float(layer))
        plan.attend(layer, torch.zeros(2, 3, 4), key, value, scale=1.0, window=None)
    assert [part.shape for part in cache.read(7, 0, 3)] == [(1, 3, 4), (1, 3, 2)]
    assert (cache.read(0, 0, 3)[0] == 1.0).all()
    assert (cache.read(7, 0, 3)[0] == 8.0).all()


def test_growing_keeps_what_is_there_and_doubles_the_memory() -> None:
    cache = KVCache(2)
    conversation = written(cache, 1, 100)
    before = cache.bytes
    assert before == 2 * KV_HEADS * 128 * (WIDTH + VALUE_WIDTH) * 8
    cache.reserve(128)
    assert cache.bytes == before
    cache.reserve(129)
    assert cache.bytes == 2 * before
    cache.reserve(1000)
    assert cache.bytes == 8 * before
    assert holds(cache, 1, conversation, 100)
    assert not cache.read(0, 0, 1000)[0].any()


def test_a_plan_makes_room_for_its_tokens() -> None:
    cache = KVCache(1)
    conversation = written(cache, 0, 300)
    assert holds(cache, 0, conversation, 300)
    plan = Decode(cache, torch.tensor([512]))
    plan.attend(0, *conversation.slice(0, 1), scale=0.5, window=None)
    assert cache.read(0, 0, 513)[0].shape[1] == 513


def test_copying_gives_a_row_the_beginning_of_another() -> None:
    cache = KVCache(3)
    source = written(cache, 0, 10, seed=1)
    target = written(cache, 2, 10, seed=2)
    cache.copy(torch.tensor([0]), torch.tensor([2]), 6)
    assert holds(cache, 0, source, 10)
    assert holds(cache, 2, source, 6)
    assert torch.equal(cache.read(0, 2, 10)[0][:, 6:], target.parts[1][:, 6:])


def test_copying_in_a_circle_exchanges_rows() -> None:
    cache = KVCache(3)
    first, second = written(cache, 0, 10, seed=1), written(cache, 2, 4, seed=2)
    cache.copy(torch.tensor([0, 2]), torch.tensor([2, 0]), 10)
    assert holds(cache, 2, first, 10)
    assert holds(cache, 0, second, 4)
