"""Make a tiny language model on the spot: a Qwen3 of a million random weights, tokenizer and chat template.

What comes out is an ordinary checkpoint that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; nothing is
downloaded. It knows nothing: a warm start teaches it the protocol, reinforcement learning the task.

The tokenizer is a byte-level BPE trained on the texts it is given, so any Unicode text survives a round trip;
digits stand alone, so arithmetic sees them one by one. Merges run across words and punctuation, so whatever
the texts say over and over becomes a few tokens: a call of a dozen words takes nine, not twenty-nine.

The template is ChatML with Hermes tool calls, append-only; it announces tools by name and parameters alone,
because every token counts in a context this small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

__all__ = ["TinyShape", "make_tiny_model"]

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # text to the model's reader
_TAG = re.compile("|".join(map(re.escape, _SPECIAL + _TAGS)))
# What the template writes around every text, so that the merges cover it too.
_SCAFFOLD = ("system\n", "user\n", "assistant\n", "tool\n", '{"name": "', '", "arguments": {"', '"}}', '": ')

_CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' -%}
        {{- messages[0].content + ('\\n' if tools else '') -}}
    {%- endif -%}
    {%- for tool in tools or [] -%}
        {{- ('' if loop.first else ' ') + tool.function.name + '(' -}}
        {{- tool.function.parameters.properties | default({}) | join(', ') + ')' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>tool\\n' -}}
        {%- endif -%}
        {{- '<tool_response>' + message.content + '</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- elif not (loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- call.function.arguments | tojson + '}</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """The size of the model: 128, 384, 4, 4, 2, 384 makes 0.84 million parameters."""

    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width inside the MLP
    layers: int
    heads: int  # attention heads, of hidden_size / heads each: an even number, for rotary positions
    kv_heads: int  # heads of keys and values; divides heads
    vocab_size: int  # tokens at most; fewer where the texts do not give that many merges
    max_position: int = 1024  # tokens of context

    def __post_init__(self) -> None:
        least = 256 + len(_SPECIAL) + len(_TAGS)
        if self.vocab_size < least:
            raise ValueError(f"vocab_size is {self.vocab_size}; bytes and special tokens alone take {least}")
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            shape = self.hidden_size, self.heads, self.kv_heads
            raise ValueError(
                f"hidden_size, heads, kv_heads are {shape}; kv_heads must divide heads, "
                "and twice the heads must divide hidden_size"
            )


def make_tiny_model(out_dir: str | Path, *, texts: Iterable[str], seed: int, shape: TinyShape) -> None:
    """Write the checkpoint into ``out_dir`` (made if missing), in about a second.

    ``texts`` are what the tokenizer learns its merges from: prompts, answers, rendered calls of the
    environment. The same texts, seed and shape give the same files. No global random state is read or
    changed.
    """
    tokenizer = _make_tokenizer(texts, vocab_size=shape.vocab_size)
    model = _make_model(tokenizer, seed=seed, shape=shape)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    model.save_pretrained(out_dir)


def _make_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_SPECIAL) - len(_TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_texts(texts), trainer)
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in _TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _training_texts(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _TAG.split(text)  # added tokens are never split, so merges inside them would be wasted
        yield from _SCAFFOLD


def _make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, shape: TinyShape) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=shape.max_position,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        # Only the CPU's generator: torch.manual_seed would reseed the GPUs' too, which the fork does not
        # restore.
        torch.default_generator.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
