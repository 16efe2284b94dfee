"""An engine that is stopped while episodes are judged: they are tried again or left out, never scored 0."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from containers import Gate, docker_backend

from agentrl.chats import Chats
from agentrl.config import RolloutConfig
from agentrl.engine import Sampling
from agentrl.registry import make, register
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.sandbox import Backend
from agentrl.types import Group, Trajectory

pytestmark = [pytest.mark.docker, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]

_EPISODES = 8
Roll = Callable[[Callable[[], None]], list[Trajectory]]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with closing(Gate(tmp_path)) as made:
        yield made
    gc.collect()  # the SDK leaves the socket of a connection that is refused or breaks to it


@pytest.fixture
def roll(tokenizer: Any, scripted_engine: Any, gate: Gate, request: pytest.FixtureRequest) -> Iterator[Roll]:
    """Right answers to a task of ``code``, two at a time, judged in containers behind the gate."""
    backend: Backend = docker_backend(base_url=f"unix://{gate.path}", patience_s=20, outage_s=request.param)
    name = f"gated-{gate.path.parent.name}"
    register(name, lambda: backend, "sandbox")
    env = make("code", sandbox=name)
    (answer,) = env.gold(env.tasks("train")[0])
    planned = [
        EpisodePlan(split="train", index=0, sibling=sibling, env_seed=0, seed=sibling)
        for sibling in range(_EPISODES)
    ]

    def play(on_episode: Callable[[], None]) -> list[Trajectory]:
        rollouts = Rollouts(
            lambda: make("code", sandbox=name),
            chat=Chats(tokenizer),
            engine=scripted_engine(answer.content),
            limits=RolloutConfig(max_turn_tokens=2048, max_episode_tokens=8192, retries=1),
            in_flight=2,
        )
        sampling = Sampling(max_tokens=2048, seed=0)
        groups: list[Group] = asyncio.run(rollouts.groups(planned, sampling=sampling, on_episode=on_episode))
        return [trajectory for group in groups for trajectory in group.trajectories]

    yield play
    backend.close()


@pytest.mark.parametrize("roll", [30.0], indirect=True)
def test_episodes_wait_for_an_engine_that_is_restarted(roll: Roll, gate: Gate) -> None:
    done: list[None] = []

    def stop_after_two() -> None:
        done.append(None)
        if len(done) == 2:
            gate.cut()
            threading.Timer(3, gate.reopen).start()

    episodes = roll(stop_after_two)
    assert [(episode.valid, episode.reward) for episode in episodes] == [(True, 1.0)] * _EPISODES


@pytest.mark.parametrize("roll", [0.5], indirect=True)
def test_episodes_that_no_engine_judges_are_left_out_with_the_reason(roll: Roll, gate: Gate) -> None:
    done: list[None] = []

    def stop_after_two() -> None:
        done.append(None)
        if len(done) == 2:
            gate.cut()

    episodes = roll(stop_after_two)
    judged = [episode for episode in episodes if episode.valid]
    assert 2 <= len(judged) < _EPISODES
    assert {episode.reward for episode in judged} == {1.0}
    lost = [episode for episode in episodes if not episode.valid]
    assert all(episode.score is None for episode in lost)
    assert {fault.boundary for episode in lost for fault in episode.faults} == {"sandbox"}
    assert all("Docker engine" in fault.message for episode in lost for fault in episode.faults)
