from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agentrl.batches import Batch, make_batches
from agentrl.losses import (
    ClipRange,
    Importance,
    effective_share,
    importance_weights,
    k1,
    k2,
    k3,
    kl_penalty,
    nll_loss,
    policy_loss,
    token_logprobs,
)
from agentrl.types import Sample

VOCABULARY = 11
CLIP = ClipRange(0.2, 0.28)


class SegmentModel(nn.Module):
    """A causal model of running means in which each packed segment is a sequence of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.body = nn.Linear(6, 6)
        self.double()

    def forward(self, batch: Batch) -> Tensor:
        means = [
            embedded.cumsum(0) / torch.arange(1, len(embedded) + 1).unsqueeze(-1)
            for embedded in torch.split(self.embedding(batch.token_ids), list(batch.lengths))
        ]
        return torch.tanh(self.body(torch.cat(means)))

    def head(self, rows: Tensor) -> Tensor:
        return rows @ self.embedding.weight.T  # tied: gradients reach it from both ends


def sample(length: int, *, seed: int) -> Sample:
    rng = np.random.default_rng([seed, length])
    mask = rng.random(length) < 0.6
    mask[0], mask[-1] = False, True
    return Sample(
        task_id=f"task-{seed}",
        sibling=0,
        token_ids=rng.integers(0, VOCABULARY, length, dtype=np.int32),
        mask=mask,
        logprobs=np.where(mask, np.log(rng.uniform(0.03, 0.3, length)), 0.0),
        rewards=np.zeros(length, dtype=np.float32),
        versions=np.where(mask, 0, -1),
        advantages=np.where(mask, rng.normal(size=length), 0.0),
        reference=np.where(mask, np.log(rng.uniform(0.03, 0.3, length)), 0.0),
    )


SAMPLES = [sample(length, seed=seed) for seed, length in enumerate([7, 3, 12, 5, 2, 9, 4])]


def step_loss(model: SegmentModel, batch: Batch, *, trained_tokens: int, rows_per_chunk: int) -> Tensor:
    """All three losses of one microbatch together."""
    assert batch.advantages is not None
    assert batch.reference is not None
    new, _ = token_logprobs(
        model(batch),
        batch.token_ids,
        batch.trained,
        head=model.head,
        temperature=0.7,
        rows_per_chunk=rows_per_chunk,
    )
    mask = torch.ones_like(new, dtype=torch.bool)
    policy, _ = policy_loss(
        new, batch.logprobs, batch.advantages, mask, trained_tokens=trained_tokens, clip=CLIP
    )
    penalty, _ = kl_penalty(new, batch.reference, mask, trained_tokens=trained_tokens)
    likelihood, _ = nll_loss(new, mask, trained_tokens=trained_tokens)
    return policy + 0.1 * penalty + 0.3 * likelihood


def step(batches: Sequence[Batch], *, rows_per_chunk: int = 4) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one optimizer step over all microbatches."""
    model, total = SegmentModel(), 0.0
    trained_tokens = sum(batch.trained_tokens for batch in batches)
    for batch in batches:
        loss = step_loss(model, batch, trained_tokens=trained_tokens, rows_per_chunk=rows_per_chunk)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


