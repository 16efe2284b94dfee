"""A run as a checkpoint that transformers loads alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from agentrl.checkpoint import Checkpoints, State
from agentrl.cli import app
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


def run_of(root: Path, model: Path, **sections: Any) -> RunFolder:
    """A folder with the configuration of a run and nothing else."""
    folder = RunFolder(root)
    folder.root.mkdir()
    given = {"environment": {"id": "calculator"}, "model": {"path": str(model)}, "name": "run"}
    folder.config.write_text(dump_config(load_config(given | sections)))
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny_checkpoint: Path) -> RunFolder:
    return run_of(tmp_path / "run", tiny_checkpoint)


@pytest.fixture
def warm_run(tmp_path: Path, tiny_checkpoint: Path) -> RunFolder:
    return run_of(tmp_path / "run", tiny_checkpoint, warm_start={"episodes": 32, "steps": 1})


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
    assert export(run.root, target) == 2

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
    warm_run: RunFolder, make_model: Callable[..., Any], tmp_path: Path, tokenizer: Any
) -> None:
    warm = make_model()
    warm.get_input_embeddings().weight.data.mul_(3)
    warm.save_pretrained(warm_run.warm_start)
    tokenizer.save_pretrained(warm_run.warm_start)
    given = adapter(make_model(), scale=0.0)
    Checkpoints(warm_run.checkpoints, keep=1).save(state(1), adapter=given, optimizer={})
    export(warm_run.root, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = AutoModelForCausalLM.from_pretrained(warm_run.warm_start)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-4)


def test_a_warm_started_run_without_its_warm_start_is_not_merged_into_another_base(
    warm_run: RunFolder, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    given = adapter(make_model(), scale=0.0)
    Checkpoints(warm_run.checkpoints, keep=1).save(state(1), adapter=given, optimizer={})
    with pytest.raises(BadData, match=r"warm_start is missing, the base that .*step_000001 belongs to"):
        export(warm_run.root, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_older_checkpoint_is_not_exported_in_silence(
    run: RunFolder, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(run.checkpoints, keep=2)
    for step in (1, 2):
        given = adapter(make_model(), scale=0.1)
        newest = checkpoints.save(state(step), adapter=given, optimizer={})
    (newest / "adapter_model.safetensors").write_bytes(b"torn")
    result = CliRunner().invoke(app, ["export", str(run.root), "--merge", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert "step_000002 is damaged" in result.stderr
    assert result.stdout.endswith("merged (step 1)\n")


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
