"""The engine's own copy of an adapter, over an alias of the frozen base.

Where the adapted layers are few megabytes of float32, the adapter is merged into copies of them: decoding a
small model is a matter of how many kernels are called, and LoRA has five where a merged layer has one. Larger
weights stay the only copy in memory, and 16-bit ones would round the adapter away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agentrl.errors import EngineError
from agentrl.models import alias

__all__ = ["AdaptedModel"]

_MERGED_BYTES = 64 << 20  # of the layers' weights, at most


class AdaptedModel:
    """PEFT's model over an alias of ``base`` for adapters of one configuration."""

    def __init__(self, base: Any, config: Mapping[str, Any]) -> None:
        """``config`` is PEFT's, as a dictionary; the adapter's values come with ``load``."""
        from peft import LoraConfig, get_peft_model

        self.config = dict(config)
        with torch.random.fork_rng(devices=[]):  # PEFT draws first values, which nobody will see
            lora = LoraConfig(**{**config, "inference_mode": True})
            self._adapted = get_peft_model(alias(base), lora).eval()
        self._merged = [(layer, layer.get_base_layer().weight) for layer in _mergeable(self._adapted)]
        for layer, weight in self._merged:
            layer.get_base_layer().weight = torch.nn.Parameter(weight.clone(), requires_grad=False)

    @property
    def model(self) -> Any:
        """The transformers model, with the adapter inside."""
        return self._adapted.get_base_model()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of ``tensors``.

        Raises EngineError where they are not those of the configuration; the values are then as before.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        names = set(get_peft_model_state_dict(self._adapted, save_embedding_layers=False))
        if names != set(tensors):
            wrong = sorted(names ^ set(tensors))
            raise EngineError(
                f"the adapter's tensors are not those of its configuration: {len(wrong)} are missing or "
                f"too many, such as {wrong[0]!r}; load it over the base model that it was trained on"
            )
        set_peft_model_state_dict(self._adapted, dict(tensors))
        for layer, weight in self._merged:
            # From the base's weight each time: taking the last adapter out again would leave its rounding.
            layer.get_base_layer().weight.data.copy_(weight)
            layer.merged_adapters.clear()
            layer.merge()


def _mergeable(adapted: Any) -> list[Any]:
    """PEFT's layers, where all of them can be merged and that pays; else none."""
    from peft.tuners.lora import Linear, LoraLayer

    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    plain = all(type(layer) is Linear for layer in layers)
    exact = all(weight.dtype.itemsize >= 4 for weight in weights)
    small = sum(weight.nbytes for weight in weights) <= _MERGED_BYTES
    return layers if plain and exact and small else []
