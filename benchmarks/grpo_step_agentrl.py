"""agentrl's side of grpo_step.py: the embedded engine and the learner over one frozen base. Started by it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
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
from agentrl.config import AlgorithmConfig, BatchConfig, LoraConfig, OptimizerConfig
from agentrl.engine import Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.learner import Learner
from agentrl.models import load_model, load_tokenizer
from agentrl.samples import to_samples
from agentrl.threads import in_compute_thread, run_sync
from agentrl.types import Completion, IntArray, Sample, Trajectory, Turn

__all__ = ["main"]

# Two groups at a time (64 + 8 x 64 tokens each): the update took 10 % longer than with all four on two cores,
# with half the activations.
_BATCH = BatchConfig(tokens_per_microbatch=2 * (TOKENS + GROUP * TOKENS))


def main() -> None:
    """Serve steps until stdin ends."""
    run_sync(_serve(sys.argv[1], threads=int(sys.argv[2])))


async def _serve(path: str, *, threads: int) -> None:
    await in_compute_thread(torch.set_num_threads, threads)
    commands = Commands()
    model = await in_compute_thread(load_model, path, dtype="bfloat16")
    tokenizer = load_tokenizer(path)
    asked = [np.array(tokenizer.encode(text), np.int32) for text in prompts(tokenizer)]
    engine = EmbeddedEngine(model, max_sequences=PROMPTS * GROUP)
    learner = await in_compute_thread(_learner, model)
    for step in commands:
        began = time.perf_counter()
        completions = await _sample(engine, asked, step=step)
        rolled_out = time.perf_counter()
        samples = _samples(asked, completions, step=step)
        metrics = await in_compute_thread(learner.update, samples, step=step, temperature=1.0, seed=step)
        assert metrics["optimizer/grad_norm"] > 0, "nothing was learnt, so nothing was measured"
        await engine.load(await in_compute_thread(learner.publish), step + 1)
        seconds = time.perf_counter() - began
        commands.answer(StepReport(seconds=seconds, rollout_s=rolled_out - began, peak_mib=peak_mib()))
    await engine.close()


def _learner(model: Any) -> Learner:
    return Learner(
        model,
        lora=LoraConfig(r=RANK),
        algorithm=AlgorithmConfig(),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"),
        batch=_BATCH,
        steps=1000,
        seed=0,
    )


async def _sample(engine: EmbeddedEngine, asked: Sequence[IntArray], *, step: int) -> list[Completion]:
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
