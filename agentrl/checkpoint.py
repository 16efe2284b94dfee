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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agentrl.engine import Adapter
from agentrl.errors import BadConfig, BadData

__all__ = ["Checkpoints", "State", "read_adapter", "write_adapter", "write_folder"]


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
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)
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
                "resumes with the config.yaml in its folder: repeat the command as it was, or start a new "
                "run with name=..."
            )
        optimizer = torch.load(path / "optimizer.pt", weights_only=True)
        return state, read_adapter(path), optimizer

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self._root.glob("step_*/state.json"))


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


def write_folder(path: Path, write: Any) -> None:
    """Have ``write(folder)`` fill a folder that then becomes ``path``, flushed, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for file in (*partial.rglob("*"), partial):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
