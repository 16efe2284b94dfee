"""The catalogue of attacks on sandboxes and on verdicts, and what runs it: a self-check and a check."""

from __future__ import annotations

__all__: list[str] = []
