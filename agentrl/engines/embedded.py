"""Inference in this process with torch: continuous batching, KV cache from turn to turn, LoRA adapters.

The base model's tensors are shared with whoever loaded it; the adapter is this engine's own copy, so training
never reaches into running episodes. A turn costs its new tokens: the cache keeps a conversation's past, found
again by the token ids themselves, and identical prompts asked for together are computed once.

All tensor work runs in the process's compute thread; any number of tasks of one event loop may await the
engine, and another loop's once the first has ended. What a request samples depends on its seed and its
tokens, up to the rounding of the kernels, which see the batch's shape.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agentrl.attention import Segments
from agentrl.engine import Adapter, Sampling
from agentrl.engines.adapted import AdaptedModel
from agentrl.engines.batch import Batch, Request
from agentrl.errors import EngineError, UserError
from agentrl.losses import token_logprobs
from agentrl.models import alias, backbone, context_length, scoring_head
from agentrl.threads import in_compute_thread
from agentrl.types import Completion, FloatArray, IntArray

__all__ = ["EmbeddedEngine"]

_FIGURES = (
    "rollout/prefill_tokens",
    "rollout/reused_tokens",
    "rollout/decode_tokens",
    "time/prefill_s",
    "time/decode_s",
)


@dataclass(slots=True)
class _Ticket:
    """A request and the future that waits for it."""

    request: Request
    future: asyncio.Future[Completion]


class EmbeddedEngine:
    """An :class:`agentrl.engine.Engine` over a model that is already in memory."""

    def __init__(self, model: Any, *, max_sequences: int = 128, prefill_tokens: int = 8192) -> None:
        """Serve ``model`` (see ``agentrl.models.load_model``) to at most ``max_sequences`` requests at once.

        ``prefill_tokens``: prompt tokens computed per forward pass, which bounds the memory of activations.
        """
        self._base = alias(model)
        self._adapted: AdaptedModel | None = None  # over another alias
        self._context = context_length(model)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._batch = Batch(self._base, max_sequences=max_sequences, prefill_tokens=prefill_tokens)
        self._waiting: deque[_Ticket] = deque()
        self._running: dict[Request, _Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # the last one that asked for anything
        self._driver: asyncio.Task[None] | None = None
        self._load_turn = asyncio.Lock()  # loads take effect in the order in which they were asked for
        self._loads = 0  # in progress; nothing is admitted meanwhile
        self._version = 0
        self._closed = False

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        loop = self._attend()
        request = Request(self._checked(prompt_ids, new=sampling.max_tokens), sampling)
        ticket = _Ticket(request, loop.create_future())
        self._waiting.append(ticket)
        self._batch.interrupted.set()
        self._drive()
        try:
            return await ticket.future
        except asyncio.CancelledError:
            request.cancelled = True
            self._batch.interrupted.set()
            raise

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`."""
        self._attend()
        checked = self._checked(token_ids, new=0)
        self._batch.interrupted.set()
        return await in_compute_thread(self._score, checked, temperature)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`. Requests that run finish first; those that wait get the new
        version.

        Raises EngineError where the adapter's tensors are not those of its configuration; the engine then
        serves what it served before.
        """
        self._attend()
        self._loads += 1
        try:
            async with self._load_turn:
                while self._running and self._driver is not None:
                    await asyncio.wait({self._driver})
                self._attend()  # it may have been closed meanwhile
                await in_compute_thread(self._install, adapter, version)
        finally:
            self._loads -= 1
            self._drive()

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`. Requests in flight fail with EngineError."""
        if self._closed:
            return
        self._attend()
        self._closed = True
        self._batch.interrupted.set()
        try:
            if self._driver is not None:
                await asyncio.wait({self._driver})
        finally:
            self._abandon(EngineError("the embedded engine was closed while this request was running"))
        await in_compute_thread(self._batch.reset)

    def take_figures(self) -> dict[str, float]:
        """Seconds and tokens of prefill and decoding since the last call, under their metrics' names; call it
        while nothing is in flight."""
        return dict.fromkeys(_FIGURES, 0.0) | self._batch.stopwatch.take()

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values have reserved."""
        return self._batch.cache_bytes

    # -- the event loop's side --

    def _attend(self) -> asyncio.AbstractEventLoop:
        """The running event loop, which is served from now on.

        Raises EngineError where the engine is closed, RuntimeError where another loop is using it.
        """
        if self._closed:
            raise EngineError("the embedded engine is closed; make a new one")
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None and self._loop.is_running():
                raise RuntimeError("another event loop is using this engine: make one engine for each loop")
            self._abandon(EngineError("the embedded engine has moved on to another event loop"))
            self._loop, self._driver, self._load_turn, self._loads = loop, None, asyncio.Lock(), 0
        return loop

    def _checked(self, token_ids: IntArray, *, new: int) -> IntArray:
        """A copy of ``token_ids``. Raises UserError where the model can't take them and ``new`` more."""
        checked = np.array(token_ids, np.int32)
        if not len(checked):
            raise UserError("the prompt is empty: nothing can be sampled after no token; give at least one")
        if len(checked) + new > self._context:
            raise UserError(
                f"a prompt of {len(checked)} tokens and {new} new ones exceed the model's context of "
                f"{self._context}; lower rollout.max_episode_tokens or rollout.max_turn_tokens"
            )
        if checked.min() < 0 or checked.max() >= self._vocabulary:
            raise UserError(
                f"the prompt has token ids from {checked.min()} to {checked.max()}, and the model embeds 0 "
                f"to {self._vocabulary - 1}; use the tokenizer that belongs to the model"
            )
        return checked

    def _drive(self) -> None:
        """See to it that a driver runs if there is anything to do."""
        wanted = not self._loads and any(not ticket.future.done() for ticket in self._waiting)
        if wanted and (self._driver is None or self._driver.done()):
            self._driver = asyncio.get_running_loop().create_task(self._run())
            # Whoever waited has got its exception already; asyncio need not report it once more.
            self._driver.add_done_callback(lambda driver: driver.cancelled() or driver.exception())

    async def _run(self) -> None:
        """Feed the batch until nothing waits or runs."""
        try:
            await asyncio.sleep(0)  # whoever asks in this tick of the event loop is admitted together
            while not self._closed and (self._running or (self._waiting and not self._loads)):
                fresh = self._admit()
                for request in await in_compute_thread(self._batch.advance, fresh):
                    if request in self._running:  # else it is left over from a loop that has ended
                        self._deliver(self._running.pop(request))
        except asyncio.CancelledError:
            self._abandon(EngineError("the embedded engine was stopped, as its event loop is ending"))
            raise
        except BaseException as error:
            self._abandon(error)
            raise

    def _admit(self) -> list[Request]:
        """Move tickets from waiting to running while there is room."""
        self._batch.interrupted.clear()
        fresh: list[Request] = []
        while self._waiting and not self._loads and len(self._running) < self._batch.max_sequences:
            ticket = self._waiting.popleft()
            if not ticket.request.cancelled:
                self._running[ticket.request] = ticket
                fresh.append(ticket.request)
        return fresh

    def _deliver(self, ticket: _Ticket) -> None:
        if ticket.future.done():  # cancelled by who waited
            return
        request = ticket.request
        versions = np.full(len(request.token_ids), self._version, np.int32)
        ticket.future.set_result(Completion(request.token_ids, request.logprobs, versions, request.finish))

    def _abandon(self, error: BaseException) -> None:
        """Fail whatever is in flight."""
        tickets = (*self._running.values(), *self._waiting)
        self._running.clear()
        self._waiting.clear()
        for ticket in tickets:
            ticket.request.cancelled = True  # the batch may still be decoding it
            if not ticket.future.done() and not ticket.future.get_loop().is_closed():
                ticket.future.set_exception(error)

    # -- the thread's side --

    @torch.no_grad()
    def _install(self, adapter: Adapter | None, version: int) -> None:
        model = self._base
        if adapter is not None:
            adapted = self._adapted
            if adapted is None or adapted.config != dict(adapter.config):
                adapted = AdaptedModel(self._base, adapter.config)
            adapted.load(adapter.tensors)
            self._adapted, model = adapted, adapted.model
        self._batch.serve(model)
        self._version = version

    @torch.no_grad()
    def _score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        model, device = self._batch.model, self._batch.device
        tokens = torch.as_tensor(token_ids, dtype=torch.int64, device=device)
        positions = torch.arange(len(tokens), device=device)
        hidden = backbone(model, tokens, positions, Segments([len(tokens)]))
        logprobs, _ = token_logprobs(
            hidden,
            tokens,
            positions[1:],
            head=scoring_head(model),
            temperature=temperature or 1.0,
            rows_per_chunk=512,
        )
        scored: FloatArray = np.concatenate([np.zeros(1, np.float32), logprobs.float().cpu().numpy()])
        return scored
