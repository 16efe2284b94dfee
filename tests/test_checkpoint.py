"""Checkpoints: there whole or not at all, few of them, and of this run alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from agentrl.checkpoint import (
    Checkpoints,
    State,
    check_same_configuration,
    read_adapter,
    write_adapter,
    write_folder,
)
from agentrl.engine import Adapter
from agentrl.errors import BadConfig, BadData

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": {"b", "a"}, "task_type": "CAUSAL_LM"}


def adapter(value: float = 1.0) -> Adapter:
    return Adapter(CONFIG, {"base_model.model.x.lora_A.weight": torch.full((2, 3), value)})


def save(checkpoints: Checkpoints, step: int, *, value: float = 1.0) -> Path:
    moments = {"state": {0: {"exp_avg": torch.full((3,), value)}}, "param_groups": [{"lr": 0.1}]}
    return checkpoints.save(State(step, step + 1, "digest"), adapter=adapter(value), optimizer=moments)


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 7, value=0.5)
    assert checkpoints.latest() == path == tmp_path / "step_000007"
    state, read, optimizer = checkpoints.read(path, digest="digest")
    assert state == State(step=7, version=8, digest="digest")
    assert torch.equal(read.tensors["base_model.model.x.lora_A.weight"], torch.full((2, 3), 0.5))
    assert (read.config["r"], set(read.config["target_modules"])) == (2, {"a", "b"})
    assert torch.equal(optimizer["state"][0]["exp_avg"], torch.full((3,), 0.5))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        save(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000015", "step_000020"]


def test_there_is_no_latest_of_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere", keep=1).latest() is None


def test_a_folder_that_was_not_finished_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    good = save(checkpoints, 5)
    # Killed before the rename, with every file written; killed while an old one was removed; a stranger's.
    for name in ("step_000010.partial", "step_000003.old.partial"):
        write_folder(tmp_path / "step_000009", lambda folder: (folder / "state.json").write_text("{}"))
        (tmp_path / "step_000009").rename(tmp_path / name)
    (tmp_path / "step_000012").mkdir()
    (tmp_path / "step_000012" / "optimizer.pt").touch()
    assert checkpoints.latest() == good
    save(checkpoints, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000005", "step_000010", "step_000012"]


def test_a_writer_that_fails_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "state.json").write_text("half")
        raise OSError("no space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 5)
    before = (path / "state.json").read_text()
    with pytest.raises(OSError, match="no space"):
        write_folder(path, fail)
    assert (path / "state.json").read_text() == before
    assert checkpoints.latest() == path


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5, value=1.0)
    path = save(checkpoints, 5, value=2.0)
    assert float(next(iter(checkpoints.read(path, digest="digest")[1].tensors.values()))[0, 0]) == 2.0
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_000005"]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, adapter())
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = save(checkpoints, 1)
    with pytest.raises(BadConfig, match=r"another configuration \(digest, now other\).*name="):
        checkpoints.read(path, digest="other")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="holds no PEFT adapter"):
        read_adapter(tmp_path)


def test_the_keys_that_differ_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = "steps: 4\nlora: {r: 2, alpha: 4}\nenvironment: {id: x, args: {levels: [1, 2]}}\n"
    check_same_configuration(path, text)  # nothing is there yet
    path.write_text(text)
    check_same_configuration(
        path,
        json.dumps(
            {"environment": {"args": {"levels": [1, 2]}, "id": "x"}, "steps": 4, "lora": {"alpha": 4, "r": 2}}
        ),
    )
    other = "steps: 4\nlora: {r: 8, alpha: 4}\nenvironment: {id: x, args: {levels: [1], seed: 3}}\n"
    with pytest.raises(BadConfig) as caught:
        check_same_configuration(path, other)
    text = str(caught.value)
    for part in (
        "lora.r was 2 and is 8",
        "args.levels was [1, 2] and is [1]",
        "args.seed was 'not set' and is 3",
    ):
        assert part in text
    assert "alpha" not in text
    assert "steps" not in text
