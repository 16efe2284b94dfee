"""A vLLM on a CPU that takes weights through its weight-transfer API, which it has no backend for there.

Everything is vLLM's own and ours but for the way between the two processes: a file in place of a GPU's
memory. vLLM loads this module in its workers in place of ``agentrl.engines.vllm_worker``. A CPU's kernels
would read weights that were packed anew, and leave no others to be read back: here they are plain PyTorch's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentrl.engines import vllm_core, vllm_settings, vllm_transfer
from agentrl.engines.vllm_worker import WeightsReader

__all__ = ["Reader", "allow_merging"]

_NAME = "agentrl_file"
_TARGET = "AGENTRL_TEST_TRANSFER"  # environment variable: the folder of the files


class Reader(WeightsReader):
    """What the worker is extended with."""


def allow_merging(monkeypatch: pytest.MonkeyPatch, folder: Any) -> None:
    """Have engines with merged weights start on this host, and send through files in ``folder``."""
    _register_trainer()
    contract = vllm_settings._contract
    arguments = vllm_settings.engine_arguments

    def engine_arguments(settings: Any, *, known: Any, on_cpu: bool) -> dict[str, Any]:
        return {
            **vllm_settings._cpu_defaults(settings.args),
            **arguments(settings, known=known, on_cpu=False),
        }

    monkeypatch.setenv(_TARGET, str(folder))
    monkeypatch.setattr(vllm_core, "engine_arguments", engine_arguments)
    monkeypatch.setattr("agentrl.serving.check_device", lambda settings, on_cpu: None)
    monkeypatch.setattr(vllm_settings, "BACKEND", _NAME)
    monkeypatch.setattr(
        vllm_settings,
        "_contract",
        lambda settings: {**contract(settings), "worker_extension_cls": "vllm_on_cpu.Reader"},
    )
    monkeypatch.setattr(vllm_transfer, "_trainer_info", lambda weights: _trainer_info())


def _trainer_info() -> Any:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo

    @dataclass
    class FileInit(TrainerInitInfo):  # type: ignore[misc]
        backend: ClassVar[str] = _NAME

    return FileInit(rank=0)


def _register_trainer() -> None:
    from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class FileTrainer(TrainerWeightTransferEngine):  # type: ignore[misc]
        """Sends two tensors a file, so that a fused layer comes in parts."""

        @classmethod
        def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Any:
            client.init_weight_transfer_engine({})
            return cls(client=client, source=source)

        def send_weights(self) -> None:
            self.client.start_weight_update()
            part: dict[str, torch.Tensor] = {}
            for name, tensor in self.source:
                part[name] = tensor.contiguous()
                if len(part) == 2:
                    self._send(part)
            if part:
                self._send(part)
            self.client.finish_weight_update()

        def _send(self, part: dict[str, torch.Tensor]) -> None:
            path = os.path.join(os.environ[_TARGET], "part.safetensors")
            save_file(part, path)
            self.client.update_weights({"path": path})
            part.clear()

    if _NAME not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(_NAME, FileTrainer)


def _register_receiver() -> None:
    from vllm import _custom_ops
    from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    @dataclass
    class Init(WeightTransferInitInfo):  # type: ignore[misc]
        pass

    @dataclass
    class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
        path: str

    class FileReceiver(IPCWeightTransferEngine):  # type: ignore[misc]
        """The ``ipc`` engine's start and finish, and its way into the model."""

        init_info_cls, update_info_cls = Init, Update

        def init_transfer_engine(self, init_info: Any) -> None:
            pass

        def receive_weights(self, update_info: Any) -> None:
            self.model.load_weights(list(load_file(update_info.path).items()))

    WeightTransferEngineFactory.register_engine(_NAME, FileReceiver)
    _custom_ops._supports_onednn = False


if os.environ.get("AGENTRL_VLLM_OWNER", str(os.getpid())) != str(os.getpid()):  # in a worker
    _register_receiver()
