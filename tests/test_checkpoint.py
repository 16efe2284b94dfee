"""Checkpoints: there whole or not at all, few of them, and of this run alone."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agentrl.checkpoint import Checkpoints, State, read_adapter, saving_weights, write_adapter
from agentrl.engine import Adapter
from agentrl.errors import BadData, CannotWrite
from agentrl.files import write_folder
from agentrl.resume import Process

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": {"b", "a"}, "task_type": "CAUSAL_LM"}


def adapter(value: float = 1.0) -> Adapter:
    return Adapter(CONFIG, {"base_model.model.x.lora_A.weight": torch.full((2, 3), value)})


def state(step: int, score: float | None = None) -> State:
    process = Process(2, {"torch": "2.11.0"})
    return State(
        step=step, version=step + 1, config="steps: 9\n", tokenizer="ab", process=process, score=score
    )


def save(checkpoints: Checkpoints, step: int, *, value: float = 1.0, score: float | None = None) -> Path:
    moments = {"state": {0: {"exp_avg": torch.full((3,), value)}}, "param_groups": [{"lr": 0.1}]}
    return checkpoints.save(state(step, score), adapter=adapter(value), optimizer=moments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 7, value=0.5)
    assert checkpoints.latest() == path == tmp_path / "step_000007"
    saved = checkpoints.read(path)
    assert (saved.path, saved.state) == (path, state(7))
    assert torch.equal(saved.adapter.tensors["base_model.model.x.lora_A.weight"], torch.full((2, 3), 0.5))
    assert (saved.adapter.config["r"], set(saved.adapter.config["target_modules"])) == (2, {"a", "b"})
    assert torch.equal(saved.optimizer["state"][0]["exp_avg"], torch.full((3,), 0.5))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        save(checkpoints, step)
    assert names(tmp_path) == ["step_000015", "step_000020"]


def test_the_best_is_kept_beside_the_newest_and_the_first_of_equals_is_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.best() is None
    for step, score in ((5, 0.2), (10, 0.7), (15, 0.7), (20, None), (25, 0.1)):
        path = save(checkpoints, step, score=score)
    assert names(tmp_path) == ["step_000010", "step_000025"]
    assert checkpoints.best() == (tmp_path / "step_000010", 0.7)
    assert checkpoints.latest() == path


def test_what_comes_after_the_step_that_is_resumed_is_forgotten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (5, 10, 15):
        save(checkpoints, step)
    (tmp_path / "step_000020.partial").mkdir()
    checkpoints.forget_after(10)
    assert names(tmp_path) == ["step_000005", "step_000010"]


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
    assert names(tmp_path) == ["step_000005", "step_000010", "step_000012"]


def test_a_writer_that_fails_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "state.json").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 5)
    before = (path / "state.json").read_text()
    with pytest.raises(CannotWrite, match=r"step_000005 could not be written: No space left .* --resume"):
        write_folder(path, fail)
    assert (path / "state.json").read_text() == before
    assert checkpoints.latest() == path
    assert names(tmp_path) == ["step_000005"]


def test_a_disk_that_is_full_is_one_clear_error_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    good = save(checkpoints, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))  # the adapter fits, the moments do not
    try:
        with pytest.raises(CannotWrite, match="File too large") as caught:
            save(checkpoints, 10)
        with pytest.raises(OSError, match="too large"), saving_weights():
            save_file({"x": torch.zeros(1000)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert "\n" not in str(caught.value)
    assert checkpoints.latest() == good
    assert names(tmp_path) == ["step_000005"]


def test_a_folder_that_can_not_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(CannotWrite, match="Not a directory"):
        save(Checkpoints(tmp_path / "runs", keep=1), 5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "file", "reported"),
    [
        (cut, "optimizer.pt", r"optimizer.pt has \d+ of \d+ bytes"),
        (cut, "state.json", r"state.json has \d+ of \d+ bytes"),
        (cut, "manifest.json", "manifest.json can't be read"),
        (flip, "adapter_model.safetensors", "adapter_model.safetensors changed"),
        (flip, "adapter_config.json", "adapter_config.json changed"),
        (Path.unlink, "adapter_model.safetensors", "adapter_model.safetensors is missing"),
    ],
)
def test_a_damaged_checkpoint_is_reported_in_a_line_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], file: str, reported: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    good = save(checkpoints, 5)
    for step in (10, 15):
        damage(save(checkpoints, step, score=0.5) / file)
    lines: list[str] = []
    assert checkpoints.latest(on_damage=lines.append) == good
    assert [Path(line.split()[0]).name for line in lines] == ["step_000015", "step_000010"]
    assert all(re.search(reported, line) and "\n" not in line for line in lines)
    checkpoints.forget_after(5)
    assert names(tmp_path) == ["step_000005"]


def test_where_no_checkpoint_is_whole_nothing_is_resumed_and_a_new_one_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    (save(checkpoints, 20) / "optimizer.pt").unlink()
    with pytest.raises(BadData, match=r"step_000020 is damaged \(optimizer.pt is missing\).*remove .*name="):
        checkpoints.latest()
    assert save(checkpoints, 10).is_dir()
    assert names(tmp_path) == ["step_000010", "step_000020"]


def test_a_checkpoint_of_another_version_is_refused_and_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(BadData, match="its format is 99, but 1 is read here.*name="):
        checkpoints.latest()
    (path / "manifest.json").unlink()
    with pytest.raises(BadData, match="its format is none"):
        checkpoints.latest()
    assert (path / "optimizer.pt").is_file()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5, value=1.0)
    path = save(checkpoints, 5, value=2.0)
    assert float(next(iter(checkpoints.read(path).adapter.tensors.values()))[0, 0]) == 2.0
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_000005"]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, adapter())
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="holds no PEFT adapter"):
        read_adapter(tmp_path)
