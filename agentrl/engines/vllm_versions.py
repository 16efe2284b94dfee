"""How a version of the policy gets into vLLM's core, and the record that proves which one is there.

Two ways: as an adapter beside the base (``vllm_adapters``), or merged into its weights (``vllm_merged``).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from agentrl.engine import Adapter
from agentrl.engines.vllm_core import Core, PublishedAdapter
from agentrl.errors import WrongWeights
from agentrl.files import writing

__all__ = ["Ledger", "Versions", "make_home"]

_TMPFS = Path("/dev/shm")


class Versions(Protocol):
    """One way for versions to get into a core, in the engine's order: one at a time."""

    home: Path  # a folder of this engine's own
    in_place: bool  # whether a version takes the place of the one before, which nothing may be using then

    def check(self, adapter: Adapter) -> None:
        """Raise BadConfig for an adapter that can't be served this way."""
        ...

    async def put(self, core: Core, adapter: Adapter | None, version: int) -> PublishedAdapter | None:
        """Have ``core`` serve ``adapter`` (None: the bare base) to the requests that name what is returned
        (None: to those that name nothing), and prove that it does.

        Raises WrongWeights, BadConfig, CoreDied. The version before is served then: by ``core``, or, where it
        was to be replaced in place, by the next one, as ``core`` is stopped.
        """
        ...

    async def take_back(self, core: Core, published: PublishedAdapter) -> None:
        """Have ``core``, dead or alive, forget what nothing is using any more."""
        ...

    def close(self) -> None:
        """Delete the folder; idempotent."""
        ...


class Ledger:
    """The digests of every version that was given to vLLM, by what its kernels read: matrices, by name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # of versions, by the digest of all of their digests

    def enter(self, digests: Mapping[str, str], name: str) -> None:
        """Note that ``name`` has ``digests``."""
        key = _digest_all(digests)
        self._names.pop(key, None)  # to the end: the last ones are told of
        self._names[key] = name

    def prove(self, given: str, digests: Mapping[str, str], served: Mapping[str, str]) -> None:
        """Raise WrongWeights where ``served``, what a worker read back, is not ``digests``, those of what
        vLLM was ``given``."""
        wrong = sorted(key for key in {*digests, *served} if digests.get(key) != served.get(key))
        if not wrong:
            return
        of = max(len(served), len(digests))
        raise WrongWeights(
            f"vLLM was given {given}, and {self._find(served)}: {len(wrong)} of the {of} "
            f"matrices that its kernels read differ, such as {wrong[0]}. Nothing that it samples may be "
            "trained on. Repeat the command with --resume; where it fails again, set engine.kind to embedded"
        )

    def _find(self, served: Mapping[str, str]) -> str:
        name = self._names.get(_digest_all(served))
        if name is None:
            known = ", ".join(list(self._names.values())[-5:])
            return f"what it serves is none of the versions that it was given ({known} of late)"
        return f"it serves {name}"


def _digest_all(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def make_home() -> Path:
    """A new folder, in memory where the host has a place for that. Raises CannotWrite."""
    in_memory = os.access(_TMPFS, os.W_OK | os.X_OK)
    with writing(_TMPFS if in_memory else Path(tempfile.gettempdir())):
        return Path(tempfile.mkdtemp(prefix="agentrl-adapters-", dir=_TMPFS if in_memory else None))
