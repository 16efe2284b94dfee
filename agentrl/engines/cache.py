"""Keys and values of many conversations, one row each, and the attention plans that read and write them.

Rows [0, n) are being decoded; the rest are free or hold the past of a conversation that may go on. Keeping
the active rows in front makes decoding a view of the cache instead of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from agentrl.attention import window_mask

__all__ = ["Decode", "KVCache", "Prefill", "Span"]


class KVCache:
    """Per layer two tensors (rows, kv_heads, capacity, head_dim); capacity doubles as conversations grow."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._capacity = 128
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Reserved memory in bytes."""
        return sum(part.nbytes for pair in self._layers.values() for part in pair)

    def reserve(self, length: int) -> None:
        """Make room for conversations of ``length`` tokens."""
        if length <= self._capacity:
            return
        while self._capacity < length:
            self._capacity *= 2
        for layer, pair in self._layers.items():
            key, value = (self._grown(part) for part in pair)
            self._layers[layer] = key, value

    def _grown(self, part: Tensor) -> Tensor:
        new = self._zeros(part[0])
        new[:, :, : part.shape[2]] = part
        return new

    def _zeros(self, like: Tensor) -> Tensor:
        """Room for all rows of ``like`` (kv_heads, N, head_dim); values may be narrower than keys."""
        return like.new_zeros(self._rows, like.shape[0], self._capacity, like.shape[2])

    def write(self, layer: int, rows: Tensor, positions: Tensor, *, key: Tensor, value: Tensor) -> None:
        """Store ``key`` and ``value`` (kv_heads, N, head_dim) of N tokens at their ``rows`` and ``positions``
        (N,)."""
        if layer not in self._layers:
            # Zeros, not empty: a masked position has weight 0, but 0 times an uninitialised NaN is NaN.
            self._layers[layer] = self._zeros(key), self._zeros(value)
        keys, values = self._layers[layer]
        keys[rows, :, positions] = key.transpose(0, 1)
        values[rows, :, positions] = value.transpose(0, 1)

    def read(self, layer: int, rows: slice | int, length: int) -> tuple[Tensor, Tensor]:
        """Views of the first ``length`` keys and values of ``rows``."""
        keys, values = self._layers[layer]
        return keys[rows, :, :length], values[rows, :, :length]

    def copy(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Give the rows ``targets`` (N,) the first ``length`` tokens of the rows ``sources`` (N,).

        All at once: a row may be among both.
        """
        for pair in self._layers.values():
            for part in pair:
                part[targets, :, :length] = part[sources, :, :length]


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one row: ``count`` of them behind the ``start`` that the cache holds."""

    row: int
    start: int
    count: int


class Prefill:
    """Plan for the new tokens of several rows, packed one behind the other."""

    def __init__(self, cache: KVCache, spans: Sequence[Span], device: torch.device) -> None:
        self._cache, self._spans = cache, spans
        self.positions = torch.cat([torch.arange(s.start, s.start + s.count, device=device) for s in spans])
        counts = torch.tensor([span.count for span in spans], device=device)
        self._row_of_token = torch.tensor([span.row for span in spans], device=device).repeat_interleave(
            counts
        )
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        cache.reserve(max(span.start + span.count for span in spans))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See :class:`agentrl.attention.Plan`."""
        self._cache.write(layer, self._row_of_token, self.positions, key=key, value=value)
        outputs, begin = [], 0
        for span in self._spans:
            end, length = begin + span.count, span.start + span.count
            keys, values = self._cache.read(layer, span.row, length)
            plain = span.start == 0 and (window is None or length <= window)
            mask = None if plain else self._mask(span.count, length, window)
            out = scaled_dot_product_attention(
                query[None, :, begin:end],
                keys[None],
                values[None],
                attn_mask=mask,
                is_causal=plain,
                scale=scale,
                enable_gqa=query.shape[0] != key.shape[0],
            )
            outputs.append(out[0].transpose(0, 1))
            begin = end
        return torch.cat(outputs)

    def _mask(self, count: int, length: int, window: int | None) -> Tensor:
        """Layers share masks, and so do spans of one shape."""
        shape = count, length, window
        if shape not in self._masks:
            self._masks[shape] = window_mask(count, length, window, self.positions.device)
        return self._masks[shape]


class Decode:
    """Plan for one new token of each of the rows [0, n)."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self._cache, self.positions = cache, positions
        self._rows = torch.arange(len(positions), device=positions.device)
        self._length = int(positions.max()) + 1
        self._biases: dict[int | None, Tensor] = {}
        cache.reserve(self._length)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See :class:`agentrl.attention.Plan`."""
        self._cache.write(layer, self._rows, self.positions, key=key, value=value)
        keys, values = self._cache.read(layer, slice(0, len(self._rows)), self._length)
        # The heads that share a key become its queries, (n * kv_heads, group, head_dim): grouped-query
        # attention without a copy of the cache. Two batched products and a softmax take half the time of
        # scaled_dot_product_attention for so few queries.
        grouped = (query * scale).reshape(key.shape[0], -1, *query.shape[1:]).permute(2, 0, 1, 3)
        scores = torch.baddbmm(
            self._bias(window, grouped), grouped.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
        )
        out = torch.bmm(scores.softmax(-1), values.flatten(0, 1))  # (n * kv_heads, group, head_dim)
        return out.view(len(self._rows), -1, out.shape[-1])

    def _bias(self, window: int | None, grouped: Tensor) -> Tensor:
        """0 where a query may look and -inf elsewhere, (n * kv_heads, 1, length); layers share it."""
        if window not in self._biases:
            other = torch.arange(self._length, device=self.positions.device)
            mask = other <= self.positions[:, None]
            if window is not None:
                mask &= other > self.positions[:, None] - window
            bias = grouped.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
            self._biases[window] = bias.repeat_interleave(grouped.shape[1], dim=0)[:, None]
        return self._biases[window]
