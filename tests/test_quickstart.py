"""The quickstart as a newcomer runs it: minutes long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import agentrl
from agentrl.configfile import load_config
from agentrl.registry import make

pytestmark = pytest.mark.slow


def test_rewards_make_a_good_agent_of_a_weak_one(tmp_path: Path) -> None:
    agentrl.train("quickstart", overrides=[f"output={tmp_path}"])
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    before, after = summary["before"]["pass@1"], summary["after"]["pass@1"]
    assert summary["tasks"] >= 500
    assert 0.15 <= before["value"] <= 0.60
    assert after["value"] >= 0.85
    assert summary["gain"]["pass@1"]["low"] >= 0.25
    assert after["value"] - before["value"] >= 0.30
    assert (tmp_path / "quickstart" / "curve.png").stat().st_size > 10_000


def test_no_held_out_problem_is_among_those_that_the_quickstart_trains_on() -> None:
    config = load_config("quickstart")
    env = make(config.environment.id, **config.environment.args)
    # Whatever its wording, a problem is its start and its steps.
    problems = {
        split: {
            (task.truth["start"], tuple(task.truth["steps"])) for task in list(env.task_list(split))[:20_000]
        }
        for split in ("train", "test")
    }
    assert len(problems["test"]) > 500
    assert not problems["train"] & problems["test"]
