"""Supervised fine-tuning on gold episodes, so that a model can follow the protocol before rewards teach it
the task.

The same samples and masks as in training: only what the assistant says carries loss. All weights are trained
(or LoRA, then merged), and what comes out is an ordinary checkpoint: the base and the reference from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentrl.batches import Batch
from agentrl.checkpoint import saving_weights
from agentrl.config import BatchConfig, LoraConfig, OptimizerConfig, WarmStartConfig
from agentrl.files import write_folder
from agentrl.learner import Optimization, adapt
from agentrl.losses import nll_loss
from agentrl.schedule import Schedule
from agentrl.seeds import derive
from agentrl.types import Sample

__all__ = ["WarmStart"]


@dataclass(frozen=True, slots=True)
class _Nll:
    """The supervised loss of one optimizer step."""

    trained_tokens: int

    def __call__(self, batch: Batch, logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        everywhere = torch.ones_like(batch.trained, dtype=torch.bool)
        return nll_loss(logprobs, everywhere, trained_tokens=self.trained_tokens)


class WarmStart:
    """One supervised fine-tuning of a model that is in memory."""

    def __init__(
        self,
        model: Any,  # from agentrl.models.load_model; in float32 unless an adapter is trained
        *,
        settings: WarmStartConfig,
        lora: LoraConfig,  # of the adapter, where settings.lora asks for one
        batch: BatchConfig,
        seed: int,
    ) -> None:
        self._model, self._settings, self._seed = model, settings, seed
        adapter_seed = derive(seed, "warm start adapter")
        self._policy = adapt(model, lora, seed=adapter_seed) if settings.lora else None
        if self._policy is None:
            model.requires_grad_(True)
        self._optimization = Optimization(
            model,
            optimizer=OptimizerConfig(
                learning_rate=settings.learning_rate,
                schedule="constant",
                warmup_steps=min(10, settings.steps // 10),
            ),
            batch=batch,
            steps=settings.steps,
        )

    def step(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step (from 0) on ``settings.episodes_per_step`` of ``samples``, of which every pass
        has an order of its own; metrics are means over tokens."""
        count = self._settings.episodes_per_step
        order = Schedule(len(samples), seed=self._seed, name="warm start samples")
        chosen = [samples[index] for index in order.take(step * count, count)]
        tokens = sum(sample.trained_tokens for sample in chosen)
        dropout = derive(self._seed, "warm start dropout", step)
        metrics = self._optimization.step(chosen, _Nll(tokens), step=step, seed=dropout)
        return {
            name: value / tokens if name.startswith("loss/") else value for name, value in metrics.items()
        }

    def save(self, path: Path, *, tokenizer: Any, dtype: torch.dtype) -> None:
        """Write the checkpoint, an adapter merged into it; whole or not at all."""
        model = self._model if self._policy is None else self._policy.merge_and_unload()

        def write(folder: Path) -> None:
            with saving_weights():
                model.to(dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        write_folder(path, write)
