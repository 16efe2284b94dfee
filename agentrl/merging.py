"""An adapter and the base's weights in one: W + scaling B A, summed in float32 and rounded once.

:class:`Merging` makes a merged model's tensors from the frozen base, one by one, afresh each time: taking the
last adapter out of a merged weight would leave its rounding. ``merged_layers`` has a PEFT model compute as
that merged model does, bit for bit the same weights.

A merged weight has the base's precision, whatever the adapter's. In bfloat16 what an adapter adds to a weight
is lost where it is below 2**-9 of it, and comes in a step once it has grown.

Not covered: adapters of anything but linear layers, DoRA, and layers that share their weight with another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agentrl.engine import Adapter
from agentrl.errors import BadConfig

__all__ = ["Merging", "lora_matrix", "merged_layers", "merged_weight", "scaling"]

_PREFIX = "base_model.model."  # PEFT's, before the model's own names
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def lora_matrix(tensor: str) -> tuple[str, str] | None:
    """The module and the side, A or B, of which PEFT calls a matrix ``tensor``; None for what is none."""
    match = _MATRIX.fullmatch(tensor)
    return None if match is None else (match["module"], match["side"])


def scaling(config: Mapping[str, Any], module: str) -> float:
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


@torch.no_grad()
def merged_weight(weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """``weight`` (out, in) + ``factor`` ``b`` (out, rank) ``a`` (rank, in), in the weight's dtype."""
    added = b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
    return (weight.float() + factor * added).to(weight.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class _Lora:
    """What is added to one weight."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    factor: float


class Merging:
    """The frozen base's tensors, and what adapters make of them."""

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        """``base``: the parameters by the model's own names, tied ones once; they are never written to."""
        self.base = base

    def changes(self, adapter: Adapter) -> Mapping[str, _Lora | Tensor]:
        """What ``adapter`` does to the base's tensors, by their names: something added, or a tensor instead.

        Raises BadConfig for an adapter that can't be merged.
        """
        if adapter.config.get("fan_in_fan_out"):
            raise _unmerged("its layers hold their weights transposed (fan_in_fan_out)")
        sides: dict[str, dict[str, Tensor]] = {}
        changes: dict[str, _Lora | Tensor] = {}
        for name, tensor in adapter.tensors.items():
            matrix = lora_matrix(name)
            if matrix is None:
                changes[name.removeprefix(_PREFIX)] = tensor
            else:
                sides.setdefault(matrix[0], {})[matrix[1]] = tensor
        for module, pair in sides.items():
            changes[f"{module}.weight"] = _Lora(pair["A"], pair["B"], scaling(adapter.config, module))
        for name, change in changes.items():
            self._check(name, change)
        return changes

    def _check(self, name: str, change: _Lora | Tensor) -> None:
        weight = self.base.get(name)
        if weight is None:
            raise _unmerged(f"{name} is no weight of the model, or one that two layers share")
        shape = (len(change.b), change.a.shape[1]) if isinstance(change, _Lora) else tuple(change.shape)
        if shape != tuple(weight.shape):
            raise _unmerged(f"it makes {shape} of {name}, whose shape is {tuple(weight.shape)}")

    def make(self, name: str, change: _Lora | Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """The tensor ``name`` under ``change`` (None: the base's), on the base's device in ``dtype``."""
        weight = self.base[name].detach()
        if isinstance(change, _Lora):
            return merged_weight(weight, change.a, change.b, change.factor).to(dtype)
        return (weight if change is None else change).to(weight.device, dtype)


def _unmerged(reason: str) -> BadConfig:
    return BadConfig(
        f"the adapter can't be merged: {reason}; set engine.merge to false, or adapt plain linear layers only"
    )


@contextmanager
def merged_layers(policy: Any) -> Iterator[None]:
    """Have the adapted linear layers of a PEFT model compute with merged weights meanwhile, which exist one
    at a time; without gradients."""
    from peft.tuners.lora import Linear

    layers = [module for module in policy.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.get_base_layer()
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    weight = merged_weight(base.weight, a, b, layer.scaling[name])
    return torch.nn.functional.linear(x, weight, base.bias)