def close(found: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> bool:
    pairs = zip(found[1], expected[1], strict=True)
    return abs(found[0] - expected[0]) < 1e-12 and all(torch.allclose(a, b, 1e-10, 1e-13) for a, b in pairs)


# --- the step as a whole


WHOLE = make_batches(SAMPLES, tokens_per_microbatch=1000)


@pytest.mark.parametrize("budget", [12, 13, 19, 30])
def test_loss_and_gradient_do_not_depend_on_the_microbatch_split(budget: int) -> None:
    batches = make_batches(SAMPLES, tokens_per_microbatch=budget)
    expected = step(WHOLE)
    assert len(batches) > len(WHOLE) == 1
    assert len(expected[1]) == 3
    assert all(gradient.abs().max() > 1e-3 for gradient in expected[1])
    assert close(step(batches), expected)


def test_loss_and_gradient_do_not_depend_on_the_order_of_the_samples() -> None:
    order = np.random.default_rng(3).permutation(len(SAMPLES))
    assert close(step(make_batches([SAMPLES[i] for i in order], tokens_per_microbatch=15)), step(WHOLE))


def test_loss_and_gradient_do_not_depend_on_the_packing() -> None:
    alone = [batch for each in SAMPLES for batch in make_batches([each], tokens_per_microbatch=12)]
    assert len(alone) == len(SAMPLES)
    assert close(step(alone), step(WHOLE))


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5, 1000])
def test_loss_and_gradient_do_not_depend_on_the_chunk_size(rows_per_chunk: int) -> None:
    assert close(step(WHOLE, rows_per_chunk=rows_per_chunk), step(WHOLE, rows_per_chunk=3))


def gradients_with_other_untrained_targets(shift: int) -> list[Tensor]:
    """The model reads the same tokens; only what untrained positions are scored against is another."""
    model = SegmentModel()
    (batch,) = WHOLE
    hidden = model(batch)
    targets = (batch.token_ids + shift) % VOCABULARY
    targets[batch.trained] = batch.token_ids[batch.trained]
    every = torch.arange(1, len(targets))
    mask = torch.isin(every, batch.trained)
    new, _ = token_logprobs(hidden, targets, every, head=model.head, temperature=1.0, rows_per_chunk=4)
    zeros = torch.zeros_like(new)
    policy, _ = policy_loss(new, zeros, zeros + 1, mask, trained_tokens=9, clip=CLIP)
    penalty, _ = kl_penalty(new, zeros, mask, trained_tokens=9)
    likelihood, _ = nll_loss(new, mask, trained_tokens=9)
    return list(torch.autograd.grad(policy + penalty + likelihood, list(model.parameters())))


def test_untrained_tokens_contribute_exactly_zero_gradient() -> None:
    found, expected = (gradients_with_other_untrained_targets(shift) for shift in (3, 0))
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- token_logprobs


def naive(hidden: Tensor, ids: Tensor, index: Tensor, *, weight: Tensor, temperature: float) -> Tensor:
    return torch.stack([torch.log_softmax(hidden[t - 1] @ weight.T / temperature, -1)[ids[t]] for t in index])


def score(
    hidden: Tensor, weight: Tensor, ids: Tensor, index: Tensor, *, temperature: float, rows_per_chunk: int
) -> tuple[Tensor, Tensor]:
    return token_logprobs(
        hidden,
        ids,
        index,
        head=lambda rows: rows @ weight.T,
        temperature=temperature,
        rows_per_chunk=rows_per_chunk,
    )


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(10, 6, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, 6, generator=generator, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, VOCABULARY, (10,), generator=generator)
    return hidden, weight, ids, torch.tensor([1, 2, 5, 6, 9])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 100])
