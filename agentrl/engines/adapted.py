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
    """A base model with adapters of one configuration, one at a time."""

    def __init__(self, base: Any, config: Mapping[str, Any]) -> None:
        """``config`` is PEFT's, as a dictionary; the adapter's values come with ``load``."""
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        self.config = dict(config)
        with torch.random.fork_rng(devices=[]):  # PEFT draws first values, which nobody will see
            lora = LoraConfig(**{**config, "inference_mode": True})
            adapted = get_peft_model(alias(base), lora).eval()
        # PEFT's names over the very memory of its parameters. Its own way to fill them looks through all
        # modules again for every layer, which took longer than all else of a small adapter's swap.
        self._tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        self._merged = [(layer, layer.get_base_layer().weight) for layer in _mergeable(adapted)]
        for layer, weight in self._merged:
            layer.get_base_layer().weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        # The transformers model, with the adapter inside.
        self.model = _without_wrappers(adapted, base) if self._merged else adapted.get_base_model()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of ``tensors``.

        Raises EngineError where they are not those of the configuration; the values are then as before.
        """
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        given = {name: tensor.shape for name, tensor in tensors.items()}
        if wrong := sorted(name for name in shapes | given if shapes.get(name) != given.get(name)):
            raise EngineError(
                f"the adapter's tensors are not those of its configuration: {len(wrong)} are missing, too "
                f"many or of another shape, such as {wrong[0]!r}; load it over the base model that it was "
                "trained on"
            )
        for name, tensor in self._tensors.items():
            tensor.copy_(tensors[name])
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


def _without_wrappers(adapted: Any, base: Any) -> Any:
    """An alias of ``base`` with the merged weights and the trained modules of ``adapted`` in their places:
    nothing of PEFT is called for a token."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    model = alias(base)
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            model.get_submodule(name).weight = module.get_base_layer().weight
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save["default"])
    return model
