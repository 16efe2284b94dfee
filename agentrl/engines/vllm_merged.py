"""Versions merged into vLLM's own weights: no adapter is computed beside them, and norms may be trained.

What a version changes is merged anew from the learner's frozen base and replaces vLLM's weights in place,
through its weight-transfer API. vLLM fuses layers (query, key and value; gate and up) and takes a fused layer
as a whole, so what is fused with an adapted layer is sent along. Nothing else is: the rest stays what vLLM
loaded itself. What an earlier version changed and this one does not is sent as the base has it.

Proof is by a checksum of every tensor that was sent, as the worker's kernels read it, block by block of the
fused ones. Where a version can't be put or proved, vLLM holds a mixture: its core is stopped, and the next
one gets the version before.

Not covered: tensor and pipeline parallelism, quantised bases.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from agentrl.engine import Adapter
from agentrl.engines.vllm_core import Core, PublishedAdapter
from agentrl.engines.vllm_transfer import Weights
from agentrl.engines.vllm_versions import Ledger, make_home
from agentrl.engines.vllm_worker import checksum
from agentrl.merging import Merging

__all__ = ["MergedWeights"]


class MergedWeights:
    """The merged versions of one engine: :class:`agentrl.engines.vllm_versions.Versions` in place."""

    in_place = True

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        """``base``: the learner's frozen parameters, by the names that the checkpoint has."""
        self.home = make_home()
        self._merging, self._ledger = Merging(base), Ledger()
        self._core: Core | None = None  # the one that holds what is noted here
        self._held: set[str] = set()  # tensors that may differ from the base there
        self._fused: Mapping[str, Sequence[str]] = {}  # layers that it has as one, by that one's name

    def check(self, adapter: Adapter) -> None:
        """Raise BadConfig for an adapter that can't be merged."""
        self._merging.changes(adapter)

    async def put(self, core: Core, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engines.vllm_versions.Versions`."""
        if core is not self._core:
            self._fused = await core.fused_layers()
            self._core, self._held = core, set()
        changes = {} if adapter is None else self._merging.changes(adapter)
        names = self._with_fused({*changes, *self._held})
        if not names:
            return
        digests: dict[str, str] = {}

        def make(name: str) -> Tensor:
            tensor = self._merging.make(name, changes.get(name), dtype=core.dtype)
            digests[name] = checksum(tensor)
            return tensor

        shapes = {name: tuple(self._merging.base[name].shape) for name in names}
        name, of = ("the bare base", "") if adapter is None else (f"version {version}", " of the adapter")
        try:
            await core.replace(Weights(shapes, core.dtype, make))
            self._ledger.enter(digests, name)
            self._ledger.prove(name + of, digests, await core.read_weights(shapes))
        except BaseException:
            self._core = None
            await core.stop()
            raise
        self._held = set(changes)

    async def take_back(self, core: Core, published: PublishedAdapter) -> None:
        """See :class:`agentrl.engines.vllm_versions.Versions`; nothing is published."""

    def close(self) -> None:
        """Delete the folder; idempotent."""
        shutil.rmtree(self.home, ignore_errors=True)

    def _with_fused(self, names: Iterable[str]) -> list[str]:
        """All tensors of the layers that ``names`` belong to and of those that are fused with them, in the
        base's order: layer by layer, so that vLLM holds one layer back at a time."""
        parts = {part: fused for fused in self._fused.values() for part in fused}
        layers = {
            f"{above}{part}"
            for name in names
            for above, layer in [_split(name)]
            for part in parts.get(layer, (layer,))
        }
        return [name for name in self._merging.base if name.rpartition(".")[0] in layers]


def _split(name: str) -> tuple[str, str]:
    """Of "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp." and "up_proj"."""
    above, dot, layer = name.rpartition(".")[0].rpartition(".")
    return above + dot, layer
