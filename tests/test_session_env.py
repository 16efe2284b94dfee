"""Environments with a sandbox an episode: whose fault it is that something takes long."""

from __future__ import annotations

import pytest

import agentrl
from agentrl.errors import BadConfig


@pytest.mark.parametrize("name", ["python_tool", "workspace"])
def test_a_deadline_that_the_model_could_sleep_past_is_refused(name: str) -> None:
    for late in (2.0, 20.0, 24.9):
        with pytest.raises(BadConfig, match=rf"tool_deadline_s={late:g}\): it is 25 or more.*set seconds"):
            agentrl.make(name, sandbox="process", seconds=20.0, tool_deadline_s=late)
    made = agentrl.make(name, sandbox="process", seconds=20.0, tool_deadline_s=25.0)
    assert made.tools_deadline_s == 25.0


@pytest.mark.parametrize("name", ["python_tool", "workspace"])
def test_the_deadline_is_a_minute_more_than_the_models_seconds(name: str) -> None:
    for settings in ({}, {"tool_deadline_s": None}):
        assert agentrl.make(name, sandbox="process", seconds=7.0, **settings).tools_deadline_s == 67.0
