"""How much memory a run can't do without, compared with what there is before anything is loaded.

The plan is a floor, not a forecast: it counts only what is certain, so a run that is refused could not have
run, and one that is let through may still run out (long conversations, activations, the environment's own).

    weights     parameters x bytes of a number; float32 where a warm start trains them all
    cache       2 x layers x kv_heads x head_dim x bytes, engine.max_sequences rows as long as the opening;
                of the embedded engine only, as any other's is another process's
    optimizer   16 bytes a trained number: weight, gradient and AdamW's two moments, all float32
    logits      float32 x vocabulary, for the rows of one chunk (batch.logprob_rows), at most one an episode,
                where the head is trained; a frozen one's never exist as a whole

Sizes come from config.json; what it does not say counts as 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.config import RunConfig, TinyConfig
from agentrl.errors import BadConfig
from agentrl.modelfiles import ModelFiles

__all__ = ["MemoryPlan", "available_mib", "check_memory", "plan_memory"]

_MIB = 1 << 20
_FIRST_CAPACITY = 128  # tokens a row of the engine's cache, doubled until a conversation fits


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The least that a run needs, in MiB."""

    weights: float
    cache: float = 0.0  # keys and values of the conversations
    optimizer: float = 0.0  # what is trained, with gradients and moments
    logits: float = 0.0  # of one chunk

    @property
    def total(self) -> float:
        """Their sum."""
        return math.fsum(dataclasses.astuple(self))

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(dataclasses.asdict(self).items(), key=lambda part: part[1])[0]


_LOWER: Mapping[str, str] = {
    "weights": "take a smaller model, or set model.dtype=bfloat16",
    "cache": "lower engine.max_sequences",
    "optimizer": "lower lora.r, or set warm_start.lora=true where a warm start trains all weights",
    "logits": "lower batch.logprob_rows",
}


def plan_memory(config: RunConfig, model: ModelFiles | None, *, opening_tokens: int = 0) -> MemoryPlan | None:
    """What ``config`` needs with ``model`` (None: the tiny one), whose longest known prompt has
    ``opening_tokens``.

    None where the model is on the hub and its size is not known yet.
    """
    if config.model.tiny is not None:
        shape, parameters = _tiny_shape(config.model.tiny)
        width = 4.0
    elif model is not None:
        shape, parameters = model.config, model.parameters
        stored = model.stored_bytes / max(1, parameters)
        width = {"auto": stored, "float32": 4.0, "bfloat16": 2.0}[config.model.dtype]
    else:
        return None
    warm, rows = config.warm_start, 0
    trains_all = warm is not None and not warm.lora
    if warm is not None and trains_all:  # every episode of an optimizer step has a token to learn, at least
        rows = min(config.batch.logprob_rows, config.batch.tokens_per_microbatch, warm.episodes_per_step)
    trained = parameters if trains_all else _adapter_size(config, shape)
    return MemoryPlan(
        # A full warm start's weights are float32, and are among what is trained.
        weights=0.0 if trains_all else parameters * width / _MIB,
        cache=_cache_bytes(config, shape, width=width, opening_tokens=opening_tokens) / _MIB,
        optimizer=16 * trained / _MIB,
        logits=4 * rows * _size(shape, "vocab_size") / _MIB,
    )


def check_memory(plan: MemoryPlan, *, available: float) -> None:
    """Raises BadConfig where ``plan`` needs more than the ``available`` MiB: the parts, and what to lower."""
    if plan.total <= available:
        return
    parts = ", ".join(f"{name} {size:,.0f}" for name, size in dataclasses.asdict(plan).items() if size >= 1)
    raise BadConfig(
        f"there is no memory for this run: it needs at least {plan.total:,.0f} MiB ({parts}) and "
        f"{available:,.0f} MiB are available; the largest part is {plan.largest}: {_LOWER[plan.largest]}"
    )


def available_mib(
    *, device: str = "cpu", proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> float:
    """MiB that this process may still take: of the GPU, or of the machine within its control groups,
    swap space included. Infinite where nobody says.
    """
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / _MIB
    return min(_of_the_machine(proc), *_of_control_groups(proc, cgroups), math.inf)


def _of_the_machine(proc: Path) -> float:
    text = _text(proc / "meminfo")
    if text is None:
        return math.inf
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    kib = [int(rows[name].split()[0]) for name in ("MemAvailable", "SwapFree") if name in rows]
    return sum(kib) / 1024 if "MemAvailable" in rows else math.inf


def _of_control_groups(proc: Path, cgroups: Path) -> Iterator[float]:
    """What each group above this process leaves it (cgroup v2); file pages that may go count as free."""
    entry = next((x for x in (_text(proc / "self/cgroup") or "").splitlines() if x.startswith("0::")), "0::/")
    group = cgroups / entry.removeprefix("0::").strip().lstrip("/")
    while group.is_relative_to(cgroups):
        limit, used = _text(group / "memory.max"), _text(group / "memory.current")
        if limit and used and limit.strip() != "max":
            statistics = dict(line.split() for line in (_text(group / "memory.stat") or "").splitlines())
            yield (int(limit) - int(used) + int(statistics.get("inactive_file", 0))) / _MIB
        group = group.parent


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _size(shape: Mapping[str, Any], name: str, default: int = 0) -> int:
    value = shape.get(name)
    return value if isinstance(value, int) else default


def _head_sizes(shape: Mapping[str, Any]) -> tuple[int, int, int]:
    """Attention heads, heads of keys and values, numbers of one head."""
    heads = _size(shape, "num_attention_heads", 1)
    width = _size(shape, "head_dim", _size(shape, "hidden_size") // max(1, heads))
    return heads, _size(shape, "num_key_value_heads", heads), width


def _cache_bytes(config: RunConfig, shape: Mapping[str, Any], *, width: float, opening_tokens: int) -> float:
    if config.engine.kind != "embedded":
        return 0.0  # another process's
    capacity = _FIRST_CAPACITY
    while capacity < opening_tokens:
        capacity *= 2
    _, kv_heads, head_width = _head_sizes(shape)
    numbers = 2 * _size(shape, "num_hidden_layers") * kv_heads * head_width
    return config.engine.max_sequences * capacity * numbers * width


def _adapter_size(config: RunConfig, shape: Mapping[str, Any]) -> int:
    """Numbers of the adapter, at least: of named modules the narrower side, of all the layers' attention and
    two matrices of the MLP."""
    hidden, layers, rank = _size(shape, "hidden_size"), _size(shape, "num_hidden_layers"), config.lora.r
    if config.lora.target_modules != "all-linear":
        return rank * hidden * layers * len(config.lora.target_modules)
    heads, kv_heads, head_width = _head_sizes(shape)
    attention = 2 * (hidden + heads * head_width) + 2 * (hidden + kv_heads * head_width)
    return rank * layers * (attention + 2 * (hidden + _size(shape, "intermediate_size")))


def _tiny_shape(tiny: TinyConfig) -> tuple[Mapping[str, Any], int]:
    """The tiny model as its config.json will say, and its weights."""
    head_width = tiny.hidden_size // tiny.heads
    attention = 2 * tiny.hidden_size * (tiny.heads + tiny.kv_heads) * head_width
    layer = attention + 3 * tiny.hidden_size * tiny.intermediate_size
    shape = {
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.intermediate_size,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": head_width,
        "vocab_size": tiny.vocab_size,
    }
    return shape, tiny.vocab_size * tiny.hidden_size + tiny.layers * layer
