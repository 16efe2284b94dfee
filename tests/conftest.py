"""What tests share: a fake for each seam, a tiny model made once, a small environment, and what is skipped.

Fakes come as fixtures, because test modules import nothing from one another: ``scripted_engine("reply 1",
"reply 2")`` gives an engine that says these, turn by turn, in every episode.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported: workers share the cores
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

from agentrl.engine import Adapter, Sampling
from agentrl.env import Env
from agentrl.errors import ToolError
from agentrl.reward import Evidence
from agentrl.tool_env import ToolEnv
from agentrl.tools import tool
from agentrl.types import Completion, Finish, FloatArray, IntArray, Message, Task, ToolCall


def pytest_configure() -> None:
    """Ctrl-C is heard also where the tests were started in a shell's background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has all tests of the Docker engine: they stop it, fill it and count what it has."""
    for item in items:
        if item.get_closest_marker("docker") is not None:
            item.add_marker(pytest.mark.xdist_group("docker"))


# -- what a machine may lack: a skip, and a failure where AGENTRL_REQUIRE=docker,bwrap,vllm,gpu names it --


@functools.cache
def _lacks(what: str) -> str:
    """Why tests that need ``what`` can't run; "" where they can."""
    if what == "vllm":
        return "" if importlib.util.find_spec("vllm") else "vLLM is not installed"
    if what == "docker":
        if shutil.which("docker") is None:
            return "there is no docker command"
        answer = subprocess.run(["docker", "info"], capture_output=True, timeout=30)
        return "" if answer.returncode == 0 else "no Docker engine answers"
    if what == "bwrap":
        if shutil.which("bwrap") is None:
            return "there is no bwrap command"
        alone = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
        answer = subprocess.run(alone, capture_output=True, text=True, timeout=30)
        return "" if answer.returncode == 0 else f"bwrap does not work here: {answer.stderr.strip()}"
    import torch

    return "" if torch.cuda.is_available() else "there is no CUDA device"


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("AGENTRL_REQUIRE", "").split(",")
    for what in ("docker", "bwrap", "vllm", "gpu"):
        if item.get_closest_marker(what) is None or not _lacks(what):
            continue
        if what in required:
            pytest.fail(f"{_lacks(what)}, and AGENTRL_REQUIRE names {what!r}", pytrace=False)
        pytest.skip(_lacks(what))


# -- the engine's seam --

# A text, which ends its turn; token ids as they are; a failure; or what makes one of them of the prompt.
Reply = str | Sequence[int] | BaseException | Callable[[IntArray], Any]
ScriptedEngineFactory = Callable[..., "ScriptedEngine"]


class ScriptedEngine:
    """An engine that says ``replies`` turn by turn, the same in every episode, and remembers who asked what.

    A conversation beyond the last reply hears the last again.
    """

    def __init__(self, tokenizer: Any, *replies: Reply) -> None:
        self._tokenizer, self._replies = tokenizer, replies
        self.requests: list[tuple[IntArray, Sampling]] = []  # in the order in which they came
        self.batches: list[list[IntArray]] = []  # prompts that were asked for before one of them was answered
        self.completions: list[Completion] = []  # in the order in which they were given
        self.loaded: list[tuple[Adapter | None, int]] = []
        self.closed = False
        self._version = 0
        self._turns: dict[bytes, int] = {}  # by prompt and completion: turns so far
        self._answered = True  # since the last batch began

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        asked = prompt_ids.tobytes()
        self.requests.append((prompt_ids, sampling))
        if self._answered:
            self.batches.append([])
        self._answered = False
        self.batches[-1].append(prompt_ids)
        await asyncio.sleep(0)
        self._answered = True
        turn = max((turns for past, turns in self._turns.items() if asked.startswith(past)), default=0)
        completion = self._completion(self._reply(turn, prompt_ids), sampling)
        self._turns[asked + completion.token_ids.tobytes()] = turn + 1
        self.completions.append(completion)
        return completion

    def _reply(self, turn: int, prompt_ids: IntArray) -> Any:
        reply = self._replies[min(turn, len(self._replies) - 1)]
        reply = reply(prompt_ids) if callable(reply) else reply
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def _completion(self, reply: str | Sequence[int], sampling: Sampling) -> Completion:
        if isinstance(reply, str):
            ids = [*self._tokenizer.encode(reply, add_special_tokens=False), self._tokenizer.eos_token_id]
        else:
            ids = list(reply)
        ends = [place for place, token in enumerate(ids, 1) if token in sampling.stop_token_ids]
        size = min([*ends[:1], sampling.max_tokens, len(ids)])
        finish: Finish = "stop" if ends and ends[0] <= size else "length"
        logprobs = -np.random.default_rng(sampling.seed).exponential(size=size)
        return Completion(ids[:size], logprobs, np.full(size, self._version), finish)

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`."""
        return np.zeros(len(token_ids), np.float32)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`."""
        self.loaded.append((adapter, version))
        self._version = version

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`."""
        self.closed = True


@pytest.fixture(scope="session")
def scripted_engine(tokenizer: Any) -> ScriptedEngineFactory:
    """Makes a ScriptedEngine over the tiny tokenizer."""
    return functools.partial(ScriptedEngine, tokenizer)


