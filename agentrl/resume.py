"""What a resumed run must have in common with the run that began: its configuration and its process.

Every random number, the order of the tasks and the learning rate are derived from the configuration's seed
and the step, so no generator's state and no position is kept: a step that a kill cut off is done again, to
the same numbers. Sums on a CPU also depend on the number of threads, which is restored, and on the versions
of the libraries and the kind of processor, which are compared.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

from agentrl.errors import BadConfig, did_you_mean

__all__ = ["Process", "accepted_changes", "tokenizer_digest"]

# By key or section. They change no number of the run, only where it is kept and who else is told.
_FREE = ("name", "output", "checkpoint", "log")
# They made the base and the adapter, which are there: another value would have no effect or would not fit.
_FIXED = ("lora", "model.tiny", "warm_start")


@dataclass(frozen=True, slots=True)
class Process:
    """What the numbers of a process depend on beside the configuration."""

    threads: int  # that torch's sums on a CPU are split over
    versions: Mapping[str, str]  # of the libraries, the processor and the accelerator, by name

    @classmethod
    def current(cls) -> Process:
        """This process as it is; the threads are the calling thread's, since each has a number of its own."""
        versions = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        }
        return cls(torch.get_num_threads(), versions)

    @classmethod
    def from_json(cls, text: str) -> Process:
        """What ``to_json`` gave."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """As one object."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def restore_threads(self) -> int:
        """Have the sums of the calling thread, and of those to come, split as they were; how they were
        until now."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        return before

    def differences(self, now: Process) -> list[str]:
        """``torch was 2.11.0 and is 2.12.0``, for each version that differs."""
        return [
            f"{name} was {version} and is {now.versions.get(name, 'gone')}"
            for name, version in self.versions.items()
            if version != now.versions.get(name)
        ]


def accepted_changes(root: Path, before: str, now: str, *, accept: Sequence[str]) -> list[str]:
    """The keys, accepted by name or by section in ``accept``, in which two configurations (YAML) differ.

    Keys that change no number (``name``, ``output``, ``checkpoint``, ``log``) may always differ and are left
    out. Raises BadConfig for any other that is not accepted or that can't change within the run in ``root``.
    """
    old, new = (dict(_flat(yaml.safe_load(text))) for text in (before, now))
    for place in accept:
        if place != "tokenizer" and not any(_is_in(key, [place]) for key in {**old, **new}):
            raise BadConfig(
                f"accept names {place!r}, which is no setting{did_you_mean(place, {**old, **new})}; name "
                "keys or sections in which the configuration may differ"
            )
    changed = [key for key in {**old, **new} if not _is_in(key, _FREE) and not _equal(key, old, new)]
    fixed = [key for key in changed if _is_in(key, _FIXED)]
    refused = [key for key in changed if key not in fixed and not _is_in(key, accept)]
    if not fixed and not refused:
        return changed
    ways = "repeat the command as it was, or start a new run with name=..."
    if not fixed:
        ways = f"add --accept {','.join(dict.fromkeys((*accept, *refused)))} if it is meant to, {ways}"
    reason = " (what it made is there and can't change within a run)"
    differing = "; ".join(_describe(key, old, new) + reason * (key in fixed) for key in (*fixed, *refused))
    raise BadConfig(f"{root} can't be resumed with another configuration: {differing}. To go on, {ways}")


def tokenizer_digest(tokenizer: Any) -> str:
    """64 hex digits that differ whenever a text's ids or a conversation's rendering may."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else backend.to_str()
    text = json.dumps([content, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_in(key: str, places: Sequence[str]) -> bool:
    """Whether ``key`` is one of ``places`` or lies in a section that is."""
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _equal(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return key in old and key in new and bool(old[key] == new[key])


def _describe(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"{key} was {old.get(key, 'not set')!r} and is {new.get(key, 'not set')!r}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
