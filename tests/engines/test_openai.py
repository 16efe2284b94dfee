"""Completions and scores of a server, as it sampled them; and which servers are refused, for what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentrl.engine import Sampling
from agentrl.errors import BadConfig, UserError

PROMPT = np.array([5, 6, 7], np.int32)


def ask(**changes: Any) -> Sampling:
    return Sampling(**{"max_tokens": 6, "seed": 3} | changes)


async def test_what_the_server_sampled_comes_back_id_for_id_with_its_logprobs(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine(training=True) as engine:
        completion = await engine.generate(PROMPT, ask(temperature=0.5))
        choice = server.sample(server.asked[0])
        assert completion.token_ids.tolist() == choice["token_ids"]
        assert np.allclose(completion.logprobs, choice["logprobs"]["token_logprobs"])
        assert completion.versions.tolist() == [0] * 6
        assert completion.finish == "length"
        assert np.isfinite(completion.logprobs).all()


async def test_every_sampling_setting_is_said_and_the_servers_defaults_are_overruled(
    vllm_server: Any,
) -> None:
    async with vllm_server() as server, server.engine(training=True) as engine:
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


async def test_seeds_of_64_bits_fit_the_servers_signed_ones_and_stay_distinct(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine() as engine:
        for seed in (0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            await engine.generate(PROMPT, ask(seed=seed))
        assert [body["seed"] for body in server.asked] == [0, (1 << 63) - 1, -(1 << 63), -1]


async def test_a_stop_token_ends_a_completion_and_is_its_last_id(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine(training=True) as engine:
        completion = await engine.generate(PROMPT, ask(max_tokens=500, stop_token_ids=(122,)))
        assert completion.finish == "stop"
        assert completion.token_ids[-1] == 122


async def test_the_plain_dialect_sends_openais_own_fields_alone_and_tokenises_the_text_again(
    vllm_server: Any,
) -> None:
    async with vllm_server() as server, server.engine(dialect="openai") as engine:
        completion = await engine.generate(PROMPT, ask())
        assert set(server.asked[0]) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
        assert completion.token_ids.tolist() == [*map(ord, server.sample(server.asked[0])["text"])]
        assert np.isnan(completion.logprobs).all()
        assert np.isnan(completion.logprobs).all()  # text that was tokenised again
        with pytest.raises(UserError, match="top_k is 5"):
            await engine.generate(PROMPT, ask(top_k=5))


async def test_a_server_that_ignores_return_token_ids_serves_evaluation_and_is_marked_unfit(
    vllm_server: Any,
) -> None:
    async with vllm_server() as server, server.engine() as engine:
        silent = server.sampled({"model": "base", "prompt": [5, 6, 7], "max_tokens": 3} | SEEDED)
        server.script = [silent]
        completion = await engine.generate(PROMPT, ask())
        assert completion.token_ids.tolist() == [*map(ord, silent[1]["choices"][0]["text"])]
        assert np.isnan(completion.logprobs).all()  # text that was tokenised again


SEEDED = {"seed": 0, "temperature": 1.0}


async def test_an_empty_prompt_is_refused_before_it_is_sent(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine() as engine:
        with pytest.raises(UserError, match="prompt is empty"):
            await engine.generate(np.zeros(0, np.int32), ask())
        assert not server.asked


# -- scoring --


async def test_a_sequence_is_scored_by_the_prompts_logprobs(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine() as engine:
        for temperature in (0.0, 1.0):
            scored = await engine.score(PROMPT, temperature)
            assert np.allclose(scored, [0, -0.6, -0.7])
        assert server.asked[0]["prompt_logprobs"] == 0
        with pytest.raises(UserError, match=r"temperature 0\.5"):
            await engine.score(PROMPT, 0.5)


# -- start-up --


@pytest.mark.parametrize("training", [True, False])
async def test_a_fitting_server_passes_one_probe(vllm_server: Any, training: bool) -> None:
    async with vllm_server() as server:
        engine = await server.connect(training=training)
        assert len(server.asked) == 1
        await engine.close()


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
async def test_a_server_that_can_not_say_what_it_sampled_is_refused_for_training(
    vllm_server: Any, changes: dict[str, Any], why: str
) -> None:
    async with vllm_server() as server:
        server.script = [server.changed(**changes)]
        with pytest.raises(UserError, match="can't be used for training") as refused:
            await server.connect(training=True)
        assert why in str(refused.value)
        assert "--logprobs-mode processed_logprobs" in str(refused.value)
        assert len(server.asked) == 1


async def test_logprobs_from_before_the_temperature_are_found_out_at_start_up(vllm_server: Any) -> None:
    async with vllm_server(logprobs_mode="raw_logprobs") as server:
        with pytest.raises(UserError, match="not of the distribution after temperature"):
            await server.connect(training=True)


async def test_a_server_that_adds_to_prompts_is_refused_for_evaluation_too(vllm_server: Any) -> None:
    async with vllm_server() as server:
        answer = server.sampled({"model": "base", "prompt": [0] * 8, "max_tokens": 1} | SEEDED)
        server.script = [answer]
        with pytest.raises(UserError, match="8 prompt tokens where 27 were sent"):
            await server.connect()


async def test_a_model_that_is_not_served_is_the_users_to_correct(vllm_server: Any) -> None:
    async with vllm_server() as server:
        with pytest.raises(UserError, match="404: The model `other` does not exist"):
            await server.connect(model="other")


def test_settings_that_can_not_work_are_refused(openai_engine: Any) -> None:
    with pytest.raises(BadConfig, match="can't be trained"):
        openai_engine("http://h/v1", dialect="openai", training=True)
    with pytest.raises(BadConfig, match="adapter_dir has no effect"):
        openai_engine("http://h/v1", dialect="openai", adapter_dir=Path("/a"))
    with pytest.raises(BadConfig, match="must be like http"):
        openai_engine("localhost:8000")
    with pytest.raises(BadConfig, match="user name or a password") as refused:
        openai_engine("http://me:hunter2@h/v1")
    assert "hunter2" not in str(refused.value)
