"""What ``agentrl.judge`` is made of: its records, its conversations, and what of it runs in sandboxes."""

from __future__ import annotations

__all__: list[str] = []
