"""The batch that the embedded engine decodes: requests in the rows of a KV cache, advanced token by token.

Not thread-safe, except ``interrupted``. Rows [0, active) are decoding; the rest are free or hold the tokens
of a finished request whose conversation may go on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentrl.engine import Sampling
from agentrl.engines.cache import Decode, KVCache, Prefill, Span
from agentrl.engines.pasts import Pasts
from agentrl.engines.sampling import draw, uniforms
from agentrl.errors import Diverged
from agentrl.models import backbone, head
from agentrl.stopwatch import Stopwatch
from agentrl.types import Finish, FloatArray, IntArray

__all__ = ["Batch", "Request"]

_ROW = np.dtype(
    [
        ("length", np.int64),  # tokens in the cache
        ("count", np.int64),  # tokens sampled
        ("limit", np.int64),  # max_tokens
        ("last", np.int64),  # the last sampled token, not yet in the cache
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("top_k", np.int64),
        ("stop", np.int64, (8,)),  # stop token ids, -1 where there are fewer
        ("used", np.int64),  # when the row was last released; 0: it holds nothing
    ]
)


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way through the batch."""

    prompt_ids: IntArray  # (prompt tokens,)
    sampling: Sampling
    cancelled: bool = False  # set from outside; the row is given up at the next token
    token_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))  # (C,) when finished
    logprobs: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))  # (C,)
    finish: Finish = "aborted"


