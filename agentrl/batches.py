"""Samples to packed tensors: a token budget a microbatch, no padding, a shared opening once.

A batch concatenates sequences: whole samples, and openings that siblings share. Behind them stand the
branches, what is left of those siblings. Attention must treat each sequence as its own, and a branch as its
opening's continuation. What only trained tokens have (logprobs, advantages, ...) is stored for those alone,
(M,). Shapes: N packed tokens, M trained tokens, S samples, T tokens of one sample. Packing and splitting are
deterministic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentrl.attention import Branch
from agentrl.errors import BadConfig
from agentrl.types import FloatArray, IntArray, Sample

Places = npt.NDArray[np.int64]

__all__ = ["Batch", "make_batches", "split_minibatches", "unpack"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """The packed samples of one forward and backward."""

    token_ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, of each token in its sample
    sequences: tuple[int, ...]  # tokens of each whole sample or shared opening, in packed order
    branches: tuple[Branch, ...]  # what goes on behind a shared opening, in packed order behind the sequences
    lengths: tuple[int, ...]  # (S,) tokens of each sample, T; the shared ones count for every sibling
    indices: tuple[int, ...]  # (S,) where each sample stood among those handed to make_batches
    trained: Tensor  # (M,) int64, packed index of each trained token; never the first of a sample
    previous: Tensor  # (M,) int64, packed index of the token before it
    sample: Tensor  # (M,) int64, which of the S samples the token belongs to
    logprobs: Tensor  # (M,) float32 nats, the sampler's
    advantages: Tensor | None = None  # (M,) float32
    old: Tensor | None = None  # (M,) float32 nats, the learner's at the start of the optimizer batch
    reference: Tensor | None = None  # (M,) float32 nats, under the reference model

    def __post_init__(self) -> None:
        tokens = sum(self.sequences) + sum(branch.length for branch in self.branches)
        if not self.token_ids.shape == self.positions.shape == (tokens,):
            raise ValueError(
                f"token_ids {tuple(self.token_ids.shape)} and positions must both be ({tokens},)"
            )
        if len(self.indices) != len(self.lengths):
            raise ValueError(f"{len(self.indices)} indices for {len(self.lengths)} samples")
        for name in ("previous", "sample", *_TRAINED):
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

    Samples of a task that begin with the same untrained tokens share them, up to the first trained token; a
    family too large for one batch repeats its opening. The longest come first, so neighbours are often
    equally long and share an attention kernel; ``Batch.indices`` says where each came from. A sample without
    trained tokens is packed like any other. Raises BadConfig for a sample longer than the budget, ValueError
    where only some samples have advantages, old or reference.
    """
    present = [name for name in _TRAINED if _all_or_none(samples, name)]
    _check_lengths(samples, budget=tokens_per_microbatch)
    families = [
        part
        for shared, members in _families(samples)
        for part in _cut(samples, shared, members, budget=tokens_per_microbatch)
    ]
    bins = _first_fit_decreasing([family.tokens for family in families], budget=tokens_per_microbatch)
    return [_pack(samples, [families[at] for at in members], present=present) for members in bins]


def unpack(batches: Sequence[Batch], values: Sequence[Tensor]) -> list[FloatArray]:
    """What was computed per trained token, (M,) a batch, given back per sample: (T,), 0 where untrained.

    Samples are in the order in which they were handed to ``make_batches``.
    """
    found: dict[int, FloatArray] = {}
    for batch, of_trained in zip(batches, values, strict=True):
        offsets = np.concatenate([[0], np.cumsum(batch.lengths)])
        flat = np.zeros(offsets[-1], np.float32)
        place = batch.positions[batch.trained].cpu().numpy()
        flat[offsets[batch.sample.cpu().numpy()] + place] = of_trained.detach().float().cpu().numpy()
        pieces = np.split(flat, offsets[1:-1])
        found.update(zip(batch.indices, pieces, strict=True))
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


def _check_lengths(samples: Sequence[Sample], *, budget: int) -> None:
    longest = max((len(sample.token_ids) for sample in samples), default=0)
    if longest > budget:
        raise BadConfig(
            f"a sample of {longest} tokens does not fit into a microbatch of {budget}; samples are "
            f"never cut: set batch.tokens_per_microbatch to at least {longest}, or shorten the episodes"
        )


