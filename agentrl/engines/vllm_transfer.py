"""Weights on their way into vLLM's worker: its own weight-transfer API, both ends of it.

The backend is ``ipc``: one process trains, on the first GPU that it sees, and vLLM's one worker takes the
first of the same, so the worker reads them where this process has put them. They go through a buffer of that
GPU, part by part. (``nccl``, which carries weights between GPUs, allows no two processes on one.) The
buffer's handle travels pickled, through a method of ours: vLLM's messages would turn the tuples in it into
lists, and its own pickles have to be allowed for all that it sends and receives.

Not run on a GPU so far: what is seen to work is this module's half and vLLM's, with another backend between.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentrl.errors import BadConfig

__all__ = ["BACKEND", "Weights", "check_transfer", "send"]

BACKEND = "ipc"
_BUFFER_BYTES = 256 << 20  # on the GPU while weights are sent; more where one tensor needs it

Ask = Callable[[Coroutine[Any, Any, Any]], Any]  # runs a call to the core and waits for what it returns


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Tensors that replace vLLM's, under the checkpoint's names; each exists while it is sent."""

    shapes: Mapping[str, tuple[int, ...]]  # in the order of sending; fused layers as a whole
    dtype: torch.dtype
    make: Callable[[str], Tensor]


def check_transfer(llm: Any) -> None:
    """Raise BadConfig where ``llm``, vLLM's AsyncLLM, can't be sent weights."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        _ = WeightTransferTrainerFactory, IPCTrainerInitInfo, llm.start_weight_update
    except (ImportError, AttributeError) as error:
        raise BadConfig(
            f"engine.merge is true, and this vLLM has no weight transfer as it is needed ({error}): install "
            "vLLM 0.32 or a later one, or set it to false"
        ) from error


def send(llm: Any, weights: Weights, *, ask: Ask) -> None:
    """Replace tensors of the model that ``llm``, an AsyncLLM, serves. Blocks; not for its event loop."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    trainer = WeightTransferTrainerFactory.trainer_init(
        _trainer_info(weights), client=_Client(llm, ask), source=_source(weights)
    )
    trainer.send_weights()


def _trainer_info(weights: Weights) -> Any:
    """How this process sends."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    largest = max(math.prod(shape) for shape in weights.shapes.values()) * weights.dtype.itemsize
    return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=max(_BUFFER_BYTES, largest))


def _source(weights: Weights) -> Any:
    """What is sent, as vLLM asks for it."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):  # type: ignore[misc] # vLLM's is untyped here
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weights.dtype, shape) for name, shape in weights.shapes.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return ((name, weights.make(name)) for name in weights.shapes)

    return Source()


class _Client:
    """vLLM's VLLMWeightSyncClient over an AsyncLLM in this process."""

    def __init__(self, llm: Any, ask: Ask) -> None:
        self._llm, self._ask = llm, ask

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._ask(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    def start_weight_update(self) -> None:
        self._ask(self._llm.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        handles = update_info.pop("ipc_handles", None)
        if handles is None:
            self._ask(self._llm.update_weights(WeightTransferUpdateRequest(update_info)))
        else:
            args = (update_info, pickle.dumps(handles))
            self._ask(self._llm.collective_rpc("agentrl_update_weights", args=args))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask(self._llm.finish_weight_update(weight_version))
