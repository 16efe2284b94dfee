"""Load a causal language model and take it apart: backbone, head, and an alias that shares its weights.

The learner and the embedded engine both run ``backbone`` on packed tokens and ``head`` on the rows that need
logits.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agentrl.attention import PACKED, Plan, Segments
from agentrl.errors import UnsupportedModel
from agentrl.modelfiles import check_tokenizer_files, find_model_config, find_model_files, is_offline

__all__ = [
    "alias",
    "backbone",
    "check_forward",
    "context_length",
    "default_device",
    "head",
    "linear_layers",
    "load_model",
    "load_settings",
    "load_tokenizer",
    "scoring_head",
    "stop_token_ids",
]


def default_device() -> str:
    """Where tensors go unless somebody says otherwise: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(path: str | Path, *, dtype: str = "auto", device: torch.device | str = "cpu") -> Any:
    """The causal LM at ``path`` (a folder or a hub id), frozen, in evaluation mode, with packed attention.

    Raises UnsupportedModel where nothing can be loaded from there, or where its forward pass can't be packed.
    """
    find_model_files(path)
    options = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": is_offline(path)}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (
        OSError,
        ValueError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,  # values in config.json of a wrong type, or that do not fit together
    ) as error:  # RuntimeError: sizes that do not fit
        raise UnsupportedModel(
            f"no model could be loaded from {str(path)!r}: {_in_short(error)}; give a folder with "
            "config.json and model.safetensors, or a hub id"
        ) from error
    _check_complete(path, sorted(found["missing_keys"]))
    model = model.to(device).eval().requires_grad_(False)
    check_forward(model)
    return model


def _check_complete(path: str | Path, missing: Sequence[str]) -> None:
    """transformers makes up random weights for those that no file holds."""
    if missing:
        raise UnsupportedModel(
            f"the model {str(path)!r} lacks {len(missing)} of its weights, {missing[0]} first: its files are "
            "not whole, or config.json is of another model; copy or download it again"
        )


def _in_short(error: BaseException) -> str:
    """An error's text in one line of at most 300 characters."""
    return textwrap.shorten(str(error), 300, placeholder="...").rstrip(".")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer at ``path``; raises UnsupportedModel where there is none, or one of another model."""
    check_tokenizer_files(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=is_offline(path))
    # KeyError: a tokenizer.json that is something else; the last of config.json, which is read here, too.
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"no tokenizer could be loaded from {str(path)!r}: {_in_short(error)}; the model's folder must "
            "hold tokenizer.json and tokenizer_config.json"
        ) from error
    config = find_model_config(path)
    if config is not None:
        _check_vocabulary(tokenizer, path, rows=int(config.get("vocab_size", 1 << 30)))
    return tokenizer


def _check_vocabulary(tokenizer: Any, path: str | Path, *, rows: int) -> None:
    """Raises UnsupportedModel for a token that can come up and has no row in the embeddings.

    Special tokens that neither the template names nor end a text never come up: models of images have such.
    """
    template = str(tokenizer.chat_template or "") + str(tokenizer.eos_token)
    unused = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in template
    }
    beyond = {index: text for text, index in tokenizer.get_vocab().items() if index >= rows}
    strange = sorted(beyond.keys() - unused)
    if strange:
        raise UnsupportedModel(
            f"the tokenizer of {str(path)!r} has {len(strange)} tokens without a row in the model's "
            f"embeddings, {beyond[strange[0]]!r} ({strange[0]}) first, as vocab_size is {rows}: use the "
            "model's own tokenizer, or resize the embeddings and save both"
        )


def load_settings(path: str | Path) -> Any:
    """The ``config`` and ``generation_config`` of the model at ``path`` without its weights, which others
    serve. Raises UnsupportedModel where its config can't be read."""
    local = is_offline(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"{path} has no config that can be read ({_in_short(error)}); give the folder or hub id of the "
            "model that the server serves: its tokenizer, chat template and config are used"
        ) from error
    try:
        generation = GenerationConfig.from_pretrained(path, local_files_only=local)
    except OSError:  # it is optional
        generation = GenerationConfig.from_model_config(config)
    return SimpleNamespace(config=config, generation_config=generation)


