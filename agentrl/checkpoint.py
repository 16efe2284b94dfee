"""Save and resume: a checkpoint is a folder that is there whole or not at all.

    checkpoints/step_000010/  adapter_config.json, adapter_model.safetensors: an ordinary PEFT adapter
                              optimizer.pt   AdamW's moments
                              state.json     step, adapter version, configuration, tokenizer, process, score
                              manifest.json  this format's version; size and SHA-256 of every other file

Checkpoints lie between steps. What a resumed run needs beside them is derived from the seed and the step
(see agentrl.resume). Folders are written aside, flushed and renamed. One that was damaged later does not fit
its manifest: it is reported and the one before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agentrl.engine import Adapter
from agentrl.errors import BadData
from agentrl.files import PARTIAL, remove_folder, write_folder
from agentrl.resume import Process

__all__ = ["Checkpoints", "Saved", "State", "read_adapter", "saving_weights", "write_adapter"]

_FORMAT = 1  # of the folder; another version's is refused, not guessed at
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a run stood."""

    step: int  # steps done
    version: int  # of the adapter
    config: str  # resolved, YAML
    tokenizer: str  # agentrl.resume.tokenizer_digest
    process: Process
    score: float | None = None  # held-out pass@k at this step, of the smallest k; None where not measured


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was read back."""

    path: Path
    state: State
    adapter: Adapter
    optimizer: dict[str, Any]  # AdamW's state


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(self, root: Path, *, keep: int) -> None:
        """``keep`` of the newest stay, and the first of those with the best score."""
        self._root, self._keep = root, keep

    def save(self, state: State, *, adapter: Adapter, optimizer: Mapping[str, Any]) -> Path:
        """Write one, then remove those that are not kept. Raises CannotWrite, and has removed none then."""

        def write(folder: Path) -> None:
            write_adapter(folder, adapter)
            # In memory first: torch's writer reports a full disk as a RuntimeError. No view of that memory:
            # where writing it failed, Python 3.12.1 crashed when it collected both.
            moments = io.BytesIO()
            torch.save(dict(optimizer), moments)
            (folder / "optimizer.pt").write_bytes(moments.getvalue())
            (folder / "state.json").write_text(json.dumps(asdict(state), indent=2))
            files = {file.name: _measure(file) for file in sorted(folder.iterdir())}
            (folder / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2))

        path = self._root / f"step_{state.step:06d}"
        write_folder(path, write)
        self._tidy(written=path)
        return path

    def latest(self, *, on_damage: Callable[[str], object] = lambda line: None) -> Path | None:
        """The newest whole checkpoint; ``on_damage`` is told of each newer one that is not, in one line.

        None where there is none at all. Raises BadData where it is of another version of the format, and
        where none is whole: what the run did would be done again and written over.
        """
        damage = ""
        for path in reversed(self._folders()):
            if damage:
                on_damage(f"{damage} and left out; a checkpoint before it is used")
            damage = _find_damage(path)
            if not damage:
                return path
            damage = f"{path} is damaged ({damage})"
        if damage:
            raise BadData(
                f"{damage}, and there is no whole checkpoint before it; put one back, remove {self._root} to "
                "begin again after the warm start, or start a new run with name=..."
            )
        return None

    def read(self, path: Path) -> Saved:
        """A whole checkpoint, in this process's memory whatever device wrote it."""
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        return Saved(path, _read_state(path), read_adapter(path), optimizer)

    def forget_after(self, step: int) -> None:
        """Remove what a run that goes on behind ``step`` is going to do again, and what is not kept."""
        for path in self._folders():
            if path.name > f"step_{step:06d}":
                remove_folder(path)
        self._tidy()

    def best(self) -> tuple[Path, float] | None:
        """The first checkpoint with the highest score, and that score; None where none has one."""
        scored = ((path, _read_score(path)) for path in self._folders())
        known = [(path, score) for path, score in scored if score is not None]
        return max(known, key=lambda one: one[1], default=None)

    def _folders(self) -> list[Path]:
        """By step, damaged ones included; what was not renamed yet is none."""
        return sorted(path for path in self._root.glob("step_*") if path.suffix != PARTIAL)

    def _tidy(self, *, written: Path | None = None) -> None:
        """Remove all but the newest, the best and the one just written, and what a kill left half written."""
        best = self.best()
        ours = [path for path in self._folders() if (path / _MANIFEST).is_file()]
        kept = {*ours[-self._keep :], *((best[0],) if best else ()), written}
        for path in (*ours, *self._root.glob(f"*{PARTIAL}")):
            if path not in kept:
                remove_folder(path)


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _find_damage(path: Path) -> str:
    """What does not fit the manifest, "" where all does. Raises BadData for another version's folder."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        found, files = manifest["format"], dict(manifest["files"])
    except FileNotFoundError:
        if not (path / "state.json").is_file():
            return f"{_MANIFEST} is missing"
        found, files = "none", {}
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} can't be read"
    if found != _FORMAT:
        raise BadData(
            f"{path} is a checkpoint of another version: its format is {found}, but {_FORMAT} is read here. "
            "Go on with the agentrl that wrote it, or start a new run with name=..."
        )
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        measured = _measure(path / name)
        if measured != expected:
            sizes = measured["bytes"], expected["bytes"]
            return f"{name} has {sizes[0]} of {sizes[1]} bytes" if sizes[0] != sizes[1] else f"{name} changed"
    return ""


def _read_state(path: Path) -> State:
    values = json.loads((path / "state.json").read_text())
    return State(**{**values, "process": Process(**values["process"])})


def _read_score(path: Path) -> float | None:
    """None also where damage, which is no matter until the checkpoint is read, hides it."""
    try:
        return _read_state(path).score
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write ``adapter`` the way PEFT does, so that ``PeftModel.from_pretrained(model, folder)`` loads it."""
    from safetensors.torch import save

    (folder / "adapter_model.safetensors").write_bytes(save(dict(adapter.tensors), {"format": "pt"}))
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in adapter.config.items()
    }
    text = json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text)


def read_adapter(folder: str | Path) -> Adapter:
    """The PEFT adapter in ``folder``. Raises BadData where there is none, or one that can't be read."""
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadData(
            f"{folder} holds no PEFT adapter; it should have adapter_config.json and "
            "adapter_model.safetensors"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder)).to_dict()
        return Adapter(config, load_file(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:  # each from one of its files
        reason = str(error).partition("\n")[0]
        raise BadData(
            f"the adapter in {folder} can't be read ({type(error).__name__}: {reason}); copy its "
            "adapter_config.json and adapter_model.safetensors again"
        ) from error


@contextmanager
def saving_weights() -> Iterator[None]:
    """Turns what safetensors raises for a disk that refuses its file into the OSError that it stands for."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
