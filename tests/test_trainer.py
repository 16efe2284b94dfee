"""A step between engine and learner; whole runs are in test_training.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.engine import Adapter
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.errors import EngineError
from agentrl.learner import Learner


class Lodger(EmbeddedEngine):
    """Shares its GPU with the learner, and writes down who has it."""

    def __init__(self, model: Any, events: list[str]) -> None:
        super().__init__(model, max_sequences=8)
        self._events = events

    async def sleep(self) -> None:
        self._events.append("asleep")

    async def wake(self) -> None:
        self._events.append("awake")

    async def load(self, adapter: Adapter | None, version: int) -> None:
        self._events.append(f"load {version}")
        await super().load(adapter, version)


@pytest.mark.parametrize("shared", [True, False])
def test_an_engine_sleeps_during_the_update_where_it_shares_the_gpu(
    shared: bool, sums: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    async def open_engine(settings: Any, served: Any, **rest: Any) -> Lodger:
        return Lodger(served.model, events)

    update = Learner.update

    def updating(self: Learner, *args: Any, **settings: Any) -> Any:
        events.append("update")
        return update(self, *args, **settings)

    monkeypatch.setattr("agentrl.trainer.open_engine", open_engine)
    monkeypatch.setattr("agentrl.serving.check_engine", lambda config, device: None)
    monkeypatch.setattr(Learner, "update", updating)
    agentrl.train(_config(sums, tiny_checkpoint, tmp_path, engine={"kind": "vllm", "share_gpu": shared}))
    steps = [["asleep", "update", "awake", f"load {version}"] for version in (1, 2)]
    expected = [event for step in steps for event in step if shared or event not in ("asleep", "awake")]
    assert events == expected


@pytest.mark.parametrize(("failures", "retries"), [(1, 1), (2, 1)])
def test_an_engine_that_fails_at_an_adapter_is_asked_again_and_then_ends_the_run(
    failures: int,
    retries: int,
    sums: Any,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Failing(Lodger):
        async def load(self, adapter: Adapter | None, version: int) -> None:
            await super().load(adapter, version)
            if events.count(f"load {version}") <= failures and version == 2:
                raise EngineError("the server is away")

    async def open_engine(settings: Any, served: Any, **rest: Any) -> Lodger:
        return Failing(served.model, events)

    monkeypatch.setattr("agentrl.trainer.open_engine", open_engine)
    config = _config(sums, tiny_checkpoint, tmp_path, retries=retries)
    if failures <= retries:
        agentrl.train(config)
        assert events == ["load 1", "load 2", "load 2"]
    else:
        with pytest.raises(EngineError, match="the server is away; .* the same command and --resume"):
            agentrl.train(config)


def _config(sums: Any, model: Path, output: Path, *, retries: int = 2, **sections: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "steps": 2,
        "output": str(output),
        "environment": {"id": f"{sums.__module__}:{sums.__name__}"},
        "model": {"path": str(model)},
        "rollout": {
            "tasks_per_step": 1,
            "group_size": 2,
            "max_turn_tokens": 4,
            "max_episode_tokens": 384,
            "retries": retries,
        },
        "lora": {"r": 2},
        "algorithm": {"kl": 0.01},  # has every step make an update
        "evaluation": {"tasks": 1, "samples": 1},
        "log": {"trackers": []},
        **sections,
    }