def _first_fit_decreasing(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Indices into ``lengths`` by bin: longest first, each into the first bin with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = next((at for at, free in enumerate(room) if free >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(index)
        room[place] -= length
    return bins


@dataclass(frozen=True, slots=True)
class _Family:
    """Samples with ``shared`` first tokens in common, by index; of one sample nothing is shared."""

    shared: int
    members: tuple[int, ...]
    tokens: int  # packed


def _families(samples: Sequence[Sample]) -> list[tuple[int, list[int]]]:
    """(tokens shared, indices) of the samples with a common opening."""
    found: dict[tuple[str, bytes], list[int]] = {}
    for index, sample in enumerate(samples):
        opening = int(sample.mask.argmax()) if sample.mask.any() else 0
        found.setdefault((sample.task_id, sample.token_ids[:opening].tobytes()), []).append(index)
    families: list[tuple[int, list[int]]] = []
    for (_, opening_ids), members in found.items():
        if opening_ids and len(members) > 1:
            families.append((len(opening_ids) // samples[0].token_ids.itemsize, members))
        else:
            families += [(0, [index]) for index in members]
    return families


def _cut(samples: Sequence[Sample], shared: int, members: Sequence[int], *, budget: int) -> Iterator[_Family]:
    """The family in parts of at most ``budget`` tokens."""
    own = [len(samples[index].token_ids) - shared for index in members]
    for part in _first_fit_decreasing(own, budget=budget - shared):
        indices = tuple(members[at] for at in part)
        yield _Family(shared if len(part) > 1 else 0, indices, shared + sum(own[at] for at in part))


def _pack(samples: Sequence[Sample], families: Sequence[_Family], *, present: Sequence[str]) -> Batch:
    layout = _Layout(samples, families)
    chosen = [samples[index] for index in layout.indices]
    masks = [sample.mask for sample in chosen]
    positions = [np.flatnonzero(mask) for mask in masks]
    return Batch(
        token_ids=torch.from_numpy(np.concatenate(layout.token_ids).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate(layout.positions)),
        sequences=tuple(layout.sequences),
        branches=tuple(layout.branches),
        lengths=tuple(len(sample.token_ids) for sample in chosen),
        indices=tuple(layout.indices),
        trained=torch.from_numpy(
            np.concatenate([w[p] for w, p in zip(layout.where, positions, strict=True)])
        ),
        previous=torch.from_numpy(
            np.concatenate([w[p - 1] for w, p in zip(layout.where, positions, strict=True)])
        ),
        sample=torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(p) for p in positions])),
        **{
            name: torch.from_numpy(
                np.concatenate([getattr(s, name)[m] for s, m in zip(chosen, masks, strict=True)])
            )
            for name in present
        },
    )


class _Layout:
    """Where the tokens of ``families`` go: sequences first, longest first; then the branches."""

    def __init__(self, samples: Sequence[Sample], families: Sequence[_Family]) -> None:
        self.token_ids: list[IntArray] = []
        self.positions: list[Places] = []
        self.branches: list[Branch] = []
        self.indices: list[int] = []  # of the samples in packed order
        self.where: list[Places] = []  # (T,) packed index of each sample's tokens
        self._end = 0
        begun = [
            (self._add(samples[family.members[0]].token_ids[: family.shared or None], start=0), family)
            for family in sorted(families, key=lambda one: -_first_length(samples, one))
        ]
        self.sequences = [len(sequence) for sequence, _ in begun]
        for sequence, family in begun:
            if not family.shared:
                self.indices.append(family.members[0])
                self.where.append(sequence)
        for trunk, family in begun:
            for index in family.members if family.shared else ():
                own = self._add(samples[index].token_ids[family.shared :], start=family.shared)
                self.branches.append(Branch(int(trunk[0]), family.shared, len(own)))
                self.indices.append(index)
                self.where.append(np.concatenate([trunk, own]))

    def _add(self, token_ids: IntArray, *, start: int) -> Places:
        """Append tokens whose positions begin at ``start``; their packed indices."""
        count = len(token_ids)
        self.token_ids.append(token_ids)
        self.positions.append(np.arange(start, start + count))
        self._end += count
        return np.arange(self._end - count, self._end)


def _first_length(samples: Sequence[Sample], family: _Family) -> int:
    """Tokens of the sequence that a family begins with."""
    return family.shared or len(samples[family.members[0]].token_ids)


def _all_or_none(samples: Sequence[Sample], name: str) -> bool:
    """Whether all ``samples`` have the field ``name``; ValueError where only some do."""
    having = sum(getattr(sample, name) is not None for sample in samples)
    if having not in (0, len(samples)):
        raise ValueError(f"{having} of {len(samples)} samples have {name}; give it to all of them or to none")
    return having > 0
