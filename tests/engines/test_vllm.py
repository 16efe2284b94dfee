"""Real vLLM, loaded once; what needs none of it is in test_vllm_engine.py."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from reference import expected_logprobs
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from agentrl.engine import Adapter, Sampling
from agentrl.engines import vllm_adapters
from agentrl.engines.vllm import VLLMEngine, VLLMSettings
from agentrl.errors import BadConfig, EngineError, UserError, WrongWeights
from agentrl.types import Completion, IntArray

T = TypeVar("T")
Await = Callable[[Coroutine[Any, Any, T]], T]

pytestmark = [
    pytest.mark.vllm,
    # vLLM's own, of this process' half of it.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
    ),
]

WORDS, EOS = 320, 2
RANK = 4


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """vLLM's client belongs to one event loop."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that next tokens depend on all that came before."""
    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)
    folder = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(checkpoint: Path) -> VLLMSettings:
    return VLLMSettings(
        model=checkpoint,
        context=512,
        max_sequences=32,
        max_lora_rank=RANK,
        dtype="float32",
        args={"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20},
    )


@pytest.fixture(scope="module")
def notes() -> list[str]:
    """What the engine said to people."""
    return []


@pytest.fixture(scope="module")
def shared(loop: asyncio.Runner, settings: VLLMSettings, notes: list[str]) -> Iterator[VLLMEngine]:
    before = os.sched_getaffinity(0), torch.get_num_threads(), dict(os.environ)
    engine = loop.run(VLLMEngine.start(settings, on_note=notes.append))
    assert (os.sched_getaffinity(0), torch.get_num_threads(), dict(os.environ)) == before
    home = engine._versions.home
    assert home.is_dir()
    yield engine
    loop.run(engine.close())
    loop.run(engine.close())
    assert not home.exists()
    assert not vllm_processes()


@pytest.fixture
def engine(loop: asyncio.Runner, shared: VLLMEngine) -> VLLMEngine:
    """The engine, with the bare base."""
    loop.run(shared.load(None, 0))
    shared.take_figures()
    return shared


def vllm_processes() -> list[psutil.Process]:
    """vLLM's processes below this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "VLLM" in " ".join(child.cmdline())]


def words(count: int, *, seed: int = 0, below: int = WORDS) -> IntArray:
    return np.random.default_rng([seed, count]).integers(3, below, count, dtype=np.int32)


def sampling(tokens: int = 8, *, seed: int = 0, **settings: Any) -> Sampling:
    return Sampling(max_tokens=tokens, seed=seed, **settings)


def adapted(checkpoint: Path, *, seed: int, scale: float = 0.1) -> tuple[Any, Adapter]:
    """A PEFT model with random weights in every matrix, and its adapter."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = peft.get_peft_model(model, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=scale)
    tensors = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    return model, Adapter(model.peft_config["default"].to_dict(), tensors)


def one_step_on(adapter: Adapter) -> Adapter:
    """What one small optimizer step makes of ``adapter``."""
    return Adapter(adapter.config, {name: value + 1e-5 for name, value in adapter.tensors.items()})


def plain(checkpoint: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32
    )
    return loaded.eval()


def check(model: Any, prompt: IntArray, completion: Completion, *, temperature: float = 1.0) -> None:
    expected = expected_logprobs(model, prompt, completion.token_ids, temperature=temperature)
    assert completion.logprobs == pytest.approx(expected, abs=1e-3)


@contextmanager
def swapping(engine: VLLMEngine, how: Any) -> Iterator[None]:
    """The engine with another way of swapping: a second one would take another minute to start."""
    before = engine._settings
    engine._settings = replace(before, swap=how)
    yield
    engine._settings = before


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)


def saying(engine: VLLMEngine) -> int:
    """Requests that vLLM is working on."""
    llm: Any = engine._core
    return int(llm._llm.output_processor.get_num_unfinished_requests())


# -- numbers --


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path, temperature: float
) -> None:
    prompts = [words(20 + seed, seed=seed) for seed in range(4)]

    async def main() -> list[Completion]:
        asked = (engine.generate(p, sampling(24, seed=3, temperature=temperature)) for p in prompts)
        return await asyncio.gather(*asked)

    model = plain(checkpoint)
    for prompt, completion in zip(prompts, loop.run(main()), strict=True):
        assert len(completion.token_ids) == 24
        check(model, prompt, completion, temperature=temperature or 1.0)


