"""Samples to packed tensors: a token budget a microbatch, no padding, every sample whole.

A batch concatenates samples; attention must treat each of them as a sequence of its own. What only trained
tokens have (logprobs, advantages, ...) is stored for those alone, (M,). Shapes: N packed tokens, M trained
tokens, S samples, T tokens of one sample. Packing and splitting are deterministic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentrl.errors import BadConfig
from agentrl.types import FloatArray, Sample

__all__ = ["Batch", "make_batches", "split_minibatches", "unpack"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """The packed samples of one forward and backward."""

    token_ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, from 0 in every sample
    lengths: tuple[int, ...]  # (S,) tokens of each sample, in packed order; they sum to N
    indices: tuple[int, ...]  # (S,) where each sample stood among those handed to make_batches
    trained: Tensor  # (M,) int64, packed index of each trained token; never the first of a sample
    sample: Tensor  # (M,) int64, which of the S samples the token belongs to
    logprobs: Tensor  # (M,) float32 nats, the sampler's
    advantages: Tensor | None = None  # (M,) float32
    old: Tensor | None = None  # (M,) float32 nats, the learner's at the start of the optimizer batch
    reference: Tensor | None = None  # (M,) float32 nats, under the reference model

    def __post_init__(self) -> None:
        tokens = sum(self.lengths)
        if not self.token_ids.shape == self.positions.shape == (tokens,):
            raise ValueError(
                f"token_ids {tuple(self.token_ids.shape)} and positions must both be ({tokens},)"
            )
        if len(self.indices) != len(self.lengths):
            raise ValueError(f"{len(self.indices)} indices for {len(self.lengths)} samples")
        for name in ("sample", *_TRAINED):
            values = getattr(self, name)
            if values is not None and values.shape != self.trained.shape:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}, trained {tuple(self.trained.shape)}"
                )

    @property
    def trained_tokens(self) -> int:
        """M, how many tokens carry loss."""
        return len(self.trained)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return Batch(**moved)


_TRAINED = (
    "logprobs",
    "advantages",
    "old",
    "reference",
)  # of a Sample (T,) and, at trained tokens, of a Batch (M,)


def make_batches(samples: Sequence[Sample], *, tokens_per_microbatch: int) -> list[Batch]:
    """Pack ``samples`` into batches of at most ``tokens_per_microbatch`` tokens each, first fit decreasing.

    The longest samples come first, so neighbours are often equally long and share an attention kernel;
    ``Batch.indices`` says where each came from. A sample without trained tokens is packed like any other.
    Raises BadConfig for a sample longer than the budget, ValueError where only some samples have advantages,
    old or reference.
    """
    present = [name for name in _TRAINED if _all_or_none(samples, name)]
    members = _first_fit_decreasing([len(s.token_ids) for s in samples], budget=tokens_per_microbatch)
    return [_pack(samples, indices, present=present) for indices in members]


def unpack(batches: Sequence[Batch], values: Sequence[Tensor]) -> list[FloatArray]:
    """What was computed per trained token, (M,) a batch, given back per sample: (T,), 0 where untrained.

    Samples are in the order in which they were handed to ``make_batches``.
    """
    found: dict[int, FloatArray] = {}
    for batch, of_trained in zip(batches, values, strict=True):
        packed = torch.zeros(len(batch.token_ids), dtype=torch.float32)
        packed[batch.trained.cpu()] = of_trained.detach().to("cpu", torch.float32)
        pieces = torch.split(packed, list(batch.lengths))
        found.update((index, piece.numpy()) for index, piece in zip(batch.indices, pieces, strict=True))
    return [found[index] for index in range(len(found))]


def split_minibatches(samples: Sequence[Sample], count: int, *, seed: int) -> list[list[Sample]]:
    """``count`` disjoint parts that cover ``samples``, drawn with ``seed``; siblings may be parted.

    The parts' trained tokens differ by at most those of the largest sample. With fewer samples than ``count``
    some parts are empty. Samples keep their order within a part.
    """
    if count < 1:
        raise ValueError(f"count is {count}; samples are split into at least 1 minibatch")
    members: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for index in np.random.default_rng(seed).permutation(len(samples)).tolist():
        lightest = min(range(count), key=lambda part: (tokens[part], len(members[part])))
        members[lightest].append(index)
        tokens[lightest] += samples[index].trained_tokens
    return [[samples[index] for index in sorted(part)] for part in members]


def _first_fit_decreasing(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Indices into ``lengths`` by bin: longest first, each into the first bin with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > budget:
            raise BadConfig(
                f"a sample of {length} tokens does not fit into a microbatch of {budget}; samples are "
                f"never cut: set batch.tokens_per_microbatch to at least {length}, or shorten the episodes"
            )
        place = next((at for at, free in enumerate(room) if free >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(index)
        room[place] -= length
    return bins


def _pack(samples: Sequence[Sample], indices: Sequence[int], *, present: Sequence[str]) -> Batch:
    chosen = [samples[index] for index in indices]
    mask = np.concatenate([s.mask for s in chosen])
    lengths = tuple(len(s.token_ids) for s in chosen)
    owner = np.repeat(np.arange(len(chosen)), lengths)
    return Batch(
        token_ids=torch.from_numpy(np.concatenate([s.token_ids for s in chosen]).astype(np.int64)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        indices=tuple(indices),
        trained=torch.from_numpy(np.flatnonzero(mask)),
        sample=torch.from_numpy(owner[mask]),
        **{
            name: torch.from_numpy(np.concatenate([getattr(s, name) for s in chosen])[mask])
            for name in present
        },
    )


def _all_or_none(samples: Sequence[Sample], name: str) -> bool:
    """Whether all ``samples`` have the field ``name``; ValueError where only some do."""
    having = sum(getattr(sample, name) is not None for sample in samples)
    if having not in (0, len(samples)):
        raise ValueError(f"{having} of {len(samples)} samples have {name}; give it to all of them or to none")
    return having > 0
