"""Load a causal language model and take it apart: backbone, head, and an alias that shares its weights.

The learner and the embedded engine both run ``backbone`` on packed tokens and ``head`` on the rows that need
logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.attention import PACKED, Plan, Segments
from agentrl.errors import UnsupportedModel

__all__ = [
    "alias",
    "backbone",
    "check_forward",
    "context_length",
    "head",
    "load_model",
    "load_tokenizer",
    "stop_token_ids",
]


def load_model(path: str | Path, *, dtype: str = "auto", device: torch.device | str = "cpu") -> Any:
    """The causal LM at ``path`` (a folder or a hub id), frozen, in evaluation mode, with packed attention.

    Raises UnsupportedModel where nothing can be loaded from there, or where its forward pass can't be packed.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"no model could be loaded from {str(path)!r}: {error}\nGive a folder with config.json and "
            "safetensors, or a hub id."
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    check_forward(model)
    return model


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer at ``path``; raises UnsupportedModel where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"no tokenizer could be loaded from {str(path)!r}: {error}") from error


def context_length(model: Any) -> int:
    """How many tokens the model's positions reach."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))


def stop_token_ids(model: Any) -> tuple[int, ...]:
    """The ids with which the model's generation config ends a completion."""
    ids = model.generation_config.eos_token_id
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def backbone(model: Any, token_ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
    """Hidden states (N, D) of N packed tokens; ``positions`` (N,) count from 0 in each sequence."""
    out = model.base_model(
        input_ids=token_ids[None], position_ids=positions[None], use_cache=False, plan=plan
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def head(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from hidden rows (R, D) to logits (R, V)."""
    embeddings = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap is None:
        return lambda rows: embeddings(rows)
    return lambda rows: torch.tanh(embeddings(rows) / softcap) * softcap


def alias(model: Any) -> Any:
    """A module tree of its own over the same tensors: adapters put into one do not show in the other."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def check_forward(model: Any) -> None:
    """Switch ``model`` to packed attention and prove on a few tokens that its logprobs stay what they were.

    Raises UnsupportedModel for architectures whose forward pass is more than causal attention (recurrent
    layers, attention sinks, scaled logits).
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    token_ids = torch.arange(2 * _PROBE, device=device) * 7919 % vocabulary
    expected = torch.cat(
        [model(input_ids=half[None], use_cache=False).logits[0] for half in token_ids.split(_PROBE)]
    )
    model.set_attn_implementation(PACKED)
    positions = torch.arange(_PROBE, device=device).repeat(2)
    hidden = backbone(model, token_ids, positions, Segments([_PROBE, _PROBE]))
    actual = head(model)(hidden)
    difference = (actual.float().log_softmax(-1) - expected.float().log_softmax(-1)).abs().mean().item()
    allowed = 1e-3 if expected.dtype == torch.float32 else 0.1
    if not difference < allowed:
        raise UnsupportedModel(
            f"{type(model).__name__}: packed logprobs differ from the model's own by {difference:.3g} nats "
            f"on average (allowed: {allowed}); its forward pass is more than causal attention and can't be "
            "packed: use another architecture"
        )


_PROBE = 12  # tokens of each of the two probe sequences