# -- an HTTP server on loopback, for what speaks to one --

# Status, content (a text as it is, anything else as JSON), headers.
Answer = tuple[int, Any, Mapping[str, str]]


class LoopbackServer:
    """HTTP/1.1 on a free port of 127.0.0.1 while it is entered, in one event loop.

    ``answer(path, body)`` answers each request; a ConnectionError that it raises hangs up instead. A client
    that goes away has its request cancelled, as a model's server does it.
    """

    def __init__(self, answer: Callable[[str, Any], Awaitable[Answer]]) -> None:
        self._answer = answer
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self.keys: list[str] = []  # authorizations, in the order in which they came
        self.running = self.most_running = 0  # requests at once
        self.disconnects = 0  # clients that went away before their answer

    @property
    def url(self) -> str:
        """Of the API, its version included."""
        return f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}/v1"

    async def __aenter__(self) -> LoopbackServer:
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._listening.close()
        await self.hang_up()

    async def hang_up(self) -> None:
        """Close all connections, as a server does that is restarted."""
        connections = dict(self._connections)
        for writer in connections:
            writer.close()
        await asyncio.gather(*connections.values())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[writer] = task
        try:
            while True:
                await self._serve_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            del self._connections[writer]

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if "authorization" in headers:
            self.keys.append(headers["authorization"])
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            answer = await _until_gone(self._answer(request.split(" ")[1], body), reader)
        except _Gone:
            self.disconnects += not writer.is_closing()  # else it was us who hung up
            raise
        finally:
            self.running -= 1
        writer.write(_as_http(*answer))
        await writer.drain()


class _Gone(ConnectionError):
    """The client went away before its answer."""


async def _until_gone(work: Awaitable[Answer], reader: asyncio.StreamReader) -> Answer:
    answering = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(reader.read(1))
    await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
    is_answered = answering.done()
    for task in (answering, gone):
        task.cancel()
    await asyncio.wait({answering, gone})
    if not is_answered:
        raise _Gone
    return answering.result()


def _as_http(status: int, content: Any, headers: Mapping[str, str]) -> bytes:
    encoded = (content if isinstance(content, str) else json.dumps(content)).encode()
    lines = [f"{name}: {value}" for name, value in {"Content-Length": len(encoded), **headers}.items()]
    return "\r\n".join([f"HTTP/1.1 {status} Said", *lines, "", ""]).encode() + encoded


@pytest.fixture(scope="session")
def loopback_server() -> Iterator[type[LoopbackServer]]:
    """The server's class, whose servers are reached also where a proxy is set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield LoopbackServer


# -- small environments --


def _equals_truth(evidence: Evidence) -> float:
    return float(evidence.answer == evidence.task.truth["answer"])


class Sums(ToolEnv):
    """Adds two numbers with a tool; the answer is the sum and nothing else."""

    reward = _equals_truth

    def tasks(self, split: str) -> Sequence[Task]:
        first = {"train": 1, "test": 51}[split]
        return [
            Task(
                id=f"{split}-{a}",
                prompt=(Message("user", f"{a} + 2?"),),
                truth={"answer": str(a + 2), "a": a},
            )
            for a in range(first, first + 12)
        ]

    def gold(self, task: Task) -> Sequence[Message]:
        call = ToolCall(id="call_0", name="add", arguments={"a": task.truth["a"], "b": 2})
        return (Message("assistant", "", (call,)), Message("assistant", task.truth["answer"]))

    @tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        if a > 1000:
            raise ToolError("too large")
        return a + b


@pytest.fixture(scope="session")
def sums() -> type[Env]:
    """The environment's class; made without arguments."""
    return Sums


class Letters(ToolEnv):
    """Rewards an odd number of characters, cut off or not: half of what random weights say."""

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id=f"{split}-{index}", prompt=(Message("user", f"Say {index}"),)) for index in range(5)]

    @tool
    def look(self, at: int) -> int:
        """Look at a number."""
        return at

    def reward(self, evidence: Any) -> float:
        return float(len(evidence.messages[-1].content) % 2)

    def gold(self, task: Task) -> Sequence[Message]:
        return (Message("assistant", "a"),)


@pytest.fixture(scope="session")
def letters() -> type[Env]:
    """The environment's class; made without arguments."""
    return Letters


# -- a tiny model --


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of the module's tests are made by one thread: small models have nothing to share out."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of some ten thousand weights with a tokenizer that knows the small environment's words."""
    from agentrl.tiny import TinyShape, make_tiny_model

    path = tmp_path_factory.mktemp("tiny_checkpoint")
    shape = TinyShape(
        hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1, vocab_size=320, max_position=512
    )
    texts = ['Add two numbers. 1 + 2? {"name": "add", "arguments": {"a": 1, "b": 2}} 3'] * 20
    make_tiny_model(path, texts=texts, seed=0, shape=shape)
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint: Path) -> Any:
    """The tiny model's tokenizer."""
    from agentrl.models import load_tokenizer

    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="session")
def make_model(tiny_checkpoint: Path) -> Callable[..., Any]:
    """Loads the tiny model anew: ``make_model(dtype="float64")``."""
    from agentrl.models import load_model

    return functools.partial(load_model, tiny_checkpoint)
