"""TRL's side of grpo_step.py: GRPOTrainer at the fastest settings found for two cores.

Started by it, with the model's folder, the number of threads, the base's dtype and, as the last argument,
nothing or ``contiguous-head``, with which it also gets a remedy that is no setting. transformers cuts
the last position out of the prompts' hidden states, a view with gaps; on a CPU torch then multiplies by a
batched product, for which it first copies the head's weights once for every sequence: 32 times 320 MiB.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from machine import now
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
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

__all__ = ["main"]


def main() -> None:
    """Serve steps until stdin ends."""
    path, threads, dtype, variant = sys.argv[1:]
    torch.set_num_threads(int(threads))
    commands = Commands()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if variant == "contiguous-head":
        model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    clock = _Clock(commands)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _TimedTrainer(
            clock,
            model=model,
            processing_class=tokenizer,
            args=_settings(folder, bf16=dtype == "bfloat16"),
            reward_funcs=clock.rewards,
            train_dataset=Dataset.from_dict({"prompt": prompts(tokenizer)}),
            peft_config=LoraConfig(
                r=RANK,
                lora_alpha=2 * RANK,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        trainer.train()


def _settings(folder: str, *, bf16: bool) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,  # autocast: the frozen base stays in bfloat16, PEFT keeps the adapter in float32
        gradient_checkpointing=False,  # the default, True, computes every forward pass of the update twice
        beta=0.0,  # no reference model and no pass for it
        num_generations=GROUP,
        # The whole step in one microbatch: one call of generate for all completions, one forward and backward
        # pass, and no pass for old logprobs, which TRL needs where generation and update fall apart.
        per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        num_iterations=1,
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},  # suppresses the end of text
        temperature=1.0,
        top_p=1.0,
        top_k=0,  # with the one above: no sorting of 262,144 logits a token
        mask_truncated_completions=False,  # none ends, so all of them would be masked
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=1_000_000,  # until the parent has seen enough
        shuffle_dataset=False,
        dataloader_num_workers=0,  # a worker process would cost more than handing over four texts
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # Left alone, for reasons: vLLM has no place in the same two cores; continuous batching casts the
        # adapter to bfloat16; a static cache without compilation attends over its whole length.
    )


class _Clock(TrainerCallback):
    """Begins a step when the parent asks for it, and times it."""

    def __init__(self, commands: Commands) -> None:
        self._commands, self._asked = commands, iter(commands)
        self._step, self._began = 0, 0.0
        self.rollout_s = 0.0

    def rewards(self, completions: list[Any], **_: Any) -> list[float]:
        """What GRPOTrainer calls as its reward function."""
        rewards = spread_rewards(self._step)
        assert len(completions) == len(rewards)
        return rewards

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the parent; end the training where it has hung up."""
        step = next(self._asked, None)
        if step is None:
            sys.exit()
        self._step, self._began = step, now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer the parent; the optimizer has stepped."""
        seconds = now() - self._began
        self._commands.answer(
            StepReport(seconds=seconds, rollout_s=self.rollout_s, swap_s=0.0, peak_mib=peak_mib())
        )


class _TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """Notes how long sampling took, and that it gave what the benchmark is about."""

    def __init__(self, clock: _Clock, **settings: Any) -> None:
        super().__init__(**settings)
        self._clock = clock

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        began = now()
        batch = super()._generate_and_score_completions(inputs)
        self._clock.rollout_s = now() - began
        shape = (PROMPTS * GROUP, TOKENS)
        assert batch["prompt_ids"].shape == batch["completion_ids"].shape == shape
        assert bool(batch["completion_mask"].all())
        assert bool(batch["advantages"].any())
        return batch


if __name__ == "__main__":
    main()