def test_logprobs_and_gradients_equal_those_of_log_softmax(temperature: float, rows_per_chunk: int) -> None:
    hidden, weight, ids, index = inputs()
    upstream = torch.linspace(-1, 2, len(index), dtype=torch.float64)
    found, entropy = score(hidden, weight, ids, index, temperature=temperature, rows_per_chunk=rows_per_chunk)
    expected = naive(hidden, ids, index, weight=weight, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probabilities = torch.softmax(hidden.detach()[index - 1] @ weight.detach().T / temperature, -1)
    torch.testing.assert_close(entropy, torch.special.entr(probabilities).sum(-1), rtol=1e-12, atol=1e-12)
    assert not entropy.requires_grad
    for got, wanted in zip(
        torch.autograd.grad(found @ upstream, (hidden, weight)),
        torch.autograd.grad(expected @ upstream, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_the_gradient_of_token_logprobs_is_that_of_finite_differences() -> None:
    hidden, weight, ids, index = inputs()
    chunked = partial(score, ids=ids, index=index, temperature=0.8, rows_per_chunk=2)
    assert torch.autograd.gradcheck(lambda *ends: chunked(*ends)[0], (hidden, weight))


def test_half_precision_logits_are_normalised_in_float32() -> None:
    hidden, weight, ids, index = inputs(torch.bfloat16)
    found, entropy = score(hidden, weight, ids, index, temperature=0.9, rows_per_chunk=3)
    logits = (hidden @ weight.T)[index - 1].float() / 0.9
    expected = torch.log_softmax(logits, -1).gather(-1, ids[index].unsqueeze(-1)).squeeze(-1)
    assert found.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (wanted,) = torch.autograd.grad(expected.sum(), hidden)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, wanted, rtol=0.05, atol=0.05)


def counting_head(weight: Tensor) -> tuple[list[int], Callable[[Tensor], Tensor]]:
    calls: list[int] = []

    def head(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows @ weight.T

    return calls, head


def test_the_head_sees_one_chunk_at_a_time_and_all_but_the_last_again_in_backward() -> None:
    hidden, weight, ids, index = inputs()
    calls, head = counting_head(weight)
    found, _ = token_logprobs(hidden, ids, index, head=head, temperature=1.0, rows_per_chunk=2)
    assert calls == [2, 2, 1]
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert calls == [2, 2, 1, 2, 2]


def test_only_the_last_chunk_s_rows_are_kept_for_backward() -> None:
    hidden, weight, ids, index = inputs()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score(hidden, weight, ids, index, temperature=1.0, rows_per_chunk=2)
    rows_of_logits = [len(t) for t in kept.values() if t.ndim == 2 and t.shape[1] == VOCABULARY]
    assert sorted(rows_of_logits) == [1, 6]  # the last chunk's, and the head's transposed weight


def test_without_gradients_the_head_runs_once_a_chunk_and_nothing_is_kept() -> None:
    hidden, weight, ids, index = inputs()
    calls, head = counting_head(weight)
    with torch.no_grad():
        found, _ = token_logprobs(hidden, ids, index, head=head, temperature=1.0, rows_per_chunk=2)
    assert calls == [2, 2, 1]
    assert found.grad_fn is None


def test_no_trained_tokens_give_an_empty_result_that_backward_passes_through() -> None:
    hidden, weight, ids, _ = inputs()
    empty = torch.zeros(0, dtype=torch.int64)
    found, entropy = score(hidden, weight, ids, empty, temperature=1.0, rows_per_chunk=2)
    assert found.shape == entropy.shape == (0,)
    loss, _ = nll_loss(found, torch.ones_like(found, dtype=torch.bool), trained_tokens=3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


# --- token_logprobs under a frozen head


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows_per_chunk", [2, 100])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5000])  # within one tile, and over several
def test_a_frozen_head_gives_the_logprobs_entropies_and_gradients_of_a_trained_one(
    temperature: float, rows_per_chunk: int, vocabulary: int
) -> None:
    hidden, _, _, index = inputs()
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (10,), generator=generator)
    upstream = torch.linspace(-1, 2, len(index), dtype=torch.float64)
    scored = [
        token_logprobs(hidden, ids, index, head=head, temperature=temperature, rows_per_chunk=rows_per_chunk)
        for head in (weight, lambda rows: rows @ weight.T)
    ]
    for frozen, trained in zip(*scored, strict=True):
        torch.testing.assert_close(frozen, trained, rtol=1e-11, atol=1e-11)
    assert not scored[0][1].requires_grad
    gradients = [torch.autograd.grad(logprobs @ upstream, hidden)[0] for logprobs, _ in scored]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


def test_a_frozen_head_s_logits_exist_a_tile_at_a_time_and_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentrl.softmax.tile_width", lambda device: 3)
    hidden, weight, ids, index = inputs()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found, _ = token_logprobs(hidden, ids, index, head=weight.detach(), temperature=0.7, rows_per_chunk=2)
    assert not [t for t in kept if t.ndim == 2 and VOCABULARY in t.shape]
    expected = naive(hidden, ids, index, weight=weight, temperature=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_rows_get_bfloat16_gradients_from_a_frozen_head() -> None:
    hidden, weight, ids, index = inputs(torch.bfloat16)
    frozen = token_logprobs(hidden, ids, index, head=weight.detach(), temperature=0.9, rows_per_chunk=3)[0]
    trained, _ = score(hidden, weight, ids, index, temperature=0.9, rows_per_chunk=3)
    torch.testing.assert_close(frozen, trained, rtol=1e-5, atol=1e-5)
    (gradient,), (wanted,) = (torch.autograd.grad(one.sum(), hidden) for one in (frozen, trained))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, wanted, rtol=0.05, atol=0.05)


def test_words_far_below_the_likeliest_are_weighed_without_denormals() -> None:
    rows = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [-200.0], [-95.0]])
    logprobs, entropy = token_logprobs(
        rows.expand(4, 1),
        torch.tensor([0, 0, 1, 2]),
        torch.tensor([1, 2, 3]),
        head=weight,
        temperature=1.0,
        rows_per_chunk=8,
    )
    assert logprobs.tolist() == [0.0, -200.0, -95.0]
    assert entropy.abs().max() < 1e-30


# --- policy_loss

RATIOS = torch.tensor([0.5, 0.9, 1.1, 1.5, 4.0], dtype=torch.float64)


def loss_at_ratios(
    new: Tensor, advantages: Sequence[float], mask: Tensor, *, trained_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """With old logprobs of 0: new = log ratio."""
    weights = torch.tensor(advantages, dtype=torch.float64)
    return policy_loss(new, torch.zeros_like(new), weights, mask, trained_tokens=trained_tokens, clip=CLIP)


@pytest.mark.parametrize(
    ("advantage", "expected"), [(1.0, [-0.5, -0.9, -1.1, -1.28, -1.28]), (-1.0, [0.8, 0.9, 1.1, 1.5, 4.0])]
)
def test_the_clipped_loss_gives_the_published_numbers(advantage: float, expected: list[float]) -> None:
    each = [
        loss_at_ratios(RATIOS.log(), [advantage] * 5, only, trained_tokens=1)[0].item()
        for only in torch.eye(5, dtype=torch.bool)
    ]
    assert each == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "flowing"),
    [(1.0, [True, True, True, False, False]), (-1.0, [False, True, True, True, True])],
)
def test_the_clip_stops_the_gradient_only_where_it_would_push_further(
    advantage: float, flowing: list[bool]
) -> None:
    new = RATIOS.log().requires_grad_()
    every = torch.ones(5, dtype=torch.bool)
    loss, metrics = loss_at_ratios(new, [advantage] * 5, every, trained_tokens=1)
    (gradient,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(gradient, torch.where(torch.tensor(flowing), -advantage * RATIOS, 0.0))
    assert metrics["loss/clip_fraction"].item() == 5 - sum(flowing)


def test_policy_metrics_are_sums_over_the_masked_tokens() -> None:
    mask = torch.tensor([True, False, True, True, True])
    loss, metrics = loss_at_ratios(RATIOS.log(), [-1.0, 1.0, 1.0, 1.0, -1.0], mask, trained_tokens=10)
    kept = RATIOS[mask]
    assert loss.item() == pytest.approx((0.8 - 1.1 - 1.28 + 4.0) / 10)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss/policy": 0.8 - 1.1 - 1.28 + 4.0,
            "loss/ratio_mean": kept.sum().item(),
            "loss/clip_fraction": 2.0,
            "loss/clip_low_fraction": 1.0,
            "loss/clip_high_fraction": 1.0,
            "loss/policy_kl": (kept - 1 - kept.log()).sum().item(),
        }
    )


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
def test_what_stands_outside_the_mask_changes_neither_loss_nor_gradient(rubbish: float) -> None:
    mask = torch.tensor([True, False, True])

    def outcome(filler: float) -> tuple[list[float], Tensor]:
        new = torch.tensor([-1.0, filler, -2.0], dtype=torch.float64, requires_grad=True)
        other = torch.tensor([-1.1, -filler, -1.8], dtype=torch.float64)
        policy, first = policy_loss(new, other, other, mask, trained_tokens=2, clip=CLIP)
        penalty, second = kl_penalty(new, other, mask, trained_tokens=2)
        likelihood, third = nll_loss(new, mask, trained_tokens=2)
        loss = policy + penalty + likelihood
        numbers = [loss, *first.values(), *second.values(), *third.values()]
        return [n.item() for n in numbers], torch.autograd.grad(loss, new)[0]

    clean, dirty = outcome(0.0), outcome(rubbish)
    assert dirty[0] == clean[0]
    assert torch.equal(dirty[1], clean[1])
    assert dirty[1][1] == 0


