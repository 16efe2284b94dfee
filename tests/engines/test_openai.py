from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agentrl.engine import Adapter, Sampling
from agentrl.engines.openai import OpenAIEngine, OpenAISettings, fit_for_training
from agentrl.engines.server import ServerSettings
from agentrl.errors import BadConfig, EngineError, UserError
from agentrl.types import Completion

KEY = "sk-a-very-secret-key"
PROMPT = np.array([5, 6, 7], np.int32)
LETTERS = range(97, 123)  # the vocabulary that the server samples from; chr() is its tokenizer's decoding
LOGITS = np.linspace(-6.0, 6.0, len(LETTERS))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# -- a server that behaves like `vllm serve` --


class Drop(Exception):
    """Close the connection without an answer."""


@dataclass(frozen=True)
class Answer:
    content: Any  # text as it is, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, **headers: str) -> Answer:
    """As vLLM wraps its errors."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer({"error": {"message": message, "type": "x", "param": None, "code": status}}, status, named)


Scripted = Callable[[dict[str, Any]], Awaitable[Answer]]


@dataclass
class VllmServer:
    """One model named "base", and whatever adapters are loaded; ``script`` answers the next completions."""

    url: str = ""
    logprobs_mode: str = "processed_logprobs"
    script: list[Answer | type[Drop] | Scripted] = field(default_factory=list)
    adapter_script: list[Answer | type[Drop]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of completions
    asked_at: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # authorizations
    adapters: dict[str, str] = field(default_factory=dict)  # names and folders, as loaded
    events: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    disconnects: int = 0
    lets_adapters_in: bool = True
    connections: set[Any] = field(default_factory=set)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task(), writer
        self.connections.add(connection)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = head.split("\r\n")
                path = lines[0].split(" ")[1]
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                self.keys += [line[15:] for line in lines if line.startswith("Authorization: ")]
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                answer = await self.until_gone(self.answer(path, body), reader)
                writer.write(as_http(answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, Drop):
            pass
        finally:
            writer.close()
            self.connections.discard(connection)

    async def hang_up(self) -> None:
        connections = tuple(self.connections)
        for _, writer in connections:
            writer.close()
        await asyncio.gather(*(task for task, _ in connections))

    async def until_gone(self, work: Awaitable[Answer], reader: asyncio.StreamReader) -> Answer:
        """What vLLM does: a client that goes away aborts its request."""
        answering = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
            self.disconnects += 1
            raise Drop
        gone.cancel()
        await asyncio.wait({gone})
        return answering.result()

    async def answer(self, path: str, body: dict[str, Any]) -> Answer:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if path == "/v1/completions":
                return await self.complete(body)
            await asyncio.sleep(0)
            if not self.lets_adapters_in:
                return Answer({"detail": "Not Found"}, 404)
            if self.adapter_script:
                return scripted(self.adapter_script.pop(0))
            return self.load(body) if path == "/v1/load_lora_adapter" else self.unload(body)
        finally:
            self.running -= 1

    async def complete(self, body: dict[str, Any]) -> Answer:
        self.asked.append(body)
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.script:
            step = self.script.pop(0)
            if isinstance(step, Answer | type):
                return scripted(step)
            return await step(body)
        await asyncio.sleep(0)
        return self.sampled(body)

    def sampled(self, body: dict[str, Any], **changes: Any) -> Answer:
        if body["model"] not in {"base", *self.adapters}:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        choice = sample(body, processed=self.logprobs_mode == "processed_logprobs")
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(choice["text"])}
        return Answer({"model": body["model"], "choices": [choice | changes], "usage": usage})

    def load(self, body: dict[str, Any]) -> Answer:
        name = body["lora_name"]
        if name in self.adapters:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(body["lora_path"]) / "adapter_model.safetensors").is_file():
            return refusal(404, f"No adapter found for {body['lora_path']}")
        self.adapters[name] = body["lora_path"]
        self.events.append(f"load {version_of(name)}")
        return Answer(f"Success: LoRA adapter '{name}' added successfully.")

    def unload(self, body: dict[str, Any]) -> Answer:
        name = body["lora_name"]
        if name not in self.adapters:
            return refusal(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        self.events.append(f"unload {version_of(name)}")
        return Answer(f"Success: LoRA adapter '{name}' removed successfully.")


def scripted(step: Answer | type[Drop]) -> Answer:
    if isinstance(step, type):
        raise step
    return step


def version_of(name: str) -> str:
    return name.rpartition("-")[2]


def log_softmax(logits: Any) -> Any:
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def sample(body: dict[str, Any], *, processed: bool) -> dict[str, Any]:
    """One choice, of a model whose logits are the same everywhere."""
    generator = np.random.default_rng(abs(body["seed"]))
    scaled = log_softmax(LOGITS / (body["temperature"] or 1.0))
    reported = scaled if processed else log_softmax(LOGITS)
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


def as_http(answer: Answer) -> bytes:
    plain = isinstance(answer.content, str)
    content = (answer.content if plain else json.dumps(answer.content)).encode()
    headers = {"Content-Length": str(len(content)), **answer.headers}
    lines = [f"HTTP/1.1 {answer.status} Said", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[VllmServer]:
    server = VllmServer(**changes)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    async with listening:
        try:
            yield server
        finally:
            await server.hang_up()


# -- engines over it --


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def settings(url: str, **changes: Any) -> OpenAISettings:
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


@asynccontextmanager
async def engine_over(server: VllmServer, **changes: Any) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAIEngine(settings(server.url, **changes), encode=encode, jitter=random.Random(0))
    try:
        yield engine
    finally:
        await engine.close()


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await check()

    asyncio.run(bounded())


def ask(**changes: Any) -> Sampling:
    return Sampling(**{"max_tokens": 6, "seed": 3} | changes)


def adapter(value: float = 1.0) -> Adapter:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return Adapter(config, {"model.q_proj.lora_A.weight": torch.full((2, 3), value)})


async def first_asked(server: VllmServer, count: int) -> None:
    """Until ``count`` completions were asked for."""
    while len(server.asked) < count:
        await asyncio.sleep(0.001)


async def hang(body: dict[str, Any]) -> Answer:
    await asyncio.Event().wait()
    raise AssertionError("an event that nobody sets was set")


def gate(server: VllmServer) -> tuple[asyncio.Event, Scripted]:
    """An event, and an answer that waits for it."""
    event = asyncio.Event()

    async def wait(body: dict[str, Any]) -> Answer:
        await event.wait()
        return server.sampled(body)

    return event, wait


def test_what_the_server_sampled_comes_back_id_for_id_with_its_logprobs() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, training=True) as engine:
            completion = await engine.generate(PROMPT, ask(temperature=0.5))
            choice = sample(server.asked[0], processed=True)
            assert completion.token_ids.tolist() == choice["token_ids"]
            assert np.allclose(completion.logprobs, choice["logprobs"]["token_logprobs"])
            assert completion.versions.tolist() == [0] * 6
            assert completion.finish == "length"
            assert fit_for_training(completion)

    run(check)


def test_every_sampling_setting_is_said_and_the_servers_defaults_are_overruled() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, training=True) as engine:
            await engine.generate(
                PROMPT,
                ask(max_tokens=4, seed=9, temperature=0.7, top_p=0.9, top_k=12, stop_token_ids=(120, 122)),
            )
            assert server.asked == [
                {
                    "model": "base",
                    "prompt": [5, 6, 7],
                    "max_tokens": 4,
                    "seed": 9,
                    "temperature": 0.7,
                    "top_p": 0.9,
                    "top_k": 12,
                    "min_p": 0.0,
                    "repetition_penalty": 1.0,
                    "presence_penalty": 0.0,
                    "frequency_penalty": 0.0,
                    "stop_token_ids": [120, 122],
                    "ignore_eos": True,
                    "skip_special_tokens": False,
                    "return_token_ids": True,
                    "logprobs": 0,
                }
            ]

    run(check)


def test_seeds_of_64_bits_fit_the_servers_signed_ones_and_stay_distinct() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            for seed in (0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
                await engine.generate(PROMPT, ask(seed=seed))
            assert [body["seed"] for body in server.asked] == [0, (1 << 63) - 1, -(1 << 63), -1]

    run(check)


def test_a_stop_token_ends_a_completion_and_is_its_last_id() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, training=True) as engine:
            completion = await engine.generate(PROMPT, ask(max_tokens=500, stop_token_ids=(122,)))
            assert completion.finish == "stop"
            assert completion.token_ids[-1] == 122

    run(check)


def test_the_plain_dialect_sends_openais_own_fields_alone_and_tokenises_the_text_again() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, dialect="openai") as engine:
            completion = await engine.generate(PROMPT, ask())
            assert set(server.asked[0]) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
            assert completion.token_ids.tolist() == encode(sample(server.asked[0], processed=True)["text"])
            assert np.isnan(completion.logprobs).all()
            assert not fit_for_training(completion)
            with pytest.raises(UserError, match="top_k is 5"):
                await engine.generate(PROMPT, ask(top_k=5))

    run(check)


def test_a_server_that_ignores_return_token_ids_serves_evaluation_and_is_marked_unfit() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            silent = server.sampled({"model": "base", "prompt": [5, 6, 7], "max_tokens": 3} | SEEDED)
            server.script = [silent]
            completion = await engine.generate(PROMPT, ask())
            assert completion.token_ids.tolist() == encode(silent.content["choices"][0]["text"])
            assert not fit_for_training(completion)

    run(check)


SEEDED = {"seed": 0, "temperature": 1.0}


def test_an_empty_prompt_is_refused_before_it_is_sent() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            with pytest.raises(UserError, match="prompt is empty"):
                await engine.generate(np.zeros(0, np.int32), ask())
            assert not server.asked

    run(check)


# -- start-up --


def changed(server: VllmServer, **changes: Any) -> Scripted:
    """An answer as the server's, but for ``changes`` of the choice."""

    async def answer(body: dict[str, Any]) -> Answer:
        return server.sampled(body, **changes)

    return answer


