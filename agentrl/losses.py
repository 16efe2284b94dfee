"""Logprobs, policy, KL and supervised losses: pure torch functions over masked tokens.

Aggregation is by token over the whole optimizer step: every loss is a sum over its tokens divided by
``trained_tokens``, the trained tokens of all microbatches and ranks together, so neither loss nor gradient
depends on how the step is split or packed. Tokens outside the mask contribute exactly zero, whatever stands
there. Every metric is a **sum over the tokens in the mask**, detached: add them up over microbatches and
ranks, then divide by ``trained_tokens`` for the mean. Logprobs are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agentrl.softmax import frozen_head_logprobs

__all__ = [
    "ClipRange",
    "Importance",
    "effective_share",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "kl_penalty",
    "nll_loss",
    "policy_loss",
    "token_logprobs",
]

Head = Callable[[Tensor], Tensor]  # hidden rows (R, D) -> logits (R, V), before the temperature
Metrics = dict[str, Tensor]  # name -> sum over tokens, ()


@dataclass(frozen=True, slots=True)
class ClipRange:
    """How far the probability ratio may move before its gradient stops."""

    low: float  # the ratio is clipped below at 1 - low
    high: float  # and above at 1 + high

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1:
            raise ValueError(f"the clip range's low is {self.low}; it must be in [0, 1]: ratios are positive")
        if not self.high >= 0:
            raise ValueError(f"the clip range's high is {self.high}; it must be 0 or above")


@dataclass(frozen=True, slots=True)
class Importance:
    """How the loss is corrected for tokens that were sampled from another distribution than the
    learner's."""

    mode: Literal["none", "truncate", "mask"]  # none: not at all
    cap: float  # truncate: the largest weight; mask: the largest that is kept
    floor: float  # mask: the smallest weight that is kept

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1 <= self.cap:
            raise ValueError(
                f"the importance weights' floor is {self.floor} and their cap {self.cap}; 1, the weight of a "
                "token on which both sides agree, must lie between them"
            )


