"""The arithmetic that a dense decoder with LoRA on all linear layers can't do without: its matrices' alone.

Attention's scores are left out: they need the lengths, and are a few percent at a few hundred tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Matrices", "matrices_of"]


@dataclass(frozen=True, slots=True)
class Matrices:
    """Weights of a model: a multiplication and an addition for each of them and each token."""

    linear: int  # of all layers
    adapter: int  # of LoRA over them
    head: int  # of the vocabulary

    def sampling(self, tokens: int, sampled: int) -> float:
        """FLOPs of a forward pass over ``tokens``, ``sampled`` of which need logits."""
        return 2.0 * (tokens * (self.linear + self.adapter) + sampled * self.head)

    def update(self, tokens: int, trained: int) -> float:
        """FLOPs of forward and backward over ``tokens``, ``trained`` of which have a loss.

        Backward is once more for the frozen matrices, which have no gradient of their own, and twice more for
        the adapter's.
        """
        return self.sampling(tokens, trained) + 2.0 * (
            tokens * (self.linear + 2 * self.adapter) + trained * self.head
        )


def matrices_of(config: Any, *, rank: int) -> Matrices:
    """Those of a transformers text configuration, with LoRA of this rank."""
    width, layers = config.hidden_size, config.num_hidden_layers
    queries, keys = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    shapes = [(width, queries), (width, keys), (width, keys), (queries, width)]
    shapes += [(width, config.intermediate_size)] * 2 + [(config.intermediate_size, width)]
    return Matrices(
        linear=layers * sum(rows * columns for rows, columns in shapes),
        adapter=layers * rank * sum(rows + columns for rows, columns in shapes),
        head=config.vocab_size * width,
    )
