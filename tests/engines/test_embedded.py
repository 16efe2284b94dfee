from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import peft
import pytest
import torch
from reference import expected_logprobs
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentrl.checkpoint import read_adapter
from agentrl.engine import Adapter, Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.errors import AgentRLError, EngineError, UserError
from agentrl.models import load_model
from agentrl.threads import in_compute_thread
from agentrl.types import Completion, IntArray

pytestmark = pytest.mark.usefixtures("one_thread")

T = TypeVar("T")

WORDS = 61
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, num_hidden_layers=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, num_hidden_layers=2)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            num_key_value_heads=4,
            num_hidden_layers=3,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}
NORMS = ["input_layernorm", "k_norm", "norm", "post_attention_layernorm", "q_norm"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights, large enough that next tokens depend on all that came before."""
    folders: dict[str, Path] = {}
    for name, make in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(8)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture
def qwen3(checkpoints: dict[str, Path]) -> Any:
    return load_model(checkpoints["qwen3"])


def plain(folder: Path) -> Any:
    """The model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def serve(
    model: Any, use: Callable[[EmbeddedEngine], Awaitable[T]], *, rows: int = 8, prefill_tokens: int = 64
) -> T:
    """What ``use`` makes of an engine, which is closed afterwards."""

    async def main() -> T:
        engine = EmbeddedEngine(model, max_sequences=rows, prefill_tokens=prefill_tokens)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def count_tokens(model: Any) -> list[int]:
    """A list that grows by the tokens of each forward pass of engines made from ``model``."""
    tokens: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens.append(kwargs["input_ids"].numel())

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return tokens


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def words(count: int, *, seed: int = 0) -> IntArray:
    return np.random.default_rng([seed, count]).integers(0, WORDS, count, dtype=np.int32)


def sampling(tokens: int = 5, *, seed: int = 0, **settings: Any) -> Sampling:
    return Sampling(max_tokens=tokens, seed=seed, **settings)


def check(model: Any, prompt: IntArray, completion: Completion, *, temperature: float = 1.0) -> None:
    expected = expected_logprobs(model, prompt, completion.token_ids, temperature=temperature)
    assert completion.logprobs == pytest.approx(expected, abs=3e-5)  # float32 logits of 30 are 2e-6 apart


# -- numbers --


@pytest.mark.parametrize("name", MODELS)
def test_several_turns_of_many_conversations_have_the_logprobs_that_transformers_gives(
    checkpoints: dict[str, Path], name: str
) -> None:
    reference, temperature = plain(checkpoints[name]), 1.3

    async def talk(engine: EmbeddedEngine, seed: int) -> None:
        prompt = words((3, 20, 20, 130, 70)[seed % 5], seed=seed // 5)
        for turn in range(3):
            asked = sampling(4 + seed % 3, seed=seed * 100 + turn, temperature=temperature)
            completion = await engine.generate(prompt, asked)
            check(reference, prompt, completion, temperature=temperature)
            whole = np.concatenate([prompt, completion.token_ids])
            scored = await engine.score(whole, temperature)
            assert scored[0] == 0
            assert scored[len(prompt) :] == pytest.approx(completion.logprobs, abs=1e-5)
            await asyncio.sleep(0.002 * (seed % 4))  # a tool
            prompt = np.concatenate([whole, words(1 + seed % 9, seed=turn)])

    async def use(engine: EmbeddedEngine) -> None:
        await asyncio.gather(*(talk(engine, seed) for seed in range(8)))

    serve(load_model(checkpoints[name]), use, rows=5)


def test_a_turn_costs_its_new_tokens_and_a_shared_prompt_is_computed_once(qwen3: Any) -> None:
    tokens = count_tokens(qwen3)

    async def use(engine: EmbeddedEngine) -> None:
        prompt = words(40)
        said = await asyncio.gather(*(engine.generate(prompt, sampling(6, seed=i)) for i in range(4)))
        assert tokens == [40] + 5 * [4]
        tokens.clear()
        turns = [np.concatenate([prompt, each.token_ids, words(3, seed=i)]) for i, each in enumerate(said)]
        await asyncio.gather(*(engine.generate(turn, sampling(1, seed=9)) for turn in turns))
        assert tokens == [4 * (1 + 3)]

    serve(qwen3, use)


def test_more_requests_than_rows_wait_for_their_turn(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    tokens, reference = count_tokens(qwen3), plain(checkpoints["qwen3"])
    prompts = [words(5 + n) for n in range(9)]

    async def use(engine: EmbeddedEngine) -> list[Completion]:
        return await asyncio.gather(
            *(engine.generate(prompt, sampling(3 + n, seed=n)) for n, prompt in enumerate(prompts))
        )

    completions = serve(qwen3, use, rows=2)
    assert sum(tokens) == sum(
        len(p) + len(c.token_ids) - 1 for p, c in zip(prompts, completions, strict=True)
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        check(reference, prompt, completion)


def test_the_same_requests_give_the_same_bits(qwen3: Any) -> None:
    async def use(engine: EmbeddedEngine) -> list[Completion]:
        return await asyncio.gather(
            *(engine.generate(words(5 + n % 3), sampling(9 - n, seed=n)) for n in range(6))
        )

    for one, other in zip(serve(qwen3, use), serve(qwen3, use), strict=True):
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_greedy_tokens_are_scored_at_temperature_one(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        prompt = words(9)
        completion = await engine.generate(prompt, sampling(temperature=0.0))
        check(plain(checkpoints["qwen3"]), prompt, completion)
        scored = await engine.score(np.concatenate([prompt, completion.token_ids]), 0.0)
        assert scored[9:] == pytest.approx(completion.logprobs, abs=1e-5)

    serve(qwen3, use)


def test_one_token_is_scored_as_zero(qwen3: Any) -> None:
    assert serve(qwen3, lambda engine: engine.score(words(1), 1.0)).tolist() == [0.0]


def test_half_precision_is_close_and_finite(checkpoints: dict[str, Path]) -> None:
    async def use(engine: EmbeddedEngine) -> list[Completion]:
        return await asyncio.gather(*(engine.generate(words(n), sampling(30, seed=n)) for n in (1, 140, 30)))

    for completion in serve(load_model(checkpoints["gemma3"], dtype="bfloat16"), use):
        assert np.isfinite(completion.logprobs).all()
        assert completion.logprobs.dtype == np.float32


def test_the_prompt_may_be_changed_by_its_owner_meanwhile(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        prompt = words(12)
        task = asyncio.create_task(engine.generate(prompt, sampling(4)))
        await asyncio.sleep(0)
        prompt[:] = 0
        check(plain(checkpoints["qwen3"]), words(12), await task)

    serve(qwen3, use)


# -- coming and going --


def test_a_late_request_does_not_wait_for_the_others_to_finish(qwen3: Any) -> None:
    tokens = count_tokens(qwen3)

    async def use(engine: EmbeddedEngine) -> None:
        long = asyncio.create_task(engine.generate(words(3), sampling(480)))
        await until(lambda: tokens)
        for seed in range(5):
            await engine.generate(words(4, seed=seed), sampling(2))
            await engine.score(words(5), 1.0)
        assert not long.done()

    serve(qwen3, use)


def test_a_request_that_comes_before_the_thread_begins_is_not_overheard(qwen3: Any) -> None:
    gate = threading.Event()

    async def use(engine: EmbeddedEngine) -> None:
        busy = asyncio.create_task(in_compute_thread(gate.wait, 10))
        long = asyncio.create_task(engine.generate(words(3), sampling(480)))
        await asyncio.sleep(0.01)  # it is admitted, and the thread is still busy
        late = asyncio.create_task(engine.generate(words(4), sampling(1)))
        await asyncio.sleep(0)
        gate.set()
        await late
        assert not long.done()
        assert await busy

    serve(qwen3, use)


def test_a_cancelled_request_frees_its_row(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    tokens = count_tokens(qwen3)

    async def use(engine: EmbeddedEngine) -> None:
        task = asyncio.create_task(engine.generate(words(3), sampling(480)))
        await until(lambda: tokens)
        task.cancel()
        completion = await engine.generate(words(7), sampling(3))
        assert task.cancelled()
        assert len(tokens) < 400
        check(plain(checkpoints["qwen3"]), words(7), completion)

    serve(qwen3, use, rows=1)


def test_a_request_cancelled_before_it_is_admitted_costs_nothing(qwen3: Any) -> None:
    tokens = count_tokens(qwen3)

    async def use(engine: EmbeddedEngine) -> None:
        cancelled = asyncio.create_task(engine.generate(words(100), sampling(3)))
        await asyncio.sleep(0)
        cancelled.cancel()
        await engine.generate(words(7), sampling(1))
        assert tokens == [7]

    serve(qwen3, use)


def test_closing_fails_whatever_is_in_flight(qwen3: Any) -> None:
    tokens = count_tokens(qwen3)

    async def main() -> None:
        engine = EmbeddedEngine(qwen3, max_sequences=1)
        running = asyncio.create_task(engine.generate(words(3), sampling(480)))
        await until(lambda: tokens)
        waiting = asyncio.create_task(engine.generate(words(4), sampling(2)))
        loading = asyncio.create_task(engine.load(None, 1))
        await asyncio.sleep(0)
        await engine.close()
        for task in (running, waiting, loading):
            with pytest.raises(EngineError, match="closed"):
                await task
        assert len(tokens) < 400
        for call in (
            engine.generate(words(3), sampling()),
            engine.score(words(3), 1.0),
            engine.load(None, 1),
        ):
            with pytest.raises(EngineError, match="closed; make a new one"):
                await call
        await engine.close()

    asyncio.run(main())


def test_an_engine_never_used_can_be_closed(qwen3: Any) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        pass

    serve(qwen3, use)


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ([], 5, "the prompt is empty"),
        ([3] * 510, 3, "510 tokens and 3 new ones exceed the model's context of 512"),
        ([3, WORDS], 5, f"token ids from 3 to {WORDS}, and the model embeds 0 to {WORDS - 1}"),
        ([3, -1], 5, "token ids from -1 to 3"),
    ],
)
def test_a_prompt_that_can_not_be_served_is_refused_and_hurts_nobody_else(
    qwen3: Any, prompt: list[int], tokens: int, message: str
) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        other = asyncio.create_task(engine.generate(words(3), sampling(20)))
        await asyncio.sleep(0)
        with pytest.raises(UserError, match=message):
            await engine.generate(np.array(prompt, np.int32), sampling(tokens))
        assert len((await other).token_ids) == 20

    serve(qwen3, use)


def test_the_whole_context_may_be_used(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    prompt = words(505)
    completion = serve(qwen3, lambda engine: engine.generate(prompt, sampling(7)))
    check(plain(checkpoints["qwen3"]), prompt, completion)


def test_a_text_longer_than_the_context_is_not_scored(qwen3: Any) -> None:
    with pytest.raises(UserError, match="513 tokens"):
        serve(qwen3, lambda engine: engine.score(words(513), 1.0))


def test_a_failing_model_fails_all_that_wait_and_the_engine_goes_on(
    qwen3: Any, checkpoints: dict[str, Path]
) -> None:
    norm = qwen3.model.norm.weight.data
    kept = norm.clone()

    async def use(engine: EmbeddedEngine) -> None:
        norm.fill_(torch.nan)  # the base is shared
        tasks = [asyncio.create_task(engine.generate(words(3 + n), sampling())) for n in range(3)]
        for task in tasks:
            with pytest.raises(AgentRLError, match="not finite"):
                await task
        norm.copy_(kept)
        prompt = words(5)
        check(plain(checkpoints["qwen3"]), prompt, await engine.generate(prompt, sampling()))

    serve(qwen3, use, rows=2)


# -- event loops --


def test_an_engine_serves_one_event_loop_after_another(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    tokens, prompt = count_tokens(qwen3), words(6)
    engine = EmbeddedEngine(qwen3, max_sequences=2)

    async def leaves_requests_behind() -> Completion:
        for seed in range(3):
            asyncio.get_running_loop().create_task(engine.generate(words(3, seed=seed), sampling(480)))
        await until(lambda: tokens)
        return Completion([], [], [], "aborted")  # type: ignore[arg-type]

    async def asks() -> Completion:
        return await engine.generate(prompt, sampling(4))

    async def asks_and_closes() -> Completion:
        first, second = await asyncio.gather(asks(), asks())
        assert first.token_ids.tolist() == second.token_ids.tolist()
        await engine.close()
        return first

    mains: Sequence[Callable[[], Any]] = (asks, leaves_requests_behind, asks, asks_and_closes)
    completions = [asyncio.run(main()) for main in mains]
    assert len(tokens) < 400
    for completion in (completions[0], completions[2], completions[3]):
        check(plain(checkpoints["qwen3"]), prompt, completion)


def test_a_loop_that_was_closed_without_cancelling_its_tasks_does_not_block_the_next(qwen3: Any) -> None:
    tokens, engine = count_tokens(qwen3), EmbeddedEngine(qwen3, max_sequences=1)

    async def begin() -> None:
        kept.append(asyncio.create_task(engine.generate(words(3), sampling(480))))
        await until(lambda: tokens)

    async def go_on() -> Completion:
        completion = await engine.generate(words(6), sampling(4))
        await engine.load(None, 3)
        await engine.close()
        return completion

    kept: list[asyncio.Task[Completion]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    engine_driver = asyncio.all_tasks(loop)
    loop.close()
    assert len(asyncio.run(go_on()).token_ids) == 4
    for task in (*kept, *engine_driver):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio would report them


def test_two_loops_at_once_are_refused(qwen3: Any) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        await engine.generate(words(3), sampling(1))
        with pytest.raises(RuntimeError, match="another event loop is using this engine"):
            await asyncio.to_thread(asyncio.run, engine.score(words(3), 1.0))

    serve(qwen3, use)


# -- adapters --


def adapted(folder: Path, *, seed: int = 0, **settings: Any) -> Any:
    """A transformers model with a LoRA adapter of random values, the same for the same seed."""
    chosen = {"r": 4, "target_modules": "all-linear", "modules_to_save": NORMS, **settings}
    with torch.random.fork_rng(devices=[]):  # from which PEFT draws its first values
        torch.default_generator.manual_seed(seed)
        policy = peft.get_peft_model(plain(folder), peft.LoraConfig(task_type="CAUSAL_LM", **chosen)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return policy


def published(policy: Any) -> Adapter:
    tensors = peft.get_peft_model_state_dict(policy, save_embedding_layers=False)
    return Adapter(
        policy.peft_config["default"].to_dict(),
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
    )


def test_each_version_is_sampled_from_and_scored_with_its_own_weights(
    qwen3: Any, checkpoints: dict[str, Path]
) -> None:
    folder, prompt = checkpoints["qwen3"], words(20)
    policies = [plain(folder), adapted(folder, seed=1), adapted(folder, seed=2), plain(folder)]

    async def use(engine: EmbeddedEngine) -> None:
        for version, policy in enumerate(policies):
            adapter = published(policy) if isinstance(policy, peft.PeftModel) else None
            await engine.load(adapter, version)
            completion = await engine.generate(prompt, sampling(8, seed=version))
            check(policy, prompt, completion)
            assert completion.versions.tolist() == [version] * 8
            scored = await engine.score(np.concatenate([prompt, completion.token_ids]), 1.0)
            assert scored[20:] == pytest.approx(completion.logprobs, abs=3e-5)

    serve(qwen3, use)


def test_a_conversation_that_goes_on_under_new_weights_is_computed_anew(
    qwen3: Any, checkpoints: dict[str, Path]
) -> None:
    policy = adapted(checkpoints["qwen3"])

    async def use(engine: EmbeddedEngine) -> None:
        prompt = words(20)
        before = await engine.generate(prompt, sampling(8))
        await engine.load(published(policy), 1)
        longer = np.concatenate([prompt, before.token_ids, words(2)])
        check(policy, longer, await engine.generate(longer, sampling(8)))

    serve(qwen3, use)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "lora_alpha": 64},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": None},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": None},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": None},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_an_adapter_of_another_configuration_replaces_the_first(
    qwen3: Any, checkpoints: dict[str, Path], settings: dict[str, Any]
) -> None:
    folder, prompt = checkpoints["qwen3"], words(20)

    async def use(engine: EmbeddedEngine) -> None:
        await engine.load(published(adapted(folder, seed=1)), 1)
        policy = adapted(folder, seed=2, **settings)
        await engine.load(published(policy), 2)
        completion = await engine.generate(prompt, sampling(8))
        check(policy, prompt, completion)
        scored = await engine.score(np.concatenate([prompt, completion.token_ids]), 1.0)
        assert scored[20:] == pytest.approx(completion.logprobs, abs=1e-5)

    serve(qwen3, use)


def test_an_adapter_that_peft_saved_is_served(
    qwen3: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    policy, prompt = adapted(checkpoints["qwen3"]), words(20)
    policy.save_pretrained(tmp_path, save_embedding_layers=False)

    async def use(engine: EmbeddedEngine) -> None:
        await engine.load(read_adapter(tmp_path), 1)
        check(policy, prompt, await engine.generate(prompt, sampling(8)))

    serve(qwen3, use)


def test_the_base_is_shared_and_the_adapter_is_a_copy(
    qwen3: Any, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prompt = adapted(checkpoints["qwen3"]), words(20)
    adapter = published(policy)

    async def use(engine: EmbeddedEngine) -> None:
        await engine.load(adapter, 1)
        for tensor in adapter.tensors.values():
            tensor.fill_(torch.nan)
        check(policy, prompt, await engine.generate(prompt, sampling(8)))
        ours = {tensor.data_ptr() for tensor in engine._batch.model.parameters()}
        assert {tensor.data_ptr() for tensor in qwen3.parameters()} <= ours

    monkeypatch.setattr("agentrl.engines.adapted._MERGED_BYTES", 0)
    serve(qwen3, use)


def test_the_adapter_of_a_small_model_is_merged_into_copies_of_its_layers_afresh_each_time(
    qwen3: Any, checkpoints: dict[str, Path]
) -> None:
    prompt = words(20)
    first, second = (adapted(checkpoints["qwen3"], seed=seed) for seed in (1, 2))
    kept = {name: value.clone() for name, value in qwen3.state_dict().items()}

    async def use(engine: EmbeddedEngine) -> None:
        said = []
        for version, policy in enumerate((first, second, first)):
            await engine.load(published(policy), version)
            said.append(await engine.generate(prompt, sampling(8)))
            check(policy, prompt, said[-1])
        assert not any(type(module).__module__.startswith("peft") for module in engine._batch.model.modules())
        assert said[0].logprobs.tolist() == said[2].logprobs.tolist()  # nothing of the second is left
        assert all(torch.equal(value, kept[name]) for name, value in qwen3.state_dict().items())

    serve(qwen3, use)


def test_the_model_that_was_handed_in_stays_as_it_is(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    names, prompt = [name for name, _ in qwen3.named_modules()], words(20)
    learner = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")

    async def use(engine: EmbeddedEngine) -> None:
        await engine.load(published(adapted(checkpoints["qwen3"])), 1)
        assert [name for name, _ in qwen3.named_modules()] == names
        peft.get_peft_model(qwen3, learner)  # injected in place, as the learner does after the engine
        await engine.load(None, 2)
        check(plain(checkpoints["qwen3"]), prompt, await engine.generate(prompt, sampling(8)))

    serve(qwen3, use)


def test_loading_leaves_the_global_random_state_alone(qwen3: Any, checkpoints: dict[str, Path]) -> None:
    adapter = published(adapted(checkpoints["qwen3"]))

    async def use(engine: EmbeddedEngine) -> None:
        before = torch.random.get_rng_state()
        await engine.load(adapter, 1)
        await engine.generate(words(3), sampling())
        assert torch.equal(torch.random.get_rng_state(), before)

    serve(qwen3, use)


def test_loading_waits_for_what_runs_and_what_waits_gets_the_new_version(
    qwen3: Any, checkpoints: dict[str, Path]
) -> None:
    tokens, folder = count_tokens(qwen3), checkpoints["qwen3"]
    policy, prompt = adapted(folder), words(6)

    async def use(engine: EmbeddedEngine) -> None:
        running = asyncio.create_task(engine.generate(prompt, sampling(60)))
        await until(lambda: tokens)
        waiting = asyncio.create_task(engine.generate(words(7), sampling(5)))  # no row is free
        loading = asyncio.create_task(engine.load(published(policy), 7))
        await asyncio.sleep(0)
        later = asyncio.create_task(engine.generate(words(8), sampling(5)))
        await loading
        assert running.done()
        assert not later.done()
        completions = [await task for task in (running, waiting, later)]
        assert [set(each.versions.tolist()) for each in completions] == [{0}, {7}, {7}]
        check(plain(folder), prompt, completions[0])
        check(policy, words(7), completions[1])
        check(policy, words(8), completions[2])

    serve(qwen3, use, rows=1)


def test_loads_take_effect_in_the_order_in_which_they_were_asked_for(
    qwen3: Any, checkpoints: dict[str, Path]
) -> None:
    tokens, folder = count_tokens(qwen3), checkpoints["qwen3"]
    policies = [adapted(folder, seed=seed) for seed in range(3)]

    async def use(engine: EmbeddedEngine) -> None:
        running = asyncio.create_task(engine.generate(words(6), sampling(30)))
        await until(lambda: tokens)
        loads = [asyncio.create_task(engine.load(published(p), v)) for v, p in enumerate(policies, start=1)]
        await asyncio.sleep(0)
        completion = await engine.generate(words(9), sampling(6))
        assert all(load.done() for load in loads)
        assert set((await running).versions.tolist()) == {0}
        assert set(completion.versions.tolist()) == {3}
        check(policies[2], words(9), completion)

    serve(qwen3, use)


@pytest.mark.parametrize("fault", ["missing", "too many", "shape"])
def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_stays(
    qwen3: Any, checkpoints: dict[str, Path], fault: str
) -> None:
    folder, tokens = checkpoints["qwen3"], count_tokens(qwen3)
    policy, other = adapted(folder, seed=1), published(adapted(folder, seed=2))
    tensors = dict(other.tensors)
    if fault == "missing":
        del tensors[next(iter(tensors))]
    elif fault == "shape":
        tensors[next(iter(tensors))] = torch.zeros(1, 1)
    else:
        tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)

    async def use(engine: EmbeddedEngine) -> None:
        await engine.load(published(policy), 1)
        running = asyncio.create_task(engine.generate(words(6), sampling(40)))
        await until(lambda: tokens)
        loading = asyncio.create_task(engine.load(Adapter(other.config, tensors), 2))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(engine.generate(words(9), sampling(6)))
        with pytest.raises(
            EngineError, match="1 are missing, too many or of another shape, such as 'base_model"
        ):
            await loading
        for task, prompt in ((running, words(6)), (waiting, words(9))):
            completion = await task
            check(policy, prompt, completion)
            assert set(completion.versions.tolist()) == {1}

    serve(qwen3, use)


def test_a_cancelled_load_does_not_hold_anyone_up(qwen3: Any) -> None:
    tokens = count_tokens(qwen3)

    async def use(engine: EmbeddedEngine) -> None:
        running = asyncio.create_task(engine.generate(words(6), sampling(60)))
        await until(lambda: tokens)
        loading = asyncio.create_task(engine.load(None, 5))
        waiting = asyncio.create_task(engine.generate(words(9), sampling(6)))
        await asyncio.sleep(0)
        loading.cancel()
        assert set((await waiting).versions.tolist()) == {0}
        assert len((await running).token_ids) == 60

    serve(qwen3, use)


def test_figures_say_how_many_tokens_were_computed_reused_and_sampled(qwen3: Any) -> None:
    async def use(engine: EmbeddedEngine) -> None:
        prompt = words(20)
        said = await asyncio.gather(*(engine.generate(prompt, sampling(8, seed=s)) for s in range(2)))
        longer = np.concatenate([prompt, said[0].token_ids, words(3)])
        await engine.generate(longer, sampling(1))
        figures = engine.take_figures()
        # The siblings' prompt is computed once; of the next turn what is new, and the last token, never fed.
        assert figures["rollout/prefill_tokens"] == 20 + 3 + 1
        assert figures["rollout/reused_tokens"] == 20 + (20 + 7)
        assert figures["rollout/decode_tokens"] == 2 * 7
        assert figures["time/prefill_s"] > 0
        assert figures["time/decode_s"] > 0
        assert engine.cache_bytes > 0
        assert engine.take_figures()["rollout/prefill_tokens"] == 0

    serve(qwen3, use)
