"""Softmax over a large vocabulary, one tile of logits at a time, and logprobs under a frozen head.

A pass over (rows, 262144) float32 logits costs more in memory traffic than in arithmetic; a tile stays in the
cache. The running maximum and sum are those of online softmax (Milakov and Gimelshein, arXiv 1805.02867).
Engine and learner share it, so that equal logits give equal logprobs, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["RunningSoftmax", "frozen_head_logprobs", "tile_width"]

_LEAST = -80.0  # e^-80 is lost in any float32 sum, and what lies below e^-87 is a denormal, slow to compute


def tile_width(device: torch.device) -> int:
    """Words of the vocabulary in a tile, whatever the number of rows: sums then do not depend on it.

    On a CPU 1024 rows of float32 fit into its last cache; a GPU needs larger kernels to be busy.
    """
    return 2048 if device.type == "cpu" else 32768


class RunningSoftmax:
    """The normaliser of ``rows`` distributions whose logits come tile by tile; logits must be finite."""

    def __init__(self, rows: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.top = torch.full((rows,), -torch.inf, dtype=dtype, device=device)  # largest logit so far
        self.total = torch.zeros(rows, dtype=dtype, device=device)  # sum of exp(logit - top)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """exp(logits - top) of a tile (rows, width), and by which factor (rows,) earlier sums shrink."""
        top = torch.maximum(self.top, logits.amax(-1))
        weights = torch.sub(logits, top[:, None]).clamp_(min=_LEAST).exp_()
        shrink = (self.top - top).exp_()
        self.total = self.total * shrink + weights.sum(-1)
        self.top = top
        return weights, shrink

    def logprobs(self, logits: Tensor) -> Tensor:
        """Of one word in each row, by its logit (rows,), once all tiles were added."""
        return (logits - self.top) - self.total.log()


def frozen_head_logprobs(
    rows: Tensor,  # (R, D) hidden states
    token_ids: Tensor,  # (R,) int64
    weight: Tensor,  # (V, D) of the head, which gets no gradient
    *,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Logprob (R,) of each token, and the entropy (R,) there, detached; logits never exist as a whole.

    The gradient of a logprob with respect to its row is known up to the incoming factor once the logits are,
    so it is computed with them: backward multiplies, and recomputes nothing.
    """
    logprobs, entropies = _FrozenHead.apply(rows, token_ids, weight, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropies


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, token_ids: Tensor, weight: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, gradient = _tiled(
            rows, token_ids, weight, temperature=temperature, with_gradient=ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * incoming[:, None].to(gradient.dtype), None, None, None


def _tiled(
    rows: Tensor, token_ids: Tensor, weight: Tensor, *, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logprobs (R,), entropies (R,) and the logprobs' gradients with respect to their rows (R, D)."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    width = tile_width(rows.device)
    softmax = RunningSoftmax(len(rows), dtype=dtype, device=rows.device)
    energy, chosen = torch.zeros_like(softmax.total), torch.zeros_like(softmax.total)
    expected = torch.zeros(rows.shape if with_gradient else 0, dtype=dtype, device=rows.device)
    for start in range(0, len(weight), width):
        part = weight[start : start + width]
        logits = linear(rows, part).to(dtype)
        if temperature != 1.0:
            logits /= temperature
        weights, shrink = softmax.add(logits)
        if with_gradient:  # of the mean embedding, which the distribution expects
            expected.mul_(shrink[:, None]).add_(weights.to(part.dtype) @ part)
        place = token_ids - start
        inside = (place >= 0) & (place < len(part))
        found = logits.gather(1, place.clamp(0, len(part) - 1)[:, None])[:, 0]
        chosen = torch.where(inside, found, chosen)
        energy = energy * shrink + weights.mul_(logits).sum(-1)
    logprobs = softmax.logprobs(chosen)
    entropies = -softmax.logprobs(energy / softmax.total)
    if not with_gradient:
        return logprobs, entropies, None
    gradient = (weight[token_ids] - expected.div_(softmax.total[:, None])).div_(temperature)
    return logprobs, entropies, gradient.to(rows.dtype)
