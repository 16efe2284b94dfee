from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from agentrl.attention import PACKED, Segments
from agentrl.errors import UnsupportedModel
from agentrl.models import (
    alias,
    backbone,
    check_forward,
    context_length,
    head,
    linear_layers,
    load_model,
    load_settings,
    load_tokenizer,
    stop_token_ids,
)

LENGTHS = [9, 9, 3, 12]


def tiny(name: str, **settings: Any) -> PreTrainedConfig:
    """A configuration of two layers, 4 heads of 8 and 2 heads of keys and values."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config: PreTrainedConfig = getattr(transformers, f"{name}Config")(**{**sizes, **settings})
    return config


def build(config: PreTrainedConfig, *, attention: str = "sdpa") -> Any:
    """A model of random weights, large enough that its tokens and positions tell."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    return model.requires_grad_(False)


GEMMA3 = {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 16,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
SUPPORTED: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3": lambda: tiny("Qwen3", head_dim=8),
    "Llama": lambda: tiny("Llama"),
    "Gemma3": lambda: tiny("Gemma3Text", **GEMMA3),
    "Mistral, sliding windows": lambda: tiny("Mistral", sliding_window=5),
    "DeepseekV3, values narrower than keys": lambda: tiny("DeepseekV3", **MLA),
    "Mixtral, experts": lambda: tiny("Mixtral", num_local_experts=4),
    "GPTNeoX": lambda: tiny("GPTNeoX"),
}
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "attention sinks": (
        lambda: tiny("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        "GptOssAttention uses attention sinks",
    ),
    "soft-capped scores": (lambda: tiny("Gemma2", head_dim=8), "Gemma2Attention uses soft-capped scores"),
    "scaled logits": (
        lambda: tiny("Granite", logits_scaling=4.0),
        r"GraniteForCausalLM: packed logprobs differ from the model's own by \d",
    ),
    "recurrent layers": (
        lambda: tiny("Lfm2", layer_types=["conv", "full_attention"]),
        "Lfm2ForCausalLM has layers of type conv; only full_attention and sliding_attention",
    ),
    "no attention interface": (lambda: tiny("Mpt", n_layers=1), "MptForCausalLM has no backbone"),
    "arguments that stop at the model": (lambda: tiny("StableLm"), "StableLmAttention was not told"),
    "a window that attention is not told": (
        lambda: tiny("Phimoe", sliding_window=64, num_local_experts=2),
        "PhimoeForCausalLM does not tell its attention of its sliding window of 64 tokens",
    ),
}


def packed_logprobs(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return head(model)(backbone(model, token_ids, positions, Segments(LENGTHS))).log_softmax(-1)


@pytest.mark.parametrize("name", SUPPORTED)
def test_packed_logprobs_are_those_of_each_sequence_alone(name: str) -> None:
    model = build(SUPPORTED[name]())
    token_ids = torch.randint(97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [
            model(input_ids=part[None]).logits[0].log_softmax(-1) for part in torch.split(token_ids, LENGTHS)
        ]
        check_forward(model)
        assert model.config._attn_implementation == PACKED
        difference = packed_logprobs(model, token_ids) - torch.cat(expected)
    assert difference.abs().max() < 2e-5


@pytest.mark.parametrize("name", REFUSED)
def test_a_forward_pass_that_is_more_than_causal_attention_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = build(make(), attention="eager")
    with pytest.raises(UnsupportedModel, match=message):
        check_forward(model)


def test_a_window_beyond_the_context_need_not_be_told() -> None:
    check_forward(build(tiny("Phimoe", sliding_window=256, num_local_experts=2), attention="eager"))


def test_half_precision_passes_the_probe() -> None:
    check_forward(build(tiny("Gemma3Text", **GEMMA3)).bfloat16())


def test_a_loaded_model_is_frozen_and_packed(tmp_path: Path) -> None:
    build(tiny("Qwen3", head_dim=8)).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == PACKED


def test_nothing_to_load_is_said_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"the model folder {tmp_path} has no config.json"):
        load_model(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"no tokenizer could be loaded from '{tmp_path}'"):
        load_tokenizer(tmp_path)


def test_an_architecture_without_sdpa_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    build(REFUSED["attention sinks"][0](), attention="eager").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="GptOssForCausalLM does not support"):
        load_model(tmp_path)


def test_an_alias_shares_every_tensor() -> None:
    model = build(tiny("Gemma3Text", tie_word_embeddings=True, **GEMMA3))
    other = alias(model)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    pairs = zip(model.buffers(), other.buffers(), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)


def test_an_adapter_in_an_alias_does_not_show_in_the_original() -> None:
    model = build(tiny("Qwen3", head_dim=8))
    other = alias(model)
    config = peft.LoraConfig(
        target_modules="all-linear", modules_to_save=["norm"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(other, config)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in model.named_modules())
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_the_context_ends_where_the_positions_do() -> None:
    assert context_length(build(tiny("Qwen3", head_dim=8))) == 256
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    assert (
        context_length(build(tiny("Phi3", rope_parameters=rope, original_max_position_embeddings=64))) == 64
    )


@pytest.mark.parametrize(("ids", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_stop_tokens_are_those_of_the_generation_config(ids: Any, expected: tuple[int, ...]) -> None:
    model = build(tiny("Qwen3", head_dim=8))
    model.generation_config = GenerationConfig(eos_token_id=ids)
    assert stop_token_ids(model) == expected


def test_settings_and_tokenizer_are_read_without_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "model", load_model(tiny_checkpoint)
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert context_length(load_settings(folder)) == context_length(model) == 512
    assert stop_token_ids(load_settings(folder)) == stop_token_ids(model) != ()
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(tiny_checkpoint).get_vocab()


def test_without_a_generation_config_the_models_own_says_what_stops(tmp_path: Path) -> None:
    tiny("Qwen3", head_dim=8).save_pretrained(tmp_path)
    assert stop_token_ids(load_settings(tmp_path)) == (2,)


def test_a_folder_without_a_config_has_no_settings(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no config that can be read .*; give the folder or hub id of"):
        load_settings(tmp_path)


def test_the_layers_that_adapters_take_are_pefts_all_linear(make_model: Callable[..., Any]) -> None:
    model = make_model()
    names = linear_layers(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = adapted.peft_config["default"].target_modules
    assert names == sorted({target.rpartition(".")[2] for target in targets})
