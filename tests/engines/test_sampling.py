from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from agentrl.engine import Sampling
from agentrl.engines.sampling import draw, uniforms

LOGITS = torch.tensor([1.3, -0.4, 2.1, 0.0, -3.0, 1.2, 0.7, -0.9, 1.9, -5.0, 0.3])


def draw_many(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """One draw from the same logits (V,) for each of ``uniform`` (n,)."""
    n = len(uniform)
    return draw(
        logits.expand(n, -1),
        uniform=uniform,
        temperature=torch.full((n,), temperature),
        top_p=torch.full((n,), top_p),
        top_k=torch.full((n,), top_k),
    )


def warped(logits: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The distribution (V,) that transformers would sample from."""
    scores = logits[None]
    ids = torch.zeros((1, 1), dtype=torch.int64)
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    probabilities: Tensor = scores[0].softmax(-1)
    return probabilities


def even(n: int) -> Tensor:
    """n numbers that fill [0, 1) evenly: frequencies are then probabilities, up to 1 / n."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_the_stream_of_a_seed_is_splitmix64() -> None:
    expected = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], np.uint64)
    numbers = uniforms(np.full(3, 1234567, np.uint64), np.arange(3))
    assert numbers.tolist() == ((expected >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist()


def test_uniform_numbers_stay_below_one_and_differ_between_neighbouring_seeds() -> None:
    seeds = np.arange(2000, dtype=np.uint64)
    first, second = uniforms(seeds, np.zeros(2000, np.int64)), uniforms(seeds, np.ones(2000, np.int64))
    assert min(first.min(), second.min()) >= 0
    assert max(first.max(), second.max()) < 1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.08
    counts, _ = np.histogram(np.concatenate([first, second]), bins=20, range=(0, 1))
    assert chisquare(counts).pvalue > 1e-3


def test_the_largest_seeds_wrap_silently() -> None:
    numbers = uniforms(np.array([2**64 - 1, 2**63], np.uint64), np.array([10**9, 0]))
    assert ((numbers >= 0) & (numbers < 1)).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 0), (1.0, 1), (1.0, 4), (0.01, 0), (0.5, 0), (0.9, 0), (0.8, 4), (0.5, 99)]
)
def test_frequencies_and_logprobs_are_those_of_the_distribution_that_transformers_would_sample_from(
    temperature: float, top_p: float, top_k: int
) -> None:
    expected = warped(LOGITS, temperature=temperature, top_p=top_p, top_k=top_k)
    tokens, logprobs = draw_many(LOGITS, even(5000), temperature=temperature, top_p=top_p, top_k=top_k)
    frequencies = torch.bincount(tokens, minlength=len(LOGITS)) / 5000
    assert torch.allclose(frequencies, expected, atol=5e-4)
    assert torch.allclose(logprobs.exp(), expected[tokens], atol=1e-6)


def test_sampled_tokens_pass_a_chi_square_test() -> None:
    n = 20_000
    uniform = torch.from_numpy(uniforms(np.arange(n, dtype=np.uint64), np.full(n, 3)))
    tokens, _ = draw_many(LOGITS, uniform, temperature=1.3)
    expected = warped(LOGITS, temperature=1.3, top_p=1.0, top_k=0).double().numpy()
    assert chisquare(np.bincount(tokens, minlength=len(LOGITS)), n * expected / expected.sum()).pvalue > 1e-3


def test_temperature_zero_takes_the_likeliest_token_whatever_the_filters_say() -> None:
    tokens, logprobs = draw_many(LOGITS, even(50), temperature=0.0, top_p=0.1, top_k=3)
    assert tokens.tolist() == [2] * 50
    assert torch.allclose(logprobs, LOGITS.log_softmax(-1)[2].expand(50))


def test_each_row_has_its_own_settings() -> None:
    alone = [
        draw_many(LOGITS, torch.tensor([0.7], dtype=torch.float64), temperature=t, top_p=p, top_k=k)
        for t, p, k in [(1.0, 1.0, 0), (0.0, 1.0, 0), (2.0, 0.7, 0), (0.5, 1.0, 2)]
    ]
    together = draw(
        LOGITS.expand(4, -1),
        uniform=torch.full((4,), 0.7, dtype=torch.float64),
        temperature=torch.tensor([1.0, 0.0, 2.0, 0.5]),
        top_p=torch.tensor([1.0, 1.0, 0.7, 1.0]),
        top_k=torch.tensor([0, 0, 0, 2]),
    )
    for place in (0, 1):
        assert torch.equal(together[place], torch.cat([row[place] for row in alone]))


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=600),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.125, 5.0, width=32),
)
@settings(max_examples=100, deadline=None)
def test_a_token_is_where_the_cumulative_probability_passes_the_uniform_number(
    logits: list[float], uniform: float, temperature: float
) -> None:
    scores = torch.tensor(logits)
    tokens, logprobs = draw_many(
        scores, torch.tensor([uniform], dtype=torch.float64), temperature=temperature
    )
    probabilities = (scores.double() / temperature).softmax(-1)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), probabilities.cumsum(-1)])
    token = int(tokens)
    assert edges[token] - 1e-5 <= uniform <= edges[token + 1] + 1e-5
    assert float(logprobs) == pytest.approx(float(probabilities[token].log()), abs=1e-4)


def test_a_vocabulary_of_262144_words_is_covered_to_its_ends_and_impossible_words_are_never_drawn() -> None:
    logits = torch.full((262_144,), -torch.inf)
    possible = torch.tensor([5, 255, 256, 131_071, 262_143])
    logits[possible] = 0.0
    tokens, logprobs = draw_many(logits, torch.cat([even(100), torch.tensor([0.0, 1 - 2.0**-53])]))
    assert torch.equal(torch.bincount(tokens, minlength=262_144)[possible] // 20, torch.ones(5).long())
    assert tokens[-2:].tolist() == [5, 262_143]
    assert set(tokens.tolist()) == set(possible.tolist())
    assert torch.allclose(logprobs, torch.tensor(0.2).log())


def test_a_flat_distribution_over_many_words_is_drawn_evenly() -> None:
    tokens, _ = draw_many(torch.zeros(50_001), even(200))
    exact = (even(200) * 50_001).long()
    assert (tokens - exact).abs().max() <= 1


def test_half_precision_logits_are_sampled_in_single_precision() -> None:
    logits = LOGITS.bfloat16()
    tokens, logprobs = draw_many(logits, even(1000))
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, logits.float().log_softmax(-1)[tokens])


def test_logits_that_are_not_finite_give_a_token_of_the_vocabulary_and_a_logprob_that_tells() -> None:
    broken = LOGITS.clone()
    broken[3] = torch.nan
    for temperature in (0.0, 1.0):
        tokens, logprobs = draw_many(broken, even(4), temperature=temperature)
        assert (tokens < len(LOGITS)).all()
        assert not logprobs.isfinite().any()


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"seed": -1},
        {"seed": 1 << 64},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"stop_token_ids": tuple(range(9))},
    ],
    ids=str,
)
def test_sampling_refuses_what_can_not_be_drawn(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**{"max_tokens": 1, "seed": 0, **bad})  # type: ignore[arg-type]
