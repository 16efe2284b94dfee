"""What tests of engines over HTTP share: a server that behaves like `vllm serve`, and tests that await.

``async with vllm_server() as server, server.engine(training=True) as engine`` gives both ends. A test that is
a coroutine runs in an event loop of its own, for at most a minute.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentrl.engines.openai import OpenAIEngine, OpenAISettings
from agentrl.engines.server import ServerSettings

LETTERS = range(97, 123)  # the vocabulary that the server samples from; chr() is its tokenizer's decoding
LOGITS = np.linspace(-6.0, 6.0, len(LETTERS))

Answer = tuple[int, Any, Mapping[str, str]]  # status, content, headers
Step = Answer | type[ConnectionError] | Callable[[dict[str, Any]], Awaitable[Answer]]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await pyfuncitem.obj(**wanted)

    asyncio.run(bounded())
    return True


class VllmServer:
    """One model named "base", whose logits are the same everywhere, and whatever adapters are loaded.

    ``script`` answers the next completions, and ``adapter_script`` the next loads and unloads: an answer, a
    ConnectionError to hang up with, or, for completions, what makes an answer of the body.
    """

    def __init__(self, *, logprobs_mode: str = "processed_logprobs", lets_adapters_in: bool = True) -> None:
        self.script: list[Step] = []
        self.adapter_script: list[Answer | type[ConnectionError]] = []
        self.asked: list[dict[str, Any]] = []  # bodies of completions
        self.asked_at: list[float] = []  # seconds of the loop's clock
        self.adapters: dict[str, str] = {}  # names and folders, as loaded
        self.events: list[str] = []  # "load v1", "unload v1"
        self.http: Any = None  # the LoopbackServer that asks us
        self._processed, self._lets_adapters_in = logprobs_mode == "processed_logprobs", lets_adapters_in

    @property
    def asked_versions(self) -> list[str]:
        """Of the models that completions were asked of, in their order."""
        return [_version(body["model"]) for body in self.asked]

    @asynccontextmanager
    async def engine(self, **changes: Any) -> AsyncIterator[OpenAIEngine]:
        """An engine that has asked nothing yet."""
        engine = make_engine(self.http.url, **changes)
        try:
            yield engine
        finally:
            await engine.close()

    async def connect(self, **changes: Any) -> OpenAIEngine:
        """An engine that has made its probe."""
        options = {"encode": encode, "jitter": random.Random(0)}
        return await OpenAIEngine.connect(make_settings(self.http.url, **changes), **options)

    async def first_asked(self, count: int) -> None:
        """Until ``count`` completions were asked for."""
        while len(self.asked) < count:
            await asyncio.sleep(0.001)

    # -- answers for scripts --

    def refusal(self, status: int, message: str, **headers: str) -> Answer:
        """As vLLM wraps its errors."""
        error = {"message": message, "type": "x", "param": None, "code": status}
        return status, {"error": error}, {name.replace("_", "-"): value for name, value in headers.items()}

    def changed(self, **changes: Any) -> Step:
        """The server's own answer, but for ``changes`` of the choice."""

        async def answer(body: dict[str, Any]) -> Answer:
            return self.sampled(body, **changes)

        return answer

    def gate(self, answer: Answer | None = None) -> tuple[asyncio.Event, Step]:
        """An event, and what waits for it: ``answer``, or the server's own."""
        event = asyncio.Event()

        async def wait(body: dict[str, Any]) -> Answer:
            await event.wait()
            return answer or self.sampled(body)

        return event, wait

    async def hang(self, body: dict[str, Any]) -> Answer:
        """Nothing, for ever."""
        await asyncio.Event().wait()
        raise AssertionError("an event that nobody sets was set")

    def sampled(self, body: dict[str, Any], **changes: Any) -> Answer:
        """The server's own answer."""
        if body["model"] not in {"base", *self.adapters}:
            return self.refusal(404, f"The model `{body['model']}` does not exist.")
        choice = self.sample(body)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(choice["text"])}
        return 200, {"model": body["model"], "choices": [choice | changes], "usage": usage}, {}

    def sample(self, body: dict[str, Any]) -> dict[str, Any]:
        """The choice of that answer."""
        generator = np.random.default_rng(abs(body["seed"]))
        logits = LOGITS / (body["temperature"] or 1.0)
        if top_k := body.get("top_k"):
            logits = np.where(logits >= np.sort(logits)[-top_k], logits, -1e9)
        scaled = _log_softmax(logits)
        reported = scaled if self._processed else _log_softmax(LOGITS)
        ids: list[int] = []
        finish = "length"
        while len(ids) < body["max_tokens"] and finish == "length":
            ids.append(97 + int(generator.choice(len(LETTERS), p=np.exp(scaled) / np.exp(scaled).sum())))
            finish = "stop" if ids[-1] in body.get("stop_token_ids", ()) else finish
        choice: dict[str, Any] = {"index": 0, "text": "".join(map(chr, ids)), "finish_reason": finish}
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": [float(reported[one - 97]) for one in ids]}
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        if "prompt_logprobs" in body:
            rows = [{str(one): {"logprob": -one / 10, "rank": 1}} for one in body["prompt"]]
            choice["prompt_logprobs"] = [None, *rows[1:]]
        return choice

    # -- what the HTTP server asks --

    async def answer(self, path: str, body: dict[str, Any]) -> Answer:
        """The next answer of the script, else the server's own."""
        if path == "/v1/completions":
            return await self._complete(body)
        await asyncio.sleep(0)
        if not self._lets_adapters_in:
            return 404, {"detail": "Not Found"}, {}
        if self.adapter_script:
            return _played(self.adapter_script.pop(0))
        return self._load(body) if path == "/v1/load_lora_adapter" else self._unload(body)

    async def _complete(self, body: dict[str, Any]) -> Answer:
        self.asked.append(body)
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.script:
            step = self.script.pop(0)
            return _played(step) if isinstance(step, tuple | type) else await step(body)
        await asyncio.sleep(0)
        return self.sampled(body)

    def _load(self, body: dict[str, Any]) -> Answer:
        name = body["lora_name"]
        if name in self.adapters:
            return self.refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(body["lora_path"]) / "adapter_model.safetensors").is_file():
            return self.refusal(404, f"No adapter found for {body['lora_path']}")
        self.adapters[name] = body["lora_path"]
        self.events.append(f"load {_version(name)}")
        return 200, f"Success: LoRA adapter '{name}' added successfully.", {}

    def _unload(self, body: dict[str, Any]) -> Answer:
        name = body["lora_name"]
        if name not in self.adapters:
            return self.refusal(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        self.events.append(f"unload {_version(name)}")
        return 200, f"Success: LoRA adapter '{name}' removed successfully.", {}


def _played(step: Answer | type[ConnectionError]) -> Answer:
    if isinstance(step, type):
        raise step
    return step


def _version(name: str) -> str:
    return name.rpartition("-")[2]


def _log_softmax(logits: Any) -> Any:
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


@pytest.fixture
def vllm_server(loopback_server: Any) -> Callable[..., Any]:
    """Starts a VllmServer: ``async with vllm_server(logprobs_mode="raw_logprobs") as server``."""

    @asynccontextmanager
    async def run(**settings: Any) -> AsyncIterator[VllmServer]:
        server = VllmServer(**settings)
        async with loopback_server(server.answer) as server.http:
            yield server

    return run


# -- engines --


def encode(text: str) -> list[int]:
    """The tokens of ``text`` for that server."""
    return [ord(letter) for letter in text]


def make_settings(url: str, **changes: Any) -> OpenAISettings:
    """Those of a patient evaluation of "base", but for ``changes`` of the engine's or the server's."""
    server = {
        "url": url,
        "api_key_env": None,
        "max_connections": 8,
        "deadline_s": 20.0,
        "retries": 3,
        "backoff_s": 0.001,
    }
    model = {"model": "base", "dialect": "vllm", "training": False, "adapter_dir": None}
    server |= {name: value for name, value in changes.items() if name in server}
    model |= {name: value for name, value in changes.items() if name in model}
    assert set(changes) <= {*server, *model}
    return OpenAISettings(server=ServerSettings(**server), **model)


def make_engine(url: str, *, jitter: random.Random | None = None, **changes: Any) -> OpenAIEngine:
    """An engine that has asked nothing yet."""
    return OpenAIEngine(make_settings(url, **changes), encode=encode, jitter=jitter or random.Random(0))


@pytest.fixture
def openai_engine() -> Callable[..., OpenAIEngine]:
    """Makes an engine over a url, which has asked nothing yet: ``openai_engine(url, retries=0)``."""
    return functools.partial(make_engine)
