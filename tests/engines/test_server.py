"""Requests to a server that fails: what is tried again, what is the world's fault, what the user's."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import numpy as np
import pytest

from agentrl.engine import Sampling
from agentrl.errors import BadConfig, EngineError, UserError

KEY = "sk-a-very-secret-key"
PROMPT = np.array([5, 6, 7], np.int32)


def ask(**changes: Any) -> Sampling:
    return Sampling(**{"max_tokens": 6, "seed": 3} | changes)


async def test_a_429_is_waited_out_as_long_as_it_says(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine() as engine:
        server.script = [server.refusal(429, "slow down", Retry_After="1")]
        await engine.generate(PROMPT, ask())
        first, second = server.asked_at
        assert second - first >= 0.99


@pytest.mark.parametrize("until", ["3600", "Fri, 31 Dec 2999 23:59:59 GMT"])
async def test_a_429_whose_wait_outlasts_the_deadline_fails_at_once(vllm_server: Any, until: str) -> None:
    async with vllm_server() as server, server.engine() as engine:
        server.script = [server.refusal(429, "quota used up", Retry_After=until)]
        with pytest.raises(EngineError, match="before the request's deadline of 20 s.*quota used up"):
            await engine.generate(PROMPT, ask())


async def test_two_500s_and_a_dropped_connection_are_made_good_by_the_same_request(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine(training=True) as engine:
        server.script = [server.refusal(500, "oops"), server.refusal(503, "oops"), ConnectionResetError]
        completion = await engine.generate(PROMPT, ask())
        assert len(server.asked) == 4
        assert all(body == server.asked[0] for body in server.asked)
        assert completion.token_ids.tolist() == server.sample(server.asked[0])["token_ids"]


async def test_failures_without_end_are_the_worlds_with_what_the_server_said(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine(retries=2) as engine:
        server.script = [server.refusal(500, "EngineDeadError: it died")] * 9
        with pytest.raises(EngineError, match="failed in 3 attempts; at last: status 500.*it died"):
            await engine.generate(PROMPT, ask())
        assert len(server.asked) == 3


async def test_a_server_that_is_not_there_is_the_worlds_fault(vllm_server: Any, openai_engine: Any) -> None:
    async with vllm_server() as server:
        url = server.http.url
    engine = openai_engine(url, retries=1)
    with pytest.raises(EngineError, match="failed in 2 attempts.*ConnectError"):
        await engine.generate(PROMPT, ask())
    await engine.close()


async def test_a_request_that_hangs_is_given_up_at_its_deadline_and_its_connection_closed(
    vllm_server: Any,
) -> None:
    async with vllm_server() as server, server.engine(deadline_s=1.5) as engine:
        server.script = [server.hang]
        with pytest.raises(EngineError, match=r"took over 1\.5 s"):
            await engine.generate(PROMPT, ask())
        while not server.http.disconnects:
            await asyncio.sleep(0.001)


async def test_any_other_refusal_is_the_users_and_not_tried_again(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine() as engine:
        server.script = [server.refusal(400, "maximum context length is 64 tokens")]
        with pytest.raises(UserError, match="status 400: maximum context length is 64 tokens"):
            await engine.generate(PROMPT, ask())
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"object": "error", "message": "old form"}, "old form"),
        ({"detail": "another form"}, "another form"),
        ("plain\n text", "plain text"),
        ("", "it gave no reason"),
    ],
)
async def test_what_a_server_says_is_found_in_every_form(vllm_server: Any, content: Any, said: str) -> None:
    async with vllm_server() as server, server.engine() as engine:
        server.script = [(403, content, {})]
        with pytest.raises(UserError, match=f"status 403: {said}. Correct"):
            await engine.generate(PROMPT, ask())


def malformed(server: Any) -> list[Any]:
    """Replies that come with success and can't be used for training."""
    contents = ['{"choices": [{"text": "cut o', [1, 2], {"choices": []}, {"choices": [{"text": "no more"}]}]
    wrong: list[dict[str, Any]] = [
        {"token_ids": None},
        {"token_ids": [99]},
        {"token_ids": [99] * 5, "logprobs": {"token_logprobs": [-1.0] * 4}},
        {"logprobs": {}},
        {"finish_reason": None},
        {"finish_reason": "stop"},
        {"token_ids": [], "logprobs": {"token_logprobs": []}},
    ]
    return [(200, content, {}) for content in contents] + [server.changed(**changes) for changes in wrong]