def test_token_aggregation_weighs_every_trained_token_alike() -> None:
    answers = [torch.full((2,), -4.0), torch.full((4,), -1.0)]
    losses = [
        nll_loss(each, torch.ones_like(each, dtype=torch.bool), trained_tokens=6)[0] for each in answers
    ]
    assert sum(loss.item() for loss in losses) == pytest.approx(2.0, abs=1e-6)


def test_a_step_without_trained_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="trained_tokens is 0"):
        nll_loss(torch.zeros(1), torch.ones(1, dtype=torch.bool), trained_tokens=0)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.2), (1.5, 0.2), (0.2, -0.1), (0.2, float("nan"))])
def test_a_clip_range_that_no_ratio_fits_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="clip range"):
        ClipRange(low, high)


# --- importance weights

LOG_WEIGHTS = torch.tensor([0.2, -0.1, 0.5, -0.6], dtype=torch.float64)
WEIGHTS = [1.221403, 0.904837, 1.648721, 0.548812]


def weigh(mode: Any, mask: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """Tokens that were sampled at -3 nats."""
    sampled = torch.full_like(LOG_WEIGHTS, -3.0)
    mask = torch.ones(4, dtype=torch.bool) if mask is None else mask
    weights, metrics = importance_weights(
        sampled + LOG_WEIGHTS, sampled, mask, importance=Importance(mode, cap=1.5, floor=0.6)
    )
    return weights, {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("mode", "expected", "used", "kept"),
    [
        ("truncate", [*WEIGHTS[:2], 1.5, WEIGHTS[3]], [*WEIGHTS[:2], 1.5, WEIGHTS[3]], 3),
        ("mask", [*WEIGHTS[:2], 0, 0], [*WEIGHTS[:2], 0, 0], 2),
        ("none", [1, 1, 1, 1], WEIGHTS, 4),
    ],
)
def test_importance_weights_give_the_published_numbers(
    mode: str, expected: list[float], used: list[float], kept: int
) -> None:
    weights, metrics = weigh(mode)
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics == pytest.approx(
        {
            "mismatch/kept": kept,
            "mismatch/weight": sum(used),
            "mismatch/weight_squared": sum(weight**2 for weight in used),
        },
        abs=1e-5,
    )


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_weight_at_the_cap_or_the_floor_is_kept(mode: Any) -> None:
    agreed, every = torch.tensor([-1.0, -2.0]), torch.ones(2, dtype=torch.bool)
    narrowest = Importance(mode, cap=1.0, floor=1.0)
    weights, metrics = importance_weights(agreed, agreed, every, importance=narrowest)
    assert (weights.tolist(), metrics["mismatch/kept"].item()) == ([1.0, 1.0], 2.0)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_what_stands_outside_the_mask_has_the_weight_one_and_is_in_no_sum(rubbish: float) -> None:
    mask = torch.tensor([True, False, True])
    old = torch.tensor([-1.0, rubbish, -2.0])
    weights, metrics = importance_weights(
        old, torch.tensor([-1.0, 0.0, -3.0]), mask, importance=Importance("truncate", cap=2.0, floor=0.5)
    )
    assert weights.tolist() == [1.0, 1.0, 2.0]
    assert {name: value.item() for name, value in metrics.items()} == {
        "mismatch/kept": 1.0,
        "mismatch/weight": 3.0,
        "mismatch/weight_squared": 5.0,
    }


def test_weights_are_detached_and_multiply_each_tokens_loss_and_gradient() -> None:
    advantages, mask = torch.tensor([1.0, -2.0, 0.5, 1.0]).double(), torch.tensor([True, True, True, False])
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64, requires_grad=True)
    weights, _ = importance_weights(
        old, old.detach() - LOG_WEIGHTS, mask, importance=Importance("mask", cap=1.5, floor=0.6)
    )
    assert not weights.requires_grad
    new = old.detach().clone().requires_grad_()
    loss, metrics = policy_loss(
        new, old.detach(), advantages, mask, trained_tokens=10, clip=CLIP, weights=weights
    )
    (gradient,) = torch.autograd.grad(loss, new)
    expected = [-WEIGHTS[0] / 10, 2 * WEIGHTS[1] / 10, 0.0, 0.0]
    assert gradient.tolist() == pytest.approx(expected, abs=1e-6)
    assert gradient[2:].tolist() == [0.0, 0.0]  # masked by its weight, and not trained
    assert loss.item() == pytest.approx(sum(expected), abs=1e-6)
    assert metrics["loss/policy"].item() == pytest.approx(10 * sum(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "share"),
    [([0.3] * 5, 1.0), ([1, 0, 0, 0], 0.25), ([0, 0], 0.0), (WEIGHTS, 0.876872), ([2, 1], 0.9)],
)
def test_the_effective_share_of_equal_weights_is_one_and_of_a_single_one_a_token(
    weights: list[float], share: float
) -> None:
    squares = [weight**2 for weight in weights]
    found = effective_share(sum(weights) / len(weights), sum(squares) / len(squares))
    assert found == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("cap", "floor"), [(0.9, 0.5), (2.0, 1.1), (2.0, -0.1), (math.nan, 0.5)])
