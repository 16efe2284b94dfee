"""Supervised starts: what is trained, what is written, and that plain transformers loads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.chats import Chats
from agentrl.config import BatchConfig, LoraConfig, RolloutConfig, WarmStartConfig
from agentrl.env import Env
from agentrl.models import load_model
from agentrl.rollout import EpisodePlan, gold_episodes
from agentrl.samples import to_samples
from agentrl.types import Sample
from agentrl.warm_start import WarmStart


@pytest.fixture(scope="module")
def gold(sums: type[Env], tokenizer: Any) -> list[Sample]:
    plans = [EpisodePlan(split="train", index=index, sibling=0, env_seed=0, seed=0) for index in range(6)]
    limits = RolloutConfig(max_turn_tokens=64, max_episode_tokens=512)
    episodes = asyncio.run(gold_episodes(sums, Chats(tokenizer), plans, limits=limits))
    return [sample for episode in episodes for sample in to_samples(episode)]


def warm_start(model: Any, *, lora: bool = False, seed: int = 0, dropout: float = 0.0) -> WarmStart:
    return WarmStart(
        model,
        settings=WarmStartConfig(episodes=6, steps=12, episodes_per_step=4, learning_rate=0.02, lora=lora),
        lora=LoraConfig(r=4, dropout=dropout, train_norms=True),
        batch=BatchConfig(tokens_per_microbatch=256),
        seed=seed,
    )


@torch.no_grad()
def logits(model: Any, sample: Sample) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([sample.token_ids.tolist()])).logits
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_what_it_learnt_is_an_ordinary_checkpoint(
    make_model: Callable[..., Any],
    tiny_checkpoint: Path,
    tokenizer: Any,
    gold: list[Sample],
    tmp_path: Path,
    lora: bool,
) -> None:
    model = make_model(dtype="float32")
    start = warm_start(model, lora=lora)
    rows = [start.step(step, gold) for step in range(12)]
    assert rows[-1]["loss/nll"] < rows[0]["loss/nll"] - 0.05
    start.save(tmp_path / "warm", tokenizer=tokenizer, dtype=torch.float32)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "warm")
    assert plain.config._attn_implementation == "sdpa"
    untrained = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert plain.state_dict().keys() == untrained.state_dict().keys()
    ours = load_model(tmp_path / "warm")
    for sample in gold:
        scored = start_logprobs(ours, sample)
        expected = logits(plain, sample)[0, :-1].log_softmax(-1)
        torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)
        assert (logits(plain, sample) - logits(untrained, sample)).abs().max() > 0.01
    again = AutoTokenizer.from_pretrained(tmp_path / "warm")
    assert again.chat_template == tokenizer.chat_template


@torch.no_grad()
def start_logprobs(model: Any, sample: Sample) -> torch.Tensor:
    """Log-probabilities as the learner computes them, for every token but the first."""
    from agentrl.attention import Segments
    from agentrl.models import backbone, head

    ids = torch.tensor(sample.token_ids.tolist())
    hidden = backbone(model, ids, torch.arange(len(ids)), Segments([len(ids)]))
    found: torch.Tensor = head(model)(hidden)[:-1].log_softmax(-1)
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_the_checkpoint_has_the_logits_of_the_model_in_memory(
    make_model: Callable[..., Any], tokenizer: Any, gold: list[Sample], tmp_path: Path, lora: bool
) -> None:
    model = make_model(dtype="float32")
    start = warm_start(model, lora=lora)
    for step in range(4):
        start.step(step, gold)
    trained = [start_logprobs(model, sample) for sample in gold]
    start.save(tmp_path / "warm", tokenizer=tokenizer, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "warm")
    for sample, expected in zip(gold, trained, strict=True):
        found = logits(loaded, sample)[0, :-1].log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_checkpoint_keeps_the_bases_precision(
    make_model: Callable[..., Any], tokenizer: Any, gold: list[Sample], tmp_path: Path
) -> None:
    start = warm_start(make_model(dtype="float32"))
    start.step(0, gold)
    start.save(tmp_path / "warm", tokenizer=tokenizer, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "warm", dtype="auto").dtype == torch.bfloat16


def test_only_what_the_assistant_says_is_learnt(gold: list[Sample], tokenizer: Any) -> None:
    said = tokenizer.decode(gold[0].token_ids[gold[0].mask])
    assert (
        said == '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>3<|im_end|>'
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_seed_gives_the_same_numbers_and_another_one_does_not(
    make_model: Callable[..., Any], gold: list[Sample], lora: bool
) -> None:
    def losses(seed: int) -> list[float]:
        torch.rand(seed)  # the global generator has no say
        start = warm_start(make_model(dtype="float32"), lora=lora, seed=seed, dropout=0.3 if lora else 0.0)
        return [start.step(step, gold)["loss/nll"] for step in range(3)]

    assert losses(1) == losses(1) != losses(2)


def test_every_pass_takes_each_episode_once(
    make_model: Callable[..., Any], gold: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = warm_start(make_model(dtype="float32"))
    taken: list[str] = []
    step = type(start._optimization).step

    def remember(self: Any, samples: list[Sample], *args: Any, **kwargs: Any) -> dict[str, float]:
        taken.extend(sample.task_id for sample in samples)
        return step(self, samples, *args, **kwargs)

    monkeypatch.setattr(type(start._optimization), "step", remember)
    for number in range(6):
        start.step(number, gold)
    passes = [taken[first : first + 6] for first in range(0, 24, 6)]
    assert all(sorted(one) == sorted(sample.task_id for sample in gold) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
