"""Updates: LoRA through peft, optimizer steps through accelerate, logits only where a token is trained.

:class:`Optimization` is one optimizer over one model, whatever the loss; warm starts and the learner share
it. :class:`Learner` is the policy being trained: it scores samples, updates the adapter and publishes it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from agentrl.attention import Branches
from agentrl.batches import Batch, make_batches, split_minibatches, unpack
from agentrl.config import AlgorithmConfig, BatchConfig, LoraConfig, OptimizerConfig
from agentrl.engine import Adapter
from agentrl.errors import BadConfig, Diverged, did_you_mean
from agentrl.losses import (
    ClipRange,
    Importance,
    effective_share,
    importance_weights,
    k3,
    kl_penalty,
    policy_loss,
    token_logprobs,
)
from agentrl.merging import merged_layers
from agentrl.models import backbone, linear_layers, scoring_head
from agentrl.seeds import derive
from agentrl.stopwatch import Stopwatch
from agentrl.types import FloatArray, Sample

__all__ = ["Learner", "Optimization", "adapt", "check_targets", "learning_rate_factor"]

_FIGURES = (
    "time/score_s",
    "time/forward_s",
    "time/backward_s",
    "time/optimizer_s",
    "update/tokens",
    "update/trained_tokens",
)

Metrics = dict[str, float]
Loss = Callable[[Batch, Tensor], tuple[Tensor, dict[str, Tensor]]]  # batch, logprobs (M,) -> loss, sums


class _Logprobs(nn.Module):
    """The forward pass as one module, so that accelerate can wrap it: batch -> logprobs and entropies
    (M,)."""

    def __init__(self, model: Any, *, rows_per_chunk: int) -> None:
        super().__init__()
        self.model = model  # registers the parameters
        self._rows_per_chunk = rows_per_chunk

    def forward(self, batch: Batch, *, temperature: float) -> tuple[Tensor, Tensor]:
        plan = Branches(batch.sequences, batch.branches, batch.token_ids.device)
        hidden = backbone(self.model, batch.token_ids, batch.positions, plan)
        return token_logprobs(
            hidden,
            batch.token_ids,
            batch.trained,
            head=scoring_head(self.model),
            temperature=temperature,
            rows_per_chunk=self._rows_per_chunk,
            previous=batch.previous,
        )


class Optimization:
    """AdamW over the parameters of a model that require gradients."""

    def __init__(
        self,
        model: Any,  # transformers model, adapters injected in place
        *,
        optimizer: OptimizerConfig,
        batch: BatchConfig,
        steps: int,  # of the whole run: the learning rate decays over them
    ) -> None:
        self.accelerator = Accelerator(cpu=model.device.type == "cpu")
        if self.accelerator.num_processes > 1:
            raise BadConfig(
                f"{self.accelerator.num_processes} processes were launched; one process trains for now: "
                "start agentrl without accelerate launch"
            )
        self.device = self.accelerator.device
        self.stopwatch = Stopwatch(torch.cuda.synchronize if self.device.type == "cuda" else lambda: None)
        self._settings, self._batch, self._steps = optimizer, batch, steps
        if batch.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adamw = torch.optim.AdamW(
            self.parameters,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        forward = _Logprobs(model, rows_per_chunk=batch.logprob_rows)
        self._forward, self.adamw = self.accelerator.prepare(forward, adamw)

    def batches(self, samples: Sequence[Sample]) -> list[Batch]:
        """Microbatches on the device."""
        made = make_batches(samples, tokens_per_microbatch=self._batch.tokens_per_microbatch)
        return [batch.to(self.device) for batch in made]

    def score(self, samples: Sequence[Sample], *, temperature: float) -> list[FloatArray]:
        """Logprobs (T,) in nats of each sample's trained tokens, 0 elsewhere, without gradients."""
        batches = self.batches(samples)
        self._forward.eval()
        with torch.no_grad(), self.stopwatch.timing("time/score_s"):
            scored = [self._forward(batch, temperature=temperature)[0] for batch in batches]
        return unpack(batches, scored)

    def step(
        self,
        samples: Sequence[Sample],
        loss: Loss,
        *,
        step: int,
        seed: int,  # of dropout
        temperature: float = 1.0,
    ) -> Metrics:
        """One optimizer step on ``samples``: gradients are summed over microbatches, clipped, applied.

        Returns the loss's metrics summed over tokens, ``loss/entropy`` (a sum too) and ``optimizer/*``.
        Raises Diverged where the gradient is not finite; the weights are then as before.
        """
        rate = self._settings.learning_rate * learning_rate_factor(self._settings, step, self._steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        with _seeded(seed):
            sums = self._backward(samples, loss, temperature=temperature)
        with self.stopwatch.timing("time/optimizer_s"):
            norm = self._apply(step)
        return {**sums, "optimizer/grad_norm": norm, "optimizer/learning_rate": rate}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the moments of AdamW's ``state``; its settings stay those of this run."""
        self.adamw.load_state_dict(state)
        for group in self.adamw.param_groups:
            group.update(betas=self._settings.betas, weight_decay=self._settings.weight_decay)

    def _apply(self, step: int) -> float:
        """Clip the gradient and step; the gradient's norm before."""
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self._settings.grad_clip))
        if not math.isfinite(norm):
            self.adamw.zero_grad()
            raise Diverged(
                f"the gradient's norm is {norm} at step {step}, and it was not applied; lower "
                "optimizer.learning_rate or optimizer.grad_clip"
            )
        self.adamw.step()
        self.adamw.zero_grad()
        return norm

    def _backward(self, samples: Sequence[Sample], loss: Loss, *, temperature: float) -> Metrics:
        """Add the gradients of ``samples`` to the parameters'; metrics are sums over tokens."""
        sums: dict[str, Tensor] = {}
        self._forward.train()
        for batch in self.batches(samples):
            self.stopwatch.count("update/tokens", len(batch.token_ids))
            self.stopwatch.count("update/trained_tokens", batch.trained_tokens)
            with self.stopwatch.timing("time/forward_s"):
                logprobs, entropies = self._forward(batch, temperature=temperature)
                value, metrics = loss(batch, logprobs)
            with self.stopwatch.timing("time/backward_s"):
                self.accelerator.backward(value)
            for name, total in (*metrics.items(), ("loss/entropy", entropies.sum())):
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + total.detach()
        self._forward.eval()
        return {name: total.item() for name, total in sums.items()}


