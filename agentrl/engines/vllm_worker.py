"""What runs inside vLLM's worker processes: weights are read back, and no worker outlives its owner.

vLLM loads this module by name in every worker (``worker_extension_cls``) and mixes :class:`WeightsReader`
into the worker's class. Loading it installs ``agentrl.engines.vllm_lora``, and starts a thread that waits for
the end of the process that started vLLM: vLLM's core does not notice when that one is killed, and would keep
its memory for ever. Which process that is, and which folder to remove then, says the environment; without it
neither happens.

Not covered: layers whose adapter is not a pair of stacked matrices (mixtures of experts), and tensor
parallelism, where a worker holds a part of each matrix.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["HOME_VARIABLE", "OWNER_VARIABLE", "WeightsReader", "checksum", "digest"]

OWNER_VARIABLE = "AGENTRL_VLLM_OWNER"  # process id of whoever started vLLM
HOME_VARIABLE = "AGENTRL_VLLM_HOME"  # its folder of adapters

_PART = 1 << 22  # elements of a tensor that are summed up at once
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_ODD = (-7046029254386353131, -4417276706812531889)  # 2**64 / golden ratio; a constant of xxHash64


def digest(matrix: Tensor) -> str:
    """SHA-256 of a matrix (rows, columns): its dtype and the smallest block from its corner that holds all
    that is not zero, so that it is the same with and without the zeros that pad it."""
    places = matrix.nonzero()
    rows, columns = (int(size) + 1 for size in places.amax(0)) if len(places) else (0, 0)
    block = matrix[:rows, :columns].detach().cpu().contiguous()
    hashed = hashlib.sha256(f"{block.dtype} {rows} {columns} ".encode())
    hashed.update(block.view(torch.uint8).numpy().tobytes() if block.numel() else b"")
    return hashed.hexdigest()


def checksum(values: Tensor) -> str:
    """A tensor's dtype, shape and the sum, modulo 2**64, of its bits times an odd number that its place has.

    Whatever one value changes to, the sum changes; other changes it misses once in about 2**64 times. It is
    the same on every device and takes no copy to the host, as hashing gigabytes of weights would.
    """
    bits = values.detach().contiguous().flatten().view(_INTEGERS[values.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _PART):
        part = bits[start : start + _PART].long()
        place = torch.arange(start, start + len(part), device=bits.device) * _ODD[0]
        total += (part * ((place ^ place >> 29) * _ODD[1] | 1)).sum()
    return f"{values.dtype} {tuple(values.shape)} {total.item() % (1 << 64):016x}"


class WeightsReader:
    """Methods of vLLM's worker, called through ``collective_rpc``; ``self`` is the worker."""

    def agentrl_read_adapter(self, adapter: int, modules: Sequence[str]) -> dict[str, str]:
        """Digests of what the kernels read for the adapter of id ``adapter``; {} where it has no slot.

        Keys are ``module.A`` and ``module.B``: under the names of ``modules``, those of PEFT, for the layers
        that vLLM takes these for, else under vLLM's own. Matrices of zeros are left out.
        """
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        if adapter not in manager.lora_index_to_id:
            return {}
        slot = manager.lora_index_to_id.index(adapter)
        names = _renamed(manager.model, modules)
        found = ((names.get(name, name), pair) for name, pair in _pairs(manager))
        return {
            f"{name}.{side}": digest(stacked[slot, 0])
            for name, pair in found
            for side, stacked in zip("AB", pair, strict=True)
            if bool(stacked[slot, 0].any())
        }

    def agentrl_fused_layers(self) -> dict[str, list[str]]:
        """The layers that the model has as one, by the last part of that one's name, in its order."""
        return {fused: list(parts) for fused, parts in _fused_layers(self.get_model()).items()}  # type: ignore[attr-defined]

    def agentrl_update_weights(self, update_info: dict[str, Any], handles: bytes) -> None:
        """vLLM's ``update_weights`` over its ``ipc`` backend; ``handles``: of our owner's memory, pickled."""
        self.update_weights({**update_info, "ipc_handles": pickle.loads(handles)})  # type: ignore[attr-defined]

    def agentrl_read_weights(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """Checksums of what the kernels read for tensors of the checkpoint; those it does not have are left
        out. Of a fused layer all parts are in ``shapes``."""
        found = _blocks(self.get_model(), shapes)  # type: ignore[attr-defined]
        return {name: checksum(block) for name, block in found}


def _fused_layers(model: Any) -> Mapping[str, Sequence[str]]:
    return getattr(model, "packed_modules_mapping", None) or {}


def _blocks(model: Any, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """The names that the model has, each with its rows of the parameter that holds them."""
    parameters = dict(model.named_parameters())
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    rename = (lambda name: name) if mapper is None else mapper.get_rename_mapper().map_name
    fused = {part: (one, parts) for one, parts in _fused_layers(model).items() for part in parts}
    for name, shape in shapes.items():
        above, layer, leaf = _parted(name)
        one, parts = fused.get(layer, (layer, (layer,)))
        before = parts[: parts.index(layer)]
        start = sum(shapes[f"{above}{part}{leaf}"][0] for part in before)
        place = rename(name) or ""
        own_above, own_layer, own_leaf = _parted(place)
        values = parameters.get(f"{own_above}{one if own_layer == layer else own_layer}{own_leaf}")
        if values is not None:
            yield name, values[start : start + shape[0]]


def _parted(name: str) -> tuple[str, str, str]:
    """Of "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.", "up_proj", ".weight"."""
    path, dot, leaf = name.rpartition(".")
    above, stop, layer = path.rpartition(".")
    return above + stop, layer, dot + leaf


def _renamed(model: Any, modules: Sequence[str]) -> dict[str, str]:
    """PEFT's names by those that vLLM gives the same layers, which are others for some architectures."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    return {
        parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)[0]: name
        for name in modules
    }


def _pairs(manager: Any) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each layer's name and its stacked matrices A and B (slots, 1, rows, columns); a packed layer, such as
    query, key and value in one, as the layers that it is packed of."""
    for name, layer in manager.modules.items():
        stacked = [_as_tuple(getattr(layer, f"lora_{side}_stacked", ())) for side in "ab"]
        packed = manager.packed_modules.get(name, ())
        parts = packed if len(packed) == len(stacked[0]) else [name] * len(stacked[0])
        yield from zip(parts, zip(*stacked, strict=True), strict=True)


def _as_tuple(tensors: Any) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _end_with(owner: int, home: str) -> None:
    """Wait for the end of the process ``owner``, then end this process and those between the two."""
    between = _ancestors_below(owner)
    with suppress(ProcessLookupError):  # it has ended before this module was loaded
        descriptor = os.pidfd_open(owner)
        select.select([descriptor], [], [])
    shutil.rmtree(home, ignore_errors=True)
    for process in (*between, os.getpid()):
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process, signal.SIGKILL)


def _ancestors_below(owner: int) -> list[int]:
    """Process ids from the child of ``owner`` down to this process' parent; none where it is no ancestor."""
    chain: list[int] = []
    process = os.getppid()
    while process not in (0, owner):
        chain.insert(0, process)
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            process = int(file.read().rpartition(")")[2].split()[1])
    return chain if process == owner else []


def _prepare() -> None:
    """In a worker that was told its owner, which other processes that load this module are not: products of
    adapters as we compute them on a CPU, and the thread. The first fields after a command's name in Linux'
    /proc/PID/stat are its state and its parent (proc_pid_stat(5))."""
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    if owner in (0, os.getpid()):
        return
    if "vllm" in sys.modules:  # as in every process that vLLM loads this in
        from agentrl.engines.vllm_lora import install

        install()
    if hasattr(os, "pidfd_open"):
        home = os.environ[HOME_VARIABLE]
        threading.Thread(target=_end_with, args=(owner, home), name="agentrl-owner", daemon=True).start()


# At each update vLLM warns of every layer that keeps its weights: here most are meant to.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(
    lambda record: "Failed to load weights" not in record.getMessage()
)
_prepare()
