"""Inference by a server that speaks OpenAI's /v1/completions, with token ids as prompts.

Evaluation works with any such server. Where it returns no token ids, its text is tokenised again: that is not
what was sampled, and such a completion's logprobs are NaN. Training needs the
sampled ids and their logprobs after temperature, as ``vllm serve --logprobs-mode processed_logprobs`` returns
them; :meth:`OpenAIEngine.connect` makes one probe request and refuses every other server.

An adapter reaches ``vllm serve`` through a folder that both can read, under a name of its own for every
version: a reload under an old name would be answered from the old version's prefix cache. A request is
answered by the version that it began with, also where it is tried again; a version is unloaded once its
requests are done, so the server needs ``--max-loras 2`` where requests run on during a swap.

Fields are those of vLLM 0.11 and later: ``return_token_ids``, ``ignore_eos``, ``prompt_logprobs``.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import numpy as np

from agentrl.checkpoint import write_adapter
from agentrl.engine import Adapter, Sampling
from agentrl.engines.in_flight import Users
from agentrl.engines.replies import (
    check_prompt,
    check_stop,
    find_distribution_fault,
    read_finish,
    read_logprobs,
    read_prompt_logprobs,
    read_reply,
    read_text,
    read_token_ids,
)
from agentrl.engines.server import BadReply, Refused, Server, ServerSettings
from agentrl.errors import BadConfig, EngineError, UserError
from agentrl.files import write_folder, writing
from agentrl.threads import in_thread
from agentrl.types import Completion, FloatArray, IntArray

T = TypeVar("T")

__all__ = ["OpenAIEngine", "OpenAISettings"]

_PROBE_TEXT = "Random numbers: 7, 963, 41,"  # nobody is certain of how it goes on
# Of one token to choose from, a distribution as it is sampled from is certain, and one before that is not.
_PROBE = Sampling(max_tokens=16, seed=0, temperature=2.0, top_k=1)
_MOST_PUSHES = 3  # of an adapter during one request: a server may be restarted while it gets it again
_CLOSE_S = 10.0  # for a server to forget our adapters; one that is gone keeps nobody waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAISettings:
    """Which model of which server, and what for."""

    server: ServerSettings
    model: str  # the base's name there, as /v1/models lists it
    dialect: Literal["vllm", "openai"]  # openai: no field that OpenAI does not document
    training: bool  # refuse a server that can't say what it sampled
    adapter_dir: Path | None  # where adapters are written for the server to read; None: the base alone

    def __post_init__(self) -> None:
        if self.training and self.dialect != "vllm":
            raise BadConfig(
                f"the dialect {self.dialect!r} has no token ids of what was sampled, so it can't be trained "
                "on; serve the model with `vllm serve` and use the dialect 'vllm'"
            )
        if self.adapter_dir is not None and self.dialect != "vllm":
            raise BadConfig(
                f"an adapter_dir has no effect with the dialect {self.dialect!r}: only `vllm serve` takes "
                "adapters; remove it or use the dialect 'vllm'"
            )


@dataclass(slots=True, eq=False)
class _Served:
    """One version as the server knows it, and who is using it."""

    name: str  # the model that requests ask for
    version: int
    folder: Path | None = None  # of its adapter; None: the base
    users: Users = field(default_factory=Users)  # requests in flight


class OpenAIEngine:
    """An :class:`agentrl.engine.Engine` over a server; made by :meth:`connect`."""

    def __init__(
        self,
        settings: OpenAISettings,
        *,
        encode: Callable[[str], Sequence[int]],  # a text's token ids, nothing added
        jitter: random.Random,  # spreads retries
    ) -> None:
        """Asks the server nothing yet."""
        self._settings, self._encode = settings, encode
        self._server = Server(settings.server, jitter=jitter)
        self._current = _Served(settings.model, 0)
        self._loading = asyncio.Lock()  # loads take effect in the order in which they were asked for
        self._home: Path | None = None  # our folder in adapter_dir; its name, unique there, begins ours
        self._pushed = 0  # adapters, so that the same version twice has two names
        self._dropping: set[asyncio.Task[None]] = set()
        self._leftover: set[_Served] = set()  # not used any more, but perhaps still loaded
        self._closed = False

    @classmethod
    async def connect(
        cls, settings: OpenAISettings, *, encode: Callable[[str], Sequence[int]], jitter: random.Random
    ) -> OpenAIEngine:
        """An engine whose server has answered one probe request.

        Raises UserError where the server can't serve what the settings ask for, and says why; EngineError
        where it can't be reached.
        """
        engine = cls(settings, encode=encode, jitter=jitter)
        try:
            await engine._probe()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        self._attend()
        served = self._current
        body = self._body(prompt_ids, sampling)
        read = partial(self._read, prompt_ids=prompt_ids, sampling=sampling, version=served.version)
        return await self._ask(served, body, read)

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`.

        Raises UserError at a temperature other than 1, as vLLM reports a prompt's logprobs before it.
        """
        self._attend()
        if self._settings.dialect != "vllm" or temperature not in (0, 1):
            raise UserError(
                f"scoring at temperature {temperature:g} with the dialect {self._settings.dialect!r} was "
                "asked for; only `vllm serve` scores, at temperature 1, so score with the learner instead"
            )
        body = self._body(token_ids, Sampling(max_tokens=1, seed=0)) | {"prompt_logprobs": 0}

        def read(response: httpx.Response) -> FloatArray:
            return read_prompt_logprobs(read_reply(response).choice, token_ids)

        return await self._ask(self._current, body, read)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`. Requests in flight go on under the version they began with.

        Raises UserError where the server takes no adapters, EngineError where it fails; what was served
        before is served then.
        """
        self._attend()
        async with self._loading:
            for unwanted in tuple(self._leftover):
                await self._unload(unwanted)
            if adapter is None:
                fresh = _Served(self._settings.model, version)
            else:
                fresh = await self._publish(adapter, version)
            old, self._current = self._current, fresh
            if old.folder is None:
                return
            drop = asyncio.ensure_future(self._drop(old))
            self._dropping.add(drop)
            drop.add_done_callback(self._dropping.discard)
            if not old.users:
                await drop

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`. Requests in flight fail with EngineError."""
        if self._closed:
            return
        self._closed = True
        await self._server.abort()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._forget_adapters()
        finally:
            await self._server.close()
            if self._home is not None:
                await in_thread(shutil.rmtree, self._home, ignore_errors=True)

    def _attend(self) -> None:
        if self._closed:
            raise EngineError(f"the engine over {self._server.url} is closed; make a new one")

    # -- completions --

    def _body(self, prompt_ids: IntArray, sampling: Sampling) -> dict[str, Any]:
        """The request without its model."""
        ids = np.asarray(prompt_ids).tolist()
        if not ids:
            raise UserError("the prompt is empty: nothing can be sampled after no token; give at least one")
        body = {
            "prompt": ids,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed if sampling.seed < 1 << 63 else sampling.seed - (1 << 64),  # int64 there
        }
        if self._settings.dialect == "openai":
            if sampling.top_k:
                raise UserError(
                    f"top_k is {sampling.top_k}, which the dialect 'openai' does not have; use 0 (all), or "
                    "the dialect 'vllm' where the server takes top_k"
                )
            return body
        return body | _vllm_fields(sampling) | ({"logprobs": 0} if self._settings.training else {})

    async def _ask(self, served: _Served, body: dict[str, Any], read: Callable[[httpx.Response], T]) -> T:
        """The reply of ``served``, which a server that has forgotten it since, restarted say, gets again."""
        named = body | {"model": served.name}
        with served.users.one_more():
            for _ in range(1 + _MOST_PUSHES):
                try:
                    return await self._server.post("completions", named, read=read)
                except Refused as refused:
                    if served.folder is None or refused.status != httpx.codes.NOT_FOUND:
                        raise
                    said = refused.refusal
                await self._push(served)
        raise EngineError(f"{said}. It was given that adapter {_MOST_PUSHES} times during one request")

    def _read(
        self, response: httpx.Response, *, prompt_ids: IntArray, sampling: Sampling, version: int
    ) -> Completion:
        """The completion in a reply. Raises BadReply."""
        reply = read_reply(response)
        check_prompt(reply, prompt_ids)
        choice = reply.choice
        finish = read_finish(choice)
        token_ids = read_token_ids(choice, most=sampling.max_tokens)
        logprobs = None if token_ids is None else read_logprobs(choice, count=len(token_ids))
        if self._settings.training and finish != "aborted":
            if token_ids is None or logprobs is None:
                lacking = "token_ids" if token_ids is None else "logprobs"
                raise BadReply(f"it has no {lacking}, without which nothing can be trained on it")
            check_stop(token_ids, finish, sampling.stop_token_ids)
        if token_ids is None:
            token_ids = np.array(self._encode(read_text(choice)), np.int32)
        if logprobs is None:
            logprobs = np.full(len(token_ids), np.nan, np.float32)
        return Completion(token_ids, logprobs, np.full(len(token_ids), version, np.int32), finish)

    async def _probe(self) -> None:
        """One request, after which it is known that the server can do what is asked of it."""
        training = self._settings.training
        sampling = _PROBE if training else Sampling(max_tokens=1, seed=0)
        prompt_ids = np.array(self._encode(_PROBE_TEXT), np.int32)

        def read(response: httpx.Response) -> Completion | BadReply:
            try:
                return self._read(response, prompt_ids=prompt_ids, sampling=sampling, version=0)
            except BadReply as fault:
                return fault  # not to be tried again: that is how this server answers

        answer = await self._ask(self._current, self._body(prompt_ids, sampling), read)
        fault = answer if isinstance(answer, BadReply) else ""
        if training and isinstance(answer, Completion):
            fault = find_distribution_fault(answer)
        if fault:
            needed = "`vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm`"
            advice = f"train with {needed}" if training else "use another server, or the other dialect"
            use = "training" if training else "evaluation"
            said = self._server.hide(str(fault))
            raise UserError(f"{self._server.url} can't be used for {use}: {said}; {advice}")

    # -- adapters --

    async def _publish(self, adapter: Adapter, version: int) -> _Served:
        """Write ``adapter`` to where the server reads it, and have it loaded under a name of its own."""
        home = self._home = self._home or _make_home(self._settings.adapter_dir)
        self._pushed += 1
        fresh = _Served(name := f"{home.name}-{self._pushed}-v{version}", version, home / name)
        self._leftover.add(fresh)  # where it fails below, the server may have it all the same
        await in_thread(write_folder, home / name, lambda folder: write_adapter(folder, adapter))
        await self._push(fresh)
        self._leftover.discard(fresh)
        return fresh

    async def _push(self, served: _Served) -> None:
        """Have the server load what is in the folder of ``served``."""

        def loaded(status: int, said: str) -> bool:
            # The name is ours alone, so what loaded it is an attempt whose reply was lost, or another request
            # that found it forgotten.
            return status == httpx.codes.BAD_REQUEST and "already been loaded" in said

        body = {"lora_name": served.name, "lora_path": str(served.folder)}
        try:
            await self._server.post("load_lora_adapter", body, read=_ignore, settled=loaded, urgent=True)
        except Refused as refused:
            raise UserError(
                f"{refused.refusal}. The adapter in {served.folder} can't be loaded; start `vllm serve` with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and a --max-lora-rank of at least the "
                "adapter's, and let it read that folder"
            ) from refused

    async def _unload(self, served: _Served) -> None:
        """Have the server forget ``served``, and remove the folder."""

        def gone(status: int, said: str) -> bool:
            # vLLM can't remove what it has evicted before, to make room for a later one.
            return status == httpx.codes.NOT_FOUND or "Failed to remove lora adapter" in said

        body = {"lora_name": served.name}
        await self._server.post("unload_lora_adapter", body, read=_ignore, settled=gone, urgent=True)
        self._leftover.discard(served)
        if served.folder is not None:
            await in_thread(shutil.rmtree, served.folder, ignore_errors=True)

    async def _drop(self, old: _Served) -> None:
        """Unload ``old`` once its requests are done; where that fails, the next load tries again, and says
        what is wrong."""
        await old.users.gone()
        self._leftover.add(old)
        with suppress(EngineError, UserError):
            await self._unload(old)

    async def _forget_adapters(self) -> None:
        """Leave the server without adapters of ours, where it still answers."""
        await asyncio.gather(*self._dropping)
        mine = {*self._leftover, self._current} if self._current.folder is not None else self._leftover
        for served in tuple(mine):
            with suppress(EngineError, UserError):
                await self._unload(served)


def _vllm_fields(sampling: Sampling) -> dict[str, Any]:
    """What `vllm serve` takes beside OpenAI's fields.

    All that changes the distribution is said, as the server's defaults are the model's generation config.
    """
    return {
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # those above are all that end a completion
        "skip_special_tokens": False,  # in the text, where it has to be tokenised again
        "return_token_ids": True,
    }


def _make_home(adapter_dir: Path | None) -> Path:
    """A new folder of ours in ``adapter_dir``. Raises UserError without one, CannotWrite for a disk's no."""
    if adapter_dir is None:
        raise UserError(
            "an adapter is to be served, and there is no adapter_dir; set it to a folder that this process "
            "writes and the server reads"
        )
    with writing(adapter_dir):
        adapter_dir.mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix="agentrl-", dir=adapter_dir.resolve()))
        home.chmod(0o755)  # the server may be another user's
    return home


def _ignore(response: httpx.Response) -> None:
    """What is read of a reply whose status says it all."""