def test_an_importance_range_without_one_is_refused(cap: float, floor: float) -> None:
    with pytest.raises(ValueError, match="must lie between them"):
        Importance("mask", cap=cap, floor=floor)


# --- KL

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
REFERENCE = torch.tensor([-1.2, -1.5, -0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(k1, [0.2, -0.5, 0.0]), (k2, [0.02, 0.125, 0.0]), (k3, [0.018731, 0.148721, 0.0])],
)
def test_kl_estimators_give_the_published_numbers(
    estimator: Callable[[Tensor, Tensor], Tensor], expected: list[float]
) -> None:
    assert estimator(LOGPROBS, REFERENCE).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_kl_penalty_is_k2_and_reports_k3_beside_it() -> None:
    every = torch.ones(3, dtype=torch.bool)
    loss, metrics = kl_penalty(LOGPROBS, REFERENCE, every, trained_tokens=3)
    assert loss.item() == pytest.approx(0.145 / 3, abs=1e-6)
    assert metrics["loss/kl_penalty"].item() == pytest.approx(0.145, abs=1e-6)
    assert metrics["loss/kl"].item() == pytest.approx(0.167452, abs=1e-6)


def test_the_expected_gradient_of_the_penalty_is_that_of_the_kl_divergence() -> None:
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, -0.2], dtype=torch.float64), -1)
    logprobs = torch.log_softmax(logits, -1)
    weights = logprobs.exp().detach()  # sampling: each token as often as the policy says it
    (found,) = torch.autograd.grad((weights * k2(logprobs, reference)).sum(), logits, retain_graph=True)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(found, expected)