@pytest.mark.parametrize("training", [True, False])
def test_a_fitting_server_passes_one_probe(training: bool) -> None:
    async def check() -> None:
        async with running() as server:
            connected = settings(server.url, training=training)
            engine = await OpenAIEngine.connect(connected, encode=encode, jitter=random.Random(0))
            assert len(server.asked) == 1
            await engine.close()

    run(check)


FLAT = {"token_logprobs": [-3.2] * 15}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"token_ids": None}, "has no token_ids"),
        ({"logprobs": None}, "has no logprobs"),
        ({"logprobs": FLAT}, "16 token_ids and 15 token_logprobs"),
        ({"logprobs": {"token_logprobs": [None] * 16}}, "one of its logprobs is None"),
        ({"logprobs": {"token_logprobs": [-9999.0] * 16}}, "one of its logprobs is -9999"),
        ({"logprobs": {"token_logprobs": [0.3] * 16}}, "one of its logprobs is 0.3"),
        ({"logprobs": {"token_logprobs": [-0.01] * 16}}, "not of the distribution after temperature"),
        ({"token_ids": ["a"] * 16}, "no list of ids"),
        ({"token_ids": [99] * 17}, "17 token_ids where at most 16"),
        ({"prompt_token_ids": [1, 5, 6, 7]}, "it changes prompts"),
        ({"finish_reason": "stop"}, "none of the stop_token_ids"),
    ],
)
def test_a_server_that_can_not_say_what_it_sampled_is_refused_for_training(
    changes: dict[str, Any], why: str
) -> None:
    async def check() -> None:
        async with running() as server:
            server.script = [changed(server, **changes)]
            with pytest.raises(UserError, match="can't be used for training") as refused:
                await OpenAIEngine.connect(
                    settings(server.url, training=True), encode=encode, jitter=random.Random(0)
                )
            assert why in str(refused.value)
            assert "--logprobs-mode processed_logprobs" in str(refused.value)
            assert len(server.asked) == 1

    run(check)