@pytest.mark.parametrize("number", range(11))
async def test_a_reply_that_can_not_be_used_is_asked_for_again_and_never_trained_on(
    vllm_server: Any, number: int
) -> None:
    async with vllm_server() as server, server.engine(training=True, retries=1) as engine:
        bad = malformed(server)[number]
        server.script = [bad]
        completion = await engine.generate(PROMPT, ask())
        assert np.isfinite(completion.logprobs).all()
        server.script = [bad, bad]
        with pytest.raises(EngineError, match="its reply can't be used"):
            await engine.generate(PROMPT, ask())


async def test_a_completion_that_the_server_aborted_says_so(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine(training=True) as engine:
        server.script = [server.changed(finish_reason="abort")]
        assert (await engine.generate(PROMPT, ask())).finish == "aborted"


async def test_retries_are_spread_by_the_randomness_that_was_handed_in(vllm_server: Any) -> None:
    async with vllm_server() as server:
        jitter, reference = random.Random(5), random.Random(5)
        async with server.engine(jitter=jitter) as engine:
            server.script = [server.refusal(500, "oops")] * 3
            await engine.generate(PROMPT, ask())
        for _ in range(3):
            reference.random()
        assert jitter.getstate() == reference.getstate()


# -- the API key --


async def test_the_key_is_sent_and_no_message_or_log_has_it(
    vllm_server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)

    async with vllm_server() as server, server.engine(api_key_env="MY_KEY") as engine:
        await engine.generate(PROMPT, ask())
        assert server.http.keys == [f"Bearer {KEY}"]
        server.script = [server.refusal(401, f"Incorrect API key provided: {KEY}")]
        with pytest.raises(UserError, match=r"provided: \*\*\*\.") as refused:
            await engine.generate(PROMPT, ask())
        assert KEY not in repr(refused.value)
        assert KEY not in repr(vars(engine))
        server.script = [(200, f"{KEY} is no JSON", {})] * 4
        with pytest.raises(EngineError, match="it is no JSON") as failed:
            await engine.generate(PROMPT, ask())
        assert KEY not in repr(failed.value)
        server.script = [server.changed(finish_reason=KEY)]
        with pytest.raises(UserError, match=r"finish_reason is '\*\*\*'"):
            await server.connect(api_key_env="MY_KEY")
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["", "two words", "ключ"])
def test_a_key_that_is_missing_or_none_is_refused_without_being_said(
    openai_engine: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(BadConfig, match="MY_KEY") as refused:
        openai_engine("http://127.0.0.1:1/v1", api_key_env="MY_KEY")
    assert not key or key not in str(refused.value)


# -- many requests --


async def test_no_more_requests_run_at_once_than_there_are_connections(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine(max_connections=4) as engine:
        released, wait = server.gate()
        server.script = [wait] * 4
        asked = [asyncio.ensure_future(engine.generate(PROMPT, ask(seed=seed))) for seed in range(40)]
        await server.first_asked(4)
        assert server.http.most_running == 4
        released.set()
        completions = await asyncio.gather(*asked)
        assert server.http.most_running == 4
        assert len(server.asked) == 40
        for seed, completion in enumerate(completions):
            body = next(body for body in server.asked if body["seed"] == seed)
            assert completion.token_ids.tolist() == server.sample(body)["token_ids"]


async def test_cancelling_a_request_closes_it_at_the_server_and_frees_its_connection(
    vllm_server: Any,
) -> None:
    async with vllm_server() as server, server.engine(max_connections=1) as engine:
        server.script = [server.hang]
        asked = asyncio.ensure_future(engine.generate(PROMPT, ask()))
        await server.first_asked(1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        while not server.http.disconnects:
            await asyncio.sleep(0.001)
        assert len((await engine.generate(PROMPT, ask())).token_ids) == 6


async def test_closing_fails_what_is_in_flight_or_waits_and_whatever_comes_later(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine(max_connections=1) as engine:
        server.script = [server.hang]
        asked = [asyncio.ensure_future(engine.generate(PROMPT, ask())) for _ in range(2)]
        await server.first_asked(1)
        await engine.close()
        for one in asked:
            with pytest.raises(EngineError, match="was closed while"):
                await one
        with pytest.raises(EngineError, match="is closed; make a new one"):
            await engine.generate(PROMPT, ask())
        await engine.close()


def test_an_engine_serves_one_event_loop(openai_engine: Any) -> None:
    engine = openai_engine("http://127.0.0.1:1/v1", retries=0)

    async def here() -> None:
        with pytest.raises(EngineError, match="failed in 1 attempt"):
            await engine.generate(PROMPT, ask())

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await engine.generate(PROMPT, ask())
        await engine.close()

    asyncio.run(here())
    asyncio.run(elsewhere())
