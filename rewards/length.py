"""The overlong penalty of DAPO (arXiv 2503.14476): a soft wall in front of the length limit.

0 up to ``max_tokens - buffer_tokens`` sampled tokens, falling linearly to -1 at ``max_tokens`` and staying
there.
"""

from __future__ import annotations

from agentrl.errors import BadConfig
from agentrl.reward import Evidence
from agentrl.types import Score

__all__ = ["Length"]


class Length:
    """The penalty, in [-1, 0], of the tokens sampled in an episode; 0 where nobody counted them."""

    inline = True

    def __init__(self, *, max_tokens: int, buffer_tokens: int) -> None:
        if not 1 <= buffer_tokens <= max_tokens:
            raise BadConfig(
                f"length can't use max_tokens={max_tokens!r}, buffer_tokens={buffer_tokens!r}: "
                "the buffer is at least 1 token and at most max_tokens"
            )
        self.max_tokens = max_tokens
        self.buffer_tokens = buffer_tokens

    def __call__(self, evidence: Evidence) -> Score:
        """In [-1, 0], with parts ``overlong``."""
        over = evidence.completion_tokens - (self.max_tokens - self.buffer_tokens)
        penalty = -min(max(over / self.buffer_tokens, 0.0), 1.0)
        note = f"{evidence.completion_tokens} tokens, of {self.max_tokens} allowed" if penalty else ""
        return Score(penalty + 0.0, {"overlong": penalty + 0.0}, note)  # + 0.0: no -0.0 in tables
