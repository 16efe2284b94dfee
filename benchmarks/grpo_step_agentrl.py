"""agentrl's side of grpo_step.py: the learner, and the embedded engine over the same base or vLLM beside it.

Started by it, with the model's folder, the number of threads, the base's dtype and the engine's kind.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from machine import now
from workload import (
    GROUP,
    LEARNING_RATE,
    PROMPTS,
    RANK,
    TOKENS,
    Commands,
    StepReport,
    peak_mib,
    prompts,
    spread_rewards,
)

from agentrl.advantages import ADVANTAGES, group_relative
from agentrl.config import (
    AlgorithmConfig,
    BatchConfig,
    EngineConfig,
    LoraConfig,
    OptimizerConfig,
    RolloutConfig,
)
from agentrl.engine import Engine, Sampling
from agentrl.learner import Learner
from agentrl.models import default_device, load_model, load_tokenizer
from agentrl.samples import to_samples
from agentrl.serving import Served, open_engine
from agentrl.threads import in_compute_thread, run_sync
from agentrl.types import Completion, IntArray, Sample, Trajectory, Turn

__all__ = ["main"]

# Two groups at a time (64 + 8 x 64 tokens each): the update took 10 % longer than with all four on two cores,
# with half the activations. A GPU has room for all.
_GROUPS = PROMPTS if torch.cuda.is_available() else 2
_BATCH = BatchConfig(tokens_per_microbatch=_GROUPS * (TOKENS + GROUP * TOKENS))
_VLLM_ARGS = {
    "enforce_eager": not torch.cuda.is_available(),  # compiling takes a CPU minutes that few steps don't earn
    "kv_cache_memory_bytes": 512 << 20,  # 32 sequences of 128 tokens need 72 MiB; vLLM would take gigabytes
}


def main() -> None:
    """Serve steps until stdin ends."""
    path, threads, dtype, kind = sys.argv[1:]
    run_sync(_serve(path, kind, dtype=dtype, threads=int(threads)))


async def _serve(path: str, kind: str, *, dtype: str, threads: int) -> None:
    await in_compute_thread(torch.set_num_threads, threads)
    commands = Commands()
    model = await in_compute_thread(load_model, path, dtype=dtype, device=default_device())
    tokenizer = load_tokenizer(path)
    asked = [np.array(tokenizer.encode(text), np.int32) for text in prompts(tokenizer)]
    engine = await _engine(kind, _served(path, model, tokenizer, dtype=dtype))
    learner = await in_compute_thread(_learner, model, kind)
    for step in commands:
        began = now()
        completions = await _sample(engine, asked, step=step)
        rolled_out = now()
        samples = _samples(asked, completions, step=step)
        metrics = await in_compute_thread(learner.update, samples, step=step, temperature=1.0, seed=step)
        assert metrics["optimizer/grad_norm"] > 0, "nothing was learnt, so nothing was measured"
        updated = now()
        await engine.load(await in_compute_thread(learner.publish), step + 1)
        ended = now()
        commands.answer(
            StepReport(
                seconds=ended - began,
                rollout_s=rolled_out - began,
                swap_s=ended - updated,
                peak_mib=peak_mib(),
            )
        )
    await engine.close()


def _served(path: str, model: Any, tokenizer: Any, *, dtype: str) -> Served:
    return Served(
        base=path,
        model=model,
        tokenizer=tokenizer,
        dtype=dtype,
        limits=RolloutConfig(max_turn_tokens=TOKENS, max_episode_tokens=2 * TOKENS),
        max_lora_rank=RANK,
        training=True,
    )


async def _engine(kind: str, served: Served) -> Engine:
    given: dict[str, Any] = {"args": _VLLM_ARGS} if kind == "vllm" else {}
    return await open_engine(EngineConfig(kind=kind, max_sequences=PROMPTS * GROUP, **given), served)


def _learner(model: Any, kind: str) -> Learner:
    return Learner(
        model,
        lora=LoraConfig(r=RANK),
        # As a run has it by default: vLLM computes a little else than the learner does.
        algorithm=AlgorithmConfig(importance="none" if kind == "embedded" else "truncate"),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"),
        batch=_BATCH,
        steps=1000,
        seed=0,
    )


async def _sample(engine: Engine, asked: Sequence[IntArray], *, step: int) -> list[Completion]:
    """GROUP completions of each prompt. Without stop tokens none ends early."""
    total = PROMPTS * GROUP
    requests = [
        engine.generate(asked[at // GROUP], Sampling(max_tokens=TOKENS, seed=step * total + at))
        for at in range(total)
    ]
    return await asyncio.gather(*requests)


def _samples(asked: Sequence[IntArray], completions: Sequence[Completion], *, step: int) -> list[Sample]:
    rewards = spread_rewards(step)
    samples: list[Sample] = []
    for place, prompt_ids in enumerate(asked):
        group = range(place * GROUP, (place + 1) * GROUP)
        episodes = [to_samples(_trajectory(prompt_ids, completions[at], sibling=at)) for at in group]
        samples += group_relative([rewards[at] for at in group], episodes, estimator=ADVANTAGES["grpo"])
    assert all(len(s.token_ids) == 2 * TOKENS and s.trained_tokens == TOKENS for s in samples)
    return samples


def _trajectory(prompt_ids: IntArray, completion: Completion, *, sibling: int) -> Trajectory:
    return Trajectory(
        task_id="text",
        sibling=sibling,
        seed=0,
        turns=(Turn(prompt_ids, completion),),
        messages=(),
        stop_reason="length",
        score=None,
    )


if __name__ == "__main__":
    main()
