"""Save and resume: a checkpoint is a folder that is there whole or not at all.

    checkpoints/step_000010/  adapter_config.json, adapter_model.safetensors: an ordinary PEFT adapter
                              optimizer.pt   AdamW's moments
                              state.json     step, adapter version, config digest

Everything random is derived from the seed and the step, so the step is all that a data position needs.
Folders are written aside, flushed and renamed; a folder without ``state.json``, which is written last, is not
a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from agentrl.engine import Adapter
from agentrl.errors import BadConfig, BadData

__all__ = [
    "Checkpoints",
    "State",
    "check_same_configuration",
    "read_adapter",
    "write_adapter",
    "write_folder",
]


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stood."""

    step: int  # steps done
    version: int  # of the adapter
    digest: str  # of the configuration


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root, self._keep = root, keep

    def save(self, state: State, *, adapter: Adapter, optimizer: Mapping[str, Any]) -> Path:
        """Write one, then remove all but the newest ``keep``."""

        def write(folder: Path) -> None:
            write_adapter(folder, adapter)
            torch.save(dict(optimizer), folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(asdict(state)))

        path = self._root / f"step_{state.step:06d}"
        write_folder(path, write)
        for old in (*self._complete()[: -self._keep], *self._root.glob(f"*{_PARTIAL}")):
            _remove_folder(old)
        return path

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self._complete()), None)

    def read(self, path: Path, *, digest: str) -> tuple[State, Adapter, dict[str, Any]]:
        """State, adapter and optimizer state. Raises BadConfig where the run was configured otherwise."""
        state = State(**json.loads((path / "state.json").read_text()))
        if state.digest != digest:
            raise BadConfig(
                f"{path} was written under another configuration ({state.digest}, now {digest}); a run "
                "resumes with the one that it began with: repeat the command as it was, or start a new run "
                "with name=..."
            )
        optimizer = torch.load(path / "optimizer.pt", weights_only=True)
        return state, read_adapter(path), optimizer

    def _complete(self) -> list[Path]:
        """By step; what has no ``state.json``, or was not renamed yet, is no checkpoint."""
        folders = (path.parent for path in self._root.glob("step_*/state.json"))
        return sorted(folder for folder in folders if folder.suffix != _PARTIAL)


def check_same_configuration(path: Path, text: str) -> None:
    """Raises BadConfig, naming the keys, where the configuration ``text`` (YAML) is not the one in ``path``.

    Nothing is wrong where there is no ``path`` yet.
    """
    if not path.is_file():
        return
    before, now = (dict(_flat(yaml.safe_load(given))) for given in (path.read_text("utf-8"), text))
    differing = [
        f"{key} was {before.get(key, 'not set')!r} and is {now.get(key, 'not set')!r}"
        for key in {**before, **now}
        if before.get(key, _MISSING) != now.get(key, _MISSING)
    ]
    if differing:
        raise BadConfig(
            f"{path.parent} can't be resumed with another configuration: {'; '.join(differing)}. Repeat the "
            "command as it was, or start a new run with name=..."
        )


_MISSING = object()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write ``adapter`` the way PEFT does, so that ``PeftModel.from_pretrained(model, folder)`` loads it."""
    from safetensors.torch import save_file

    save_file(dict(adapter.tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in adapter.config.items()
    }
    text = json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text)


def read_adapter(folder: str | Path) -> Adapter:
    """The PEFT adapter in ``folder``. Raises BadData where there is none."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadData(
            f"{folder} holds no PEFT adapter; it should have adapter_config.json and "
            "adapter_model.safetensors"
        )
    config = PeftConfig.from_pretrained(str(folder)).to_dict()
    return Adapter(config, load_file(folder / "adapter_model.safetensors"))


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write(folder)`` fill a folder that then becomes ``path``, flushed, whole or not at all."""
    partial = path.with_name(path.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for file in (*partial.rglob("*"), partial):
        _flush(file)
    _remove_folder(path)
    partial.rename(path)
    _flush(path.parent)


_PARTIAL = ".partial"  # of a folder that is being written or removed


def _remove_folder(path: Path) -> None:
    """Remove ``path`` if it is there; a kill leaves it whole or under a name that nothing reads."""
    if not path.exists():
        return
    leaving = path if path.suffix == _PARTIAL else path.with_name(f"{path.name}.old{_PARTIAL}")
    if leaving != path:
        shutil.rmtree(leaving, ignore_errors=True)
        path.rename(leaving)
    shutil.rmtree(leaving)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
