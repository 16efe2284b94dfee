"""A run as a checkpoint that transformers loads alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.checkpoint import Checkpoints, State
from agentrl.config import AlgorithmConfig, BatchConfig, LoraConfig, OptimizerConfig, dump_config
from agentrl.configfile import load_config
from agentrl.engine import Adapter
from agentrl.errors import BadConfig, BadData
from agentrl.export import export
from agentrl.learner import Learner
from agentrl.log import RunFolder
from agentrl.resume import Process


def adapter(model: Any, *, scale: float) -> Adapter:
    """One that changes every logit."""
    learner = Learner(
        model,
        lora=LoraConfig(r=2, train_norms=True),
        algorithm=AlgorithmConfig(),
        optimizer=OptimizerConfig(),
        batch=BatchConfig(),
        steps=1,
        seed=0,
    )
    published, generator = learner.publish(), torch.Generator().manual_seed(1)
    moved = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(published.tensors.items())
    }
    return Adapter(published.config, moved)


@pytest.fixture
def run(tmp_path: Path, tiny_checkpoint: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    config = load_config(
        {"environment": {"id": "calculator"}, "model": {"path": str(tiny_checkpoint)}, "name": "run"}
    )
    folder.config.write_text(dump_config(config))
    return folder


def state(step: int) -> State:
    return State(step=step, version=step, config="", tokenizer="", process=Process.current())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.arange(5, 40)[None]).logits
    return found


def test_the_merged_checkpoint_has_the_logits_of_base_and_newest_adapter(
    run: RunFolder, make_model: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(run.checkpoints, keep=2)
    for step, scale in ((1, 0.5), (2, 0.2)):
        given = adapter(make_model(), scale=scale)
        newest = checkpoints.save(state(step), adapter=given, optimizer={})
    target = tmp_path / "merged"
    assert export(run.root, target) == target

    merged = AutoModelForCausalLM.from_pretrained(target)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    bare = logits(base)
    expected = logits(peft.PeftModel.from_pretrained(base, str(newest)))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - bare).abs().max() > 0.1
    assert type(merged).__name__ == "Qwen3ForCausalLM"
    assert merged.config._attn_implementation == "sdpa"
    assert merged.generation_config.eos_token_id == base.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_checkpoint).chat_template
    assert not list(target.glob("adapter_*"))


def test_a_warm_started_run_is_merged_into_its_warm_start(
    run: RunFolder, make_model: Callable[..., Any], tmp_path: Path, tokenizer: Any
) -> None:
    warm = make_model()
    warm.get_input_embeddings().weight.data.mul_(3)
    warm.save_pretrained(run.warm_start)
    tokenizer.save_pretrained(run.warm_start)
    given = adapter(make_model(), scale=0.0)
    Checkpoints(run.checkpoints, keep=1).save(state(1), adapter=given, optimizer={})
    merged = AutoModelForCausalLM.from_pretrained(export(run.root, tmp_path / "merged"))
    expected = AutoModelForCausalLM.from_pretrained(run.warm_start)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-4)


def test_a_run_without_a_checkpoint_can_not_be_exported(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no checkpoint yet; let the run reach step 10"):
        export(run.root, tmp_path / "merged")


def test_nothing_is_overwritten(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(BadConfig, match="holds something; name an empty or a new folder"):
            export(run.root, tmp_path / name)
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "mine"
