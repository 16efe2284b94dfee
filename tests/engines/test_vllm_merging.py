"""Real vLLM whose weights are replaced: on a CPU with a file in between, on a GPU the way that it is used."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from reference import expected_logprobs
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from vllm_on_cpu import allow_merging

from agentrl.config import LoraConfig
from agentrl.engine import Adapter, Sampling
from agentrl.engines import vllm_core
from agentrl.engines.vllm import VLLMEngine, VLLMSettings
from agentrl.errors import BadConfig, WrongWeights
from agentrl.learner import adapt
from agentrl.models import default_device, load_model
from agentrl.types import Completion, IntArray

pytestmark = [
    pytest.mark.vllm,
    # vLLM's own, of this process' half of it.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
    ),
]

WORDS = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """vLLM's client belongs to one event loop."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; one architecture whose fused layers have biases, one with tied embeddings and norms
    that add one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if request.param == "qwen2":
            model: Any = Qwen2ForCausalLM(Qwen2Config(**_SHAPE, tie_word_embeddings=False))
        else:
            model = Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE, head_dim=32, query_pre_attn_scalar=32))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.data.mul_(6)
            elif "bias" in name:
                torch.nn.init.normal_(parameter.data)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["file", pytest.param("ipc", marks=pytest.mark.gpu)])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """How weights get to vLLM."""
    if request.param == "ipc":
        yield "ipc"
        return
    if torch.cuda.is_available():
        pytest.skip("this vLLM has a GPU, where weights go another way")
    with pytest.MonkeyPatch.context() as patches:
        allow_merging(patches, tmp_path_factory.mktemp("transfer"))
        yield "file"


