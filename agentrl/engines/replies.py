"""What a reply of /v1/completions says, each part checked before anybody relies on it.

Every function is pure and raises BadReply, with what is wrong, for a reply that says nothing usable. Token
ids and logprobs are those that ``vllm serve`` adds for ``return_token_ids`` and ``logprobs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import httpx
import numpy as np

from agentrl.engines.server import BadReply
from agentrl.types import Completion, Finish, FloatArray, IntArray

__all__ = [
    "Reply",
    "check_prompt",
    "check_stop",
    "find_distribution_fault",
    "read_finish",
    "read_logprobs",
    "read_prompt_logprobs",
    "read_reply",
    "read_text",
    "read_token_ids",
]

_FINISHES: Mapping[Any, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}
_IMPOSSIBLE = -9998.0  # nats; vLLM writes -9999 for minus infinity
_ROUNDING = 1e-3  # nats above 0 that a logprob may be through rounding
# At the probe's temperature of 1000 logprobs after temperature differ by a thousandth of the logits' range,
# so by less than this where logits range over 500, and each is about minus the log of the vocabulary's size.
_CERTAIN = 1e-3  # nats below 0 that a certain token may have


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply with one completion."""

    choice: Mapping[str, Any]  # as it came
    prompt_tokens: int | None  # that the server counted; None where it does not say


def read_reply(response: httpx.Response) -> Reply:
    """The reply with its one completion."""
    try:
        reply = response.json()
    except ValueError as error:
        kind = response.headers.get("content-type", "unknown")
        raise BadReply(f"it is no JSON ({error}), of content-type {kind}") from error
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadReply("it should be an object with one choice")
    usage = reply.get("usage")
    return Reply(choices[0], usage.get("prompt_tokens") if isinstance(usage, dict) else None)


def check_prompt(reply: Reply, prompt_ids: IntArray) -> None:
    """Raise BadReply where the server says that its model saw another prompt than ``prompt_ids`` (P,)."""
    seen = reply.choice.get("prompt_token_ids")
    if seen is not None and seen != np.asarray(prompt_ids).tolist():
        raise BadReply("its prompt_token_ids are not those that were sent: it changes prompts")
    counted = reply.prompt_tokens
    if counted is not None and counted != len(prompt_ids):
        raise BadReply(
            f"it counted {counted} prompt tokens where {len(prompt_ids)} were sent: it changes prompts"
        )


def read_finish(choice: Mapping[str, Any]) -> Finish:
    """Why the completion ended."""
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or reason not in _FINISHES:
        raise BadReply(f"its finish_reason is {reason!r}; it should be stop, length or abort")
    return _FINISHES[reason]


def read_text(choice: Mapping[str, Any]) -> str:
    """What was said."""
    text = choice.get("text")
    if not isinstance(text, str):
        raise BadReply(f"its text is {text!r}")
    return text


def read_token_ids(choice: Mapping[str, Any], *, most: int) -> IntArray | None:
    """The sampled ids (C,), at most ``most``; None where the server does not say them."""
    ids = choice.get("token_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 1 << 31 for one in ids):
        raise BadReply("its token_ids are no list of ids")
    if len(ids) > most:
        raise BadReply(f"it has {len(ids)} token_ids where at most {most} were asked for")
    return np.array(ids, np.int32)


def read_logprobs(choice: Mapping[str, Any], *, count: int) -> FloatArray | None:
    """The logprobs (C,) of the ``count`` sampled ids in nats; None where the server does not say them."""
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return None
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(values, list) or len(values) != count:
        found = len(values) if isinstance(values, list) else "no"
        raise BadReply(f"it has {count} token_ids and {found} token_logprobs; each token should have one")
    return _logprob_array(values)


def read_prompt_logprobs(choice: Mapping[str, Any], token_ids: IntArray) -> FloatArray:
    """The logprobs (T,) of the prompt ``token_ids`` (T,) in nats; the first: 0.

    vLLM gives for each position a mapping of ids to ``{"logprob": ...}``, null for the first.
    """
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(token_ids):
        found = len(rows) if isinstance(rows, list) else "no"
        raise BadReply(f"it has {found} prompt_logprobs for a prompt of {len(token_ids)} tokens")
    values: list[Any] = [0.0]
    for row, token_id in zip(rows[1:], token_ids[1:], strict=True):
        entry = row.get(str(int(token_id))) if isinstance(row, dict) else None
        values.append(entry.get("logprob") if isinstance(entry, dict) else None)
    return _logprob_array(values)


def check_stop(token_ids: IntArray, finish: Finish, stop_token_ids: Sequence[int]) -> None:
    """Raise BadReply where a completion (C,) ended otherwise than it was told to."""
    last = int(token_ids[-1]) if len(token_ids) else None
    if finish == "stop" and last not in stop_token_ids:
        raise BadReply(
            f"it stopped at token {last}, which is none of the stop_token_ids {list(stop_token_ids)}: the "
            "server stops for reasons of its own (--generation-config vllm takes its defaults away)"
        )
    if not len(token_ids):
        raise BadReply("it has no token at all, though at least one was asked for")


def find_distribution_fault(probe: Completion) -> str:
    """Why the logprobs of a completion that was sampled with a top_k of 1 are not those of the distribution
    that was sampled from; "" where they are."""
    if probe.logprobs.min() >= -_CERTAIN:
        return ""
    return (
        f"where only one token can be sampled its logprobs go down to {probe.logprobs.min():.2f} nats: "
        "they are not of the distribution after temperature that it samples from"
    )


def _logprob_array(values: Sequence[Any]) -> FloatArray:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadReply(f"one of its logprobs is {value!r}; each should be a finite number")
        if not _IMPOSSIBLE < value <= _ROUNDING:
            raise BadReply(
                f"one of its logprobs is {value:g}; each should be 0 nats at most, and above -9998"
            )
    return cast(FloatArray, np.minimum(np.array(values, np.float32), np.float32(0)))
