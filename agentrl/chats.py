"""One chat for each set of tools, certified before its first use.

Episodes of an environment share a :class:`agentrl.chat.Chat`; environments that differ in their tools get one
each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from agentrl.certificate import Certificate, certify
from agentrl.chat import Chat, History, template_of
from agentrl.env import Env
from agentrl.errors import UnsupportedModel
from agentrl.parsers import detect_parser, get_parser

__all__ = ["Chats"]


class Chats:
    """Gives every environment the chat of its tools: ``chats(env)``."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        parser: str | None = None,  # None: the one of the chat template
        history: History = "append",
        stop_token_ids: tuple[int, ...] = (),  # the model's own, beside the end of a turn
        on_certificate: Callable[[str], None] = lambda summary: None,
    ) -> None:
        """Raises UnsupportedModel for a tokenizer without a chat template, UnknownName for an unknown parser,
        MissingExtra for one of vLLM's without it."""
        self.parser = parser or detect_parser(template_of(tokenizer))
        self._format = get_parser(self.parser, tokenizer=tokenizer)
        self._tokenizer, self._history, self._stops = tokenizer, history, stop_token_ids
        self._on_certificate = on_certificate
        self._made: dict[str, Chat] = {}

    def __call__(self, env: Env) -> Chat:
        """The chat for ``env``'s tools. Raises UnsupportedModel where the template can't carry its
        conversations."""
        schemas = [tool.schema() for tool in env.tools]
        key = json.dumps(schemas)
        if key not in self._made:
            self._made[key] = self._certified(schemas)
        return self._made[key]

    def _certified(self, schemas: list[dict[str, Any]]) -> Chat:
        certificate = certify(self._tokenizer, schemas, parser=self._format, history=self._history)
        self._on_certificate(f"{certificate.summary} (tool calls: {self.parser})")
        if not certificate.ok:
            raise UnsupportedModel(_explain(certificate))
        return Chat(
            self._tokenizer, schemas, parser=self._format, history=self._history, stop_token_ids=self._stops
        )


def _explain(certificate: Certificate) -> str:
    rows = [
        f"{row.kind} ({row.detail.rstrip('.')})" for row in certificate.rows if row.status == "unsupported"
    ]
    return (
        f"the model's chat template can't carry these conversations exactly: {'; '.join(rows)}. "
        "Use another model, or give its tokenizer a chat template that can."
    )