def test_logprobs_from_before_the_temperature_are_found_out_at_start_up() -> None:
    async def check() -> None:
        async with running(logprobs_mode="raw_logprobs") as server:
            with pytest.raises(UserError, match="not of the distribution after temperature"):
                await OpenAIEngine.connect(
                    settings(server.url, training=True), encode=encode, jitter=random.Random(0)
                )

    run(check)


def test_a_server_that_adds_to_prompts_is_refused_for_evaluation_too() -> None:
    async def check() -> None:
        async with running() as server:
            answer = server.sampled({"model": "base", "prompt": [0] * 8, "max_tokens": 1} | SEEDED)
            server.script = [answer]
            with pytest.raises(UserError, match="8 prompt tokens where 7 were sent"):
                await OpenAIEngine.connect(settings(server.url), encode=encode, jitter=random.Random(0))

    run(check)


def test_a_model_that_is_not_served_is_the_users_to_correct() -> None:
    async def check() -> None:
        async with running() as server:
            with pytest.raises(UserError, match="404: The model `other` does not exist"):
                await OpenAIEngine.connect(
                    settings(server.url, model="other"), encode=encode, jitter=random.Random(0)
                )

    run(check)


def test_settings_that_can_not_work_are_refused() -> None:
    with pytest.raises(BadConfig, match="can't be trained"):
        settings("http://h/v1", dialect="openai", training=True)
    with pytest.raises(BadConfig, match="adapter_dir has no effect"):
        settings("http://h/v1", dialect="openai", adapter_dir=Path("/a"))
    with pytest.raises(BadConfig, match="must be like http"):
        settings("localhost:8000")
    with pytest.raises(BadConfig, match="user name or a password") as refused:
        settings("http://me:hunter2@h/v1")
    assert "hunter2" not in str(refused.value)


