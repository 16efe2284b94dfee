"""Proof that the engine serves the version it was given: fixed prompts, scored by engine and learner.

After every swap the engine scores the prompts, samples a few tokens behind each, and goes on from there, so
that it computes prompts afresh and also meets its own cached prefixes. The learner scores the same tokens
under the version that was loaded, the versions before it and the bare base. Two things are asked of each kind
of request: that engine and learner differ by rounding alone, and that the engine stands where the loaded
version stands, not where another one does.

For the second, a token's place is (engine - other) / (loaded - other): 1 where the engine has the loaded
version's logprob, 0 where it has the other's. Tokens count by how far the two are apart, and what is judged
is their median, with an interval that holds for errors of any size and shape as long as the learner errs
alike under both. So a wrong version is found below the tolerance of the first question, too, outliers of
16-bit kernels stop no run, and where a step moved the logprobs by less than rounding does, the row says so.

An engine that merges the adapter into a base of 16 bits serves another policy than the learner's: weights
have lost of the adapter what is small beside them. So the learner scores with the same merged weights then,
and the proof is as sharp as without; what the two policies differ in is in ``mismatch/*``.

Not covered: versions too alike to be told apart, which only a digest of the engine's tensors can tell; and
whether the learner itself computes what it should.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from agentrl.engine import Adapter, Engine, Sampling
from agentrl.errors import EngineError, UserError, WrongWeights
from agentrl.learner import Learner
from agentrl.seeds import derive
from agentrl.threads import in_compute_thread
from agentrl.types import Completion, FloatArray, IntArray, Sample

__all__ = ["SAMPLED_TOKENS", "Canary", "Place", "locate"]

T = TypeVar("T")

SAMPLED_TOKENS = 16  # of each of the two completions behind a prompt
_KINDS = ("tokens of scored prompts", "sampled tokens", "tokens sampled behind a cached prefix")
_UNASKED = -1  # the kind of a token that is not compared
# Mean nats between engine and learner that rounding explains, in float32 and in 16 bits. Kernels in float32
# are 1e-6 apart; in bfloat16 two of transformers' are 0.09 and 0.10 from ours, on prompts of Gemma 3 270M.
_TOLERANCES = (1e-3, 0.3)
_SIGMAS = 5.0  # of certainty: with nine tests a step at most one false alarm in 30,000 steps
_OFF = 0.25  # how far the engine may stand from a place where rounding is small: kernels round adapters, too
_SHARP = 0.5  # the spread of places up to which rounding is small next to what moved


@dataclass(frozen=True, slots=True)
class Place:
    """Where the engine stands on the way from another version (0) to the loaded one (1)."""

    middle: float  # the tokens' median place
    low: float  # of its interval
    high: float
    spread: float  # between the tokens' quartiles
    sigmas: float  # standard errors by which tokens stand nearer to the loaded version; below 0: to the other

    @property
    def told(self) -> bool:
        """Whether it is certain which of the two is nearer."""
        return self.low > 0.5 or self.high < 0.5

    def allows(self, place: int) -> bool:
        """Whether the engine may stand at ``place``: 1 or 0."""
        if self.told and (self.low > 0.5) != bool(place):
            return False
        return self.spread > _SHARP or self.low - _OFF <= place <= self.high + _OFF


def locate(engine: FloatArray, loaded: FloatArray, other: FloatArray) -> Place:
    """The place of the engine's logprobs (N,) between the learner's under two versions, (N,) each, in nats.

    Were the two versions one, a token would be as likely to stand above 1/2 as below, whatever its weight, so
    the weighted vote exceeds s standard errors with probability at most exp(-s^2 / 2) (Hoeffding, JASA 58,
    1963). The interval inverts that sign test.
    """
    apart = loaded.astype(np.float64) - other
    moved = apart != 0
    if not moved.any():
        return Place(math.nan, -math.inf, math.inf, math.inf, 0.0)
    weights = np.sqrt(np.abs(apart[moved]))  # not more: few tokens would outvote the rest
    places = (engine.astype(np.float64) - other)[moved] / apart[moved]
    order = np.argsort(places)
    places, shares = places[order], np.cumsum(weights[order] / weights.sum())
    error = float(np.linalg.norm(weights) / weights.sum())  # of the vote's mean, were each a coin's
    half = _SIGMAS * error / 2
    lower, below, middle, above, upper = (
        float(places[min(int(np.searchsorted(shares, share)), len(places) - 1)])
        for share in (0.5 - half, 0.25, 0.5, 0.75, 0.5 + half)
    )
    if half >= 0.5:  # not even a unanimous vote would be certain
        lower, upper = -math.inf, math.inf
    vote = float(np.sign(places - 0.5) @ weights[order] / weights.sum())
    return Place(middle, lower, upper, above - below, vote / error)


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """One version as the learner can score it."""

    version: int
    name: str
    adapter: Adapter | None  # None: the bare base


@dataclass(frozen=True, slots=True, eq=False)
class _Heard:
    """What the engine said; N tokens, the sequences one behind the other."""

    sequences: Sequence[IntArray]  # each a prompt and its two completions
    logprobs: FloatArray  # (N,) nats, 0 where not asked
    kinds: npt.NDArray[np.int8]  # (N,) index into _KINDS, or _UNASKED

    def samples(self) -> list[Sample]:
        """For the learner; what was asked is what is trained."""
        ends = np.cumsum([len(sequence) for sequence in self.sequences])
        asked = np.split(self.kinds != _UNASKED, ends[:-1])
        return [
            Sample(
                task_id=f"canary-{index}",
                sibling=0,
                token_ids=ids,
                mask=mask,
                logprobs=np.zeros(len(ids), np.float32),
                rewards=np.zeros(len(ids), np.float32),
                versions=np.where(mask, 0, -1),
            )
            for index, (ids, mask) in enumerate(zip(self.sequences, asked, strict=True))
        ]


@dataclass(frozen=True, slots=True, eq=False)
class _Evidence:
    """Logprobs (N,) in nats of the tokens of one kind of request."""

    kind: str
    engine: FloatArray
    loaded: FloatArray
    others: Sequence[FloatArray]
    places: Sequence[Place]  # of the engine, between each of the others and the loaded version

    @property
    def gap(self) -> float:
        """Mean distance in nats between the engine and the loaded version."""
        return _gap(self.engine, self.loaded)


class Canary:
    """Fixed prompts on which engine and learner must agree after every swap."""

    def __init__(
        self,
        engine: Engine,
        learner: Learner,
        *,
        prompts: Sequence[IntArray],  # (tokens,) each: how episodes open, about 64 tokens of it
        seed: int,  # of what is sampled
        tolerance: float | None = None,  # mean nats from engine to learner; None: by the model's precision
        adapter_dtype: torch.dtype | None = None,  # that the engine rounds adapters to; None: it does not
        merged: bool = False,  # whether the engine has adapter and base in one, rounded as the base is
        deadline_s: float = 600.0,  # of the requests that are sent at the same time
    ) -> None:
        """Asks nothing yet. Raises ValueError for prompts that prove nothing."""
        distinct = _distinct(prompts)
        self._prompts = [prompt for prompt, _ in distinct]
        self._known = [known for _, known in distinct]  # first tokens of each that are not compared
        self._engine, self._learner, self._seed = engine, learner, seed
        self._tolerance = _tolerance(learner) if tolerance is None else tolerance
        self._adapter_dtype, self._merged, self._deadline_s = adapter_dtype, merged, deadline_s
        self._scores = True  # until the engine refuses to
        self._base = _Weights(0, "the bare base", None)
        self._before = self._apart = self._base  # the last one proved; the last that was told from its past

    async def prove(self, adapter: Adapter, version: int) -> dict[str, float]:
        """Prove that the engine serves ``adapter``, which it was given as ``version``; a row of metrics.

        Raises WrongWeights where it serves anything else, and says what that seems to be; EngineError where
        it fails.
        """
        began = time.perf_counter()
        loaded = _Weights(version, f"version {version}", self._rounded(adapter))
        others = self._others(version)
        heard = await self._hear(version)
        samples = heard.samples()
        under = [await in_compute_thread(self._score, weights, samples) for weights in (loaded, *others)]
        evidence = _sort(heard, under)
        wrong = [each for each in evidence if not self._fits(each)]
        if wrong:
            afresh = evidence[0].kind == _KINDS[0] and evidence[0] is not wrong[0]
            raise WrongWeights(self._describe(wrong[0], version=version, others=others, afresh=afresh))
        self._remember(loaded, others, evidence)
        errors = np.concatenate([np.abs(each.engine - each.loaded) for each in evidence])
        return {
            "canary/mean_nats": float(errors.mean()),
            "canary/max_nats": float(errors.max()),
            "canary/sigmas": min(each.places[-1].sigmas for each in evidence),
            "canary/identified": float(np.mean([each.places[-1].told for each in evidence])),
            "time/canary_s": time.perf_counter() - began,
        }

    def _others(self, version: int) -> list[_Weights]:
        """What else the engine might serve; the version before stands last."""
        known = dict.fromkeys((self._base, self._apart, self._before))
        return [weights for weights in known if weights is self._base or weights.version != version]

    def _remember(self, loaded: _Weights, others: Sequence[_Weights], evidence: Sequence[_Evidence]) -> None:
        """Keep what the next version is compared with.

        Where steps are too small to be told apart one by one, the version that they began with is kept, too:
        an engine that takes none of them is found out when they add up.
        """
        told = {
            weights: all(each.places[place].told for each in evidence) for place, weights in enumerate(others)
        }
        if told.get(self._apart, True):
            self._apart = loaded
        self._before = loaded

    def _rounded(self, adapter: Adapter) -> Adapter:
        if self._adapter_dtype is None:
            return adapter
        rounded = {name: tensor.to(self._adapter_dtype) for name, tensor in adapter.tensors.items()}
        return Adapter(adapter.config, rounded)

    # -- what the engine says --

    async def _hear(self, version: int) -> _Heard:
        """Ask for all prompts at once: for their scores, for a completion, and for how it goes on."""
        scored = await self._score_prompts()
        sampled = await self._sample(self._prompts, "sampled", version=version)
        talks = [np.concatenate(pair) for pair in zip(self._prompts, _ids(sampled), strict=True)]
        continued = await self._sample(talks, "continued", version=version)
        sequences = [np.concatenate(pair) for pair in zip(talks, _ids(continued), strict=True)]
        logprobs = [
            np.concatenate([prompt, one.logprobs, other.logprobs])
            for prompt, one, other in zip(scored, sampled, continued, strict=True)
        ]
        kinds = [
            np.repeat(
                np.array([_UNASKED, 0 if self._scores else _UNASKED, 1, 2], np.int8),
                [known, len(prompt) - known, len(one.token_ids), len(other.token_ids)],
            )
            for known, prompt, one, other in zip(self._known, self._prompts, sampled, continued, strict=True)
        ]
        return _Heard(sequences, np.concatenate(logprobs), np.concatenate(kinds))

    async def _score_prompts(self) -> list[FloatArray]:
        """Logprobs of each prompt's tokens, zeros where the engine does not score; whether it does is decided
        once."""
        if self._scores:
            try:
                return await self._in_time(self._engine.score(prompt, 1.0) for prompt in self._prompts)
            except UserError:
                self._scores = False
        return [np.zeros(len(prompt), np.float32) for prompt in self._prompts]

    async def _sample(self, prompts: Sequence[IntArray], name: str, *, version: int) -> Sequence[Completion]:
        """A completion of each prompt. Raises WrongWeights for one of another version than ``version``."""
        seeds = [derive(self._seed, "canary", name, place) for place in range(len(prompts))]
        samplings = [Sampling(max_tokens=SAMPLED_TOKENS, seed=seed) for seed in seeds]
        asked = zip(prompts, samplings, strict=True)
        completions = await self._in_time(self._engine.generate(*request) for request in asked)
        versions = {int(each) for completion in completions for each in completion.versions}
        if not versions:
            raise EngineError(
                f"the engine sampled no token of {len(prompts)} completions that were to prove its weights; "
                "it was stopped meanwhile: load the adapter again"
            )
        if versions != {version}:
            reported = ", ".join(str(each) for each in sorted(versions))
            raise WrongWeights(
                f"version {version} was loaded, and the engine says that it sampled with version {reported}; "
                f"{_ADVICE}"
            )
        return completions

    async def _in_time(self, requests: Iterable[Awaitable[T]]) -> list[T]:
        """What they return. Raises EngineError at the deadline."""
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.gather(*requests)
        except TimeoutError as error:
            raise EngineError(
                f"the engine took over {self._deadline_s:g} s to prove its weights "
                "(rollout.request_deadline_s)"
            ) from error

    # -- what the learner says --

    def _score(self, weights: _Weights, samples: Sequence[Sample]) -> FloatArray:
        """Logprobs (N,) of all samples' tokens under ``weights``; the same batches for every version, as
        rounding depends on them."""
        scored = self._learner.score_as(weights.adapter, samples, temperature=1.0, merged=self._merged)
        return np.concatenate(scored)

    # -- what is wrong --

    def _fits(self, evidence: _Evidence) -> bool:
        """Whether the engine may be serving the loaded version."""
        return evidence.gap <= self._tolerance and all(place.allows(1) for place in evidence.places)

    def _describe(
        self, evidence: _Evidence, *, version: int, others: Sequence[_Weights], afresh: bool
    ) -> str:
        """The failure in words; ``afresh``: prompts that were computed afresh fit."""
        places = [
            f"{place.middle:.2f} [{place.low:.2f}, {place.high:.2f}] of the way from {other.name} to it"
            for place, other in zip(evidence.places, others, strict=True)
            if place.told
        ]
        served = self._seems(evidence, others=others, afresh=afresh)
        return (
            f"version {version} was loaded, and the engine seems to serve {served}: "
            f"{len(evidence.engine)} {evidence.kind} differ by {evidence.gap:.2g} nats on average from the "
            f"learner's logprobs of version {version} (allowed: {self._tolerance:g})"
            f"{''.join(f', and stand at {place}' for place in places)}; {_ADVICE}"
        )

    def _seems(self, evidence: _Evidence, *, others: Sequence[_Weights], afresh: bool) -> str:
        """What the engine serves, in words."""
        most = min(self._tolerance, evidence.gap)
        near = [
            (gap, other)
            for place, other, logprobs in zip(evidence.places, others, evidence.others, strict=True)
            if place.allows(0) and (gap := _gap(evidence.engine, logprobs)) <= most
        ]
        if near:
            _, served = min(near, key=lambda pair: pair[0])
            before = served is self._before and served is not self._base
            return f"{served.name}, the one before" if before else served.name
        if afresh:
            return "it behind prefixes that were cached under other weights"
        if evidence.places[-1].told and evidence.places[-1].allows(1):
            return "it in another precision or at another temperature"
        rounds = evidence.gap <= _TOLERANCES[1]  # as far as 16 bits do
        return "none that is known" + (", or it in another precision" if rounds else "")


_ADVICE = (
    "nothing was trained on it: see that the engine takes every version under a name of its own and drops "
    "what it cached under others, then go on with --resume"
)


def _sort(heard: _Heard, under: Sequence[FloatArray]) -> list[_Evidence]:
    """The evidence by kind of request, of those that there were; ``under`` (N,) each: what the learner says
    under the loaded version, then under the others."""
    evidence: list[_Evidence] = []
    for index, kind in enumerate(_KINDS):
        chosen = heard.kinds == index
        if chosen.any():
            engine, loaded, *others = (logprobs[chosen] for logprobs in (heard.logprobs, *under))
            places = [locate(engine, loaded, other) for other in others]
            evidence.append(_Evidence(kind, engine, loaded, others, places))
    return evidence


def _ids(completions: Sequence[Completion]) -> list[IntArray]:
    return [completion.token_ids for completion in completions]


def _gap(one: FloatArray, other: FloatArray) -> float:
    """Mean distance in nats."""
    return float(np.abs(one - other).mean())


def _tolerance(learner: Learner) -> float:
    """Mean nats that rounding may put between engine and learner."""
    single, half = _TOLERANCES
    return single if learner.policy.get_base_model().dtype.itemsize >= 4 else half


def _distinct(prompts: Sequence[IntArray]) -> list[tuple[IntArray, int]]:
    """The prompts, each with how many of its first tokens say nothing new: the first of all, and those that
    an earlier prompt begins with, whose errors would be counted twice. Without those that are nothing else.

    Raises ValueError where none is left.
    """
    kept: list[tuple[IntArray, int]] = []
    for prompt in (np.array(prompt, np.int32) for prompt in prompts):
        known = max((_shared(prompt, earlier) for earlier, _ in kept), default=1)
        if max(known, 1) < len(prompt):
            kept.append((prompt, max(known, 1)))
    if not kept:
        raise ValueError(
            f"{len(prompts)} prompts were given for the canary, none with a second token; give it openings "
            "of episodes"
        )
    return kept


def _shared(one: IntArray, other: IntArray) -> int:
    """How many first tokens the two have in common."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
