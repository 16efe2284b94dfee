"""Draw tokens from logits: vectorised over requests, and each request's draws depend on its own seed alone.

Randomness is counter-based (SplitMix64, Steele, Lea and Flood 2014): the uniform number of a request's i-th
token is a pure function of its seed and i, so who else is in the batch does not matter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentrl.softmax import RunningSoftmax, tile_width

__all__ = ["draw", "uniforms"]

_BLOCK = 256  # tokens summed before the cumulative sum: short sums keep float32 exact enough for 262k words


def uniforms(seeds: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Numbers (n,) in [0, 1) for the ``counts``-th token of the streams ``seeds``."""
    z = seeds + (counts.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    numbers: npt.NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def draw(
    logits: Tensor,  # (n, V)
    *,
    uniform: Tensor,  # (n,) float64 in [0, 1)
    temperature: Tensor,  # (n,) float32; 0: greedy
    top_p: Tensor,  # (n,) float32; 1: all
    top_k: Tensor,  # (n,) int64; 0: all
) -> tuple[Tensor, Tensor]:
    """Tokens (n,) int64 and their logprobs (n,) float32 in nats, of the distribution sampled from.

    A greedy token's logprob is that of the distribution at temperature 1. Logits that are not finite give
    logprobs that are not finite.
    """
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature)[:, None]
    blocks, softmax = _block_weights(logits, scale)
    tokens = _inverse_cdf(logits, scale, blocks=blocks, top=softmax.top, uniform=uniform)
    if bool(greedy.any()):
        tokens[greedy] = logits[greedy].argmax(-1)
    chosen = logits.gather(1, tokens[:, None]).float() / scale
    logprobs = softmax.logprobs(chosen[:, 0])
    filtered = ((top_p < 1) | (top_k > 0)) & ~greedy
    if bool(filtered.any()):
        kept = _filter(logits[filtered].float() / scale[filtered], top_p[filtered], top_k[filtered])
        tokens[filtered], logprobs[filtered] = _draw_kept(kept, uniform[filtered])
    return tokens, logprobs


def _block_weights(logits: Tensor, scale: Tensor) -> tuple[Tensor, RunningSoftmax]:
    """The weight (n, blocks) of each block of words, as exp(logit - top), and the whole's normaliser."""
    softmax = RunningSoftmax(len(logits), dtype=torch.float32, device=logits.device)
    sums: list[Tensor] = []
    tops: list[Tensor] = []
    for tile in torch.split(logits, tile_width(logits.device), dim=1):
        weights, _ = softmax.add(tile.float() / scale)
        padding = -weights.shape[1] % _BLOCK
        sums.append(torch.nn.functional.pad(weights, (0, padding)).view(len(weights), -1, _BLOCK).sum(-1))
        tops.append(softmax.top)
    shrunk = [part * (top - softmax.top).exp()[:, None] for part, top in zip(sums, tops, strict=True)]
    return torch.cat(shrunk, dim=1), softmax


def _inverse_cdf(logits: Tensor, scale: Tensor, *, blocks: Tensor, top: Tensor, uniform: Tensor) -> Tensor:
    """The token (n,) at which the cumulative probability passes ``uniform``: first its block, then its
    place."""
    block, rest = _locate(blocks, uniform)
    # NaN has no place: anywhere will do, but inside the vocabulary.
    columns = (block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)).clamp_(min=0)
    inside = logits.gather(1, columns.clamp(max=logits.shape[1] - 1)).float() / scale
    weights = (inside - top[:, None]).exp_().masked_fill_(columns >= logits.shape[1], 0.0)
    place, _ = _locate(weights, rest / weights.sum(-1, dtype=torch.float64).clamp_min(1e-300))
    return columns.gather(1, place[:, None])[:, 0].clamp_(max=logits.shape[1] - 1)


def _filter(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Logprobs (n, V) of the distribution that keeps the top-k and, of those, the nucleus; -inf outside."""
    ordered, order = logits.log_softmax(-1).sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])
    ordered = ordered.masked_fill(rank >= limit[:, None], -torch.inf).log_softmax(-1)
    before = ordered.exp().cumsum(-1, dtype=torch.float64) - ordered.exp()  # of everything likelier
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]  # rounding may lift the sum above 1
    outside[:, 0] = False
    kept = torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(outside, -torch.inf))
    return kept.log_softmax(-1)


def _draw_kept(logprobs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (n,) and their logprobs (n,) of a distribution that is 0 at most words."""
    tokens, _ = _locate(logprobs.exp(), uniform)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _locate(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) of the weight in which ``uniform`` of their sum falls, and how far into it, in absolute
    terms."""
    edges = weights.double().cumsum(-1)
    target = uniform.clamp(0, 1 - 2.0**-53) * edges[:, -1]
    index = torch.searchsorted(edges, target[:, None], right=True)[:, 0]
    # Rounding may point behind the last positive weight: step back onto it.
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    index = torch.minimum(index, last)
    return index, target - (edges.gather(1, index[:, None]) - weights.gather(1, index[:, None]))[:, 0]
