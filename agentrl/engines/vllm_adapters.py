"""Adapters on their way into vLLM: a folder in memory for each, and the proof that vLLM's kernels read it.

Every adapter that is published has a name, an id and a folder that no other ever had: vLLM keys its prefix
cache by the name, so a reload under an old one would be answered from the old weights' cache. Proof is by
SHA-256 of each matrix as the worker must hold it: in the dtype that vLLM serves, B times the scaling.
"""

from __future__ import annotations

import shutil
from contextlib import suppress

import torch
from torch import Tensor

from agentrl.checkpoint import write_adapter
from agentrl.engine import Adapter
from agentrl.engines.vllm_core import Core, CoreDied, PublishedAdapter
from agentrl.engines.vllm_versions import Ledger, make_home
from agentrl.engines.vllm_worker import digest
from agentrl.errors import BadConfig
from agentrl.files import writing
from agentrl.merging import lora_matrix, scaling
from agentrl.threads import in_thread

__all__ = ["AdapterShelf"]


class AdapterShelf:
    """The adapters of one engine: :class:`agentrl.engines.vllm_versions.Versions` beside the base."""

    in_place = False

    def __init__(self, *, max_rank: int | None) -> None:
        """``max_rank``: the largest that vLLM was started for; None: for the bare base."""
        self.home = make_home()
        self._max_rank, self._published = max_rank, 0
        self._ledger = Ledger()
        self._ledger.enter({}, "the bare base")

    def check(self, adapter: Adapter) -> None:
        """Raise BadConfig for an adapter of a PEFT configuration that vLLM's LoRA does not serve."""
        config, most = adapter.config, self._max_rank
        if config.get("modules_to_save"):
            raise BadConfig(
                f"the adapter holds whole modules ({', '.join(config['modules_to_save'])}), which vLLM's "
                "LoRA does not serve; set lora.train_norms to false, engine.merge to true on a GPU, or "
                "engine.kind to embedded"
            )
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        if most is None or rank > most:
            allowed = "started for the bare base" if most is None else f"started for a rank of {most}"
            raise BadConfig(
                f"the adapter's rank is {rank}, and the vLLM engine was {allowed}; start it for the largest "
                "rank that it will serve"
            )

    async def put(self, core: Core, adapter: Adapter | None, version: int) -> PublishedAdapter | None:
        """See :class:`agentrl.engines.vllm_versions.Versions`."""
        if adapter is None:
            return None
        published = await in_thread(self.publish, adapter, version, dtype=core.dtype)
        try:
            await core.add(published)
            served = await core.read_back(published)
            self._ledger.prove(f"version {version} of the adapter", published.digests, served)
        except BaseException:
            with suppress(CoreDied):
                await core.remove(published)
            self._remove(published)
            raise
        return published

    async def take_back(self, core: Core, published: PublishedAdapter) -> None:
        """See :class:`agentrl.engines.vllm_versions.Versions`."""
        with suppress(CoreDied):
            await core.remove(published)
        await in_thread(self._remove, published)

    def publish(self, adapter: Adapter, version: int, *, dtype: torch.dtype) -> PublishedAdapter:
        """Write ``adapter`` for a core that serves it in ``dtype``. Raises CannotWrite, BadConfig."""
        digests = _expected(adapter, dtype)
        self._published += 1
        name = f"{self.home.name}-{self._published}-v{version}"
        folder = self.home / name
        with writing(folder):
            folder.mkdir()
            write_adapter(folder, adapter)
        self._ledger.enter(digests, f"version {version}")
        modules = tuple(dict.fromkeys(_parse(tensor)[0] for tensor in adapter.tensors))
        return PublishedAdapter(name, self._published, version, folder, modules, digests)

    def _remove(self, published: PublishedAdapter) -> None:
        shutil.rmtree(published.folder, ignore_errors=True)

    def close(self) -> None:
        """Delete all of it; idempotent."""
        shutil.rmtree(self.home, ignore_errors=True)


def _parse(tensor: str) -> tuple[str, str]:
    """The module and the side, A or B, of a tensor of PEFT's. Raises BadConfig for what is none."""
    matrix = lora_matrix(tensor)
    if matrix is None:
        raise BadConfig(
            f"the adapter's tensor {tensor!r} is no LoRA matrix of a linear layer, and vLLM can't be proved "
            "to serve it; adapt linear layers only (lora.target_modules: all-linear, lora.train_norms: false)"
        )
    return matrix


def _expected(adapter: Adapter, dtype: torch.dtype) -> dict[str, str]:
    """What a worker must read back, computed as vLLM does: first the dtype, then the scaling."""
    digests: dict[str, str] = {}
    for tensor, values in adapter.tensors.items():
        module, side = _parse(tensor)
        served: Tensor = values.to("cpu", dtype, copy=True)
        if side == "B" and (factor := scaling(adapter.config, module)) != 1:
            served *= factor
        if bool(served.any()):
            digests[f"{module}.{side}"] = digest(served)
    return digests