# -- failures --


def test_a_429_is_waited_out_as_long_as_it_says() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            server.script = [refusal(429, "slow down", Retry_After="1")]
            await engine.generate(PROMPT, ask())
            first, second = server.asked_at
            assert second - first >= 0.99

    run(check)


@pytest.mark.parametrize("until", ["3600", "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_a_429_whose_wait_outlasts_the_deadline_fails_at_once(until: str) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            server.script = [refusal(429, "quota used up", Retry_After=until)]
            with pytest.raises(EngineError, match="before the request's deadline of 20 s.*quota used up"):
                await engine.generate(PROMPT, ask())

    run(check)


def test_two_500s_and_a_dropped_connection_are_made_good_by_the_same_request() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, training=True) as engine:
            server.script = [refusal(500, "oops"), refusal(503, "oops"), Drop]
            completion = await engine.generate(PROMPT, ask())
            assert len(server.asked) == 4
            assert all(body == server.asked[0] for body in server.asked)
            assert completion.token_ids.tolist() == sample(server.asked[0], processed=True)["token_ids"]

    run(check)


def test_failures_without_end_are_the_worlds_with_what_the_server_said() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, retries=2) as engine:
            server.script = [refusal(500, "EngineDeadError: it died")] * 9
            with pytest.raises(EngineError, match="failed in 3 attempts; at last: status 500.*it died"):
                await engine.generate(PROMPT, ask())
            assert len(server.asked) == 3

    run(check)


def test_a_server_that_is_not_there_is_the_worlds_fault() -> None:
    async def check() -> None:
        async with running() as server:
            url = server.url
        engine = OpenAIEngine(settings(url, retries=1), encode=encode, jitter=random.Random(0))
        with pytest.raises(EngineError, match="failed in 2 attempts.*ConnectError"):
            await engine.generate(PROMPT, ask())
        await engine.close()

    run(check)


def test_a_request_that_hangs_is_given_up_at_its_deadline_and_its_connection_closed() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, deadline_s=1.5) as engine:
            server.script = [hang]
            with pytest.raises(EngineError, match=r"took over 1\.5 s"):
                await engine.generate(PROMPT, ask())
            while not server.disconnects:
                await asyncio.sleep(0.001)

    run(check)


def test_any_other_refusal_is_the_users_and_not_tried_again() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            server.script = [refusal(400, "maximum context length is 64 tokens")]
            with pytest.raises(UserError, match="status 400: maximum context length is 64 tokens"):
                await engine.generate(PROMPT, ask())
            assert len(server.asked) == 1

    run(check)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"object": "error", "message": "old form"}, "old form"),
        ({"detail": "another form"}, "another form"),
        ("plain\n text", "plain text"),
        ("", "it gave no reason"),
    ],
)
def test_what_a_server_says_is_found_in_every_form(content: Any, said: str) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            server.script = [Answer(content, 403)]
            with pytest.raises(UserError, match=f"status 403: {said}. Correct"):
                await engine.generate(PROMPT, ask())

    run(check)


