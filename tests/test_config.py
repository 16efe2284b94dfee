"""The run's configuration: ranges, settings that do not fit together, and the way to YAML and back."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from agentrl.config import (
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
        ({"algorithm": {"max_staleness": 1}}, "strictly on-policy"),
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