class Learner:
    """The policy being trained: a frozen base with a LoRA adapter."""

    def __init__(
        self,
        model: Any,  # from agentrl.models.load_model; the adapter is injected in place
        *,
        lora: LoraConfig,
        algorithm: AlgorithmConfig,
        optimizer: OptimizerConfig,
        batch: BatchConfig,
        steps: int,
        seed: int,  # of the adapter's first weights
    ) -> None:
        from peft import get_peft_model_state_dict

        self.policy = adapt(model, lora, seed=seed)
        self._has_dropout = lora.dropout > 0
        self._algorithm = algorithm
        self._clip = ClipRange(algorithm.clip_low, algorithm.clip_high)
        self._importance = Importance(
            algorithm.importance or "none", cap=algorithm.importance_cap, floor=algorithm.importance_floor
        )
        self.optimization = Optimization(model, optimizer=optimizer, batch=batch, steps=steps)
        # PEFT's names over the very memory of the parameters: looking for them takes long.
        self._tensors: dict[str, Tensor] = get_peft_model_state_dict(self.policy)

    def score_reference(self, samples: Sequence[Sample], *, temperature: float) -> list[Sample]:
        """The samples with ``reference``: logprobs under the base without its adapter."""
        scored = self.score_as(None, samples, temperature=temperature)
        return [
            dataclasses.replace(sample, reference=value)
            for sample, value in zip(samples, scored, strict=True)
        ]

    def score_as(
        self,
        adapter: Adapter | None,  # of this learner, at any version; None: the bare base
        samples: Sequence[Sample],
        *,
        temperature: float,
        merged: bool = False,  # adapter and base in one matrix each, rounded to the base's precision
    ) -> list[FloatArray]:
        """Logprobs (T,) in nats of each sample's trained tokens under ``adapter``, 0 elsewhere.

        The learner's own weights are afterwards what they were, bit for bit.
        """
        if adapter is None:
            with self.policy.disable_adapter():
                return self.optimization.score(samples, temperature=temperature)
        from peft import set_peft_model_state_dict

        own = [parameter.detach().clone() for parameter in self.optimization.parameters]
        try:
            set_peft_model_state_dict(self.policy, dict(adapter.tensors))
            with merged_layers(self.policy) if merged else nullcontext():
                return self.optimization.score(samples, temperature=temperature)
        finally:
            for parameter, value in zip(self.optimization.parameters, own, strict=True):
                parameter.data.copy_(value)

    def update(
        self,
        samples: Sequence[Sample],  # with advantages
        *,
        step: int,
        temperature: float,  # that they were sampled at
        seed: int,  # of the split into minibatches
    ) -> Metrics:
        """One pass over ``samples`` in ``algorithm.minibatches`` optimizer steps.

        A sample without an advantage anywhere has no gradient and is not computed (unless the KL penalty
        gives it one), but its tokens count in the loss's normaliser. Ratios and the KL penalty compare the
        learner with itself; the sampler's logprobs enter through the importance weights alone. Metrics are
        means over the tokens that were computed; none and no step where no sample was.
        """
        if self._algorithm.kl:
            samples = self.score_reference(samples, temperature=temperature)
        split = split_minibatches(samples, self._algorithm.minibatches, seed=seed)
        parts = [(kept, _trained_tokens(part)) for part in split if (kept := self._with_gradient(part))]
        # Scored before the first step, with the weights that every part's ratio refers to. The first part
        # needs none where nothing is dropped out: its own forward pass has those weights.
        known = 0 if self._has_dropout else 1
        parts[known:] = [
            (self._with_old(kept, temperature=temperature), tokens) for kept, tokens in parts[known:]
        ]
        rows: list[Metrics] = []
        for index, (kept, tokens) in enumerate(parts):
            loss = _PolicyLoss(
                clip=self._clip, importance=self._importance, kl=self._algorithm.kl, trained_tokens=tokens
            )
            dropout = derive(seed, "dropout", index)
            rows.append(self.optimization.step(kept, loss, step=step, seed=dropout, temperature=temperature))
            rows[-1]["mismatch/max"] = loss.largest_mismatch
        return _mean_over_tokens(rows, sum(_trained_tokens(kept) for kept, _ in parts))

    def take_figures(self) -> Metrics:
        """Seconds by stage, and tokens, since the last call, under their metrics' names."""
        return dict.fromkeys(_FIGURES, 0.0) | self.optimization.stopwatch.take()

    def _with_gradient(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that add to the gradient."""
        if self._algorithm.kl:
            return [sample for sample in samples if sample.trained_tokens]
        return [sample for sample in samples if sample.advantages is not None and sample.advantages.any()]

    def _with_old(self, samples: Sequence[Sample], *, temperature: float) -> list[Sample]:
        scored = self.optimization.score(samples, temperature=temperature)
        return [dataclasses.replace(s, old=value) for s, value in zip(samples, scored, strict=True)]

    def memory_mib(self) -> dict[str, float]:
        """What the base, the adapter with its gradient and AdamW's moments take."""
        adapter = sum(parameter.nbytes for parameter in self.optimization.parameters)
        whole = sum(parameter.nbytes for parameter in self.policy.parameters())
        state = self.optimization.adamw.state_dict()["state"].values()
        moments = sum(
            value.nbytes for entry in state for value in entry.values() if isinstance(value, Tensor)
        )
        parts = {"base": whole - adapter, "adapter and gradient": 2 * adapter, "optimizer": moments}
        return {name: size / 2**20 for name, size in parts.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """A copy of AdamW's state, for a checkpoint."""
        return copy.deepcopy(dict(self.optimization.adamw.state_dict()))

    def restore(self, adapter: Adapter, optimizer: dict[str, Any]) -> None:
        """Go on with the weights and the moments of a checkpoint."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.policy, dict(adapter.tensors))
        self.optimization.restore(optimizer)

    def publish(self) -> Adapter:
        """A copy of the adapter, as PEFT saves it."""
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors.items()}
        return Adapter(self.policy.peft_config["default"].to_dict(), tensors)


class _PolicyLoss:
    """The loss of one optimizer step, called once for each of its microbatches."""

    def __init__(self, *, clip: ClipRange, importance: Importance, kl: float, trained_tokens: int) -> None:
        self._clip, self._importance, self._kl = clip, importance, kl
        self._trained_tokens = trained_tokens
        self.largest_mismatch = 0.0  # nats

    def __call__(self, batch: Batch, new: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None
        old = new.detach() if batch.old is None else batch.old
        everywhere = torch.ones_like(batch.trained, dtype=torch.bool)
        weights, figures = importance_weights(old, batch.logprobs, everywhere, importance=self._importance)
        loss, metrics = policy_loss(
            new,
            old,
            batch.advantages,
            everywhere,
            trained_tokens=self._trained_tokens,
            clip=self._clip,
            weights=weights,
        )
        if batch.reference is not None:
            penalty, extra = kl_penalty(new, batch.reference, everywhere, trained_tokens=self._trained_tokens)
            loss, metrics = loss + self._kl * penalty, metrics | extra
        difference = old - batch.logprobs
        if len(difference):
            self.largest_mismatch = max(self.largest_mismatch, difference.abs().max().item())
        metrics |= figures
        metrics["mismatch/mean"] = difference.abs().sum()
        metrics["mismatch/kl"] = k3(batch.logprobs, old).sum()
        return loss, metrics


def adapt(model: Any, lora: LoraConfig, *, seed: int) -> Any:
    """``model`` with a fresh LoRA adapter injected in place, wrapped by PEFT; its weights depend on ``seed``
    alone.

    Raises BadConfig for norms to be trained in a precision that rounds their updates away, and for target
    modules that the model does not have.
    """
    if lora.train_norms and model.dtype.itemsize < 4:  # LoRA's own matrices PEFT keeps in float32
        raise BadConfig(
            f"lora.train_norms is true, and the base is in {str(model.dtype).removeprefix('torch.')}, which "
            "rounds small updates of the norms away; set model.dtype to float32 or lora.train_norms to false"
        )
    import peft

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    check_targets(model, targets)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=_norm_names(model) if lora.train_norms else None,
        task_type="CAUSAL_LM",
    )
    with _seeded(seed):
        return peft.get_peft_model(model, config)


def check_targets(model: Any, targets: str | Sequence[str]) -> None:
    """Raises BadConfig for a name of no layer: PEFT overlooks it beside others that are there."""
    names = [f".{name}" for name, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets:
        if not any(name.endswith(f".{target}") for name in names):
            known = linear_layers(model)
            raise BadConfig(
                f"lora.target_modules has {target!r}, and no layer of the model is called that"
                f"{did_you_mean(target, known)}; it must be all-linear, or names such as {', '.join(known)}"
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators, which adapters' weights and dropout are drawn from, for this block
    alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _norm_names(model: Any) -> list[str]:
    """The last part of the names of a model's normalisation layers."""
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if "Norm" in type(module).__name__
    }
    return sorted(names)


def learning_rate_factor(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step`` (from 0) of ``steps``: warm-up, then decay by step
    count."""
    if step < optimizer.warmup_steps:
        return (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.schedule == "constant":
        return 1.0
    progress = (step - optimizer.warmup_steps) / max(1, steps - 1 - optimizer.warmup_steps)
    shape = 1 - progress if optimizer.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optimizer.final_fraction + (1 - optimizer.final_fraction) * shape


def _mean_over_tokens(rows: Sequence[Metrics], trained_tokens: int) -> Metrics:
    """Sums over tokens become means, those of the importance weights their effective share; optimizer figures
    are averaged over the steps, the largest mismatch kept."""
    merged: Metrics = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if name == "mismatch/max":
            merged[name] = max(values)
        elif name.startswith("optimizer/"):
            merged[name] = float(np.mean(values))
        else:
            merged[name] = math.fsum(values) / trained_tokens
    if merged:
        weight, squared = merged.pop("mismatch/weight"), merged.pop("mismatch/weight_squared")
        merged["mismatch/ess"] = effective_share(weight, squared)
    return merged


def _trained_tokens(samples: Sequence[Sample]) -> int:
    return sum(sample.trained_tokens for sample in samples)
