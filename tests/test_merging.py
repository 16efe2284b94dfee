"""Merged weights against PEFT's own merging, on small models of two architectures."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from agentrl.config import LoraConfig
from agentrl.engine import Adapter
from agentrl.errors import BadConfig
from agentrl.learner import adapt
from agentrl.merging import Merging, merged_layers, merged_weight

_SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TOKENS = torch.arange(3, 40)[None]


def make_model(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    if architecture == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**_SHAPE, tie_word_embeddings=False))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE))
    return model.to(dtype).eval().requires_grad_(False)


def shake(policy: Any, *, scale: float = 0.1) -> Adapter:
    """Random values in all that is trained; what is published of it."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    tensors = {name: value.clone() for name, value in peft.get_peft_model_state_dict(policy).items()}
    return Adapter(policy.peft_config["default"].to_dict(), tensors)


def merge(base: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """All tensors of the merged model."""
    merging = Merging(base)
    changes = merging.changes(adapter)
    return {name: merging.make(name, changes.get(name), dtype=base[name].dtype) for name in base}


@pytest.fixture(autouse=True)
def seeds() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_those_of_pefts_merged_model(architecture: str, dtype: torch.dtype) -> None:
    model = make_model(architecture, dtype)
    base = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in base.items()}
    norms = dtype == torch.float32  # in 16 bits they are not trained
    policy = adapt(model, LoraConfig(r=4, alpha=6, train_norms=norms), seed=0)
    adapter = shake(policy)
    merged = merge(base, adapter)
    assert all(torch.equal(base[name], before[name]) for name in base)  # frozen, whatever was merged
    expected = dict(policy.merge_and_unload().named_parameters())
    assert set(merged) == set(expected)
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6
        )
        changed += not torch.equal(tensor, before[name])
    assert changed == 2 * 7 + norms * sum("norm" in name for name in merged)


def test_patterns_and_rank_stabilised_scaling_are_pefts() -> None:
    model = make_model("qwen3")
    base = dict(model.named_parameters())
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.mlp.up_proj": 2},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
    )
    policy = peft.get_peft_model(model, config)
    merged = merge(base, shake(policy))
    expected = dict(policy.merge_and_unload().named_parameters())
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_policy_computes_with_the_merged_weights_bit_for_bit_and_is_itself_again(
    dtype: torch.dtype,
) -> None:
    model, twin = make_model("gemma3", dtype), make_model("gemma3", dtype)
    base = dict(model.named_parameters())
    policy = adapt(model, LoraConfig(r=4, train_norms=dtype == torch.float32), seed=0)
    twin.load_state_dict(merge(base, shake(policy)), strict=False)
    with torch.no_grad():
        unmerged = policy(input_ids=TOKENS).logits
        with merged_layers(policy):
            merged = policy(input_ids=TOKENS).logits
        assert torch.equal(merged, twin(input_ids=TOKENS).logits)
        assert torch.equal(policy(input_ids=TOKENS).logits, unmerged)
    assert not torch.equal(merged, unmerged)


def test_what_is_too_small_beside_a_16_bit_weight_is_lost_until_it_has_grown() -> None:
    weight = torch.full((2, 2), 1.0, dtype=torch.bfloat16)
    a, b = torch.ones(1, 2), torch.ones(2, 1)
    assert torch.equal(merged_weight(weight, a, b, 2**-9), weight)
    assert merged_weight(weight, a, b, 2**-8 * 1.5).unique().item() > 1
    assert merged_weight(weight.float(), a, b, 2**-9).unique().item() == 1 + 2**-9


def test_an_adapter_that_can_not_be_merged_is_refused_with_the_reason() -> None:
    tied = make_model("gemma3")
    merging = Merging(dict(tied.named_parameters()))
    plain = shake(adapt(tied, LoraConfig(r=2), seed=0))
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"

    def changed(config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Adapter:
        more = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
        return Adapter({**plain.config, **(config or {})}, {**plain.tensors, **more})

    for adapter, reason in (
        (changed({"fan_in_fan_out": True}), "transposed"),
        (changed(**{f"{q_proj}.lora_magnitude_vector": torch.ones(32)}), "is no weight of the model"),
        (
            changed(
                **{
                    "base_model.model.lm_head.lora_A.weight": torch.ones(2, 32),
                    "base_model.model.lm_head.lora_B.weight": torch.ones(96, 2),
                }
            ),
            "lm_head.weight is no weight of the model, or one that two layers share",
        ),
        (changed(**{f"{q_proj}.lora_A.weight": torch.ones(2, 31)}), r"it makes \(32, 31\) of"),
    ):
        with pytest.raises(BadConfig, match=reason):
            merging.changes(adapter)
