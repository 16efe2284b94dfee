"""Inference engines behind the seam of ``agentrl.engine``."""

from __future__ import annotations

__all__: list[str] = []
