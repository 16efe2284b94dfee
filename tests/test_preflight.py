"""What a plan is checked for; its errors as a user sees them are in test_input_errors.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentrl import registry
from agentrl.config import RunConfig
from agentrl.configfile import load_config
from agentrl.env import Env
from agentrl.errors import BadConfig, BadData
from agentrl.files import check_writable
from agentrl.preflight import check_run, check_splits
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task


class Endless(ToolEnv):
    """A stream of tasks without an end."""

    reward = "exact"

    def tasks(self, split: str) -> Iterator[Task]:
        number = 0
        while True:
            yield Task(id=f"{split}-{number}", prompt=(Message("user", "x" * (number % 7)),))
            number += 1

    def gold(self, task: Task) -> tuple[Message, ...]:
        return ()


def _config(env: str, tmp_path: Path, model: Path) -> RunConfig:
    return load_config(
        {"environment": {"id": env}, "model": {"path": str(model)}, "output": str(tmp_path / "new" / "runs")},
        ["rollout.max_episode_tokens=512", "batch.tokens_per_microbatch=512"],
    )


def test_a_sound_plan_passes_and_nothing_is_written(tmp_path: Path, tiny_checkpoint: Path) -> None:
    check_run(_config("calculator", tmp_path, tiny_checkpoint))
    assert not list(tmp_path.iterdir())


def test_a_stream_without_an_end_is_looked_at_and_not_exhausted(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._registered["environment"], "endless", Endless)
    check_run(_config("endless", tmp_path, tiny_checkpoint))


def test_the_packaged_quickstart_passes(tmp_path: Path) -> None:
    check_run(load_config("quickstart", [f"output={tmp_path}"]))


def test_every_split_that_is_named_must_have_tasks(sums: type[Env]) -> None:
    check_splits(sums(), ("train", "test"))
    with pytest.raises(BadData, match="no split 'dev'"):
        check_splits(sums(), ("train", "dev"))


def test_a_folder_that_is_yet_to_be_made_may_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", key="output")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="set output to a folder"):
        check_writable(tmp_path / "file", key="output")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["engine=vllm", "engine.args.dtype=half"], "engine.args.dtype can't be set: set model.dtype"),
        (["engine=vllm", "lora.r=1024"], "lora.r is 1024; vLLM serves adapters of a rank of at most 512"),
        (["engine=vllm", "engine.merge=true"], "engine.merge is true, and this vLLM runs on a CPU"),
        (["engine=vllm", "rollout.temperature=2.5"], "the temperature is 2.5; vLLM samples at 0"),
        (
            ["engine.kind=openai", "engine.url=ftp://h", "engine.adapter_dir=/tmp"],
            "the server's url is 'ftp://h'",
        ),
        (
            ["engine.kind=openai", "engine.url=http://h", "engine.adapter_dir=/tmp"]
            + ["engine.api_key_env=AGENTRL_NO_SUCH_KEY"],
            "the environment variable AGENTRL_NO_SUCH_KEY",
        ),
    ],
)
def test_what_an_engine_would_refuse_is_refused_before_anything_is_done(
    changes: list[str], message: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    values = {
        "environment": {"id": "calculator"},
        "model": {"path": str(tiny_checkpoint)},
        "output": str(tmp_path),
    }
    with pytest.raises(BadConfig, match=re.escape(message)):
        check_run(load_config(values, changes))
