"""The run's configuration: ranges, settings that do not fit together, and the way to YAML and back."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from agentrl.config import (
    AlgorithmConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TinyConfig,
    WarmStartConfig,
    dump_config,
)

_MINIMAL: dict[str, Any] = {"environment": {"id": "calculator"}, "model": {"tiny": {}}}


def _config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(_MINIMAL | sections)


def test_an_environment_and_a_model_are_enough() -> None:
    config = _config()
    assert (config.name, config.rollout.group_size, config.model.tiny) == ("run", 8, TinyConfig())


def test_a_resolved_configuration_loads_back_equal() -> None:
    config = _config(
        optimizer={"schedule": "constant", "betas": [0.9, 0.99], "learning_rate": 1e-5},
        warm_start={"episodes": 64, "steps": 10, "probe_every": 5, "until": 0.5},
        evaluation={"k": [1, 4], "samples": 4, "temperature": 1},
        lora={"target_modules": ["q_proj", "v_proj"]},
    )
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


@given(
    every=st.integers(0, 3),
    temperature=st.sampled_from([0, 1.0]),
    schedule=st.sampled_from(["linear", "constant"]),
)
def test_every_mode_loads_back_equal_though_settings_without_effect_are_refused(
    every: int, temperature: float, schedule: str
) -> None:
    config = _config(
        evaluation={"every": every, "temperature": temperature, "samples": 1},
        optimizer={"schedule": schedule},
        warm_start={"episodes": 32, "steps": 1, "probe_every": every},
    )
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {}, "path and tiny are both missing"),
        (ModelConfig, {"path": "m", "tiny": {}}, "path and tiny are both set"),
        (TinyConfig, {"heads": 4, "kv_heads": 3}, "kv_heads is 3; it must divide heads, 4"),
        (TinyConfig, {"hidden_size": 100, "heads": 8}, "must be a multiple of 2 x heads, 16"),
        (RolloutConfig, {"max_turn_tokens": 64, "max_episode_tokens": 32}, "max_turn_tokens is 64"),
        (RolloutConfig, {"temperature": 0}, "greater than 0"),
        (
            WarmStartConfig,
            {"episodes": 8, "steps": 1},
            "episodes_per_step is 32; it must be at most episodes, 8",
        ),
        (EvaluationConfig, {"k": [1, 8], "samples": 4}, "each must be at most samples, 4"),
        (
            EvaluationConfig,
            {"temperature": 0, "samples": 4},
            "samples is 4, all the same with temperature: 0",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_both_named(
    section: type[BaseModel], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)


@pytest.mark.parametrize(
    ("section", "values", "setting"),
    [
        (WarmStartConfig, {"episodes": 32, "steps": 1, "until": 0.5}, "until"),
        (WarmStartConfig, {"episodes": 32, "steps": 1, "probe_tasks": 8}, "probe_tasks"),
        (OptimizerConfig, {"schedule": "constant", "final_fraction": 0.1}, "final_fraction"),
        (AlgorithmConfig, {"importance_cap": 3}, "importance_cap"),
        (AlgorithmConfig, {"importance": "none", "importance_cap": 3}, "importance_cap"),
        (AlgorithmConfig, {"importance": "truncate", "importance_floor": 0.4}, "importance_floor"),
        (EvaluationConfig, {"curve_tasks": 10}, "curve_tasks"),
        (EvaluationConfig, {"temperature": 0, "samples": 1, "greedy": True}, "greedy"),
        (EvaluationConfig, {"temperature": 0, "samples": 1, "top_p": 0.9}, "top_p"),
    ],
)
def test_a_setting_without_effect_in_its_mode_is_refused(
    section: type[BaseModel], values: dict[str, Any], setting: str
) -> None:
    with pytest.raises(ValidationError, match=f"{setting} has no effect"):
        section.model_validate(values)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"algorithm": {"max_staleness": 1}},
            "max_staleness is 1; it must be 0 with engine.kind: embedded, .* strictly on-policy",
        ),
        (
            {"algorithm": {"max_staleness": 1}, "engine": {"deterministic": True}},
            "max_staleness is 1; it must be 0",
        ),
        (
            {"algorithm": {"minibatches": 9}, "rollout": {"tasks_per_step": 1}},
            "at most the episodes of a step, 8",
        ),
        ({"rollout": {"group_size": 1}}, "every grpo advantage of a group of one is 0"),
        (
            {"rollout": {"group_size": 1}, "algorithm": {"advantage": "rloo", "shuffle_rewards": True}},
            "shuffle_rewards has no effect",
        ),
        ({"steps": 10, "optimizer": {"warmup_steps": 10}}, "must be below steps, 10"),
        ({"environment": {"id": "calculator", "train": "test"}}, "two disjoint splits"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(**sections)


@pytest.mark.parametrize(("kind", "chosen"), [("embedded", "none"), ("vllm", "truncate")])
def test_where_nothing_is_said_only_another_engines_samples_are_corrected(kind: str, chosen: str) -> None:
    config = _config(engine={"kind": kind})
    assert config.algorithm.importance == chosen
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config
    said = _config(engine={"kind": kind}, algorithm={"importance": "mask", "importance_floor": 0.25})
    assert (said.algorithm.importance, said.algorithm.importance_cap) == ("mask", 2.0)
    assert RunConfig.model_validate(yaml.safe_load(dump_config(said))) == said


_SERVER = {"kind": "openai", "url": "http://127.0.0.1:8000/v1", "adapter_dir": "adapters"}


def test_a_kind_of_engine_is_short_for_a_section_of_its_own() -> None:
    assert _config(engine="vllm") == _config(engine={"kind": "vllm"})
    with pytest.raises(ValidationError, match="url is missing: kind: openai needs it"):
        _config(engine="openai")


@pytest.mark.parametrize(
    "engine",
    [
        {"deterministic": True},
        {
            "kind": "vllm",
            "swap": "continue",
            "merge": True,
            "args": {"gpu_memory_utilization": 0.5, "quantization": None},
        },
        {**_SERVER, "model": "base", "api_key_env": "KEY", "request_retries": 0, "backoff_s": 0.5},
    ],
)
def test_every_kind_of_engine_loads_back_equal(engine: dict[str, Any]) -> None:
    config = _config(engine=engine, model={"path": "m"})
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


_OF_ONE_KIND: dict[str, dict[str, Any]] = {
    "embedded": {"deterministic": False},
    "vllm": {"swap": "finish", "merge": True, "share_gpu": False, "gpus": (1,), "args": {}},
    "openai": {
        "url": "http://h/v1",
        "model": "base",
        "dialect": "vllm",
        "api_key_env": "KEY",
        "adapter_dir": "adapters",
        "request_retries": 6,
        "backoff_s": 1.0,
    },
}


@pytest.mark.parametrize("kind", _OF_ONE_KIND)
@pytest.mark.parametrize("owner", _OF_ONE_KIND)
def test_a_setting_of_one_kind_of_engine_is_refused_with_every_other(kind: str, owner: str) -> None:
    url = {"url": "http://h/v1"} if kind == "openai" else {}
    for name, value in _OF_ONE_KIND[owner].items():
        values = {"kind": kind, **url, name: value}
        if kind == owner:
            assert getattr(EngineConfig.model_validate(values), name) == value
            continue
        with pytest.raises(ValidationError, match=f"{name} has no effect with kind: {kind}"):
            EngineConfig.model_validate(values)


def test_every_engine_setting_is_of_one_kind_or_of_all() -> None:
    of_one = {name for names in _OF_ONE_KIND.values() for name in names}
    assert set(EngineConfig.model_fields) - of_one == {"kind", "max_sequences"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {**_SERVER, "adapter_dir": None}}, "engine.adapter_dir is missing"),
        ({"engine": {"kind": "openai", "url": "http://h/v1"}}, "engine.adapter_dir is missing"),
        (
            {"engine": {"kind": "openai", "url": "http://h/v1", "dialect": "openai"}},
            "engine.dialect is 'openai'; training needs vllm",
        ),
        (
            {"engine": _SERVER, "warm_start": {"episodes": 32, "steps": 1}},
            "warm_start can't be used with engine.kind: openai",
        ),
        ({"engine": _SERVER, "model": {"tiny": {}}}, "model.tiny can't be used with engine.kind: openai"),
        ({"engine": _SERVER, "lora": {"train_norms": True}}, "train_norms is true; it must be false with"),
        ({"engine": {"kind": "vllm", "gpus": [1], "share_gpu": True}}, "share_gpu is true; it must be false"),
        ({"engine": "vllm", "lora": {"train_norms": True}}, "with engine.kind: vllm, which serves LoRA's"),
        (
            {"engine": {"kind": "vllm", "share_gpu": True}, "algorithm": {"max_staleness": 1}},
            "engine.share_gpu is true; it must be false with max_staleness",
        ),
    ],
)
def test_what_an_engine_can_not_train_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(**{"model": {"path": "m"}, **sections})


def test_norms_may_be_trained_where_vllm_gets_merged_weights() -> None:
    assert _config(engine={"kind": "vllm", "merge": True}, lora={"train_norms": True}).lora.train_norms


def test_vllm_serves_what_the_run_itself_has_made() -> None:
    config = _config(engine="vllm", warm_start={"episodes": 32, "steps": 1})
    assert (config.engine.kind, config.model.tiny) == ("vllm", TinyConfig())


def test_another_engines_rollouts_may_run_ahead() -> None:
    assert _config(engine={"kind": "vllm"}, algorithm={"max_staleness": 2}).algorithm.max_staleness == 2


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "two words"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        _config(name=name)


def test_types_are_not_coerced() -> None:
    for wrong in ("3", 3.0, True):
        with pytest.raises(ValidationError, match="steps"):
            _config(steps=wrong)


def test_a_section_can_not_be_changed() -> None:
    config = _config()
    with pytest.raises(ValidationError, match="frozen"):
        config.rollout.group_size = 2