def malformed(server: VllmServer) -> list[Answer | Scripted]:
    """Replies that come with success and can't be used for training."""
    answers: list[Answer | Scripted] = [
        Answer('{"choices": [{"text": "cut o'),
        Answer([1, 2]),
        Answer({"choices": []}),
        Answer({"choices": [{"text": "no more"}]}),
    ]
    wrong: list[dict[str, Any]] = [
        {"token_ids": None},
        {"token_ids": [99]},
        {"token_ids": [99] * 5, "logprobs": {"token_logprobs": [-1.0] * 4}},
        {"logprobs": {}},
        {"finish_reason": None},
        {"finish_reason": "stop"},
        {"token_ids": [], "logprobs": {"token_logprobs": []}},
    ]
    return answers + [changed(server, **changes) for changes in wrong]


@pytest.mark.parametrize("number", range(11))
def test_a_reply_that_can_not_be_used_is_asked_for_again_and_never_trained_on(number: int) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, training=True, retries=1) as engine:
            bad = malformed(server)[number]
            server.script = [bad]
            completion = await engine.generate(PROMPT, ask())
            assert fit_for_training(completion)
            server.script = [bad, bad]
            with pytest.raises(EngineError, match="its reply can't be used"):
                await engine.generate(PROMPT, ask())

    run(check)


def test_a_completion_that_the_server_aborted_says_so() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, training=True) as engine:
            server.script = [changed(server, finish_reason="abort")]
            assert (await engine.generate(PROMPT, ask())).finish == "aborted"

    run(check)


# -- the API key --


def test_the_key_is_sent_and_no_message_or_log_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)

    async def check() -> None:
        async with running() as server, engine_over(server, api_key_env="MY_KEY") as engine:
            await engine.generate(PROMPT, ask())
            assert server.keys == [f"Bearer {KEY}"]
            server.script = [refusal(401, f"Incorrect API key provided: {KEY}")]
            with pytest.raises(UserError, match=r"provided: \*\*\*\.") as refused:
                await engine.generate(PROMPT, ask())
            assert KEY not in repr(refused.value)
            assert KEY not in repr(vars(engine))
            server.script = [Answer(f"{KEY} is no JSON")] * 4
            with pytest.raises(EngineError, match="it is no JSON") as failed:
                await engine.generate(PROMPT, ask())
            assert KEY not in repr(failed.value)
            server.script = [changed(server, finish_reason=KEY)]
            probed = settings(server.url, api_key_env="MY_KEY")
            with pytest.raises(UserError, match=r"finish_reason is '\*\*\*'"):
                await OpenAIEngine.connect(probed, encode=encode, jitter=random.Random(0))

    run(check)
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["", "two words", "ключ"])
def test_a_key_that_is_missing_or_none_is_refused_without_being_said(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(BadConfig, match="MY_KEY") as refused:
        OpenAIEngine(
            settings("http://127.0.0.1:1/v1", api_key_env="MY_KEY"), encode=encode, jitter=random.Random(0)
        )
    assert not key or key not in str(refused.value)


# -- many requests --


def test_no_more_requests_run_at_once_than_there_are_connections() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, max_connections=4) as engine:
            released, wait = gate(server)
            server.script = [wait] * 4
            asked = [asyncio.ensure_future(engine.generate(PROMPT, ask(seed=seed))) for seed in range(40)]
            await first_asked(server, 4)
            assert server.most_running == 4
            released.set()
            completions = await asyncio.gather(*asked)
            assert server.most_running == 4
            assert len(server.asked) == 40
            for seed, completion in enumerate(completions):
                body = next(body for body in server.asked if body["seed"] == seed)
                assert completion.token_ids.tolist() == sample(body, processed=True)["token_ids"]

    run(check)


def test_cancelling_a_request_closes_it_at_the_server_and_frees_its_connection() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, max_connections=1) as engine:
            server.script = [hang]
            asked = asyncio.ensure_future(engine.generate(PROMPT, ask()))
            await first_asked(server, 1)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            while not server.disconnects:
                await asyncio.sleep(0.001)
            assert len((await engine.generate(PROMPT, ask())).token_ids) == 6

    run(check)


def test_closing_fails_what_is_in_flight_or_waits_and_whatever_comes_later() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, max_connections=1) as engine:
            server.script = [hang]
            asked = [asyncio.ensure_future(engine.generate(PROMPT, ask())) for _ in range(2)]
            await first_asked(server, 1)
            await engine.close()
            for one in asked:
                with pytest.raises(EngineError, match="was closed while"):
                    await one
            with pytest.raises(EngineError, match="is closed; make a new one"):
                await engine.generate(PROMPT, ask())
            await engine.close()

    run(check)


