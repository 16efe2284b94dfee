"""The plan is a floor that names its largest part; what there is comes from the machine and its groups."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from agentrl.config import RunConfig
from agentrl.configfile import load_config, packaged_configs
from agentrl.errors import BadConfig
from agentrl.memory import MemoryPlan, available_mib, check_memory, plan_memory
from agentrl.modelfiles import ModelFiles

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
_MODEL = ModelFiles(folder=Path("m"), config=_SHAPE, parameters=1 << 20, stored_bytes=2 << 20)


def _config(*settings: str) -> RunConfig:
    return load_config({"environment": {"id": "calculator"}, "model": {"path": "m"}}, settings)


def _plan(*settings: str, opening_tokens: int = 0) -> MemoryPlan:
    plan = plan_memory(_config(*settings), _MODEL, opening_tokens=opening_tokens)
    assert plan is not None
    return plan


@pytest.mark.parametrize(("dtype", "expected"), [("auto", 2), ("float32", 4), ("bfloat16", 2)])
def test_weights_take_their_number_times_their_width(dtype: str, expected: float) -> None:
    assert _plan(f"model.dtype={dtype}").weights == expected


def test_the_cache_holds_a_row_for_every_sequence_at_its_first_capacity() -> None:
    numbers = 2 * 2 * 2 * 16  # keys and values, layers, kv_heads, head_dim
    assert _plan("engine.max_sequences=64").cache == 64 * 128 * numbers * 2 / 2**20
    assert _plan("engine.max_sequences=64", opening_tokens=129).cache == 64 * 256 * numbers * 2 / 2**20


def test_the_cache_of_an_engine_in_another_process_is_not_counted() -> None:
    server = ("engine.url=http://h/v1", "engine.adapter_dir=adapters")
    assert _plan("engine=vllm", opening_tokens=129).cache == 0
    assert _plan("engine.kind=openai", *server).cache == 0
    assert _plan("engine=vllm").weights == _plan().weights  # the learner's own


def test_the_optimizer_holds_sixteen_bytes_a_number_of_the_adapter() -> None:
    attention, mlp = 2 * (64 + 64) + 2 * (64 + 32), 2 * (64 + 128)
    assert _plan("lora.r=8").optimizer == 16 * 8 * 2 * (attention + mlp) / 2**20
    assert _plan("lora.r=8", "lora.target_modules=[q_proj]").optimizer == 16 * 8 * 64 * 2 / 2**20


def test_a_warm_start_of_all_weights_counts_them_as_trained() -> None:
    plan = _plan("warm_start.episodes=64", "warm_start.steps=1")
    assert (plan.weights, plan.optimizer) == (0, 16)
    assert _plan("warm_start.episodes=64", "warm_start.steps=1", "warm_start.lora=true").weights == 2


def test_logits_are_those_of_a_chunk_where_a_warm_start_trains_the_head_and_else_never_whole() -> None:
    warm = ("warm_start.episodes=64", "warm_start.steps=1", "warm_start.episodes_per_step=4")
    assert _plan(*warm, "batch.logprob_rows=3").logits == 3 * 1000 * 4 / 2**20
    assert _plan(*warm).logits == 4 * 1000 * 4 / 2**20
    assert _plan(*warm, "warm_start.lora=true").logits == 0
    assert _plan().logits == 0


def test_what_config_json_does_not_say_counts_as_nothing() -> None:
    bare = ModelFiles(folder=Path("m"), config={}, parameters=1 << 20, stored_bytes=2 << 20)
    assert plan_memory(_config(), bare) == MemoryPlan(weights=2)


def test_a_model_that_is_not_here_yet_has_no_plan() -> None:
    assert plan_memory(_config(), None) is None


def test_a_plan_that_does_not_fit_names_its_parts_and_what_to_lower() -> None:
    plan = MemoryPlan(weights=100, cache=3000, optimizer=0.2, logits=10)
    check_memory(plan, available=3110.2)
    with pytest.raises(BadConfig) as caught:
        check_memory(plan, available=3110)
    assert str(caught.value) == (
        "there is no memory for this run: it needs at least 3,110 MiB (weights 100, cache 3,000, logits 10) "
        "and 3,110 MiB are available; the largest part is cache: lower engine.max_sequences"
    )


def test_every_packaged_tiny_run_fits_into_a_gigabyte() -> None:
    configs = [load_config(name) for name in packaged_configs()]
    tiny = [config for config in configs if config.model.tiny is not None]
    assert tiny
    for config in tiny:
        plan = plan_memory(config, None)
        assert plan is not None
        check_memory(plan, available=1024)


def _write(path: Path, text: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """A machine with 2,048 MiB available, and this process in a group of a group."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    _write(proc / "meminfo", f"MemTotal: 9 kB\nMemAvailable: {1024 * 1024} kB\nSwapFree: {1024 * 1024} kB")
    _write(proc / "self/cgroup", "0::/outer/inner")
    return proc, cgroups


def test_the_machine_says_what_is_available(machine: tuple[Path, Path]) -> None:
    proc, cgroups = machine
    assert available_mib(proc=proc, cgroups=cgroups) == 2048


def test_the_tightest_control_group_counts_and_its_file_pages_are_free(machine: tuple[Path, Path]) -> None:
    proc, cgroups = machine
    _write(cgroups / "outer/inner/memory.max", "max")
    _write(cgroups / "outer/inner/memory.current", 1)
    _write(cgroups / "outer/memory.max", 512 << 20)
    _write(cgroups / "outer/memory.current", 200 << 20)
    _write(cgroups / "outer/memory.stat", f"anon 1\ninactive_file {100 << 20}")
    assert available_mib(proc=proc, cgroups=cgroups) == 412


def test_where_nobody_says_everything_fits(tmp_path: Path) -> None:
    assert available_mib(proc=tmp_path, cgroups=tmp_path) == math.inf
