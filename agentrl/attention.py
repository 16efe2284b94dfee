"""Attention over packed tokens, without padding, for any transformers model that uses the AttentionInterface.

A model whose attention implementation is ``PACKED`` sees one row of N tokens that belong to several
sequences, and is called with ``plan=``: the plan knows which token belongs to which sequence.
:class:`Segments` and :class:`Branches` are the learner's (whole sequences, and sequences that share their
beginning; with gradients); the embedded engine brings its own, which reads and writes a KV cache.

Covered: causal full and sliding-window attention, grouped-query attention. Not covered: attention sinks,
soft-capped attention scores, cross attention, and recurrent layers; ``check_forward`` in ``agentrl.models``
finds those at start-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from agentrl.errors import UnsupportedModel

__all__ = ["PACKED", "Branch", "Branches", "Plan", "Segments", "window_mask"]

PACKED = "agentrl_packed"  # the name under which transformers knows this implementation


class Plan(Protocol):
    """Which packed token attends to what."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # (heads, N, head_dim)
        key: Tensor,  # (kv_heads, N, head_dim)
        value: Tensor,  # (kv_heads, N, head_dim)
        *,
        scale: float,
        window: int | None,  # sliding window in tokens, the token itself included; None: full
    ) -> Tensor:
        """The attention output (N, heads, head_dim) of one layer."""
        ...


class Segments:
    """Whole sequences, one behind the other: each token attends to its own sequence up to itself."""

    def __init__(self, lengths: Sequence[int]) -> None:
        # Neighbours of equal length share a kernel call: batches sort samples by length, so there are many.
        self._runs = [(length, len(list(run))) for length, run in groupby(lengths)]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See :class:`Plan`."""
        outputs, start = [], 0
        for length, count in self._runs:
            q, k, v = (
                part[:, start : start + length * count].reshape(len(part), count, length, -1).transpose(0, 1)
                for part in (query, key, value)
            )
            bounded = window is not None and length > window
            mask = window_mask(length, length, window, query.device) if bounded else None
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=not bounded,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            start += length * count
        return torch.cat(outputs)


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that go on behind a sequence packed elsewhere."""

    start: int  # packed index of the sequence's first token
    trunk: int  # tokens of that sequence
    length: int  # tokens of the branch


class Branches:
    """Whole sequences, and behind them branches, each of which attends to its trunk and to itself."""

    def __init__(self, sequences: Sequence[int], branches: Sequence[Branch], device: torch.device) -> None:
        self._whole = sum(sequences)
        self._segments = Segments(sequences)
        self._runs: list[_Run] = []
        begin = self._whole
        # Neighbours behind trunks of equal length share a kernel call.
        for _, run in groupby(branches, key=lambda branch: branch.trunk):
            members = list(run)
            self._runs.append(_Run.of(members, begin, device))
            begin += sum(branch.length for branch in members)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See :class:`Plan`."""
        parts = (part[:, : self._whole] for part in (query, key, value))
        whole = self._segments.attend(layer, *parts, scale=scale, window=window)
        runs = (run.attend(query, key, value, scale=scale, window=window) for run in self._runs)
        return torch.cat([whole, *runs])


@dataclass(frozen=True, slots=True)
class _Run:
    """B branches behind trunks of T tokens each, padded to the longest, L, for this kernel alone."""

    keys: Tensor  # (B, T + L) packed indices of what each branch may attend to
    trunk: int  # T
    kept: Tensor  # of the B x L padded rows, those that are tokens

    @classmethod
    def of(cls, branches: Sequence[Branch], begin: int, device: torch.device) -> _Run:
        """The run of ``branches``, the first of which is packed at ``begin``."""
        trunk = torch.tensor([branch.start for branch in branches], device=device)
        lengths = torch.tensor([branch.length for branch in branches], device=device)
        ends = begin + lengths.cumsum(0)
        place = torch.arange(int(lengths.max()), device=device)
        own = torch.minimum((ends - lengths)[:, None] + place, ends[:, None] - 1)
        shared = trunk[:, None] + torch.arange(branches[0].trunk, device=device)
        kept = (place < lengths[:, None]).flatten().nonzero()[:, 0]
        return cls(torch.cat([shared, own], dim=1), branches[0].trunk, kept)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """The output (tokens of the branches, heads, head_dim)."""
        own = self.keys[:, self.trunk :]
        q, k, v = (
            part[:, index].transpose(0, 1)  # (B, heads, L or T + L, head_dim)
            for part, index in ((query, own), (key, self.keys), (value, self.keys))
        )
        # Padding stands behind a branch's last token, where nothing of the branch looks.
        mask = window_mask(q.shape[2], k.shape[2], window, query.device)
        gqa = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.kept)


def window_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask (queries, keys), True where attended, of the last ``queries`` positions of ``keys``."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    other = torch.arange(keys, device=device)[None, :]
    mask = other <= position
    return mask if window is None else mask & (other > position - window)


def _forward(
    module: Any,
    query: Tensor,  # (1, heads, N, head_dim)
    key: Tensor,  # (1, kv_heads, N, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    name = type(module).__name__
    if plan is None:
        raise UnsupportedModel(
            f"{name} was not told which token belongs to which sequence: its model does not pass keyword "
            "arguments on and can't be packed; use another architecture (Qwen3, Llama 3, Gemma 3, ...)"
        )
    if softcap is not None or s_aux is not None:
        feature = "soft-capped scores" if s_aux is None else "attention sinks"
        raise UnsupportedModel(
            f"{name} uses {feature}, which the embedded engine and the learner do not implement; use a model "
            "without them (Qwen3, Llama 3, Gemma 3, ...)"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = (part[0].to(_precision(part)) for part in (query, key, value))
    out = plan.attend(module.layer_idx, *parts, scale=scale, window=sliding_window)  # (N, heads, head_dim)
    return out[None].to(query.dtype), None


def _precision(part: Tensor) -> torch.dtype:
    """Float64 for 16-bit models on a CPU, so that the rounding of its result does not depend on the kernel.

    Matrix products of 16-bit numbers come out bit for bit equal whatever stands beside a row, but attention's
    sums depend on the shape. The smallest difference flips the rounding of some element, each flip causes
    others in the next layer, and after a few layers all of bfloat16's rounding noise is there: 0.01 nats a
    token on Gemma 3 270M in float32, 0.018 in bfloat16, and none at all so.
    """
    return torch.float64 if part.device.type == "cpu" and part.dtype.itemsize < 4 else part.dtype


AttentionInterface.register(PACKED, _forward)