def test_a_greedy_request_takes_the_likeliest_token(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    prompt = words(30)
    said = loop.run(engine.generate(prompt, sampling(12, temperature=0.0))).token_ids
    whole = torch.from_numpy(np.concatenate([prompt, said])).long()[None]
    logits = plain(checkpoint)(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    assert said.tolist() == logits.argmax(-1).tolist()


def test_a_greedy_request_beside_sampled_ones_reports_its_logprobs_at_temperature_1(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    prompt = words(16)

    async def main() -> list[Completion]:
        return await asyncio.gather(
            engine.generate(prompt, sampling(16, temperature=0.0)),
            engine.generate(prompt, sampling(16, seed=1, temperature=0.5)),
        )

    greedy, sampled = loop.run(main())
    check(plain(checkpoint), prompt, greedy)
    check(plain(checkpoint), prompt, sampled, temperature=0.5)


def test_scores_are_the_models_logprobs_with_and_without_an_adapter(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    tokens = words(60)
    model, adapter = adapted(checkpoint, seed=1)
    scored = loop.run(engine.score(tokens, 1.0))
    assert scored[0] == 0
    assert scored[1:] == pytest.approx(expected_logprobs(plain(checkpoint), tokens[:1], tokens[1:]), abs=1e-3)
    loop.run(engine.load(adapter, 1))
    assert loop.run(engine.score(tokens, 0.0))[1:] == pytest.approx(
        expected_logprobs(model, tokens[:1], tokens[1:]), abs=1e-3
    )


def test_an_adapter_is_served_as_peft_computes_it(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    model, adapter = adapted(checkpoint, seed=2)
    prompt = words(40)
    loop.run(engine.load(adapter, 7))
    completion = loop.run(engine.generate(prompt, sampling(40)))
    check(model, prompt, completion)
    assert completion.versions.tolist() == [7] * 40
    assert engine.version == 7
    off = np.abs(expected_logprobs(plain(checkpoint), prompt, completion.token_ids) - completion.logprobs)
    assert off.mean() > 0.1  # else this test could not tell the adapter from none


# -- requests --


def test_a_seed_gives_the_same_tokens_again_and_another_gives_others(
    loop: asyncio.Runner, engine: VLLMEngine
) -> None:
    async def main() -> list[list[int]]:
        seeds = (5, 5, 6, (1 << 64) - 1)
        asked = (engine.generate(words(10), sampling(20, seed=seed)) for seed in seeds)
        return [completion.token_ids.tolist() for completion in await asyncio.gather(*asked)]

    first, again, other, largest = loop.run(main())
    assert first == again
    assert first != other != largest


def test_more_prompts_than_fit_into_one_batch_wait_and_keep_their_seeds(
    loop: asyncio.Runner, engine: VLLMEngine
) -> None:
    prompts = [words(150, seed=100 + place) for place in range(16)]  # vLLM takes 2,048 tokens at once

    async def main() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(prompt, sampling(8, seed=5)) for prompt in prompts))

    together = loop.run(main())
    alone = loop.run(engine.generate(prompts[-1], sampling(8, seed=5)))
    assert together[-1].token_ids.tolist() == alone.token_ids.tolist()
    assert [len(completion.token_ids) for completion in together] == [8] * 16


def test_only_the_given_stop_tokens_end_a_completion_and_the_one_said_is_its_last(
    loop: asyncio.Runner, engine: VLLMEngine
) -> None:
    endless = loop.run(engine.generate(words(12), sampling(400, seed=1)))
    assert (endless.finish, len(endless.token_ids)) == ("length", 400)
    stop = int(endless.token_ids[5])
    first = endless.token_ids.tolist().index(stop)
    stopped = loop.run(engine.generate(words(12), sampling(400, seed=1, stop_token_ids=(stop,))))
    assert stopped.finish == "stop"
    assert stopped.token_ids.tolist() == endless.token_ids[: first + 1].tolist()
    assert stopped.logprobs == pytest.approx(endless.logprobs[: first + 1], abs=1e-4)


def test_the_models_own_end_of_text_ends_nothing(loop: asyncio.Runner, engine: VLLMEngine) -> None:
    async def main() -> list[Completion]:
        asked = (engine.generate(words(12), sampling(300, seed=seed, temperature=2.0)) for seed in range(8))
        return await asyncio.gather(*asked)

    said = loop.run(main())
    assert any(EOS in completion.token_ids[:-1] for completion in said)
    assert {completion.finish for completion in said} == {"length"}


def test_a_cancelled_request_is_aborted_in_vllm(loop: asyncio.Runner, engine: VLLMEngine) -> None:
    async def main() -> Completion:
        asked = asyncio.ensure_future(engine.generate(words(10), sampling(450)))
        await until(lambda: saying(engine))
        asked.cancel()
        await asyncio.wait({asked})
        assert asked.cancelled()
        assert not saying(engine)
        return await engine.generate(words(10), sampling(4))

    assert len(loop.run(main()).token_ids) == 4


def test_a_second_turn_finds_the_first_in_the_prefix_cache(loop: asyncio.Runner, engine: VLLMEngine) -> None:
    opening = words(100, seed=9)
    said = loop.run(engine.generate(opening, sampling(60, seed=2))).token_ids
    first = engine.take_figures()
    assert first["rollout/prefill_tokens"] == 100
    assert (first["rollout/reused_tokens"], first["rollout/decode_tokens"]) == (0, 59)
    loop.run(engine.generate(np.concatenate([opening, said, words(20)]), sampling(4)))
    second = engine.take_figures()
    assert second["rollout/reused_tokens"] == 128  # whole blocks of the 160 tokens that were there
    assert second["engine/restarts"] == 0


def test_what_vllm_can_not_take_is_refused_with_the_next_step(
    loop: asyncio.Runner, engine: VLLMEngine
) -> None:
    for prompt, settings, message in (
        (words(0), sampling(), "the prompt is empty"),
        (words(510), sampling(8), "lower rollout.max_turn_tokens"),
        (np.array([WORDS], np.int32), sampling(), "use the tokenizer that belongs to the model"),
        (words(5), sampling(temperature=3.0), "change rollout.temperature"),
        (words(5), sampling(temperature=0.001), "change rollout.temperature"),
    ):
        with pytest.raises(UserError, match=message):
            loop.run(engine.generate(prompt, settings))
    with pytest.raises(UserError, match="score with the learner"):
        loop.run(engine.score(words(5), 0.7))
    assert len(loop.run(engine.generate(words(5), sampling(3))).token_ids) == 3


# -- new weights --


def test_requests_in_flight_finish_under_the_version_that_they_began_with(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    old_model, old = adapted(checkpoint, seed=3)
    new_model, new = adapted(checkpoint, seed=4)
    prompt = words(24)

    async def main() -> tuple[Completion, Completion]:
        await engine.load(old, 1)
        folder = engine._current.published.folder  # type: ignore[union-attr]
        early = asyncio.ensure_future(engine.generate(prompt, sampling(400)))
        await until(lambda: saying(engine))
        await engine.load(new, 2)
        assert not early.done()
        assert folder.is_dir()
        late = await engine.generate(prompt, sampling(30))
        said = await early
        await until(lambda: not folder.exists())
        return said, late

    early, late = loop.run(main())
    assert set(early.versions.tolist()) == {1}
    assert set(late.versions.tolist()) == {2}
    check(old_model, prompt, early)
    check(new_model, prompt, late)


def test_requests_in_flight_go_on_under_the_new_version_where_that_is_wanted(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    models, adapters = zip(*(adapted(checkpoint, seed=seed) for seed in (5, 6)), strict=True)
    prompts = [words(24, seed=seed) for seed in range(3)]

    async def main() -> list[Completion]:
        await engine.load(adapters[0], 1)
        asked = [asyncio.ensure_future(engine.generate(prompt, sampling(420))) for prompt in prompts]
        await until(lambda: saying(engine) == 3)
        await asyncio.sleep(0.5)
        await engine.load(adapters[1], 2)
        assert not any(one.done() for one in asked)
        return await asyncio.gather(*asked)

    with swapping(engine, "continue"):
        said = loop.run(main())
    for prompt, completion in zip(prompts, said, strict=True):
        assert (completion.finish, len(completion.token_ids)) == ("length", 420)
        before = int((completion.versions == 1).sum())
        assert 0 < before < 420
        assert completion.versions.tolist() == [1] * before + [2] * (420 - before)
        for model, part in zip(models, (slice(0, before), slice(before, None)), strict=True):
            expected = expected_logprobs(model, prompt, completion.token_ids)[part]
            assert completion.logprobs[part] == pytest.approx(expected, abs=1e-3)


def test_the_same_version_loaded_twice_is_answered_from_no_old_cache(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    prompt = words(100)
    for seed in (7, 8):
        model, adapter = adapted(checkpoint, seed=seed)
        loop.run(engine.load(adapter, 1))
        check(model, prompt, loop.run(engine.generate(prompt, sampling(6))))


@pytest.mark.parametrize("stale", ["far off", "one step old"])
def test_an_adapter_that_is_not_what_was_published_stops_the_run_and_names_the_version(
    loop: asyncio.Runner,
    engine: VLLMEngine,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    stale: str,
) -> None:
    _, old = adapted(checkpoint, seed=10)
    new = one_step_on(old) if stale == "one step old" else adapted(checkpoint, seed=11)[1]
    loop.run(engine.load(old, 3))
    write = vllm_adapters.write_adapter
    monkeypatch.setattr(vllm_adapters, "write_adapter", lambda folder, adapter: write(folder, old))
    with pytest.raises(WrongWeights, match="given version 4 of the adapter, and it serves version 3"):
        loop.run(engine.load(new, 4))
    assert engine.version == 3  # and goes on as before, for whoever wants to look
    monkeypatch.undo()
    loop.run(engine.load(new, 4))
    assert engine.version == 4


def test_an_adapter_that_nobody_published_is_called_none_of_the_versions(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, given = adapted(checkpoint, seed=12)
    _, other = adapted(checkpoint, seed=13)
    write = vllm_adapters.write_adapter
    monkeypatch.setattr(vllm_adapters, "write_adapter", lambda folder, adapter: write(folder, other))
    with pytest.raises(WrongWeights, match=r"none of the versions.*28 of the 28 matrices"):
        loop.run(engine.load(given, 1))


def test_what_vllms_lora_does_not_serve_is_refused_by_the_key_that_sets_it(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    _, adapter = adapted(checkpoint, seed=1)
    for change, message in (
        ({"modules_to_save": ["norm"]}, "lora.train_norms"),
        ({"r": 64}, "rank is 64"),
        ({"use_dora": True}, "DoRA"),
    ):
        with pytest.raises(BadConfig, match=message):
            loop.run(engine.load(Adapter({**adapter.config, **change}, adapter.tensors), 1))
    assert len(loop.run(engine.generate(words(5), sampling(3))).token_ids) == 3


# -- the end of its processes --


def test_a_core_that_is_killed_in_flight_comes_back_with_the_adapter(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path, notes: list[str]
) -> None:
    model, adapter = adapted(checkpoint, seed=20)
    prompt = words(30)

    async def main() -> Completion:
        await engine.load(adapter, 5)
        before = vllm_processes()
        (core,) = [child for child in before if child.ppid() == os.getpid()]
        asked = [asyncio.ensure_future(engine.generate(prompt, sampling(450, seed=s))) for s in range(4)]
        await until(lambda: saying(engine) == 4)
        core.send_signal(signal.SIGKILL)
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(end).__mro__[1] for end in ends] == [EngineError] * 4
        said = await engine.generate(prompt, sampling(20))
        assert not [old for old in before if old.is_running() and old.status() != psutil.STATUS_DEAD]
        return said

    completion = loop.run(main())
    check(model, prompt, completion)
    assert set(completion.versions.tolist()) == {5}
    assert engine.take_figures()["engine/restarts"] == 1
    assert notes == ["vLLM's core died and is started again, with version 5"]


def test_an_interrupt_in_the_terminal_ends_none_of_its_processes(
    loop: asyncio.Runner, engine: VLLMEngine
) -> None:
    for child in vllm_processes():
        child.send_signal(signal.SIGINT)
    assert len(loop.run(engine.generate(words(5), sampling(40))).token_ids) == 40
    assert engine.take_figures()["engine/restarts"] == 0


# -- a real model --


def test_a_real_models_logprobs_agree_over_a_thousand_tokens_under_an_adapter(loop: asyncio.Runner) -> None:
    folder = os.environ.get("AGENTRL_GEMMA")
    if folder is None:
        pytest.skip("AGENTRL_GEMMA names no folder")
    settings = VLLMSettings(
        model=folder,
        context=256,
        max_sequences=32,
        max_lora_rank=RANK,
        dtype="float32",
        args={"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30},
    )
    model, adapter = adapted(Path(folder), seed=0, scale=0.01)
    prompts = [words(24, seed=seed, below=20000) for seed in range(26)]

    async def main() -> list[Completion]:
        engine = await VLLMEngine.start(settings)
        try:
            await engine.load(adapter, 1)
            return await asyncio.gather(*(engine.generate(p, sampling(40)) for p in prompts))
        finally:
            await engine.close()

    off = [
        np.abs(expected_logprobs(model, prompt, completion.token_ids) - completion.logprobs)
        for prompt, completion in zip(prompts, loop.run(main()), strict=True)
    ]
    assert sum(map(len, off)) >= 1000
    print(np.concatenate(off).mean(), np.concatenate(off).max())
    assert np.concatenate(off).mean() < 1e-3
