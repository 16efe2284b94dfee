"""A real model: Gemma 3 270M, from the folder that AGENTRL_GEMMA names."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from agentrl.certificate import certify
from agentrl.config import AlgorithmConfig, BatchConfig, LoraConfig, OptimizerConfig
from agentrl.engine import Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.learner import Learner
from agentrl.models import load_model, load_tokenizer
from agentrl.parsers import get_parser
from agentrl.registry import make
from agentrl.threads import run_sync
from agentrl.types import Completion, IntArray, Sample

_FOLDER = os.environ.get("AGENTRL_GEMMA", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _FOLDER, reason="AGENTRL_GEMMA does not name a folder with Gemma 3 270M"),
]
_TEXTS = (
    "Question: A farmer has 12 hens and each lays 5 eggs a week. How many eggs in 3 weeks?\nAnswer:",
    "def fibonacci(n):\n    ",
    "The capital of France is Paris. The capital of Spain is",
)


def test_the_certificate_holds_for_gemmas_template() -> None:
    schemas = [tool.schema() for tool in make("calculator").tools]
    certificate = certify(load_tokenizer(_FOLDER), schemas, parser=get_parser("hermes"))
    assert certificate.ok
    assert {row.status for row in certificate.rows} == {"extends"}


@pytest.mark.parametrize(
    ("dtype", "allowed_nats"),
    [("float32", 1e-4), ("bfloat16", 1e-2)],
)
def test_engine_and_learner_agree_on_the_tokens_that_were_sampled(dtype: str, allowed_nats: float) -> None:
    model, tokenizer = load_model(_FOLDER, dtype=dtype), load_tokenizer(_FOLDER)
    prompts = [np.array(tokenizer.encode(text), np.int32) for text in _TEXTS]
    engine = EmbeddedEngine(model, max_sequences=len(prompts))
    learner = Learner(
        model,
        lora=LoraConfig(),
        algorithm=AlgorithmConfig(),
        optimizer=OptimizerConfig(),
        batch=BatchConfig(logprob_rows=128),
        steps=1,
        seed=0,
    )
    completions = run_sync(_sample(engine, learner, prompts))
    samples = [_sample_of(*pair) for pair in zip(prompts, completions, strict=True)]
    scored = learner.optimization.score(samples, temperature=1.0)
    differences = [np.abs(new - s.logprobs)[s.mask] for new, s in zip(scored, samples, strict=True)]
    assert np.concatenate(differences).size >= 64
    assert np.concatenate(differences).mean() < allowed_nats


async def _sample(engine: EmbeddedEngine, learner: Learner, prompts: list[IntArray]) -> list[Completion]:
    await engine.load(learner.publish(), 1)
    completions = [
        await engine.generate(prompt, Sampling(max_tokens=48, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]
    await engine.close()
    return completions


def _sample_of(prompt: IntArray, completion: Completion) -> Sample:
    def padded(values: Any, fill: float) -> Any:
        return np.concatenate([np.full(len(prompt), fill), values])

    return Sample(
        task_id="text",
        sibling=0,
        token_ids=np.concatenate([prompt, completion.token_ids]),
        mask=padded(np.ones(len(completion.token_ids)), 0).astype(bool),
        logprobs=padded(completion.logprobs, 0.0),
        rewards=padded(np.zeros(len(completion.token_ids)), 0.0),
        versions=padded(completion.versions, -1),
    )
