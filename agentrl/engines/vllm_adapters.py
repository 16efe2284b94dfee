"""Adapters on their way into vLLM: a folder in memory for each, and the proof that vLLM's kernels read it.

Every adapter that is published has a name, an id and a folder that no other ever had: vLLM keys its prefix
cache by the name, so a reload under an old one would be answered from the old weights' cache. Proof is by
SHA-256 of each matrix as the worker must hold it: in the dtype that vLLM serves, B times the scaling.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentrl.checkpoint import write_adapter
from agentrl.engine import Adapter
from agentrl.engines.vllm_worker import digest
from agentrl.errors import BadConfig, WrongWeights
from agentrl.files import writing

__all__ = ["AdapterShelf", "PublishedAdapter", "check_servable"]

_TMPFS = Path("/dev/shm")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter as vLLM is told of it."""

    name: str
    number: int  # vLLM's id
    version: int
    folder: Path
    modules: tuple[str, ...]  # that it adapts, by PEFT's names
    digests: Mapping[str, str]  # of every matrix that is not zero, by "module.A" and "module.B"


def check_servable(config: Mapping[str, Any], *, max_rank: int | None) -> None:
    """Raise BadConfig for an adapter of a PEFT configuration that vLLM's LoRA does not serve."""
    if config.get("modules_to_save"):
        raise BadConfig(
            f"the adapter holds whole modules ({', '.join(config['modules_to_save'])}), which vLLM's LoRA "
            "does not serve; set lora.train_norms to false, or engine.kind to embedded"
        )
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if max_rank is None or rank > max_rank:
        allowed = "started for the bare base" if max_rank is None else f"started for a rank of {max_rank}"
        raise BadConfig(
            f"the adapter's rank is {rank}, and the vLLM engine was {allowed}; start it for the largest rank "
            "that it will serve"
        )


class AdapterShelf:
    """The adapters of one engine, in a folder of their own."""

    def __init__(self) -> None:
        in_memory = os.access(_TMPFS, os.W_OK | os.X_OK)
        parent = _TMPFS if in_memory else None
        with writing(_TMPFS if in_memory else Path(tempfile.gettempdir())):
            self.home = Path(tempfile.mkdtemp(prefix="agentrl-adapters-", dir=parent))
        self._published = 0
        self._versions: dict[str, int] = {}  # by the digest of all of an adapter's digests

    def publish(self, adapter: Adapter, version: int, *, dtype: torch.dtype) -> PublishedAdapter:
        """Write ``adapter`` for an engine that serves it in ``dtype``. Raises CannotWrite, BadConfig."""
        digests = _expected(adapter, dtype)
        self._published += 1
        name = f"{self.home.name}-{self._published}-v{version}"
        folder = self.home / name
        with writing(folder):
            folder.mkdir()
            write_adapter(folder, adapter)
        self._versions[_digest_all(digests)] = version
        modules = tuple(dict.fromkeys(_parse(tensor)[0] for tensor in adapter.tensors))
        return PublishedAdapter(name, self._published, version, folder, modules, digests)

    def prove(self, published: PublishedAdapter, served: Mapping[str, str]) -> None:
        """Raise WrongWeights where ``served``, what a worker read back, is not what was published."""
        wrong = sorted(
            key for key in {*published.digests, *served} if published.digests.get(key) != served.get(key)
        )
        if not wrong:
            return
        of = max(len(served), len(published.digests))
        raise WrongWeights(
            f"vLLM was given version {published.version} of the adapter, and {self._name(served)}: "
            f"{len(wrong)} of the {of} matrices that its kernels read differ, such as {wrong[0]}. Nothing "
            "that it samples may be trained on. Repeat the command with --resume; where it fails again, set "
            "engine.kind to embedded"
        )

    def _name(self, served: Mapping[str, str]) -> str:
        if not served:
            return "it serves the bare base"
        version = self._versions.get(_digest_all(served))
        if version is None:
            known = ", ".join(str(one) for one in sorted(set(self._versions.values()))[-5:])
            return f"what it serves is none of the versions that it was given ({known} of late)"
        return f"it serves version {version}"

    def remove(self, published: PublishedAdapter) -> None:
        """Delete the folder of an adapter that vLLM has forgotten."""
        shutil.rmtree(published.folder, ignore_errors=True)

    def close(self) -> None:
        """Delete all of it; idempotent."""
        shutil.rmtree(self.home, ignore_errors=True)


def _parse(tensor: str) -> tuple[str, str]:
    """The module and the side, A or B, of a tensor of PEFT's. Raises BadConfig for what is none."""
    match = _TENSOR.fullmatch(tensor)
    if match is None:
        raise BadConfig(
            f"the adapter's tensor {tensor!r} is no LoRA matrix of a linear layer, and vLLM can't be proved "
            "to serve it; adapt linear layers only (lora.target_modules: all-linear, lora.train_norms: false)"
        )
    return match["module"], match["side"]


def _expected(adapter: Adapter, dtype: torch.dtype) -> dict[str, str]:
    """What a worker must read back, computed as vLLM does: first the dtype, then the scaling."""
    digests: dict[str, str] = {}
    for tensor, values in adapter.tensors.items():
        module, side = _parse(tensor)
        served: Tensor = values.to("cpu", dtype, copy=True)
        if side == "B" and (scaling := _scaling(adapter.config, module)) != 1:
            served *= scaling
        if bool(served.any()):
            digests[f"{module}.{side}"] = digest(served)
    return digests


def _scaling(config: Mapping[str, Any], module: str) -> float:
    """PEFT's factor of B A for ``module``."""
    rank = _matching(config.get("rank_pattern"), module, config["r"])
    alpha = _matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _matching(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's name from some dot on."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _digest_all(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
