"""Wrappers: text in and out, whole conversations, recordings; nested, awaited, and made by Gymnasium."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from agentrl.env import Env
from agentrl.reward import Evidence
from agentrl.tool_env import ToolEnv
from agentrl.tools import tool
from agentrl.transcript import message_from_json
from agentrl.types import Message, Task, ToolCall
from agentrl.wrappers import FullHistory, LanguageWrapper, RecordTrajectory, TextAction, TextObservation


class Door(ToolEnv):
    """Look, then say what was seen."""

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id="door", prompt=(Message("user", "What do you see?"),))]

    def reward(self, evidence: Evidence) -> float:
        return float(evidence.answer == "a door")

    @tool
    def look(self) -> str:
        """Look around."""
        return "a door"


LOOK = Message("assistant", "", (ToolCall(id="1", name="look", arguments={}),))
SEEN = Message("tool", "a door", tool_call_id="1", name="look")


def parse(text: str) -> Message:
    return LOOK if text == "look" else Message("assistant", text)


def test_text_becomes_the_assistants_message() -> None:
    env = TextAction(Door())
    env.reset(seed=0)
    assert "a door" in env.action_space
    assert env.action_space.sample() in env.action_space
    assert env.step("a door")[1] == 1.0
    assert env.unwrapped.messages[-1] == Message("assistant", "a door")  # type: ignore[attr-defined]


def test_a_parser_can_make_calls_of_text() -> None:
    env = TextAction(Door(), parse=parse)
    env.reset(seed=0)
    assert env.step("look")[0] == (SEEN,)


def test_full_history_shows_the_whole_conversation() -> None:
    env = FullHistory(Door())
    question = Message("user", "What do you see?")
    assert env.reset(seed=0)[0] == (question,)
    assert env.step(LOOK)[0] == (question, LOOK, SEEN)


def test_text_observation_shows_roles_and_is_cut_to_its_space() -> None:
    env = TextObservation(Door(), max_chars=12)
    opening, _ = env.reset(seed=0)
    assert opening == "user: What d"
    assert env.step(LOOK)[0] == "tool: a door"
    assert opening in env.observation_space


def test_a_recording_holds_every_episode_that_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "episodes.jsonl"
    env = RecordTrajectory(Door(), path=path)
    env.reset(seed=0)
    env.step(LOOK)
    env.reset(seed=0)  # the first episode was left unfinished
    env.step(LOOK)
    env.step(Message("assistant", "a door"))
    env.reset(seed=0)
    env.truncate("length", Message("assistant", "é\ud800"))
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (first["task_id"], first["rewards"], first["stop_reason"]) == ("door", [0.0, 1.0], "answered")
    assert [message_from_json(message) for message in first["messages"]][1:3] == [LOOK, SEEN]
    assert (second["rewards"], second["stop_reason"]) == ([0.0], "length")
    assert second["messages"][-1]["content"] == "é?"


def nested(env: gymnasium.Env[Any, Any]) -> LanguageWrapper:
    return TextObservation(FullHistory(TextAction(env, parse=parse)))


def test_wrappers_nest_and_are_awaited() -> None:
    async def episode() -> Any:
        env = nested(Door())
        env.reset(seed=0)
        await env.astep("look")
        return await env.atruncate("context", "a door")

    text, reward, terminated, truncated, info = asyncio.run(episode())
    assert text.startswith("user: What do you see?\nassistant: \ntool: a door\nassistant: a door")
    assert (reward, terminated, truncated, info["stop_reason"]) == (0.0, False, True, "context")


def test_around_gymnasiums_own_wrappers_awaiting_still_works() -> None:
    async def episode() -> Any:
        env = nested(gymnasium.wrappers.TimeLimit(Door(), 1))
        env.reset(seed=0)
        return await env.astep("look"), await env.atruncate("context")

    stepped, cut = asyncio.run(episode())
    assert stepped[3] is True  # TimeLimit was not passed by
    assert cut[4]["stop_reason"] == "context"


@pytest.mark.parametrize("wrap", [TextAction, FullHistory, TextObservation])
def test_gymnasium_makes_an_environment_with_its_wrappers_again(wrap: type[LanguageWrapper]) -> None:
    wrapped = wrap(gymnasium.make("agentrl/Calculator-v0"))
    spec = wrapped.spec
    assert spec is not None
    again = gymnasium.make(spec)
    assert type(again) is wrap
    assert isinstance(again.unwrapped, Env)
    assert again.reset(seed=3)[0] == wrapped.reset(seed=3)[0]
