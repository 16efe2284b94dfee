"""vLLM as its engine's tests want it: a fake core holds adapters or weights, answers, pauses, lies and dies
as told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file

from agentrl.engine import Adapter, Sampling
from agentrl.engines.vllm import VLLMEngine, VLLMSettings
from agentrl.engines.vllm_core import CoreDied, PublishedAdapter, Sampled
from agentrl.engines.vllm_transfer import Weights
from agentrl.engines.vllm_worker import checksum, digest
from agentrl.errors import EngineError
from agentrl.types import IntArray

__all__ = ["PROMPT", "FakeCore", "Vllm", "make_settings", "sampling", "serve", "until"]

T = TypeVar("T")
PROMPT: IntArray = np.arange(1, 9, dtype=np.int32)


def make_settings(**changes: Any) -> VLLMSettings:
    return VLLMSettings(
        **{"model": "somewhere", "context": 64, "max_sequences": 8, "max_lora_rank": 4} | changes
    )


def sampling(tokens: int = 4, *, seed: int = 0, **more: Any) -> Sampling:
    return Sampling(max_tokens=tokens, seed=seed, **more)


class FakeCore:
    """Serves what lies in the folders that it is told to load; a request waits until it is released."""

    def __init__(self) -> None:
        self.vocabulary, self.dtype = 100, torch.float32
        self.dead = self.stopped = self.paused = False
        self.loaded: dict[str, Adapter] = {}
        self.weights: dict[str, torch.Tensor] = {}  # that were replaced
        self.sent: list[list[str]] = []  # names, of every replacement
        self.requests: list[tuple[list[int], Sampling, str]] = []
        self.dies_at_add = self.dies_at_sleep = False
        self._go, self._cut = asyncio.Event(), asyncio.Event()
        self._go.set()

    def hold(self) -> None:
        """Let requests wait."""
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def die(self) -> None:
        self.dead = True
        self._cut.set()

    async def sample(
        self, token_ids: list[int], sampling: Sampling, *, adapter: PublishedAdapter | None
    ) -> Sampled:
        assert not self.paused
        assert adapter is None or adapter.name in self.loaded
        self.requests.append((token_ids, sampling, adapter.name if adapter else ""))
        cut = self._cut
        waits = [asyncio.ensure_future(event.wait()) for event in (self._go, cut)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.dead:
            raise CoreDied("gone")
        ended = not cut.is_set()
        said = sampling.max_tokens if ended else 1
        return Sampled([7] * said, [-0.5] * said, "length" if ended else "aborted", len(token_ids), 3)

    async def score(self, token_ids: list[int], *, adapter: PublishedAdapter | None) -> list[float]:
        return [0.0] * len(token_ids)

    async def add(self, adapter: PublishedAdapter) -> None:
        if self.dies_at_add:
            self.dead = True
        if self.dead:
            raise CoreDied("gone")
        assert len(self.loaded) < 2
        assert adapter.name not in self.loaded
        config = json.loads((adapter.folder / "adapter_config.json").read_text())
        self.loaded[adapter.name] = Adapter(config, load_file(adapter.folder / "adapter_model.safetensors"))

    async def remove(self, adapter: PublishedAdapter) -> None:
        if self.dead:
            raise CoreDied("gone")
        self.loaded.pop(adapter.name, None)

    async def read_back(self, adapter: PublishedAdapter) -> dict[str, str]:
        found = self.loaded[adapter.name]
        scaled = {"A": 1.0, "B": found.config["lora_alpha"] / found.config["r"]}
        served = {}
        for name, values in found.tensors.items():
            module, side = name.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
            padded = torch.zeros(8, 8)
            padded[: values.shape[0], : values.shape[1]] = values * scaled[side]
            served[f"{module}.{side}"] = digest(padded)
        return served

    async def pause(self) -> None:
        self.paused = True
        self._cut.set()

    async def resume(self) -> None:
        self.paused = False
        self._cut = asyncio.Event()

    async def sleep(self) -> None:
        self._live_on()
        await self.pause()

    async def wake(self) -> None:
        self._live_on()
        await self.resume()

    def _live_on(self) -> None:
        self.dead |= self.dies_at_sleep
        if self.dead:
            raise CoreDied("gone")

    async def fused_layers(self) -> dict[str, list[str]]:
        return {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    async def replace(self, weights: Weights) -> None:
        assert self.paused or not self.requests  # nothing is in flight
        self.sent.append(list(weights.shapes))
        for name, shape in weights.shapes.items():
            if self.dies_at_add:
                self.dead = True
            if self.dead:
                raise CoreDied("gone")
            self.weights[name] = weights.make(name).clone()
            assert tuple(self.weights[name].shape) == shape

    async def read_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return {name: checksum(self.weights[name]) for name in shapes}

    async def stop(self) -> None:
        self.dead = self.stopped = True


class Vllm:
    """Starts fake cores and remembers them."""

    def __init__(self, *, fails: int = 0) -> None:
        self.cores: list[FakeCore] = []
        self.notes: list[str] = []
        self.fails = fails  # of the next starts

    async def __call__(self, settings: VLLMSettings, *, home: Path) -> FakeCore:
        assert home.is_dir()
        if self.fails:
            self.fails -= 1
            raise EngineError("no memory")
        self.cores.append(FakeCore())
        return self.cores[-1]


def serve(
    use: Callable[[VLLMEngine, Vllm], Awaitable[T]],
    *,
    base: Mapping[str, torch.Tensor] | None = None,
    **changes: Any,
) -> T:
    """What ``use`` makes of an engine over fake cores, which is closed afterwards and leaves nothing."""

    async def main() -> T:
        vllm = Vllm()
        engine = await VLLMEngine.start_with(
            make_settings(**changes), base=base, start_core=vllm, on_note=vllm.notes.append
        )
        home = engine._versions.home
        try:
            return await use(engine, vllm)
        finally:
            await engine.close()
            assert vllm.cores[-1].stopped
            assert not home.exists()

    return asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)
