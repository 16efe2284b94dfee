from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from agentrl.attention import PACKED, Branch, Branches, Segments, window_mask
from agentrl.errors import UnsupportedModel
from agentrl.models import backbone

HEAD_DIM = 4


def random_parts(tokens: int, *, heads: int, kv_heads: int, value_dim: int = HEAD_DIM) -> list[Tensor]:
    """Query, key and value of ``tokens`` packed tokens, float64."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(count, tokens, width, generator=generator, dtype=torch.float64)
        for count, width in ((heads, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, value_dim))
    ]


def naive(parts: list[Tensor], lengths: list[int], *, scale: float, window: int | None) -> Tensor:
    """Attention (N, heads, value_dim), one token and one head at a time."""
    query, key, value = parts
    group = len(query) // len(key)
    rows, start = [], 0
    for length in lengths:
        for t in range(length):
            first = start + (0 if window is None else max(0, t - window + 1))
            seen = slice(first, start + t + 1)
            for h in range(len(query)):
                weights = (scale * key[h // group, seen] @ query[h, start + t]).softmax(0)
                rows.append(weights @ value[h // group, seen])
        start += length
    return torch.stack(rows).view(start, len(query), -1)


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 1, 3, 7, 50]),
    st.sampled_from([3, HEAD_DIM]),
)
@settings(max_examples=40, deadline=None)
def test_packed_sequences_attend_as_each_would_alone(
    lengths: list[int], heads: tuple[int, int], window: int | None, value_dim: int
) -> None:
    parts = random_parts(sum(lengths), heads=heads[0], kv_heads=heads[1], value_dim=value_dim)
    out = Segments(lengths).attend(0, *parts, scale=0.3, window=window)
    assert torch.allclose(out, naive(parts, lengths, scale=0.3, window=window), atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_each_sequence_alone(window: int | None) -> None:
    lengths = [5, 5, 2, 4]
    ours, expected = (
        [part.requires_grad_() for part in random_parts(16, heads=4, kv_heads=2)] for _ in range(2)
    )
    weights = torch.randn(16, 4, HEAD_DIM, dtype=torch.float64)
    losses = [
        (Segments(lengths).attend(0, *ours, scale=0.5, window=window) * weights).sum(),
        (naive(expected, lengths, scale=0.5, window=window) * weights).sum(),
    ]
    gradients = [
        torch.autograd.grad(loss, parts) for loss, parts in zip(losses, (ours, expected), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_change_in_one_sequence_leaves_the_others_bit_for_bit() -> None:
    parts = random_parts(12, heads=4, kv_heads=2)
    changed = [part.clone() for part in parts]
    for part in changed:
        part[:, 4:8] += 1.0
    before, after = (
        Segments([4, 4, 4]).attend(0, *each, scale=0.5, window=None) for each in (parts, changed)
    )
    untouched = [*range(4), *range(8, 12)]
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(before[4:8], after[4:8])


@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=4)), min_size=1, max_size=4),
    st.sampled_from([None, 1, 3, 7]),
)
@settings(max_examples=40, deadline=None)
def test_a_branch_attends_as_its_trunk_and_itself_would_in_one_sequence(
    trees: list[tuple[int, list[int]]], window: int | None
) -> None:
    trees = sorted(trees, reverse=True)
    sequences = [trunk for trunk, _ in trees]
    starts = [sum(sequences[:at]) for at in range(len(trees))]
    branches = [
        Branch(start, trunk, length)
        for start, (trunk, lengths) in zip(starts, trees, strict=True)
        for length in lengths
    ]
    total = sum(sequences) + sum(branch.length for branch in branches)
    parts = random_parts(total, heads=4, kv_heads=2)
    out = Branches(sequences, branches, torch.device("cpu")).attend(0, *parts, scale=0.3, window=window)
    begin = sum(sequences)
    assert torch.allclose(
        out[:begin], naive([p[:, :begin] for p in parts], sequences, scale=0.3, window=window), atol=1e-12
    )
    for branch in branches:
        trunk = range(branch.start, branch.start + branch.trunk)
        whole = [*trunk, *range(begin, begin + branch.length)]
        alone = naive([part[:, whole] for part in parts], [len(whole)], scale=0.3, window=window)
        assert torch.allclose(out[begin : begin + branch.length], alone[branch.trunk :], atol=1e-12)
        begin += branch.length


def test_a_window_counts_the_token_itself() -> None:
    device = torch.device("cpu")
    assert window_mask(2, 4, 2, device).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert window_mask(2, 4, None, device).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert window_mask(3, 3, 1, device).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_packed_model_called_without_a_plan_says_so() -> None:
    config = Qwen3Config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=4,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation(PACKED)
    with pytest.raises(UnsupportedModel, match="Qwen3Attention was not told which token belongs"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_16_bit_model_attends_in_float64_on_a_cpu(dtype: torch.dtype) -> None:
    config = Qwen3Config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    model.set_attn_implementation(PACKED)
    seen: list[torch.dtype] = []

    class Noting(Segments):
        def attend(self, layer: int, query: Tensor, *parts: Tensor, **options: object) -> Tensor:
            seen.extend(part.dtype for part in (query, *parts))
            return super().attend(layer, query, *parts, **options)  # type: ignore[arg-type]

    ids = torch.tensor([1, 2, 3])
    hidden = backbone(model, ids, torch.arange(3), Noting([3]))
    assert seen == [torch.float64 if dtype == torch.bfloat16 else dtype] * 3
    assert hidden.dtype == dtype
