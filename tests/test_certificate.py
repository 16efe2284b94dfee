"""What is found out about a template before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from agentrl.certificate import Certificate, CertificateRow, certify
from agentrl.errors import UnsupportedModel
from agentrl.parsers import get_parser
from agentrl.tiny import TinyShape, make_tiny_model

TEMPLATES = Path(__file__).parent / "templates"
TOKENS = (
    *("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
)
TOOL = {
    "type": "function",
    "function": {"name": "search", "description": "Find.", "parameters": {"properties": {}}},
}
PLAIN = ("plain", "multi-turn", "unicode", "thinking")
TOOLS = ("tool-call", "tool-result", "text-and-call", "parallel-call")

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    shape = TinyShape(hidden_size=8, intermediate_size=8, layers=1, heads=2, kv_heads=1, vocab_size=384)
    make_tiny_model(path, texts=["What is 2 + 2? It is 4."] * 30, seed=0, shape=shape)
    return path


@pytest.fixture
def load(checkpoint: Path) -> Load:
    def tokenizer(name: str) -> Any:
        loaded: Any = AutoTokenizer.from_pretrained(checkpoint)
        loaded.add_tokens([AddedToken(text, special=True) for text in TOKENS], special_tokens=True)
        loaded.bos_token = "<|begin_of_text|>"
        if name != "tiny":
            loaded.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        return loaded

    return tokenizer


def certificate_of(tokenizer: Any, *, tools: bool = True, parser: str = "hermes") -> Certificate:
    return certify(tokenizer, [TOOL] if tools else [], parser=get_parser(parser))


def statuses(certificate: Certificate) -> dict[str, str]:
    return {row.kind: row.status for row in certificate.rows}


def test_the_tiny_template_extends_in_every_kind(load: Load) -> None:
    certificate = certificate_of(load("tiny"))
    assert statuses(certificate) == dict.fromkeys((*PLAIN, *TOOLS), "extends")
    assert certificate.ok
    assert certificate.summary == "chat template: 8 of 8 kinds extend"


def test_a_template_that_drops_old_thoughts_is_named_with_the_first_difference(load: Load) -> None:
    certificate = certificate_of(load("qwen3_like"))
    rows = {row.kind: row for row in certificate.rows}
    assert certificate.ok
    assert rows["plain"].status == rows["tool-call"].status == "extends"
    assert rows["thinking"].status == "rewrites"
    assert "the episode has" in rows["thinking"].detail
    assert "<think>" in rows["thinking"].detail
    assert certificate.summary.startswith("chat template: 2 of 8 kinds extend; rewritten: multi-turn")


def test_one_call_a_turn_is_reported_and_no_obstacle(load: Load) -> None:
    certificate = certificate_of(load("llama3_like"))
    found = statuses(certificate)
    assert found.pop("parallel-call") == "unsupported"
    assert found == dict.fromkeys((*PLAIN, "tool-call", "tool-result", "text-and-call"), "extends")
    assert certificate.ok
    assert certificate.summary == "chat template: 7 of 8 kinds extend; unsupported: parallel-call"


def test_a_template_that_writes_no_text_beside_a_call_is_no_obstacle(load: Load) -> None:
    certificate = certificate_of(load("llama3_json_like"), parser="llama3_json")
    assert certificate.ok
    assert certificate.summary.endswith("6 of 8 kinds extend; unsupported: text-and-call, parallel-call")


def test_a_template_that_ignores_tools_is_fine_without_them_and_not_with_them(load: Load) -> None:
    tokenizer = load("gemma_like")
    assert certificate_of(tokenizer, tools=False).ok
    certificate = certificate_of(tokenizer)
    assert not certificate.ok
    assert statuses(certificate) == dict.fromkeys(PLAIN, "extends") | dict.fromkeys(TOOLS, "unsupported")
    (detail,) = {row.detail for row in certificate.rows if row.kind in TOOLS}
    assert "does not tell the model about search" in detail


def test_calls_that_the_parser_does_not_read_back_are_found(load: Load) -> None:
    tokenizer = load("tiny")
    tokenizer.chat_template = tokenizer.chat_template.replace('"arguments": ', '"parameters": ')
    certificate = certificate_of(tokenizer)
    assert not certificate.ok
    assert statuses(certificate)["tool-call"] == "unsupported"
    assert "the parser reads" in certificate.rows[-1].detail


def test_a_tokenizer_without_a_template_has_no_certificate(load: Load) -> None:
    tokenizer = load("tiny")
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedModel, match="has no chat template"):
        certificate_of(tokenizer)


def test_the_summary_says_what_becomes_of_rewritten_history() -> None:
    rows = (CertificateRow("plain", "extends"), CertificateRow("thinking", "rewrites", "..."))
    assert Certificate(rows, "append").summary == (
        "chat template: 1 of 2 kinds extend; rewritten: thinking (kept as sampled)"
    )
    assert Certificate(rows, "template").summary.endswith("(a new sample begins at the next user message)")
