"""The seam to inference: token ids in, ids and logprobs out. Implementations are in ``agentrl.engines``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from agentrl.types import Completion, FloatArray, IntArray

__all__ = ["Adapter", "Engine", "Measured", "Sampling", "Sleeper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one completion is drawn. Training refuses top_p and top_k: the learner can't know their support."""

    max_tokens: int  # of the completion, the stop token included
    seed: int  # of this request alone
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # nucleus: the smallest set of tokens with at least this probability
    top_k: int = 0  # the k likeliest tokens; 0: all
    stop_token_ids: tuple[int, ...] = ()  # sampling one of them ends the completion

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must be 0 or above and fit 64 bits")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or above")
        if len(self.stop_token_ids) > 8:
            raise ValueError(f"{len(self.stop_token_ids)} stop_token_ids were given; at most 8 are allowed")


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter as PEFT saves it."""

    config: Mapping[str, Any]  # adapter_config.json
    tensors: Mapping[str, Any]  # adapter_model.safetensors by name; torch tensors on the CPU


class Engine(Protocol):
    """What rollouts need of an inference engine."""

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """Sample one completion of ``prompt_ids`` (prompt tokens,).

        Raises EngineError (the world's fault) when the engine is gone, UserError when the prompt can't be
        served.
        """
        ...

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """Logprobs (T,) in nats of each token given those before it, after ``temperature``; the first: 0.

        Temperature 0 is scored as 1, as ``generate`` reports greedy tokens. Raises as ``generate`` does.
        """
        ...

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """Serve ``adapter`` (None: the bare base) as ``version`` from the next request on."""
        ...

    async def close(self) -> None:
        """Release memory, threads and processes; idempotent."""
        ...


@runtime_checkable
class Measured(Protocol):
    """An engine that knows what its requests cost."""

    def take_figures(self) -> dict[str, float]:
        """Seconds and tokens since the last call, under their metrics' names: amounts, which add up, also
        while requests are in flight."""
        ...


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can leave its GPU to the learner for a while."""

    async def sleep(self) -> None:
        """Free the GPU until :meth:`wake`; requests wait meanwhile."""
        ...

    async def wake(self) -> None:
        """Take the GPU again."""
        ...