def token_logprobs(
    hidden: Tensor,  # (N, D) last hidden states of a packed batch
    token_ids: Tensor,  # (N,) int64
    index: Tensor,  # (M,) int64, positions of the tokens asked for; never the first of a sample
    *,
    head: Head | Tensor,
    temperature: float,
    rows_per_chunk: int,
    previous: Tensor | None = None,  # (M,) int64, where the token before each is; None: right before it
) -> tuple[Tensor, Tensor]:
    """Logprob (M,) of ``token_ids[index]`` given what precedes it, and the entropy (M,) there, detached.

    This is the only shift in the code base: a token is predicted by the hidden state before it. Results are
    float32 (float64 where the logits are). Gradients reach ``hidden`` and the parameters of ``head``, whose
    logits exist for ``rows_per_chunk`` rows at a time and are recomputed in backward; a Tensor is the weight
    (V, D) of a linear head that is not trained, and needs neither. ``index`` may be empty. Logits must be
    finite.
    """
    rows = torch.split(hidden.index_select(0, index - 1 if previous is None else previous), rows_per_chunk)
    targets = torch.split(token_ids.index_select(0, index), rows_per_chunk)
    if isinstance(head, Tensor):
        frozen = partial(frozen_head_logprobs, weight=head, temperature=temperature)
        results = [frozen(*pair) for pair in zip(rows, targets, strict=True)]
        logprobs, entropies = zip(*results, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)
    chunk = partial(_chunk_logprobs, head=head, temperature=temperature)
    # Backward begins with the last chunk: recomputing its logits would save no memory.
    kept = len(rows) - 1 if torch.is_grad_enabled() else 0
    results = [
        chunk(*pair) if at >= kept else checkpoint(chunk, *pair, use_reentrant=False)
        for at, pair in enumerate(zip(rows, targets, strict=True))
    ]
    logprobs, entropies = zip(*results, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def policy_loss(
    new: Tensor,  # (T,) nats, under the weights being trained
    old: Tensor,  # (T,) nats, under the weights at the start of the optimizer batch
    advantages: Tensor,  # (T,)
    mask: Tensor,  # (T,) bool
    *,
    trained_tokens: int,  # of the whole optimizer step
    clip: ClipRange,
    weights: Tensor | None = None,  # (T,) of each token's loss, without a gradient; None: 1
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of PPO (arXiv 1707.06347), its range in two parts as in DAPO (2503.14476).

    A token of weight 0 has no gradient and counts in the normaliser all the same. Metrics: ``loss/policy``
    (weighted), ``loss/ratio_mean``, ``loss/clip_fraction`` (tokens whose gradient the clip stops),
    ``loss/clip_low_fraction`` and ``loss/clip_high_fraction`` (its two sides), ``loss/policy_kl`` (k3 of
    KL(old || new)).
    """
    # Masked before exp: an infinite ratio outside the mask would turn the zero gradient there into NaN.
    log_ratio = torch.where(mask, new - old, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    if weights is not None:
        per_token = per_token * torch.where(mask, weights, 0.0)
    loss = _masked_sum(per_token, mask) / _checked(trained_tokens)
    with torch.no_grad():
        low = (ratio < 1 - clip.low) & (advantages < 0)
        high = (ratio > 1 + clip.high) & (advantages > 0)
        sums = {
            "loss/policy": per_token,
            "loss/ratio_mean": ratio,
            "loss/clip_fraction": (low | high).to(ratio.dtype),
            "loss/clip_low_fraction": low.to(ratio.dtype),
            "loss/clip_high_fraction": high.to(ratio.dtype),
            "loss/policy_kl": k3(old, new),
        }
        return loss, {name: _masked_sum(values, mask) for name, values in sums.items()}


@torch.no_grad()
def importance_weights(
    old: Tensor,  # (T,) nats, the learner's at the start of the optimizer batch
    sampled: Tensor,  # (T,) nats, the sampler's: log mu
    mask: Tensor,  # (T,) bool
    *,
    importance: Importance,
) -> tuple[Tensor, Metrics]:
    """What each token's policy loss is multiplied by, (T,), without a gradient; 1 outside the mask.

    With ``log w = (old - log mu) m``: ``truncate`` is min(w, cap) (truncated importance sampling), ``mask``
    is w in [floor, cap] and 0 outside (IcePop), ``none`` is 1. A token each: the product over a sequence
    leaves any range within some hundred tokens. Metrics: ``mismatch/kept`` (tokens whose weight is neither
    cut nor 0; with ``none`` all), and for :func:`effective_share` ``mismatch/weight`` and
    ``mismatch/weight_squared``, float64; with ``none`` these two are of w, as what is not corrected must be
    seen.
    """
    weights = torch.where(mask, old - sampled, 0.0).exp()
    kept, given = torch.ones_like(mask), weights
    if importance.mode == "truncate":
        kept, given = weights <= importance.cap, weights.clamp(max=importance.cap)
    elif importance.mode == "mask":
        kept = (weights >= importance.floor) & (weights <= importance.cap)
        given = torch.where(kept, weights, 0.0)
    exact = given.double()  # its square may leave float32
    sums = {
        "mismatch/kept": kept.to(weights.dtype),
        "mismatch/weight": exact,
        "mismatch/weight_squared": exact.square(),
    }
    metrics = {name: _masked_sum(values, mask) for name, values in sums.items()}
    return torch.ones_like(weights) if importance.mode == "none" else given, metrics


def effective_share(mean: float, mean_square: float) -> float:
    """The effective sample size ``(sum w)^2 / sum w^2`` as a share of the n tokens, from the means of w and
    w^2.

    1 where all weights are equal, 1 / n where one outweighs the rest, 0 where every one is 0.
    """
    return mean * mean / mean_square if mean_square else 0.0


def kl_penalty(
    new: Tensor,  # (T,) nats, under the weights being trained
    reference: Tensor,  # (T,) nats, under the reference model
    mask: Tensor,  # (T,) bool
    *,
    trained_tokens: int,  # of the whole optimizer step
) -> tuple[Tensor, Metrics]:
    """k2 against the reference, whose gradient is that of the KL divergence (plain k3's is not).

    The caller multiplies by its coefficient. Metrics: ``loss/kl_penalty`` (k2) and ``loss/kl`` (k3, the
    better estimate).
    """
    per_token = k2(torch.where(mask, new, 0.0), torch.where(mask, reference, 0.0))
    with torch.no_grad():
        metrics = {
            "loss/kl_penalty": _masked_sum(per_token, mask),
            "loss/kl": _masked_sum(k3(new, reference), mask),
        }
    return _masked_sum(per_token, mask) / _checked(trained_tokens), metrics


def nll_loss(
    logprobs: Tensor,  # (T,) nats, under the weights being trained
    mask: Tensor,  # (T,) bool
    *,
    trained_tokens: int,  # of the whole optimizer step
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the masked tokens, for supervised warm starts. Metric: ``loss/nll``."""
    total = -_masked_sum(logprobs, mask)
    return total / _checked(trained_tokens), {"loss/nll": total.detach()}


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL per token, (T,): ``logp - ref``; unbiased, noisy. For rewards (joschu.net/blog/kl-approx)."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL per token, (T,): ``(ref - logp)^2 / 2``; biased, but its gradient is the KL's. For losses."""
    return (reference - logprobs).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL per token, (T,): ``e^d - d - 1`` with ``d = ref - logp``; unbiased, never negative. For metrics."""
    difference = reference - logprobs
    return difference.expm1() - difference


def _chunk_logprobs(
    rows: Tensor, token_ids: Tensor, *, head: Head, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = head(rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # x / 1 is x: the pass over (R, V) is saved, no bit is changed.
    log_softmax = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    logprobs = log_softmax.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    # Entropy comes after the last tensor that backward needs: recomputation stops there and never repeats it.
    with torch.no_grad():
        entropy = log_softmax.exp().mul_(log_softmax).sum(dim=-1).neg_()
    return logprobs, entropy


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum()


def _checked(trained_tokens: int) -> int:
    if trained_tokens < 1:
        raise ValueError(f"trained_tokens is {trained_tokens}; skip an optimizer step that trains no token")
    return trained_tokens