@pytest.fixture(scope="module")
def shared(loop: asyncio.Runner, checkpoint: Path, way: str) -> Iterator[VLLMEngine]:
    settings = VLLMSettings(
        model=checkpoint,
        context=512,
        max_sequences=32,
        max_lora_rank=4,
        dtype="float32",
        merge=True,
        args={"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20},
    )
    base = load_model(checkpoint, dtype="float32", device=default_device())
    engine = loop.run(VLLMEngine.start(settings, base=dict(base.named_parameters())))
    yield engine
    loop.run(engine.close())


@pytest.fixture
def engine(loop: asyncio.Runner, shared: VLLMEngine) -> VLLMEngine:
    """The engine, with the bare base."""
    loop.run(shared.load(None, 0))
    shared.take_figures()
    return shared


def words(count: int, *, seed: int = 0) -> IntArray:
    return np.random.default_rng([seed, count]).integers(3, WORDS, count, dtype=np.int32)


def sampling(tokens: int = 8, *, seed: int = 0) -> Sampling:
    return Sampling(max_tokens=tokens, seed=seed)


def plain(checkpoint: Path) -> Any:
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


def adapted(checkpoint: Path, *, seed: int, **lora: Any) -> tuple[Any, Adapter]:
    """A PEFT model with random values in all that is trained, and its adapter."""
    import peft

    policy = adapt(plain(checkpoint).requires_grad_(False), LoraConfig(r=4, **lora), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = {name: value.clone() for name, value in peft.get_peft_model_state_dict(policy).items()}
    return policy.eval(), Adapter(policy.peft_config["default"].to_dict(), tensors)


def check(model: Any, prompt: IntArray, said: Completion, *, of: slice = slice(None)) -> None:
    expected = expected_logprobs(model, prompt, said.token_ids)
    assert said.logprobs[of] == pytest.approx(expected[of], abs=2e-3)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)


def saying(engine: VLLMEngine) -> int:
    """Requests that vLLM is working on."""
    llm: Any = engine._core
    return int(llm._llm.output_processor.get_num_unfinished_requests())


@pytest.mark.parametrize(
    "lora",
    [{}, {"train_norms": True}, {"target_modules": ("k_proj", "down_proj")}],
    ids=["all linear layers", "norms too", "a part of a fused layer"],
)
def test_a_merged_version_is_served_as_peft_computes_the_adapter(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path, lora: dict[str, Any]
) -> None:
    model, adapter = adapted(checkpoint, seed=1, **lora)
    prompt = words(40)
    loop.run(engine.load(adapter, 7))
    said = loop.run(engine.generate(prompt, sampling(40)))
    check(model, prompt, said)
    assert said.versions.tolist() == [7] * 40
    scored = loop.run(engine.score(prompt, 1.0))[1:]
    assert scored == pytest.approx(expected_logprobs(model, prompt[:1], prompt[1:]), abs=2e-3)
    bare = expected_logprobs(plain(checkpoint), prompt, said.token_ids)
    assert np.abs(bare - said.logprobs).mean() > 0.02  # else this could not tell the version from the base
    loop.run(engine.load(None, 8))
    check(plain(checkpoint), prompt, loop.run(engine.generate(prompt, sampling(40))))


def test_nothing_is_answered_from_keys_and_values_of_other_weights(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    prompt = words(100)
    for seed in (2, 3):
        model, adapter = adapted(checkpoint, seed=seed)
        loop.run(engine.load(adapter, 1))
        check(model, prompt, loop.run(engine.generate(prompt, sampling(6))))
        assert engine.take_figures()["rollout/reused_tokens"] == 0
        loop.run(engine.generate(prompt, sampling(6)))
        assert engine.take_figures()["rollout/reused_tokens"] > 0


def test_a_load_waits_for_the_requests_of_the_version_before(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    (old_model, old), (new_model, new) = (adapted(checkpoint, seed=seed) for seed in (4, 5))
    prompt = words(24)

    async def main() -> tuple[Completion, Completion]:
        await engine.load(old, 1)
        early = asyncio.ensure_future(engine.generate(prompt, sampling(300)))
        await until(lambda: saying(engine))
        await engine.load(new, 2)
        assert early.done()
        return await early, await engine.generate(prompt, sampling(30))

    early, late = loop.run(main())
    assert set(early.versions.tolist()) == {1}
    assert set(late.versions.tolist()) == {2}
    check(old_model, prompt, early)
    check(new_model, prompt, late)


def test_requests_go_on_under_the_new_weights_where_that_is_wanted(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, adapters = zip(*(adapted(checkpoint, seed=seed) for seed in (6, 7)), strict=True)
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, swap="continue"))
    prompt = words(24)

    async def main() -> Completion:
        await engine.load(adapters[0], 1)
        asked = asyncio.ensure_future(engine.generate(prompt, sampling(420)))
        await until(lambda: saying(engine))
        await asyncio.sleep(0.3)
        await engine.load(adapters[1], 2)
        assert not asked.done()
        return await asked

    said = loop.run(main())
    before = int((said.versions == 1).sum())
    assert 0 < before < 420
    check(models[0], prompt, said, of=slice(0, before))
    check(models[1], prompt, said, of=slice(before, None))


def test_weights_that_did_not_arrive_are_found_and_the_version_before_is_served_by_another_core(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, old), (_, new) = (adapted(checkpoint, seed=seed) for seed in (8, 9))
    loop.run(engine.load(old, 3))

    def send_nothing(llm: Any, weights: Any, *, ask: Any) -> None:
        for name in weights.shapes:
            weights.make(name)

    with monkeypatch.context() as patches:
        patches.setattr(vllm_core, "send", send_nothing)
        with pytest.raises(WrongWeights, match="given version 4 of the adapter, and it serves version 3"):
            loop.run(engine.load(new, 4))
    prompt = words(30)
    said = loop.run(engine.generate(prompt, sampling(10)))
    check(model, prompt, said)
    assert said.versions.tolist() == [3] * 10


def test_weights_that_vllm_refuses_leave_no_mixture_behind(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = adapted(checkpoint, seed=10)
    loop.run(engine.load(adapter, 1))
    send = vllm_core.send

    def send_misnamed(llm: Any, weights: Any, *, ask: Any) -> None:
        shapes = {name.replace("layers.1", "layers.9"): shape for name, shape in weights.shapes.items()}
        back = {name.replace("layers.1", "layers.9"): name for name in weights.shapes}
        send(llm, replace(weights, shapes=shapes, make=lambda name: weights.make(back[name])), ask=ask)

    with monkeypatch.context() as patches:
        patches.setattr(vllm_core, "send", send_misnamed)
        with pytest.raises(BadConfig, match="vLLM refused the merged weights"):
            loop.run(engine.load(adapted(checkpoint, seed=11)[1], 2))
    prompt = words(30)
    said = loop.run(engine.generate(prompt, sampling(10)))
    check(model, prompt, said)
    assert said.versions.tolist() == [1] * 10


def test_a_core_that_is_killed_comes_back_with_the_merged_weights(
    loop: asyncio.Runner, engine: VLLMEngine, checkpoint: Path
) -> None:
    model, adapter = adapted(checkpoint, seed=12)
    prompt = words(30)

    async def main() -> Completion:
        await engine.load(adapter, 5)
        children = psutil.Process().children()
        (core,) = [child for child in children if "VLLM" in " ".join(child.cmdline())]
        core.send_signal(signal.SIGKILL)
        await until(lambda: engine._core is None or engine._core.dead)
        return await engine.generate(prompt, sampling(20))

    said = loop.run(main())
    check(model, prompt, said)
    assert set(said.versions.tolist()) == {5}
    assert engine.take_figures()["engine/restarts"] == 1
