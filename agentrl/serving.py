"""Which engine serves the policy: made here from the ``engine`` section, whatever it samples with."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.config import EngineConfig, RolloutConfig, RunConfig
from agentrl.engine import Engine
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.engines.openai import OpenAIEngine, OpenAISettings
from agentrl.engines.server import ServerSettings, read_key
from agentrl.engines.vllm import VLLMEngine, VLLMSettings
from agentrl.engines.vllm_settings import check_device, check_temperature, no_vllm
from agentrl.errors import BadConfig

__all__ = ["Served", "check_engine", "open_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What is to be served, and for what."""

    base: str | Path  # the model's folder or hub id
    # The same, in memory and without an adapter; the embedded engine and merged versions need it.
    model: Any | None
    tokenizer: Any
    dtype: str = "auto"  # that the base is served in
    limits: RolloutConfig
    max_lora_rank: int | None  # of the adapters to come; None: the base alone
    lora_modules: Sequence[str] | None = None  # last parts of the adapted layers' names; None: any layer
    training: bool  # whether what is sampled is learnt from
    seed: int = 0  # of the pauses before retries


async def open_engine(
    settings: EngineConfig, served: Served, *, on_note: Callable[[str], None] = lambda note: None
) -> Engine:
    """An engine that is ready for requests; ``on_note`` gets lines for people.

    Raises UserError for what can't be served like that, EngineError where a server can't be reached.
    """
    if settings.kind == "embedded":
        return EmbeddedEngine(served.model, max_sequences=settings.max_sequences)
    if settings.kind == "vllm":
        vllm, model = _vllm(settings, served), served.model
        base = dict(model.named_parameters()) if settings.merge and model is not None else None
        return await VLLMEngine.start(vllm, base=base, on_note=on_note)

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = served.tokenizer.encode(text, add_special_tokens=False)
        return ids

    jitter = random.Random(served.seed)
    return await OpenAIEngine.connect(_openai(settings, served), encode=encode, jitter=jitter)


def check_engine(config: RunConfig, *, device: str) -> None:
    """Raises UserError for an ``engine`` section that the run's engine would not start with on ``device``, as
    far as that is known without starting it."""
    settings, targets = config.engine, config.lora.target_modules
    served = Served(
        base=config.model.path or "",
        model=None,
        tokenizer=None,
        limits=config.rollout,
        max_lora_rank=config.lora.r,
        lora_modules=None if isinstance(targets, str) else targets,
        training=True,
    )
    if settings.kind == "openai":
        read_key(_openai(settings, served).server.api_key_env)
    if settings.kind == "vllm":
        check_device(_vllm(settings, served), on_cpu=device == "cpu")
        for temperature in (config.rollout.temperature, config.evaluation.temperature):
            check_temperature(temperature)
        if importlib.util.find_spec("vllm") is None:
            raise no_vllm("there is no module named vllm")


def _vllm(settings: EngineConfig, served: Served) -> VLLMSettings:
    for name in ("swap", "share_gpu"):
        if name in settings.model_fields_set and not served.training:
            raise BadConfig(f"engine.{name} has no effect on an evaluation, which has no update: remove it")
    if settings.merge and not served.training:
        raise BadConfig(
            "engine.merge is true; it is for training, as an evaluation has no base in memory to merge with: "
            "remove it, or write a merged checkpoint with agentrl export RUN --merge DIR and evaluate that"
        )
    return VLLMSettings(
        model=served.base,
        context=served.limits.max_episode_tokens,
        max_sequences=settings.max_sequences,
        max_lora_rank=served.max_lora_rank,
        lora_modules=served.lora_modules,
        dtype=served.dtype,
        swap=settings.swap,
        merge=settings.merge,
        gpus=settings.gpus,
        sleeps=settings.share_gpu,
        args=settings.args,
    )


def _openai(settings: EngineConfig, served: Served) -> OpenAISettings:
    assert settings.url is not None, "the configuration asks for one"
    return OpenAISettings(
        server=ServerSettings(
            url=settings.url,
            api_key_env=settings.api_key_env,
            max_connections=settings.max_sequences,
            deadline_s=served.limits.request_deadline_s,
            retries=settings.request_retries,
            backoff_s=settings.backoff_s,
        ),
        model=settings.model or str(served.base),
        dialect=settings.dialect,
        training=served.training,
        adapter_dir=None if settings.adapter_dir is None else Path(settings.adapter_dir),
    )
