"""code through the real loop: a few steps train; a sandbox that falls over is counted and never scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trusting

import agentrl
from agentrl.errors import TooManyInvalid
from agentrl.log import RunFolder, read_rows


def settings(output: Path, sandbox: str, **rollout: Any) -> dict[str, Any]:
    """Two steps over the bundled suite that take seconds."""
    tiny = {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "texts": 40}
    return {
        "name": "code",
        "steps": 2,
        "output": str(output),
        "environment": {"id": "code", "args": {"sandbox": sandbox, "mode": "fraction"}},
        "model": {"tiny": tiny},
        "rollout": {
            "tasks_per_step": 2,
            "group_size": 2,
            "max_turn_tokens": 8,
            "max_episode_tokens": 1400,
            **rollout,
        },
        "lora": {"r": 2},
        "engine": {"max_sequences": 4},
        "evaluation": {"tasks": 2, "samples": 1, "k": [1]},
        "log": {"trackers": []},
    }


def metrics(output: Path) -> list[Any]:
    """Of the steps."""
    return [row for row in read_rows(RunFolder(output / "code")) if "fault/sandbox" in row]


def test_a_few_steps_train_on_the_bundled_suite(tmp_path: Path) -> None:
    agentrl.train(settings(tmp_path, "trusting:Trusting"))
    rows = metrics(tmp_path)
    assert [row["fault/sandbox"] for row in rows] == [0, 0]
    assert all(row["episode/valid"] == 1 for row in rows)


def test_a_sandbox_that_falls_over_is_healed_by_another_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trusting.Losing, "loses", staticmethod(lambda number: number % 23 == 5))
    agentrl.train(settings(tmp_path, "trusting:Losing"))
    rows = metrics(tmp_path)
    assert sum(row["fault/sandbox"] for row in rows) > 0
    assert all(row["episode/valid"] == 1 for row in rows)


def test_where_no_sandbox_is_left_episodes_are_invalid_and_none_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "code" / "base"  # made of gold episodes, judged too: the storm comes after
    monkeypatch.setattr(trusting.Losing, "loses", staticmethod(lambda number: base.exists()))
    with pytest.raises(TooManyInvalid, match="4 of 4 .* at the boundary 'sandbox'.*fell over"):
        agentrl.train(settings(tmp_path, "trusting:Losing", retries=1))