def test_an_engine_serves_one_event_loop() -> None:
    engine = OpenAIEngine(
        settings("http://127.0.0.1:1/v1", retries=0), encode=encode, jitter=random.Random(0)
    )

    async def check() -> None:
        with pytest.raises(EngineError, match="failed in 1 attempt"):
            await engine.generate(PROMPT, ask())

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await engine.generate(PROMPT, ask())
        await engine.close()

    run(check)
    run(elsewhere)


# -- scoring --


def test_a_sequence_is_scored_by_the_prompts_logprobs() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            for temperature in (0.0, 1.0):
                scored = await engine.score(PROMPT, temperature)
                assert np.allclose(scored, [0, -0.6, -0.7])
            assert server.asked[0]["prompt_logprobs"] == 0
            with pytest.raises(UserError, match=r"temperature 0\.5"):
                await engine.score(PROMPT, 0.5)

    run(check)


# -- adapters --


def asked_versions(server: VllmServer) -> list[str]:
    return [version_of(body["model"]) for body in server.asked]


async def versions_of(asked: Awaitable[Completion]) -> set[int]:
    return set((await asked).versions.tolist())


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*/*"))


def test_each_version_is_loaded_under_its_own_name_and_the_one_before_it_unloaded(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server:
            async with engine_over(server, adapter_dir=tmp_path) as engine:
                assert await versions_of(engine.generate(PROMPT, ask())) == {0}
                await engine.load(adapter(1.0), 1)
                assert await versions_of(engine.generate(PROMPT, ask())) == {1}
                (first,) = server.adapters
                await engine.load(adapter(2.0), 2)
                assert await versions_of(engine.generate(PROMPT, ask())) == {2}
                (second,) = server.adapters
                assert first != second
                tensors = load_file(Path(server.adapters[second]) / "adapter_model.safetensors")
                assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
                    "model.q_proj.lora_A.weight": [[2.0] * 3] * 2
                }
                assert folders(tmp_path) == [second]
                assert asked_versions(server) == ["base", "v1", "v2"]
            assert server.events == ["load v1", "load v2", "unload v1", "unload v2"]
            assert not list(tmp_path.iterdir())

    run(check)


def test_the_same_version_twice_has_two_names(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path) as engine:
            await engine.load(adapter(1.0), 1)
            await engine.load(adapter(2.0), 1)
            await engine.generate(PROMPT, ask())
            assert [*server.adapters] == [server.asked[0]["model"]]
            assert server.events == ["load v1", "load v1", "unload v1"]

    run(check)


def test_the_bare_base_is_served_again_after_an_adapter(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path) as engine:
            await engine.load(adapter(), 1)
            await engine.load(None, 2)
            assert await versions_of(engine.generate(PROMPT, ask())) == {2}
            assert server.asked[0]["model"] == "base"
            assert not server.adapters

    run(check)


def test_requests_in_flight_end_under_their_version_which_is_unloaded_after_them(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path) as engine:
            await engine.load(adapter(1.0), 1)
            released, wait = gate(server)
            # The second is tried again after the swap, and asks for the version that it began with.
            server.script = [wait, after(released, refusal(500, "oops"))]
            asked = [asyncio.ensure_future(engine.generate(PROMPT, ask(seed=seed))) for seed in range(2)]
            await first_asked(server, 2)
            await engine.load(adapter(2.0), 2)
            assert await versions_of(engine.generate(PROMPT, ask())) == {2}
            assert server.events == ["load v1", "load v2"]
            released.set()
            assert [await versions_of(one) for one in asked] == [{1}, {1}]
            assert asked_versions(server) == ["v1", "v1", "v2", "v1"]
            while len(server.adapters) > 1:
                await asyncio.sleep(0.001)
            assert server.events == ["load v1", "load v2", "unload v1"]

    run(check)


def after(event: asyncio.Event, answer: Answer) -> Scripted:
    async def wait(body: dict[str, Any]) -> Answer:
        await event.wait()
        return answer

    return wait


def test_a_swap_does_not_wait_behind_queued_requests(tmp_path: Path) -> None:
    async def check() -> None:
        async with (
            running() as server,
            engine_over(server, adapter_dir=tmp_path, max_connections=1) as engine,
        ):
            released, wait = gate(server)
            server.script = [wait]
            asked = [asyncio.ensure_future(engine.generate(PROMPT, ask())) for _ in range(3)]
            await first_asked(server, 1)
            await engine.load(adapter(), 1)
            assert server.events == ["load v1"]
            released.set()
            assert [await versions_of(one) for one in asked] == [{0}] * 3

    run(check)


@pytest.mark.parametrize("lost", [Drop, refusal(500, "oops")])
def test_a_load_whose_reply_was_lost_is_made_again_and_counts_once(
    lost: Answer | type[Drop], tmp_path: Path
) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path) as engine:
            server.adapter_script = [lost, refusal(400, "The lora adapter 'x' has already been loaded.")]
            await engine.load(adapter(), 1)
            assert not server.adapter_script

    run(check)


def test_a_failed_load_leaves_what_was_served_and_is_forgotten_at_the_next(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path, retries=1) as engine:
            await engine.load(adapter(1.0), 1)
            server.adapter_script = [refusal(500, "no room for it")] * 2
            with pytest.raises(EngineError, match="no room for it"):
                await engine.load(adapter(2.0), 2)
            assert await versions_of(engine.generate(PROMPT, ask())) == {1}
            await engine.load(adapter(3.0), 3)
            assert await versions_of(engine.generate(PROMPT, ask())) == {3}
            assert folders(tmp_path) == [*server.adapters]

    run(check)


def test_an_unload_that_fails_is_tried_again_at_the_next_load_which_says_why(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path, retries=0) as engine:
            await engine.load(adapter(), 1)
            server.adapter_script = [Answer("Success"), refusal(500, "it hiccups")]
            await engine.load(adapter(), 2)
            server.adapter_script = [refusal(500, "it is broken")]
            with pytest.raises(EngineError, match="it is broken"):
                await engine.load(adapter(), 3)
            await engine.load(adapter(), 3)
            assert server.events == ["load v1", "unload v1", "load v3"]

    run(check)


def test_what_the_server_evicted_itself_counts_as_unloaded(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path, retries=0) as engine:
            await engine.load(adapter(), 1)
            (first,) = server.adapters
            evicted = f"Failed to remove lora adapter '{first}' from the engine."
            server.adapter_script = [Answer("Success"), refusal(500, evicted)]
            await engine.load(adapter(), 2)
            assert first not in folders(tmp_path)
            await engine.load(adapter(), 3)

    run(check)


def test_a_server_that_was_restarted_gets_the_adapter_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path) as engine:
            await engine.load(adapter(), 1)
            server.adapters.clear()
            asked = [engine.generate(PROMPT, ask(seed=seed)) for seed in range(3)]
            assert [set(one.versions.tolist()) for one in await asyncio.gather(*asked)] == [{1}] * 3
            assert server.events == ["load v1", "load v1"]

    run(check)


def test_a_server_without_run_time_adapters_is_told_how_to_start(tmp_path: Path) -> None:
    async def check() -> None:
        async with (
            running(lets_adapters_in=False) as server,
            engine_over(server, adapter_dir=tmp_path) as engine,
        ):
            with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1") as refused:
                await engine.load(adapter(), 1)
            assert "status 404: Not Found" in str(refused.value)

    run(check)


def test_an_adapter_without_a_folder_to_write_it_to_is_refused() -> None:
    async def check() -> None:
        async with running() as server, engine_over(server) as engine:
            with pytest.raises(UserError, match="there is no adapter_dir"):
                await engine.load(adapter(), 1)

    run(check)


def test_closing_does_not_need_a_server_that_still_answers(tmp_path: Path) -> None:
    async def check() -> None:
        async with running() as server, engine_over(server, adapter_dir=tmp_path, retries=0) as engine:
            await engine.load(adapter(), 1)
            server.adapter_script = [refusal(500, "it died")]
            await engine.close()
            assert not list(tmp_path.iterdir())

    run(check)


def test_retries_are_spread_by_the_randomness_that_was_handed_in() -> None:
    async def check() -> None:
        async with running() as server:
            jitter, reference = random.Random(5), random.Random(5)
            engine = OpenAIEngine(settings(server.url), encode=encode, jitter=jitter)
            server.script = [refusal(500, "oops")] * 3
            await engine.generate(PROMPT, ask())
            await engine.close()
            for _ in range(3):
                reference.random()
            assert jitter.getstate() == reference.getstate()

    run(check)
