"""Adapters on vLLM's CPU backend: two products of matrices for each adapter and layer.

vLLM 0.32 copies both matrices of the adapter for every token of a batch there, in float32, and multiplies
token by token: with Gemma 3 270M, rank 16 and 32 sequences that took as long as the model itself, and a
long prompt takes gigabytes. Its GPU kernels, which do no such thing, stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper import punica_cpu

__all__ = ["PunicaByAdapter", "install"]


class PunicaByAdapter(punica_cpu.PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's wrapper of LoRA's operations, linear layers multiplied adapter by adapter."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take note of which tokens of the next batch have which adapter."""
        super().update_metadata(*args, **kwargs)
        slots = self.token_lora_indices  # (T,); -1: no adapter
        present = slots.unique().tolist()
        # Of each adapter's slot its tokens; None: all of them.
        self._tokens: list[tuple[int, Tensor | None]] = [
            (slot, None if len(present) == 1 else (slots == slot).nonzero()[:, 0])
            for slot in present
            if slot >= 0
        ]

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """To each slice of ``y`` (T, outputs) add ``x`` (T, inputs) @ A.T @ B.T * scale, in place; A (slots,
        1, rank, inputs) and B (slots, 1, slice, rank) by slice, of each token's own adapter."""
        for slot, tokens in self._tokens:
            inputs = x if tokens is None else x[tokens]
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                added = (inputs @ a[slot, 0].T) @ b[slot, 0].T * scale
                part = y[:, start : start + width]
                if tokens is None:
                    part += added
                else:
                    part.index_add_(0, tokens, added)
                start += width


def install() -> None:
    """Have the models that this process loads from now on use it, where vLLM runs on a CPU."""
    punica_cpu.PunicaWrapperCPU = PunicaByAdapter
