"""Inference in this process with torch: continuous batching, KV cache from turn to turn, LoRA adapters.

The base model's tensors are shared with whoever loaded it; the adapter is this engine's own copy, so training
never reaches into running episodes. A turn costs its new tokens: the cache keeps a conversation's past, found
again by the token ids themselves, and identical prompts asked for together are computed once.

All torch work runs in one thread of its own; ``generate`` may be awaited from any number of tasks of one
event loop. What a request samples depends on its seed and its tokens, up to the rounding of the kernels,
which see the batch's shape.
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
from agentrl.engines.batch import Batch, Request
from agentrl.errors import EngineError, UserError
from agentrl.losses import token_logprobs
from agentrl.models import alias, backbone, context_length, head
from agentrl.threads import in_compute_thread
from agentrl.types import Completion, FloatArray, IntArray

__all__ = ["EmbeddedEngine"]


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
        self._model = alias(model)
        self._base = self._model  # stays the transformers model when PEFT wraps it
        self._adapted: Any = None
        self._context = context_length(model)
        self._batch = Batch(self._base, max_sequences=max_sequences, prefill_tokens=prefill_tokens)
        self._waiting: deque[_Ticket] = deque()
        self._running: dict[int, _Ticket] = {}  # by id(request)
        self._driver: asyncio.Task[None] | None = None
        self._loading = False
        self._version = 0
        self._closed = False

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        if self._closed:
            raise EngineError("the embedded engine is closed; make a new one")
        if not len(prompt_ids):
            raise UserError("the prompt is empty: nothing can be sampled after no token; give at least one")
        if len(prompt_ids) + sampling.max_tokens > self._context:
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens and {sampling.max_tokens} new ones exceed the model's "
                f"context of {self._context}; lower rollout.max_episode_tokens or rollout.max_turn_tokens"
            )
        request = Request(np.asarray(prompt_ids, np.int32), sampling)
        ticket = _Ticket(request, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._batch.interrupt()
        self._drive()
        try:
            return await ticket.future
        except asyncio.CancelledError:
            request.cancelled = True
            self._batch.interrupt()
            raise

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`."""
        return await in_compute_thread(self._score, np.asarray(token_ids, np.int32), temperature)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`. Requests that run finish first; those that wait get the new
        version."""
        self._loading = True
        try:
            while self._running and self._driver is not None:
                await asyncio.wait({self._driver})
            await in_compute_thread(self._install, adapter)
            self._version = version
        finally:
            self._loading = False
        if self._waiting:
            self._drive()

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`. Requests in flight fail with EngineError."""
        self._closed = True
        self._batch.interrupt()
        if self._driver is not None:
            await asyncio.wait({self._driver})
        self._fail(EngineError("the embedded engine was closed while this request was running"))

    # -- the event loop's side --

    def _drive(self) -> None:
        if not self._loading and (self._driver is None or self._driver.done()):
            self._driver = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Feed the batch until nothing waits or runs."""
        await asyncio.sleep(0)  # whoever asks in this tick of the event loop is admitted together
        while not self._closed and (self._running or (self._waiting and not self._loading)):
            fresh = self._admit()
            try:
                finished = await in_compute_thread(self._batch.advance, fresh)
            except BaseException as error:
                self._fail(error)
                raise
            for request in finished:
                self._deliver(self._running.pop(id(request)))

    def _admit(self) -> list[Request]:
        """Move tickets from waiting to running while there is room."""
        fresh: list[Request] = []
        while self._waiting and not self._loading and len(self._running) < self._batch.max_sequences:
            ticket = self._waiting.popleft()
            if not ticket.request.cancelled:
                self._running[id(ticket.request)] = ticket
                fresh.append(ticket.request)
        return fresh

    def _deliver(self, ticket: _Ticket) -> None:
        if ticket.future.done():  # cancelled by who waited
            return
        request = ticket.request
        versions = np.full(len(request.token_ids), self._version, np.int32)
        ticket.future.set_result(Completion(request.token_ids, request.logprobs, versions, request.finish))

    def _fail(self, error: BaseException) -> None:
        for ticket in (*self._running.values(), *self._waiting):
            if not ticket.future.done():
                ticket.future.set_exception(error)
        self._running.clear()
        self._waiting.clear()

    # -- the thread's side --

    @torch.no_grad()
    def _install(self, adapter: Adapter | None) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        self._batch.forget()
        if adapter is None:
            if self._adapted is not None:
                self._adapted.disable_adapter_layers()
            return
        if self._adapted is None:
            config = LoraConfig(**{**adapter.config, "inference_mode": True})
            self._adapted = get_peft_model(self._base, config).eval()
        self._adapted.enable_adapter_layers()
        result = set_peft_model_state_dict(self._adapted, dict(adapter.tensors))
        if result.unexpected_keys:
            raise EngineError(f"the adapter has tensors that this model lacks: {result.unexpected_keys[:3]}")

    @torch.no_grad()
    def _score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        device = self._batch.device
        tokens = torch.as_tensor(token_ids, dtype=torch.int64, device=device)
        positions = torch.arange(len(tokens), device=device)
        hidden = backbone(self._base, tokens, positions, Segments([len(tokens)]))
        logprobs, _ = token_logprobs(
            hidden, tokens, positions[1:], head=head(self._base), temperature=temperature, rows_per_chunk=512
        )
        scored: FloatArray = np.concatenate([np.zeros(1, np.float32), logprobs.float().cpu().numpy()])
        return scored