def context_length(model: Any) -> int:
    """How many tokens the positions reach, of a model or what ``load_settings`` gave."""
    config = model.config.get_text_config()
    length = int(getattr(config, "max_position_embeddings", 1 << 30))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length longrope turns the positions of the whole batch, and cached keys with them.
        return min(length, int(rope["original_max_position_embeddings"]))
    return length


def stop_token_ids(model: Any) -> tuple[int, ...]:
    """The ids with which the generation config ends a completion, of a model or what ``load_settings``
    gave."""
    ids = model.generation_config.eos_token_id
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def linear_layers(model: Any) -> list[str]:
    """The last parts of the names of the linear layers below the head: PEFT's "all-linear"."""
    head = model.get_output_embeddings()
    layers = model.named_modules()
    found = (name for name, layer in layers if isinstance(layer, nn.Linear) and layer is not head)
    return sorted({name.rpartition(".")[2] for name in found})


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


def scoring_head(model: Any) -> Callable[[Tensor], Tensor] | Tensor:
    """For ``token_logprobs``: the weight (V, D) of a plain linear head without gradient, else ``head``."""
    layer = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    plain = type(layer) is nn.Linear and getattr(layer, "bias", None) is None and softcap is None
    return layer.weight if plain and not layer.weight.requires_grad else head(model)


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
    _check_structure(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    token_ids = torch.arange(2 * _PROBE, device=device) * 7919 % vocabulary
    expected = torch.cat(
        [model(input_ids=half[None], use_cache=False).logits[0] for half in token_ids.split(_PROBE)]
    )
    model.set_attn_implementation(PACKED)
    positions = torch.arange(_PROBE, device=device).repeat(2)
    plan = _Probe([_PROBE, _PROBE])
    actual = head(model)(backbone(model, token_ids, positions, plan))
    _check_windows(model, plan.windows)
    difference = (actual.float().log_softmax(-1) - expected.float().log_softmax(-1)).abs().mean().item()
    # In bfloat16 two of transformers' own implementations differ by 0.14 nats on Gemma 3 270M; a wrong mask
    # or scale changes these tokens by 1 and more.
    allowed = 1e-3 if expected.dtype == torch.float32 else 0.5
    if not difference < allowed:
        raise UnsupportedModel(
            f"{type(model).__name__}: packed logprobs differ from the model's own by {difference:.3g} nats "
            f"on average (allowed: {allowed}); its forward pass is more than causal attention and can't be "
            "packed: use another architecture"
        )


def _check_structure(model: Any) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    if model.base_model is model or not model._can_set_attn_implementation():
        raise UnsupportedModel(
            f"{name} has no backbone with the AttentionInterface of transformers, so it can't be packed; use "
            "another architecture (Qwen3, Llama 3, Gemma 3, ...)"
        )
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise UnsupportedModel(
            f"{name} has layers of type {', '.join(sorted(strange))}; only "
            f"{' and '.join(sorted(_LAYER_TYPES))} can be packed: use another architecture"
        )


def _check_windows(model: Any, seen: set[int | None]) -> None:
    """The probe is shorter than a sliding window, so it can't see that a model applies one on its own."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or not (types is None or "sliding_attention" in types):
        return
    if window < context_length(model) and seen == {None}:
        raise UnsupportedModel(
            f"{type(model).__name__} does not tell its attention of its sliding window of {window} tokens "
            "and can't be packed; use another architecture (Qwen3, Llama 3, Gemma 3, ...)"
        )


class _Probe(Segments):
    """Notes the windows that a model asks for."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(lengths)
        self.windows: set[int | None] = set()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self.windows.add(window)
        return super().attend(layer, query, key, value, scale=scale, window=window)


_PROBE = 12  # tokens of each of the two probe sequences
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