class Batch:
    """Requests being decoded together."""

    def __init__(self, model: Any, *, max_sequences: int, prefill_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.device = model.get_input_embeddings().weight.device
        # Set it from any thread, and advance returns after the token that it is working on. Clear it before
        # collecting what to admit: whatever comes later then interrupts, also before advance has begun.
        self.interrupted = threading.Event()
        self.stopwatch = Stopwatch()  # each sampled token is read back, which waits for the device
        self.model, self._head = model, head(model)
        self._prefill_tokens = prefill_tokens
        self._cache = KVCache(max_sequences)
        self._rows = np.zeros(max_sequences, _ROW)
        self._requests: list[Request] = []  # of the rows [0, active)
        self._pasts = Pasts(max_sequences)
        self._order = np.arange(max_sequences)  # where each row's keys still stand, until they are settled
        self._said = np.zeros((max_sequences, 64), np.int32)
        self._logprobs = np.zeros((max_sequences, 64), np.float32)
        self._clock = 0

    def serve(self, model: Any) -> None:
        """Decode with ``model`` from now on; every conversation is dropped, for its keys are of other
        weights."""
        self.model, self._head = model, head(model)
        self._drop()

    def reset(self) -> None:
        """Drop every conversation and release the cache's memory."""
        self._drop()
        self._cache = KVCache(self.max_sequences)

    def _drop(self) -> None:
        self._requests.clear()
        self._pasts = Pasts(self.max_sequences)
        self._order = np.arange(self.max_sequences)
        self._rows["used"] = 0

    @torch.no_grad()
    def advance(self, fresh: list[Request]) -> list[Request]:
        """Admit ``fresh``, decode until a request finishes or someone interrupts, and return the finished
        ones.

        Raises Diverged where the logits are not finite. After any error the batch is empty.
        """
        try:
            return self._advance(fresh)
        except BaseException:
            self.reset()  # what was half computed must not pass for a conversation's past
            raise

    def _advance(self, fresh: list[Request]) -> list[Request]:
        finished = self._release()  # what was cancelled since: its rows may be needed
        if fresh:
            with self.stopwatch.timing("time/prefill_s"):
                self._prefill(fresh)
            finished += self._release()
        while self._requests and not finished:
            with self.stopwatch.timing("time/decode_s"):
                self._decode()
            finished = self._release()
            if self.interrupted.is_set():
                break
        return finished

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values have reserved."""
        return self._cache.bytes

    # -- admission --

    def _prefill(self, fresh: list[Request]) -> None:
        """Compute what is new in each prompt, the same prompt only once, and sample each request's first
        token."""
        # Conversations that go on take their rows before new ones look for a row to overwrite.
        fresh = sorted(fresh, key=lambda request: self._pasts.longest(request.prompt_ids.tobytes()) is None)
        first = len(self._requests)
        leaders: dict[bytes, tuple[int, int]] = {}  # prompt -> its row, and its place among the spans
        spans: list[Span] = []
        for request in fresh:
            key, row = request.prompt_ids.tobytes(), len(self._requests)
            start = self._seat(request, key)
            if key not in leaders:
                leaders[key] = row, len(spans)
                spans.append(Span(row, start, len(request.prompt_ids) - start))
        computed = sum(span.count for span in spans)
        self.stopwatch.count("rollout/prefill_tokens", computed)
        self.stopwatch.count("rollout/reused_tokens", sum(len(r.prompt_ids) for r in fresh) - computed)
        self._settle()
        logits = self._prompt_logits(spans)
        places = [leaders[request.prompt_ids.tobytes()] for request in fresh]
        followers = [(leader, row) for row, (leader, _) in enumerate(places, start=first) if row != leader]
        if followers:
            self._copy(*map(list, zip(*followers, strict=True)))
        self._sample(first, logits[[place for _, place in places]])

    def _seat(self, request: Request, key: bytes) -> int:
        """Give ``request`` the first idle row; returns how many of its prompt's tokens the cache holds
        already."""
        row, (idle, known) = len(self._requests), self._idle_row(key)
        self._exchange(row, idle)
        self._pasts.hold(row, b"")
        sampling = request.sampling
        self._rows[row] = (
            len(request.prompt_ids),
            0,
            sampling.max_tokens,
            -1,
            sampling.seed,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.stop_token_ids + (-1,) * (_MAX_STOPS - len(sampling.stop_token_ids)),
            0,
        )
        self._requests.append(request)
        self._widen(sampling.max_tokens)
        return known // _ID_BYTES

    def _idle_row(self, key: bytes) -> tuple[int, int]:
        """The idle row that holds the longest beginning of a prompt, and its bytes; else the row longest
        unused, 0."""
        first = len(self._requests)
        return self._pasts.longest(key) or (first + int(self._rows["used"][first:].argmin()), 0)

    def _exchange(self, first: int, second: int) -> None:
        """Swap two rows with all that is kept of them; their keys follow when they are settled."""
        if first == second:
            return
        for array in (self._rows, self._said, self._logprobs, self._order):
            array[[first, second]] = array[[second, first]]
        self._pasts.swap(first, second)

    def _settle(self) -> None:
        """Move all keys at once to where their rows have gone."""
        moved = np.flatnonzero(self._order != np.arange(self.max_sequences))
        if len(moved):
            self._copy(self._order[moved], moved)
            self._order = np.arange(self.max_sequences)

    def _copy(self, sources: Any, targets: Any) -> None:
        """Give rows the keys of others, as far as the longest of them reaches."""
        length = int(self._rows["length"][targets].max())
        self._cache.copy(self._tensor(sources), self._tensor(targets), length)

    def _widen(self, tokens: int) -> None:
        if tokens > self._said.shape[1]:
            extra = ((0, 0), (0, tokens - self._said.shape[1]))
            self._said, self._logprobs = np.pad(self._said, extra), np.pad(self._logprobs, extra)

    def _prompt_logits(self, spans: Sequence[Span]) -> Tensor:
        """Logits (spans, V) behind the last token of each span; fills the cache."""
        last: list[Tensor] = []
        for pack in _packs(spans, self._prefill_tokens):
            plan = Prefill(self._cache, pack, self.device)
            pieces = [
                self._requests[span.row].prompt_ids[span.start : span.start + span.count] for span in pack
            ]
            hidden = backbone(self.model, self._tensor(np.concatenate(pieces)), plan.positions, plan)
            for span, end in zip(pack, np.cumsum([span.count for span in pack]), strict=True):
                if span.start + span.count == len(self._requests[span.row].prompt_ids):
                    last.append(hidden[end - 1])
        logits: Tensor = self._head(torch.stack(last))
        return logits

    # -- decoding --

    def _decode(self) -> None:
        """One more token for every active row."""
        rows = self._rows[: len(self._requests)]
        self.stopwatch.count("rollout/decode_tokens", len(rows))
        plan = Decode(self._cache, self._tensor(rows["length"]))
        hidden = backbone(self.model, self._tensor(rows["last"]), plan.positions, plan)
        rows["length"] += 1
        self._sample(0, self._head(hidden))

    def _sample(self, first: int, logits: Tensor) -> None:
        """Draw the next token of the rows from ``first`` on, one for each row of ``logits``."""
        index = np.arange(first, first + len(logits))
        rows = self._rows[first : first + len(logits)]
        tokens, logprobs = draw(
            logits,
            uniform=torch.as_tensor(uniforms(rows["seed"], rows["count"]), device=self.device),
            temperature=torch.as_tensor(rows["temperature"], device=self.device),
            top_p=torch.as_tensor(rows["top_p"], device=self.device),
            top_k=self._tensor(rows["top_k"]),
        )
        rows["last"] = tokens.cpu().numpy()
        self._said[index, rows["count"]] = rows["last"]
        self._logprobs[index, rows["count"]] = logprobs.cpu().numpy()
        if not np.isfinite(self._logprobs[index, rows["count"]]).all():
            raise Diverged(
                f"{type(self.model).__name__} gave logits that are not finite: its weights have diverged, or "
                "its dtype is too small for them; go back to an earlier checkpoint with a lower "
                "optimizer.learning_rate, or set model.dtype to float32"
            )
        rows["count"] += 1

    def _release(self) -> list[Request]:
        """Take the finished requests out of the batch; their rows keep the conversation's keys."""
        rows = self._rows[: len(self._requests)]
        stopped = (rows["last"][:, None] == rows["stop"]).any(1)
        cancelled = np.array([request.cancelled for request in self._requests], np.bool_)
        finished: list[Request] = []
        for row in np.flatnonzero(stopped | cancelled | (rows["count"] >= rows["limit"]))[::-1].tolist():
            request, count = self._requests[row], int(rows["count"][row])
            request.finish = "aborted" if cancelled[row] else "stop" if stopped[row] else "length"
            request.token_ids = self._said[row, :count].copy()
            request.logprobs = self._logprobs[row, :count].copy()
            past = np.concatenate([request.prompt_ids, request.token_ids[:-1]])  # the last one was never fed
            self._clock += 1
            rows["used"][row] = self._clock
            self._pasts.hold(row, past.tobytes())
            self._vacate(row)
            finished.append(request)
        self._settle()
        return finished[::-1]

    def _vacate(self, row: int) -> None:
        """Move an idle row behind the active ones."""
        end = len(self._requests) - 1
        self._exchange(row, end)
        self._requests[row] = self._requests[end]
        self._requests.pop()

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.array(values, np.int64), device=self.device)  # rows change, plans do not


_ID_BYTES = 4  # token ids are int32
_MAX_STOPS = 8


def _packs(spans: Sequence[Span], budget: int) -> Iterator[list[Span]]:
    """Group spans into forward passes of at most ``budget`` tokens; a longer span is computed in pieces."""
    pack: list[Span] = []
    room = budget
    for span in spans:
        start, left = span.start, span.count
        while left:
            if room == 0:
                yield pack
                pack, room = [], budget
            count = min(left, room)
            pack.append(Span(span.row, start, count))
            start, left, room = start + count, left - count, room - count
    yield pack
