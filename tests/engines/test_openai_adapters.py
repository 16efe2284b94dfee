"""Adapters of a server: a name for each version, what is in flight during a swap, and what fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agentrl.engine import Adapter, Sampling
from agentrl.errors import EngineError, UserError
from agentrl.types import Completion

PROMPT = np.array([5, 6, 7], np.int32)


def ask(**changes: Any) -> Sampling:
    return Sampling(**{"max_tokens": 6, "seed": 3} | changes)


def adapter(value: float = 1.0) -> Adapter:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return Adapter(config, {"model.q_proj.lora_A.weight": torch.full((2, 3), value)})


async def versions_of(asked: Awaitable[Completion]) -> set[int]:
    return set((await asked).versions.tolist())


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*/*"))


async def test_each_version_is_loaded_under_its_own_name_and_the_one_before_it_unloaded(
    vllm_server: Any, tmp_path: Path
) -> None:
    async with vllm_server() as server:
        async with server.engine(adapter_dir=tmp_path) as engine:
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
            assert server.asked_versions == ["base", "v1", "v2"]
        assert server.events == ["load v1", "load v2", "unload v1", "unload v2"]
        assert not list(tmp_path.iterdir())


async def test_the_same_version_twice_has_two_names(vllm_server: Any, tmp_path: Path) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path) as engine:
        await engine.load(adapter(1.0), 1)
        await engine.load(adapter(2.0), 1)
        await engine.generate(PROMPT, ask())
        assert [*server.adapters] == [server.asked[0]["model"]]
        assert server.events == ["load v1", "load v1", "unload v1"]


async def test_the_bare_base_is_served_again_after_an_adapter(vllm_server: Any, tmp_path: Path) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path) as engine:
        await engine.load(adapter(), 1)
        await engine.load(None, 2)
        assert await versions_of(engine.generate(PROMPT, ask())) == {2}
        assert server.asked[0]["model"] == "base"
        assert not server.adapters


async def test_requests_in_flight_end_under_their_version_which_is_unloaded_after_them(
    vllm_server: Any, tmp_path: Path
) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path) as engine:
        await engine.load(adapter(1.0), 1)
        released, wait = server.gate()
        failed, fail = server.gate(server.refusal(500, "oops"))
        # The second is tried again after the swap, and asks for the version that it began with.
        server.script = [wait, fail]
        asked = [asyncio.ensure_future(engine.generate(PROMPT, ask(seed=seed))) for seed in range(2)]
        await server.first_asked(2)
        await engine.load(adapter(2.0), 2)
        assert await versions_of(engine.generate(PROMPT, ask())) == {2}
        assert server.events == ["load v1", "load v2"]
        released.set()
        failed.set()
        assert [await versions_of(one) for one in asked] == [{1}, {1}]
        assert server.asked_versions == ["v1", "v1", "v2", "v1"]
        while len(server.adapters) > 1:
            await asyncio.sleep(0.001)
        assert server.events == ["load v1", "load v2", "unload v1"]


async def test_a_swap_does_not_wait_behind_queued_requests(vllm_server: Any, tmp_path: Path) -> None:
    async with (
        vllm_server() as server,
        server.engine(adapter_dir=tmp_path, max_connections=1) as engine,
    ):
        released, wait = server.gate()
        server.script = [wait]
        asked = [asyncio.ensure_future(engine.generate(PROMPT, ask())) for _ in range(3)]
        await server.first_asked(1)
        await engine.load(adapter(), 1)
        assert server.events == ["load v1"]
        released.set()
        assert [await versions_of(one) for one in asked] == [{0}] * 3


@pytest.mark.parametrize("lost", [ConnectionResetError, (500, "oops", {})])
async def test_a_load_whose_reply_was_lost_is_made_again_and_counts_once(
    vllm_server: Any, lost: Any, tmp_path: Path
) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path) as engine:
        server.adapter_script = [lost, server.refusal(400, "The lora adapter 'x' has already been loaded.")]
        await engine.load(adapter(), 1)
        assert not server.adapter_script


async def test_a_failed_load_leaves_what_was_served_and_is_forgotten_at_the_next(
    vllm_server: Any, tmp_path: Path
) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path, retries=1) as engine:
        await engine.load(adapter(1.0), 1)
        server.adapter_script = [server.refusal(500, "no room for it")] * 2
        with pytest.raises(EngineError, match="no room for it"):
            await engine.load(adapter(2.0), 2)
        assert await versions_of(engine.generate(PROMPT, ask())) == {1}
        await engine.load(adapter(3.0), 3)
        assert await versions_of(engine.generate(PROMPT, ask())) == {3}
        assert folders(tmp_path) == [*server.adapters]


async def test_an_unload_that_fails_is_tried_again_at_the_next_load_which_says_why(
    vllm_server: Any, tmp_path: Path
) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path, retries=0) as engine:
        await engine.load(adapter(), 1)
        server.adapter_script = [(200, "Success", {}), server.refusal(500, "it hiccups")]
        await engine.load(adapter(), 2)
        server.adapter_script = [server.refusal(500, "it is broken")]
        with pytest.raises(EngineError, match="it is broken"):
            await engine.load(adapter(), 3)
        await engine.load(adapter(), 3)
        assert server.events == ["load v1", "unload v1", "load v3"]


async def test_what_the_server_evicted_itself_counts_as_unloaded(vllm_server: Any, tmp_path: Path) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path, retries=0) as engine:
        await engine.load(adapter(), 1)
        (first,) = server.adapters
        evicted = f"Failed to remove lora adapter '{first}' from the engine."
        server.adapter_script = [(200, "Success", {}), server.refusal(500, evicted)]
        await engine.load(adapter(), 2)
        assert first not in folders(tmp_path)
        await engine.load(adapter(), 3)


async def test_a_server_that_was_restarted_gets_the_adapter_again(vllm_server: Any, tmp_path: Path) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path) as engine:
        await engine.load(adapter(), 1)
        server.adapters.clear()
        asked = [engine.generate(PROMPT, ask(seed=seed)) for seed in range(3)]
        assert [set(one.versions.tolist()) for one in await asyncio.gather(*asked)] == [{1}] * 3
        assert server.events == ["load v1", "load v1"]


async def test_a_server_that_forgets_an_adapter_whenever_it_gets_it_is_the_worlds_fault(
    vllm_server: Any, tmp_path: Path
) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path) as engine:
        await engine.load(adapter(), 1)

        async def forget(body: dict[str, Any]) -> Any:
            server.adapters.clear()
            return server.sampled(body)

        server.script = [forget] * 2
        assert await versions_of(engine.generate(PROMPT, ask())) == {1}
        server.script = [forget] * 9
        with pytest.raises(
            EngineError, match="does not exist.*given that adapter 3 times during one request"
        ):
            await engine.generate(PROMPT, ask())
        assert len(server.asked) == 3 + 4


async def test_a_server_without_run_time_adapters_is_told_how_to_start(
    vllm_server: Any, tmp_path: Path
) -> None:
    async with (
        vllm_server(lets_adapters_in=False) as server,
        server.engine(adapter_dir=tmp_path) as engine,
    ):
        with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1") as refused:
            await engine.load(adapter(), 1)
        assert "status 404: Not Found" in str(refused.value)


async def test_an_adapter_without_a_folder_to_write_it_to_is_refused(vllm_server: Any) -> None:
    async with vllm_server() as server, server.engine() as engine:
        with pytest.raises(UserError, match="there is no adapter_dir"):
            await engine.load(adapter(), 1)


async def test_closing_does_not_need_a_server_that_still_answers(vllm_server: Any, tmp_path: Path) -> None:
    async with vllm_server() as server, server.engine(adapter_dir=tmp_path, retries=0) as engine:
        await engine.load(adapter(), 1)
        server.adapter_script = [server.refusal(500, "it died")]
        await engine.close()
        assert not list(tmp_path.iterdir())
