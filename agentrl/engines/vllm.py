"""Inference by vLLM in processes of its own: token ids in, ids and logprobs out, adapters that are proved.

vLLM's core is restarted when it dies: what was in flight fails with EngineError, the next request starts it
again with the adapter that was served. A core that dies over and over without an answer ends the run.

New weights while requests are in flight, by ``VLLMSettings.swap``:

    finish    They end under the version that they began with; the new one is loaded beside it, and the old
              one is removed with its last request. A load waits while the one before that is in use.
    continue  ``pause_generation(mode="abort")`` ends them in vLLM with what they have said, and lets nothing
              begin; the new version is loaded and proved; after ``resume_generation()`` they go on as prompt
              and what was said, with a seed of their own. Their past is computed anew, by the new weights.
              (``mode="keep"`` would keep it, and the old adapter: vLLM binds that to the request.)

Merged weights (``VLLMSettings.merge``) exist once in vLLM, so there ``finish`` lets no request begin until
those in flight have ended and the new version is in place: a load takes as long as the longest of them, and
``continue`` is for those who do not want to wait. The prefix cache is emptied at every swap, as its keys say
nothing of weights.

Every token records the version that sampled it. Not covered: tensor and data parallelism with adapters, more
than one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from agentrl.engine import Adapter, Sampling
from agentrl.engines.in_flight import InFlight, Users
from agentrl.engines.vllm_adapters import AdapterShelf
from agentrl.engines.vllm_core import Core, CoreDied, PublishedAdapter, Sampled, VLLMCore
from agentrl.engines.vllm_merged import MergedWeights
from agentrl.engines.vllm_settings import LORA_SLOTS, VLLMSettings
from agentrl.engines.vllm_versions import Versions
from agentrl.errors import EngineError, UserError
from agentrl.seeds import derive
from agentrl.threads import in_thread
from agentrl.types import Completion, FloatArray, IntArray

__all__ = ["StartCore", "VLLMEngine", "VLLMSettings"]

_CLOSED = "the vLLM engine was closed while it worked on a request"
_MOST_DEATHS = 5  # of the core, without a request answered between them
_FIGURES = (
    "rollout/prefill_tokens",
    "rollout/reused_tokens",
    "rollout/decode_tokens",
    "engine/restarts",
)


class StartCore(Protocol):
    """Starts vLLM; see :meth:`agentrl.engines.vllm_core.VLLMCore.start`."""

    async def __call__(self, settings: VLLMSettings, *, home: Path) -> Core: ...


@dataclass(slots=True, eq=False)
class _Served:
    """One version as the core knows it, and how many requests are using it."""

    version: int
    adapter: Adapter | None = None  # None: the bare base
    published: PublishedAdapter | None = None  # as requests name it; None: what the core has in its weights
    users: Users = field(default_factory=Users)  # requests in flight


class VLLMEngine:
    """An :class:`agentrl.engine.Engine` over vLLM, for one event loop; made by :meth:`start`."""

    def __init__(
        self,
        settings: VLLMSettings,
        *,
        versions: Versions,
        start_core: StartCore,
        on_note: Callable[[str], None],
    ) -> None:
        """Starts nothing yet; ``on_note`` gets lines for people."""
        self._settings, self._start_core, self._on_note = settings, start_core, on_note
        self._versions = versions
        self._core: Core | None = None
        self._current = _Served(0)
        self._loading = asyncio.Lock()  # loads take effect in the order in which they were asked for
        self._open, self._awake = asyncio.Event(), asyncio.Event()  # both set: requests may be sent
        self._open.set()
        self._awake.set()
        self._pauses = 0  # so far; a request that vLLM ends during one goes on after it
        self._reviving: asyncio.Task[None] | None = None
        self._deaths = 0  # since the last answer
        self._dropping: set[asyncio.Task[None]] = set()
        self._in_flight = InFlight()
        self._figures = dict.fromkeys(_FIGURES, 0.0)
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @classmethod
    async def start(
        cls,
        settings: VLLMSettings,
        *,
        base: Mapping[str, Tensor] | None = None,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> VLLMEngine:
        """An engine that serves the bare base; loading takes from seconds to minutes.

        ``base``: its frozen parameters by name, on the GPU that vLLM has, where adapters are to be merged.

        Raises MissingExtra without vLLM, BadConfig for settings that it refuses, UserError where it can't
        start.
        """
        return await cls.start_with(settings, base=base, start_core=VLLMCore.start, on_note=on_note)

    @classmethod
    async def start_with(
        cls,
        settings: VLLMSettings,
        *,
        base: Mapping[str, Tensor] | None = None,
        start_core: StartCore,
        on_note: Callable[[str], None],
    ) -> VLLMEngine:
        """As :meth:`start`, over whatever core ``start_core`` makes."""
        versions = _make_versions(settings, base)
        engine = cls(settings, versions=versions, start_core=start_core, on_note=on_note)
        try:
            engine._core = await start_core(settings, home=versions.home)
        except EngineError as error:
            versions.close()
            raise UserError(str(error)) from error
        except BaseException:
            versions.close()
            raise
        return engine

    @property
    def version(self) -> int:
        """Of what the next request is answered with."""
        return self._current.version

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`. Cancelling it aborts the request in vLLM."""
        self._attend()
        prompt = self._checked(prompt_ids, new=sampling.max_tokens)
        return await self._in_flight.track(self._generate(prompt, sampling), aborted=_CLOSED)

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`; the context must have room for one token more.

        Raises UserError at a temperature other than 0 and 1, as vLLM reports a prompt's logprobs before it.
        """
        self._attend()
        if temperature not in (0, 1):
            raise UserError(
                f"scoring at temperature {temperature:g} was asked for; vLLM scores at temperature 1 only, "
                "so score with the learner instead"
            )
        return await self._in_flight.track(self._score(self._checked(token_ids, new=1)), aborted=_CLOSED)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`; what happens to requests in flight says ``VLLMSettings.swap``.

        Raises BadConfig for an adapter that vLLM can't serve, WrongWeights where what its kernels read is not
        the adapter; what was served before is served then.
        """
        self._attend()
        if adapter is not None:
            self._versions.check(adapter)
        await self._in_flight.track(self._load(adapter, version), aborted=_CLOSED)

    async def sleep(self) -> None:
        """Free the GPU for the learner until :meth:`wake`, which comes before the next load.

        Requests wait meanwhile, and those in flight go on later. Raises BadConfig on a CPU, where vLLM
        can't.
        """
        self._attend()
        await self._revive()
        self._pauses += 1
        self._awake.clear()
        try:
            await self._until_alive(lambda core: core.sleep())
        except BaseException:
            self._awake.set()
            raise

    async def wake(self) -> None:
        """Undo :meth:`sleep`."""
        self._attend()
        await self._until_alive(lambda core: core.wake())
        self._awake.set()

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`. Requests in flight fail with EngineError."""
        if self._closed:
            return
        self._closed = True
        own = {*self._dropping, *({self._reviving} if self._reviving else ())}
        for task in own:
            task.cancel()
        await self._in_flight.abort()
        if own:
            await asyncio.wait(own)
        if self._core is not None:
            await self._core.stop()
        await in_thread(self._versions.close)

    def take_figures(self) -> dict[str, float]:
        """Tokens and restarts since the last call, under their metrics' names."""
        figures, self._figures = self._figures, dict.fromkeys(_FIGURES, 0.0)
        return figures

    # -- requests --

    def _attend(self) -> None:
        if self._closed:
            raise EngineError("the vLLM engine is closed; make a new one")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("another event loop is using this engine: make one engine for each loop")

    def _checked(self, token_ids: IntArray, *, new: int) -> IntArray:
        """A copy of ``token_ids``. Raises UserError where vLLM can't take them and ``new`` more."""
        assert self._core is not None
        checked = np.array(token_ids, np.int32)
        if not len(checked):
            raise UserError("the prompt is empty: nothing can be sampled after no token; give at least one")
        if len(checked) + new > self._settings.context:
            raise UserError(
                f"a prompt of {len(checked)} tokens and {new} new ones exceed the engine's context of "
                f"{self._settings.context}; lower rollout.max_turn_tokens or raise rollout.max_episode_tokens"
            )
        if checked.min() < 0 or checked.max() >= self._core.vocabulary:
            raise UserError(
                f"the prompt has token ids from {checked.min()} to {checked.max()}, and the model embeds 0 "
                f"to {self._core.vocabulary - 1}; use the tokenizer that belongs to the model"
            )
        return checked

    async def _generate(self, prompt: IntArray, sampling: Sampling) -> Completion:
        """One completion, of as many requests to vLLM as swaps and sleeps cut it into."""
        ids, logprobs, versions = list[int](), list[float](), list[int]()
        for piece in range(1 << 31):
            core, served, pauses = await self._ready()
            rest = replace(
                sampling,
                max_tokens=sampling.max_tokens - len(ids),
                seed=derive(sampling.seed, "continued", piece) if piece else sampling.seed,
            )
            with served.users.one_more():
                said = await core.sample([*prompt.tolist(), *ids], rest, adapter=served.published)
            self._deaths = 0
            ids += said.token_ids
            logprobs += said.logprobs
            versions += [served.version] * len(said.token_ids)
            self._count(said, first=not piece)
            if said.finish != "aborted" or pauses == self._pauses:
                break
        return Completion(
            np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(versions, np.int32), said.finish
        )

    async def _score(self, token_ids: IntArray) -> FloatArray:
        core, served, _ = await self._ready()
        with served.users.one_more():
            scored = await core.score(token_ids.tolist(), adapter=served.published)
        self._deaths = 0
        return np.array(scored, np.float32)

    async def _ready(self) -> tuple[Core, _Served, int]:
        """A core that lives and takes requests, what it serves, and how many pauses there were."""
        while True:
            await self._open.wait()
            await self._awake.wait()
            core = await self._revive()
            if self._open.is_set() and self._awake.is_set() and not core.dead:
                return core, self._current, self._pauses

    def _count(self, said: Sampled, *, first: bool) -> None:
        self._figures["rollout/prefill_tokens"] += said.prompt_tokens - said.cached_tokens
        self._figures["rollout/reused_tokens"] += said.cached_tokens
        self._figures["rollout/decode_tokens"] += max(0, len(said.token_ids) - first)

    # -- adapters --

    async def _load(self, adapter: Adapter | None, version: int) -> None:
        async with self._loading:
            await self._until_alive(lambda core: self._swap(core, adapter, version))

    async def _swap(self, core: Core, adapter: Adapter | None, version: int) -> None:
        """Serve ``adapter`` instead of the current one, which goes once its requests are done."""
        cutting = self._settings.swap == "continue" and bool(self._current.users)
        pausing = cutting or self._versions.in_place
        if pausing:
            self._open.clear()
            self._pauses += cutting
        try:
            if pausing and not cutting:
                await self._current.users.gone()
            if pausing:
                await core.pause()
            while len(self._dropping) >= LORA_SLOTS - 1:
                await asyncio.wait(self._dropping, return_when=asyncio.FIRST_COMPLETED)
            published = await self._versions.put(core, adapter, version)
            old, self._current = self._current, _Served(version, adapter, published)
        finally:
            if pausing:
                with suppress(CoreDied):
                    await core.resume()
                self._open.set()
        drop = asyncio.ensure_future(self._drop(core, old))
        self._dropping.add(drop)
        drop.add_done_callback(self._dropping.discard)
        if not old.users:
            await drop

    async def _drop(self, core: Core, old: _Served) -> None:
        """Have ``core`` forget ``old`` once its requests are done."""
        await old.users.gone()
        if old.published is not None:
            await self._versions.take_back(core, old.published)

    # -- the core's life --

    async def _until_alive(self, do: Callable[[Core], Awaitable[None]]) -> None:
        """Have the core do something, again with another one where it dies of it."""
        while True:
            core = await self._revive()
            with suppress(CoreDied):
                await do(core)
                return

    async def _revive(self) -> Core:
        """The core, started again if it is dead, once for all that ask.

        Raises UserError where that is of no use.
        """
        assert self._core is not None
        if self._core.dead:
            if self._reviving is None or self._reviving.done():
                self._reviving = asyncio.ensure_future(self._restart())
                # Those who wait get its exception; where nobody does any more, asyncio need not report it.
                self._reviving.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._reviving)
        return self._core

    async def _restart(self) -> None:
        assert self._core is not None
        await self._core.stop()
        while True:
            self._deaths += 1
            if self._deaths >= _MOST_DEATHS:
                raise UserError(
                    f"vLLM's core died {self._deaths} times without an answer between them. What it printed "
                    "says why; where memory is short, lower engine.max_sequences or "
                    "engine.args.gpu_memory_utilization"
                )
            self._on_note(f"vLLM's core died and is started again, with version {self._current.version}")
            try:
                await self._start_again()
                return
            except EngineError as error:
                self._on_note(f"vLLM could not be started again: {error}")

    async def _start_again(self) -> None:
        """Another core with what was served; nobody sees it before that is proved."""
        dead, core = self._core, await self._start_core(self._settings, home=self._versions.home)
        old = self._current
        try:
            published = await self._versions.put(core, old.adapter, old.version)
        except BaseException:
            await core.stop()
            raise
        self._core, self._current = core, _Served(old.version, old.adapter, published)
        self._figures["engine/restarts"] += 1
        if dead is not None and old.published is not None:
            await self._versions.take_back(dead, old.published)


def _make_versions(settings: VLLMSettings, base: Mapping[str, Tensor] | None) -> Versions:
    if not settings.merge:
        return AdapterShelf(max_rank=settings.max_lora_rank)
    assert base is not None, "what merges adapters needs the base"
    return MergedWeights(base)
