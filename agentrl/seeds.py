"""Named randomness: every generator is handed in and derived from one seed by name, never global."""

from __future__ import annotations

import hashlib

__all__ = ["derive"]


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the stream called ``names``, the same in every process: ``derive(7, "rollout", 3)``.

    SHA-256 of the names' ``repr``, so that neighbouring seeds and names give unrelated streams.
    """
    text = repr((int(seed), *names)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
