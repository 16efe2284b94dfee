"""The model that is made on the spot."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.tiny import TinyShape, make_tiny_model

TEXTS = [f"What is {i} times {i + 3}? The answer is \\boxed{{{i * (i + 3)}}}." for i in range(200)]


def shape(**changes: int) -> TinyShape:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "vocab_size": 384,
    }
    return TinyShape(**{**sizes, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "new" / "folder"
    make_tiny_model(path, texts=TEXTS, seed=1, shape=shape())
    return path


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_it_loads_as_an_ordinary_qwen3_checkpoint_of_about_a_million_parameters(
    checkpoint: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(tokenizer) <= 384
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_same_texts_and_seed_give_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "again", texts=iter(TEXTS), seed=1, shape=shape())
    make_tiny_model(tmp_path / "other", texts=TEXTS, seed=2, shape=shape())
    assert digests(tmp_path / "again") == digests(checkpoint)
    other = digests(tmp_path / "other")
    assert {name for name in other if other[name] != digests(checkpoint)[name]} == {"model.safetensors"}


def test_making_it_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make_tiny_model(tmp_path, texts=TEXTS, seed=1, shape=shape(layers=1))
    assert torch.equal(torch.get_rng_state(), before)


@given(text=st.text())
def test_any_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_the_texts_say_over_and_over_is_a_few_tokens(tokenizer: Any) -> None:
    assert len(tokenizer.encode("What is 8 times 9? The answer is \\boxed{72}.")) <= 9


def test_every_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("is 1234 + 56.7"))
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("1234567")


def test_words_of_the_texts_and_of_the_protocol_are_short(tokenizer: Any) -> None:
    assert len(tokenizer.encode("The answer is ")) <= 5
    assert len(tokenizer.encode('<|im_start|>assistant\n<tool_call>{"name": "')) <= 8


def test_turn_tokens_are_special_and_tool_tags_are_not(tokenizer: Any) -> None:
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    tags = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
    assert {text for text, special in added.items() if not special} == tags
    assert {text for text, special in added.items() if special} == {
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    }


def test_tools_are_announced_by_name_and_parameters_alone(tokenizer: Any) -> None:
    schema = {"type": "object", "properties": {"left": {"type": "integer"}, "right": {"type": "integer"}}}
    tools = [
        {"type": "function", "function": {"name": "add", "description": "Long story.", "parameters": schema}}
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.\nadd(left, right)<|im_end|>\n"
        "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"vocab_size": 262}, "vocab_size is 262"), ({"heads": 3}, "heads"), ({"kv_heads": 3}, "kv_heads")],
)
def test_an_impossible_shape_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape(**changes)
